//! The tables: made, moved on, and looked at before anything is believed.

use std::collections::BTreeMap;
use std::path::Path;

use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection as _};

use super::failure::Failure;
use super::writer::Session;
use crate::schema::{PROGRAM, Record, SchemaStep, Steps};
use crate::{Error, Migration, PlannedStep, SchemaStatus};

/// All steps from an empty file, in order; a step is never changed after it was released.
pub(super) const STEPS: [SchemaStep; 1] = [SchemaStep::new(1, 1, include_str!("../../migrations/sqlite/0001_tasks.sql"))];

const TABLE: &str = "CREATE TABLE IF NOT EXISTS laelaps_schema (version INTEGER PRIMARY KEY, oldest_program INTEGER NOT NULL,
    applied_at INTEGER NOT NULL, program TEXT NOT NULL, fingerprint TEXT NOT NULL) STRICT";

const ENTER: &str =
    "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint) VALUES (?1, ?2, ?3, ?4, ?5)";

/// How the file stands to this program.
///
/// # Errors
/// [`Error::Corrupt`] if it is a database of something else.
pub(super) async fn status(steps: &Steps, connection: &mut SqliteConnection, path: &Path) -> Result<SchemaStatus, Failure> {
    const TABLES: &str = "SELECT coalesce(sum(name = 'laelaps_schema'), 0), count(*) FROM sqlite_schema
        WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    const COLUMNS: &str =
        "SELECT count(*) FROM pragma_table_info('laelaps_schema') WHERE name IN ('oldest_program', 'program', 'fingerprint')";
    const RECORDS: &str = "SELECT version, oldest_program, program, fingerprint FROM laelaps_schema";
    // As development builds made it.
    const VERSIONS: &str = "SELECT version, version, '', '' FROM laelaps_schema";
    let (ours, tables): (i64, i64) = sqlx::query_as(TABLES).fetch_one(&mut *connection).await?;
    if ours == 0 {
        return if tables == 0 { Ok(SchemaStatus::Missing) } else { Err(foreign(path, tables)) };
    }
    let columns: i64 = sqlx::query_scalar(COLUMNS).fetch_one(&mut *connection).await?;
    let records: Vec<(i64, i64, String, String)> =
        sqlx::query_as(if columns == 3 { RECORDS } else { VERSIONS }).fetch_all(connection).await?;
    Ok(steps.status(&records.into_iter().map(Record::from).collect::<Vec<_>>()))
}

fn foreign(path: &Path, tables: i64) -> Failure {
    let problem = format!("a database of another program ({tables} tables, none of them ours)");
    Failure::from(Error::Corrupt { path: path.to_path_buf(), problem })
}

/// Bring the tables up to what this program needs, in one transaction. Two hosts at once: the second one finds the work done.
pub(super) async fn migrate(steps: &Steps, session: &mut Session, path: &Path) -> Result<Migration, Failure> {
    let (from, left) = steps.left(&status(steps, session.db(), path).await?)?;
    let now = session.now;
    if from == 0 {
        sqlx::query(TABLE).execute(session.db()).await?;
    }
    for step in &left {
        sqlx::raw_sql(AssertSqlSafe(&*step.sql)).execute(session.db()).await?;
        let entered =
            sqlx::query(ENTER).bind(step.version).bind(step.oldest_program).bind(now).bind(PROGRAM).bind(step.fingerprint());
        entered.execute(session.db()).await?;
    }
    let applied: Vec<i64> = left.iter().map(|step| step.version).collect();
    Ok(Migration { from, version: applied.last().copied().unwrap_or(from), applied })
}

/// The steps that [`migrate`] would take.
pub(super) async fn plan(steps: &Steps, connection: &mut SqliteConnection, path: &Path) -> Result<Vec<PlannedStep>, Failure> {
    let (from, left) = steps.left(&status(steps, connection, path).await?)?;
    let plan = left.into_iter().map(|step| {
        let table = if from == 0 && step.version == 1 { format!("{TABLE};\n") } else { String::new() };
        let (version, oldest_program, fingerprint) = (step.version, step.oldest_program, step.fingerprint());
        let enter = format!(
            "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint)
    VALUES ({version}, {oldest_program}, CAST(round(unixepoch('subsec') * 1000) AS INTEGER), '{PROGRAM}', '{fingerprint}');"
        );
        PlannedStep {
            version,
            oldest_program,
            sql: format!("BEGIN IMMEDIATE;\n{table}{}\n{enter}\nCOMMIT;\n", step.sql.trim_end()),
        }
    });
    Ok(plan.collect())
}

/// How the file's tables differ from those that the steps make in an empty database, in words.
pub(super) async fn drift(steps: &Steps, connection: &mut SqliteConnection) -> Result<Vec<String>, Failure> {
    let found = objects(connection).await?;
    let mut fresh = SqliteConnection::connect("sqlite::memory:").await?;
    sqlx::query(TABLE).execute(&mut fresh).await?;
    for step in steps.all() {
        sqlx::raw_sql(AssertSqlSafe(&*step.sql)).execute(&mut fresh).await?;
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
