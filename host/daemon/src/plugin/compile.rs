//! Compiling, in a child process of the same program.
//!
//! Compiling hostile code is the one step of admission that has no bound of its own on time or memory, so it happens where both can be
//! bounded and where a crash costs nobody anything. The child gets the module on standard input, writes compiled code to standard output
//! (a file in the private folder) and a refusal to standard error. It bounds itself before it reads a byte. Standard input stays open while
//! it works: when it ends early, the parent is gone or has lost interest, and the child ends itself.
//!
//! Compiled code is only ever loaded from that folder, under a name that says which file it came from, which settings it was compiled with
//! and what it has to hash to; it is read whole and checked first, so a file that was torn by a crash is compiled again, not run.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, SystemTime};

use rustix::process::{Resource, Rlimit};
use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use wasmtime::component::Component;

use super::scratch::Scratch;
use super::{CompileLimits, Config, Digest, Error, engine};

/// The hidden first argument that turns the program into the compiler. Three more follow: memory in bytes, time in seconds, and the size of
/// the module that comes on standard input.
pub const COMPILE_ARGUMENT: &str = "compile-plugin";

/// Compiled code cannot be larger than this.
const CODE_BYTES_MAX: u64 = 4 << 30;
/// What is read of the child's standard error.
const STDERR_BYTES_MAX: u64 = 16 << 10;
/// Compiled modules that the folder may keep; the one unused for longest goes first.
const CACHED_MAX: usize = 64;
/// The child refused the module.
const EXIT_REFUSED: i32 = 3;
/// The child could not do its work.
const EXIT_UNABLE: i32 = 4;

/// Compiles modules and keeps the results.
pub(super) struct Compiler {
    program: PathBuf,
    limits: CompileLimits,
    folder: PathBuf,
    /// What the code was compiled with, in hexadecimal.
    compatibility: String,
    /// One at a time: the bound on memory is for one.
    turn: tokio::sync::Mutex<()>,
    /// Removes a folder that nobody named. Held for its drop.
    _scratch: Option<Scratch>,
}

/// Why a module was not compiled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It never will be.
    Refused(String),
    /// It may be, another time: the disk was full, the system was out of memory.
    Unable(String),
}

impl Compiler {
    pub(super) fn new(wasmtime: &wasmtime::Engine, config: &Config) -> Result<Self, Error> {
        let (folder, scratch) = match &config.cache_folder {
            Some(folder) => (folder.clone(), None),
            None => {
                let parent = std::env::temp_dir();
                let scratch = Scratch::new(&parent).map_err(|source| {
                    let problem = "no temporary folder can be made in it".into();
                    Error::Cache { folder: parent, problem, source: Some(source) }
                })?;
                (scratch.path().to_owned(), Some(scratch))
            }
        };
        check_private(&folder)?;
        let mut hasher = DefaultHasher::new();
        wasmtime.precompile_compatibility_hash().hash(&mut hasher);
        Ok(Self {
            // Not the path this program was started by: that file may have been replaced by an upgrade meanwhile.
            program: config.compiler.clone().unwrap_or_else(|| PathBuf::from("/proc/self/exe")),
            limits: config.compile_limits.clone(),
            folder,
            compatibility: format!("{:016x}", hasher.finish()),
            turn: tokio::sync::Mutex::new(()),
            _scratch: scratch,
        })
    }

    /// The component in these bytes: from the folder, or compiled now.
    pub(super) async fn component(
        &self,
        wasmtime: &wasmtime::Engine,
        bytes: &[u8],
        digest: Digest,
    ) -> Result<Component, Failure> {
        let _turn = self.turn.lock().await;
        if let Some(component) = self.cached(wasmtime, digest).await {
            return Ok(component);
        }
        refuse_what_is_no_component(bytes)?;
        let output =
            NamedTempFile::with_prefix_in(".compiling-", &self.folder).map_err(|error| self.unable("make a file in", &error))?;
        self.run_child(bytes, &output).await?;
        let (path, name_start) = (self.folder.clone(), self.name_start(digest));
        let loaded = blocking(wasmtime, move |wasmtime| {
            let code = fs::read(output.path()).map_err(|error| error.to_string())?;
            let component = load(wasmtime, &code)?;
            let kept = output.as_file().sync_all().and_then(|()| {
                let name = path.join(format!("{name_start}{}.cwasm", Digest::of(&code).short()));
                output.persist(name).map(drop).map_err(|error| error.error)
            });
            if let Err(error) = kept {
                tracing::warn!(folder = %path.display(), %error, "compiled code cannot be kept: it will be compiled again next time");
            }
            prune(&path);
            Ok(component)
        });
        loaded.await.map_err(|reason| Failure::Refused(load_problem(&reason)))
    }

    /// The name's part before the digest of the code itself.
    fn name_start(&self, digest: Digest) -> String {
        format!("{digest}-{}-", self.compatibility)
    }

    async fn cached(&self, wasmtime: &wasmtime::Engine, digest: Digest) -> Option<Component> {
        let (folder, name_start) = (self.folder.clone(), self.name_start(digest));
        let cached = blocking(wasmtime, move |wasmtime| {
            let found = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let hash = name.strip_prefix(&name_start)?.strip_suffix(".cwasm")?.to_owned();
                Some((entry.path(), hash))
            });
            let Some((path, hash)) = found else { return Ok(None) };
            let code = fs::read(&path).map_err(|error| error.to_string())?;
            if Digest::of(&code).short() != hash {
                tracing::warn!(file = %path.display(), "compiled code was damaged: it is compiled again");
                let _ = fs::remove_file(&path);
                return Ok(None);
            }
            // Its age decides when it has to make room.
            let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let _ = fs::File::open(&path)
                .map(|file| rustix::fs::futimens(file, &rustix::fs::Timestamps { last_access: now, last_modification: now }));
            load(wasmtime, &code).map(Some)
        });
        cached.await.unwrap_or_else(|reason| {
            tracing::warn!(%digest, %reason, "kept code cannot be loaded: it is compiled again");
            None
        })
    }

    async fn run_child(&self, bytes: &[u8], output: &NamedTempFile) -> Result<(), Failure> {
        let stdout = output.as_file().try_clone().map_err(|error| self.unable("use a file in", &error))?;
        let mut child = Command::new(&self.program)
            .arg(COMPILE_ARGUMENT)
            .arg(self.limits.memory_bytes.to_string())
            .arg(self.limits.time.as_secs().max(1).to_string())
            .arg(bytes.len().to_string())
            // Nothing of this process's environment is the compiler's business.
            .env_clear()
            // Our allocator reserves memory ahead; the bound shall count what is used.
            .env("MIMALLOC_ARENA_EAGER_COMMIT", "0")
            // A signal that a terminal sends to this process's group is not meant for the compiler.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::Unable(format!("the compiler {} cannot be started: {error}", self.program.display())))?;
        let patience = self.limits.time.max(Duration::from_secs(1)) * 4;
        let ended = tokio::time::timeout(patience, feed(&mut child, bytes)).await;
        match ended {
            Ok(Ok((status, stderr))) => self.judge(status, &stderr),
            Ok(Err(error)) => Err(Failure::Unable(format!("the compiler {} cannot be watched: {error}", self.program.display()))),
            // It may be the machine that was too busy.
            Err(_) => Err(Failure::Unable(format!("compiling it takes longer than {} s", patience.as_secs()))),
        }
    }

    fn judge(&self, status: ExitStatus, stderr: &str) -> Result<(), Failure> {
        if status.success() {
            return Ok(());
        }
        let memory = self.limits.memory_bytes;
        if stderr.contains("memory allocation of") || stderr.contains("Cannot allocate memory") {
            return Err(Failure::Refused(format!("compiling it needs more than {memory} bytes of memory")));
        }
        match (status.code(), status.signal()) {
            (Some(EXIT_REFUSED), _) => Err(Failure::Refused(stderr.trim().to_owned())),
            (Some(EXIT_UNABLE), _) => Err(Failure::Unable(stderr.trim().to_owned())),
            (_, Some(signal)) if signal == rustix::process::Signal::XCPU.as_raw() => {
                Err(Failure::Refused(format!("compiling it needs more than {} s of processor time", self.limits.time.as_secs())))
            }
            (_, Some(signal)) if signal == rustix::process::Signal::XFSZ.as_raw() => {
                Err(Failure::Refused(format!("its compiled form is larger than {CODE_BYTES_MAX} bytes")))
            }
            (_, Some(signal)) if !is_crash(signal) => Err(Failure::Unable(format!(
                "the compiler was ended by signal {signal}, perhaps because the system is out of memory"
            ))),
            _ => {
                let first = stderr.lines().next().unwrap_or("without a word");
                Err(Failure::Refused(format!("the compiler crashed on it ({status}): {first}")))
            }
        }
    }

    fn unable(&self, doing: &str, error: &io::Error) -> Failure {
        Failure::Unable(format!("cannot {doing} the folder for compiled code {}: {error}", self.folder.display()))
    }
}

/// Whether a signal says that the process itself went wrong, rather than that somebody ended it.
fn is_crash(signal: i32) -> bool {
    use rustix::process::Signal;
    [Signal::ABORT, Signal::SEGV, Signal::BUS, Signal::ILL, Signal::FPE, Signal::TRAP, Signal::SYS]
        .iter()
        .any(|crash| crash.as_raw() == signal)
}

/// Why compiled code cannot be loaded, in our words where a plugin can do something about it.
fn load_problem(reason: &str) -> String {
    let minimum = reason.split_once("memory has a minimum byte size of ").and_then(|(_, rest)| rest.split_whitespace().next());
    match minimum.and_then(|bytes| bytes.parse::<u64>().ok()) {
        Some(bytes) => format!("it needs {bytes} bytes of memory from the start, more than the largest limit of all routes"),
        None => format!("its compiled form cannot be loaded: {reason}"),
    }
}

/// Say at once what needs no compiler to be seen.
fn refuse_what_is_no_component(bytes: &[u8]) -> Result<(), Failure> {
    let problem = match bytes {
        [] => "the file is empty",
        [0x7f, b'E', b'L', b'F', ..] => {
            "it is compiled code or a program (ELF), which is never loaded; drop the .wasm component that it was made from"
        }
        [0, b'a', b's', b'm', version, _, 0, 0, ..] if *version == 1 => {
            "it is a core WebAssembly module, not a component; build it for wasm32-wasip2, or wrap it with `wasm-tools component new`"
        }
        [0, b'a', b's', b'm', _, _, 1, 0, ..] => return Ok(()),
        [0, b'a', b's', b'm', ..] if bytes.len() < 8 => "the file is truncated: it ends within the first 8 bytes",
        [0, b'a', b's', b'm', ..] => "it is WebAssembly of an unknown version",
        _ => "it is not WebAssembly: it does not begin with the bytes 00 61 73 6d",
    };
    Err(Failure::Refused(problem.into()))
}

/// Give the child its module, and wait for its end with its standard input still open.
async fn feed(child: &mut Child, bytes: &[u8]) -> io::Result<(ExitStatus, String)> {
    let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let write = async {
        if let Some(stdin) = &mut stdin {
            // The child may end before it has read all; its status says why.
            let _ = stdin.write_all(bytes).await;
            let _ = stdin.flush().await;
        }
    };
    let read = async {
        let mut text = Vec::new();
        if let Some(stderr) = stderr {
            stderr.take(STDERR_BYTES_MAX).read_to_end(&mut text).await?;
        }
        io::Result::Ok(String::from_utf8_lossy(&text).into_owned())
    };
    let ((), text) = tokio::join!(write, read);
    let status = child.wait().await?;
    drop(stdin);
    Ok((status, text?))
}

/// Load code that this very process, or one with the same settings, has compiled.
fn load(wasmtime: &wasmtime::Engine, code: &[u8]) -> Result<Component, String> {
    // SAFETY: the bytes were written by our own compiler into a folder that only this user can write to, and they hash to the name they
    // were kept under. They are copied, so nothing that later happens to a file matters.
    #[allow(unsafe_code, reason = "loading compiled code cannot be checked further; see the SAFETY comment")]
    unsafe { Component::deserialize(wasmtime, code) }.map_err(|error| format!("{error:#}"))
}

/// Run what reads and hashes large files where it may block.
async fn blocking<T: Send + 'static>(
    wasmtime: &wasmtime::Engine,
    work: impl FnOnce(&wasmtime::Engine) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let wasmtime = wasmtime.clone();
    tokio::task::spawn_blocking(move || work(&wasmtime)).await.map_err(|error| error.to_string())?
}

/// Make the folder if it is missing, and insist that nobody else can write to it.
fn check_private(folder: &Path) -> Result<(), Error> {
    let refuse =
        |problem: &str, source: Option<io::Error>| Error::Cache { folder: folder.to_owned(), problem: problem.into(), source };
    if let Err(error) = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder) {
        return Err(refuse("it cannot be made", Some(error)));
    }
    let metadata = fs::symlink_metadata(folder).map_err(|error| refuse("it cannot be read", Some(error)))?;
    if !metadata.is_dir() {
        return Err(refuse("it is not a folder itself (a symbolic link is not accepted)", None));
    }
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(refuse(&format!("it belongs to user {}, not to this one", metadata.uid()), None));
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(refuse(&format!("others can reach it: its mode is {:04o}", metadata.mode() & 0o7777), None));
    }
    Ok(())
}

/// Keep the folder bounded, and free of what killed processes left behind.
fn prune(folder: &Path) {
    let mut files: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok) {
        let path = entry.path();
        let Some(modified) = entry.metadata().ok().and_then(|metadata| metadata.modified().ok()) else { continue };
        let is_old = modified.elapsed().is_ok_and(|age| age > Duration::from_secs(24 * 60 * 60));
        if entry.file_name().as_encoded_bytes().starts_with(b".compiling-") && is_old {
            let _ = fs::remove_file(path);
        } else if path.extension() == Some(OsStr::new("cwasm")) {
            files.push((modified, path));
        }
    }
    files.sort();
    for (_, path) in files.iter().take(files.len().saturating_sub(CACHED_MAX)) {
        let _ = fs::remove_file(path);
    }
}

/// What `main` does first if the first argument is [`COMPILE_ARGUMENT`]: compile the module on standard input to standard output, within
/// the bounds that the other arguments name. Exit status 0, 3 (the module is refused) or 4 (it could not be tried), with the
/// reason on standard error.
#[expect(clippy::disallowed_methods, reason = "a child that only compiles: nothing to drain, nothing to drop")]
pub fn compile_child_main() -> ! {
    let status = match compile_child() {
        Ok(()) => 0,
        Err(Failure::Refused(reason)) => {
            eprintln!("{reason}");
            EXIT_REFUSED
        }
        Err(Failure::Unable(reason)) => {
            eprintln!("{reason}");
            EXIT_UNABLE
        }
    };
    std::process::exit(status)
}

fn compile_child() -> Result<(), Failure> {
    let numbers: Vec<u64> = std::env::args().skip(2).filter_map(|argument| argument.parse().ok()).collect();
    let [memory_bytes, seconds, size] = numbers[..] else {
        return Err(Failure::Unable(format!("`{COMPILE_ARGUMENT}` is how Laelaps calls itself, and no command for people")));
    };
    bound_this_process(memory_bytes, seconds).map_err(|error| Failure::Unable(format!("cannot bound the compiler: {error}")))?;
    let mut bytes = Vec::new();
    io::stdin()
        .take(size)
        .read_to_end(&mut bytes)
        .map_err(|error| Failure::Unable(format!("cannot read the module: {error}")))?;
    if bytes.len() as u64 != size {
        return Err(Failure::Unable("the host is gone".into()));
    }
    end_with_the_parent()?;
    let unable = |error: &wasmtime::Error| Failure::Unable(format!("cannot set up the compiler: {error:#}"));
    let wasmtime = wasmtime::Engine::new(&engine::code_settings()).map_err(|error| unable(&error))?;
    let code = wasmtime.precompile_component(&bytes).map_err(|error| Failure::Refused(compile_problem(&error, bytes.len())))?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&code)
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::Unable(format!("cannot write the compiled code: {error}")))
}

/// The compiler's words, and what they most likely mean.
fn compile_problem(error: &wasmtime::Error, size: usize) -> String {
    let text = format!("{error:#}");
    if text.contains("unexpected end") || text.contains("is out of bounds (bound") {
        format!("the file is truncated at its {size} bytes, or was never whole: {text}")
    } else {
        format!("it is not a valid component: {text}")
    }
}

fn bound_this_process(memory_bytes: u64, seconds: u64) -> io::Result<()> {
    let set = |resource, soft, hard| rustix::process::setrlimit(resource, Rlimit { current: Some(soft), maximum: Some(hard) });
    // Data counts what is really asked for; address space would count what is only reserved.
    set(Resource::Data, memory_bytes, memory_bytes)?;
    set(Resource::Cpu, seconds, seconds + 1)?;
    set(Resource::Fsize, CODE_BYTES_MAX, CODE_BYTES_MAX)?;
    set(Resource::Core, 0, 0)?;
    // Tasks come first, and when memory runs out, this process has to go first. Both are favours that may be denied.
    let _ = rustix::process::nice(10);
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    Ok(())
}

/// End this process as soon as standard input ends, which the parent keeps open while it waits.
fn end_with_the_parent() -> Result<(), Failure> {
    #[expect(clippy::disallowed_methods, reason = "the parent is gone, and with it everybody who would use the result")]
    let wait = || {
        let _ = io::stdin().read(&mut [0]);
        std::process::exit(EXIT_UNABLE);
    };
    std::thread::Builder::new()
        .name("parent".into())
        .spawn(wait)
        .map(drop)
        .map_err(|error| Failure::Unable(format!("cannot start a thread: {error}")))
}
