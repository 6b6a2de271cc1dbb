//! Looks at, and removal from, a queue in which many tasks have ended.

use std::time::{Duration, Instant};

use laelaps_queue::{Filter, Queue, State};
use sqlx::{Connection as _, Executor as _, PgConnection};

use crate::fill;
use crate::home::{Home, settle_down};
use crate::report::{Bound, Report, median_ms};
use crate::words::Words;

/// So many tasks have ended.
const COUNT: usize = 10_000_000;
const LOOKS: usize = 20;
const REMOVED: u32 = 1_000;
/// Bounds of ours, the promise is only that it works at that size: a page of a list or the numbers are there before one has looked up, and
/// a host removes 50,000 tasks a second at least.
const LOOK_MS_MAX: f64 = 50.0;
const REMOVE_MS_MAX: f64 = 200.0;

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(COUNT);
    let fresh = home.fresh().await;
    let started = Instant::now();
    fill::finished(&fresh.url, count).await;
    fill::waiting(&fresh.url, 0..1_000, 0).await;
    learn(&fresh.url).await;
    settle_down(&fresh.url).await;
    report.say(format!("with {count} finished tasks (filled in {:.0} s)", started.elapsed().as_secs_f64()));
    let mut times: Vec<(String, Vec<f64>)> = Vec::new();
    for _ in 0..words.rounds() {
        for (name, median) in look_at(&fresh.queue, count).await {
            match times.iter_mut().find(|(known, _)| *known == name) {
                Some((_, medians)) => medians.push(median),
                None => times.push((name.to_owned(), vec![median])),
            }
        }
    }
    let word = home.word();
    for (name, medians) in times {
        let median = report.figure(word, &format!("with {count} finished: {name}"), "ms", &medians).median;
        let most = if name.starts_with("clean-up") { REMOVE_MS_MAX } else { LOOK_MS_MAX };
        report.promise(format!("{word}: {name} with {count} finished"), median, Bound::AtMost(most), "ms", "a bound of ours");
    }
    fresh.drop().await;
}

/// What autovacuum does by itself within a minute: without statistics PostgreSQL walks all tasks for a list by key.
async fn learn(url: &str) {
    if url.starts_with("postgres:") {
        PgConnection::connect(url).await.unwrap().execute("ANALYZE").await.unwrap();
    }
}

async fn look_at(queue: &Queue, count: usize) -> Vec<(&'static str, f64)> {
    let filter = |states: &[State], prefix: Option<String>| Filter {
        states: states.to_vec(),
        key_prefix: prefix,
        limit: 100,
        ..Filter::default()
    };
    let looks = [
        ("list, first page", filter(&[], None)),
        ("list finished", filter(&[State::Finished], None)),
        ("list waiting", filter(&[State::Waiting], None)),
        ("list failed", filter(&[State::Failed], None)),
        ("list by key", filter(&[], Some(format!("ended-{}", count / 100 * 77)))),
    ];
    let mut medians = Vec::new();
    for (name, filter) in &looks {
        let look = async || drop(queue.list(filter).await.unwrap());
        medians.push((*name, repeat(look).await));
    }
    let stats = async || assert!(queue.stats().await.unwrap().finished > 0);
    medians.push(("stats", repeat(stats).await));
    let clean_up = async || assert!(queue.backend().clean_up(REMOVED).await.unwrap() > 0);
    medians.push(("clean-up of 1,000", repeat(clean_up).await));
    medians
}

async fn repeat(look: impl AsyncFn()) -> f64 {
    let mut times: Vec<Duration> = Vec::with_capacity(LOOKS);
    for _ in 0..LOOKS {
        let begun = Instant::now();
        look().await;
        times.push(begun.elapsed());
    }
    median_ms(&times)
}
