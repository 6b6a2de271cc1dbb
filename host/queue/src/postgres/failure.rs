//! PostgreSQL's errors in the queue's words, and what may be done about them.

use std::io;
use std::time::Duration;

use crate::error::is_about_encryption;
use crate::{Error, HostId, State};

/// What an operation ends with when it does not succeed: an error of the database, not yet put into words, or one of the queue.
#[derive(Debug)]
pub(super) enum Failure {
    Sql(sqlx::Error),
    Queue(Box<Error>),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Queue(Box::new(error))
    }
}

impl Failure {
    /// The server did not answer in time.
    pub(super) fn silence(patience: Duration) -> Self {
        let words = format!("no answer for {} s", patience.as_secs());
        Self::Sql(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, words)))
    }

    /// The connection is of no use any more, and a new one may do. What was sent last may have been done or not.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Sql(sqlx::Error::Protocol(problem)) => !is_beyond_the_protocol(problem),
            Self::Sql(sqlx::Error::Io(_) | sqlx::Error::WorkerCrashed) => true,
            Self::Sql(error) if is_too_large(error) => false,
            // 57P: the server shuts down, crashed, starts up, dropped the database. 26000: a pooler mixed up prepared statements. 25006: this
            // is not the primary (any more). 25P03: we were stopped in the middle of a transaction.
            Self::Sql(error) => {
                code(error).is_some_and(|code| {
                    code.starts_with("08")
                        || (code.starts_with("57P") && code != "57P04")
                        || ["26000", "25006", "25P03"].contains(&code.as_str())
                }) || is_old_plan(error)
            }
            Self::Queue(error) => matches!(&**error, Error::Connect { .. } if error.is_retryable()),
        }
    }

    /// A pooler in between takes no settings of a session.
    pub(super) fn is_about_settings(&self) -> bool {
        let Self::Queue(error) = self else { return false };
        let Error::Connect { source: Some(source), .. } = &**error else { return false };
        source.as_database_error().is_some_and(|error| error.message().contains("unsupported startup parameter"))
    }

    /// Two transactions stood in each other's way, and nothing of this one was done.
    pub(super) fn is_contention(&self) -> bool {
        match self {
            Self::Sql(error) => code(error).is_some_and(|code| code == "40P01" || code == "40001" || code == "55P03"),
            Self::Queue(_) => false,
        }
    }

    /// Somebody held a lock for longer than was waited for.
    pub(super) fn is_lock_timeout(&self) -> bool {
        matches!(self, Self::Sql(error) if code(error).is_some_and(|code| code == "55P03"))
    }

    /// The error for the caller. `doing` says what was being done.
    pub(super) fn into_error(self, doing: &'static str, place: &str) -> Error {
        match self {
            Self::Queue(error) => *error,
            Self::Sql(source) => worded(source, doing, place),
        }
    }
}

fn code(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

/// More than the protocol can say: nothing was sent.
fn is_beyond_the_protocol(problem: &str) -> bool {
    problem.contains("out of range for protocol")
}

/// The server refuses to take so much at once, or to make so much of it.
fn is_too_large(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    match error.code().as_deref() {
        Some("08P01") => error.message().contains("invalid message length"),
        Some("XX000") => error.message().contains("invalid memory alloc request size"),
        _ => false,
    }
}

/// Somebody altered a table while this connection remembered how to read it.
fn is_old_plan(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.code().as_deref() == Some("0A000") && error.message().contains("cached plan"))
}

fn worded(source: sqlx::Error, doing: &'static str, place: &str) -> Error {
    let message = source.as_database_error().map(|error| error.message().to_owned()).unwrap_or_default();
    match code(&source).as_deref() {
        // No such table, schema, type, function.
        Some("42P01" | "3F000" | "42704" | "42883") if message.contains("laelaps") => Error::NotInitialised,
        Some("42501") => Error::Denied {
            place: place.to_owned(),
            doing,
            hint: "let the user of the URL do it: as the owner, GRANT what is missing, or run `laelaps init` as one who may",
            source,
        },
        Some("25006") => Error::Denied {
            place: place.to_owned(),
            doing,
            hint: "the server takes no writes, as a standby does; name the primary in the URL",
            source,
        },
        // The request is at fault, and would be again.
        _ if is_too_large(&source) || matches!(&source, sqlx::Error::Protocol(problem) if is_beyond_the_protocol(problem)) => {
            Error::Database { doing, source: sqlx::Error::Encode(Box::new(source)) }
        }
        _ => Error::Database { doing, source },
    }
}

/// The error of a connection that could not be made.
pub(super) fn unconnected(source: sqlx::Error, place: &str) -> Error {
    let hint = match code(&source).as_deref() {
        Some("28P01" | "28000") => "check user and password in the URL, and the server's pg_hba.conf",
        Some("3D000") => "make the database first, for example with `createdb`, or correct its name in the URL",
        Some("42501") => "let the user connect: GRANT CONNECT ON DATABASE ... TO ...",
        Some("53300") => "let the server take more connections (max_connections), or let this program use fewer",
        Some("57P03") => "the server starts or stops; try again in a moment",
        Some("08P01") => "a pooler in between does not pass our settings on; see docs/databases.md about pgbouncer",
        _ if is_about_encryption(&source) => {
            "the encryption that was asked for is not to be had; check sslmode and certificates on both sides"
        }
        _ => "check host and port in the URL, and whether the server runs and listens there",
    };
    Error::Connect { place: place.to_owned(), problem: None, hint, source: Some(source) }
}

/// The error of a server that cannot be used as it is.
pub(super) fn unusable(place: &str, problem: String, hint: &'static str) -> Error {
    Error::Connect { place: place.to_owned(), problem: Some(problem), hint, source: None }
}

/// The error of a host that is not there.
pub(super) fn unknown_host(host: HostId) -> Failure {
    Failure::from(Error::UnknownHost(host))
}

/// A state as the database says it.
pub(super) fn state(word: &str) -> Result<State, sqlx::Error> {
    State::ALL
        .into_iter()
        .find(|state| state.as_str() == word)
        .ok_or_else(|| sqlx::Error::Decode(format!("unknown state {word:?}").into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_large_for_the_protocol_is_the_requests_own_fault() {
        let failure = || Failure::from(sqlx::Error::Protocol("message size out of range for protocol: 2147483659".to_owned()));
        assert!(!failure().is_lost(), "nothing was sent");
        let error = failure().into_error("testing", "nowhere");
        assert!(error.is_about_the_request() && !error.is_retryable(), "{error:?}");
        let out_of_step = Failure::from(sqlx::Error::Protocol("unexpected message".to_owned()));
        assert!(out_of_step.is_lost());
    }
}
