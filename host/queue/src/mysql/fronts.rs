//! The first ready tasks of a table, over as many queues as have some.
//!
//! The tables are in the order of queues, and of turns within each. So a claim looks into each queue from a place on before which nothing stands, as
//! far as its process knows: its front (see [`super::mark`]). With one queue it locks what comes first there. With several it reads without locks
//! which of them come first, at most [`ARMS`] queues at a time, those whose fronts are first; what stands beyond the front of the next queue is left
//! until that one has been looked at as well. Then it locks as many of each as that comes to. So a claim looks into as many queues as it takes tasks,
//! whatever else waits.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Row as _};

use super::choose::{Chosen, HEAD, Ready};
use super::failure::Failure;
use super::mend::{Spot, placed_queue};
use super::rows::{count, json};
use super::session::Session;

/// Queues of one statement.
pub(super) const ARMS: usize = 16;
/// Queues that one look finds at most.
pub(super) const QUEUES_MAX: usize = 1_000;
/// Queues that one step of such a look finds.
const STEPS: usize = 32;
/// Rounds of one claim. Each comes to the end of a queue, or further in one.
const ROUNDS_MAX: usize = 200;

/// So many times the same SELECT, for different parameters.
macro_rules! arms {
    ($($arm:tt)+) => {
        concat!(
            "(", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (",
            $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (",
            $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (",
            $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ") UNION ALL (", $($arm)+, ")"
        )
    };
}
pub(super) use arms;

/// What stands in a queue behind a place, in order.
macro_rules! behind {
    () => {
        " WHERE queue = ? AND ((turn = ? AND task > ?) OR turn > ?) ORDER BY turn, task LIMIT ?"
    };
}

/// The rows of a set of queues' names in hexadecimal digits: by hand there can be some that are no text.
macro_rules! queues {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (place FOR ORDINALITY, queue VARCHAR(128) CHARACTER SET ascii PATH '$')) AS s"
    };
}
pub(super) use queues;

pub(super) const FIRST: &str =
    concat!("SELECT turn, task, max_running, '' FROM laelaps_ready", behind!(), " FOR UPDATE SKIP LOCKED");

pub(super) const FIRST_OF_USERS: &str = concat!(
    "SELECT turn, task, max_running, user FROM laelaps_ready_of_user FORCE INDEX (in_turn)",
    behind!(),
    " FOR UPDATE SKIP LOCKED"
);

pub(super) const FIRST_OF_QUEUES: &str =
    arms!("SELECT turn, task, max_running, '', queue FROM laelaps_ready", behind!(), " FOR UPDATE SKIP LOCKED");

pub(super) const FIRST_OF_USERS_OF_QUEUES: &str = arms!(
    "SELECT turn, task, max_running, user, queue FROM laelaps_ready_of_user FORCE INDEX (in_turn)",
    behind!(),
    " FOR UPDATE SKIP LOCKED"
);

pub(super) const SEEN: &str = arms!("SELECT turn, task, queue FROM laelaps_ready", behind!());

pub(super) const SEEN_OF_USERS: &str =
    arms!("SELECT turn, task, queue FROM laelaps_ready_of_user FORCE INDEX (in_turn)", behind!());

pub(super) const HEADS: &str = concat!(
    "SELECT s.place, (SELECT CONCAT_WS(',', r.turn, r.task) FROM laelaps_ready AS r FORCE INDEX (PRIMARY)
        WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn, r.task LIMIT 1) FROM ",
    queues!()
);

pub(super) const HEADS_OF_USERS: &str = concat!(
    "SELECT s.place, (SELECT CONCAT_WS(',', r.turn, r.task) FROM laelaps_ready_of_user AS r FORCE INDEX (in_turn)
        WHERE r.queue = UNHEX(s.queue) ORDER BY r.turn, r.task LIMIT 1) FROM ",
    queues!()
);

/// Steps from one queue to the next.
fn steps_in(index: &str) -> String {
    let next = |queue: &str| format!("SELECT queue FROM {index} WHERE queue > {queue} ORDER BY queue LIMIT 1");
    steps(next, |queue| format!("HEX({queue})"))
}

/// Steps from each of something to the next, each the look-up of one row: no join of these servers begins at a place that another table says, unless
/// it says the whole of it. `next` is the look-up behind the one that a variable has, and `word` how that one is told.
pub(super) fn steps(next: impl Fn(&str) -> String, word: impl Fn(&str) -> String) -> String {
    let mut steps = String::new();
    let mut all = Vec::with_capacity(STEPS);
    for step in 1..=STEPS {
        let _ = write!(steps, "SET @laelaps_{step} = ({}); ", next(&format!("@laelaps_{}", step - 1)));
        all.push(word(&format!("@laelaps_{step}")));
    }
    format!("{steps}SET @laelaps_0 = @laelaps_{STEPS}; SELECT CONCAT_WS(',', {})", all.join(", "))
}

static STEPS_IN_READY: LazyLock<String> = LazyLock::new(|| steps_in("laelaps_ready FORCE INDEX (PRIMARY)"));
static STEPS_IN_READY_OF_USER: LazyLock<String> = LazyLock::new(|| steps_in("laelaps_ready_of_user FORCE INDEX (in_turn)"));
static STEPS_IN_SUSPECT: LazyLock<String> = LazyLock::new(|| steps_in("laelaps_suspect FORCE INDEX (in_queue)"));

/// A table of tasks that may be claimed.
pub(super) struct Table {
    of_users: bool,
    first: &'static str,
    first_of_queues: &'static str,
    seen: &'static str,
    heads: &'static str,
    steps: &'static LazyLock<String>,
}

/// Tasks without user.
pub(super) static READY: Table =
    Table { of_users: false, first: FIRST, first_of_queues: FIRST_OF_QUEUES, seen: SEEN, heads: HEADS, steps: &STEPS_IN_READY };

/// Tasks of users, whosever they are.
pub(super) static OF_USERS: Table = Table {
    of_users: true,
    first: FIRST_OF_USERS,
    first_of_queues: FIRST_OF_USERS_OF_QUEUES,
    seen: SEEN_OF_USERS,
    heads: HEADS_OF_USERS,
    steps: &STEPS_IN_READY_OF_USER,
};

/// How a look begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Start {
    /// At the head of each queue that there is, or that was asked for.
    pub(super) is_head: bool,
    /// Otherwise in these queues, in each behind a place.
    pub(super) fronts: Vec<(Vec<u8>, Ready)>,
    /// Which queues have something has to be learnt first.
    pub(super) learn: Option<Learn>,
}

/// Where to learn which queues have something.
#[derive(Clone, Debug)]
pub(super) enum Learn {
    /// In the table, from this queue on.
    From(Vec<u8>),
    /// Of these.
    Of(Arc<[String]>),
}

/// What a look came to.
#[derive(Clone, Debug)]
pub(super) struct Looked {
    pub(super) is_head: bool,
    /// Those are all queues that had something, as far as the look went.
    pub(super) learnt: bool,
    /// How long it took to find what is first.
    pub(super) took: Duration,
    /// In each queue the last place that was taken; None: nothing is left there.
    pub(super) fronts: Vec<(Vec<u8>, Option<Ready>)>,
    /// More queues than one look finds: the next one begins behind this one.
    pub(super) behind: Option<Vec<u8>>,
    /// What was found, in its queue.
    found: Vec<(Vec<u8>, Ready)>,
}

impl Looked {
    /// What a test says it has found.
    #[cfg(test)]
    pub(super) fn of(is_head: bool, took: Duration, fronts: Vec<(Vec<u8>, Option<Ready>)>) -> Self {
        Self { is_head, learnt: true, took, fronts, behind: None, found: Vec::new() }
    }

    /// What was found and is not among these tasks was left where it stands.
    pub(super) fn leave_all_but(&mut self, taken: &HashSet<i64>) {
        for (queue, place) in self.found.drain(..).filter(|(_, (_, task))| !taken.contains(task)) {
            let Some((_, front)) = self.fronts.iter_mut().find(|(known, _)| *known == queue) else { continue };
            let before = just_before(place);
            *front = Some(front.map_or(before, |front| front.min(before)));
        }
    }
}

/// The place behind which this one is the next that can be.
fn just_before((turn, task): Ready) -> Ready {
    (turn, task.saturating_sub(1))
}

/// A ready task whose row is held.
pub(super) struct Found {
    pub(super) chosen: Chosen,
    pub(super) max_running: Option<u32>,
}

/// The names of queues that have something in a table, in order: from one on, which is among them, and at most so many.
pub(super) async fn names(session: &mut Session<'_>, table: &Table, first: &[u8], most: usize) -> Result<Vec<Vec<u8>>, Failure> {
    queues_from(session, table.steps, first, most).await
}

/// As [`names`], of tasks that must run alone.
pub(super) async fn names_of_suspects(session: &mut Session<'_>, first: &[u8], most: usize) -> Result<Vec<Vec<u8>>, Failure> {
    queues_from(session, &STEPS_IN_SUSPECT, first, most).await
}

async fn queues_from(session: &mut Session<'_>, steps: &'static str, first: &[u8], most: usize) -> Result<Vec<Vec<u8>>, Failure> {
    let behind = walk(session, steps, first.to_vec(), most.saturating_sub(1)).await?;
    Ok(std::iter::once(first.to_vec()).chain(behind.iter().map(|queue| bytes(queue))).collect())
}

/// What [`steps`] find behind a place, in their words and at most so many.
pub(super) async fn walk(
    session: &mut Session<'_>,
    steps: &'static str,
    behind: Vec<u8>,
    most: usize,
) -> Result<Vec<String>, Failure> {
    const BEGIN: &str = "SET @laelaps_0 = ?";
    let mut words: Vec<String> = Vec::new();
    sqlx::query(BEGIN).bind(behind).execute(session.db()).await?;
    while words.len() < most {
        let rows = sqlx::raw_sql(AssertSqlSafe(steps)).fetch_all(session.db()).await?;
        let found: Option<String> = rows.last().map(|row| row.try_get(0)).transpose()?;
        let before = words.len();
        words.extend(found.iter().flat_map(|found| found.split(',')).filter(|word| !word.is_empty()).map(ToOwned::to_owned));
        if words.len() < before + STEPS {
            break;
        }
    }
    words.truncate(most);
    Ok(words)
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn bytes(hex: &str) -> Vec<u8> {
    let digit = |place: usize| hex.get(place..place + 2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
    (0..hex.len()).step_by(2).filter_map(digit).collect()
}

/// The queues among these that have something, each with the place just before its first task.
pub(super) async fn heads(
    session: &mut Session<'_>,
    table: &Table,
    queues: Vec<Vec<u8>>,
) -> Result<Vec<(Vec<u8>, Ready)>, Failure> {
    let rows = json(queues.iter().map(|queue| hex(queue)));
    let mut heads: Vec<Option<Ready>> = vec![None; queues.len()];
    for row in sqlx::query(table.heads).bind(rows).fetch_all(session.db()).await? {
        let (place, words): (i64, Option<String>) = (row.try_get(0)?, row.try_get(1)?);
        let Some((turn, task)) = words.as_deref().and_then(|words| words.split_once(',')) else { continue };
        let place = usize::try_from(place - 1).ok().and_then(|place| heads.get_mut(place));
        if let (Some(place), Ok(turn), Ok(task)) = (place, turn.parse(), task.parse()) {
            *place = Some(just_before((turn, task)));
        }
    }
    Ok(queues.into_iter().zip(heads).filter_map(|(queue, head)| Some((queue, head?))).collect())
}

/// Take hold of the first tasks that nobody else holds, in the order of turns over all queues.
pub(super) async fn first(
    session: &mut Session<'_>,
    table: &Table,
    start: &Start,
    limit: usize,
    broken: &mut Vec<Spot>,
) -> Result<(Vec<Found>, Looked), Failure> {
    let started = Instant::now();
    let mut behind = None;
    let fronts = match &start.learn {
        None => start.fronts.clone(),
        Some(Learn::Of(asked)) => heads(session, table, asked.iter().map(|queue| queue.as_bytes().to_vec()).collect()).await?,
        Some(Learn::From(queue)) => {
            let names = names(session, table, queue, QUEUES_MAX).await?;
            behind = names.last().filter(|_| names.len() == QUEUES_MAX).cloned();
            heads(session, table, names).await?
        }
    };
    let mut look = Look {
        table,
        found: Vec::new(),
        broken,
        looked: Looked {
            is_head: start.is_head,
            learnt: start.learn.is_some(),
            took: started.elapsed(),
            fronts: Vec::with_capacity(fronts.len()),
            behind,
            found: Vec::new(),
        },
    };
    match <[_; 1]>::try_from(fronts) {
        Ok([(queue, place)]) => look.in_one(session, queue, place, limit).await?,
        Err(fronts) => look.in_several(session, fronts, limit).await?,
    }
    Ok((look.found, look.looked))
}

struct Look<'l> {
    table: &'l Table,
    found: Vec<Found>,
    broken: &'l mut Vec<Spot>,
    looked: Looked,
}

impl Look<'_> {
    /// Of one queue behind a place; of all of it, if there is nothing behind.
    async fn in_one(&mut self, session: &mut Session<'_>, queue: Vec<u8>, place: Ready, limit: usize) -> Result<(), Failure> {
        let mut place = place;
        loop {
            let started = Instant::now();
            let query = sqlx::query(self.table.first).bind(queue.clone()).bind(place.0).bind(place.1).bind(place.0);
            let rows = query.bind(count(limit)).fetch_all(session.db()).await?;
            if !self.looked.learnt {
                self.looked.took = started.elapsed();
            }
            for row in &rows {
                self.add(row, &queue)?;
            }
            let last = rows.last().map(|row| Ok::<_, sqlx::Error>((row.try_get(0)?, row.try_get(1)?))).transpose()?;
            if last.is_some() || place == HEAD {
                self.looked.fronts.push((queue, last));
                return Ok(());
            }
            place = HEAD;
        }
    }

    async fn in_several(
        &mut self,
        session: &mut Session<'_>,
        mut fronts: Vec<(Vec<u8>, Ready)>,
        limit: usize,
    ) -> Result<(), Failure> {
        let mut taken = 0;
        for _ in 0..ROUNDS_MAX {
            if taken >= limit || fronts.is_empty() {
                break;
            }
            fronts.sort_by_key(|(_, place)| *place);
            taken += self.round(session, &mut fronts, limit - taken).await?;
        }
        self.looked.fronts.extend(fronts.into_iter().map(|(queue, place)| (queue, Some(place))));
        Ok(())
    }

    /// Take what comes first in the queues whose fronts do, and move those on. Answers how many tasks others have not taken before.
    async fn round(
        &mut self,
        session: &mut Session<'_>,
        fronts: &mut Vec<(Vec<u8>, Ready)>,
        wanted: usize,
    ) -> Result<usize, Failure> {
        let next = fronts.get(ARMS).map(|(_, (turn, task))| (*turn, task.saturating_add(1)));
        let window: Vec<(Vec<u8>, Ready)> = fronts.drain(..fronts.len().min(ARMS)).collect();
        let mut seen: Vec<Vec<Ready>> = vec![Vec::new(); window.len()];
        let every = vec![wanted; window.len()];
        for row in in_arms(session, self.table.seen, &window, &every).await? {
            let queue: Vec<u8> = row.try_get(2)?;
            if let Some(arm) = window.iter().position(|(name, _)| *name == queue) {
                seen[arm].push((row.try_get(0)?, row.try_get(1)?));
            }
        }
        seen.iter_mut().for_each(|places| places.sort_unstable());
        let mut order: Vec<(Ready, usize)> =
            seen.iter().enumerate().flat_map(|(arm, places)| places.iter().map(move |place| (*place, arm))).collect();
        order.sort_unstable();
        let mut quotas = vec![0_usize; window.len()];
        for (_, arm) in order.iter().take_while(|(place, _)| next.is_none_or(|next| *place <= next)).take(wanted) {
            quotas[*arm] += 1;
        }
        let mut taken = 0;
        if quotas.iter().any(|quota| *quota > 0) {
            for row in in_arms(session, self.table.first_of_queues, &window, &quotas).await? {
                self.add(&row, &row.try_get::<Vec<u8>, _>(4)?)?;
                taken += 1;
            }
        }
        for (((queue, _), places), quota) in window.into_iter().zip(seen).zip(quotas) {
            if places.len() == quota && quota < wanted {
                self.looked.fronts.push((queue, None));
                continue;
            }
            let place = match quota.checked_sub(1) {
                Some(last) => places[last],
                None => just_before(places[0]),
            };
            fronts.push((queue, place));
        }
        self.found.sort_by_key(|found| (found.chosen.turn, found.chosen.task));
        Ok(taken)
    }

    /// Add what a row says, or note that it cannot be right.
    fn add(&mut self, row: &MySqlRow, queue: &[u8]) -> Result<(), sqlx::Error> {
        let (turn, task) = (row.try_get(0)?, row.try_get(1)?);
        let placed = placed_queue(queue.to_vec());
        match String::from_utf8(row.try_get(3)?) {
            Ok(user) if user.is_empty() != self.table.of_users && placed.as_bytes() == queue => {
                self.looked.found.push((queue.to_vec(), (turn, task)));
                let chosen = Chosen { turn, task, queue: placed, user, pick: None };
                self.found.push(Found { chosen, max_running: row.try_get(2)? });
            }
            _ => self.broken.push(Spot { queue: queue.to_vec(), at: turn, task }),
        }
        Ok(())
    }
}

/// The rows of a statement with [`arms`]: of each queue at most so many.
async fn in_arms(
    session: &mut Session<'_>,
    sql: &'static str,
    fronts: &[(Vec<u8>, Ready)],
    limits: &[usize],
) -> Result<Vec<MySqlRow>, sqlx::Error> {
    let mut query = sqlx::query(sql);
    for arm in 0..ARMS {
        let (queue, (turn, task)) = fronts.get(arm).cloned().unwrap_or_default();
        let limit = limits.get(arm).copied().unwrap_or_default();
        query = query.bind(queue).bind(turn).bind(task).bind(turn).bind(count(limit));
    }
    query.fetch_all(session.db()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_and_is_left_is_found_by_the_next_look() {
        let queue = |name: &str| name.as_bytes().to_vec();
        let mut looked = Looked {
            is_head: true,
            learnt: true,
            took: Duration::ZERO,
            fronts: vec![(queue("a"), Some((5, 9))), (queue("b"), None)],
            behind: None,
            found: vec![(queue("a"), (4, 8)), (queue("a"), (5, 9)), (queue("b"), (3, 7))],
        };
        looked.leave_all_but(&HashSet::from([9]));
        assert_eq!(looked.fronts, [(queue("a"), Some((4, 7))), (queue("b"), Some((3, 6)))]);
    }

    #[test]
    fn names_come_back_from_their_digits() {
        assert_eq!(bytes(&hex(b"a\xff.:/")), b"a\xff.:/");
    }
}
