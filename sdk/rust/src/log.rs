//! Lines for the host's log, marked there with the task, plugin and attempt they came from.
//!
//! In a component they go to the host; in a native test to the attempt's double, or to standard error outside of one.

use std::fmt::Arguments;

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Every step.
    Trace,
    /// For whoever looks for a fault.
    Debug,
    /// Worth knowing.
    Info,
    /// Something to look at.
    Warn,
    /// Something is broken.
    Error,
}

/// Whether lines of this level are kept at all.
pub fn enabled(level: Level) -> bool {
    #[cfg(target_family = "wasm")]
    return crate::guest::log_enabled(level);
    #[cfg(not(target_family = "wasm"))]
    return crate::testing::log_enabled(level);
}

/// Writes one line, if lines of its level are kept.
pub fn write(level: Level, message: Arguments<'_>) {
    if !enabled(level) {
        return;
    }
    #[cfg(target_family = "wasm")]
    crate::guest::log_line(level, &message.to_string());
    #[cfg(not(target_family = "wasm"))]
    crate::testing::log_line(level, message.to_string());
}

/// Logs a line at [`Level::Trace`]; arguments as for `format!`.
#[macro_export]
macro_rules! trace {
    ($($argument:tt)+) => { $crate::log::write($crate::log::Level::Trace, ::std::format_args!($($argument)+)) };
}

/// Logs a line at [`Level::Debug`]; arguments as for `format!`.
#[macro_export]
macro_rules! debug {
    ($($argument:tt)+) => { $crate::log::write($crate::log::Level::Debug, ::std::format_args!($($argument)+)) };
}

/// Logs a line at [`Level::Info`]; arguments as for `format!`.
#[macro_export]
macro_rules! info {
    ($($argument:tt)+) => { $crate::log::write($crate::log::Level::Info, ::std::format_args!($($argument)+)) };
}

/// Logs a line at [`Level::Warn`]; arguments as for `format!`.
#[macro_export]
macro_rules! warn {
    ($($argument:tt)+) => { $crate::log::write($crate::log::Level::Warn, ::std::format_args!($($argument)+)) };
}

/// Logs a line at [`Level::Error`]; arguments as for `format!`.
#[macro_export]
macro_rules! error {
    ($($argument:tt)+) => { $crate::log::write($crate::log::Level::Error, ::std::format_args!($($argument)+)) };
}
