//! Hosts, and what becomes of tasks whose host or lease is gone.
//!
//! Authority: the leases. This server cannot see whether a host's process lives. A host that leaves says so, and what it still has is taken
//! back at once; else when the leases end. Whoever knows more (a watchdog, an operator) marks the host as one that has left. A host that was
//! not seen for long and has nothing is struck off.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::excuse;
use super::failure::{self, Failure};
use super::session::{Session, Shared};
use super::settle::{Group, clean};
use super::{signs, versions};
use crate::earlier::Earlier;
use crate::{
    Attempt, Event, HostDescription, HostId, HostRecord, Lease, LeaseAnswer, LeaseRef, Lost, Policy, Reclaimed, Result, Serves,
    Settlement, TaskId, Timestamp, Verdict,
};

/// Tasks taken back in one transaction.
const RECLAIMED_MAX: i64 = 1_000;
/// Claims looked at in one transaction.
const CLAIMS_MAX: i64 = 64;
/// A host that claims nothing for so long, and has nothing, is struck off.
const UNSEEN_MS_MAX: i64 = 600_000;
/// Hosts that are gone and still kept, for tracing lost attempts.
const GONE_HOSTS_KEPT: i64 = 1_000;

pub(super) async fn register(shared: &Arc<Shared>, description: &HostDescription) -> Result<HostId> {
    const ENTER: &str = "INSERT INTO laelaps.host (name, process_id, started_at, seen_at, identity)
        SELECT $1, $2, now, now, $3 FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock RETURNING id";
    const ENTERED: &str = "SELECT EXISTS (SELECT FROM laelaps.host WHERE id = $1)";
    description.check()?;
    let (description, earlier) = (description.clone(), Earlier::<i64>::default());
    let id = shared
        .run("registering a host", move |session| {
            let (name, process_id) = (clean(&description.name), i64::from(description.process_id));
            let (identity, earlier) = (description.identity.as_deref().map(clean), earlier.clone());
            Box::pin(async move {
                // An earlier try may have entered it after all.
                if let Some(id) = earlier.get()
                    && sqlx::query_scalar(ENTERED).bind(id).fetch_one(session.db()?).await?
                {
                    session.shared.hosts().insert(HostId(id));
                    return Ok(HostId(id));
                }
                session.begin().await?;
                let query = sqlx::query_scalar(ENTER).bind(name).bind(process_id).bind(identity);
                let id: i64 = query.fetch_one(session.db()?).await?;
                earlier.note(id);
                session.commit().await?;
                session.shared.hosts().insert(HostId(id));
                Ok(HostId(id))
            })
        })
        .await?;
    shared.listener.start(shared);
    Ok(id)
}

/// Strike a host off that holds nothing; else it has left, and what it holds can be taken back.
pub(super) async fn leave(session: &mut Session, hosts: &[HostId]) -> Result<(), Failure> {
    const LEAVE: &str = "UPDATE laelaps.host SET left_at = (extract(epoch FROM clock_timestamp()) * 1000)::int8
        WHERE id = ANY($1) AND ended_at IS NULL AND left_at IS NULL";
    const CLAIMS: &str = "SELECT id FROM laelaps.claim WHERE host = ANY($1) FOR UPDATE SKIP LOCKED";
    let numbers: Vec<i64> = hosts.iter().map(|host| host.0).collect();
    session.begin().await?;
    sqlx::query(LEAVE).bind(&numbers).execute(session.db()?).await?;
    signs::forget(session, &numbers).await?;
    versions::nothing_runs(session, &numbers).await?;
    let claims: Vec<i64> = sqlx::query_scalar(CLAIMS).bind(&numbers).fetch_all(session.db()?).await?;
    sweep(session, &claims).await?;
    strike_off(session, None).await?;
    session.commit().await?;
    let mut ours = session.shared.hosts();
    for host in hosts {
        ours.remove(host);
    }
    Ok(())
}

fn record(row: &PgRow) -> Result<HostRecord, sqlx::Error> {
    let left: Option<i64> = row.try_get(5)?;
    Ok(HostRecord {
        id: HostId(row.try_get(0)?),
        name: row.try_get(1)?,
        process_id: u32::try_from(row.try_get::<i64, _>(2)?).unwrap_or(u32::MAX),
        started_at: Timestamp(row.try_get(3)?),
        running: row.try_get::<i64, _>(4)?.unsigned_abs(),
        alive: left.map(|_| false),
        identity: row.try_get(6)?,
        serves: Serves::of_text(row.try_get(7)?),
    })
}

pub(super) async fn hosts(session: &mut Session) -> Result<Vec<HostRecord>, Failure> {
    const HOSTS: &str = "SELECT id, name, process_id, started_at,
            (SELECT count(*) FROM laelaps.task WHERE state = 'running' AND task.host = host.id
                AND task.id = ANY(ARRAY(SELECT unnest(tasks) FROM laelaps.claim WHERE claim.host = host.id))),
            left_at, identity, serves
        FROM laelaps.host WHERE ended_at IS NULL ORDER BY id";
    let rows = sqlx::query(HOSTS).fetch_all(session.db()?).await?;
    Ok(rows.iter().map(record).collect::<Result<_, sqlx::Error>>()?)
}

/// Note what a host serves from now on.
pub(super) async fn note_serves(session: &mut Session, host: HostId, serves: &str) -> Result<(), Failure> {
    const NOTE: &str = "UPDATE laelaps.host SET serves = $2 WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL";
    let noted = sqlx::query(NOTE).bind(host.0).bind(serves).execute(session.db()?).await?;
    if noted.rows_affected() == 0 { Err(failure::unknown_host(host)) } else { Ok(()) }
}

/// A task that its host has lost.
struct Stray {
    lease_ref: LeaseRef,
    key: String,
    host: HostId,
    attempt: Attempt,
}

/// Take back what hosts that have left and ended leases hold, at most a batch, and strike hosts off that hold nothing any more.
pub(super) async fn take_back(
    session: &mut Session,
    policy: &Policy,
    earlier: &Earlier<Reclaimed>,
) -> Result<Reclaimed, Failure> {
    const LOOK: &str = "SELECT now, EXISTS (SELECT FROM laelaps.claim WHERE check_at > $2 AND check_at <= now),
            EXISTS (SELECT FROM laelaps.host WHERE ended_at IS NULL AND (left_at IS NOT NULL OR seen_at < now - $1))
        FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock";
    if let Some(done) = done_before(session, earlier).await? {
        return Ok(done);
    }
    let (from, started) = (session.shared.ended.begin(), Instant::now());
    let look = sqlx::query_as(LOOK).bind(UNSEEN_MS_MAX).bind(from).fetch_one(session.db()?);
    let (now, ended, gone): (i64, bool, bool) = look.await?;
    session.shared.ended.looked(from, started.elapsed(), (!ended).then_some(now));
    if !ended && !gone {
        return Ok(Reclaimed::default());
    }
    session.begin().await?;
    let (claims, strays) = strays(session, from).await?;
    let tasks = lose(session, strays, policy).await?;
    sweep(session, &claims).await?;
    let dead_hosts = strike_off(session, None).await?;
    let reclaimed = Reclaimed { tasks, dead_hosts };
    earlier.note(reclaimed.clone());
    session.commit().await?;
    Ok(reclaimed)
}

/// What of an earlier try was done, if it was committed: its tasks' attempts are recorded as lost, its hosts are struck off.
async fn done_before(session: &mut Session, earlier: &Earlier<Reclaimed>) -> Result<Option<Reclaimed>, Failure> {
    const LOST: &str = "SELECT asked.task, asked.lease FROM unnest($1::int8[], $2::int8[]) AS asked (task, lease)
        CROSS JOIN LATERAL (SELECT FROM laelaps.attempt WHERE attempt.task = asked.task AND attempt.lease = asked.lease
            AND attempt.event IN ('lost', 'excused') OFFSET 0) AS lost";
    const GONE: &str = "SELECT id FROM laelaps.host WHERE id = ANY($1) AND ended_at IS NOT NULL";
    let Some(Reclaimed { mut tasks, mut dead_hosts }) = earlier.get() else { return Ok(None) };
    let (numbers, leases): (Vec<i64>, Vec<i64>) =
        tasks.iter().map(|lost| (lost.lease_ref.task.0, lost.lease_ref.lease.0)).unzip();
    let lost: Vec<(i64, i64)> = sqlx::query_as(LOST).bind(numbers).bind(leases).fetch_all(session.db()?).await?;
    let lost: HashSet<(i64, i64)> = lost.into_iter().collect();
    tasks.retain(|task| lost.contains(&(task.lease_ref.task.0, task.lease_ref.lease.0)));
    let hosts: Vec<i64> = dead_hosts.iter().map(|host| host.id.0).collect();
    let gone: Vec<i64> = sqlx::query_scalar(GONE).bind(hosts).fetch_all(session.db()?).await?;
    dead_hosts.retain(|host| gone.contains(&host.id.0));
    Ok(Some(Reclaimed { tasks, dead_hosts }).filter(|done| !done.tasks.is_empty() || !done.dead_hosts.is_empty()))
}

/// Take back what the hosts with these identities hold, at most a batch, and strike them off once they hold nothing any more.
///
/// That they have left is a statement, and a transaction, of its own: it waits for their claims under way, and those that come later are
/// refused. So what they hold is all there when it is looked for. What is locked at that moment (one of them may have been stopped in the
/// middle of a write) is left to the next call, or to [`take_back`].
pub(super) async fn hand_on(
    session: &mut Session,
    identities: &[String],
    policy: &Policy,
    earlier: &Earlier<Reclaimed>,
) -> Result<Reclaimed, Failure> {
    const LEAVE: &str = "WITH named AS MATERIALIZED (
            SELECT id FROM laelaps.host WHERE identity = ANY($1) AND ended_at IS NULL ORDER BY id FOR NO KEY UPDATE),
        marked AS (
            UPDATE laelaps.host SET left_at = (extract(epoch FROM clock_timestamp()) * 1000)::int8
            WHERE id = ANY(ARRAY(SELECT id FROM named)) AND left_at IS NULL),
        signs AS (DELETE FROM laelaps.host_sign WHERE host = ANY(ARRAY(SELECT id FROM named)))
        SELECT id FROM named";
    if let Some(done) = done_before(session, earlier).await? {
        return Ok(done);
    }
    let hosts: Vec<i64> = sqlx::query_scalar(LEAVE).bind(identities).fetch_all(session.db()?).await?;
    if hosts.is_empty() {
        return Ok(Reclaimed::default());
    }
    session.begin().await?;
    versions::died(session, &hosts).await?;
    let (claims, strays) = strays_of(session, &hosts).await?;
    let tasks = lose(session, strays, policy).await?;
    sweep(session, &claims).await?;
    let reclaimed = Reclaimed { tasks, dead_hosts: strike_off(session, Some(&hosts)).await? };
    earlier.note(reclaimed.clone());
    session.commit().await?;
    let mut ours = session.shared.hosts();
    for host in hosts {
        ours.remove(&HostId(host));
    }
    Ok(reclaimed)
}

/// Settle what is lost; answers what was.
async fn lose(session: &mut Session, strays: Vec<Stray>, policy: &Policy) -> Result<Vec<Lost>, Failure> {
    // Nothing waits after a loss, so no random number is needed.
    let settled = |stray: &Stray| Settlement::of(stray.lease_ref, Event::Lost, stray.attempt, policy, 0.0, None, Vec::new());
    let settlements: Vec<Settlement> = strays.iter().map(settled).collect();
    let alone: Vec<LeaseRef> = strays.iter().filter(|stray| stray.attempt.alone).map(|stray| stray.lease_ref).collect();
    let failed: Vec<bool> = settlements.iter().map(|settlement| matches!(settlement.verdict(), Verdict::Fail { .. })).collect();
    let answers = if settlements.is_empty() { Vec::new() } else { Group::of_lost(&settlements)?.write_in(session).await? };
    excuse::note_alone(session, &alone).await?;
    let hosts: HashSet<i64> = strays.iter().map(|stray| stray.host.0).collect();
    versions::died(session, &hosts.into_iter().collect::<Vec<i64>>()).await?;
    let lost = strays.into_iter().zip(failed).zip(answers).filter(|(_, answer)| *answer == LeaseAnswer::Held);
    let lost = lost.map(|((stray, failed), _)| Lost { lease_ref: stray.lease_ref, key: stray.key, host: stray.host, failed });
    Ok(lost.collect())
}

/// Claims that are to be looked at: their time has come, or their host has left.
pub(super) const CLAIMS: &str = "SELECT id, host, tasks FROM laelaps.claim WHERE id = ANY(ARRAY(
        SELECT id FROM (SELECT id FROM laelaps.claim WHERE check_at > $2
            AND check_at <= (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8) ORDER BY check_at LIMIT $1) AS due
        UNION
        SELECT id FROM (SELECT claim.id FROM laelaps.host JOIN laelaps.claim ON claim.host = host.id
            WHERE host.ended_at IS NULL AND host.left_at IS NOT NULL LIMIT $1) AS left_over))
    FOR UPDATE SKIP LOCKED";

macro_rules! stray_columns {
    () => {
        "id, lease, key, host, attempts, max_attempts, coalesce(releases, 0), coalesce(lost, 0), coalesce(lost_alone, 0), alone,
            coalesce(greatest((extract(epoch FROM clock_timestamp()) * 1000)::int8 - lost_at, 0), 0)"
    };
}

/// Tasks of these claims that still run, although their lease has ended or their host has left; locked, so that no heartbeat comes between. One
/// that somebody else has locked is met again: its claim stays.
pub(super) const STRAYS: &str = concat!(
    "SELECT ",
    stray_columns!(),
    " FROM laelaps.task WHERE id = ANY($1) AND state = 'running'
        AND (until <= (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8)
            OR host = ANY(ARRAY(SELECT id FROM laelaps.host WHERE ended_at IS NULL AND left_at IS NOT NULL)))
    ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED"
);

/// The claims of some hosts.
pub(super) const CLAIMS_OF: &str = "SELECT id, tasks FROM laelaps.claim WHERE host = ANY($1) ORDER BY id FOR UPDATE SKIP LOCKED";

/// Tasks of these claims that still run on these hosts.
pub(super) const STRAYS_OF: &str = concat!(
    "SELECT ",
    stray_columns!(),
    " FROM laelaps.task WHERE id = ANY($1) AND state = 'running' AND host = ANY($3) ORDER BY id LIMIT $2
    FOR UPDATE SKIP LOCKED"
);

/// What these hosts hold, at most a batch, and all of their claims.
async fn strays_of(session: &mut Session, hosts: &[i64]) -> Result<(Vec<i64>, Vec<Stray>), Failure> {
    let rows: Vec<(i64, Vec<i64>)> = sqlx::query_as(CLAIMS_OF).bind(hosts).fetch_all(session.db()?).await?;
    let claims: Vec<i64> = rows.iter().map(|(claim, _)| *claim).collect();
    let tasks: HashSet<i64> = rows.into_iter().flat_map(|(_, tasks)| tasks).collect();
    let tasks: Vec<i64> = tasks.into_iter().collect();
    let rows = sqlx::query(STRAYS_OF).bind(tasks).bind(RECLAIMED_MAX).bind(hosts).fetch_all(session.db()?).await?;
    Ok((claims, rows.iter().map(stray).collect::<Result<_, sqlx::Error>>()?))
}

/// What is lost, at most a batch, and the claims that were looked at.
async fn strays(session: &mut Session, from: i64) -> Result<(Vec<i64>, Vec<Stray>), Failure> {
    let rows: Vec<(i64, i64, Vec<i64>)> = sqlx::query_as(CLAIMS).bind(CLAIMS_MAX).bind(from).fetch_all(session.db()?).await?;
    let claims: Vec<i64> = rows.iter().map(|(claim, ..)| *claim).collect();
    let tasks: HashSet<i64> = rows.into_iter().flat_map(|(.., tasks)| tasks).collect();
    let tasks: Vec<i64> = tasks.into_iter().collect();
    let rows = sqlx::query(STRAYS).bind(tasks).bind(RECLAIMED_MAX).fetch_all(session.db()?).await?;
    Ok((claims, rows.iter().map(stray).collect::<Result<_, sqlx::Error>>()?))
}

fn stray(row: &PgRow) -> Result<Stray, sqlx::Error> {
    let number = |place: usize| row.try_get::<i32, _>(place).map(i32::unsigned_abs);
    let most: Option<i64> = row.try_get(5)?;
    Ok(Stray {
        lease_ref: LeaseRef { task: TaskId(row.try_get(0)?), lease: Lease(row.try_get(1)?) },
        key: row.try_get(2)?,
        host: HostId(row.try_get(3)?),
        attempt: Attempt {
            attempt: number(4)?.saturating_add(1),
            max_attempts: most.map(|most| u32::try_from(most).unwrap_or(u32::MAX)),
            releases: number(6)?,
            lost: number(7)?,
            lost_alone: number(8)?,
            alone: row.try_get(9)?,
            lost_for: Duration::from_millis(row.try_get::<i64, _>(10)?.unsigned_abs()),
        },
    })
}

/// Claims whose rows are locked: those of which nothing runs any more go, the others are looked at again when the next of their leases ends.
pub(super) const SWEEP: &str = "WITH looked AS MATERIALIZED (
        SELECT claim.id, (SELECT min(until) FROM laelaps.task
            WHERE task.id = ANY(claim.tasks) AND task.state = 'running' AND task.host = claim.host) AS next
        FROM laelaps.claim WHERE claim.id = ANY($1)),
    gone AS (DELETE FROM laelaps.claim WHERE id = ANY(ARRAY(SELECT id FROM looked WHERE next IS NULL)))
    UPDATE laelaps.claim SET check_at = looked.next FROM looked WHERE claim.id = looked.id AND claim.id = ANY($1) AND looked.next IS NOT NULL";

async fn sweep(session: &mut Session, claims: &[i64]) -> Result<(), Failure> {
    if !claims.is_empty() {
        sqlx::query(SWEEP).bind(claims).execute(session.db()?).await?;
    }
    Ok(())
}

/// Strike off the hosts that have left, or were not seen for long, and hold nothing; if `only` is given, only of these. Answers which are
/// gone. Hosts gone long ago are forgotten.
async fn strike_off(session: &mut Session, only: Option<&[i64]>) -> Result<Vec<HostRecord>, Failure> {
    const OFF: &str = "UPDATE laelaps.host SET ended_at = now, left_at = coalesce(left_at, now)
        FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock
        WHERE ended_at IS NULL AND (left_at IS NOT NULL OR seen_at < now - $1) AND ($2::int8[] IS NULL OR id = ANY($2))
            AND NOT EXISTS (SELECT FROM laelaps.claim WHERE claim.host = host.id)
        RETURNING id, name, process_id, started_at, 0::int8, left_at, identity, serves";
    const FORGET: &str = "WITH old AS (
            DELETE FROM laelaps.host WHERE ended_at IS NOT NULL AND id <= (SELECT max(id) FROM laelaps.host) - $1 RETURNING id)
        DELETE FROM laelaps.host_plugin WHERE host = ANY(ARRAY(SELECT id FROM old))";
    let rows = sqlx::query(OFF).bind(UNSEEN_MS_MAX).bind(only).fetch_all(session.db()?).await?;
    if !rows.is_empty() {
        let gone: Vec<i64> = rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
        signs::forget(session, &gone).await?;
        versions::nothing_runs(session, &gone).await?;
        sqlx::query(FORGET).bind(GONE_HOSTS_KEPT).execute(session.db()?).await?;
    }
    Ok(rows.iter().map(record).collect::<Result<_, sqlx::Error>>()?)
}
