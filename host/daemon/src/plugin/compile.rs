//! Compiling, in a child process of the same program.
//!
//! Compiling hostile code is the one step of admission that has no bound of its own on time or memory, so it happens where both can be
//! bounded and where a crash costs nobody anything. So does everything else that reads a module: a type of a few kilobytes can stand for
//! gigabytes once it is written out. The child gets the module on standard input, writes a bounded [`Report`] and the compiled code to
//! standard output (a file in the private folder), and a refusal to standard error. It bounds and confines itself before it reads a byte.
//! Standard input stays open while it works: when it ends early, the parent is gone or has lost interest, and the child ends itself.
//!
//! Compiled code is only ever loaded from that folder, under a name that says which file it came from, which settings it was compiled with
//! and what it has to hash to; it is read whole and checked first, so a file that was torn by a crash is compiled again, not run.

mod child;
mod confine;
mod report;

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tempfile::NamedTempFile;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use wasmtime::component::Component;

pub use self::child::compile_child_main;
use self::report::{Confinement, MAGIC, Report};
use super::inspect::Item;
use super::scratch::Scratch;
use super::{CompileLimits, Config, Digest, Error, fit, reason};

/// The hidden first argument that turns the program into the compiler. Three more follow: memory in bytes, time in seconds, and the size of
/// the module that comes on standard input.
pub const COMPILE_ARGUMENT: &str = "compile-plugin";

/// Compiled code cannot be larger than this: the host holds it in memory, twice while it loads it. 18 MB of Python become 35 MB of code.
const CODE_BYTES_MAX: u64 = 128 << 20;
/// What is read of the child's standard error.
const STDERR_BYTES_MAX: u64 = 16 << 10;
/// Compiled modules that the folder may keep; the one unused for longest goes first.
const CACHED_MAX: usize = 64;
/// The child refused the module.
const EXIT_REFUSED: i32 = 3;
/// The child could not do its work.
const EXIT_UNABLE: i32 = 4;

/// What compiling one module may use, before its size is looked at: memory, memory for each processor (they compile at the same time),
/// memory for each byte of the module, and time in seconds, and for each mebibyte begun. Python's 18 MB took 421 MiB and 19 s on two cores.
const MEMORY_BYTES_BASE: u64 = 512 << 20;
const MEMORY_BYTES_PER_CORE: u64 = 32 << 20;
const MEMORY_BYTES_PER_BYTE: u64 = 64;
const TIME_BASE: Duration = Duration::from_secs(60);
const TIME_PER_MEBIBYTE: Duration = Duration::from_secs(20);

/// A component, and what the compiling child said of it.
pub(super) struct Compiled {
    pub(super) imports: Vec<Item>,
    pub(super) exports: Vec<Item>,
    /// Imports, exports and functions that are too many to be told.
    pub(super) left_out: usize,
    /// The component; or everything that keeps it from fitting the contract, in words.
    pub(super) component: Result<Component, Vec<String>>,
}

/// Compiles modules and keeps the results.
pub(super) struct Compiler {
    program: PathBuf,
    limits: CompileLimits,
    folder: PathBuf,
    /// What the code was compiled with, in hexadecimal.
    compatibility: String,
    /// One at a time: the bound on memory is for one.
    turn: tokio::sync::Mutex<()>,
    /// It was said how far the system confines the child.
    said_confinement: AtomicBool,
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
        // What the report says depends on both.
        (MAGIC, fit::contract()).hash(&mut hasher);
        Ok(Self {
            // Not the path this program was started by: that file may have been replaced by an upgrade meanwhile.
            program: config.compiler.clone().unwrap_or_else(|| PathBuf::from("/proc/self/exe")),
            limits: config.compile_limits.clone(),
            folder,
            compatibility: format!("{:016x}", hasher.finish()),
            turn: tokio::sync::Mutex::new(()),
            said_confinement: AtomicBool::new(false),
            _scratch: scratch,
        })
    }

    /// The component in these bytes: from the folder, or compiled now.
    pub(super) async fn component(&self, wasmtime: &wasmtime::Engine, bytes: &[u8], digest: Digest) -> Result<Compiled, Failure> {
        let _turn = self.turn.lock().await;
        if let Some(compiled) = self.cached(wasmtime, digest).await {
            return Ok(compiled);
        }
        refuse_what_is_no_component(bytes)?;
        let output =
            NamedTempFile::with_prefix_in(".compiling-", &self.folder).map_err(|error| self.unable("make a file in", &error))?;
        self.run_child(bytes, &output).await?;
        let (path, name_start) = (self.folder.clone(), self.name_start(digest));
        let loaded = blocking(wasmtime, move |wasmtime| {
            let file = read_bounded(output.path()).map_err(|error| error.to_string())?;
            let (compiled, confinement) = load(wasmtime, &file)?;
            if compiled.component.is_ok() {
                let kept = output.as_file().sync_all().and_then(|()| {
                    let name = path.join(format!("{name_start}{}.cwasm", Digest::of(&file).short()));
                    output.persist(name).map(drop).map_err(|error| error.error)
                });
                if let Err(error) = kept {
                    tracing::warn!(folder = %path.display(), %error, "compiled code cannot be kept: it will be compiled again next time");
                }
                prune(&path);
            }
            Ok((compiled, confinement))
        });
        let (compiled, confinement) = loaded.await.map_err(|problem| Failure::Refused(load_problem(&problem)))?;
        self.say_once(confinement);
        Ok(compiled)
    }

    fn say_once(&self, confinement: Confinement) {
        let Confinement { seccomp, landlock } = confinement;
        let is_whole = seccomp && landlock;
        if !is_whole && !self.said_confinement.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                seccomp,
                landlock,
                "this system does not confine the compiler as it could: a fault in it has all that this user has; its bounds on memory and time hold"
            );
        }
    }

    /// The name's part before the digest of the code itself.
    fn name_start(&self, digest: Digest) -> String {
        format!("{digest}-{}-", self.compatibility)
    }

    async fn cached(&self, wasmtime: &wasmtime::Engine, digest: Digest) -> Option<Compiled> {
        let (folder, name_start) = (self.folder.clone(), self.name_start(digest));
        let cached = blocking(wasmtime, move |wasmtime| {
            let found = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).find_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let hash = name.strip_prefix(&name_start)?.strip_suffix(".cwasm")?.to_owned();
                Some((entry.path(), hash))
            });
            let Some((path, hash)) = found else { return Ok(None) };
            let file = read_bounded(&path).map_err(|error| error.to_string())?;
            if Digest::of(&file).short() != hash {
                tracing::warn!(file = %path.display(), "compiled code was damaged: it is compiled again");
                let _ = fs::remove_file(&path);
                return Ok(None);
            }
            // Its age decides when it has to make room.
            let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let _ = fs::File::open(&path)
                .map(|file| rustix::fs::futimens(file, &rustix::fs::Timestamps { last_access: now, last_modification: now }));
            load(wasmtime, &file).map(|(compiled, _)| Some(compiled))
        });
        cached.await.unwrap_or_else(|reason| {
            tracing::warn!(%digest, %reason, "kept code cannot be loaded: it is compiled again");
            None
        })
    }

    async fn run_child(&self, bytes: &[u8], output: &NamedTempFile) -> Result<(), Failure> {
        let stdout = output.as_file().try_clone().map_err(|error| self.unable("use a file in", &error))?;
        let limits = self.limits.for_module(bytes.len());
        let mut child = Command::new(&self.program)
            .arg(COMPILE_ARGUMENT)
            .arg(limits.memory_bytes.to_string())
            .arg(limits.time.as_secs().max(1).to_string())
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
        let patience = limits.time.max(Duration::from_secs(1)) * 4;
        let ended = tokio::time::timeout(patience, feed(&mut child, bytes)).await;
        match ended {
            Ok(Ok((status, stderr))) => judge(&limits, status, &stderr),
            Ok(Err(error)) => Err(Failure::Unable(format!("the compiler {} cannot be watched: {error}", self.program.display()))),
            // It may be the machine that was too busy.
            Err(_) => Err(Failure::Unable(format!("compiling it takes longer than {} s", patience.as_secs()))),
        }
    }

    fn unable(&self, doing: &str, error: &io::Error) -> Failure {
        Failure::Unable(format!("cannot {doing} the folder for compiled code {}: {error}", self.folder.display()))
    }
}

/// What the child's end means.
fn judge(limits: &CompileLimits, status: ExitStatus, stderr: &str) -> Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    let memory = limits.memory_bytes;
    if stderr.contains("memory allocation of") || stderr.contains("Cannot allocate memory") {
        return Err(Failure::Refused(format!("compiling it needs more than {memory} bytes of memory")));
    }
    match (status.code(), status.signal()) {
        (Some(EXIT_REFUSED), _) => Err(Failure::Refused(reason::tidy(stderr.trim()))),
        (Some(EXIT_UNABLE), _) => Err(Failure::Unable(reason::tidy(stderr.trim()))),
        (_, Some(signal)) if signal == rustix::process::Signal::XCPU.as_raw() => {
            Err(Failure::Refused(format!("compiling it needs more than {} s of processor time", limits.time.as_secs())))
        }
        (_, Some(signal)) if signal == rustix::process::Signal::XFSZ.as_raw() => {
            Err(Failure::Refused(format!("its compiled form is larger than {CODE_BYTES_MAX} bytes")))
        }
        (_, Some(signal)) if !is_crash(signal) => Err(Failure::Unable(format!(
            "the compiler was ended by signal {signal}, perhaps because the system is out of memory"
        ))),
        _ => {
            let first = reason::tidy(stderr.lines().next().unwrap_or("without a word"));
            Err(Failure::Refused(format!("the compiler crashed on it ({status}): {first}")))
        }
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
fn load_problem(problem: &str) -> String {
    let minimum = problem.split_once("memory has a minimum byte size of ").and_then(|(_, rest)| rest.split_whitespace().next());
    match minimum.and_then(|bytes| bytes.parse::<u64>().ok()) {
        Some(bytes) => format!("it needs {bytes} bytes of memory from the start, more than the largest limit of all routes"),
        None => format!("its compiled form cannot be loaded: {}", reason::tidy(problem)),
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

/// Load what this very process, or one with the same settings, has compiled.
fn load(wasmtime: &wasmtime::Engine, file: &[u8]) -> Result<(Compiled, Confinement), String> {
    let (Report { imports, exports, left_out, problems, confinement }, code) = Report::split(file)?;
    let component = if problems.is_empty() {
        // SAFETY: the bytes were written by our own compiler into a folder that only this user can write to, and they hash to the name they
        // were kept under. They are copied, so nothing that later happens to a file matters.
        #[allow(unsafe_code, reason = "loading compiled code cannot be checked further; see the SAFETY comment")]
        Ok(unsafe { Component::deserialize(wasmtime, code) }.map_err(|error| format!("{error:#}"))?)
    } else {
        Err(problems)
    };
    Ok((Compiled { imports, exports, left_out, component }, confinement))
}

/// Read a file of the private folder whole.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let file = fs::File::open(path)?;
    let size = file.metadata()?.len();
    if size > CODE_BYTES_MAX {
        return Err(io::Error::other(format!("it has {size} bytes, more than {CODE_BYTES_MAX}")));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(CODE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl CompileLimits {
    /// What compiling a module of this size may use, within what is set for any: a small module needs little, and gets no more to waste.
    fn for_module(&self, size: usize) -> Self {
        let size = size as u64;
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
        let memory_bytes = MEMORY_BYTES_BASE
            .saturating_add(MEMORY_BYTES_PER_CORE.saturating_mul(cores))
            .saturating_add(MEMORY_BYTES_PER_BYTE.saturating_mul(size));
        let mebibytes = u32::try_from(size.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let time = TIME_BASE.saturating_add(TIME_PER_MEBIBYTE.saturating_mul(mebibytes));
        Self { memory_bytes: self.memory_bytes.min(memory_bytes), time: self.time.min(time) }
    }
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
