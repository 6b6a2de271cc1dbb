//! How long to wait before another attempt.

use std::time::Duration;

/// A rule for the time between attempts.
#[derive(Clone, Debug, PartialEq)]
pub enum Backoff {
    /// The same time after every attempt, as PerfectQueue does with its `retry_wait`.
    Fixed(Duration),
    /// `first` after the first attempt, times `factor` after each further one, at most `max`; then moved by up to `jitter` of itself.
    Exponential {
        /// After the first attempt.
        first: Duration,
        /// 1.0 to 10.0.
        factor: f64,
        /// The longest wait.
        max: Duration,
        /// 0.0 (none) to 1.0: the wait is drawn evenly from `wait * (1 - jitter) ..= wait * (1 + jitter)`, then held to `max`.
        jitter: f64,
    },
}

impl Backoff {
    /// How long to wait after attempt number `attempt` (1 is the first). `random` is drawn evenly from 0.0 to 1.0 by the caller; it is only
    /// used where there is jitter. Values out of their stated range are held to it.
    #[must_use]
    pub fn wait(&self, attempt: u32, random: f64) -> Duration {
        match *self {
            Self::Fixed(wait) => wait,
            Self::Exponential { first, factor, max, jitter } => {
                let max_secs = max.as_secs_f64();
                // Beyond the longest wait there is nothing to tell apart, so an overflow to infinity is as good as any large number.
                let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
                let grown = first.as_secs_f64() * held(factor, 1.0, 10.0).powi(exponent);
                let wait = grown.min(max_secs);
                let moved = wait * (1.0 + held(jitter, 0.0, 1.0) * (held(random, 0.0, 1.0) * 2.0 - 1.0));
                Duration::try_from_secs_f64(moved.min(max_secs)).unwrap_or(max).min(max)
            }
        }
    }
}

/// The number held to a range; what is not a number counts as its lower end.
fn held(number: f64, least: f64, most: f64) -> f64 {
    if number.is_nan() { least } else { number.clamp(least, most) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn exponential(factor: f64, jitter: f64) -> Backoff {
        Backoff::Exponential { first: Duration::from_secs(1), factor, max: Duration::from_secs(60), jitter }
    }

    #[test]
    fn a_fixed_wait_is_the_same_after_every_attempt() {
        let backoff = Backoff::Fixed(Duration::from_secs(300));
        for attempt in [0, 1, 2, u32::MAX] {
            assert_eq!(backoff.wait(attempt, 0.7), Duration::from_secs(300));
        }
    }

    #[test]
    fn an_exponential_wait_doubles_until_its_longest() {
        let waits: Vec<u64> = (1..=8).map(|attempt| exponential(2.0, 0.0).wait(attempt, 0.9).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[test]
    fn jitter_reaches_both_ends_of_its_range() {
        assert_eq!(exponential(2.0, 0.5).wait(3, 0.0), Duration::from_secs(2));
        assert_eq!(exponential(2.0, 0.5).wait(3, 1.0), Duration::from_secs(6));
        assert_eq!(exponential(2.0, 0.5).wait(3, 0.5), Duration::from_secs(4));
    }

    proptest! {
        #[test]
        fn no_wait_is_longer_than_the_longest(
            first in 0u64..1_000_000_000, factor in proptest::num::f64::ANY, max in 0u64..1_000_000_000,
            jitter in proptest::num::f64::ANY, attempt: u32, random in proptest::num::f64::ANY,
        ) {
            let max = Duration::from_millis(max);
            let backoff = Backoff::Exponential { first: Duration::from_millis(first), factor, max, jitter };
            prop_assert!(backoff.wait(attempt, random) <= max);
        }

        #[test]
        fn without_jitter_a_later_wait_is_never_shorter(factor in 1.0f64..10.0, attempt in 1u32..10_000, random in 0.0f64..1.0) {
            let backoff = exponential(factor, 0.0);
            prop_assert!(backoff.wait(attempt, random) <= backoff.wait(attempt + 1, random));
        }

        #[test]
        fn jitter_moves_a_wait_by_no_more_than_its_share(jitter in 0.0f64..=1.0, attempt in 1u32..100, random in 0.0f64..=1.0) {
            let plain = exponential(2.0, 0.0).wait(attempt, random).as_secs_f64();
            let moved = exponential(2.0, jitter).wait(attempt, random).as_secs_f64();
            prop_assert!((moved - plain).abs() <= plain * jitter + 1e-6);
        }
    }
}
