//! How fast a host is.

use std::time::{Duration, Instant};

use laelaps_queue::{NewTask, Queue};

use crate::patience::LONG;
use crate::{Site, submit};

/// Tasks a second of the site's host, from the tenth part of the tasks to the last, so that no start is measured. Looks at the queue's numbers
/// every `pause`.
///
/// # Panics
/// If not all are finished within [`LONG`].
pub async fn rate(site: &Site, queue: &Queue, tasks: &[NewTask], pause: Duration) -> f64 {
    submit(queue, tasks).await;
    let host = site.start().await;
    let started = Instant::now();
    let mut looks = tokio::time::interval(pause);
    let mut first = None;
    let rate = loop {
        looks.tick().await;
        let finished = queue.stats().await.expect("the queue answers").finished;
        let done = usize::try_from(finished).unwrap_or(usize::MAX);
        match first {
            None if done >= tasks.len() / 10 => first = Some((Instant::now(), done)),
            Some((begun, already)) if done == tasks.len() => break (done - already) as f64 / begun.elapsed().as_secs_f64(),
            _ => {}
        }
        assert!(started.elapsed() < LONG, "{done} of {} tasks are finished", tasks.len());
    };
    host.stop().await;
    rate
}
