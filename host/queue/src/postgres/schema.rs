//! The tables, in a schema of their own: made, moved on, and looked at before anything is believed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use sqlx::AssertSqlSafe;

use super::failure::{self, Failure};
use super::session::Session;
use crate::schema::{PROGRAM, Record, SchemaStep};
use crate::{Migration, PlannedStep, SchemaStatus};

/// All steps from an empty database, in order; a step is never changed after it was released.
pub(super) const STEPS: [SchemaStep; 1] = [SchemaStep::new(1, 1, include_str!("../../migrations/postgres/0001_tasks.sql"))];

/// What stands in the schema after all steps: kind, name and definition of each, as [`OBJECTS`] tells them, one a line.
const EXPECTED: &str = include_str!("../../migrations/postgres/expected.txt");

/// Held while the tables are made, so that many hosts can try at once. "laelaps" in ASCII.
const LOCK: i64 = 0x006c_6165_6c61_7073;

const SCHEMA: &str = "CREATE SCHEMA laelaps";

const TABLE: &str = "CREATE TABLE laelaps.schema_version (version int8 NOT NULL PRIMARY KEY, oldest_program int8 NOT NULL,
    applied_at int8 NOT NULL, program text NOT NULL, fingerprint text NOT NULL)";

const ENTER: &str = "INSERT INTO laelaps.schema_version (version, oldest_program, applied_at, program, fingerprint)
    VALUES ($1, $2, (extract(epoch FROM clock_timestamp()) * 1000)::int8, $3, $4)";

/// Steps of a large database may take longer than a statement of ours. What waits for a lock meanwhile holds up everybody who comes after it, so
/// that a step gives way to a long transaction and is taken again.
const UNHURRIED: &str = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '1s'";

/// How long one try to take the steps may last.
pub(super) const MAKING_MAX: Duration = Duration::from_secs(900);

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
    // A column that development builds did not have is read as if it were empty.
    const RECORDS: &str = "SELECT version, coalesce((to_jsonb(made) ->> 'oldest_program')::int8, version),
        coalesce(to_jsonb(made) ->> 'program', ''), coalesce(to_jsonb(made) ->> 'fingerprint', '') FROM laelaps.schema_version AS made";
    let (schema, ours, tables): (bool, bool, i64) = sqlx::query_as(LOOK).fetch_one(session.db()?).await?;
    if !ours {
        if tables > 0 {
            let problem = format!("the schema laelaps is of something else ({tables} tables, none of them ours)");
            let hint = "use another database, or rename that schema";
            return Err(failure::unusable(session.shared.connections.place(), problem, hint).into());
        }
        return Ok(Found { schema, status: SchemaStatus::Missing });
    }
    let records: Vec<(i64, i64, String, String)> = sqlx::query_as(RECORDS).fetch_all(session.db()?).await?;
    let status = session.shared.steps.status(&records.into_iter().map(Record::from).collect::<Vec<_>>());
    Ok(Found { schema, status })
}

pub(super) async fn status(session: &mut Session) -> Result<SchemaStatus, Failure> {
    Ok(look(session).await?.status)
}

/// Bring the tables up to what this program needs, in one transaction. Two hosts at once: the second one finds the work done.
pub(super) async fn migrate(session: &mut Session) -> Result<Migration, Failure> {
    session.begin().await?;
    sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(LOCK).execute(session.db()?).await?;
    let found = look(session).await?;
    let shared = Arc::clone(&session.shared);
    let (from, left) = shared.steps.left(&found.status)?;
    sqlx::raw_sql(UNHURRIED).execute(session.db()?).await?;
    if !found.schema {
        sqlx::raw_sql(SCHEMA).execute(session.db()?).await?;
    }
    if from == 0 {
        sqlx::raw_sql(TABLE).execute(session.db()?).await?;
    }
    for step in &left {
        sqlx::raw_sql(AssertSqlSafe(&*step.sql)).execute(session.db()?).await?;
        let entered = sqlx::query(ENTER).bind(step.version).bind(step.oldest_program).bind(PROGRAM).bind(step.fingerprint());
        entered.execute(session.db()?).await?;
    }
    session.commit().await?;
    let applied: Vec<i64> = left.iter().map(|step| step.version).collect();
    Ok(Migration { from, version: applied.last().copied().unwrap_or(from), applied })
}

/// The steps that [`migrate`] would take.
pub(super) async fn plan(session: &mut Session) -> Result<Vec<PlannedStep>, Failure> {
    let found = look(session).await?;
    let (from, left) = session.shared.steps.left(&found.status)?;
    let plan = left.into_iter().map(|step| {
        let is_first = from == 0 && step.version == 1;
        let schema = if is_first && !found.schema { format!("{SCHEMA};\n") } else { String::new() };
        let table = if is_first { format!("{TABLE};\n") } else { String::new() };
        let (version, oldest_program) = (step.version, step.oldest_program);
        let enter = ENTER
            .replace("$1", &version.to_string())
            .replace("$2", &oldest_program.to_string())
            .replace("$3", &format!("'{PROGRAM}'"))
            .replace("$4", &format!("'{}'", step.fingerprint()));
        PlannedStep {
            version,
            oldest_program,
            sql: format!("BEGIN;\n{schema}{table}{}\n{enter};\nCOMMIT;\n", step.sql.trim_end()),
        }
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

/// Whether this program knows an object, told as `KIND laelaps.NAME`: a later step of another program may have made it.
pub(super) fn knows(object: &str) -> bool {
    let Some((kind, name)) = object.split_once(" laelaps.") else { return true };
    EXPECTED.lines().any(|line| line.starts_with(&format!("{kind}|{name}|")))
}

fn expected() -> BTreeMap<(String, String), String> {
    let line = |line: &str| {
        let mut parts = line.splitn(3, '|').map(str::to_owned);
        Some(((parts.next()?, parts.next()?), parts.next()?))
    };
    EXPECTED.lines().filter_map(line).collect()
}
