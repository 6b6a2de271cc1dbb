//! How many tasks a second come in.

use std::time::Instant;

use laelaps_queue::{NewTask, Submitted};
use tokio::task::JoinSet;

use crate::home::Home;
use crate::report::Report;
use crate::words::Words;
use crate::work::{rate, task};

/// Callers at once, each with one task at a time.
const CALLERS: usize = 64;
const BATCHES: [usize; 2] = [100, 1_000];

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let count = words.scaled(20_000);
    let mut rates: [Vec<f64>; 4] = Default::default();
    for _ in 0..words.rounds() {
        rates[0].push(one_by_one(home, count / 20).await);
        rates[1].push(all_at_once(home, count / CALLERS).await);
        for (place, batch) in BATCHES.into_iter().enumerate() {
            rates[2 + place].push(in_batches(home, count, batch).await);
        }
    }
    let names =
        ["submit, one after the other", "submit, one each by 64 at once", "submit, batches of 100", "submit, batches of 1000"];
    for (name, rates) in names.into_iter().zip(&rates) {
        report.figure(home.word(), name, "tasks/s", rates);
    }
}

async fn one_by_one(home: &Home, count: usize) -> f64 {
    let fresh = home.fresh().await;
    let started = Instant::now();
    for number in 0..count {
        assert_eq!(fresh.queue.submit(task(number)).await.unwrap(), Submitted::Created);
    }
    let rate = rate(count, started.elapsed());
    fresh.drop().await;
    rate
}

async fn all_at_once(home: &Home, count_each: usize) -> f64 {
    let fresh = home.fresh().await;
    let started = Instant::now();
    let mut submitters = JoinSet::new();
    for submitter in 0..CALLERS {
        let queue = fresh.queue.clone();
        submitters.spawn(async move {
            for number in 0..count_each {
                queue.submit(task(1_000_000 * submitter + number)).await.unwrap();
            }
        });
    }
    submitters.join_all().await;
    let rate = rate(count_each * CALLERS, started.elapsed());
    fresh.drop().await;
    rate
}

async fn in_batches(home: &Home, count: usize, batch: usize) -> f64 {
    let fresh = home.fresh().await;
    let tasks: Vec<NewTask> = (0..count).map(task).collect();
    let started = Instant::now();
    for chunk in tasks.chunks(batch) {
        fresh.queue.submit_many(chunk).await.unwrap();
    }
    let rate = rate(count, started.elapsed());
    fresh.drop().await;
    rate
}
