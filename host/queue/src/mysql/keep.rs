//! What a running attempt writes: heartbeats, progress, data.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use sqlx::Row as _;

use super::MySql;
use super::connect::text;
use super::failure::Failure;
use super::rows::{Joined, Parts, count, json, parts, priority_in_range};
use super::session::{Session, moment};
use super::settle::{holds, leases};
use crate::outcome::ms;
use crate::{Beat, Error, LeaseAnswer, LeaseRef, Progress, Result, Update, data};

/// The most bytes of a progress note; a longer one is cut.
const NOTE_BYTES_MAX: usize = 1_024;

/// Updates written together, and the most data of them unless one alone has more.
const MERGED_MAX: usize = 64;
const MERGED_BYTES_MAX: usize = 16 << 20;

/// Both servers count the rows that are found, changed or not.
pub(super) const RENEW: &str = concat!(
    "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]', alive_ms BIGINT PATH '$[2]')) AS s
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    SET t.until = GREATEST(t.until, ? + s.alive_ms), ",
    priority_in_range!(),
    " WHERE t.lease = s.lease AND t.state = 'running' AND t.until > ",
    moment!()
);

pub(super) const RENEWED: &str = concat!(
    "SELECT t.id, t.lease FROM ",
    leases!(),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task WHERE t.lease = s.lease AND t.state = 'running' AND t.until > ",
    moment!()
);

/// Renewals, one for each lease, in the order of tasks.
struct Beats {
    asked: Vec<LeaseRef>,
    leases: BTreeMap<(i64, i64), (i64, Option<Progress>)>,
}

impl Beats {
    /// Two beats of one lease make the longer one, with the later progress.
    fn new(beats: &[Beat]) -> Self {
        let mut leases: BTreeMap<(i64, i64), (i64, Option<Progress>)> = BTreeMap::new();
        for beat in beats {
            let (alive_ms, progress) = leases.entry((beat.lease_ref.task.0, beat.lease_ref.lease.0)).or_default();
            *alive_ms = ms(beat.alive_time).max(*alive_ms);
            if beat.progress.is_some() {
                progress.clone_from(&beat.progress);
            }
        }
        Self { asked: beats.iter().map(|beat| beat.lease_ref).collect(), leases }
    }

    /// Renew those that hold.
    async fn write(&self, session: &mut Session<'_>) -> Result<Vec<LeaseAnswer>, Failure> {
        const PROGRESS: &str = "INSERT INTO laelaps_progress (task, lease, done, total, note)
            SELECT s.task, s.lease, s.done, s.total, s.note FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]',
                lease BIGINT PATH '$[1]', done BIGINT PATH '$[2]', total BIGINT PATH '$[3]',
                note VARCHAR(1024) CHARACTER SET utf8mb4 PATH '$[4]')) AS s
            ON DUPLICATE KEY UPDATE lease = VALUES(lease), done = VALUES(done), total = VALUES(total), note = VALUES(note)";
        let rows = json(self.leases.iter().map(|((task, lease), (alive_ms, _))| (task, lease, alive_ms)));
        let now = session.now;
        let renewed = sqlx::query(RENEW).bind(rows.clone()).bind(now).execute(session.db()).await?.rows_affected();
        let held: HashSet<(i64, i64)> = if renewed == self.leases.len() as u64 {
            self.leases.keys().copied().collect()
        } else {
            let held: Vec<(i64, i64)> = sqlx::query_as(RENEWED).bind(rows).fetch_all(session.db()).await?;
            held.into_iter().collect()
        };
        let said: Vec<_> = self
            .leases
            .iter()
            .filter(|(lease, _)| held.contains(lease))
            .filter_map(|((task, lease), (_, progress))| progress.as_ref().map(|progress| (task, lease, progress)))
            .map(|(task, lease, progress)| {
                let note = &progress.note[..progress.note.floor_char_boundary(NOTE_BYTES_MAX)];
                (task, lease, whole(progress.done), progress.total.map(whole), note)
            })
            .collect();
        for said in session.chunks(said) {
            sqlx::query(PROGRESS).bind(said).execute(session.db()).await?;
        }
        let answer = |lease_ref: &LeaseRef| {
            if held.contains(&(lease_ref.task.0, lease_ref.lease.0)) { LeaseAnswer::Held } else { LeaseAnswer::Lost }
        };
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
    revision: u32,
    stored: Vec<u8>,
}

/// Merged data, ready to be written.
struct Merged {
    /// The update that it comes from.
    place: usize,
    lease_ref: LeaseRef,
    revision: u32,
    data: (usize, Vec<u8>),
}

impl MySql {
    pub(super) async fn renew(&self, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        let beats = Arc::new(Beats::new(beats));
        self.run("renewing leases", move |session| {
            let beats = Arc::clone(&beats);
            Box::pin(async move { beats.write(session).await })
        })
        .await
    }

    /// Merge members into the data of a running task. Reading, decompressing and merging hold nothing; if the data has changed meanwhile, it
    /// is done again.
    pub(super) async fn merge_data(&self, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let members: Arc<[u8]> = members.into();
        loop {
            let Some(Read { key, revision, stored }) = self.read_data(lease_ref).await? else { return Ok(LeaseAnswer::Lost) };
            let members = Arc::clone(&members);
            let merged = tokio::task::spawn_blocking(move || data::updated(&key, stored, &members)).await;
            let merged = Arc::new(merged.map_err(|_| Error::Closed)??);
            let written = self
                .run("updating a task's data", move |session| {
                    let merged = Arc::clone(&merged);
                    Box::pin(async move { replace_data(session, lease_ref, revision, &merged).await })
                })
                .await?;
            if let Some(answer) = written {
                return Ok(answer);
            }
        }
    }

    /// As [`MySql::merge_data`] for several, written together; one that others were quicker with is made by itself.
    pub(super) async fn merge_many(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        let mut answers: Vec<Option<Result<LeaseAnswer>>> = updates.iter().map(|_| None).collect();
        let mut group: Vec<Merged> = Vec::new();
        for (place, update) in updates.iter().enumerate() {
            // The second update of a task builds on the first.
            if group.iter().any(|merged| merged.lease_ref == update.lease_ref) {
                self.write_merged(std::mem::take(&mut group), updates, &mut answers).await?;
            }
            let Some(Read { key, revision, stored }) = self.read_data(update.lease_ref).await? else {
                answers[place] = Some(Ok(LeaseAnswer::Lost));
                continue;
            };
            let members = update.members.clone();
            let merged = tokio::task::spawn_blocking(move || data::updated(&key, stored, &members)).await;
            match merged.map_err(|_| Error::Closed)? {
                Err(error) => answers[place] = Some(Err(error)),
                Ok(data) => group.push(Merged { place, lease_ref: update.lease_ref, revision, data }),
            }
            if group.len() == MERGED_MAX || group.iter().map(|merged| merged.data.1.len()).sum::<usize>() > MERGED_BYTES_MAX {
                self.write_merged(std::mem::take(&mut group), updates, &mut answers).await?;
            }
        }
        self.write_merged(group, updates, &mut answers).await?;
        Ok(answers.into_iter().map(|answer| answer.unwrap_or(Ok(LeaseAnswer::Lost))).collect())
    }

    async fn write_merged(
        &self,
        mut group: Vec<Merged>,
        updates: &[Update],
        answers: &mut [Option<Result<LeaseAnswer>>],
    ) -> Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        // Rows are held in one order.
        group.sort_unstable_by_key(|merged| merged.lease_ref.task);
        let group = Arc::new(group);
        let writing = Arc::clone(&group);
        let written = self
            .run("updating tasks' data", move |session| {
                let writing = Arc::clone(&writing);
                Box::pin(async move {
                    let mut written = Vec::with_capacity(writing.len());
                    for Merged { lease_ref, revision, data, .. } in writing.iter() {
                        written.push(replace_data(session, *lease_ref, *revision, data).await?);
                    }
                    Ok(written)
                })
            })
            .await?;
        for (merged, answer) in group.iter().zip(written) {
            answers[merged.place] = Some(match answer {
                Some(answer) => Ok(answer),
                None => match self.merge_data(merged.lease_ref, &updates[merged.place].members).await {
                    Err(error) if !error.is_about_the_request() => return Err(error),
                    answer => answer,
                },
            });
        }
        Ok(())
    }

    async fn read_data(&self, lease_ref: LeaseRef) -> Result<Option<Read>> {
        const READ: &str = "SELECT t.`key`, d.part, d.revision, d.data FROM laelaps_task AS t
            STRAIGHT_JOIN laelaps_task_data AS d FORCE INDEX (PRIMARY) ON d.task = t.id WHERE t.id = ? AND t.lease = ? AND t.state = 'running'";
        let LeaseRef { task, lease } = lease_ref;
        self.runner
            .read_together("reading a task's data", move |session| {
                Box::pin(async move {
                    let rows = sqlx::query(READ).bind(task.0).bind(lease.0).fetch_all(session.db()).await?;
                    let (mut key, mut revision, mut stored) = (None, 0, Joined::default());
                    for row in &rows {
                        let part: u16 = row.try_get(1)?;
                        if part == 0 {
                            (key, revision) = (Some(text(row, 0)?), row.try_get(2)?);
                        }
                        stored.add(part, row.try_get(3)?);
                    }
                    Ok(key.map(|key| Read { key, revision, stored: stored.into_bytes() }))
                })
            })
            .await
    }
}

/// Replace the data under the lease; None if it is not of that revision any more. Merging the same members twice is as good as once, so that
/// a try whose commit is in doubt is simply made again.
async fn replace_data(
    session: &mut Session<'_>,
    lease_ref: LeaseRef,
    revision: u32,
    (bytes, stored): &(usize, Vec<u8>),
) -> Result<Option<LeaseAnswer>, Failure> {
    const RAISE: &str =
        "UPDATE laelaps_task_data SET revision = revision + 1, bytes = ? WHERE task = ? AND part = 0 AND revision = ?";
    const WRITE: &str = concat!(
        "INSERT INTO laelaps_task_data (task, part, data) SELECT s.task, s.part, SUBSTRING(?, s.start, s.length) FROM ",
        parts!(),
        " ON DUPLICATE KEY UPDATE data = VALUES(data)"
    );
    const CUT: &str = "DELETE FROM laelaps_task_data WHERE task = ? AND part >= ?";
    if !holds(session, lease_ref).await? {
        return Ok(Some(LeaseAnswer::Lost));
    }
    let task = lease_ref.task.0;
    let raised = sqlx::query(RAISE).bind(count(*bytes)).bind(task).bind(revision).execute(session.db()).await?.rows_affected();
    if raised == 0 {
        return Ok(None);
    }
    let mut written = Parts::new(session.bytes_max);
    let kept = written.push(task, *bytes, stored);
    for (bytes, rows) in written.into_statements() {
        sqlx::query(WRITE).bind(bytes).bind(rows).execute(session.db()).await?;
    }
    sqlx::query(CUT).bind(task).bind(count(kept)).execute(session.db()).await?;
    Ok(Some(LeaseAnswer::Held))
}
