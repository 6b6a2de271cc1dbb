//! What is set against each other: every operation on one task, and every state in which the task may be.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Accepts, Beat, Claim, ClaimedTask, Error, Event, HostDescription, HostId, LeaseAnswer, LeaseRef, NewTask, PluginVersion,
    Policy, Progress, Queue, Settlement, State, TaskId, Timestamp,
};

use super::schedule::Side;
use crate::fixture::{Fixture, LONG, PATIENCE, finish, settled, task_of, with_follow_ups};

/// What is done to the task. Some do more: a claim moves what is due, takes others of its user, and folds users' changes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Submit,
    Claim,
    ClaimAlone,
    ClaimOldest,
    /// By a host that serves no type of these.
    ClaimOfStranger,
    Heartbeat,
    Finish,
    FinishWithFollowUps,
    GiveBack,
    /// Its host has no plugin for it any more.
    PutApart,
    UpdateData,
    Cancel,
    ForceFinish,
    Retry,
    Reclaim,
    HandOn,
    ReleaseHeld,
    DropHeld,
    CleanUp,
    CancelById,
    RetryById,
    /// Its host is back after it was thought dead.
    Excuse,
    /// Its host says which plugin versions it runs.
    NoteRunning,
    /// Its host gives a first sign of life.
    GiveSign,
}

impl Operation {
    pub(super) const ALL: [Self; 24] = [
        Self::Submit,
        Self::Claim,
        Self::ClaimAlone,
        Self::ClaimOldest,
        Self::ClaimOfStranger,
        Self::Heartbeat,
        Self::Finish,
        Self::FinishWithFollowUps,
        Self::GiveBack,
        Self::PutApart,
        Self::UpdateData,
        Self::Cancel,
        Self::ForceFinish,
        Self::Retry,
        Self::Reclaim,
        Self::HandOn,
        Self::ReleaseHeld,
        Self::DropHeld,
        Self::CleanUp,
        Self::CancelById,
        Self::RetryById,
        Self::Excuse,
        Self::NoteRunning,
        Self::GiveSign,
    ];

    /// Whether it writes under the lease of the task.
    fn names_a_lease(self) -> bool {
        matches!(
            self,
            Self::Heartbeat
                | Self::Finish
                | Self::FinishWithFollowUps
                | Self::GiveBack
                | Self::PutApart
                | Self::UpdateData
                | Self::Excuse
        )
    }

    /// Whether the pair is worth a look on PerfectQueue's table. A lease is known there only to the process that claimed, and a process does one
    /// thing at a time under one lease.
    pub(super) fn is_beside(self, other: Self) -> bool {
        // To reclaim is to do nothing, and what is not served stays where it is.
        let is_idle = [Self::Reclaim, Self::ClaimOfStranger, Self::PutApart].iter().any(|idle| [self, other].contains(idle));
        !(is_idle || self.names_a_lease() && other.names_a_lease())
    }

    /// Whether it does anything to a task in this state, so that the pair is worth a look.
    pub(super) fn meets(self, place: Place) -> bool {
        match self {
            Self::Submit => true,
            Self::Claim | Self::ClaimOldest => !matches!(place, Place::Nowhere | Place::Ended),
            Self::ClaimAlone => matches!(place, Place::Suspect | Place::Ready | Place::DueSuspect),
            Self::ClaimOfStranger => matches!(place, Place::Ready | Place::Due | Place::Apart | Place::Suspect),
            Self::Heartbeat | Self::Finish | Self::FinishWithFollowUps | Self::GiveBack | Self::PutApart | Self::UpdateData => {
                matches!(place, Place::Running | Place::Overdue | Place::Lost)
            }
            Self::Cancel | Self::ForceFinish | Self::Retry => place != Place::Nowhere,
            Self::CancelById | Self::RetryById => {
                matches!(place, Place::Due | Place::Running | Place::Lost | Place::Ended | Place::Damaged)
            }
            Self::Excuse => matches!(place, Place::Overdue | Place::Lost),
            Self::Reclaim => matches!(place, Place::Overdue | Place::Running | Place::Ready | Place::Lost),
            Self::HandOn => matches!(place, Place::Running | Place::Overdue | Place::Ready | Place::Lost),
            Self::NoteRunning | Self::GiveSign => matches!(place, Place::Running | Place::Overdue),
            Self::ReleaseHeld | Self::DropHeld => place == Place::Held,
            Self::CleanUp => matches!(place, Place::Ended | Place::Running),
        }
    }
}

/// Where the task stands when both begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is none of its key.
    Nowhere,
    Ready,
    /// Scheduled, and its time has come.
    Due,
    /// Scheduled for much later.
    Later,
    Held,
    /// It waits apart, for a host that serves its type. Only on tables of our own.
    Apart,
    /// Has to run alone.
    Suspect,
    /// Has to run alone, and its time has come.
    DueSuspect,
    Running,
    /// Running, and its lease has ended.
    Overdue,
    /// It was lost with its lease, and waits again.
    Lost,
    /// Cancelled, and its retention has ended.
    Ended,
    /// It waits, and its data cannot be read. Only on PerfectQueue's table, where that is seen by the claim.
    Damaged,
}

impl Place {
    pub(super) const ALL: [Self; 13] = [
        Self::Nowhere,
        Self::Ready,
        Self::Due,
        Self::Later,
        Self::Held,
        Self::Apart,
        Self::Suspect,
        Self::DueSuspect,
        Self::Running,
        Self::Overdue,
        Self::Lost,
        Self::Ended,
        Self::Damaged,
    ];
}

/// One task and its company, made anew for each schedule.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    of_perfectqueue: bool,
    number: usize,
    user: &'static str,
    /// For which host each side claims.
    hosts: [HostId; 2],
    /// The side for whose host the task runs, if it does.
    holder: Side,
    /// What a watchdog knows that host by.
    identity: String,
    claimed: Option<ClaimedTask>,
    /// The task's number.
    id: TaskId,
}

/// What an operation came to; for people, and for what has to hold between two.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It was settled under its lease.
    Settled,
    /// These were claimed.
    Claimed(Vec<LeaseRef>),
    /// Anything else, in words.
    Other(#[expect(dead_code, reason = "it is for people")] String),
}

impl Scene {
    /// Bring the task to its place, by operations of the queue, with nobody beside them. `with_user`: it belongs to a user of whom one task may
    /// run, and another one waits.
    pub(super) async fn set(
        fixture: &Fixture,
        sides: [&Queue; 2],
        operations: [Operation; 2],
        number: usize,
        (place, with_user): (Place, bool),
    ) -> Self {
        let identity = format!("host {number}");
        let holder = Side::BOTH.into_iter().find(|side| operations[side.place()].names_a_lease()).unwrap_or(Side::Left);
        let of_perfectqueue = fixture.is_perfectqueue();
        let hosts = if of_perfectqueue {
            // What a process has not entered, and not claimed, it knows nothing of.
            let mut hosts = [HostId(0); 2];
            for side in Side::BOTH {
                let name = if side == holder { &identity } else { &format!("beside {number}") };
                hosts[side.place()] = register(sides[side.place()], name).await;
            }
            hosts
        } else {
            [fixture.host_as(&identity).await; 2]
        };
        let user = if with_user { "user" } else { "" };
        let holding = if of_perfectqueue { sides[holder.place()] } else { &fixture.queue };
        let mut scene = Self { of_perfectqueue, number, user, hosts, holder, identity, claimed: None, id: TaskId(0) };
        let now = fixture.backend().now().await.unwrap();
        match place {
            Place::Nowhere => {}
            Place::Ready => fixture.submit(&[scene.task()]).await,
            Place::Due => {
                let due = Timestamp(now.0 + 4);
                fixture.submit(&[NewTask { run_at: Some(due), ..scene.task() }]).await;
                fixture.passes(due).await;
            }
            Place::Later => fixture.submit(&[NewTask { run_at: Some(now.plus(LONG)), ..scene.task() }]).await,
            Place::Held => fixture.submit(&[scene.task().on_hold()]).await,
            Place::Apart => {
                fixture.submit(&[scene.task()]).await;
                assert!(scene.take(holding, &serving_none(scene.claim(holder))).await.unwrap().is_empty());
            }
            Place::Suspect => scene.make_suspect(fixture, None).await,
            Place::DueSuspect => scene.make_suspect(fixture, Some(Duration::from_millis(4))).await,
            Place::Running => scene.run(fixture, holding, LONG).await,
            Place::Overdue => scene.run_over(fixture, holding).await,
            Place::Lost if of_perfectqueue => {
                scene.run(fixture, holding, LONG).await;
                let lost = [scene.identity.clone()];
                assert_eq!(fixture.backend().hand_on(&lost, &fixture.config.policy).await.unwrap().tasks.len(), 1);
                scene.identity = format!("back {number}");
                scene.hosts[holder.place()] = register(holding, &scene.identity).await;
            }
            Place::Lost => {
                scene.run_over(fixture, holding).await;
                fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
            }
            Place::Damaged => {
                fixture.submit(&[scene.task()]).await;
                fixture.damage_every_task().await;
            }
            Place::Ended => {
                fixture.submit(&[scene.task()]).await;
                fixture.backend().cancel(&scene.key(), Duration::ZERO).await.unwrap();
                let ended = fixture.get(&scene.key()).await.retained_until.unwrap();
                fixture.passes(ended).await;
            }
        }
        if place != Place::Nowhere {
            scene.id = fixture.get(&scene.key()).await.id;
        }
        if with_user {
            fixture.submit(&[task_of(scene.user, &format!("next {number}"), Some(1))]).await;
        }
        scene
    }

    /// What a watchdog knows its host by.
    pub(super) fn identity(&self) -> &str {
        &self.identity
    }

    fn key(&self) -> String {
        format!("task {}", self.number)
    }

    fn task(&self) -> NewTask {
        task_of(self.user, &self.key(), (!self.user.is_empty()).then_some(1))
    }

    async fn run(&mut self, fixture: &Fixture, holding: &Queue, alive_time: Duration) {
        fixture.submit(&[self.task()]).await;
        let claim = Claim { limit: 1, alive_time, ..self.claim(self.holder) };
        self.claimed = self.take(holding, &claim).await.unwrap().pop();
        assert!(self.claimed.is_some(), "the only task is claimed");
    }

    /// Run it until its lease has ended.
    async fn run_over(&mut self, fixture: &Fixture, holding: &Queue) {
        self.run(fixture, holding, Duration::from_millis(1)).await;
        fixture.passes(self.claimed().until).await;
    }

    /// Lose it with its host until it has to run alone; then let it wait for a moment more, if it is to be due.
    async fn make_suspect(&mut self, fixture: &Fixture, delay: Option<Duration>) {
        fixture.submit(&[self.task()]).await;
        for lost in 0..Policy::LOST_MAX {
            let host = fixture.host_as(&format!("lost {} {lost}", self.number)).await;
            let claim = Claim { host, limit: 1, ..self.claim(self.holder) };
            assert_eq!(self.take(&fixture.queue, &claim).await.unwrap().len(), 1);
            let lost = [format!("lost {} {lost}", self.number)];
            fixture.backend().hand_on(&lost, &fixture.config.policy).await.unwrap();
        }
        // What is lost with its host waits behind what is due by then.
        let waits = fixture.get(&self.key()).await;
        assert_eq!(waits.state, State::Waiting);
        fixture.passes(waits.run_at).await;
        let host = fixture.host_as(&format!("next {}", self.number)).await;
        let claim = |alone| Claim { host, limit: 1, alone, ..self.claim(self.holder) };
        self.take(&fixture.queue, &claim(false)).await.unwrap();
        if let Some(delay) = delay {
            let task = self.take(&fixture.queue, &claim(true)).await.unwrap().pop().expect("it may run alone");
            let stopped = Event::Quarantined { message: String::new() };
            let policy = Policy { retry_wait: delay, ..fixture.config.policy.clone() };
            let facts = laelaps_queue::Attempt::of(&task);
            let settlement = Settlement::of(task.lease_ref, stopped, facts, &policy, 0.5, None, Vec::new());
            fixture.backend().settle(&[settlement]).await.unwrap();
            fixture.passes(fixture.get(&self.key()).await.run_at).await;
        }
    }

    fn claim(&self, side: Side) -> Claim {
        let host = self.hosts[side.place()];
        // Whoever says anew what it accepts looks also among what waits apart, whatever it saw there a moment ago.
        let accepts = (!self.of_perfectqueue).then(|| Accepts::new(|_| true));
        Claim { accepts, ..Claim::new(host, 3, LONG) }
    }

    async fn take(&self, queue: &Queue, claim: &Claim) -> Result<Vec<ClaimedTask>, Error> {
        if self.of_perfectqueue { claim_again(queue, claim).await } else { Ok(queue.backend().claim(claim).await?.tasks) }
    }

    /// The host for which the task runs.
    fn host(&self) -> HostId {
        self.hosts[self.holder.place()]
    }

    fn claimed(&self) -> &ClaimedTask {
        self.claimed.as_ref().expect("what names a lease meets a task that runs")
    }

    /// Do it, as a process that has `queue` would.
    pub(super) async fn act(&self, operation: Operation, side: Side, queue: &Queue) -> Result<Outcome, Error> {
        let (backend, key, claim) = (queue.backend(), self.key(), self.claim(side));
        // Long enough that clean-up leaves it, except where it was over before.
        let (retention, policy) = (LONG, Policy { backoff: laelaps_queue::Backoff::Fixed(Duration::ZERO), ..Policy::default() });
        let other = |outcome: &dyn std::fmt::Debug| Outcome::Other(format!("{outcome:?}"));
        Ok(match operation {
            Operation::Submit => other(&backend.submit(&[self.task()]).await?),
            Operation::Claim => claimed(self.take(queue, &claim).await?),
            Operation::ClaimAlone => claimed(self.take(queue, &Claim { alone: true, ..claim }).await?),
            Operation::ClaimOldest => claimed(self.take(queue, &Claim { ignore_users: true, ..claim }).await?),
            Operation::ClaimOfStranger => claimed(self.take(queue, &serving_none(claim)).await?),
            Operation::Heartbeat => {
                let progress = Some(Progress { done: 1, total: None, note: "half".to_owned() });
                let beat = Beat { lease_ref: self.claimed().lease_ref, alive_time: LONG * 2, progress };
                other(&backend.heartbeat(&[beat]).await?)
            }
            Operation::Finish => answered(&backend.settle(&[settled(self.claimed(), finish())]).await?),
            Operation::FinishWithFollowUps => {
                let descent = Some(self.claimed().descent.of_follow_up(None, self.claimed().claimed_at));
                let follow_up = |key: String| NewTask { descent, ..task_of(self.user, &key, Some(1)) };
                let follow_ups = vec![follow_up(format!("follow {}", self.number)), follow_up(format!("next {}", self.number))];
                answered(&backend.settle(&[with_follow_ups(follow_ups, settled(self.claimed(), finish()))]).await?)
            }
            Operation::GiveBack => answered(&backend.settle(&[settled(self.claimed(), Event::Release { delay: None })]).await?),
            Operation::PutApart => {
                let unrouted = Event::Unrouted { message: String::new() };
                answered(&backend.settle(&[settled(self.claimed(), unrouted)]).await?)
            }
            Operation::UpdateData => other(&backend.update_data(self.claimed().lease_ref, br#"{"half":true}"#).await?),
            Operation::Cancel => other(&backend.cancel(&key, retention).await?),
            Operation::ForceFinish => other(&backend.force_finish(&key, retention).await?),
            Operation::Retry => other(&backend.retry(&key).await?),
            Operation::Reclaim => other(&backend.reclaim(&policy).await?.tasks.len()),
            Operation::HandOn => other(&backend.hand_on(std::slice::from_ref(&self.identity), &policy).await?.tasks.len()),
            Operation::ReleaseHeld => other(&backend.release_held(&key).await?),
            Operation::DropHeld => other(&backend.drop_held(&key).await?),
            Operation::CleanUp => other(&backend.clean_up(10).await?),
            Operation::CancelById => other(&backend.cancel_by_id(self.id, retention).await?),
            Operation::RetryById => other(&backend.retry_by_id(self.id).await?),
            Operation::Excuse => other(&backend.excuse(self.host(), &[self.claimed().lease_ref]).await?),
            Operation::NoteRunning => {
                let version = PluginVersion { name: "plugin".to_owned(), digest: "d1".to_owned() };
                other(&backend.note_running(self.host(), &[version]).await?)
            }
            Operation::GiveSign => match backend.give_sign(self.host(), LONG).await {
                // Hosts on SQLite and PerfectQueue's table are told apart by other means.
                Err(Error::NotSupported { .. }) => other(&()),
                given => other(&given?),
            },
        })
    }
}

/// As a host claims that serves no type.
fn serving_none(claim: Claim) -> Claim {
    Claim { accepts: Some(Accepts::new(|_| false)), ..claim }
}

async fn register(queue: &Queue, name: &str) -> HostId {
    let name = name.to_owned();
    let description = HostDescription { name: name.clone(), process_id: std::process::id(), identity: Some(name) };
    queue.backend().register_host(&description).await.unwrap()
}

/// Claim as a host does from PerfectQueue's table: again at once while it is said to be worth it, as when the lock is waited for; and once more after
/// nothing was had, since what a claim meets first may be gone, or has to run alone.
async fn claim_again(queue: &Queue, claim: &Claim) -> Result<Vec<ClaimedTask>, Error> {
    let (begun, mut once_more) = (Instant::now(), true);
    loop {
        let claimed = queue.backend().claim(claim).await?;
        let is_told_to = claimed.next_due_in == Some(Duration::ZERO);
        if !claimed.tasks.is_empty() || !(is_told_to || once_more) || begun.elapsed() > PATIENCE {
            return Ok(claimed.tasks);
        }
        once_more &= is_told_to;
    }
}

fn claimed(tasks: Vec<ClaimedTask>) -> Outcome {
    Outcome::Claimed(tasks.iter().map(|task| task.lease_ref).collect())
}

fn answered(answers: &[LeaseAnswer]) -> Outcome {
    match answers {
        [LeaseAnswer::Held] => Outcome::Settled,
        others => Outcome::Other(format!("{others:?}")),
    }
}

/// Whether an operation may be refused so while another one is under way.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::NotFound(_)
            | Error::NoSuchId(_)
            | Error::AlreadyEnded { .. }
            | Error::WrongState { .. }
            | Error::UnknownHost(_)
            | Error::Busy { .. }
            // Not every queue has every operation.
            | Error::NotSupported { .. }
    )
}

/// What contradicts itself in the outcomes of two operations on one scene.
pub(super) fn contradiction(outcomes: &[Result<Outcome, Error>; 2]) -> Option<String> {
    match outcomes {
        [Ok(Outcome::Settled), Ok(Outcome::Settled)] => Some("one lease was settled twice".to_owned()),
        [Ok(Outcome::Claimed(one)), Ok(Outcome::Claimed(other))] => {
            let twice = one.iter().find(|one| other.iter().any(|other| one.lease == other.lease || one.task == other.task));
            twice.map(|lease_ref| format!("{lease_ref:?} was claimed twice"))
        }
        outcomes => outcomes.iter().find_map(|outcome| match outcome {
            Err(error) if !is_refusal(error) => {
                let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
                Some(format!("{error}: {source}"))
            }
            _ => None,
        }),
    }
}
