//! Tasks that run alone, because hosts were lost with them again and again: first everything else comes to an end, then such a task is claimed,
//! and after it everything else has its turn before the next one.
//!
//! To come to an end costs a host its throughput, so it is only done for a task that can be had: after a claim that found none (another host
//! took it, or its user's limit forbids it) this host does not believe in the next one for a while, longer each time.

use std::time::Duration;

use laelaps_queue::Claimed;
use tokio::time::Instant;

/// How long a host goes on as usual after it came to an end for nothing.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
/// The longest such time.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Where a host stands with tasks that run alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing to do alone.
    No,
    /// Such a task waits: claim nothing until nothing runs.
    Wanted,
    /// Such a task runs.
    Now,
}

pub(super) struct Alone {
    state: State,
    /// Not wanted before this moment.
    not_before: Instant,
    pause: Duration,
}

impl Default for Alone {
    fn default() -> Self {
        Self { state: State::No, not_before: Instant::now(), pause: PAUSE_FIRST }
    }
}

impl Alone {
    /// Whether the next claim is for a task that runs alone.
    pub(super) fn is_wanted(&self) -> bool {
        self.state == State::Wanted
    }

    /// Whether such a task runs.
    pub(super) fn is_now(&self) -> bool {
        self.state == State::Now
    }

    /// Nothing runs any more.
    pub(super) fn idle(&mut self) {
        if self.state == State::Now {
            self.state = State::No;
        }
    }

    /// A claim was answered.
    pub(super) fn claimed(&mut self, claimed: &Claimed, now: Instant) {
        self.state = match self.state {
            State::Wanted if claimed.tasks.iter().any(|task| task.alone) => {
                self.pause = PAUSE_FIRST;
                State::Now
            }
            State::Wanted => {
                self.not_before = now + self.pause;
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                State::No
            }
            State::No if claimed.alone_waiting && now >= self.not_before => State::Wanted,
            state => state,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(tasks: Vec<laelaps_queue::ClaimedTask>) -> Claimed {
        Claimed { tasks, alone_waiting: true, next_due_in: None }
    }

    #[test]
    fn a_host_that_drained_for_nothing_drains_less_and_less_often() {
        let mut alone = Alone::default();
        let begun = Instant::now();
        let mut drained = Vec::new();
        for seconds in 0..600 {
            let now = begun + Duration::from_secs(seconds);
            alone.claimed(&waiting(Vec::new()), now);
            if alone.is_wanted() {
                drained.push(seconds);
                alone.claimed(&waiting(Vec::new()), now);
                assert!(!alone.is_wanted() && !alone.is_now(), "others are claimed again at once");
            }
        }
        assert_eq!(drained[..7], [0, 1, 3, 7, 15, 31, 63]);
        assert!(drained.len() <= 16, "{drained:?}");
    }
}
