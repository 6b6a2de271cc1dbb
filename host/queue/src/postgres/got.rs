//! What a claim took: reading the tasks out of its rows, each by itself.

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::heads::{HEAD, Place, Sort};
use super::session::Shared;
use super::unreadable::{self, Broken};
use crate::{ClaimedTask, Descent, Lease, LeaseRef, TaskId, Timestamp, task};

/// A claimed task's columns, after those of the look. Data far larger than its row says is left where it is: claims are bounded by what rows say.
macro_rules! taken_columns {
    () => {
        "id, lease, key, type, user_name, attempts, max_attempts, coalesce(lost, 0) AS lost, coalesce(lost_alone, 0) AS lost_alone, alone,
            coalesce(releases, 0) AS releases, created_at, run_at, until, max_running, coalesce(root, id) AS root,
            coalesce(depth, 0) AS depth, bytes, turn, (SELECT stored FROM (
                SELECT coalesce(data, (SELECT data FROM laelaps.task_data WHERE task_data.task = task.id)) AS stored) AS either
                WHERE octet_length(stored) <= 2 * greatest(bytes, 0)::int8 + 1048576) AS data, queue"
    };
}
pub(super) use taken_columns;

/// The last place of each queue and sort of which something was taken.
pub(super) fn last_places(got: &Got) -> HashMap<(&str, Sort), Place> {
    let mut last: HashMap<(&str, Sort), Place> = HashMap::new();
    for (place, task) in &got.placed {
        let sort = if task.user.is_none() { Sort::Nobodys } else { Sort::Users };
        let place_of = last.entry((task::stored_queue(Some(&task.queue)), sort)).or_insert(HEAD);
        *place_of = (*place_of).max(*place);
    }
    last
}

/// What a claim took.
#[derive(Default)]
pub(super) struct Got {
    /// The tasks, each with its place.
    pub(super) placed: Vec<(Place, ClaimedTask)>,
    /// And those that nobody can read.
    pub(super) broken: Vec<Broken>,
}

impl Got {
    pub(super) fn is_empty(&self) -> bool {
        self.placed.is_empty() && self.broken.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.placed.len() + self.broken.len()
    }

    /// So much data.
    pub(super) fn bytes(&self) -> usize {
        self.placed.iter().map(|(_, task)| task.data.len()).sum()
    }

    pub(super) fn add(&mut self, other: Self) {
        self.placed.extend(other.placed);
        self.broken.extend(other.broken);
    }

    /// Remember what was claimed together.
    pub(super) fn note(&self, shared: &Shared, claim: i64) {
        let broken = self.broken.iter().map(|broken| broken.lease_ref.lease);
        let leases: Vec<Lease> = self.placed.iter().map(|(_, task)| task.lease_ref.lease).chain(broken).collect();
        shared.held.claimed(claim, leases.into_iter());
    }

    pub(super) fn into_tasks(self) -> (Vec<ClaimedTask>, Vec<Broken>) {
        (self.placed.into_iter().map(|(_, task)| task).collect(), self.broken)
    }
}

/// The tasks of the rows with their places, in the order of claims. Each row is read by itself.
pub(super) fn in_order(rows: &[PgRow], first: usize, now: i64) -> Result<Got, sqlx::Error> {
    let mut got = Got { placed: Vec::with_capacity(rows.len()), broken: Vec::new() };
    for row in rows {
        match taken(row, first, now)? {
            Ok(task) => got.placed.push(task),
            Err(row) => got.broken.push(row),
        }
    }
    got.placed.sort_unstable_by_key(|(place, _)| *place);
    Ok(got)
}

/// A claimed task and its place, or what nobody can read.
fn taken(row: &PgRow, first: usize, now: i64) -> Result<Result<(Place, ClaimedTask), Broken>, sqlx::Error> {
    let lease_ref = LeaseRef { task: TaskId(row.try_get(first)?), lease: Lease(row.try_get(first + 1)?) };
    let read = read(row, first, now, lease_ref);
    Ok(read.map_err(|error| error.to_string()).and_then(|read| read).map_err(|problem| Broken::by_row(lease_ref, &problem)))
}

fn read(row: &PgRow, first: usize, now: i64, lease_ref: LeaseRef) -> Result<Result<(Place, ClaimedTask), String>, sqlx::Error> {
    let number = |place: usize| row.try_get::<i32, _>(first + place).map(i64::from);
    let (key, task_type, user): (String, String, String) =
        (row.try_get(first + 2)?, row.try_get(first + 3)?, row.try_get(first + 4)?);
    let queue: String = row.try_get(first + 20)?;
    let [attempts, lost, lost_alone, releases, depth] = [number(5)?, number(7)?, number(8)?, number(10)?, number(16)?];
    let (max_attempts, max_running): (Option<i64>, Option<i64>) = (row.try_get(first + 6)?, row.try_get(first + 14)?);
    let (created_at, run_at): (i64, i64) = (row.try_get(first + 11)?, row.try_get(first + 12)?);
    let numbers = [
        ("attempts", Some(attempts), unreadable::COUNTER),
        ("lost", Some(lost), unreadable::COUNTER),
        ("lost_alone", Some(lost_alone), unreadable::COUNTER),
        ("releases", Some(releases), unreadable::COUNTER),
        ("depth", Some(depth), unreadable::COUNTER),
        ("bytes", Some(number(17)?), unreadable::BYTES),
        ("max_attempts", max_attempts, unreadable::MAX_ATTEMPTS),
        ("max_running", max_running, unreadable::MAX_RUNNING),
        ("created_at", Some(created_at), unreadable::MOMENT),
        ("run_at", Some(run_at), unreadable::MOMENT),
    ];
    if let Some(problem) = unreadable::problem([("key", &key), ("type", &task_type), ("user", &user)], &queue, numbers) {
        return Ok(Err(problem));
    }
    let whole = |number: i64| u32::try_from(number).unwrap_or(u32::MAX);
    let claimed = ClaimedTask {
        lease_ref,
        key,
        task_type,
        queue: task::queue_name(queue),
        data: row.try_get::<Option<Vec<u8>>, _>(first + 19)?.unwrap_or_default(),
        user: Some(user).filter(|user| !user.is_empty()),
        max_running: max_running.map(whole),
        descent: Descent { root: TaskId(row.try_get(first + 15)?), depth: whole(depth) },
        compression: crate::Compression::None,
        attempt: whole(attempts).saturating_add(1),
        max_attempts: max_attempts.map(whole),
        lost: whole(lost),
        lost_alone: whole(lost_alone),
        alone: row.try_get(first + 9)?,
        releases: whole(releases),
        created_at: Timestamp(created_at),
        claimed_at: Timestamp(now),
        until: Timestamp(row.try_get(first + 13)?),
    };
    Ok(Ok(((row.try_get(first + 18)?, lease_ref.task.0), claimed)))
}
