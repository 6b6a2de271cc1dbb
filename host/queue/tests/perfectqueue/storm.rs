//! Everybody at once.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use laelaps_queue::{Beat, Event, LeaseAnswer, NewTask};
use laelaps_test_databases::LONG as PATIENCE_MAX;

use crate::fixture::{Site, asking, finish, settled, task_of};

const TASKS: usize = 2_000;

/// What our hosts hold at this moment, and what anybody has finished.
#[derive(Default)]
struct Seen {
    held: Mutex<HashMap<String, usize>>,
    done: Mutex<HashSet<String>>,
}

impl Seen {
    fn hold(&self, key: &str, host: usize) {
        let before = self.held.lock().unwrap().insert(key.to_owned(), host);
        assert_eq!(before, None, "{key} is held by two of ours");
    }

    fn let_go(&self, key: &str) {
        self.held.lock().unwrap().remove(key);
    }

    fn finished(&self, key: &str) {
        self.done.lock().unwrap().insert(key.to_owned());
    }

    fn is_over(&self) -> bool {
        self.done.lock().unwrap().len() == TASKS
    }
}

/// One of ours: claims, renews, and ends attempts in different ways.
async fn ours(site: Site, number: usize, seen: Arc<Seen>) {
    let host = site.host().await;
    while !seen.is_over() {
        let claim = laelaps_queue::Claim { ignore_users: number % 2 == 1, ..asking(host, 20) };
        let claimed = site.backend().claim(&claim).await.unwrap().tasks;
        if claimed.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        claimed.iter().for_each(|task| seen.hold(&task.key, number));
        let beats: Vec<Beat> = claimed
            .iter()
            .map(|task| Beat { lease_ref: task.lease_ref, alive_time: crate::fixture::LONG, progress: None })
            .collect();
        let renewed = site.backend().heartbeat(&beats).await.unwrap();
        assert!(renewed.iter().all(|answer| *answer == LeaseAnswer::Held), "nobody revived anything");
        for group in claimed.chunks(7) {
            // Once it is written somebody else may have it before the answer is here.
            group.iter().for_each(|task| seen.let_go(&task.key));
            let settlements: Vec<_> = group
                .iter()
                .map(|task| {
                    if fastrand::u8(..10) == 0 { settled(task, Event::Release { delay: None }) } else { settled(task, finish()) }
                })
                .collect();
            let answers = site.backend().settle(&settlements).await.unwrap();
            for (settlement, (task, answer)) in settlements.iter().zip(group.iter().zip(answers)) {
                assert_eq!(answer, LeaseAnswer::Held);
                if settlement.event == "finish" {
                    seen.finished(&task.key);
                }
            }
        }
    }
}

/// A worker in Ruby that sometimes gives a task back.
async fn rubys(site: Site, fair: bool, seen: Arc<Seen>) {
    let mut ruby = site.ruby().await;
    while !seen.is_over() {
        let keys = if fair { ruby.acquire_fair(300, 5).await } else { ruby.acquire_unfair(300, 5).await };
        for key in &keys {
            assert!(!seen.held.lock().unwrap().contains_key(key), "{key} is ours and Ruby's");
            if fastrand::u8(..10) == 0 {
                assert!(ruby.heartbeat(key, 0).await);
            } else if ruby.finish(key, 300).await {
                seen.finished(key);
            }
        }
        if keys.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Ruby's workers are of one kind: one with `disable_resource_limit` takes for its own what one without it took in the same second, if it had that
/// task before.
async fn two_of_ours_and_two_of_rubys(fair: bool) {
    let site = Site::new().await;
    let tasks: Vec<NewTask> = (0..TASKS).map(|n| task_of(&format!("u{}", n % 7), &format!("k{n:04}"), None)).collect();
    site.submit(&tasks).await;
    let seen = Arc::new(Seen::default());
    let mut running = tokio::task::JoinSet::new();
    for number in 0..2 {
        running.spawn(ours(site.another().await, number, Arc::clone(&seen)));
        running.spawn(rubys(site.another().await, fair, Arc::clone(&seen)));
    }
    let all = async {
        while let Some(ended) = running.join_next().await {
            ended.unwrap();
        }
    };
    tokio::time::timeout(PATIENCE_MAX, all).await.expect("every task is done");
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (TASKS as u64, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_ours_and_two_of_rubys_do_every_task_and_hold_none_together() {
    two_of_ours_and_two_of_rubys(true).await;
    two_of_ours_and_two_of_rubys(false).await;
}
