//! The tables, in a schema of their own: made, moved on, and looked at before anything is believed.

use std::collections::BTreeMap;

use sqlx::AssertSqlSafe;

use super::failure::{self, Failure};
use super::session::Session;
use crate::{Migration, PlannedStep, SchemaStatus};

/// All steps from an empty database, in order; a step is never changed after it was released.
const STEPS: [(i64, &str); 1] = [(1, include_str!("../../migrations/postgres/0001_tasks.sql"))];

/// The version that this program needs.
const NEEDED: i64 = STEPS[STEPS.len() - 1].0;

/// What stands in the schema after all steps: kind, name and definition of each, as [`OBJECTS`] tells them, one a line.
const EXPECTED: &str = include_str!("../../migrations/postgres/expected.txt");

/// Held while the tables are made, so that many hosts can try at once. "laelaps" in ASCII.
const LOCK: i64 = 0x006c_6165_6c61_7073;

const SCHEMA: &str = "CREATE SCHEMA laelaps";

const TABLE: &str = "CREATE TABLE laelaps.schema_version (version int8 NOT NULL PRIMARY KEY, applied_at int8 NOT NULL)";

const ENTER: &str = "INSERT INTO laelaps.schema_version (version, applied_at)
    VALUES ($1, (extract(epoch FROM clock_timestamp()) * 1000)::int8)";

/// How much of it there is.
struct Found {
    schema: bool,
    status: SchemaStatus,
}

/// How the database stands to this program.
///
/// # Errors
/// If something else has taken the schema's name.
async fn look(session: &mut Session) -> Result<Found, Failure> {
    const LOOK: &str = "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = 'laelaps'),
        to_regclass('laelaps.schema_version') IS NOT NULL,
        (SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace('laelaps') AND relkind IN ('r', 'v', 'm', 'p'))";
    const VERSION: &str = "SELECT coalesce(max(version), 0) FROM laelaps.schema_version";
    let (schema, ours, tables): (bool, bool, i64) = sqlx::query_as(LOOK).fetch_one(session.db()?).await?;
    if !ours {
        if tables > 0 {
            let problem = format!("the schema laelaps is of something else ({tables} tables, none of them ours)");
            let hint = "use another database, or rename that schema";
            return Err(failure::unusable(session.shared.connections.place(), problem, hint).into());
        }
        return Ok(Found { schema, status: SchemaStatus::Missing });
    }
    let found: i64 = sqlx::query_scalar(VERSION).fetch_one(session.db()?).await?;
    let status = match found {
        0 => SchemaStatus::Missing,
        found if found < NEEDED => SchemaStatus::Old { found, needed: NEEDED },
        found if found > NEEDED => SchemaStatus::New { found, known: NEEDED },
        found => SchemaStatus::Current(found),
    };
    Ok(Found { schema, status })
}

pub(super) async fn status(session: &mut Session) -> Result<SchemaStatus, Failure> {
    Ok(look(session).await?.status)
}

/// The version from which to go on; None if there is nothing to do.
fn from(status: &SchemaStatus) -> Result<Option<i64>, Failure> {
    match *status {
        SchemaStatus::Current(_) => Ok(None),
        SchemaStatus::New { found, known } => Err(crate::Error::SchemaTooNew { found, known }.into()),
        SchemaStatus::Missing => Ok(Some(0)),
        SchemaStatus::Old { found, .. } => Ok(Some(found)),
    }
}

/// Bring the tables up to what this program needs. Two hosts at once: the second one finds the work done.
pub(super) async fn migrate(session: &mut Session) -> Result<Migration, Failure> {
    session.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK).execute(session.db()?).await?;
    let found = look(session).await?;
    let mut applied = Vec::new();
    if let Some(from) = from(&found.status)? {
        if !found.schema {
            sqlx::raw_sql(SCHEMA).execute(session.db()?).await?;
        }
        if from == 0 {
            sqlx::raw_sql(TABLE).execute(session.db()?).await?;
        }
        for (version, sql) in STEPS.into_iter().filter(|(version, _)| *version > from) {
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(session.db()?).await?;
            sqlx::query(ENTER).bind(version).execute(session.db()?).await?;
            applied.push(version);
        }
    }
    session.commit().await?;
    Ok(Migration { applied, version: NEEDED })
}

/// The steps that [`migrate`] would take.
pub(super) async fn plan(session: &mut Session) -> Result<Vec<PlannedStep>, Failure> {
    let found = look(session).await?;
    let Some(from) = from(&found.status)? else { return Ok(Vec::new()) };
    let steps = STEPS.into_iter().filter(|(version, _)| *version > from);
    let plan = steps.map(|(version, sql)| {
        let schema = if from == 0 && !found.schema { format!("{SCHEMA};\n") } else { String::new() };
        let table = if from == 0 { format!("{TABLE};\n") } else { String::new() };
        let enter = ENTER.replace("$1", &version.to_string());
        PlannedStep { version, sql: format!("{schema}{table}{sql}{enter};\n") }
    });
    Ok(plan.collect())
}

/// Kind, name and definition of what stands in the schema. Nothing in it depends on the server's version.
pub(super) const OBJECTS: &str = "SELECT 'table', relname::text, (
        SELECT string_agg(concat_ws(' ', attname, typname, CASE WHEN attnotnull THEN 'not null' END,
            CASE WHEN collname <> 'default' THEN 'collate ' || collname END,
            CASE WHEN attgenerated <> '' THEN 'generated' WHEN attidentity <> '' THEN 'identity' WHEN atthasdef THEN 'default' END),
            ', ' ORDER BY attnum)
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped)
    FROM pg_class WHERE relnamespace = to_regnamespace('laelaps') AND relkind = 'r'
    UNION ALL SELECT 'view', relname, (
        SELECT string_agg(attname || ' ' || typname, ', ' ORDER BY attnum)
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped)
    FROM pg_class WHERE relnamespace = to_regnamespace('laelaps') AND relkind IN ('v', 'm')
    UNION ALL SELECT 'index', relname, concat_ws(' ', CASE WHEN indisunique THEN 'unique' END, 'on', (SELECT relname FROM pg_class WHERE oid = indrelid),
        (SELECT string_agg(pg_get_indexdef(indexrelid, number, true) || CASE WHEN indoption[number - 1] & 1 = 1 THEN ' desc' ELSE '' END,
            ', ' ORDER BY number) FROM generate_series(1, indnkeyatts) AS number),
        CASE WHEN indpred IS NOT NULL THEN 'in part' END, CASE WHEN NOT indisvalid THEN 'invalid' END)
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = to_regnamespace('laelaps')
    UNION ALL SELECT 'sequence', relname, '' FROM pg_class WHERE relnamespace = to_regnamespace('laelaps') AND relkind = 'S'
    UNION ALL SELECT 'constraint', conname, 'on ' || (SELECT relname FROM pg_class WHERE oid = conrelid) FROM pg_constraint
    WHERE connamespace = to_regnamespace('laelaps') AND contype <> 'n' AND conrelid <> 0
    UNION ALL SELECT 'trigger', tgname, 'on ' || relname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
    WHERE relnamespace = to_regnamespace('laelaps') AND NOT tgisinternal
    UNION ALL SELECT 'type', typname, (SELECT string_agg(enumlabel, ', ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = pg_type.oid)
    FROM pg_type WHERE typnamespace = to_regnamespace('laelaps') AND typtype = 'e'
    UNION ALL SELECT 'function', proname || '(' || oidvectortypes(proargtypes) || ')', concat_ws(' ', pg_get_function_identity_arguments(oid), md5(regexp_replace(prosrc, '\\s+', ' ', 'g')))
    FROM pg_proc WHERE pronamespace = to_regnamespace('laelaps')
    ORDER BY 1, 2";

/// How the tables differ from those that the steps make, in words.
pub(super) async fn drift(session: &mut Session) -> Result<Vec<String>, Failure> {
    let rows: Vec<(String, String, Option<String>)> = sqlx::query_as(OBJECTS).fetch_all(session.db()?).await?;
    let found: BTreeMap<(String, String), String> =
        rows.into_iter().map(|(kind, name, words)| ((kind, name), words.unwrap_or_default())).collect();
    let expected = expected();
    let missing =
        expected.keys().filter(|object| !found.contains_key(*object)).map(|(kind, name)| format!("{kind} {name} is missing"));
    let altered = expected.iter().filter(|(object, words)| found.get(*object).is_some_and(|found| found != *words));
    let altered = altered.map(|((kind, name), _)| format!("{kind} {name} is not as init makes it"));
    let added = found.keys().filter(|object| !expected.contains_key(*object));
    let added = added.map(|(kind, name)| format!("{kind} {name} is not ours"));
    Ok(missing.chain(altered).chain(added).collect())
}

fn expected() -> BTreeMap<(String, String), String> {
    let line = |line: &str| {
        let mut parts = line.splitn(3, '|').map(str::to_owned);
        Some(((parts.next()?, parts.next()?), parts.next()?))
    };
    EXPECTED.lines().filter_map(line).collect()
}
