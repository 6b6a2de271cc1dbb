//! What a running attempt writes: heartbeats, progress, data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::claim::flush_later;
use super::failure::Failure;
use super::session::{Session, Shared};
use super::settle::clean;
use crate::outcome::ms;
use crate::{Beat, Error, Lease, LeaseAnswer, LeaseRef, NewTask, Progress, Result, TaskId, Update, data};

/// The most bytes of a progress note; a longer one is cut.
const NOTE_BYTES_MAX: usize = 1_024;

/// Renewals of one statement: with their notes 10 MiB at the most.
const RENEWED_MAX: usize = 10_000;
/// The most data of one statement, unless one task alone has more, and its most tasks.
const UPDATED_BYTES_MAX: usize = 32 << 20;
const UPDATED_MAX: usize = 1_000;
/// How often data is merged again because others keep changing it.
const TRIES_MAX: usize = 100;

/// $1 tasks in ascending order, $2 their leases, $3 how long they last from now on; $4 to $8 what some said about their progress.
pub(super) const RENEW: &str = concat!(
    "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now, ",
    flush_later!(),
    "),
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
    SELECT array_agg(lease) FROM renewed"
);

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
            let (now, later) =
                rest.into_iter().partition(|(lease_ref, _)| tasks.len() < RENEWED_MAX && tasks.insert(lease_ref.task));
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

/// New members for one task's data, in the order in which they were given.
#[derive(Default)]
struct Wanted {
    /// The places of the updates among all that were asked for.
    places: Vec<usize>,
}

/// Data as it was read, to be replaced only if nobody else has.
struct Read {
    lease_ref: LeaseRef,
    key: String,
    digest: Vec<u8>,
    stored: Vec<u8>,
}

/// Data to be written.
struct New {
    lease_ref: LeaseRef,
    digest: Vec<u8>,
    bytes: i32,
    stored: Vec<u8>,
}

/// Merge members into the data of running tasks. Reading, decompressing and merging need no lock; what has changed meanwhile is done again. All
/// that was read at once is written in one transaction.
pub(super) async fn update_many(shared: &Arc<Shared>, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
    const DOING: &str = "updating tasks' data";
    let mut answers: Vec<Option<Result<LeaseAnswer>>> = updates.iter().map(|_| None).collect();
    let mut rest: HashMap<LeaseRef, Wanted> = HashMap::with_capacity(updates.len());
    for (place, update) in updates.iter().enumerate() {
        rest.entry(update.lease_ref).or_default().places.push(place);
    }
    for _ in 0..TRIES_MAX {
        let mut asked: Vec<LeaseRef> = rest.keys().copied().collect();
        if asked.is_empty() {
            break;
        }
        asked.sort_unstable_by_key(|lease_ref| (lease_ref.task, lease_ref.lease));
        asked.truncate(UPDATED_MAX);
        let asked = Arc::new(asked);
        let reading = Arc::clone(&asked);
        let (read, whole) = shared
            .run(DOING, move |session| {
                let asked = Arc::clone(&reading);
                Box::pin(async move { read_data(session, &asked).await })
            })
            .await?;
        let found: HashSet<LeaseRef> = read.iter().map(|read| read.lease_ref).collect();
        for lease_ref in asked.iter().take(whole).filter(|lease_ref| !found.contains(lease_ref)) {
            for place in rest.remove(lease_ref).unwrap_or_default().places {
                answers[place] = Some(Ok(LeaseAnswer::Lost));
            }
        }
        let new = Arc::new(merged(read, updates, &mut rest, &mut answers).await?);
        let writing = Arc::clone(&new);
        let written = shared.run(DOING, move |session| {
            let new = Arc::clone(&writing);
            Box::pin(async move { replace_data(session, &new).await })
        });
        for (lease_ref, same) in written.await? {
            let Some(answer) = same.map(|held| if held { LeaseAnswer::Held } else { LeaseAnswer::Lost }) else { continue };
            for place in rest.remove(&lease_ref).unwrap_or_default().places {
                answers[place].get_or_insert(Ok(answer));
            }
        }
    }
    Ok(answers.into_iter().map(|answer| answer.unwrap_or(Err(Error::Busy { doing: DOING }))).collect())
}

/// Merge what was read with its updates. One that is refused is answered so, and the others of its task count.
async fn merged(
    read: Vec<Read>,
    updates: &[Update],
    rest: &mut HashMap<LeaseRef, Wanted>,
    answers: &mut [Option<Result<LeaseAnswer>>],
) -> Result<Vec<New>> {
    let mut new = Vec::with_capacity(read.len());
    for Read { lease_ref, key, digest, stored } in read {
        let places: Vec<usize> = rest.get(&lease_ref).map(|wanted| wanted.places.clone()).unwrap_or_default();
        let members: Vec<(usize, Vec<u8>)> = places.into_iter().map(|place| (place, updates[place].members.clone())).collect();
        let merging = tokio::task::spawn_blocking(move || {
            let (mut stored, mut bytes, mut refused) = (stored, None, Vec::new());
            for (place, members) in members {
                match data::updated(&key, stored.clone(), &members) {
                    Ok((length, merged)) => (bytes, stored) = (Some(length), merged),
                    Err(error) => refused.push((place, error)),
                }
            }
            (stored, bytes, refused)
        });
        let (stored, bytes, refused) = merging.await.map_err(|_| Error::Closed)?;
        for (place, error) in refused {
            answers[place] = Some(Err(error));
            if let Some(wanted) = rest.get_mut(&lease_ref) {
                wanted.places.retain(|other| *other != place);
            }
        }
        match bytes {
            Some(bytes) => new.push(New { lease_ref, digest, bytes: i32::try_from(bytes).unwrap_or(i32::MAX), stored }),
            None => drop(rest.remove(&lease_ref)),
        }
    }
    Ok(new)
}

pub(super) const READ_DATA: &str = "SELECT place, id, lease, key, sha256(stored), stored FROM (
        SELECT asked.place::int8, task.id, task.lease, task.key, task.stored,
            sum(octet_length(task.stored)) OVER (ORDER BY asked.place) AS sum, octet_length(task.stored) AS bytes
        FROM unnest($1::int8[], $2::int8[]) WITH ORDINALITY AS asked (task, lease, place)
        CROSS JOIN LATERAL (
            SELECT id, lease, key, coalesce(data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id), ''::bytea) AS stored
            FROM laelaps.task WHERE id = asked.task AND lease = asked.lease AND state = 'running' OFFSET 0) AS task) AS summed
    WHERE sum <= $3 OR sum = bytes ORDER BY place";

/// Read data of some tasks, in order, up to the bound. Also answers how many of those asked for were looked at.
async fn read_data(session: &mut Session, asked: &[LeaseRef]) -> Result<(Vec<Read>, usize), Failure> {
    type Row = (i64, i64, i64, String, Vec<u8>, Vec<u8>);
    let rows: Vec<Row> = sqlx::query_as(READ_DATA)
        .bind(asked.iter().map(|lease_ref| lease_ref.task.0).collect::<Vec<i64>>())
        .bind(asked.iter().map(|lease_ref| lease_ref.lease.0).collect::<Vec<i64>>())
        .bind(i64::try_from(UPDATED_BYTES_MAX).unwrap_or(i64::MAX))
        .fetch_all(session.db()?)
        .await?;
    let bytes: usize = rows.iter().map(|(.., stored)| stored.len()).sum();
    let last = rows.last().and_then(|(place, ..)| usize::try_from(*place).ok()).unwrap_or(0);
    // Below the bound none was left out; beyond it those behind the last one may have been.
    let whole = if bytes + NewTask::DATA_BYTES_MAX < UPDATED_BYTES_MAX { asked.len() } else { last };
    let read = |(_, task, lease, key, digest, stored)| {
        let lease_ref = LeaseRef { task: TaskId(task), lease: Lease(lease) };
        Read { lease_ref, key, digest, stored }
    };
    Ok((rows.into_iter().map(read).collect(), whole))
}

/// Their rows are locked first: what is read from then on of what stands beside them is as it is.
pub(super) const LOCK_DATA: &str =
    "SELECT id FROM laelaps.task WHERE id = ANY($1::int8[]) AND state = 'running' ORDER BY id FOR UPDATE";

/// $1 tasks in ascending order, and of each $2 lease, $3 digest of what was read, $4 size, $5 data. Answers the leases that hold, and whether
/// the data was as it was read, and is replaced.
pub(super) const REPLACE_DATA: &str = "WITH holds AS MATERIALIZED (
        SELECT id, lease, width_bucket(id, $1::int8[]) AS place,
            sha256(coalesce(data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id), ''::bytea))
                = ($3::bytea[])[width_bucket(id, $1::int8[])] AS same
        FROM laelaps.task WHERE id = ANY($1::int8[]) AND lease = ($2::int8[])[width_bucket(id, $1::int8[])] AND state = 'running'
            AND until > (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8)),
    small AS (DELETE FROM laelaps.task_data WHERE task = ANY(ARRAY(
        SELECT id FROM holds WHERE same AND octet_length(($5::bytea[])[place]) <= 256))),
    large AS (
        INSERT INTO laelaps.task_data (task, data)
        SELECT id, ($5::bytea[])[place] FROM holds WHERE same AND octet_length(($5::bytea[])[place]) > 256
        ON CONFLICT (task) DO UPDATE SET data = excluded.data),
    replaced AS (
        UPDATE laelaps.task SET bytes = ($4::int4[])[width_bucket(id, $1::int8[])],
            data = CASE WHEN octet_length(($5::bytea[])[width_bucket(id, $1::int8[])]) <= 256
                THEN ($5::bytea[])[width_bucket(id, $1::int8[])] END
        WHERE id = ANY(ARRAY(SELECT id FROM holds WHERE same)))
    SELECT lease, same FROM holds";

/// Replace data under leases. Answers for each: held, not held, or (None) that it is not what was read any more.
async fn replace_data(session: &mut Session, new: &[New]) -> Result<Vec<(LeaseRef, Option<bool>)>, Failure> {
    let mut answers = Vec::with_capacity(new.len());
    let mut rest: Vec<&New> = new.iter().collect();
    if rest.is_empty() {
        return Ok(answers);
    }
    session.begin().await?;
    while !rest.is_empty() {
        // Of two leases of one task at most one holds; each is looked at by itself.
        let (mut tasks, mut bytes) = (HashSet::new(), 0_usize);
        let (now, later): (Vec<&New>, Vec<&New>) = rest.into_iter().partition(|new| {
            bytes = bytes.saturating_add(new.stored.len());
            (tasks.is_empty() || bytes <= UPDATED_BYTES_MAX) && tasks.insert(new.lease_ref.task)
        });
        let numbers: Vec<i64> = now.iter().map(|new| new.lease_ref.task.0).collect();
        sqlx::query(LOCK_DATA).bind(&numbers).execute(session.db()?).await?;
        let held: Vec<(i64, bool)> = sqlx::query_as(REPLACE_DATA)
            .bind(&numbers)
            .bind(now.iter().map(|new| new.lease_ref.lease.0).collect::<Vec<i64>>())
            .bind(now.iter().map(|new| new.digest.as_slice()).collect::<Vec<&[u8]>>())
            .bind(now.iter().map(|new| new.bytes).collect::<Vec<i32>>())
            .bind(now.iter().map(|new| new.stored.as_slice()).collect::<Vec<&[u8]>>())
            .fetch_all(session.db()?)
            .await?;
        let held: HashMap<i64, bool> = held.into_iter().collect();
        let answer = |new: &&New| match held.get(&new.lease_ref.lease.0) {
            None => (new.lease_ref, Some(false)),
            Some(true) => (new.lease_ref, Some(true)),
            Some(false) => (new.lease_ref, None),
        };
        answers.extend(now.iter().map(answer));
        rest = later;
    }
    session.commit().await?;
    Ok(answers)
}
