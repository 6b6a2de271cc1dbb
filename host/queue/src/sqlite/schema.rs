//! The tables: made, moved on, and looked at before anything is believed.

use std::collections::BTreeMap;
use std::path::Path;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use super::failure::Failure;
use super::writer::Session;
use crate::{Error, Migration, PlannedStep, SchemaStatus};

/// All steps from an empty file, in order; a step is never changed after it was released.
const STEPS: [(i64, &str); 1] = [(1, include_str!("../../migrations/sqlite/0001_tasks.sql"))];

/// The version that this program needs.
const NEEDED: i64 = STEPS[STEPS.len() - 1].0;

const TABLE: &str = "CREATE TABLE IF NOT EXISTS laelaps_schema (version INTEGER PRIMARY KEY, applied_at INTEGER NOT NULL) STRICT";

const ENTER: &str = "INSERT INTO laelaps_schema (version, applied_at) VALUES (?1, ?2)";

/// How the file stands to this program.
///
/// # Errors
/// [`Error::Corrupt`] if it is a database of something else.
pub(super) async fn status(connection: &mut SqliteConnection, path: &Path) -> Result<SchemaStatus, Failure> {
    const TABLES: &str = "SELECT coalesce(sum(name = 'laelaps_schema'), 0), count(*) FROM sqlite_schema
        WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    const VERSION: &str = "SELECT coalesce(max(version), 0) FROM laelaps_schema";
    let (ours, tables): (i64, i64) = sqlx::query_as(TABLES).fetch_one(&mut *connection).await?;
    if ours == 0 {
        return if tables == 0 { Ok(SchemaStatus::Missing) } else { Err(foreign(path, tables)) };
    }
    let found: i64 = sqlx::query_scalar(VERSION).fetch_one(connection).await?;
    Ok(match found {
        0 => SchemaStatus::Missing,
        found if found < NEEDED => SchemaStatus::Old { found, needed: NEEDED },
        found if found > NEEDED => SchemaStatus::New { found, known: NEEDED },
        found => SchemaStatus::Current(found),
    })
}

fn foreign(path: &Path, tables: i64) -> Failure {
    let problem = format!("a database of another program ({tables} tables, none of them ours)");
    Failure::from(Error::Corrupt { path: path.to_path_buf(), problem })
}

/// Bring the tables up to what this program needs. Two hosts at once: the second one finds the work done.
pub(super) async fn migrate(session: &mut Session, path: &Path) -> Result<Migration, Failure> {
    let from = match status(session.db(), path).await? {
        SchemaStatus::Current(version) => return Ok(Migration { applied: Vec::new(), version }),
        SchemaStatus::New { found, known } => return Err(Failure::from(Error::SchemaTooNew { found, known })),
        SchemaStatus::Missing => 0,
        SchemaStatus::Old { found, .. } => found,
    };
    let now = session.now;
    sqlx::query(TABLE).execute(session.db()).await?;
    let mut applied = Vec::new();
    for (version, sql) in STEPS.into_iter().filter(|(version, _)| *version > from) {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(session.db()).await?;
        sqlx::query(ENTER).bind(version).bind(now).execute(session.db()).await?;
        applied.push(version);
    }
    Ok(Migration { applied, version: NEEDED })
}

/// The steps that [`migrate`] would take.
pub(super) async fn plan(connection: &mut SqliteConnection, path: &Path) -> Result<Vec<PlannedStep>, Failure> {
    let from = match status(connection, path).await? {
        SchemaStatus::Current(_) => return Ok(Vec::new()),
        SchemaStatus::New { found, known } => return Err(Failure::from(Error::SchemaTooNew { found, known })),
        SchemaStatus::Missing => 0,
        SchemaStatus::Old { found, .. } => found,
    };
    let steps = STEPS.into_iter().filter(|(version, _)| *version > from);
    Ok(steps.map(|(version, sql)| PlannedStep { version, sql: sql.to_owned() }).collect())
}

/// How the file's tables differ from those that the steps make in an empty database, in words.
pub(super) async fn drift(connection: &mut SqliteConnection) -> Result<Vec<String>, Failure> {
    let found = objects(connection).await?;
    let mut fresh = SqliteConnection::connect("sqlite::memory:").await?;
    sqlx::query(TABLE).execute(&mut fresh).await?;
    for (_, sql) in STEPS {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut fresh).await?;
    }
    let expected = objects(&mut fresh).await?;
    fresh.close().await?;
    let missing =
        expected.keys().filter(|object| !found.contains_key(*object)).map(|(kind, name)| format!("{kind} {name} is missing"));
    let altered = expected.iter().filter(|(object, sql)| found.get(*object).is_some_and(|found| found != *sql));
    let altered = altered.map(|((kind, name), _)| format!("{kind} {name} is not as init makes it"));
    let added = found.keys().filter(|object| !expected.contains_key(*object));
    let added = added.map(|(kind, name)| format!("{kind} {name} is not ours"));
    Ok(missing.chain(altered).chain(added).collect())
}

/// Kind and name of everything in a database, with the words that made it.
async fn objects(connection: &mut SqliteConnection) -> Result<BTreeMap<(String, String), String>, Failure> {
    const OBJECTS: &str = "SELECT type, name, coalesce(sql, '') FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'";
    let rows: Vec<(String, String, String)> = sqlx::query_as(OBJECTS).fetch_all(connection).await?;
    let plain = |sql: &str| sql.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(rows.into_iter().map(|(kind, name, sql)| ((kind, name), plain(&sql))).collect())
}
