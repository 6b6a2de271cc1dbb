//! Losses that were none: a host that was thought dead is there again.

use super::failure::Failure;
use super::session::Session;
use super::versions;
use crate::earlier::Earlier;
use crate::{HostId, LeaseRef, Policy};

/// How often a suspect is looked for that others keep moving.
const TRIES_MAX: usize = 100;

/// Of attempts that were just counted as lost: these ran alone.
pub(super) async fn note_alone(session: &mut Session, leases: &[LeaseRef]) -> Result<(), Failure> {
    const ALONE: &str = "UPDATE laelaps.attempt SET alone = true FROM unnest($1::int8[], $2::int8[]) AS lost (task, lease)
        WHERE attempt.task = lost.task AND attempt.lease = lost.lease AND attempt.event = 'lost'";
    if !leases.is_empty() {
        let (tasks, numbers) = apart(leases);
        sqlx::query(ALONE).bind(tasks).bind(numbers).execute(session.db()?).await?;
    }
    Ok(())
}

fn apart(leases: &[LeaseRef]) -> (Vec<i64>, Vec<i64>) {
    leases.iter().map(|lease_ref| (lease_ref.task.0, lease_ref.lease.0)).unzip()
}

/// The records of attempts that were counted as lost become excused. Those before the first loss that counts, counted until an attempt ended
/// otherwise; nothing of them is left to be taken back.
pub(super) const RECORDS: &str = "WITH excused AS (
        UPDATE laelaps.attempt SET event = 'excused' FROM unnest($1::int8[], $2::int8[]) AS asked (task, lease)
        WHERE attempt.task = asked.task AND attempt.lease = asked.lease AND attempt.event = 'lost'
        RETURNING attempt.task, attempt.host, attempt.alone, attempt.ended_at)
    SELECT excused.task, count(*)::int4, (count(*) FILTER (WHERE ended_at >= lost_at))::int4,
        (count(*) FILTER (WHERE excused.alone AND ended_at >= lost_at))::int4, array_agg(excused.host)
    FROM excused LEFT JOIN laelaps.task ON task.id = excused.task GROUP BY excused.task ORDER BY excused.task";

/// $1 tasks, $2 how many of their losses were none, $3 how many of those while alone.
pub(super) const LESS: &str = "UPDATE laelaps.task SET lost = nullif(greatest(coalesce(lost, 0) - less.losses, 0), 0),
        lost_alone = nullif(greatest(coalesce(lost_alone, 0) - less.alone, 0), 0),
        lost_at = CASE WHEN coalesce(lost, 0) > less.losses THEN lost_at END
    FROM unnest($1::int8[], $2::int4[], $3::int4[]) AS less (task, losses, alone) WHERE id = less.task";

/// A task, how many records of it became excused, how many of these losses count, how many of those it had alone, and the hosts.
type OfTask = (i64, i32, i32, i32, Vec<Option<i64>>);

/// Take losses back. What waits to run alone and was not lost so often after all runs in company again. Answers how many, those
/// included that an earlier try has taken back.
pub(super) async fn excuse(
    session: &mut Session,
    host: HostId,
    leases: &[LeaseRef],
    earlier: &Earlier<u64>,
) -> Result<u64, Failure> {
    let (tasks, numbers) = apart(leases);
    session.begin().await?;
    let excused: Vec<OfTask> = sqlx::query_as(RECORDS).bind(tasks).bind(numbers).fetch_all(session.db()?).await?;
    let tasks: Vec<i64> = excused.iter().map(|(task, ..)| *task).collect();
    let losses: Vec<i32> = excused.iter().map(|(_, _, losses, ..)| *losses).collect();
    let alone: Vec<i32> = excused.iter().map(|(_, _, _, alone, _)| *alone).collect();
    sqlx::query(LESS).bind(&tasks).bind(&losses).bind(alone).execute(session.db()?).await?;
    for task in &tasks {
        calm(session, *task).await?;
    }
    let hosts = excused.iter().flat_map(|(.., hosts)| hosts.iter().flatten().copied()).chain([host.0]);
    versions::lives(session, &hosts.collect::<Vec<i64>>()).await?;
    let count: u64 = excused.iter().map(|(_, records, ..)| u64::from(records.unsigned_abs())).sum();
    let count = if count == 0 { earlier.get().unwrap_or(0) } else { count };
    earlier.note(count);
    session.commit().await?;
    if count > 0 {
        session.afterwards(|shared| {
            shared.marks.hint();
            shared.wake();
        });
    }
    Ok(count)
}

/// $1 task, $2 losses from which on a task runs alone. Its place is taken away, or held where it stays right, before its row is looked at under its
/// lock, which this transaction holds.
pub(super) const CALM: &str = "WITH found AS MATERIALIZED (
        SELECT id, run_at, turn, queue, type, user_name FROM laelaps.task WHERE id = $1 AND state = 'waiting' AND alone AND coalesce(lost, 0) < $2),
    due AS (
        DELETE FROM laelaps.suspect WHERE queue = (SELECT queue FROM found) AND turn = (SELECT turn FROM found) AND task = (SELECT id FROM found) RETURNING task),
    later AS MATERIALIZED (
        SELECT task FROM laelaps.scheduled WHERE run_at = (SELECT run_at FROM found) AND task = (SELECT id FROM found) FOR UPDATE),
    apart AS MATERIALIZED (
        SELECT task FROM laelaps.unserved WHERE queue = (SELECT queue FROM found) AND type = (SELECT type FROM found)
            AND user_name = (SELECT user_name FROM found) AND turn = (SELECT turn FROM found) AND task = (SELECT id FROM found) FOR UPDATE),
    calm AS (
        UPDATE laelaps.task SET alone = false WHERE id = ANY(ARRAY(SELECT task FROM due UNION ALL SELECT task FROM later UNION ALL SELECT task FROM apart))
        RETURNING id, run_at, turn, bytes, max_running, user_name, queue),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM calm WHERE id IN (SELECT task FROM due) ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, turn, task, max_running)
        SELECT user_name, queue, turn, id, max_running FROM calm WHERE user_name <> '' AND id IN (SELECT task FROM due))
    SELECT EXISTS (SELECT FROM found) AND NOT EXISTS (SELECT FROM due) AND NOT EXISTS (SELECT FROM later)
        AND NOT EXISTS (SELECT FROM apart)";

async fn calm(session: &mut Session, task: i64) -> Result<(), Failure> {
    let lost_max = i32::try_from(Policy::LOST_MAX).unwrap_or(i32::MAX);
    for _ in 0..TRIES_MAX {
        let moved: bool = sqlx::query_scalar(CALM).bind(task).bind(lost_max).fetch_one(session.db()?).await?;
        if !moved {
            break;
        }
    }
    Ok(())
}
