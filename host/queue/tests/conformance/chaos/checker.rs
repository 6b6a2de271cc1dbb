//! Whether a history can be true of a queue that keeps its promises. Everything here is sure: what may or may not have happened proves nothing.
//!
//! Two operations have an order only if one was answered before the other was asked. An operation without an answer may have happened at any
//! moment after it was asked, or never.
//!
//! Where answers may be undone, as by a promotion that loses commits ([`Asked::Lose`]), an operation before and one after that prove nothing
//! together. Leases are unique all the same, and no write under one that has ended is accepted; users' limits and ends are not looked at.
//!
//! Where a server that breaks down may forget claims and renewals ([`Asked::Forget`]), a task that was claimed shortly before may be handed out again,
//! and numbers of leases may go back. What was settled stays so.

use std::collections::{BTreeMap, HashMap, HashSet};

use laelaps_queue::State;

use super::clock::Clock;
use super::history::{Answer, Asked, End, Held, Left, Moment, Operation, Taken};

/// More than these are not told.
const FINDINGS_MAX: usize = 50;
/// So long before a claim whoever finds that its lease has ended may have looked at the clock.
const LOOKED_BEFORE: Moment = 5_000_000;

/// Before a server breaks down, claims and renewals that are this old have reached the disk, however busy the machine is (PostgreSQL writes them
/// within three times its wal_writer_delay, which is 600 ms).
const FLUSHED_WITHIN: Moment = 30_000_000;

/// What is known of one claim of a task.
struct Claim<'h> {
    taken: &'h Taken,
    host: i64,
    begun: Moment,
    ended: Moment,
    /// The lease lasts at least until then, in milliseconds.
    until: i64,
    /// The last write under it that was accepted was asked for then.
    surely_until: Option<Moment>,
}

/// A write under a lease.
struct Write {
    held: Held,
    begun: Moment,
    ended: Option<Moment>,
    /// None if it is not known.
    accepted: Option<bool>,
    /// None if it does not end the attempt.
    end: Option<End>,
}

impl Write {
    /// When it was over for sure.
    fn over(&self) -> Moment {
        self.ended.unwrap_or(Moment::MAX)
    }

    fn may_have_been(&self) -> bool {
        self.accepted != Some(false)
    }
}

/// A renewal that was accepted.
struct Renewal {
    held: Held,
    begun: Moment,
    ended: Moment,
    alive_ms: i64,
}

/// What somebody did to a task by hand, unless it was refused.
struct ByHand<'h> {
    asked: &'h Asked,
    begun: Moment,
    /// None if it is not known to have happened.
    ended: Option<Moment>,
}

/// A history in the order of its tasks.
#[derive(Default)]
struct Stories<'h> {
    claims: BTreeMap<i64, Vec<Claim<'h>>>,
    writes: HashMap<i64, Vec<Write>>,
    by_hand: HashMap<&'h str, Vec<ByHand<'h>>>,
    deaths: HashMap<i64, Moment>,
    renewals: Vec<Renewal>,
    clock: Clock,
    /// When answers may have been undone: from when to when.
    losses: Vec<(Moment, Moment)>,
    /// When claims and renewals that were answered shortly before may have been forgotten.
    forgets: Vec<(Moment, Moment)>,
    /// Keys of which two submits were told so.
    new_twice: Vec<&'h str>,
    /// Keys that are there for sure.
    stored: HashSet<&'h str>,
    /// Keys of which a submit was told that they were new.
    created: HashSet<&'h str>,
    /// Keys that may be there.
    asked: HashSet<&'h str>,
    findings: Vec<String>,
}

/// What cannot be true of it, in words; empty if all of it can. `left` is what the queue holds once nothing waits or runs any more; nothing may
/// have been cleaned up.
pub(super) fn check(history: &[Operation], left: &[Left]) -> Vec<String> {
    let mut stories = Stories::default();
    for operation in history {
        stories.add(operation);
    }
    stories.sort();
    stories.leases_grow();
    stories.no_stale_write_was_accepted();
    stories.everything_ended(left);
    if stories.losses.is_empty() {
        stories.users_kept_their_limits();
        stories.every_run_is_explained();
        stories.every_end_is_right(left);
    }
    stories.findings.truncate(FINDINGS_MAX);
    stories.findings
}

impl<'h> Stories<'h> {
    fn find(&mut self, finding: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(finding);
        }
    }

    fn add(&mut self, operation: &'h Operation) {
        let Operation { begun, ended, asked, answer } = operation;
        let (begun, ended) = (*begun, ended.filter(|_| *answer != Answer::Unknown));
        match (asked, answer) {
            (_, Answer::Refused) => {}
            (Asked::Submit(keys), answer) => self.submitted(keys, answer),
            (Asked::Claim(host), Answer::Claimed(tasks)) => {
                for taken in tasks {
                    let claim = Claim {
                        taken,
                        host: *host,
                        begun,
                        ended: ended.unwrap_or(Moment::MAX),
                        until: taken.until,
                        surely_until: None,
                    };
                    self.claims.entry(taken.held.task).or_default().push(claim);
                }
            }
            (Asked::Claim(_), _) => {}
            (Asked::Renew(leases, alive_ms), answer) => {
                for (place, held) in leases.iter().enumerate() {
                    let accepted = accepted(answer, place);
                    self.write(Write { held: *held, begun, ended, accepted, end: None });
                    if let Some(ended) = ended.filter(|_| accepted == Some(true)) {
                        self.renewals.push(Renewal { held: *held, begun, ended, alive_ms: *alive_ms });
                    }
                }
            }
            (Asked::Settle(settled), answer) => {
                for (place, (held, end, follow_ups)) in settled.iter().enumerate() {
                    let accepted = accepted(answer, place);
                    self.write(Write { held: *held, begun, ended, accepted, end: Some(*end) });
                    self.asked.extend(follow_ups.iter().map(String::as_str));
                    if accepted == Some(true) {
                        self.stored.extend(follow_ups.iter().map(String::as_str));
                    }
                }
            }
            (Asked::Update(held), answer) => {
                self.write(Write { held: *held, begun, ended, accepted: accepted(answer, 0), end: None });
            }
            (Asked::Cancel(key) | Asked::ForceFinish(key) | Asked::Retry(key) | Asked::Damage(key), _) => {
                self.by_hand.entry(key).or_default().push(ByHand { asked, begun, ended });
            }
            (Asked::Clock(ahead_ms), _) => self.clock.step(begun, ended, *ahead_ms),
            (Asked::Forget, _) => self.forgets.push((begun, ended.unwrap_or(Moment::MAX))),
            (Asked::Lose, _) => self.losses.push((begun, ended.unwrap_or(Moment::MAX))),
            (Asked::Die(host), _) => self.deaths.extend(host.map(|host| (host, begun))),
        }
    }

    fn submitted(&mut self, keys: &'h [String], answer: &'h Answer) {
        self.asked.extend(keys.iter().map(String::as_str));
        let Answer::Submitted(created) = answer else { return };
        for (key, created) in keys.iter().zip(created) {
            self.stored.insert(key);
            if *created && !self.created.insert(key) {
                self.new_twice.push(key);
            }
        }
    }

    fn write(&mut self, write: Write) {
        self.writes.entry(write.held.task).or_default().push(write);
    }

    /// Whether what was answered in this time may have been undone by its end, or done where it was undone.
    fn is_uncertain(&self, from: Moment, to: Moment) -> bool {
        self.losses.iter().any(|(begun, ended)| *begun <= to && from <= *ended)
    }

    /// Whether a claim that was renewed until then may have been forgotten before this moment.
    fn may_be_forgotten(&self, claim: &Claim<'h>, before: Moment) -> bool {
        let last = claim.surely_until.unwrap_or_default().max(claim.ended);
        self.forgets
            .iter()
            .any(|(begun, ended)| claim.begun <= *ended && *begun <= before && begun.saturating_sub(FLUSHED_WITHIN) <= last)
    }

    fn sort(&mut self) {
        for Renewal { held, begun, ended, alive_ms } in std::mem::take(&mut self.renewals) {
            let until = self.clock.earliest(begun, ended).saturating_add(alive_ms);
            let claims = self.claims.get_mut(&held.task).into_iter().flatten();
            for claim in claims.filter(|claim| claim.taken.held == held) {
                claim.until = claim.until.max(until);
            }
        }
        for (task, claims) in &mut self.claims {
            // Numbers may begin again with a server that forgets.
            let forgets = &self.forgets;
            let before = |claim: &Claim<'_>| forgets.iter().filter(|(begun, _)| *begun <= claim.ended).count();
            claims.sort_by_key(|claim| (before(claim), claim.taken.held.lease));
            let accepted = self.writes.get(task).into_iter().flatten().filter(|write| write.accepted == Some(true));
            for write in accepted {
                for claim in claims.iter_mut().filter(|claim| claim.taken.held == write.held) {
                    claim.surely_until = claim.surely_until.max(Some(write.begun));
                }
            }
        }
    }

    /// A claim that was asked for after another one was answered has greater numbers, and no number is given out twice.
    fn leases_grow(&mut self) {
        let mut claims: Vec<&Claim<'h>> = self.claims.values().flatten().collect();
        claims.sort_by_key(|claim| claim.begun);
        let mut by_end: Vec<&Claim<'h>> = claims.clone();
        by_end.sort_by_key(|claim| claim.ended);
        let mut found = Vec::new();
        let mut given: HashMap<i64, &Claim<'h>> = HashMap::with_capacity(claims.len());
        let (mut answered, mut greatest) = (by_end.into_iter().peekable(), None);
        for claim in claims {
            while let Some(earlier) = answered.next_if(|earlier| earlier.ended < claim.begun) {
                greatest = greatest.max(Some(earlier.taken.held.lease));
            }
            let held = claim.taken.held;
            if let Some(other) = given.insert(held.lease, claim) {
                found.push(format!("lease {} was given out twice: {:?} and {:?}", held.lease, other.taken, claim.taken));
            } else if greatest >= Some(held.lease) && self.losses.is_empty() && self.forgets.is_empty() {
                found.push(format!("lease {} was given out after lease {greatest:?}: {:?}", held.lease, claim.taken));
            }
        }
        found.into_iter().for_each(|finding| self.find(finding));
    }

    /// A write under a lease that had ended changes nothing and is told so.
    fn no_stale_write_was_accepted(&mut self) {
        let mut found = Vec::new();
        for (task, writes) in &self.writes {
            let claims = self.claims.get(task).map_or(&[][..], Vec::as_slice);
            let mut settled: HashMap<i64, &Write> = HashMap::new();
            for write in writes.iter().filter(|write| write.accepted == Some(true)) {
                let Held { lease, .. } = write.held;
                if let Some(later) = self.later_claim(claims, write) {
                    found.push(format!(
                        "a write under lease {lease} of task {task} was accepted after the claim {:?}",
                        later.taken
                    ));
                }
                if let Some(ended) = self.ended_by_hand(claims, write) {
                    found.push(format!("a write under lease {lease} of task {task} was accepted after {:?}", ended.asked));
                }
                if write.end.is_some()
                    && let Some(before) = settled.insert(lease, write)
                    && !self.is_uncertain(before.begun, write.over())
                {
                    found.push(format!("lease {lease} of task {task} was settled twice"));
                }
            }
            for write in writes.iter().filter(|write| write.accepted == Some(true) && write.end.is_none()) {
                let Some(settled) = settled.get(&write.held.lease) else { continue };
                if settled.over() < write.begun && !self.is_uncertain(settled.begun, write.over()) {
                    found.push(format!(
                        "a write under lease {} of task {task} was accepted after it was settled",
                        write.held.lease
                    ));
                }
            }
        }
        found.into_iter().for_each(|finding| self.find(finding));
    }

    /// A claim of the same task that came after the one that this was written under, and before it was written.
    fn later_claim<'c>(&self, claims: &'c [Claim<'h>], write: &Write) -> Option<&'c Claim<'h>> {
        let own = claims.iter().find(|claim| claim.taken.held == write.held);
        claims.iter().find(|claim| {
            // Numbers of leases may go back where answers are undone, or the numbers that were given out last are forgotten.
            let comes_after = if self.losses.is_empty() && self.forgets.is_empty() {
                claim.taken.held.lease > write.held.lease
            } else {
                own.is_some_and(|own| own.ended < claim.begun)
            };
            comes_after && claim.ended < write.begun && !self.is_uncertain(claim.begun, write.over())
        })
    }

    /// What ended the task by hand after this lease was given out and before this was written.
    fn ended_by_hand(&self, claims: &[Claim<'h>], write: &Write) -> Option<&ByHand<'h>> {
        let claim = claims.iter().find(|claim| claim.taken.held == write.held)?;
        let by_hand = self.by_hand.get(claim.taken.key.as_str())?;
        let between = |done: &&ByHand<'h>| {
            let comes_between = claim.ended < done.begun && done.ended.is_some_and(|ended| ended < write.begun);
            comes_between && !self.is_uncertain(done.begun, write.over())
        };
        by_hand.iter().filter(|done| matches!(done.asked, Asked::Cancel(_) | Asked::ForceFinish(_))).find(between)
    }

    /// A task runs for sure from the answer to its claim until the last accepted write under that lease is asked for.
    fn users_kept_their_limits(&mut self) {
        let mut edges: HashMap<&str, Vec<(Moment, i64)>> = HashMap::new();
        let mut limits: HashMap<&str, i64> = HashMap::new();
        for claim in self.claims.values().flatten() {
            let (Some(user), Some(limit)) = (claim.taken.user.as_deref(), claim.taken.max_running) else { continue };
            let limit = i64::from(limit.max(1));
            limits.entry(user).and_modify(|most| *most = limit.max(*most)).or_insert(limit);
            if let Some(until) = claim.surely_until.filter(|until| *until > claim.ended) {
                edges.entry(user).or_default().extend([(claim.ended, 1), (until, -1)]);
            }
        }
        let mut found = Vec::new();
        for (user, mut edges) in edges {
            edges.sort_unstable();
            let mut running = 0;
            for (at, change) in edges {
                running += change;
                if running > limits[user] {
                    found.push(format!("{running} tasks of user {user:?} ran at {at}, and {} may", limits[user]));
                    break;
                }
            }
        }
        found.into_iter().for_each(|finding| self.find(finding));
    }

    /// A task is handed out again only if it was to wait again, or its lease had ended, or its host was dead.
    fn every_run_is_explained(&mut self) {
        let mut found = Vec::new();
        for (task, claims) in &self.claims {
            let writes = self.writes.get(task).map_or(&[][..], Vec::as_slice);
            for (claim, next) in claims.iter().zip(claims.iter().skip(1)) {
                let key = claim.taken.key.as_str();
                let by_hand = self.by_hand.get(key).map_or(&[][..], Vec::as_slice);
                let ends = || writes.iter().filter(|write| write.held == claim.taken.held && write.may_have_been());
                let revived = by_hand.iter().any(|done| matches!(done.asked, Asked::Retry(_)) && done.begun < next.ended);
                let comes_after = |write: &Write| self.forgets.is_empty() || write.over() < next.begun;
                if ends().any(|write| write.end == Some(End::Finish) && write.accepted == Some(true) && comes_after(write)) {
                    found.push(format!(
                        "task {key:?} was finished under {:?} and then handed out as {:?}",
                        claim.taken, next.taken
                    ));
                    continue;
                }
                let waits = ends().any(|write| write.end == Some(End::Again)) || revived;
                let over = self.clock.latest(claim.begun.saturating_sub(LOOKED_BEFORE), next.ended) >= claim.until;
                let dead = self.deaths.get(&claim.host).is_some_and(|death| *death < next.ended);
                if !(waits || over || dead || self.may_be_forgotten(claim, next.ended)) {
                    found.push(format!("task {key:?} was handed out as {:?} while it ran as {:?}", next.taken, claim.taken));
                }
            }
        }
        found.into_iter().for_each(|finding| self.find(finding));
    }

    fn everything_ended(&mut self, left: &[Left]) {
        let mut there: HashSet<&str> = HashSet::with_capacity(left.len());
        for one in left {
            if !there.insert(&one.key) {
                self.find(format!("key {:?} is there twice", one.key));
            }
            if !one.state.is_terminal() {
                self.find(format!("task {:?} is {} and comes to no end", one.key, one.state.as_str()));
            }
            if !self.asked.contains(one.key.as_str()) {
                self.find(format!("nobody submitted task {:?}", one.key));
            }
        }
    }

    fn every_end_is_right(&mut self, left: &[Left]) {
        let wrong: Vec<String> = left.iter().filter_map(|one| self.wrong_end(one)).collect();
        let there: HashSet<&str> = left.iter().map(|one| one.key.as_str()).collect();
        let mut missing: Vec<&str> = self.stored.iter().filter(|key| !there.contains(**key)).copied().collect();
        missing.sort_unstable();
        let missing = missing.into_iter().map(|key| format!("task {key:?} was stored and is gone"));
        let new_twice = std::mem::take(&mut self.new_twice).into_iter().map(|key| format!("task {key:?} was new twice"));
        wrong.into_iter().chain(missing).chain(new_twice).for_each(|finding| self.find(finding));
    }

    /// Whether a task's state does not follow from what was done to it.
    fn wrong_end(&self, left: &Left) -> Option<String> {
        let writes = self.writes.get(&left.task).map_or(&[][..], Vec::as_slice);
        let by_hand = self.by_hand.get(left.key.as_str()).map_or(&[][..], Vec::as_slice);
        let settled = |end: End| writes.iter().any(move |write| write.end == Some(end) && write.may_have_been());
        let was_finished = writes.iter().any(|write| write.end == Some(End::Finish) && write.accepted == Some(true));
        let cancelled = || by_hand.iter().any(|done| matches!(done.asked, Asked::Cancel(_)));
        let forced = || by_hand.iter().any(|done| matches!(done.asked, Asked::ForceFinish(_)));
        let damaged = || by_hand.iter().any(|done| matches!(done.asked, Asked::Damage(_)));
        let is_right = match left.state {
            State::Finished => settled(End::Finish) || forced(),
            State::Cancelled => cancelled(),
            // A task that was lost too often fails as well, and so does one that nobody can read.
            State::Failed => settled(End::Reject) || self.claims.contains_key(&left.task) || damaged(),
            State::Waiting | State::Running => true,
        };
        if was_finished && left.state != State::Finished {
            return Some(format!("task {:?} was finished, and is {}", left.key, left.state.as_str()));
        }
        (!is_right).then(|| format!("nobody made task {:?} {}", left.key, left.state.as_str()))
    }
}

/// What was answered for one of several; None if it is not known.
fn accepted(answer: &Answer, place: usize) -> Option<bool> {
    match answer {
        Answer::Held(answers) => answers.get(place).copied(),
        _ => None,
    }
}
