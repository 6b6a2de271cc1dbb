//! The only way in which a test waits for something that sends no event of its own.

use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

/// For what comes within a second on an idle machine. It only ends a wait that has become hopeless: a busy machine of two cores needs many
/// times what an idle one does, and no test may fail for that.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// For what takes some seconds of computing on an idle machine.
pub const LONG: Duration = Duration::from_secs(600);

/// `tests/run` says what the slowest tests waited for; shorter waits are not worth a line.
const WORTH_TELLING: Duration = Duration::from_millis(100);

/// Calls `probe` again and again until it returns `Ok`, and returns that.
///
/// # Panics
/// With the last `Err`, if `patience` runs out first.
pub async fn eventually<T>(patience: Duration, promise: &str, mut probe: impl AsyncFnMut() -> Result<T, String>) -> T {
    waiting_for(promise, async {
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
    })
    .await
}

/// Waits for `event`, and prints how long that took, for the list of slowest tests (tests/runner/src/report.rs reads these lines).
pub async fn waiting_for<T>(what: &str, event: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let answer = event.await;
    let waited = begun.elapsed();
    if waited >= WORTH_TELLING {
        println!("waited {:.3} s for: {what}", waited.as_secs_f64());
    }
    answer
}
