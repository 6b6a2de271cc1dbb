//! The only way in which a test waits for something that sends no event of its own.

use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

/// For what should come within a second on an idle machine; the machine of the tests has two cores and is not idle.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// For what takes some seconds of computing on an idle machine.
pub const LONG: Duration = Duration::from_secs(180);

/// Asks `probe` again and again until it answers `Ok`, and returns that.
///
/// # Panics
/// With the last `Err`, if `patience` runs out first.
pub async fn eventually<T>(patience: Duration, promise: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    let mut ticks = interval(Duration::from_millis(10));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match probe().await {
            Ok(answer) => return answer,
            Err(instead) => assert!(begun.elapsed() < patience, "{promise}: not within {patience:?}; last seen: {instead}"),
        }
    }
}
