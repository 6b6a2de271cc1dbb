//! What can go wrong with a queue.

use sqlx::error::DatabaseError;
use sqlx::mysql::MySqlDatabaseError;
use sqlx::postgres::PgDatabaseError;

/// The result of a queue operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a queue operation was not done. Nothing was changed unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URL or another setting of the queue cannot be used.
    #[error("{setting}: {problem}")]
    Config {
        /// The setting.
        setting: &'static str,
        /// What is wrong with it; secrets of a URL are left out.
        problem: String,
    },
    /// A task's key, type, user, data or option breaks a stated bound.
    #[error("task {key:?}: {problem}")]
    InvalidTask {
        /// The task's key, cut to 255 bytes.
        key: String,
        /// What is wrong, with the bound.
        problem: String,
    },
    /// No task has this key.
    #[error("no task has the key {0:?}")]
    NotFound(String),
    /// No task has this number.
    #[error("no task has the number {}", .0.0)]
    NoSuchId(crate::TaskId),
    /// Somebody else held a lock on what was to be written for longer than a write waits. Nothing was changed; trying again later helps.
    #[error("{doing}: another transaction holds what is to be written")]
    Busy {
        /// What was being done.
        doing: &'static str,
    },
    /// The task is already finished, failed or cancelled.
    #[error("task {key:?} is already {state}", state = state.as_str())]
    AlreadyEnded {
        /// The task's key.
        key: String,
        /// The state it is in.
        state: crate::State,
    },
    /// The operation does not fit the state of the task.
    #[error("task {key:?} is {state}: {problem}", state = state.as_str())]
    WrongState {
        /// The task's key.
        key: String,
        /// The state it is in.
        state: crate::State,
        /// What does not fit.
        problem: &'static str,
    },
    /// The database has no tables of ours yet.
    #[error("the database has no Laelaps schema yet")]
    NotInitialised,
    /// The schema is older than this program needs.
    #[error("the database has schema {found}, this program needs {needed}")]
    SchemaTooOld {
        /// The schema's version.
        found: i64,
        /// The version needed.
        needed: i64,
    },
    /// A newer program moved the schema on, and programs as old as this one cannot work with it.
    #[error(
        "the database has schema {found}{}, for programs that know schema {oldest} or a later one; this one, Laelaps {}, knows schema {known}",
        program.as_ref().map(|program| format!(", made by Laelaps {program}")).unwrap_or_default(), crate::schema::PROGRAM
    )]
    SchemaTooNew {
        /// The schema's version.
        found: i64,
        /// The newest version known here.
        known: i64,
        /// The least version that a program must know to work with it.
        oldest: i64,
        /// The version of Laelaps that made it, if that is written down.
        program: Option<String>,
    },
    /// The schema has a number that is known here, and other tables: a build from between two releases made it.
    #[error(
        "the database's schema {found} is not the schema {found} of this program, Laelaps {}: a development build made it",
        crate::schema::PROGRAM
    )]
    OtherSchema {
        /// The version whose tables are others.
        found: i64,
    },
    /// The database answered with an error or could not be reached.
    #[error("{doing}")]
    Database {
        /// What was being done.
        doing: &'static str,
        /// The database's own words.
        #[source]
        source: sqlx::Error,
    },
    /// The database server could not be reached, did not let us in, or cannot be used as it is.
    #[error("cannot connect to {place}{}", problem.as_ref().map(|problem| format!(": {problem}")).unwrap_or_default())]
    Connect {
        /// The server and database, without password.
        place: String,
        /// What is wrong, if it is not the driver's error.
        problem: Option<String>,
        /// What to do about it.
        hint: &'static str,
        /// The driver's words.
        #[source]
        source: Option<sqlx::Error>,
    },
    /// The database does not let this program do it.
    #[error("{place}: {doing} is not allowed")]
    Denied {
        /// The server and database, without password.
        place: String,
        /// What was being done.
        doing: &'static str,
        /// What to do about it.
        hint: &'static str,
        /// The database's own words.
        #[source]
        source: sqlx::Error,
    },
    /// The backend cannot do this: its tables have no place for it.
    #[error("{what} is not supported: {why}")]
    NotSupported {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be.
        why: String,
    },
    /// The file of an embedded database, or a file beside it, cannot be used.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        problem: String,
        /// The operating system's words.
        #[source]
        source: Option<std::io::Error>,
    },
    /// Another program held the database locked for longer than [`crate::Config::patience`].
    #[error("{path}: locked by another program for {} ms", waited.as_millis(), path = path.display())]
    Locked {
        /// The database file.
        path: std::path::PathBuf,
        /// How long it was waited for.
        waited: std::time::Duration,
    },
    /// The disk of the database is full.
    #[error("{path}: no space left for the database", path = path.display())]
    Full {
        /// The database file.
        path: std::path::PathBuf,
    },
    /// The database cannot be written to.
    #[error("{path}: the database is read-only", path = path.display())]
    ReadOnly {
        /// The database file.
        path: std::path::PathBuf,
    },
    /// The file is not a database, is damaged, or is a database of something else.
    #[error("{path}: {problem}", path = path.display())]
    Corrupt {
        /// The database file.
        path: std::path::PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The host is not registered, or was struck off because it seemed dead.
    #[error("host {} is not registered", .0.0)]
    UnknownHost(crate::HostId),
    /// The queue was closed.
    #[error("the queue is closed")]
    Closed,
}

/// Why a held task is refused where an operator wants it to run.
pub(crate) const HELD: &str =
    "it is held until who submitted it releases it; another host may still have it, so cancel it if it is not to run";

impl Error {
    /// Whether the same call may succeed later without anybody changing its arguments: the database was busy, full or out of reach.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Locked { .. } | Self::Full { .. } | Self::Busy { .. } => true,
            Self::Connect { source: Some(source), .. } if is_about_encryption(source) => false,
            Self::Connect { source: Some(sqlx::Error::Protocol(words)), .. } => words.contains(NO_ANSWER),
            // The connection is no more in step with the server; the next one will be.
            Self::Database { source: sqlx::Error::Protocol(_), .. } => true,
            Self::Connect { source: Some(source), .. } | Self::Database { source, .. } => {
                // A driver's error stands for a transaction that failed with others in it; alone the operation may fare better.
                matches!(
                    source,
                    sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::WorkerCrashed | sqlx::Error::AnyDriverError(_)
                ) || source.as_database_error().is_some_and(is_passing)
            }
            _ => false,
        }
    }

    /// Whether it ends without anybody changing what this program was told: as [`Error::is_retryable`], and a server that takes no writes at the
    /// moment, as a standby that becomes the primary, or no more connections of this user. False for a wrong password, a
    /// certificate that is not trusted, and a database or tables that are not there.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::Connect { source: Some(source), .. } | Self::Denied { source, .. } if is_turned_away(source) => true,
            _ => self.is_retryable(),
        }
    }

    /// Whether it is this very request that cannot be done: it breaks a bound, or the database refuses its values or cannot read what is stored
    /// for it. The same request fails again, and another need not. False for what a server, a network or an administrator does to all requests
    /// alike (out of reach, read-only, without privileges, without tables), which ends when somebody ends it.
    #[must_use]
    pub fn is_about_the_request(&self) -> bool {
        use sqlx::Error::{ColumnDecode, Decode, Encode, RowNotFound};
        match self {
            Self::InvalidTask { .. }
            | Self::NotFound(_)
            | Self::NoSuchId(_)
            | Self::AlreadyEnded { .. }
            | Self::WrongState { .. }
            | Self::NotSupported { .. } => true,
            Self::Database { source: Encode(_) | Decode(_) | ColumnDecode { .. } | RowNotFound, .. } => true,
            Self::Database { source, .. } => source.as_database_error().is_some_and(is_about_values),
            _ => false,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotInitialised => Some(
                "create the tables with `laelaps init`, or with Queue::init; if that was done, `laelaps check` names what is missing",
            ),
            Self::SchemaTooOld { .. } => Some("bring the tables up to date with `laelaps init`, or with Queue::init"),
            Self::SchemaTooNew { .. } => {
                Some("upgrade this program to the version that made the schema, or to a later one; nothing was changed")
            }
            Self::OtherSchema { .. } => {
                Some("use the build that made the database, or a new database, made by `laelaps init`; nothing was changed")
            }
            Self::Database { source, .. } if is_about_tables(source) => {
                Some("`laelaps check` tells how the tables differ from those that `laelaps init` makes")
            }
            Self::Connect { hint, .. } | Self::Denied { hint, .. } => Some(hint),
            Self::NoSuchId(_) => Some("`laelaps list` shows the numbers; the task's retention may have ended"),
            Self::Busy { .. } => Some("a producer or another host keeps a transaction open; it is tried again"),
            Self::NotFound(_) => Some("the key may be misspelt, or the task's retention has ended"),
            Self::Locked { .. } => Some("find out which program keeps a transaction open, for example with `fuser` on the file"),
            Self::Full { .. } => Some("make room on the disk; tasks are kept, and work goes on by itself"),
            Self::ReadOnly { .. } => Some("let the user of this process write to the file and to its folder"),
            Self::Corrupt { .. } => {
                Some("check the path; if the file is yours, `sqlite3 FILE 'PRAGMA integrity_check'` tells more")
            }
            Self::UnknownHost(_) => Some("register the host again; what it had is taken back from it"),
            _ => None,
        }
    }
}

/// What the driver says if PostgreSQL's side closed the connection instead of answering the first byte, as proxies do while their server is down.
const NO_ANSWER: &str = "unexpected response from SSLRequest: 0x00";

/// Whether a connection did not come about because of encryption. The driver tells a certificate that is not trusted as data that is not valid.
pub(crate) fn is_about_encryption(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Tls(_) => true,
        sqlx::Error::Io(error) => error.kind() == std::io::ErrorKind::InvalidData,
        _ => false,
    }
}

/// Whether a server does not take what it will take at another time: writes (it is a standby, or read-only for a failover), or a connection (the
/// user has too many, the server is in offline mode).
fn is_turned_away(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    match error.try_downcast_ref::<MySqlDatabaseError>() {
        Some(error) => matches!(error.number(), 1203 | 1226 | 1290 | 1836 | 3032),
        None => error.try_downcast_ref::<PgDatabaseError>().is_some() && error.code().as_deref() == Some("25006"),
    }
}

/// Whether a database's complaint passes by itself.
fn is_passing(error: &dyn DatabaseError) -> bool {
    if let Some(error) = error.try_downcast_ref::<MySqlDatabaseError>() {
        // Too many connections, server shutting down, network trouble as the server sees it, lock wait time-out, deadlock, interrupted,
        // connection killed, time-out of a statement, gone away, lost.
        return matches!(
            error.number(),
            1040 | 1053 | 1079 | 1105 | 1152 | 1158..=1161 | 1205 | 1213 | 1317 | 1927 | 1969 | 2006 | 2013 | 3024
        );
    }
    let Some(code) = error.code() else { return false };
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        // A pooler that does not know our settings never will.
        if code == "08P01" && error.message().contains("startup parameter") {
            return false;
        }
        // Connection exceptions, transaction rollbacks (deadlock, serialisation), too few resources, operator intervention (shutdown, cancelled).
        return ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class)) || code == "55P03";
    }
    // SQLite: busy, locked, out of memory, interrupted, I/O error, full.
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6 | 7 | 9 | 10 | 13))
}

/// Whether a statement names something that the database does not have, or has in another shape: somebody changed the tables.
fn is_about_tables(error: &sqlx::Error) -> bool {
    let Some(error) = error.as_database_error() else { return false };
    if let Some(error) = error.try_downcast_ref::<MySqlDatabaseError>() {
        // No such column, no default for one, no such key, procedure or partition; columns and values differ in number.
        return matches!(error.number(), 1054 | 1072 | 1136 | 1176 | 1305 | 1364);
    }
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        return error.code().is_some_and(|code| matches!(&*code, "42703" | "42P01" | "42P10" | "42704" | "42883" | "42804"));
    }
    let message = error.message();
    ["no such column", "no such index", "no such table", " has no column named "].iter().any(|words| message.contains(words))
}

/// Whether a database's complaint is about the values of a statement, or about the rows that it names.
fn is_about_values(error: &dyn DatabaseError) -> bool {
    let Some(code) = error.code() else { return false };
    if let Some(error) = error.try_downcast_ref::<MySqlDatabaseError>() {
        // Packet or result too large, truncated, not of its column's type, against a CHECK; most others have classes as PostgreSQL's.
        return matches!(error.number(), 1153 | 1265 | 1301 | 1366 | 3819)
            || ["21", "22", "23", "45"].iter().any(|class| code.starts_with(class));
    }
    if error.try_downcast_ref::<PgDatabaseError>().is_some() {
        // Cardinality, data, integrity, program limits; a trigger's refusal; a damaged row.
        return ["21", "22", "23", "54"].iter().any(|class| code.starts_with(class)) || code == "P0001" || code == "XX001";
    }
    // SQLite: too big, constraint, mismatch, out of range.
    code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 18 | 19 | 20 | 25))
}
