//! What a host does, tried in a transaction that is rolled back: what its role lacks, and what of the server is in the way.
//!
//! Privileges are asked of the catalogue, which names each one that is missing; the rest is found by doing. Only rows of its own are touched. The
//! numbers that it takes from sequences stay taken, which does no harm.

use sqlx::AssertSqlSafe;

use super::failure::Failure;
use super::session::Session;
use super::{schema, submit};
use crate::batch::Batch;
use crate::{NewTask, Result};

/// How long it waits for a lock of somebody else's.
const LOCK: &str = "SET LOCAL lock_timeout = '1s'";

/// What a host needs of each object, as docs/databases.md tells it to be granted: the object, and what of it is missing. The sequences
/// behind identity columns need no privilege.
const MISSING: &str = "SELECT 'schema laelaps', 'USAGE' WHERE NOT has_schema_privilege('laelaps', 'USAGE')
    UNION ALL SELECT 'table laelaps.' || relname, string_agg(needed, ', ' ORDER BY needed)
    FROM pg_class CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS needed
    WHERE relnamespace = to_regnamespace('laelaps') AND relkind = 'r' AND (relname <> 'schema_version' OR needed = 'SELECT')
        AND NOT has_table_privilege(pg_class.oid, needed)
    GROUP BY relname
    UNION ALL SELECT 'sequence laelaps.' || relname, string_agg(needed, ', ' ORDER BY needed)
    FROM pg_class CROSS JOIN unnest(ARRAY['USAGE', 'SELECT']) AS needed
    WHERE relnamespace = to_regnamespace('laelaps') AND relkind = 'S' AND NOT has_sequence_privilege(pg_class.oid, needed)
        AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'i')
    GROUP BY relname ORDER BY 1";

/// A life of the task `$1`, as far as it needs more than a submit: claimed, and failed.
const LIFE: [&str; 6] = [
    "UPDATE laelaps.task SET state = 'running', lease = nextval('laelaps.lease_number'), until = run_at + 1 WHERE key = $1",
    "DELETE FROM laelaps.ready WHERE task = (SELECT id FROM laelaps.task WHERE key = $1)",
    "INSERT INTO laelaps.failure (task, code, message) SELECT id, 'rehearsal', '' FROM laelaps.task WHERE key = $1",
    "UPDATE laelaps.task SET state = 'failed', until = NULL, finished_at = run_at, retained_until = run_at WHERE key = $1",
    "DELETE FROM laelaps.task WHERE key = $1 AND nextval('laelaps.pick_number') > 0",
    "SELECT pg_notify('laelaps', '') WHERE $1 <> ''",
];

/// What is missing, in words; empty if a host could work.
pub(super) async fn rehearse(session: &mut Session) -> Result<Vec<String>, Failure> {
    let missing: Vec<(String, String)> = sqlx::query_as(MISSING).fetch_all(session.db()?).await?;
    let missing = missing.into_iter().filter(|(object, _)| schema::knows(object));
    let mut words: Vec<String> = missing.map(|(object, needed)| format!("no {needed} on {object}")).collect();
    if words.is_empty() {
        session.begin().await?;
        words.extend(in_the_way(session).await?);
        session.roll_back().await?;
    }
    Ok(words)
}

/// The first thing that goes wrong in a task's life.
async fn in_the_way(session: &mut Session) -> Result<Option<String>, Failure> {
    let key = format!("laelaps-rehearsal-{:016x}", fastrand::u64(..));
    // Without user: no candidate of another's comes to stand elsewhere, not even for a moment.
    let batch = Batch::new(&[NewTask::new(key.clone(), "laelaps-rehearsal", "{}")])?;
    let live = async {
        sqlx::raw_sql(LOCK).execute(session.db()?).await?;
        submit::store(session.db()?, &batch.rows).await?;
        for statement in LIFE {
            sqlx::query(AssertSqlSafe(statement)).bind(&key).execute(session.db()?).await?;
        }
        Ok::<(), Failure>(())
    };
    match live.await {
        Ok(()) => Ok(None),
        Err(Failure::Sql(error)) if error.as_database_error().is_some() => {
            let server = error.as_database_error().map(|error| error.message().to_owned()).unwrap_or_default();
            Ok(Some(format!("a task cannot be stored, claimed and settled: {server}")))
        }
        Err(failure) => Err(failure),
    }
}
