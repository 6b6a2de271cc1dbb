//! SQLite's errors in the queue's words.

use std::path::Path;
use std::sync::Arc;

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
    /// The error for the caller. `doing` says what was being done.
    pub(super) fn into_error(self, doing: &'static str, path: &Path) -> Error {
        match self {
            Self::Queue(error) => *error,
            Self::Sql(source) => worded(source, doing, path),
        }
    }
}

/// SQLite's primary result code.
fn code(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<u32>().ok().map(|code| code & 0xff)
}

/// Another connection has the lock.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    matches!(code(error), Some(5 | 6))
}

/// A rollback was not needed, since the transaction had ended by itself.
pub(super) fn says_no_transaction(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.message().contains("no transaction is active"))
}

/// The error that says which file has which trouble.
pub(super) fn worded(source: sqlx::Error, doing: &'static str, path: &Path) -> Error {
    let path_buf = path.to_path_buf();
    let message = source.as_database_error().map(|error| error.message().to_owned()).unwrap_or_default();
    match code(&source) {
        Some(5 | 6) => Error::Locked { path: path_buf, waited: std::time::Duration::ZERO },
        Some(8) => Error::ReadOnly { path: path_buf },
        Some(11 | 26) => Error::Corrupt { path: path_buf, problem: message },
        Some(13) => Error::Full { path: path_buf },
        Some(14) => Error::File { path: path_buf, problem: format!("cannot be opened while {doing}: {message}"), source: None },
        Some(1) if message.contains("no such table") => Error::NotInitialised,
        _ if matches!(source, sqlx::Error::PoolClosed) => Error::Closed,
        _ => Error::Database { doing, source },
    }
}

/// One failure of a transaction, told to every operation of it.
pub(super) struct Alike {
    error: Arc<Error>,
}

impl Alike {
    pub(super) fn of(failure: Failure, doing: &'static str, path: &Path) -> Self {
        Self { error: Arc::new(failure.into_error(doing, path)) }
    }

    pub(super) fn failure(&self) -> Failure {
        Failure::from(match &*self.error {
            Error::Locked { path, waited } => Error::Locked { path: path.clone(), waited: *waited },
            Error::ReadOnly { path } => Error::ReadOnly { path: path.clone() },
            Error::Corrupt { path, problem } => Error::Corrupt { path: path.clone(), problem: problem.clone() },
            Error::Full { path } => Error::Full { path: path.clone() },
            Error::File { path, problem, .. } => Error::File { path: path.clone(), problem: problem.clone(), source: None },
            Error::NotInitialised => Error::NotInitialised,
            Error::Closed => Error::Closed,
            Error::Database { doing, .. } => {
                Error::Database { doing, source: sqlx::Error::AnyDriverError(Box::new(Shared(Arc::clone(&self.error)))) }
            }
            other => Error::Database { doing: "writing", source: sqlx::Error::AnyDriverError(other.to_string().into()) },
        })
    }
}

/// The cause of several operations' failure.
#[derive(Debug)]
struct Shared(Arc<Error>);

impl std::fmt::Display for Shared {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match std::error::Error::source(&*self.0) {
            Some(source) => write!(formatter, "{source}"),
            None => write!(formatter, "{}", self.0),
        }
    }
}

impl std::error::Error for Shared {}

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
