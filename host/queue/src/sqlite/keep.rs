//! What a running attempt writes: heartbeats, progress, data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::Row as _;

use super::Sqlite;
use super::accounts::json;
use super::failure::Failure;
use super::settle::holds;
use super::writer::Session;
use crate::outcome::ms;
use crate::{Beat, Error, Lease, LeaseAnswer, LeaseRef, Progress, Result, TaskId, data};

/// The most bytes of a progress note; a longer one is cut.
const NOTE_BYTES_MAX: usize = 1_024;

pub(super) const RENEW: &str = "UPDATE task SET until = max(until, ?2 + beat.alive_ms)
            FROM (SELECT value ->> 0 AS id, value ->> 1 AS lease, value ->> 2 AS alive_ms FROM json_each(?1)) AS beat
            WHERE task.id = beat.id AND task.lease = beat.lease AND task.state = 'running' AND task.until > ?2
            RETURNING id, lease";

/// Renewals, one for each lease.
pub(super) struct Beats {
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
        Self { asked: beats.iter().map(|beat| beat.lease_ref).collect(), leases }
    }

    /// Renew those that hold.
    pub(super) async fn write(self, session: &mut Session) -> Result<Vec<LeaseAnswer>, Failure> {
        const PROGRESS: &str = "INSERT INTO progress (task, lease, done, total, note)
            SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4 FROM json_each(?1) WHERE true
            ON CONFLICT (task) DO UPDATE SET lease = excluded.lease, done = excluded.done, total = excluded.total, note = excluded.note";
        let rows = json(self.leases.iter().map(|(lease_ref, (alive_ms, _))| (lease_ref.task, lease_ref.lease, alive_ms)));
        let now = session.now;
        let mut held = HashSet::with_capacity(self.leases.len());
        for row in sqlx::query(RENEW).bind(rows).bind(now).fetch_all(session.db()).await? {
            held.insert(LeaseRef { task: TaskId(row.try_get(0)?), lease: Lease(row.try_get(1)?) });
        }
        let said: Vec<_> = self
            .leases
            .iter()
            .filter(|(lease_ref, _)| held.contains(lease_ref))
            .filter_map(|(lease_ref, (_, progress))| progress.as_ref().map(|progress| (lease_ref, progress)))
            .map(|(lease_ref, progress)| {
                let note = &progress.note[..progress.note.floor_char_boundary(NOTE_BYTES_MAX)];
                (lease_ref.task, lease_ref.lease, whole(progress.done), progress.total.map(whole), note)
            })
            .collect();
        if !said.is_empty() {
            sqlx::query(PROGRESS).bind(json(said)).execute(session.db()).await?;
        }
        let answer = |lease_ref: &LeaseRef| if held.contains(lease_ref) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(self.asked.iter().map(answer).collect())
    }
}

/// A number of units as the database can hold it.
fn whole(units: u64) -> i64 {
    i64::try_from(units).unwrap_or(i64::MAX)
}

/// Data as it was read, to be replaced only if nobody else has.
struct Read {
    key: String,
    revision: i64,
    stored: Vec<u8>,
}

impl Sqlite {
    /// Merge members into the data of a running task. Reading, decompressing and merging need no lock; if the data has changed meanwhile,
    /// it is done again.
    pub(super) async fn merge_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let members: Arc<[u8]> = members.into();
        loop {
            let Some(Read { key, revision, stored }) = self.read_data(lease_ref).await? else { return Ok(LeaseAnswer::Lost) };
            let members = Arc::clone(&members);
            let merged = tokio::task::spawn_blocking(move || data::updated(&key, stored, &members)).await;
            let (bytes, stored) = merged.map_err(|_| Error::Closed)??;
            let bytes = super::claim::count(bytes);
            let written = self
                .writer
                .run("updating a task's data", move |session| {
                    Box::pin(async move { replace_data(session, lease_ref, revision, bytes, stored).await })
                })
                .await?;
            if let Some(answer) = written {
                return Ok(answer);
            }
        }
    }

    async fn read_data(&self, lease_ref: LeaseRef) -> Result<Option<Read>> {
        const READ: &str =
            "SELECT task.key, task_data.revision, task_data.data FROM task JOIN task_data ON task_data.task = task.id
            WHERE task.id = ?1 AND task.lease = ?2 AND task.state = 'running'";
        let LeaseRef { task, lease } = lease_ref;
        let row = sqlx::query(READ).bind(task.0).bind(lease.0).fetch_optional(&self.readers).await;
        let read = row.and_then(|row| {
            row.map(|row| Ok(Read { key: row.try_get(0)?, revision: row.try_get(1)?, stored: row.try_get(2)? })).transpose()
        });
        read.map_err(self.reading("reading a task's data"))
    }
}

/// Replace the data under the lease; None if it is not of that revision any more.
async fn replace_data(
    session: &mut Session,
    lease_ref: LeaseRef,
    revision: i64,
    bytes: i64,
    stored: Vec<u8>,
) -> Result<Option<LeaseAnswer>, Failure> {
    const REPLACE: &str = "UPDATE task_data SET revision = revision + 1, bytes = ?3,
            data = CASE ?5 WHEN 0 THEN CAST(?4 AS TEXT) ELSE ?4 END
        WHERE task = ?1 AND revision = ?2";
    if !holds(session, lease_ref).await? {
        return Ok(Some(LeaseAnswer::Lost));
    }
    let gzip = data::compression(&stored) == crate::Compression::Gzip;
    let query = sqlx::query(REPLACE).bind(lease_ref.task.0).bind(revision).bind(bytes).bind(stored).bind(gzip);
    let replaced = query.execute(session.db()).await?.rows_affected();
    Ok((replaced == 1).then_some(LeaseAnswer::Held))
}
