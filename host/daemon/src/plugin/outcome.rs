//! What a call of a handler came to, as an event of the queue. Nothing here decides what follows: settlement.rs in the queue does.

use std::fmt::Write as _;
use std::time::Duration;

use laelaps_queue::{Event, FailureKind};
use wasmtime::{Trap, WasmBacktrace};
use wasmtime_wasi::{I32Exit, ResourceTableError};

use super::Limits;
use super::abi::latest::laelaps::worker::types;
use super::guest::cut;
use super::reason::{self, Bounded};

/// The longest delay or retention that a handler may ask for: ten years of 365.25 days.
const DELAY_MAX_MS: u64 = 10 * 31_557_600_000;
/// The longest short name of a failure.
const CODE_BYTES_MAX: usize = 64;
/// The longest failure in words.
pub(super) const MESSAGE_BYTES_MAX: usize = 4_096;
/// The most stack frames that are worth an operator's time.
pub(super) const FRAMES_MAX: usize = 16;
/// The longest function name that is demangled, and the longest that is shown.
const FUNCTION_BYTES_MAX: usize = 512;

/// The event of a handler that returned.
pub(super) fn returned(result: Result<types::Outcome, types::Failure>, limits: &Limits) -> Event {
    match result {
        Ok(types::Outcome::Finish(finished)) => finish(finished, limits),
        Ok(types::Outcome::Retry(delay)) => delayed("retry's delay", delay, |delay| Event::Retry { delay }),
        Ok(types::Outcome::Release(delay)) => delayed("release's delay", delay, |delay| Event::Release { delay }),
        Err(failure) => Event::Failure {
            kind: match failure.kind {
                types::FailureKind::Retry => FailureKind::Retry,
                types::FailureKind::Reject => FailureKind::Reject,
            },
            code: cut(failure.code, CODE_BYTES_MAX),
            message: cut(failure.message, MESSAGE_BYTES_MAX),
        },
    }
}

fn finish(finished: types::Finished, limits: &Limits) -> Event {
    let length = finished.output.as_ref().map_or(0, Vec::len) as u64;
    if length > limits.output_bytes {
        return Event::Malformed {
            message: format!("the output has {length} bytes, more than the {} that the route allows", limits.output_bytes),
        };
    }
    delayed("finish's retention", finished.retention, |retention| Event::Finish { output: finished.output, retention })
}

fn delayed(what: &str, milliseconds: Option<u64>, event: impl FnOnce(Option<Duration>) -> Event) -> Event {
    match milliseconds {
        Some(milliseconds) if milliseconds > DELAY_MAX_MS => {
            Event::Malformed { message: format!("{what} is {milliseconds} ms, more than ten years ({DELAY_MAX_MS} ms)") }
        }
        milliseconds => event(milliseconds.map(Duration::from_millis)),
    }
}

/// The event of a handler that did not return, though nobody stopped it.
pub(super) fn trapped(error: &wasmtime::Error, stderr_end: &str, limits: &Limits, hostcall_bytes: usize) -> Event {
    let reason = reason(error, limits, hostcall_bytes);
    if is_hostcall_exhausted(error) {
        return Event::Malformed { message: reason };
    }
    let mut message = reason;
    if !stderr_end.is_empty() {
        let _ = write!(message, "\nstandard error ended with:\n{stderr_end}");
    }
    if let Some(backtrace) = error.downcast_ref::<WasmBacktrace>() {
        message.push_str(&frames(backtrace));
    }
    Event::Trap { message: cut(message, MESSAGE_BYTES_MAX) }
}

fn reason(error: &wasmtime::Error, limits: &Limits, hostcall_bytes: usize) -> String {
    if let Some(I32Exit(status)) = error.downcast_ref::<I32Exit>() {
        return format!("the handler ended itself with exit status {status} instead of returning an outcome");
    }
    if let Some(trap) = error.downcast_ref::<Trap>() {
        return match trap {
            Trap::StackOverflow => "the handler's call stack overflowed: it recurses too deeply".into(),
            Trap::UnreachableCodeReached => {
                "the handler trapped: it reached an `unreachable` instruction (a panic or an abort)".into()
            }
            trap => format!("the handler trapped: {}", trap.to_string().trim_start_matches("wasm trap: ")),
        };
    }
    if matches!(error.downcast_ref::<ResourceTableError>(), Some(ResourceTableError::Full)) {
        return format!(
            "the handler has more than {} handles open (files, streams, pollables), which is its route's limit",
            limits.handles
        );
    }
    if is_hostcall_exhausted(error) {
        return format!("the handler handed more than {hostcall_bytes} bytes to the host at once");
    }
    let root = error.root_cause().to_string();
    format!("the handler failed: {}", root.trim_start_matches("wasm trap: "))
}

/// Wasmtime keeps this error's type to itself.
fn is_hostcall_exhausted(error: &wasmtime::Error) -> bool {
    error.root_cause().to_string().contains("fuel allocated for hostcalls has been exhausted")
}

/// The stack, one function a line.
fn frames(backtrace: &WasmBacktrace) -> String {
    let mut text = String::new();
    for frame in backtrace.frames().iter().take(FRAMES_MAX) {
        text.push_str("\n  at ");
        if let Some(module) = frame.module().name() {
            let _ = write!(text, "{}!", function(module));
        }
        let _ = match frame.func_name() {
            Some(name) => write!(text, "{}", function(name)),
            None => write!(text, "function {}", frame.func_index()),
        };
    }
    // The engine counts no further.
    if backtrace.frames().len() > FRAMES_MAX {
        text.push_str("\n  and more");
    }
    text
}

/// A function's name as people know it, where that is safe: names are the guest's own words, and a name of a kilobyte can stand for
/// gigabytes in C++. So Rust's names are demangled, into a text with a bound (its grammar writes something at each step), and those of C++
/// are shown as they are.
fn function(name: &str) -> String {
    let mut text = Bounded::new(FUNCTION_BYTES_MAX);
    match rustc_demangle::try_demangle(name) {
        Ok(demangled) if name.len() <= FUNCTION_BYTES_MAX => {
            // Without the hash at its end. An error says that the text is full.
            let _ = write!(text, "{demangled:#}");
        }
        _ => text.push(name),
    }
    reason::tidy(&text.into_text()).replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { output_bytes: 4, ..Limits::default() }
    }

    fn finished(output: &[u8], retention: Option<u64>) -> Result<types::Outcome, types::Failure> {
        Ok(types::Outcome::Finish(types::Finished { output: Some(output.to_vec()), retention }))
    }

    #[test]
    fn an_output_within_its_bound_is_kept_as_it_is() {
        let event = returned(finished(b"done", Some(1_500)), &limits());
        assert_eq!(event, Event::Finish { output: Some(b"done".to_vec()), retention: Some(Duration::from_millis(1_500)) });
    }

    #[test]
    fn an_output_over_its_bound_is_malformed_and_says_both_sizes() {
        let Event::Malformed { message } = returned(finished(b"12345", None), &limits()) else { panic!("not malformed") };
        assert_eq!(message, "the output has 5 bytes, more than the 4 that the route allows");
    }

    #[test]
    fn a_delay_of_more_than_ten_years_is_malformed() {
        for result in [
            Ok(types::Outcome::Retry(Some(u64::MAX))),
            Ok(types::Outcome::Release(Some(DELAY_MAX_MS + 1))),
            finished(b"", Some(DELAY_MAX_MS + 1)),
        ] {
            assert!(matches!(returned(result, &limits()), Event::Malformed { .. }));
        }
        let longest = Event::Retry { delay: Some(Duration::from_millis(DELAY_MAX_MS)) };
        assert_eq!(returned(Ok(types::Outcome::Retry(Some(DELAY_MAX_MS))), &limits()), longest);
    }

    #[test]
    fn a_failures_texts_are_cut_to_their_bounds() {
        let failure = types::Failure { kind: types::FailureKind::Reject, code: "c".repeat(100), message: "m".repeat(10_000) };
        let Event::Failure { kind, code, message } = returned(Err(failure), &limits()) else { panic!("not a failure") };
        assert_eq!((kind, code.len(), message.len()), (FailureKind::Reject, CODE_BYTES_MAX, MESSAGE_BYTES_MAX));
    }

    #[test]
    fn an_exit_is_a_failure_that_names_its_status() {
        let Event::Trap { message } = trapped(&I32Exit(0).into(), "", &limits(), 1) else { panic!("not a trap") };
        assert_eq!(message, "the handler ended itself with exit status 0 instead of returning an outcome");
    }

    #[test]
    fn a_trap_tells_what_standard_error_said_last() {
        let Event::Trap { message } = trapped(&Trap::UnreachableCodeReached.into(), "panicked at x", &limits(), 1) else {
            panic!("not a trap")
        };
        assert!(message.starts_with("the handler trapped: it reached an `unreachable` instruction"), "{message}");
        assert!(message.ends_with("standard error ended with:\npanicked at x"), "{message}");
    }

    #[test]
    fn names_of_rust_are_shown_as_written_and_others_as_they_are() {
        assert_eq!(function("_RNvNtCs1234_7mycrate3foo3bar"), "mycrate::foo::bar");
        assert_eq!(function("_ZN4core3fmt5write17h0123456789abcdefE"), "core::fmt::write");
        assert_eq!(function("_Z3fooi"), "_Z3fooi");
        assert_eq!(function("handle"), "handle");
        assert_eq!(function("a\nb\u{1b}[31m"), "a\\nb\\u{1b}[31m");
    }

    /// Rust's mangling can repeat what it has written before, and each line of this doubles the last.
    #[test]
    fn a_name_that_stands_for_gigabytes_costs_no_more_than_its_bound() {
        let mut name = "_RINvC1a1b".to_owned();
        // Tuples of a number and a tuple that was written before, deeper and deeper.
        let mut last = name.len();
        name.push_str("TyyE");
        for _ in 0..20 {
            let next = name.len();
            let back = base_62(last - 2);
            name.push_str(&format!("TB{back}B{back}E"));
            last = next;
        }
        name.push('E');
        for name in [name, format!("_Z{}", "N1aI".repeat(20_000)), "_R".repeat(40_000), "x".repeat(100_000)] {
            assert!(function(&name).len() <= FUNCTION_BYTES_MAX + '…'.len_utf8());
        }
    }

    /// A number as back references in names of Rust have it.
    fn base_62(number: usize) -> String {
        const DIGITS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
        let Some(mut number) = number.checked_sub(1) else { return "_".into() };
        let mut digits = Vec::new();
        loop {
            digits.push(DIGITS[number % 62] as char);
            number /= 62;
            if number == 0 {
                return digits.into_iter().rev().chain(['_']).collect();
            }
        }
    }
}
