//! What a running attempt writes: heartbeats, progress, data.

use std::collections::{HashMap, HashSet};

use sqlx::Row as _;

use super::Sqlite;
use super::accounts::json;
use super::failure::Failure;
use super::pieces::{self, WHOLE_BYTES_MAX, data_bytes};
use super::rows::Columns;
use super::settle::holds;
use super::writer::Session;
use crate::outcome::ms;
use crate::{Beat, Compression, Error, Lease, LeaseAnswer, LeaseRef, Progress, Result, TaskId, Update, data};

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

/// The most updates that are made in one transaction.
const UPDATES_MAX: usize = 256;
/// The most data that is read for them, and the most of new members, unless one update alone has more.
const UPDATES_BYTES_MAX: i64 = 32 << 20;

/// Data as it was read, to be replaced only if nobody else has.
struct Read {
    key: String,
    revision: i64,
    is_in_pieces: bool,
    stored: Vec<u8>,
}

/// Data to be written in place of what was read.
pub(super) struct Merged {
    pub(super) lease_ref: LeaseRef,
    pub(super) revision: i64,
    /// Before compression.
    pub(super) bytes: i64,
    pub(super) stored: Stored,
    /// What was read was in pieces, which are not needed any more.
    was_in_pieces: bool,
}

/// Data in the column's two types.
pub(super) enum Stored {
    Text(String),
    Gzip(Vec<u8>),
}

impl Stored {
    fn len(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Gzip(bytes) => bytes.len(),
        }
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Text(text) => text.into_bytes(),
            Self::Gzip(bytes) => bytes,
        }
    }
}

impl Sqlite {
    /// Merge members into the data of running tasks. Reading, decompressing and merging need no lock; what has changed meanwhile is done again.
    /// Two updates of one task are made one after the other.
    pub(super) async fn merge_data(&self, updates: &[Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        let mut answers: Vec<Option<Result<LeaseAnswer>>> = updates.iter().map(|_| None).collect();
        loop {
            let pending = (0..updates.len()).filter(|place| answers[*place].is_none());
            let round = self.round(updates, pending).await?;
            if round.is_empty() {
                return Ok(answers.into_iter().flatten().collect());
            }
            let mut read = self.read_data(round.iter().map(|place| updates[*place].lease_ref)).await?;
            let mut merging = Vec::with_capacity(round.len());
            for place in round {
                match read.remove(&updates[place].lease_ref) {
                    None => answers[place] = Some(Ok(LeaseAnswer::Lost)),
                    Some(read) => merging.push((place, updates[place].clone(), read)),
                }
            }
            let merged = tokio::task::spawn_blocking(move || merging.into_iter().map(merge).collect::<Vec<_>>()).await;
            let mut writing = Vec::new();
            for (place, merged) in merged.map_err(|_| Error::Closed)? {
                match merged {
                    Err(error) => answers[place] = Some(Err(error)),
                    Ok(merged) => writing.push((place, merged)),
                }
            }
            for (place, answer) in self.replace_data(writing).await? {
                answers[place] = answer;
            }
        }
    }

    /// The first of the pending updates that fit into one round: each of another task, and not too much data.
    async fn round(&self, updates: &[Update], pending: impl Iterator<Item = usize>) -> Result<Vec<usize>> {
        const SIZES: &str =
            "SELECT task, coalesce(octet_length(data), bytes) FROM task_data WHERE task IN (SELECT value FROM json_each(?1))";
        let mut tasks = HashSet::new();
        let mut round: Vec<usize> =
            pending.filter(|place| tasks.insert(updates[*place].lease_ref.task)).take(UPDATES_MAX).collect();
        if let [_, _, ..] = round.as_slice() {
            let asked = json(round.iter().map(|place| updates[*place].lease_ref.task));
            let sizes: Vec<(i64, i64)> = sqlx::query_as(SIZES)
                .bind(asked)
                .fetch_all(&self.readers)
                .await
                .map_err(self.reading("reading the sizes of tasks' data"))?;
            let sizes: HashMap<i64, i64> = sizes.into_iter().collect();
            let mut sum = 0_i64;
            let fitting = round.iter().take_while(|place| {
                let update = &updates[**place];
                sum += sizes.get(&update.lease_ref.task.0).copied().unwrap_or(0) + super::claim::count(update.members.len());
                sum <= UPDATES_BYTES_MAX
            });
            let fitting = fitting.count().max(1);
            round.truncate(fitting);
        }
        Ok(round)
    }

    async fn read_data(&self, leases: impl Iterator<Item = LeaseRef>) -> Result<HashMap<LeaseRef, Read>> {
        const READ: &str = concat!(
            "SELECT task.id, task.lease, task.key, task_data.revision, task_data.data, task_data.pieces
            FROM json_each(?1) AS asked CROSS JOIN task ON task.id = asked.value ->> 0 JOIN task_data ON task_data.task = task.id
            WHERE task.lease = asked.value ->> 1 AND task.state = 'running' AND ",
            data_bytes!(),
            " <= 17825792"
        );
        let asked = json(leases.map(|LeaseRef { task, lease }| (task, lease)));
        let doing = "reading tasks' data";
        // Row and pieces have to fit together.
        let mut reading = self.readers.begin().await.map_err(self.reading(doing))?;
        let rows = sqlx::query(READ).bind(asked).fetch_all(&mut *reading).await.map_err(self.reading(doing))?;
        let mut found = HashMap::with_capacity(rows.len());
        for row in rows {
            let mut columns = Columns::of(&row);
            let lease_ref = LeaseRef { task: TaskId(columns.whole(0, "number")), lease: Lease(columns.whole(1, "lease")) };
            let (key, revision) = (columns.text(2, "key"), columns.whole(3, "revision"));
            let pieces = columns.maybe_whole(5, "pieces");
            let stored = match pieces {
                Some(pieces) => pieces::read(&mut reading, pieces).await.map_err(self.reading(doing))?,
                None => columns.bytes(4).unwrap_or_default(),
            };
            found.insert(lease_ref, Read { key, revision, is_in_pieces: pieces.is_some(), stored });
        }
        Ok(found)
    }

    /// Write what was merged: what is large in pieces, each for itself, the rest in one transaction. None for what has changed since it was read.
    async fn replace_data(&self, writing: Vec<(usize, Merged)>) -> Result<Vec<(usize, Option<Result<LeaseAnswer>>)>> {
        let (large, writing): (Vec<_>, Vec<_>) =
            writing.into_iter().partition(|(_, merged)| merged.stored.len() > WHOLE_BYTES_MAX);
        let were_in_pieces: Vec<LeaseRef> =
            writing.iter().filter(|(_, merged)| merged.was_in_pieces).map(|(_, merged)| merged.lease_ref).collect();
        let together = if writing.is_empty() { Vec::new() } else { self.replace_together(writing).await? };
        let mut answers: Vec<_> = together.into_iter().map(|(place, answer)| (place, answer.map(Ok))).collect();
        for lease_ref in were_in_pieces {
            self.remove_remains(lease_ref).await;
        }
        for (place, merged) in large {
            answers.push((place, self.replace_in_pieces(merged).await.transpose()));
        }
        Ok(answers)
    }

    async fn replace_together(&self, writing: Vec<(usize, Merged)>) -> Result<Vec<(usize, Option<LeaseAnswer>)>> {
        self.writer
            .run("updating tasks' data", move |session| {
                Box::pin(async move {
                    let mut answers = Vec::with_capacity(writing.len());
                    for (place, merged) in writing {
                        answers.push((place, replace_data(session, merged).await?));
                    }
                    Ok(answers)
                })
            })
            .await
    }
}

fn merge((place, update, read): (usize, Update, Read)) -> (usize, Result<Merged>) {
    let Read { key, revision, is_in_pieces, stored } = read;
    let merged = data::updated(&key, stored, &update.members).and_then(|(bytes, stored)| {
        let stored = match data::compression(&stored) {
            Compression::Gzip => Stored::Gzip(stored),
            Compression::None => Stored::Text(String::from_utf8(stored).map_err(|error| Error::InvalidTask {
                key: key.clone(),
                problem: format!("the stored data is unreadable: {error}"),
            })?),
        };
        Ok(Merged {
            lease_ref: update.lease_ref,
            revision,
            bytes: super::claim::count(bytes),
            stored,
            was_in_pieces: is_in_pieces,
        })
    });
    (place, merged)
}

/// Replace the data under the lease; None if it is not of that revision any more.
async fn replace_data(session: &mut Session, merged: Merged) -> Result<Option<LeaseAnswer>, Failure> {
    const REPLACE: &str = "UPDATE task_data SET revision = revision + 1, bytes = ?3, data = ?4, pieces = NULL
        WHERE task = ?1 AND revision = ?2
            AND EXISTS (SELECT 1 FROM task WHERE id = ?1 AND lease = ?5 AND state = 'running' AND until > ?6)";
    let Merged { lease_ref, revision, bytes, stored, .. } = merged;
    let now = session.now;
    let query = sqlx::query(REPLACE).bind(lease_ref.task.0).bind(revision).bind(bytes);
    // Bound as it is to be stored: a CAST would copy megabytes while everybody waits for the writer.
    let query = match stored {
        Stored::Text(text) => query.bind(text),
        Stored::Gzip(bytes) => query.bind(bytes),
    };
    let written = query.bind(lease_ref.lease.0).bind(now).execute(session.db()).await?;
    replaced(session, lease_ref, written.rows_affected()).await
}

/// What follows from how many rows were written under the lease; None if the data is not of the revision any more that was read.
pub(super) async fn replaced(session: &mut Session, lease_ref: LeaseRef, written: u64) -> Result<Option<LeaseAnswer>, Failure> {
    if written == 1 {
        return Ok(Some(LeaseAnswer::Held));
    }
    Ok(if holds(session, lease_ref).await? { None } else { Some(LeaseAnswer::Lost) })
}
