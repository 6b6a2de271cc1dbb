//! Counts: appended as differences, so that nobody waits for anybody, and put together from time to time.

use super::failure::Failure;
use super::session::Session;

/// Differences that are put together in one statement.
const TOGETHER_MAX: i64 = 50_000;
/// Statements of one go.
const ROUNDS_MAX: usize = 20;

/// Put differences of counts together into one row of each type and queue, until few are left.
pub(super) async fn put_together(session: &mut Session) -> Result<(), Failure> {
    const TOGETHER: &str = "WITH taken AS (
            DELETE FROM laelaps.tally WHERE id = ANY(ARRAY(SELECT id FROM laelaps.tally ORDER BY id LIMIT $1 FOR UPDATE SKIP LOCKED))
            RETURNING type, queue, live, scheduled, finished, failed, cancelled),
        put AS (
            INSERT INTO laelaps.tally (type, queue, live, scheduled, finished, failed, cancelled)
            SELECT * FROM (SELECT type, queue, sum(live)::int8 AS live, sum(scheduled)::int8 AS scheduled, sum(finished)::int8 AS finished,
                sum(failed)::int8 AS failed, sum(cancelled)::int8 AS cancelled FROM taken GROUP BY type, queue) AS summed
            WHERE live <> 0 OR scheduled <> 0 OR finished <> 0 OR failed <> 0 OR cancelled <> 0)
        SELECT count(*) FROM taken";
    for _ in 0..ROUNDS_MAX {
        let taken: i64 = sqlx::query_scalar(TOGETHER).bind(TOGETHER_MAX).fetch_one(session.db()?).await?;
        if taken < TOGETHER_MAX {
            break;
        }
    }
    Ok(())
}
