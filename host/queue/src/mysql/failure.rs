//! The server's errors in the queue's words, and which of them pass by themselves.

use std::time::Duration;

use sqlx::mysql::MySqlDatabaseError;

use crate::error::is_about_encryption;
use crate::{Error, HostId, State};

/// What an operation ends with when it does not succeed: an error of the database, not yet put into words, or one of the queue.
#[derive(Debug)]
pub(crate) enum Failure {
    Sql(sqlx::Error),
    Queue(Box<Error>),
    /// What was found a moment ago is not there any more.
    Overtaken,
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
    /// Another transaction was in the way; nothing was changed, and the same may succeed at once.
    pub(crate) fn is_conflict(&self) -> bool {
        // Lock wait time-out; deadlock; the record has changed since it was read (MariaDB's snapshot isolation).
        match self {
            Self::Sql(error) => matches!(number(error), Some(1205 | 1213 | 1020)),
            Self::Queue(_) => false,
            Self::Overtaken => true,
        }
    }

    /// Another transaction held a lock for longer than this one waits.
    pub(crate) fn is_lock_wait(&self) -> bool {
        matches!(self, Self::Sql(error) if number(error) == Some(1205))
    }

    /// The server takes no writes: it is not the primary any more, or an administrator has set it so.
    pub(crate) fn is_read_only(&self) -> bool {
        matches!(self, Self::Sql(error) if matches!(number(error), Some(1290 | 1836)))
    }

    /// The connection is of no use any more. What its last statement did is unknown.
    pub(crate) fn is_disconnection(&self) -> bool {
        matches!(self, Self::Sql(error) if is_disconnection(error))
    }

    /// The error for the caller. `doing` says what was being done.
    pub(crate) fn into_error(self, doing: &'static str, place: &Place) -> Error {
        match self {
            Self::Queue(error) => *error,
            Self::Sql(source) => place.worded(source, doing),
            Self::Overtaken => {
                let words = "others were quicker each time it was tried";
                Error::Database { doing, source: sqlx::Error::AnyDriverError(words.into()) }
            }
        }
    }
}

/// The server's number of an error.
pub(crate) fn number(error: &sqlx::Error) -> Option<u16> {
    error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>().map(MySqlDatabaseError::number)
}

/// The server ended the session, or cannot be reached: shutting down (1053), out of connections (1040), connection killed (1927), network
/// trouble as the server saw it (1158 to 1161), silent for too long (4031), and whatever the driver says of its socket.
pub(crate) fn is_disconnection(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_) | sqlx::Error::Protocol(_) | sqlx::Error::PoolTimedOut | sqlx::Error::WorkerCrashed => true,
        error => matches!(
            number(error),
            Some(1040 | 1053 | 1077 | 1079 | 1152 | 1158..=1161 | 1184 | 1317 | 1927 | 2006 | 2013 | 4031)
        ),
    }
}

/// The server and database, as they may be told.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    place: String,
}

impl Place {
    pub(crate) fn of(place: String) -> Self {
        Self { place }
    }

    fn cannot(&self, problem: Option<String>, hint: &'static str, source: Option<sqlx::Error>) -> Error {
        Error::Connect { place: self.place.clone(), problem, hint, source }
    }

    /// The error of a connection that did not come about.
    pub(crate) fn connecting(&self, source: sqlx::Error) -> Error {
        let hint = match &source {
            source if is_about_encryption(source) => {
                "the server does not offer the encryption that is asked for, or its certificate is not trusted; look at ssl_mode and sslca"
            }
            sqlx::Error::Io(_) => "the server cannot be reached; look at host, port and firewall, and whether it runs",
            sqlx::Error::PoolTimedOut => {
                "no connection became free in time; the server may be down, or `max_connections` too few"
            }
            _ => match number(&source) {
                Some(1045 | 1698) => "user or password is wrong; look at the URL (special characters are written as %40)",
                Some(1044) => "the user may not use this database; let an administrator GRANT it (docs/databases-mysql.md)",
                Some(1049) => "there is no such database; make it with CREATE DATABASE, or look at the URL",
                Some(1130) => "the server lets nobody in from this machine; let an administrator allow the user from here",
                Some(1129) => {
                    "the server has blocked this machine after too many failures; FLUSH HOSTS on the server lets it in again"
                }
                Some(1040 | 1203 | 1226) => {
                    "too many connections; lower `max_connections` of the hosts, or raise that of the server"
                }
                Some(3159 | 4151) => "the server wants encrypted connections only; set ssl_mode to required",
                _ => "look at the URL and at the server's error log",
            },
        };
        self.cannot(None, hint, Some(source))
    }

    /// The server's binary log cannot take what a session of ours writes.
    pub(crate) fn statement_log(&self, source: sqlx::Error) -> Error {
        let problem =
            "the server's binlog_format is STATEMENT, which takes nothing that READ COMMITTED transactions write".to_owned();
        let hint = "set binlog_format to MIXED or ROW on the server, or let this user set it (GRANT BINLOG ADMIN ON *.*)";
        self.cannot(Some(problem), hint, Some(source))
    }

    /// The server takes too little at once.
    pub(crate) fn small_packets(&self, bytes: usize, least: usize) -> Error {
        let problem = format!("the server's max_allowed_packet is {bytes} bytes; at least {least} are needed");
        self.cannot(Some(problem), "raise max_allowed_packet on the server", None)
    }

    /// The server took the connection and said nothing.
    pub(crate) fn silent(&self, waited: Duration) -> Error {
        let silence = std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer within {} ms", waited.as_millis()));
        let hint = "the server does not answer; look at host, port and firewall, and whether it is overloaded";
        self.cannot(None, hint, Some(sqlx::Error::Io(silence)))
    }

    pub(crate) fn too_old(&self, version: &str) -> Error {
        let problem = format!("the server is {version}; MySQL 8.0 or MariaDB 10.6 is the oldest that works");
        self.cannot(Some(problem), "bring the server up to date, or keep tasks elsewhere", None)
    }

    /// The error that says what was being done and what was in the way.
    pub(crate) fn worded(&self, source: sqlx::Error, doing: &'static str) -> Error {
        if matches!(source, sqlx::Error::PoolClosed) {
            return Error::Closed;
        }
        match number(&source) {
            Some(1146) => Error::NotInitialised,
            Some(1044 | 1045 | 1049 | 1129 | 1130 | 1203 | 1226 | 1698 | 3159 | 4151) => self.connecting(source),
            Some(1142 | 1143 | 1227 | 1370 | 1410 | 1419) => {
                let hint = "the user lacks a privilege; docs/databases-mysql.md lists which are needed, for `init` and for work";
                Error::Denied { place: self.place.clone(), doing, hint, source }
            }
            Some(1290 | 1836) => {
                let hint = "the server takes no writes; the URL may name a replica, or an administrator has set read_only";
                Error::Denied { place: self.place.clone(), doing, hint, source }
            }
            Some(1021 | 1114) => Error::Full { path: std::path::PathBuf::from(&self.place) },
            _ if matches!(source, sqlx::Error::PoolTimedOut | sqlx::Error::Tls(_)) => self.connecting(source),
            _ => Error::Database { doing, source },
        }
    }
}

/// The error of a host that is not there.
pub(crate) fn unknown_host(host: HostId) -> Failure {
    Failure::from(Error::UnknownHost(host))
}

/// A state as the database says it; one that is none of ours (only hands write such) counts as failed.
pub(crate) fn state_or_failed(word: &str) -> State {
    State::ALL.into_iter().find(|state| state.as_str() == word).unwrap_or(State::Failed)
}

/// A state as the database says it.
pub(crate) fn state(word: &str) -> Result<State, sqlx::Error> {
    State::ALL
        .into_iter()
        .find(|state| state.as_str() == word)
        .ok_or_else(|| sqlx::Error::Decode(format!("unknown state {word:?}").into()))
}
