//! What a running attempt writes: heartbeats, progress, data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::failure::Failure;
use super::session::{Session, Shared};
use super::settle::clean;
use crate::outcome::ms;
use crate::{Beat, Error, Lease, LeaseAnswer, LeaseRef, Progress, Result, TaskId, data};

/// The most bytes of a progress note; a longer one is cut.
const NOTE_BYTES_MAX: usize = 1_024;

/// $1 tasks in ascending order, $2 their leases, $3 how long they last from now on; $4 to $8 what some said about their progress.
pub(super) const RENEW: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    renewed AS (
        UPDATE laelaps.task SET until = greatest(until, (SELECT now FROM clock) + ($3::int8[])[width_bucket(id, $1::int8[])])
        WHERE id = ANY($1::int8[]) AND lease = ($2::int8[])[width_bucket(id, $1::int8[])] AND state = 'running'
            AND until > (SELECT now FROM clock)
        RETURNING id, lease),
    said AS (
        INSERT INTO laelaps.progress (task, lease, done, total, note)
        SELECT task, lease, done, total, note
        FROM unnest($4::int8[], $5::int8[], $6::int8[], $7::int8[], $8::text[]) AS said (task, lease, done, total, note)
        WHERE ((task, lease) IN (SELECT id, lease FROM renewed)) IS TRUE ORDER BY task
        ON CONFLICT (task) DO UPDATE SET lease = excluded.lease, done = excluded.done, total = excluded.total, note = excluded.note)
    SELECT array_agg(lease) FROM renewed";

/// Renewals, one for each lease.
#[derive(Clone)]
pub(super) struct Beats(Arc<Inner>);

struct Inner {
    asked: Vec<LeaseRef>,
    leases: HashMap<LeaseRef, (i64, Option<Progress>)>,
}

impl Beats {
    /// Two beats of one lease make the longer one, with the later progress.
    pub(super) fn new(beats: &[Beat]) -> Self {
        let mut leases: HashMap<LeaseRef, (i64, Option<Progress>)> = HashMap::with_capacity(beats.len());
        for beat in beats {
            let (alive_ms, progress) = leases.entry(beat.lease_ref).or_default();
            *alive_ms = ms(beat.alive_time).max(*alive_ms);
            if beat.progress.is_some() {
                progress.clone_from(&beat.progress);
            }
        }
        Self(Arc::new(Inner { asked: beats.iter().map(|beat| beat.lease_ref).collect(), leases }))
    }

    /// Renew those that hold. Of two leases of one task at most one does, and each is asked for by itself.
    pub(super) async fn write(&self, session: &mut Session) -> Result<Vec<LeaseAnswer>, Failure> {
        let mut held: HashSet<Lease> = HashSet::with_capacity(self.0.leases.len());
        let mut rest: Vec<(&LeaseRef, &(i64, Option<Progress>))> = self.0.leases.iter().collect();
        rest.sort_unstable_by_key(|(lease_ref, _)| lease_ref.task);
        while !rest.is_empty() {
            let mut tasks = HashSet::with_capacity(rest.len());
            let (now, later) = rest.into_iter().partition(|(lease_ref, _)| tasks.insert(lease_ref.task));
            held.extend(renew(session, now).await?);
            rest = later;
        }
        let answer = |lease_ref: &LeaseRef| if held.contains(&lease_ref.lease) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(self.0.asked.iter().map(answer).collect())
    }
}

async fn renew(session: &mut Session, beats: Vec<(&LeaseRef, &(i64, Option<Progress>))>) -> Result<Vec<Lease>, Failure> {
    let said: Vec<(&LeaseRef, &Progress)> =
        beats.iter().filter_map(|(lease_ref, (_, progress))| Some((*lease_ref, progress.as_ref()?))).collect();
    let note = |progress: &Progress| clean(&progress.note[..progress.note.floor_char_boundary(NOTE_BYTES_MAX)]);
    let held: Option<Vec<i64>> = sqlx::query_scalar(RENEW)
        .bind(beats.iter().map(|(lease_ref, _)| lease_ref.task.0).collect::<Vec<i64>>())
        .bind(beats.iter().map(|(lease_ref, _)| lease_ref.lease.0).collect::<Vec<i64>>())
        .bind(beats.iter().map(|(_, (alive_ms, _))| *alive_ms).collect::<Vec<i64>>())
        .bind(said.iter().map(|(lease_ref, _)| lease_ref.task.0).collect::<Vec<i64>>())
        .bind(said.iter().map(|(lease_ref, _)| lease_ref.lease.0).collect::<Vec<i64>>())
        .bind(said.iter().map(|(_, progress)| whole(progress.done)).collect::<Vec<i64>>())
        .bind(said.iter().map(|(_, progress)| progress.total.map(whole)).collect::<Vec<Option<i64>>>())
        .bind(said.iter().map(|(_, progress)| note(progress)).collect::<Vec<String>>())
        .fetch_one(session.db()?)
        .await?;
    Ok(held.into_iter().flatten().map(Lease).collect())
}

/// A number of units as the database can hold it.
fn whole(units: u64) -> i64 {
    i64::try_from(units).unwrap_or(i64::MAX)
}

/// Data as it was read, to be replaced only if nobody else has.
struct Read {
    key: String,
    digest: Vec<u8>,
    stored: Vec<u8>,
}

/// Merge members into the data of a running task. Reading, decompressing and merging need no lock; if the data has changed meanwhile, it is
/// done again.
pub(super) async fn merge_data(shared: &Arc<Shared>, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
    const DOING: &str = "updating a task's data";
    let members: Arc<[u8]> = members.into();
    loop {
        let read = shared.run(DOING, move |session| Box::pin(read_data(session, lease_ref)));
        let Some(Read { key, digest, stored }) = read.await? else { return Ok(LeaseAnswer::Lost) };
        let members = Arc::clone(&members);
        let merged = tokio::task::spawn_blocking(move || data::updated(&key, stored, &members)).await;
        let (bytes, stored) = merged.map_err(|_| Error::Closed)??;
        let bytes = i32::try_from(bytes).unwrap_or(i32::MAX);
        let new = Arc::new((digest, bytes, stored));
        let written = shared.run(DOING, move |session| {
            let new = Arc::clone(&new);
            Box::pin(async move {
                let (digest, bytes, stored) = &*new;
                replace_data(session, lease_ref, digest, *bytes, stored).await
            })
        });
        if let Some(answer) = written.await? {
            return Ok(answer);
        }
    }
}

async fn read_data(session: &mut Session, lease_ref: LeaseRef) -> Result<Option<Read>, Failure> {
    const READ: &str = "SELECT key, sha256(data), data FROM (
            SELECT key, coalesce(task.data, task_data.data, ''::bytea) AS data
            FROM laelaps.task LEFT JOIN laelaps.task_data ON task_data.task = task.id
            WHERE task.id = $1 AND task.lease = $2 AND task.state = 'running') AS stored";
    let LeaseRef { task, lease } = lease_ref;
    let row: Option<(String, Vec<u8>, Vec<u8>)> =
        sqlx::query_as(READ).bind(task.0).bind(lease.0).fetch_optional(session.db()?).await?;
    Ok(row.map(|(key, digest, stored)| Read { key, digest, stored }))
}

/// Replace the data under the lease; None if it is not what was read any more.
async fn replace_data(
    session: &mut Session,
    lease_ref: LeaseRef,
    digest: &[u8],
    bytes: i32,
    stored: &[u8],
) -> Result<Option<LeaseAnswer>, Failure> {
    const HOLDS: &str =
        "SELECT sha256(coalesce(data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id), ''::bytea)) = $3
        FROM laelaps.task WHERE id = $1 AND lease = $2 AND state = 'running'
            AND until > (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8) FOR UPDATE";
    const REPLACE: &str = "WITH beside AS (DELETE FROM laelaps.task_data WHERE task = $1 AND octet_length($3::bytea) <= 256),
        large AS (
            INSERT INTO laelaps.task_data (task, data) SELECT $1, $3::bytea WHERE octet_length($3::bytea) > 256
            ON CONFLICT (task) DO UPDATE SET data = excluded.data)
        UPDATE laelaps.task SET bytes = $2, data = CASE WHEN octet_length($3::bytea) <= 256 THEN $3::bytea END WHERE id = $1";
    let LeaseRef { task: TaskId(task), lease: Lease(lease) } = lease_ref;
    session.begin().await?;
    let same: Option<bool> = sqlx::query_scalar(HOLDS).bind(task).bind(lease).bind(digest).fetch_optional(session.db()?).await?;
    let answer = match same {
        None => Some(LeaseAnswer::Lost),
        Some(false) => None,
        Some(true) => {
            sqlx::query(REPLACE).bind(task).bind(bytes).bind(stored).execute(session.db()?).await?;
            Some(LeaseAnswer::Held)
        }
    };
    session.commit().await?;
    Ok(answer)
}
