//! The `laelaps` program.

use std::process::ExitCode;

use mimalloc::MiMalloc;

/// A task's memory is taken on one thread and given back on another, many times a millisecond, where the C library's allocator takes turns.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    // Before anything else: the compiling child must not read configuration, open a log or start a runtime.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == laelaps::plugin::COMPILE_ARGUMENT) {
        laelaps::plugin::compile_child_main();
    }
    laelaps::cli::main(std::env::args_os())
}
