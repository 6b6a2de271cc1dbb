//! Builds the two editions of plugins/access-log that `laelaps demo` carries, so that a clean clone needs nothing but `cargo run -- demo`.
//!
//! They are WebAssembly, so another cargo compiles them, into a folder of its own: it never waits for the one that runs this script, and what it
//! compiled stays for the next time. Afterwards `access-log-1.wasm` and `access-log-2.wasm` are in `OUT_DIR`.

#![allow(clippy::disallowed_methods, reason = "a build script is told everything by its environment, and may block")]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-wasip2";
const WITHOUT: &str = "to build without the demo: `--no-default-features`";
/// What the plugin is made of, from the workspace's root. A change elsewhere does not build it again.
const SOURCES: [&str; 10] = [
    "Cargo.lock",
    "Cargo.toml",
    "plugins/access-log/Cargo.toml",
    "plugins/access-log/src",
    "sdk/rust/Cargo.toml",
    "sdk/rust/README.md",
    "sdk/rust/macros",
    "sdk/rust/src",
    "wit",
    "rust-toolchain.toml",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_DEMO").is_none() {
        return;
    }
    if let Err(message) = build_editions() {
        // Cargo shows these lines as the build's errors, and fails it.
        for line in message.lines().chain([WITHOUT]) {
            println!("cargo::error={line}");
        }
    }
}

fn build_editions() -> Result<(), String> {
    let workspace = given("CARGO_MANIFEST_DIR")?.join("../..");
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    let out = given("OUT_DIR")?;
    add_target_if_missing()?;
    let folder = target_folder(&out).join("plugins");
    for (edition, features) in [(1, ""), (2, "second-edition")] {
        let component = build_plugin(&workspace, &folder, features)?;
        let place = out.join(format!("access-log-{edition}.wasm"));
        fs::copy(&component, &place).map_err(|error| format!("{} to {}: {error}", component.display(), place.display()))?;
    }
    Ok(())
}

/// A folder or program that cargo names to every build script.
fn given(name: &str) -> Result<PathBuf, String> {
    env::var_os(name).map(PathBuf::from).ok_or_else(|| format!("cargo did not set {name}; build with cargo"))
}

/// Cargo's target folder, which it does not name: `OUT_DIR` is `TARGET/PROFILE/build/PACKAGE/out` in it.
fn target_folder(out: &Path) -> &Path {
    out.ancestors().nth(4).unwrap_or(out)
}

/// The standard library for the target: rustup does not everywhere fetch by itself what rust-toolchain.toml asks for.
fn add_target_if_missing() -> Result<(), String> {
    let rustc = given("RUSTC")?;
    let mut asked = Command::new(&rustc);
    asked.args(["--print", "target-libdir", "--target", TARGET]);
    let answer = asked.output().map_err(|error| format!("{} cannot be run: {error}", rustc.display()))?;
    let libraries = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
    if answer.status.success() && libraries.exists() {
        return Ok(());
    }
    let by_hand = format!("add it by hand: `rustup target add {TARGET}`, or with the package manager that Rust came from");
    // The toolchain of this build is in RUSTUP_TOOLCHAIN, which rustup heeds.
    let added = Command::new("rustup").args(["target", "add", TARGET]).env("RUST_BACKTRACE", "0").output();
    match added {
        Ok(output) if output.status.success() => {
            println!("cargo::warning=added Rust's target {TARGET}, which the demo's plugins are compiled for");
            Ok(())
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("Rust's target {TARGET} is missing, and `rustup target add {TARGET}` failed: {}\n{by_hand}", said.trim()))
        }
        Err(error) => Err(format!("Rust's target {TARGET} is missing, and rustup cannot be run to add it: {error}\n{by_hand}")),
    }
}

/// Compiles the plugin, and says where the component is.
fn build_plugin(workspace: &Path, folder: &Path, features: &str) -> Result<PathBuf, String> {
    let mut cargo = Command::new(given("CARGO")?);
    cargo
        .current_dir(workspace)
        .args(["build", "--quiet", "--locked", "--package", "access-log", "--profile", "plugin"])
        .args(["--target", TARGET, "--features", features, "--target-dir"])
        .arg(folder);
    for name in inherited().filter(|name| belongs_to_the_outer_build(&name.to_string_lossy())) {
        cargo.env_remove(name);
    }
    let output = cargo.output().map_err(|error| format!("cargo cannot be run for the demo's plugins: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("plugins/access-log, which the demo runs, does not build for {TARGET}:\n{}", said.trim()));
    }
    Ok(folder.join(TARGET).join("plugin/access_log.wasm"))
}

fn inherited() -> impl Iterator<Item = OsString> {
    env::vars_os().map(|(name, _)| name)
}

/// Whether a variable says something about the outer build, which is for another target, perhaps under a wrapper such as clippy's or with flags
/// such as those of a coverage run, that the plugin's build must not take over. The jobserver (CARGO_MAKEFLAGS) is shared.
fn belongs_to_the_outer_build(name: &str) -> bool {
    const PREFIXES: [&str; 6] = ["CARGO_BUILD_", "CARGO_CFG_", "CARGO_FEATURE_", "CARGO_MANIFEST_", "CARGO_PKG_", "DEP_"];
    const NAMES: [&str; 19] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_PRIMARY_PACKAGE",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
        "DEBUG",
        "HOST",
        "NUM_JOBS",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTC",
        "RUSTC_LINKER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "TARGET",
        "__CARGO_DEFAULT_LIB_METADATA",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}
