//! Tasks that wait apart from others because hosts met them that do not serve their types: see [`crate::unserved`].
//!
//! They stand in the order of queues and types, of which there are few. A claim of a host that serves some of those takes the first tasks of each back,
//! in a transaction before its own: to where they are ready, or to suspect, where they have their old places. Then it chooses as any claim does. That
//! nothing stands apart costs one look-up.

use std::sync::LazyLock;
use std::time::Duration;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;
use tokio::task::JoinHandle;

use super::MySql;
use super::claim::{Taken, limit_of};
use super::due::{Held, Standing, move_over};
use super::failure::Failure;
use super::fronts::{ARMS, arms, bytes, hex, steps, walk};
use super::rows::{count, lockable};
use super::session::{Session, Waiting as LockWait};
use crate::unserved::{self, KINDS_MAX, Kind, LOOKS_MAX, Look, Place, ROUNDS_MAX, Sieve};
use crate::{Claim, Result, Settlement, Worker as _};

/// The first kind, in the words of [`word`]; always one row.
pub(super) const FIRST_KIND: &str =
    "SELECT (SELECT CONCAT(HEX(queue), '-', HEX(type)) FROM laelaps_unserved FORCE INDEX (PRIMARY)
    ORDER BY queue, type LIMIT 1)";

/// Steps from one kind to the next.
static STEPS: LazyLock<String> = LazyLock::new(|| {
    let next = |kind: &str| {
        let (queue, task_type) =
            (format!("UNHEX(SUBSTRING_INDEX({kind}, '-', 1))"), format!("UNHEX(SUBSTRING_INDEX({kind}, '-', -1))"));
        format!(
            "SELECT CONCAT(HEX(queue), '-', HEX(type)) FROM laelaps_unserved FORCE INDEX (PRIMARY)
                WHERE (queue = {queue} AND type > {task_type}) OR queue > {queue} ORDER BY queue, type LIMIT 1"
        )
    };
    steps(next, ToOwned::to_owned)
});

pub(super) const OF_NOBODY: &str = arms!(
    "SELECT queue, type, user, turn, task FROM laelaps_unserved FORCE INDEX (PRIMARY) WHERE queue = ? AND type = ? AND user = ?
        ORDER BY turn, task LIMIT ?"
);

pub(super) const OF_USERS: &str = arms!(
    "SELECT queue, type, user, turn, task FROM laelaps_unserved FORCE INDEX (PRIMARY) WHERE queue = ? AND type = ? AND user > ?
        ORDER BY user, turn, task LIMIT ?"
);

/// The rows of a set of places, names in hexadecimal digits: by hand there can be some that are no text.
macro_rules! places_apart {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (queue VARCHAR(128) CHARACTER SET ascii PATH '$[0]', type VARCHAR(510) CHARACTER SET ascii PATH '$[1]',
            user VARCHAR(510) CHARACTER SET ascii PATH '$[2]', turn BIGINT PATH '$[3]', task BIGINT PATH '$[4]')) AS s"
    };
}

/// Where such a place is.
macro_rules! at_place {
    () => {
        " STRAIGHT_JOIN laelaps_unserved AS r FORCE INDEX (PRIMARY) ON r.queue = UNHEX(s.queue) AND r.type = UNHEX(s.type)
            AND r.user = UNHEX(s.user) AND r.turn = s.turn AND r.task = s.task"
    };
}

pub(super) const STILL_UNSERVED: &str =
    concat!("SELECT r.queue, r.type, r.user, r.turn, r.task FROM ", lockable!(places_apart!()), at_place!(), " FOR UPDATE");

pub(super) const OUT_OF_UNSERVED: &str = concat!("DELETE r FROM ", places_apart!(), at_place!());

/// Where a task stands apart, as it is written there.
#[derive(Clone, Debug)]
pub(super) struct Apart {
    pub(super) queue: Vec<u8>,
    pub(super) task_type: Vec<u8>,
    pub(super) user: Vec<u8>,
    pub(super) turn: i64,
    pub(super) task: i64,
}

impl Standing for Apart {
    const STILL: &str = STILL_UNSERVED;
    const OUT: &str = OUT_OF_UNSERVED;

    fn read(row: &MySqlRow) -> Result<Self, sqlx::Error> {
        let [queue, task_type, user] = [row.try_get(0)?, row.try_get(1)?, row.try_get(2)?];
        Ok(Self { queue, task_type, user, turn: row.try_get(3)?, task: row.try_get(4)? })
    }

    fn row(&self) -> impl serde::Serialize {
        (hex(&self.queue), hex(&self.task_type), hex(&self.user), self.turn, self.task)
    }

    fn at(&self) -> i64 {
        self.turn
    }

    fn task(&self) -> i64 {
        self.task
    }

    fn is_of(&self, held: &Held) -> bool {
        let waiting = &held.waiting;
        let names = (waiting.queue.as_bytes(), held.task_type.as_slice(), waiting.user.as_bytes());
        names == (self.queue.as_slice(), self.task_type.as_slice(), self.user.as_slice()) && waiting.turn() == self.turn
    }
}

/// A kind for [`walk`], as it answers kinds.
fn word(kind: &Kind) -> String {
    format!("{}-{}", hex(&kind.queue), hex(&kind.task_type))
}

fn kind(word: &str) -> Kind {
    let (queue, task_type) = word.split_once('-').unwrap_or_default();
    Kind { queue: bytes(queue), task_type: bytes(task_type) }
}

/// What a look has come to.
pub(super) struct Looked {
    moved: bool,
    /// There may be more at once.
    pub(super) again: bool,
    next: (Kind, Vec<u8>),
}

/// Take back the first tasks of the kinds behind a place that a claim accepts. `first` is the first kind of all.
pub(super) async fn look(
    session: &mut Session<'_>,
    claim: &Claim,
    from: &unserved::From,
    first: &str,
) -> Result<Looked, Failure> {
    let seen = (from.kind == Kind::default()).then_some(first);
    let behind = seen.map_or_else(|| word(&from.kind), ToOwned::to_owned);
    let more = walk(session, &STEPS, behind.into_bytes(), KINDS_MAX - seen.iter().len()).await?;
    let kinds = seen.into_iter().chain(more.iter().map(String::as_str)).map(kind).collect();
    let (kinds, kind, again) = unserved::wanted(kinds, from, claim);
    let limit = limit_of(claim);
    let (places, user) = unserved::first(places(session, &kinds, &from.user, limit).await?, limit);
    let apart = places.into_iter().map(|Place { kind, user, turn, task }| {
        let Kind { queue, task_type } = kinds[kind].clone();
        Apart { queue, task_type, user, turn, task }
    });
    let moved = move_over(session, apart.collect()).await?;
    Ok(Looked { moved: moved > 0, again, next: (kind, user) })
}

/// Of each of these kinds the first places of tasks without user, and the first of users behind one.
async fn places(session: &mut Session<'_>, kinds: &[Kind], user: &[u8], limit: usize) -> Result<Vec<Place>, Failure> {
    let mut places = Vec::new();
    for (number, some) in kinds.chunks(ARMS).enumerate() {
        for (sql, user) in [(OF_NOBODY, &[][..]), (OF_USERS, user)] {
            let mut query = sqlx::query(sql);
            for arm in 0..ARMS {
                let Kind { queue, task_type } = some.get(arm).cloned().unwrap_or_default();
                let limit = if arm < some.len() { count(limit) } else { 0 };
                query = query.bind(queue).bind(task_type).bind(user.to_vec()).bind(limit);
            }
            for row in query.fetch_all(session.db()).await? {
                let Apart { queue, task_type, user, turn, task } = Apart::read(&row)?;
                let of = Kind { queue, task_type };
                let arm = some.iter().position(|kind| *kind == of);
                places.extend(arm.map(|arm| Place { kind: number * ARMS + arm, user, turn, task }));
            }
        }
    }
    Ok(places)
}

impl MySql {
    /// Claim what the host serves. What else it meets is put apart, and where it met nothing else, it goes on.
    pub(super) async fn take_served(&self, claim: &Claim) -> Result<Taken> {
        let again_in = self.bring_back(claim).await?;
        let mut taken = Taken::default();
        let mut sieve = Sieve::new(claim);
        for _ in 0..ROUNDS_MAX {
            taken = self.take_tasks(&sieve.asked()).await?;
            taken.next_due_in = taken.next_due_in.into_iter().chain(again_in).min();
            let (served, others) = sieve.sift(std::mem::take(&mut taken.tasks));
            taken.tasks = served;
            if others.is_empty() {
                return Ok(taken);
            }
            let putting = self.put_apart(others);
            // Those are the caller's at once.
            if !taken.tasks.is_empty() || !putting.await.unwrap_or(false) {
                return Ok(taken);
            }
            if sieve.is_enough() {
                break;
            }
        }
        // There may be more of the kind; the next claim goes on.
        self.runner.wake();
        Ok(taken)
    }

    /// On a task of its own, whoever waits for it. Answers whether it was done.
    fn put_apart(&self, tasks: Vec<Settlement>) -> JoinHandle<bool> {
        let mysql = self.clone();
        tokio::spawn(async move {
            let put = mysql.settle(&tasks).await;
            if let Err(error) = &put {
                let words = "tasks that this host does not serve cannot be put apart; they come back when their leases end";
                tracing::warn!(%error, tasks = tasks.len(), "{words}");
            }
            put.is_ok()
        })
    }

    /// Take back what waits apart and this claim accepts, unless that was looked for a moment ago. Answers after how long to look again, if that may be
    /// worth it.
    async fn bring_back(&self, claim: &Claim) -> Result<Option<Duration>> {
        let doing = "looking for what waits apart";
        let from = match self.unserved.look(claim) {
            Look::Now(from) => from,
            Look::After(wait) => return Ok(Some(wait).filter(|_| claim.accepts.is_some())),
        };
        let first = self.read(doing, || sqlx::query(FIRST_KIND)).await?;
        let first: Option<String> = first.try_get(0).map_err(|error| self.runner.place.worded(error, doing))?;
        let Some(first) = first else {
            return Ok(self.unserved.looked(claim, &from, false, Default::default()));
        };
        let (mut from, mut wait) = (from, None);
        for _ in 0..LOOKS_MAX {
            let (asked, start, first) = (claim.clone(), from.clone(), first.clone());
            let looking = self.runner.run_here(LockWait::Long, "taking back what waits apart", move |session| {
                let (asked, start, first) = (asked.clone(), start.clone(), first.clone());
                Box::pin(async move { look(session, &asked, &start, &first).await })
            });
            let Looked { moved, again, next } = looking.await?;
            wait = self.unserved.looked(claim, &from, again, next);
            match self.unserved.look(claim) {
                Look::Now(next) if again && !moved => from = next,
                _ => break,
            }
        }
        Ok(wait)
    }
}
