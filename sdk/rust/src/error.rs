//! Why an attempt went wrong, and whether another one could go right.

use std::fmt::{self, Display};

/// What a failure means for the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Another attempt may succeed: the host runs the task again after its queue's back-off, until the most attempts are used up.
    Retry,
    /// No attempt can succeed: the task ends as failed now.
    Reject,
}

/// The attempt went wrong.
///
/// `?` turns any [`std::error::Error`] into a failure that is tried again, with the error's text and that of its causes and the code
/// `error`. For anything more exact there are [`Error::retry`], [`Error::reject`] and [`OrFail`].
///
/// It does not implement `std::error::Error` itself; that is what makes the conversion possible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: FailureKind,
    code: String,
    message: String,
}

impl Error {
    /// A failure after which the task is tried again.
    ///
    /// `code` is a short name for programs, for example `mail-server-down`, of which the host keeps 64 bytes. `message` is a sentence for
    /// people, of which it keeps 4,096 bytes.
    pub fn retry(code: impl Into<String>, message: impl Display) -> Self {
        Self { kind: FailureKind::Retry, code: code.into(), message: message.to_string() }
    }

    /// A failure that ends the task: no attempt can succeed. Code and message are as in [`Error::retry`].
    pub fn reject(code: impl Into<String>, message: impl Display) -> Self {
        Self { kind: FailureKind::Reject, code: code.into(), message: message.to_string() }
    }

    /// Whether the task is tried again.
    pub fn kind(&self) -> FailureKind {
        self.kind
    }

    /// The short name for programs.
    pub fn code(&self) -> &str {
        &self.code
    }

    /// The sentence for people.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What the host refused: a mistake in the request stays one in every attempt, anything else may pass.
    pub(crate) fn refused(code: String, message: String) -> Self {
        let kind = match code.as_str() {
            "invalid-data" | "invalid-key" | "too-large" | "too-many" | "not-granted" | "too-deep" => FailureKind::Reject,
            _ => FailureKind::Retry,
        };
        Self { kind, code, message }
    }
}

impl Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.code, self.message)
    }
}

impl<E: std::error::Error> From<E> for Error {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            let text = source.to_string();
            // Many errors repeat their cause in their own text.
            if !message.contains(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = source.source();
        }
        Self::retry("error", message)
    }
}

/// Gives an error its code where it happens, and says what it means for the task.
///
/// ```
/// use laelaps_plugin::{OrFail, Result};
///
/// fn port(text: &str) -> Result<u16> {
///     text.parse().or_reject("bad-port")
/// }
///
/// assert_eq!(port("many").unwrap_err().to_string(), "bad-port: invalid digit found in string");
/// ```
pub trait OrFail<T> {
    /// An error becomes a failure that is tried again.
    fn or_retry(self, code: &str) -> Result<T, Error>;

    /// An error becomes a failure that ends the task.
    fn or_reject(self, code: &str) -> Result<T, Error>;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    fn or_retry(self, code: &str) -> Result<T, Error> {
        // The alternate form is where errors that carry a chain of causes show it.
        self.map_err(|error| Error::retry(code, format_args!("{error:#}")))
    }

    fn or_reject(self, code: &str) -> Result<T, Error> {
        self.map_err(|error| Error::reject(code, format_args!("{error:#}")))
    }
}
