//! What a host does, tried in a transaction that is rolled back: what its user lacks, and what of the server is in the way.
//!
//! The tables are shared, so nobody may wait for a rehearsal. Its row stands where held rows do, which no acquire and no clean-up reads; none of its
//! statements waits for a lock longer than a second; a number of a host, which is never given twice, is not used up; and the table's lock
//! is had and given back in one statement.

use std::sync::Arc;

use sqlx::{Connection as _, MySqlConnection};

use super::run::silence;
use super::side::{self, Side};
use super::submit::Batch;
use super::table::{Names, json, token};
use super::{Shared, lock, operate};
use crate::mysql::failure::Failure;
use crate::mysql::rehearse::{LOCKS, in_words, missing_on};
use crate::{Error, NewTask, Result, State};

/// Each table, with one of its columns. The last three are there if there are tables of ours.
const TABLES: [(&str, &str); 4] = [("{t}", "timeout"), ("{s}", "timeout"), ("{h}", "seen_at"), ("{d}", "at")];

/// A life of the row of this key, as far as it needs more than a submit: acquired, updated, and finished.
const LIFE: [&str; 3] = [
    "UPDATE {t} AS t FORCE INDEX (PRIMARY) SET t.owner = ?, t.data = t.data WHERE t.id = ?",
    "UPDATE {t} AS t FORCE INDEX (PRIMARY) SET t.created_at = NULL, t.resource = NULL, t.max_running = NULL, t.owner = ? + 1 WHERE t.id = ?",
    "DELETE t FROM {t} AS t FORCE INDEX (PRIMARY) WHERE t.owner = ? + 1 AND t.id = ?",
];

impl Shared {
    /// What is missing, in words; empty if a host could work.
    pub(super) async fn rehearsed(self: &Arc<Self>) -> Result<Vec<String>> {
        let shared = Arc::clone(self);
        // To its end, whoever waits for it, on a connection that nobody uses afterwards: no setting of it stays.
        let rehearsing = tokio::spawn(async move {
            let (mut connection, _) = shared.access.connect_with_patience(shared.patience).await?;
            let rehearsing = async {
                let names = shared.names(&mut connection).await?;
                rehearse(&names, &mut connection).await
            };
            let rehearsed = tokio::time::timeout(shared.limit, rehearsing).await;
            let rehearsed = rehearsed.unwrap_or_else(|_| Err(silence(shared.limit)));
            // Dropped or closed: the server takes back what is not committed.
            if rehearsed.is_ok()
                && let Err(error) = connection.close().await
            {
                tracing::debug!(%error, "closing the connection of a rehearsal");
            }
            rehearsed.map_err(|failure| failure.into_error("rehearsing what a host does", &shared.access.place))
        });
        rehearsing.await.unwrap_or(Err(Error::Closed))
    }
}

async fn rehearse(names: &Names, connection: &mut MySqlConnection) -> Result<Vec<String>, Failure> {
    sqlx::raw_sql(LOCKS).execute(&mut *connection).await?;
    let mut words = engines(names, connection).await?;
    let tables = &TABLES[..if names.has_side() { TABLES.len() } else { 1 }];
    for (table, column) in tables {
        words.extend(missing_on(connection, &names.sql(table).0, column).await?);
    }
    if words.is_empty() {
        words.extend(lock::rehearse(names.lock(), connection).await?);
        sqlx::raw_sql("START TRANSACTION").execute(&mut *connection).await?;
        let lived = in_words(live(names, connection).await);
        sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await?;
        words.extend(lived?);
    }
    Ok(words)
}

/// Tables whose engine cannot take back what was written, and locks whole tables where a host locks rows. PerfectQueue takes the server's default.
async fn engines(names: &Names, connection: &mut MySqlConnection) -> Result<Vec<String>, Failure> {
    const ENGINES: &str = "SELECT CAST(table_name AS CHAR), CAST(engine AS CHAR) FROM information_schema.tables
        WHERE table_schema = DATABASE() AND JSON_CONTAINS(?, JSON_QUOTE(CONVERT(table_name USING utf8mb4))) AND engine <> 'InnoDB'
        ORDER BY table_name";
    let found: Vec<(String, String)> = sqlx::query_as(ENGINES).bind(json(names.plain())).fetch_all(connection).await?;
    let told = |(table, engine): (String, String)| {
        format!("table {table} is {engine}; a host needs InnoDB (ALTER TABLE ... ENGINE=InnoDB)")
    };
    Ok(found.into_iter().map(told).collect())
}

/// A task's life, to be rolled back.
async fn live(names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
    let key = format!("laelaps-rehearsal-{:016x}", fastrand::u64(..));
    // What the table has no column for is noted beside it.
    let max_attempts = names.has_side().then_some(1);
    let task = NewTask { max_attempts, ..NewTask::new(key.clone(), "laelaps-rehearsal", "{}").on_hold() };
    Batch::new(&[task], names.has_side())?.store_in(names, connection).await?;
    let token = token(0);
    for statement in LIFE {
        sqlx::query(names.sql(statement)).bind(token).bind(&key).execute(&mut *connection).await?;
    }
    if names.has_side() {
        let noted = Side { state: Some(State::Failed), output: Some(b"{}".to_vec()), ..Side::new(0) };
        side::load(&[&key], true, names, connection).await?;
        side::store(&[(&key, noted)], names, connection).await?;
        operate::forget(&[key], names, connection).await?;
    }
    Ok(())
}
