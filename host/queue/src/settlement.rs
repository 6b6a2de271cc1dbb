//! What follows an outcome. The only place that decides it, and pure: no clock, no database.

use std::sync::Arc;
use std::time::Duration;

use crate::{Backoff, ClaimedTask, LeaseRef, NewTask};

/// What happened to an attempt.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The handler finished the task.
    Finish {
        /// What it returned.
        output: Option<Vec<u8>>,
        /// How long to keep the task; None: [`Policy::retention`].
        retention: Option<Duration>,
    },
    /// The handler asked for another attempt.
    Retry {
        /// After this time; None: the back-off.
        delay: Option<Duration>,
    },
    /// The handler handed the task back.
    Release {
        /// After this time; None: now.
        delay: Option<Duration>,
    },
    /// The handler reported a failure.
    Failure {
        /// Whether to try again.
        kind: FailureKind,
        /// A short name.
        code: String,
        /// In words.
        message: String,
    },
    /// The handler trapped.
    Trap {
        /// The reason, in words.
        message: String,
    },
    /// The attempt ran into its time limit.
    TimedOut {
        /// The limit.
        limit: Duration,
    },
    /// The attempt ran into its memory limit.
    OutOfMemory {
        /// The limit.
        limit_bytes: u64,
    },
    /// The handler returned what the contract does not allow, for example an output over its bound.
    Malformed {
        /// What is wrong.
        message: String,
    },
    /// The host gave the task back without an outcome: it drains, stops the attempt, or replaces its plugin. Also what was never begun.
    Stopped,
    /// This host has no route for the type, or the route's plugin is not loaded here.
    Unrouted {
        /// What is missing.
        message: String,
    },
    /// The plugin version is under quarantine.
    Quarantined {
        /// Why.
        message: String,
    },
    /// The host that had the task is gone, or, where nobody can tell, its lease ran out.
    Lost,
    /// The lease ran out although the host lives: it slept, or could not reach the database in time. Nobody is to blame.
    Overdue,
}

impl Event {
    /// The short name that stands in [`crate::AttemptRecord::event`].
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Finish { .. } => "finish",
            Self::Retry { .. } => "retry",
            Self::Release { .. } => "release",
            Self::Failure { .. } => "failure",
            Self::Trap { .. } => "trap",
            Self::TimedOut { .. } => "time-out",
            Self::OutOfMemory { .. } => "memory",
            Self::Malformed { .. } => "malformed",
            Self::Stopped => "stop",
            Self::Unrouted { .. } => "unrouted",
            Self::Quarantined { .. } => "quarantined",
            Self::Lost => "lost",
            Self::Overdue => "overdue",
        }
    }

    /// Whether follow-ups that the handler submitted are stored with the settlement: only when the handler itself said what follows.
    #[must_use]
    pub fn keeps_follow_ups(&self) -> bool {
        matches!(self, Self::Finish { .. } | Self::Retry { .. } | Self::Release { .. })
    }

    /// The short name and the words of a failure; None where nothing failed.
    #[must_use]
    pub fn error(&self) -> Option<(String, String)> {
        match self {
            Self::Finish { .. } | Self::Retry { .. } | Self::Release { .. } | Self::Stopped => None,
            Self::Failure { code, message, .. } => Some((code.clone(), message.clone())),
            Self::Trap { message } | Self::Malformed { message } | Self::Unrouted { message } | Self::Quarantined { message } => {
                Some((self.name().to_owned(), message.clone()))
            }
            Self::TimedOut { limit } => Some((self.name().to_owned(), format!("stopped at its time limit of {limit:?}"))),
            Self::OutOfMemory { limit_bytes } => {
                Some((self.name().to_owned(), format!("stopped at its memory limit of {limit_bytes} bytes")))
            }
            Self::Lost => {
                Some((self.name().to_owned(), "the host is gone or the lease ran out before the attempt ended".to_owned()))
            }
            Self::Overdue => Some((self.name().to_owned(), "the lease ran out while its host was stopped or cut off".to_owned())),
        }
    }
}

/// What a failure means for the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Another attempt may succeed.
    Retry,
    /// None can.
    Reject,
}

/// The facts about an attempt that a decision needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Its number: counted attempts before it, plus one.
    pub attempt: u32,
    /// The most counted attempts. None: [`Policy::max_attempts`].
    pub max_attempts: Option<u32>,
    /// How often the task was released in a row before.
    pub releases: u32,
    /// How often the task was lost before.
    pub lost: u32,
    /// How often it was lost before while it ran alone.
    pub lost_alone: u32,
    /// It ran alone.
    pub alone: bool,
    /// How long ago, by the database's clock, it was lost for the first time since an attempt ended otherwise; zero if never.
    pub lost_for: Duration,
}

impl Attempt {
    /// The facts that a claim brought along.
    #[must_use]
    pub fn of(task: &ClaimedTask) -> Self {
        Self {
            attempt: task.attempt,
            max_attempts: task.max_attempts,
            releases: task.releases,
            lost: task.lost,
            lost_alone: task.lost_alone,
            alone: task.alone,
            // Only whoever finds it lost needs it.
            lost_for: Duration::ZERO,
        }
    }
}

impl Attempt {
    /// The same after the handler gave a sign of its own: whatever ended hosts before, this attempt did not.
    fn cleared(self) -> Self {
        Self { lost: 0, lost_alone: 0, alone: false, lost_for: Duration::ZERO, ..self }
    }
}

/// The queue's settings that a decision needs; a route may have its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// How long to wait before another attempt.
    pub backoff: Backoff,
    /// How long to wait where a plugin version is under quarantine, and after too many releases; on PerfectQueue's table also for a route or
    /// plugin. PerfectQueue's `retry_wait`.
    pub retry_wait: Duration,
    /// How long to keep finished and cancelled tasks.
    pub retention: Duration,
    /// How long to keep failed tasks.
    pub failed_retention: Duration,
    /// The most counted attempts of tasks that do not say. None: no limit.
    pub max_attempts: Option<u32>,
    /// No task ends as failed because it was lost before so much time has passed since it was lost first.
    pub suspicion: Duration,
}

impl Policy {
    /// How often a task is lost before it is claimed alone from then on.
    pub const LOST_MAX: u32 = 2;
    /// How often a task is lost while alone before it may end as failed, see [`Policy::suspicion`]. Until then each further attempt waits
    /// twice as long as the one before.
    pub const LOST_ALONE_MAX: u32 = 3;
    /// How often in a row a task is released or handed back before each further time waits for [`Policy::retry_wait`].
    pub const RELEASES_MAX: u32 = 1_000;
}

impl Default for Policy {
    /// PerfectQueue's defaults; failed tasks are kept for two weeks, so that somebody can look at them.
    fn default() -> Self {
        Self {
            backoff: Backoff::Fixed(Duration::from_secs(300)),
            retry_wait: Duration::from_secs(300),
            retention: Duration::from_secs(300),
            failed_retention: Duration::from_secs(14 * 24 * 3600),
            max_attempts: None,
            suspicion: Duration::from_secs(3_600),
        }
    }
}

/// What the queue does about an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Finished.
    Finish {
        /// What the handler returned.
        output: Option<Vec<u8>>,
        /// How long to keep the task.
        retention: Duration,
    },
    /// Waiting.
    Wait {
        /// From this time on, behind what waits by then. None: at once, in its old place, before what came after it.
        delay: Option<Duration>,
        /// Whether the attempt counts towards the most attempts.
        counted: bool,
        /// Releases in a row from now on.
        releases: u32,
        /// Losses from now on.
        lost: u32,
        /// Losses while alone from now on.
        lost_alone: u32,
        /// It has to run alone from now on.
        alone: bool,
    },
    /// Waiting, in its old place, for a host that serves its type: no other is given it. PerfectQueue's table has no such place: there it waits from
    /// `delay` on.
    Unserved {
        /// On PerfectQueue's table.
        delay: Duration,
        /// Losses from now on.
        lost: u32,
        /// Losses while alone from now on.
        lost_alone: u32,
        /// It has to run alone from now on.
        alone: bool,
    },
    /// Failed.
    Fail {
        /// How long to keep the task.
        retention: Duration,
        /// Losses from now on.
        lost: u32,
        /// Losses while alone from now on.
        lost_alone: u32,
        /// Whether the attempt counts.
        counted: bool,
    },
}

/// A settled attempt, ready to be written. Made by [`Settlement::of`] alone, so that no other code can decide what follows.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// The task and the lease under which it ran.
    pub lease_ref: LeaseRef,
    /// What is to be done, as [`decide`] says.
    verdict: Verdict,
    /// The event's name for the attempt's record: see [`Event::name`].
    pub event: &'static str,
    /// The short name of the failure, if it was one.
    pub error_code: Option<String>,
    /// The failure in words, at most 4,096 bytes.
    pub error_message: Option<String>,
    /// The plugin version (sha256, hexadecimal) that ran it; None if none did.
    pub plugin_digest: Option<Arc<str>>,
    /// Follow-up tasks, stored in the same transaction if the lease holds. A key that exists counts as submitted.
    pub follow_ups: Vec<NewTask>,
}

impl Settlement {
    /// The most bytes of a failure's short name that are kept; longer ones are cut.
    pub const ERROR_CODE_BYTES_MAX: usize = 255;
    /// The most bytes of a failure's words that are kept; longer ones are cut.
    pub const ERROR_MESSAGE_BYTES_MAX: usize = 4_096;

    /// The settlement of an attempt: decides by [`decide`], names the failure, and drops the follow-ups of an attempt whose handler did not
    /// say itself what follows. `random` is drawn evenly from 0.0 to 1.0 by the caller and moves an exponential back-off.
    #[must_use]
    pub fn of(
        lease_ref: LeaseRef,
        event: Event,
        attempt: Attempt,
        policy: &Policy,
        random: f64,
        plugin_digest: Option<Arc<str>>,
        follow_ups: Vec<NewTask>,
    ) -> Self {
        let verdict = decide(&event, attempt, policy, random);
        let error = match (event.error(), &verdict) {
            (None, Verdict::Fail { .. }) => Some((
                "max-attempts".to_owned(),
                format!("another try was asked for after attempt {}, the last allowed", attempt.attempt),
            )),
            (Some((code, _)), Verdict::Fail { lost, lost_alone, .. }) if event == Event::Lost => Some((
                code,
                format!(
                    "lost {lost} times with its host, {lost_alone} of them while it ran alone: it may be what ends its hosts"
                ),
            )),
            (error, _) => error,
        };
        let (error_code, error_message) = error.unzip();
        Self {
            lease_ref,
            verdict,
            event: event.name(),
            error_code: error_code.map(|code| cut(code, Self::ERROR_CODE_BYTES_MAX)),
            error_message: error_message.map(|message| cut(message, Self::ERROR_MESSAGE_BYTES_MAX)),
            plugin_digest,
            follow_ups: if event.keeps_follow_ups() { follow_ups } else { Vec::new() },
        }
    }

    /// What is to be done.
    #[must_use]
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }
}

/// Decide what follows an event. `random` is drawn evenly from 0.0 to 1.0 by the caller and moves an exponential back-off.
#[must_use]
pub fn decide(event: &Event, attempt: Attempt, policy: &Policy, random: f64) -> Verdict {
    match event {
        Event::Finish { output, retention } => {
            Verdict::Finish { output: output.clone(), retention: retention.unwrap_or(policy.retention) }
        }
        Event::Retry { delay } => try_again(*delay, attempt, policy, random),
        Event::Failure { kind: FailureKind::Retry, .. }
        | Event::Trap { .. }
        | Event::TimedOut { .. }
        | Event::OutOfMemory { .. }
        | Event::Malformed { .. } => try_again(None, attempt, policy, random),
        Event::Failure { kind: FailureKind::Reject, .. } => fail(attempt, policy),
        // A handler that hands its task back lets others pass; one that was stopped by its host did not ask for that.
        Event::Release { delay } => hand_back(Some(delay.unwrap_or_default()), attempt.cleared(), policy),
        Event::Stopped | Event::Overdue => hand_back(None, attempt, policy),
        Event::Unrouted { .. } => Verdict::Unserved {
            delay: policy.retry_wait,
            lost: attempt.lost,
            lost_alone: attempt.lost_alone,
            alone: attempt.alone,
        },
        // Another outcome than a release: the row of releases ends.
        Event::Quarantined { .. } => wait_uncounted(Some(policy.retry_wait), 0, attempt),
        Event::Lost => lose(attempt, policy),
    }
}

/// A counted attempt that did not get there: once more, unless it was the last one allowed.
fn try_again(delay: Option<Duration>, attempt: Attempt, policy: &Policy, random: f64) -> Verdict {
    let attempt = attempt.cleared();
    if attempt.max_attempts.or(policy.max_attempts).is_some_and(|most| attempt.attempt >= most) {
        return fail(attempt, policy);
    }
    Verdict::Wait {
        delay: Some(delay.unwrap_or_else(|| policy.backoff.wait(attempt.attempt, random))),
        counted: true,
        releases: 0,
        lost: attempt.lost,
        lost_alone: attempt.lost_alone,
        alone: attempt.alone,
    }
}

fn fail(attempt: Attempt, policy: &Policy) -> Verdict {
    Verdict::Fail { retention: policy.failed_retention, lost: attempt.lost, lost_alone: attempt.lost_alone, counted: true }
}

/// An attempt that is not held against the task. One that goes on and on without any outcome is slowed down, so that it cannot spin.
fn hand_back(delay: Option<Duration>, attempt: Attempt, policy: &Policy) -> Verdict {
    let releases = attempt.releases.saturating_add(1);
    let delay = if releases >= Policy::RELEASES_MAX { delay.max(Some(policy.retry_wait)) } else { delay };
    wait_uncounted(delay, releases, attempt)
}

fn wait_uncounted(delay: Option<Duration>, releases: u32, attempt: Attempt) -> Verdict {
    Verdict::Wait { delay, counted: false, releases, lost: attempt.lost, lost_alone: attempt.lost_alone, alone: attempt.alone }
}

/// The task may be what killed its host. Lost twice, it may only endanger itself; lost like that again and again, and for long enough, it is given
/// up. Nobody can tell a dead host from one that is cut off, so an outage must not fail tasks: what is lost alone waits longer and longer, until
/// [`Policy::suspicion`] has passed.
fn lose(attempt: Attempt, policy: &Policy) -> Verdict {
    let lost = attempt.lost.saturating_add(1);
    let lost_alone = attempt.lost_alone.saturating_add(u32::from(attempt.alone));
    if lost_alone >= Policy::LOST_ALONE_MAX && attempt.lost_for >= policy.suspicion {
        return Verdict::Fail { retention: policy.failed_retention, lost, lost_alone, counted: false };
    }
    let alone = attempt.alone || lost >= Policy::LOST_MAX;
    // Lost for the first time it was most likely in bad company, and keeps its place. A suspect lets the others go first.
    let delay = alone.then(|| match lost_alone.checked_sub(Policy::LOST_ALONE_MAX) {
        None => Duration::ZERO,
        Some(more) => (policy.suspicion / 60).saturating_mul(1 << more.min(6)),
    });
    Verdict::Wait { delay, counted: false, releases: attempt.releases, lost, lost_alone, alone }
}

/// The text, cut at a character's boundary to at most `bytes` bytes.
fn cut(mut text: String, bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(bytes));
    text
}

#[cfg(test)]
mod tests;
