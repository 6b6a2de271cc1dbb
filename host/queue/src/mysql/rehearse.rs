//! What a host does, tried in a transaction that is rolled back: what its user lacks, and what of the server is in the way.
//!
//! On a connection of its own, so that no setting of it stays. No statement makes or alters a table, which would end the transaction; none waits
//! for a lock longer than a second; and each touches rows of its own, or none.

use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection};

use super::failure::{self, Failure};
use super::session::Session;
use super::{MySql, schema, submit};
use crate::batch::Batch;
use crate::{Error, NewTask, Result};

/// How long it waits for a row or a table that somebody else keeps locked.
pub(crate) const LOCKS: &str = "SET SESSION innodb_lock_wait_timeout = 1, lock_wait_timeout = 1";

/// No statement of ours is larger.
const PACKET_BYTES: i64 = 9 << 20;

/// A life of the task of this key, as far as it needs more than a submit: claimed, and failed.
const LIFE: [&str; 5] = [
    "UPDATE laelaps_task SET state = 'running', lease = 1, until = 1 WHERE `key` = ?",
    "DELETE r FROM laelaps_task AS t STRAIGHT_JOIN laelaps_ready AS r ON r.queue = t.queue AND r.turn = t.turn AND r.task = t.id WHERE t.`key` = ?",
    "INSERT INTO laelaps_failure (task, code, message) SELECT id, 'rehearsal', '' FROM laelaps_task WHERE `key` = ?",
    "UPDATE laelaps_task SET state = 'failed', until = 0, finished_at = 1, retained_until = 1 WHERE `key` = ?",
    "DELETE FROM laelaps_task WHERE `key` = ?",
];

impl MySql {
    /// What is missing, in words; empty if a host could work.
    pub(super) async fn rehearsed(&self) -> Result<Vec<String>> {
        let (access, runner) = (self.access.clone(), self.runner.clone());
        // To its end, whoever waits for it: a connection that is dropped in the middle takes its locks along for a while.
        let rehearsing = tokio::spawn(async move {
            let (mut connection, _) = access.connect_with_patience(runner.patience).await?;
            let rehearsed = rehearse(&mut connection).await;
            // The server takes back what is not committed.
            if let Err(error) = connection.close().await {
                tracing::debug!(%error, "closing the connection of a rehearsal");
            }
            rehearsed.map_err(|failure| failure.into_error("rehearsing what a host does", &runner.place))
        });
        rehearsing.await.unwrap_or(Err(Error::Closed))
    }
}

async fn rehearse(connection: &mut MySqlConnection) -> Result<Vec<String>, Failure> {
    sqlx::raw_sql(LOCKS).execute(&mut *connection).await?;
    let mut words = Vec::new();
    for schema::Table { name, column } in schema::tables() {
        words.extend(missing_on(connection, &name, &column).await?);
    }
    if words.is_empty() {
        sqlx::raw_sql("START TRANSACTION").execute(&mut *connection).await?;
        let in_the_way = in_the_way(connection).await;
        sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await?;
        words.extend(in_the_way?);
    }
    let packet: i64 = sqlx::query_scalar("SELECT CAST(@@max_allowed_packet AS SIGNED)").fetch_one(connection).await?;
    if packet < PACKET_BYTES {
        words.push(format!("max_allowed_packet is {packet} bytes, and a task may need {PACKET_BYTES}"));
    }
    Ok(words)
}

/// The privileges on a table that the user lacks, in words. Table and column are named as statements name them.
pub(crate) async fn missing_on(connection: &mut MySqlConnection, name: &str, column: &str) -> Result<Option<String>, Failure> {
    let mut missing = Vec::new();
    for (privilege, statement) in [
        ("SELECT", format!("SELECT {column} FROM {name} WHERE FALSE")),
        // IGNORE, since the other columns may have to be given.
        ("INSERT", format!("INSERT IGNORE INTO {name} ({column}) SELECT NULL FROM DUAL WHERE FALSE")),
        ("UPDATE", format!("UPDATE {name} SET {column} = NULL WHERE FALSE")),
        ("DELETE", format!("DELETE FROM {name} WHERE FALSE")),
    ] {
        // What else is wrong is found by living a task's life.
        match sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await {
            Err(error) if matches!(failure::number(&error), Some(1044 | 1142 | 1143)) => missing.push(privilege),
            Err(error) if error.as_database_error().is_none() => return Err(Failure::from(error)),
            _ => {}
        }
    }
    Ok((!missing.is_empty()).then(|| format!("no {} on table {name}", missing.join(", "))))
}

/// The first thing that goes wrong in a task's life.
async fn in_the_way(connection: &mut MySqlConnection) -> Result<Option<String>, Failure> {
    let key = format!("laelaps-rehearsal-{:016x}", fastrand::u64(..));
    // Without user: no other account has to be looked at.
    let batch = [Batch::new(&[NewTask::new(key.clone(), "laelaps-rehearsal", "{}")])?];
    let live = async {
        let mut session = Session::joining(connection).await?;
        submit::submit(&mut session, &batch, submit::new_mark()).await?;
        for statement in LIFE {
            sqlx::query(AssertSqlSafe(statement)).bind(&key).execute(session.db()).await?;
        }
        Ok::<(), Failure>(())
    };
    in_words(live.await)
}

/// What the server says of a task's life that went wrong, if it is the server that says it.
pub(crate) fn in_words(lived: Result<(), Failure>) -> Result<Option<String>, Failure> {
    match lived {
        Ok(()) => Ok(None),
        Err(Failure::Sql(error)) if error.as_database_error().is_some() => {
            let server = error.as_database_error().map(|error| error.message().to_owned()).unwrap_or_default();
            Ok(Some(format!("a task cannot be stored, claimed and settled: {server}")))
        }
        Err(failure) => Err(failure),
    }
}
