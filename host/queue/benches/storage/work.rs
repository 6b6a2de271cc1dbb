//! What a worker does, through the crate.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Attempt, Claim, ClaimedTask, Event, HostDescription, HostId, LeaseAnswer, NewTask, Policy, Queue, Settlement,
};
use tokio::task::JoinSet;

use crate::fill::DATA;

pub(crate) fn task(number: usize) -> NewTask {
    NewTask::new(format!("task-{number}"), "bench", DATA)
}

pub(crate) fn rate(count: usize, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

pub(crate) async fn host(queue: &Queue) -> HostId {
    let description = HostDescription { name: "bench".to_owned(), process_id: std::process::id(), identity: None };
    queue.backend().register_host(&description).await.unwrap()
}

pub(crate) async fn claim_of(queue: &Queue, limit: usize, ignore_users: bool) -> Claim {
    Claim { ignore_users, ..Claim::new(host(queue).await, u32::try_from(limit).unwrap(), Duration::from_secs(3_600)) }
}

/// Claim and finish all of `count` tasks, by several callers at once; answers how many a second.
pub(crate) async fn work_off(queue: &Queue, count: usize, batch: usize, callers: usize, ignore_users: bool) -> f64 {
    let mut working = JoinSet::new();
    let started = Instant::now();
    for _ in 0..callers {
        working.spawn(work(queue.clone(), batch, ignore_users));
    }
    let finished: usize = working.join_all().await.into_iter().sum();
    let rate = rate(count, started.elapsed());
    assert_eq!(finished, count);
    rate
}

async fn work(queue: Queue, batch: usize, ignore_users: bool) -> usize {
    let claim = claim_of(&queue, batch, ignore_users).await;
    let mut finished = 0;
    loop {
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        if tasks.is_empty() {
            return finished;
        }
        finished += finish(&queue, &tasks).await;
    }
}

/// Finish what was claimed; answers how many leases held.
pub(crate) async fn finish(queue: &Queue, tasks: &[ClaimedTask]) -> usize {
    let (policy, digest) = (Policy::default(), Some("0123456789abcdef".repeat(4).into()));
    let event = Event::Finish { output: None, retention: None };
    let settle = |task: &ClaimedTask| {
        Settlement::of(task.lease_ref, event.clone(), Attempt::of(task), &policy, 0.0, digest.clone(), Vec::new())
    };
    let group: Vec<Settlement> = tasks.iter().map(settle).collect();
    let answers = queue.backend().settle(&group).await.unwrap();
    answers.iter().filter(|answer| **answer == LeaseAnswer::Held).count()
}
