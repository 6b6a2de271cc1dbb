//! Whose task is next. Pure: the database brings the users and their first tasks, this picks.
//!
//! Users are picked one at a time by `max_running / (running + 1)`, highest first, then by the [`turn`] of their first task. A user's first
//! ready task is its candidate, and the candidate's own `max_running` counts. Running is counted after each pick, so that a batch cannot
//! overshoot. Tasks without a user stand for one user that never has anything running.
//!
//! Ageing: every [`AGED_EVERY`]th pick goes to the open user that was passed over longest, if that is more than [`AGED_AFTER`] picks. Those
//! before it in that order are fewer than the users with waiting work, so that none is passed over for more than
//! `AGED_AFTER + AGED_EVERY * users` picks.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, VecDeque};

use crate::NewTask;

/// A user is aged that was passed over for more picks than this.
pub(crate) const AGED_AFTER: i64 = 64;
/// One pick of this many goes to the user that is aged most, if any is.
pub(crate) const AGED_EVERY: i64 = 8;

/// So far apart are the turns of two priorities: more than all moments that a task may wait for.
pub(crate) const PRIORITY_STEP: i64 = 1_000_000_000_000_000;

/// Where a ready task stands among those of its user, in one number: the smaller is first. Tasks of a smaller priority come before others, and
/// of one priority the older one. What somebody wrote into its row counts as the nearest that is allowed. The databases reckon the same.
pub(crate) fn turn(priority: i64, run_at: i64) -> i64 {
    let (least, most) = (i64::from(*NewTask::PRIORITIES.start()), i64::from(*NewTask::PRIORITIES.end()));
    run_at.clamp(0, NewTask::HELD_AT.0) + priority.clamp(least, most) * PRIORITY_STEP
}

/// Whether a turn is one of the usual priority.
pub(crate) fn is_usual(turn: i64) -> bool {
    (0..PRIORITY_STEP).contains(&turn)
}

/// A ready task of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its [`turn`].
    pub(crate) turn: i64,
    /// Its row.
    pub(crate) task: i64,
    /// The most tasks of its user at once, as it sees it. None: no limit.
    pub(crate) max_running: Option<i64>,
}

/// A user with ready tasks.
#[derive(Clone, Debug)]
pub(crate) struct Account {
    /// Its name; empty for the tasks without user.
    pub(crate) user: String,
    /// Its tasks that run, leased and buffered ones included.
    pub(crate) running: i64,
    /// The number of the pick at which it was last picked, or came in.
    pub(crate) picked: i64,
    /// Its first tasks, in their order, as far as they are known.
    pub(crate) candidates: VecDeque<Candidate>,
    /// What comes after them.
    pub(crate) rest: Rest,
}

/// What follows the known candidates of an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rest {
    /// Nothing: they are all.
    Nothing,
    /// Tasks that are not known here.
    Unknown,
    /// More of the same as the last one, without end: to estimate how many of each account will be picked.
    Alike,
}

impl Account {
    /// The candidate, if it may run now.
    fn open(&self) -> Option<&Candidate> {
        let candidate = self.candidates.front()?;
        let limit = candidate.max_running.filter(|_| !self.user.is_empty());
        limit.is_none_or(|limit| self.running < limit.max(1)).then_some(candidate)
    }
}

/// A task that was picked: which account's, and which task.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pick {
    /// The index of the account.
    pub(crate) account: usize,
    /// The task.
    pub(crate) candidate: Candidate,
}

/// A place in the order of picks. The greatest is picked first.
struct Place {
    max_running: i64,
    /// Counted for the weight: none without a user.
    running: i64,
    turn: i64,
    task: i64,
    account: usize,
    /// The account's running when the place was taken: tells a place that was overtaken by an aged pick.
    at_running: i64,
}

impl Place {
    fn of(accounts: &[Account], account: usize) -> Option<Self> {
        let owner = &accounts[account];
        let candidate = owner.open()?;
        Some(Self {
            max_running: candidate.max_running.unwrap_or(1),
            running: if owner.user.is_empty() { 0 } else { owner.running },
            turn: candidate.turn,
            task: candidate.task,
            account,
            at_running: owner.running,
        })
    }
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        // max / (running + 1) without rounding.
        let mine = i128::from(self.max_running) * (i128::from(other.running) + 1);
        let theirs = i128::from(other.max_running) * (i128::from(self.running) + 1);
        mine.cmp(&theirs).then_with(|| (other.turn, other.task).cmp(&(self.turn, self.task)))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Place {}

/// Pick at most `limit` tasks; the first pick has the number `first_pick`. Ends early when an account runs into tasks that are not known
/// here, since one of those could be next.
pub(crate) fn pick(accounts: &mut [Account], limit: usize, first_pick: i64) -> Vec<Pick> {
    let mut picks = Vec::new();
    let mut places: BinaryHeap<Place> = (0..accounts.len()).filter_map(|account| Place::of(accounts, account)).collect();
    for number in (first_pick..).take(limit) {
        let Some(account) = aged(accounts, number).or_else(|| highest(accounts, &mut places)) else { break };
        let owner = &mut accounts[account];
        let Some(candidate) = owner.candidates.pop_front() else { break };
        owner.running += 1;
        owner.picked = number;
        if owner.candidates.is_empty() && owner.rest == Rest::Alike {
            owner.candidates.push_back(candidate.clone());
        }
        picks.push(Pick { account, candidate });
        if owner.candidates.is_empty() && owner.rest == Rest::Unknown {
            break;
        }
        places.extend(Place::of(accounts, account));
    }
    picks
}

/// The account of the highest place, leaving out places that an aged pick has overtaken: their accounts stand further down again.
fn highest(accounts: &[Account], places: &mut BinaryHeap<Place>) -> Option<usize> {
    std::iter::from_fn(|| places.pop())
        .find(|place| accounts[place.account].running == place.at_running)
        .map(|place| place.account)
}

/// The open account that was passed over longest, if this pick is one for those and it was passed over for long enough.
fn aged(accounts: &[Account], number: i64) -> Option<usize> {
    if number % AGED_EVERY != 0 {
        return None;
    }
    let open = (0..accounts.len()).filter(|&account| accounts[account].open().is_some());
    let longest = open.min_by_key(|&account| accounts[account].picked)?;
    (number - accounts[longest].picked > AGED_AFTER).then_some(longest)
}

/// How many tasks of each account a batch could need, if all tasks of an account are like its oldest: one more than it would pick of them,
/// so that a pick does not run into the unknown.
pub(crate) fn estimate(heads: &[Account], limit: usize, first_pick: i64) -> Vec<usize> {
    let mut alike: Vec<Account> = heads.iter().map(|head| Account { rest: Rest::Alike, ..head.clone() }).collect();
    let mut needed = vec![0; heads.len()];
    for pick in pick(&mut alike, limit, first_pick) {
        needed[pick.account] += 1;
    }
    needed.into_iter().map(|picks| if picks == 0 { 0 } else { picks + 1 }).collect()
}

#[cfg(test)]
mod tests;
