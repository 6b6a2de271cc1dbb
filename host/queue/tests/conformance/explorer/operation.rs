//! What is set against each other: every operation on one task, and every state in which the task may be.

use std::time::Duration;

use laelaps_queue::{
    Beat, Claim, ClaimedTask, Error, Event, HostId, LeaseAnswer, LeaseRef, NewTask, PluginVersion, Policy, Progress, Queue,
    Settlement, State, TaskId, Timestamp,
};

use crate::fixture::{Fixture, LONG, finish, settled, task_of, with_follow_ups};

/// What is done to the task. Some do more: a claim moves what is due, takes others of its user, and folds users' changes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Submit,
    Claim,
    ClaimAlone,
    ClaimOldest,
    Heartbeat,
    Finish,
    FinishWithFollowUps,
    GiveBack,
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
}

impl Operation {
    pub(super) const ALL: [Self; 21] = [
        Self::Submit,
        Self::Claim,
        Self::ClaimAlone,
        Self::ClaimOldest,
        Self::Heartbeat,
        Self::Finish,
        Self::FinishWithFollowUps,
        Self::GiveBack,
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
    ];

    /// Whether it does anything to a task in this state, so that the pair is worth a look.
    pub(super) fn meets(self, place: Place) -> bool {
        match self {
            Self::Submit => true,
            Self::Claim | Self::ClaimOldest => !matches!(place, Place::Nowhere | Place::Ended),
            Self::ClaimAlone => matches!(place, Place::Suspect | Place::Ready | Place::DueSuspect),
            Self::Heartbeat | Self::Finish | Self::FinishWithFollowUps | Self::GiveBack | Self::UpdateData => {
                matches!(place, Place::Running | Place::Overdue | Place::Lost)
            }
            Self::Cancel | Self::ForceFinish | Self::Retry => place != Place::Nowhere,
            Self::CancelById | Self::RetryById => matches!(place, Place::Due | Place::Running | Place::Lost | Place::Ended),
            Self::Excuse => matches!(place, Place::Overdue | Place::Lost),
            Self::Reclaim => matches!(place, Place::Overdue | Place::Running | Place::Ready | Place::Lost),
            Self::HandOn => matches!(place, Place::Running | Place::Overdue | Place::Ready | Place::Lost),
            Self::NoteRunning => matches!(place, Place::Running | Place::Overdue),
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
}

impl Place {
    pub(super) const ALL: [Self; 11] = [
        Self::Nowhere,
        Self::Ready,
        Self::Due,
        Self::Later,
        Self::Held,
        Self::Suspect,
        Self::DueSuspect,
        Self::Running,
        Self::Overdue,
        Self::Lost,
        Self::Ended,
    ];
}

/// One task and its company, made anew for each schedule.
#[derive(Clone, Debug)]
pub(super) struct Scene {
    number: usize,
    user: &'static str,
    host: HostId,
    /// What a watchdog knows the host by.
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
    pub(super) async fn set(fixture: &Fixture, number: usize, place: Place, with_user: bool) -> Self {
        let identity = format!("host {number}");
        let host = fixture.host_as(&identity).await;
        let mut scene = Self { number, user: if with_user { "user" } else { "" }, host, identity, claimed: None, id: TaskId(0) };
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
            Place::Suspect => scene.make_suspect(fixture, None).await,
            Place::DueSuspect => scene.make_suspect(fixture, Some(Duration::from_millis(4))).await,
            Place::Running => scene.run(fixture, LONG).await,
            Place::Overdue => scene.run_over(fixture).await,
            Place::Lost => {
                scene.run_over(fixture).await;
                fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
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

    async fn run(&mut self, fixture: &Fixture, alive_time: Duration) {
        fixture.submit(&[self.task()]).await;
        self.claimed = fixture.claim_for(self.host, 1, alive_time).await.pop();
        assert!(self.claimed.is_some(), "the only task is claimed");
    }

    /// Run it until its lease has ended.
    async fn run_over(&mut self, fixture: &Fixture) {
        self.run(fixture, Duration::from_millis(1)).await;
        fixture.passes(self.claimed().until).await;
    }

    /// Lose it with its host until it has to run alone; then let it wait for a moment more, if it is to be due.
    async fn make_suspect(&mut self, fixture: &Fixture, delay: Option<Duration>) {
        fixture.submit(&[self.task()]).await;
        for lost in 0..Policy::LOST_MAX {
            let host = fixture.host_as(&format!("lost {} {lost}", self.number)).await;
            assert_eq!(fixture.claim(host, 1).await.len(), 1);
            let lost = [format!("lost {} {lost}", self.number)];
            fixture.backend().hand_on(&lost, &fixture.config.policy).await.unwrap();
        }
        // What is lost with its host waits behind what is due by then.
        let waits = fixture.get(&self.key()).await;
        assert_eq!(waits.state, State::Waiting);
        fixture.passes(waits.run_at).await;
        let claim = |alone| Claim { limit: 1, alone, ..self.claim() };
        fixture.backend().claim(&claim(false)).await.unwrap();
        if let Some(delay) = delay {
            let task = fixture.backend().claim(&claim(true)).await.unwrap().tasks.pop().expect("it may run alone");
            let stopped = Event::Unrouted { message: String::new() };
            let policy = Policy { retry_wait: delay, ..fixture.config.policy.clone() };
            let facts = laelaps_queue::Attempt::of(&task);
            let settlement = Settlement::of(task.lease_ref, stopped, facts, &policy, 0.5, None, Vec::new());
            fixture.backend().settle(&[settlement]).await.unwrap();
            fixture.passes(fixture.get(&self.key()).await.run_at).await;
        }
    }

    fn claim(&self) -> Claim {
        Claim { host: self.host, limit: 3, alive_time: LONG, alone: false, ignore_users: false, accepts: None, limited: None }
    }

    fn claimed(&self) -> &ClaimedTask {
        self.claimed.as_ref().expect("what names a lease meets a task that runs")
    }

    /// Do it, as a process that has `queue` would.
    pub(super) async fn act(&self, operation: Operation, queue: &Queue) -> Result<Outcome, Error> {
        let (backend, key) = (queue.backend(), self.key());
        // Long enough that clean-up leaves it, except where it was over before.
        let (retention, policy) = (LONG, Policy { backoff: laelaps_queue::Backoff::Fixed(Duration::ZERO), ..Policy::default() });
        let other = |outcome: &dyn std::fmt::Debug| Outcome::Other(format!("{outcome:?}"));
        Ok(match operation {
            Operation::Submit => other(&backend.submit(&[self.task()]).await?),
            Operation::Claim => claimed(backend.claim(&self.claim()).await?.tasks),
            Operation::ClaimAlone => claimed(backend.claim(&Claim { alone: true, ..self.claim() }).await?.tasks),
            Operation::ClaimOldest => claimed(backend.claim(&Claim { ignore_users: true, ..self.claim() }).await?.tasks),
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
            Operation::Excuse => other(&backend.excuse(self.host, &[self.claimed().lease_ref]).await?),
            Operation::NoteRunning => {
                let version = PluginVersion { name: "plugin".to_owned(), digest: "d1".to_owned() };
                other(&backend.note_running(self.host, &[version]).await?)
            }
        })
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
