//! The host's budget of memory (`memory_total`): how many more tasks are likely to fit.
//!
//! Looked at before a claim, and only there: a running attempt has its own limit, and is never failed or stopped for the budget. So the sum
//! may go beyond it for a while, when attempts need more than those before them did. Then nothing is claimed until there is room again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use crate::config::Config;
use crate::plugin::usage::{Purpose, held};

/// An attempt that needs less than what is reckoned with lowers that by one part in so many of the difference. One that needs more raises it
/// at once.
const FORGETTING: u64 = 32;
/// Pauses in less than this time are told as one.
const SAID_INTERVAL: Duration = Duration::from_secs(60);

/// What one attempt is reckoned with: what recent ones had at most.
pub(crate) struct Estimate(AtomicU64);

impl Estimate {
    fn new(bytes: u64) -> Self {
        Self(AtomicU64::new(bytes))
    }

    /// An attempt ended that had so many bytes at most.
    pub(crate) fn note(&self, peak: u64) {
        let next = |known: u64| Some(if peak >= known { peak } else { known - (known - peak).div_ceil(FORGETTING) });
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed).max(1)
    }
}

/// What the process holds at a moment, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    guests: u64,
    code: u64,
    output: u64,
    data: u64,
}

impl Held {
    fn now() -> Self {
        let [guests, code, output, data] = [Purpose::Guests, Purpose::Code, Purpose::Output, Purpose::Data].map(held);
        Self { guests, code, output, data }
    }

    fn beside_guests(&self) -> u64 {
        self.code + self.output + self.data
    }
}

/// The budget of one configuration.
pub(crate) struct Budget {
    /// None: unlimited.
    total: Option<u64>,
    estimate: Estimate,
    /// With this for guests everything fits that may run at all: nothing has to be reckoned.
    guests_max: u64,
}

impl Budget {
    /// Until attempts have ended, one is reckoned with the largest memory limit of all routes.
    pub(crate) fn new(config: &Config) -> Self {
        let largest = config.routes.iter().map(|route| route.limits.memory_bytes).max().unwrap_or_default();
        // As many again may wait to be used again.
        let instances = u64::from(config.processors + config.task_prefetch) * 2;
        Self { total: config.memory_total, estimate: Estimate::new(largest), guests_max: largest.saturating_mul(instances) }
    }

    /// An attempt ended that had so many bytes at most.
    pub(crate) fn note(&self, peak: u64) {
        if peak > 0 {
            self.estimate.note(peak);
        }
    }

    /// How many more tasks are likely to fit: `peaks` are of those that run, `buffered` is how many wait.
    pub(crate) fn room(&self, peaks: impl Iterator<Item = u64>, buffered: usize) -> u32 {
        let Some(total) = self.total else { return u32::MAX };
        let held = Held::now();
        if held.beside_guests().saturating_add(self.guests_max.max(held.guests)) <= total {
            return u32::MAX;
        }
        fitting(total, &held, self.estimate.bytes(), peaks, buffered)
    }
}

/// How many tasks of `each` bytes fit beside what there is, where those that run may still grow up to that.
fn fitting(total: u64, held: &Held, each: u64, peaks: impl Iterator<Item = u64>, buffered: usize) -> u32 {
    let mut guests = each.saturating_mul(buffered as u64);
    for peak in peaks {
        guests = guests.saturating_add(peak.max(each));
    }
    let used = held.beside_guests().saturating_add(guests.max(held.guests));
    u32::try_from(total.saturating_sub(used) / each).unwrap_or(u32::MAX)
}

/// Says once when claiming pauses for the budget, and when it goes on.
#[derive(Default)]
pub(crate) struct Pause {
    said_at: Option<Instant>,
    is_told: bool,
}

impl Pause {
    /// `room`: how many tasks may be claimed. `is_idle`: nothing runs any more.
    pub(crate) fn note(&mut self, budget: &Budget, room: u32, is_idle: bool) {
        let is_recent = self.said_at.is_some_and(|said| said.elapsed() < SAID_INTERVAL);
        if room == 0 && !self.is_told && !is_recent {
            (self.said_at, self.is_told) = (Some(Instant::now()), true);
            self.tell(
                budget,
                "claiming pauses: the host's budget of memory (memory_total) is used up",
                "claiming pauses: out of memory_total",
            );
        } else if room > 0 && self.is_told && (is_idle || !is_recent) {
            self.is_told = false;
            self.tell(budget, "claiming goes on: there is memory again", "claiming tasks");
        }
    }

    fn tell(&self, budget: &Budget, message: &str, status: &str) {
        let Held { guests, code, output, data } = Held::now();
        let (total, each) = (budget.total.unwrap_or_default(), budget.estimate.bytes());
        tracing::info!(memory_total = total, guests, code, output, data, estimate_per_task = each, "{message}");
        let _ = sd_notify::notify(&[NotifyState::Status(status)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn an_estimate_rises_at_once_and_forgets_slowly() {
        let estimate = Estimate::new(64 * MIB);
        for _ in 0..200 {
            estimate.note(2 * MIB);
        }
        assert!((2 * MIB..3 * MIB).contains(&estimate.bytes()), "{}", estimate.bytes());
        estimate.note(40 * MIB);
        assert_eq!(estimate.bytes(), 40 * MIB);
        estimate.note(2 * MIB);
        assert!(estimate.bytes() > 38 * MIB, "one small one says little about the next");
    }

    #[test]
    fn as_many_are_claimed_as_fit_when_all_have_grown() {
        let held = Held { guests: 3 * MIB, code: 8 * MIB, output: MIB, data: MIB };
        let fitting = |peaks: &[u64], buffered| fitting(128 * MIB, &held, 40 * MIB, peaks.iter().copied(), buffered);
        assert_eq!(fitting(&[], 0), 2, "118 MiB are left");
        assert_eq!(fitting(&[MIB], 0), 1, "what runs may still grow");
        assert_eq!(fitting(&[MIB], 1), 0);
        assert_eq!(fitting(&[60 * MIB], 0), 1);
        assert_eq!(fitting(&[90 * MIB], 0), 0);
        assert_eq!(fitting(&[200 * MIB], 0), 0, "beyond it, nothing is claimed");
    }

    #[test]
    fn idle_instances_and_guests_that_do_not_leave_count_as_long_as_they_are_there() {
        let held = Held { guests: 100 * MIB, ..Held::default() };
        assert_eq!(fitting(128 * MIB, &held, 10 * MIB, std::iter::once(10 * MIB), 0), 2);
    }
}
