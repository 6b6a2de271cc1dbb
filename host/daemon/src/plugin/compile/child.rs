//! The compiling child: everything that reads a module beyond its first bytes happens here.
//!
//! It bounds its memory and time, locks itself in, reads the module, compiles it, and writes one file: what the module imports and exports,
//! what keeps it from fitting the contract, and the code if nothing does.

use std::fs;
use std::io::{self, Read as _, Write as _};

use rustix::process::{Resource, Rlimit};
use wasmtime::component::Component;

use super::super::{engine, fit};
use super::confine::confine;
use super::report::Report;
use super::{CODE_BYTES_MAX, COMPILE_ARGUMENT, EXIT_REFUSED, EXIT_UNABLE, Failure};

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
    let confinement = confine();
    let mut bytes = Vec::new();
    let room = usize::try_from(size).ok().filter(|size| bytes.try_reserve_exact(*size).is_ok());
    room.ok_or_else(|| Failure::Refused(format!("compiling it needs more than {memory_bytes} bytes of memory")))?;
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
    drop(bytes);
    let report = Report { confinement, ..examine(&wasmtime, &code)? };
    let head = report.head().map_err(|problem| Failure::Unable(format!("cannot say what the module is: {problem}")))?;
    let code = if report.problems.is_empty() { code.as_slice() } else { &[] };
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&head)
        .and_then(|()| stdout.write_all(code))
        .and_then(|()| stdout.flush())
        .map_err(|error| Failure::Unable(format!("cannot write the compiled code: {error}")))
}

/// What the component is, and what keeps it from fitting.
fn examine(wasmtime: &wasmtime::Engine, code: &[u8]) -> Result<Report, Failure> {
    // SAFETY: this process made these bytes a moment ago, with the same settings.
    #[allow(unsafe_code, reason = "loading compiled code cannot be checked further; see the SAFETY comment")]
    let component = unsafe { Component::deserialize(wasmtime, code) }
        .map_err(|error| Failure::Refused(format!("its compiled form cannot be loaded: {error:#}")))?;
    let linker = engine::linker(wasmtime).map_err(|error| Failure::Unable(format!("cannot set up the linker: {error:#}")))?;
    let fit::Fit { imports, exports, left_out, problems } = fit::examine(wasmtime, &linker, &component);
    Ok(Report { imports, exports, left_out, problems, ..Report::default() })
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
