//! The tables: made, moved on, and looked at before anything is believed.
//!
//! Neither server can take a CREATE TABLE back, so a step is only noted as done after its last statement, and each of its statements can be
//! run again: what an ALTER TABLE finds done is passed over. A lock of the server's keeps two programs from doing the same step at once.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, Row as _};

use super::MySql;
use super::failure::{self, Failure};
use super::session::now;
use crate::schema::{PROGRAM, Record, SchemaStep, Steps};
use crate::{Error, Migration, PlannedStep, Result, SchemaStatus};

/// All steps from an empty database, in order; a step is never changed after it was released.
pub(super) const STEPS: [SchemaStep; 1] = [SchemaStep::new(1, 1, include_str!("../../migrations/mysql/0001_tasks.sql"))];

const TABLE: &str = "CREATE TABLE IF NOT EXISTS laelaps_schema (version BIGINT NOT NULL, oldest_program BIGINT NOT NULL,
    applied_at BIGINT NOT NULL, program VARCHAR(64) NOT NULL, fingerprint VARCHAR(16) NOT NULL, PRIMARY KEY (version))
    ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin";

/// A statement that waits for a table holds up everybody who comes after it: it gives way to a long transaction after so many seconds, and is
/// tried again.
const GIVE_WAY: &str = "SET SESSION lock_wait_timeout = 1";
/// How long a statement is tried again at least, whatever the patience, and the pause between two tries.
const TABLE_WAIT: Duration = Duration::from_secs(60);
const TABLE_PAUSE: Duration = Duration::from_millis(200);

/// How long to wait for another program that makes the tables.
const LOCK_WAIT: Duration = Duration::from_secs(60);
/// How long making them may take, that wait included.
const MAKING_MAX: Duration = Duration::from_secs(900);

impl MySql {
    /// Bring the tables up to what this program needs. Two programs at once: the second one finds the work done.
    pub(super) async fn migrate(&self) -> Result<Migration> {
        let (access, runner, steps) = (self.access.clone(), self.runner.clone(), Arc::clone(&self.steps));
        // On a connection of its own, which is closed afterwards, and the lock with it, whatever happens.
        let making = tokio::spawn(async move {
            let (mut connection, _) = access.connect_with_patience(runner.patience).await?;
            let made = tokio::time::timeout(MAKING_MAX, make(&steps, runner.patience.max(TABLE_WAIT), &mut connection))
                .await
                .unwrap_or_else(|_| {
                    let words = format!("the tables were not made within {} s", MAKING_MAX.as_secs());
                    Err(Failure::from(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))))
                });
            if let Err(error) = connection.close().await {
                tracing::debug!(%error, "closing the connection that made the tables");
            }
            made.map_err(|failure| failure.into_error("creating the tables", &runner.place))
        });
        making.await.unwrap_or(Err(Error::Closed))
    }

    pub(super) async fn status(&self) -> Result<SchemaStatus> {
        let records =
            self.runner.read_together("looking at the schema", |session| Box::pin(async move { records(session.db()).await }));
        Ok(self.steps.status(&records.await?))
    }

    /// The steps that [`MySql::migrate`] would take.
    pub(super) async fn planned(&self) -> Result<Vec<PlannedStep>> {
        let (from, left) = self.steps.left(&self.status().await?)?;
        let plan = left.into_iter().map(|step| {
            let table = if from == 0 && step.version == 1 { format!("{TABLE};\n") } else { String::new() };
            let (version, oldest_program, fingerprint) = (step.version, step.oldest_program, step.fingerprint());
            let now = now!();
            let enter = format!(
                "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint)
    VALUES ({version}, {oldest_program}, {now}, '{PROGRAM}', '{fingerprint}');"
            );
            PlannedStep { version, oldest_program, sql: format!("{table}{}\n{enter}\n", step.sql.trim_end()) }
        });
        Ok(plan.collect())
    }

    /// How the tables differ from those that the steps make, in words.
    pub(super) async fn differences(&self) -> Result<Vec<String>> {
        let expected = expected();
        self.runner
            .read_together("comparing the schema", move |session| {
                let expected = expected.clone();
                Box::pin(async move { Ok(compare(&expected, &found(session.db()).await?)) })
            })
            .await
    }
}

/// The steps that were taken; none if there are no tables of ours.
async fn records(connection: &mut MySqlConnection) -> Result<Vec<Record>, Failure> {
    const RECORDS: &str = "SELECT version, oldest_program, CAST(program AS CHAR), CAST(fingerprint AS CHAR) FROM laelaps_schema";
    // As development builds made it.
    const VERSIONS: &str = "SELECT version, version, '', '' FROM laelaps_schema";
    for sql in [RECORDS, VERSIONS] {
        match sqlx::query_as::<_, (i64, i64, String, String)>(sql).fetch_all(&mut *connection).await {
            Ok(records) => return Ok(records.into_iter().map(Record::from).collect()),
            Err(error) if failure::number(&error) == Some(1146) => return Ok(Vec::new()),
            Err(error) if failure::number(&error) == Some(1054) && sql == RECORDS => {}
            Err(error) => return Err(Failure::from(error)),
        }
    }
    Ok(Vec::new())
}

async fn make(steps: &Steps, patience: Duration, connection: &mut MySqlConnection) -> Result<Migration, Failure> {
    const LOCK: &str = "SELECT GET_LOCK(CONCAT('laelaps_init_', LEFT(SHA2(DATABASE(), 256), 32)), ?)";
    const ENTER: &str = concat!(
        "INSERT INTO laelaps_schema (version, oldest_program, applied_at, program, fingerprint) VALUES (?, ?, ",
        now!(),
        ", ?, ?)"
    );
    let locked: Option<i64> = sqlx::query_scalar(LOCK).bind(LOCK_WAIT.as_secs()).fetch_one(&mut *connection).await?;
    if locked != Some(1) {
        let words = format!("another program has been making the tables for {} s", LOCK_WAIT.as_secs());
        return Err(Failure::from(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words))));
    }
    let (from, left) = steps.left(&steps.status(&records(connection).await?))?;
    if !left.is_empty() {
        sqlx::raw_sql(TABLE).execute(&mut *connection).await?;
        sqlx::raw_sql(GIVE_WAY).execute(&mut *connection).await?;
    }
    let mut applied = Vec::new();
    for step in left {
        for statement in statements(&step.sql) {
            take(&statement, patience, connection).await?;
        }
        let entered = sqlx::query(ENTER).bind(step.version).bind(step.oldest_program).bind(PROGRAM).bind(step.fingerprint());
        entered.execute(&mut *connection).await?;
        applied.push(step.version);
    }
    Ok(Migration { from, version: applied.last().copied().unwrap_or(from), applied })
}

/// Run a statement of a step, which may have been run before if the step broke off: a column or an index that is there, or gone, says so.
async fn take(statement: &str, patience: Duration, connection: &mut MySqlConnection) -> Result<(), Failure> {
    let begun = Instant::now();
    loop {
        let Err(error) = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut *connection).await else { return Ok(()) };
        // The column is there, the index is there, the one to drop is not.
        if statement.starts_with("ALTER TABLE ") && matches!(failure::number(&error), Some(1060 | 1061 | 1091)) {
            return Ok(());
        }
        let failure = Failure::from(error);
        if !failure.is_conflict() || begun.elapsed() >= patience {
            return Err(failure);
        }
        tokio::time::sleep(TABLE_PAUSE).await;
    }
}

/// The statements of a step, taken apart as the servers' own clients do it, so that a step can be fed to them as well.
fn statements(sql: &str) -> Vec<String> {
    let mut delimiter = ";";
    let mut statements = Vec::new();
    let mut statement = String::new();
    for line in sql.lines().filter(|line| !line.trim_start().starts_with("--")) {
        if let Some(other) = line.strip_prefix("DELIMITER ") {
            delimiter = other.trim();
            continue;
        }
        match line.trim_end().strip_suffix(delimiter) {
            Some(last) => {
                statement.push_str(last);
                statements.push(std::mem::take(&mut statement));
            }
            None => {
                statement.push_str(line);
                statement.push('\n');
            }
        }
    }
    statements.into_iter().map(|statement| statement.trim().to_owned()).filter(|statement| !statement.is_empty()).collect()
}

/// What belongs to a schema, by name: tables, `table.column`, `table.index`, procedures; and how each is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Objects {
    tables: BTreeMap<String, String>,
    columns: BTreeMap<String, String>,
    indexes: BTreeMap<String, String>,
    procedures: BTreeMap<String, String>,
}

/// What the steps make, read from their statements.
fn expected() -> Objects {
    let mut objects = Objects::default();
    for statement in STEPS.iter().flat_map(|step| statements(&step.sql)).chain([TABLE.to_owned()]) {
        let plain = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some(rest) = plain.strip_prefix("CREATE PROCEDURE ") {
            let name = rest.split('(').next().unwrap_or_default();
            objects.procedures.insert(name.trim().to_owned(), String::new());
        }
        let Some(rest) = plain.strip_prefix("CREATE TABLE IF NOT EXISTS ") else { continue };
        let Some((table, rest)) = rest.split_once(" (") else { continue };
        let body = rest.rsplit_once(") ENGINE").map_or(rest, |(body, _)| body);
        objects.tables.insert(table.to_owned(), "innodb".to_owned());
        for item in items(body) {
            expect_item(&mut objects, table, &item);
        }
    }
    objects
}

/// A table of ours.
pub(super) struct Table {
    pub(super) name: String,
    /// One of its columns that are not generated.
    pub(super) column: String,
}

/// The tables that hosts write to.
pub(super) fn tables() -> Vec<Table> {
    let (objects, mut tables) = (expected(), Vec::new());
    for name in objects.tables.keys().filter(|name| *name != "laelaps_schema") {
        // The first of a key's is never generated.
        let key = objects.indexes.get(&format!("{name}.PRIMARY")).and_then(|columns| columns.split(',').next());
        tables.extend(key.map(|column| Table { name: name.clone(), column: format!("`{column}`") }));
    }
    tables
}

/// A column, an index or a constraint of a CREATE TABLE.
fn expect_item(objects: &mut Objects, table: &str, item: &str) {
    let index = item.strip_prefix("PRIMARY KEY ").map(|columns| ("PRIMARY", columns)).or_else(|| {
        let named = item.strip_prefix("UNIQUE KEY ").or_else(|| item.strip_prefix("KEY "))?;
        named.split_once(' ')
    });
    if let Some((name, columns)) = index {
        let columns = columns.replace(['(', ')', '`', ' '], "");
        objects.indexes.insert(format!("{table}.{name}"), columns);
    } else if !item.starts_with("CONSTRAINT ")
        && let Some((name, definition)) = item.split_once(' ')
    {
        let kind = definition.split(" NOT NULL").next().unwrap_or_default();
        let kind = kind.split(" GENERATED").next().unwrap_or_default();
        objects.columns.insert(format!("{table}.{}", name.replace('`', "")), column_type(kind));
    }
}

/// The items of a list, divided by commas outside of brackets.
fn items(list: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut depth = 0_i32;
    for character in list.chars() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                items.push(String::new());
                continue;
            }
            _ => {}
        }
        if let Some(item) = items.last_mut() {
            item.push(character);
        }
    }
    items.into_iter().map(|item| item.trim().to_owned()).collect()
}

/// A type as both servers could say it: MariaDB tells a width of whole numbers, MySQL does not.
fn column_type(kind: &str) -> String {
    let kind = kind.trim().to_lowercase().replace("', '", "','");
    match kind.split_once('(') {
        Some((name, rest)) if name.ends_with("int") => {
            let sign = rest.split_once(')').map_or("", |(_, sign)| sign);
            format!("{name}{sign}")
        }
        _ => kind,
    }
}

/// What is in the database.
async fn found(connection: &mut MySqlConnection) -> Result<Objects, sqlx::Error> {
    const TABLES: &str = "SELECT CAST(table_name AS CHAR), CAST(LOWER(engine) AS CHAR) FROM information_schema.tables
        WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE' AND table_name LIKE 'laelaps\\_%'";
    const COLUMNS: &str = "SELECT CAST(CONCAT(table_name, '.', column_name) AS CHAR), CAST(column_type AS CHAR)
        FROM information_schema.columns WHERE table_schema = DATABASE() AND table_name LIKE 'laelaps\\_%'";
    const INDEXES: &str = "SELECT CAST(CONCAT(table_name, '.', index_name) AS CHAR),
            CAST(GROUP_CONCAT(column_name ORDER BY seq_in_index) AS CHAR)
        FROM information_schema.statistics WHERE table_schema = DATABASE() AND table_name LIKE 'laelaps\\_%'
        GROUP BY table_name, index_name";
    const PROCEDURES: &str = "SELECT CAST(routine_name AS CHAR), '' FROM information_schema.routines
        WHERE routine_schema = DATABASE() AND routine_name LIKE 'laelaps\\_%'";
    let mut objects = Objects::default();
    for (sql, of_kind) in [
        (TABLES, &mut objects.tables),
        (COLUMNS, &mut objects.columns),
        (INDEXES, &mut objects.indexes),
        (PROCEDURES, &mut objects.procedures),
    ] {
        for row in sqlx::query(sql).fetch_all(&mut *connection).await? {
            let (name, made): (String, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
            of_kind.insert(name, made.unwrap_or_default());
        }
    }
    // A host needs no privilege on the procedure for producers, and does not see it without one.
    const SEES_PROCEDURES: &str = "SELECT EXISTS (SELECT 1 FROM (
            SELECT privilege_type, '%' AS place FROM information_schema.user_privileges
            UNION ALL SELECT privilege_type, table_schema FROM information_schema.schema_privileges) AS granted
        WHERE privilege_type IN ('EXECUTE', 'CREATE ROUTINE', 'ALTER ROUTINE') AND DATABASE() LIKE place)";
    if objects.procedures.is_empty() && sqlx::query_scalar::<_, i64>(SEES_PROCEDURES).fetch_one(&mut *connection).await? == 0 {
        objects.procedures = expected().procedures;
    }
    objects.columns.values_mut().for_each(|kind| *kind = column_type(kind));
    Ok(objects)
}

fn compare(expected: &Objects, found: &Objects) -> Vec<String> {
    let mut differences = Vec::new();
    let kinds = [
        ("table", "kept by", &expected.tables, &found.tables),
        ("column", "of type", &expected.columns, &found.columns),
        ("index", "over", &expected.indexes, &found.indexes),
        ("procedure", "", &expected.procedures, &found.procedures),
    ];
    for (kind, made, expected_ones, found_ones) in kinds {
        // What belongs to a table that is missing, or not ours, is not told one by one.
        let told_by_table = |name: &str, tables: &BTreeMap<String, String>| {
            name.split_once('.').is_some_and(|(table, _)| !tables.contains_key(table))
        };
        for (name, how) in expected_ones.iter().filter(|(name, _)| !told_by_table(name, &found.tables)) {
            match found_ones.get(name) {
                None => differences.push(format!("{kind} {name} is missing")),
                Some(other) if other != how => differences.push(format!("{kind} {name} is {made} {other}, init makes it {how}")),
                Some(_) => {}
            }
        }
        let added = found_ones.keys().filter(|name| !expected_ones.contains_key(*name) && !told_by_table(name, &expected.tables));
        differences.extend(added.map(|name| format!("{kind} {name} is not ours")));
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_falls_apart_into_its_statements() {
        let statements = statements(&STEPS[0].sql);
        let last = statements.last().unwrap();
        assert!(last.starts_with("CREATE PROCEDURE laelaps_submit(") && last.ends_with("END"), "{last}");
        assert!(statements[0].starts_with("CREATE TABLE IF NOT EXISTS laelaps_task ("), "{}", statements[0]);
        let again = ["CREATE TABLE IF NOT EXISTS ", "INSERT IGNORE ", "DROP PROCEDURE IF EXISTS ", "CREATE PROCEDURE "];
        for statement in &statements {
            assert!(again.iter().any(|start| statement.starts_with(start)), "cannot be run again: {statement}");
        }
    }

    #[test]
    fn what_is_expected_is_read_from_the_statements() {
        let expected = expected();
        assert_eq!(expected.columns["laelaps_task.max_running"], "int unsigned");
        assert_eq!(expected.columns["laelaps_set_aside.state"], "enum('failed','cancelled')");
        assert_eq!(expected.columns["laelaps_account.open"], "tinyint");
        assert_eq!(expected.indexes["laelaps_ready_of_user.in_turn"], "queue,turn,task");
        assert_eq!(expected.procedures.keys().collect::<Vec<_>>(), ["laelaps_submit"]);
    }
}
