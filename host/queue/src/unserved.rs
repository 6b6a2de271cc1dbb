//! Tasks of types that some hosts do not serve. A claim that meets one puts it apart, so that no claim of such a host meets it again; claims of hosts
//! that serve its type take it back to where it waits, in its old place, and choose from there.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::claim::AcceptsMark;
use crate::{Accepts, Attempt, Claim, ClaimedTask, Event, Policy, Settlement, Verdict};

/// Whoever looked among these tasks and found nothing for it looks again after this.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The most kinds that one look sees.
pub(crate) const KINDS_MAX: usize = 1_000;
/// The most kinds of which one claim takes back tasks; the next one goes on behind them.
const TAKEN_KINDS_MAX: usize = 32;
/// How often one claim chooses anew after it has put away what stood in its way; then it leaves the rest to the next.
pub(crate) const ROUNDS_MAX: usize = 10;
/// Each round asks for so many times as much as the one before, up to a bound.
const FACTOR: u32 = 4;
const ASKED_MAX: u32 = 1_000;
/// One claim puts this many apart, and then leaves the rest to the next, so that it holds up nobody for long.
const APART_MAX: usize = 2_000;
/// How often one claim looks on that has taken nothing back, while there may be more.
pub(crate) const LOOKS_MAX: usize = 10;
/// Whoever took something back may have got what its users' limits keep back for now: it looks again after this.
const AGAIN: Duration = Duration::from_millis(10);
/// Sets of queues whose looks are remembered.
const REMEMBERED_MAX: usize = 100;

/// A queue, as the tables name it, and a type. Both as bytes, since somebody may have written what is no text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) queue: Vec<u8>,
    pub(crate) task_type: Vec<u8>,
}

/// Where a task waits apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which of the kinds.
    pub(crate) kind: usize,
    pub(crate) user: Vec<u8>,
    pub(crate) turn: i64,
    pub(crate) task: i64,
}

/// When and where the claims of this program look among these tasks, by the queues that they ask for.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    seen: Mutex<HashMap<Queues, Seen>>,
    /// How often this program itself has put tasks apart.
    came_in: AtomicU64,
}

type Queues = Option<Arc<[String]>>;

/// What was seen by the last look.
#[derive(Debug)]
struct Seen {
    at: Instant,
    /// With this; None: by who accepts all.
    accepts: Option<AcceptsMark>,
    /// There may be more for who looks at once.
    again: bool,
    next: From,
}

/// Where a look goes on from the one before, so that all kinds and all users have their turn.
#[derive(Clone, Debug, Default)]
pub(crate) struct From {
    /// Kinds behind this one.
    pub(crate) kind: Kind,
    /// Users behind this one; tasks without user are looked at each time.
    pub(crate) user: Vec<u8>,
    /// What this program had put apart before that look.
    came_in: u64,
}

/// Whether to look.
pub(crate) enum Look {
    Now(From),
    /// It was done a moment ago: not before so long.
    After(Duration),
}

impl Watch {
    /// Whether a claim has to look.
    pub(crate) fn look(&self, claim: &Claim) -> Look {
        let came_in = self.came_in.load(Ordering::SeqCst);
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(seen) = seen.get(&claim.queues) else { return Look::Now(From { came_in, ..From::default() }) };
        let is_known = match (&claim.accepts, &seen.accepts) {
            (None, None) => true,
            (Some(accepts), Some(mark)) => mark.is(accepts),
            _ => false,
        };
        let rest = LOOK_INTERVAL.saturating_sub(seen.at.elapsed());
        if is_known && !seen.again && seen.next.came_in == came_in && !rest.is_zero() {
            return Look::After(rest);
        }
        Look::Now(From { came_in, ..seen.next.clone() })
    }

    /// What a look from somewhere on has seen: whether there may be more at once, and behind which kind and user to go on. Answers after how long to look
    /// again, if there is more.
    pub(crate) fn looked(&self, claim: &Claim, from: &From, again: bool, (kind, user): (Kind, Vec<u8>)) -> Option<Duration> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= REMEMBERED_MAX {
            seen.clear();
        }
        let accepts = claim.accepts.as_ref().map(Accepts::mark);
        seen.insert(
            claim.queues.clone(),
            Seen { at: Instant::now(), accepts, again, next: From { kind, user, came_in: from.came_in } },
        );
        (again && claim.accepts.is_some()).then_some(AGAIN)
    }

    /// This program itself has written settlements. If they put tasks apart, whoever looks next sees them.
    pub(crate) fn settled(&self, settlements: &[Settlement]) {
        if settlements.iter().any(|settlement| matches!(settlement.verdict(), Verdict::Unserved { .. })) {
            self.came_in.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Of the kinds that a look saw, those of which this claim takes tasks; and where the next look goes on, and whether it may find more at once.
pub(crate) fn wanted(kinds: Vec<Kind>, from: &From, claim: &Claim) -> (Vec<Kind>, Kind, bool) {
    let is_full = kinds.len() >= KINDS_MAX;
    let last = kinds.last().filter(|_| is_full).cloned().unwrap_or_default();
    let queues: Option<BTreeSet<&[u8]>> = claim
        .queues
        .as_deref()
        .map(|queues| queues.iter().map(|queue| crate::task::stored_queue(Some(queue)).as_bytes()).collect());
    let is_wanted = |kind: &Kind| {
        queues.as_ref().is_none_or(|queues| queues.contains(kind.queue.as_slice()))
            && claim.accepts.as_ref().is_none_or(|accepts| accepts.accepts(&String::from_utf8_lossy(&kind.task_type)))
    };
    let mut wanted: Vec<Kind> = kinds.into_iter().filter(is_wanted).collect();
    let next = if wanted.len() > TAKEN_KINDS_MAX { wanted[TAKEN_KINDS_MAX - 1].clone() } else { last };
    wanted.truncate(TAKEN_KINDS_MAX);
    // From somewhere on it did not see what is before that.
    let again = is_full || !wanted.is_empty() || from.kind != Kind::default();
    (wanted, next, again)
}

/// Of the first places of each kind, those that are taken back: at most so many of tasks without user, in their order; and as many of users, one user
/// after the other. Also the user behind whom the next look begins.
pub(crate) fn first(places: Vec<Place>, limit: usize) -> (Vec<Place>, Vec<u8>) {
    let (mut nobodys, mut users): (Vec<Place>, Vec<Place>) = places.into_iter().partition(|place| place.user.is_empty());
    nobodys.sort_unstable_by_key(|place| (place.turn, place.task));
    nobodys.truncate(limit);
    users.sort_unstable_by(|one, other| (&one.user, one.turn, one.task).cmp(&(&other.user, other.turn, other.task)));
    // With fewer there are none behind them, and the round begins anew.
    let last = users.get(limit.saturating_sub(1)).map(|place| place.user.clone()).unwrap_or_default();
    users.truncate(limit);
    nobodys.append(&mut users);
    (nobodys, last)
}

/// What becomes of the tasks that a claim is given in its rounds. While none of them is of a type that its host serves, each round asks for more than the one
/// before, so that a host comes quickly through many that are others' business.
#[derive(Debug)]
pub(crate) struct Sieve<'c> {
    claim: &'c Claim,
    /// How much more than the claim the next round asks for.
    factor: u32,
    apart: usize,
}

impl<'c> Sieve<'c> {
    pub(crate) fn new(claim: &'c Claim) -> Self {
        Self { claim, factor: 1, apart: 0 }
    }

    /// What the next round asks for.
    pub(crate) fn asked(&self) -> Cow<'c, Claim> {
        if self.factor == 1 {
            return Cow::Borrowed(self.claim);
        }
        let more = |limit: u32| limit.saturating_mul(self.factor).min(ASKED_MAX.max(limit));
        Cow::Owned(Claim { limit: more(self.claim.limit), limited: self.claim.limited.map(more), ..self.claim.clone() })
    }

    /// Of what one round was given, what the claim takes; and what puts the others apart. What its host serves and is more than was asked for at first is among
    /// them: the host takes it back with its next claims.
    pub(crate) fn sift(&mut self, tasks: Vec<ClaimedTask>) -> (Vec<ClaimedTask>, Vec<Settlement>) {
        let Some(accepts) = &self.claim.accepts else { return (tasks, Vec::new()) };
        // A round that asks for no more than the claim is given no more than that.
        let asked = if self.factor == 1 { (u32::MAX, None) } else { (self.claim.limit, self.claim.limited) };
        let (mut room, mut limited_room) = (asked.0, asked.1.unwrap_or(asked.0));
        let fits = |task: &ClaimedTask| {
            let limited = u32::from(task.max_running.is_some());
            let fits = accepts.accepts(&task.task_type) && room > 0 && limited <= limited_room;
            if fits {
                (room, limited_room) = (room - 1, limited_room - limited);
            }
            fits
        };
        let (served, others): (Vec<ClaimedTask>, Vec<ClaimedTask>) = tasks.into_iter().partition(fits);
        if served.is_empty() {
            self.factor = self.factor.saturating_mul(FACTOR);
        }
        self.apart += others.len();
        (served, others.iter().map(apart).collect())
    }

    /// Enough for one claim: the next one goes on.
    pub(crate) fn is_enough(&self) -> bool {
        self.apart >= APART_MAX
    }
}

/// Puts a task apart.
fn apart(task: &ClaimedTask) -> Settlement {
    let event = Event::Unrouted { message: String::new() };
    Settlement::of(task.lease_ref, event, Attempt::of(task), &Policy::default(), 0.0, None, Vec::new())
}
