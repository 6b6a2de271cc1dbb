//! The queue as a Rust program uses it: poll, work, settle.

use std::time::Duration;

use laelaps_queue::{Error, FailureKind, LeaseAnswer, PollOptions, Progress, Queue, State};

use crate::fixture::{Fixture, PATIENCE, task};
use crate::promises;

promises! {
    async fn a_worker_needs_nothing_but_the_queue(fixture: &Fixture) {
        let queue = &fixture.queue;
        fixture.submit_some("a", 4).await;
        let mut tasks = queue.poll_many(&PollOptions { limit: 4, ..PollOptions::default() }).await.unwrap();
        assert_eq!((tasks[0].key(), tasks[0].task_type(), tasks[0].data()), ("a0", "type", &br#"{"n":1}"#[..]));
        let progress = Progress { done: 1, total: Some(2), note: "half".to_owned() };
        assert_eq!(tasks[0].heartbeat(Some(Duration::from_secs(900)), Some(progress)).await.unwrap(), LeaseAnswer::Held);
        assert_eq!(tasks[0].update_data(br#"{"seen":true}"#).await.unwrap(), LeaseAnswer::Held);
        assert_eq!(tasks[0].data(), br#"{"n":1,"seen":true}"#);
        tasks[0].submit(task("follow-up")).unwrap();
        assert!(matches!(tasks[0].submit(task("")), Err(Error::InvalidTask { .. })));
        assert_eq!(tasks[0].finish(Some(b"out".to_vec()), Some(Duration::from_secs(60))).await.unwrap(), LeaseAnswer::Held);
        assert_eq!(tasks[0].finish(None, None).await.unwrap(), LeaseAnswer::Lost);
        assert_eq!(tasks[1].retry(Some(Duration::from_secs(3600))).await.unwrap(), LeaseAnswer::Held);
        assert_eq!(tasks[2].release(None).await.unwrap(), LeaseAnswer::Held);
        assert_eq!(tasks[3].fail(FailureKind::Reject, "code", "words").await.unwrap(), LeaseAnswer::Held);
        let states = [fixture.state("a0").await, fixture.state("a1").await, fixture.state("a2").await, fixture.state("a3").await];
        assert_eq!(states, [State::Finished, State::Waiting, State::Waiting, State::Failed]);
        assert!(queue.exists("follow-up").await.unwrap());
    }

    async fn a_poll_takes_back_what_a_dead_worker_had(fixture: &Fixture) {
        let other = fixture.another().await;
        fixture.submit(&[task("a")]).await;
        let held = other.poll(&PollOptions::default()).await.unwrap();
        assert!(held.is_some());
        assert!(fixture.queue.poll(&PollOptions::default()).await.unwrap().is_none());
        other.close().await;
        let taken = tokio::time::timeout(PATIENCE, async {
            loop {
                if let Some(task) = fixture.queue.poll(&PollOptions::default()).await.unwrap() {
                    return task;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        assert_eq!(taken.await.expect("taken back in time").key(), "a");
    }

    async fn while_a_task_runs_alone_nothing_else_is_polled(fixture: &Fixture) {
        fixture.submit(&[task("suspect")]).await;
        for _ in 0..2 {
            let doomed = fixture.another().await;
            doomed.poll(&PollOptions::default()).await.unwrap();
            doomed.close().await;
            fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        }
        fixture.submit_some("other", 2).await;
        let options = PollOptions { limit: 9, ..PollOptions::default() };
        let mut alone = fixture.queue.poll_many(&options).await.unwrap();
        assert_eq!((alone.len(), alone[0].key()), (1, "suspect"));
        assert!(fixture.queue.poll_many(&options).await.unwrap().is_empty());
        alone[0].finish(None, None).await.unwrap();
        assert_eq!(fixture.queue.poll_many(&options).await.unwrap().len(), 2);
    }

    async fn a_worker_that_was_struck_off_enters_again(fixture: &Fixture) {
        fixture.submit_some("a", 2).await;
        let mut first = fixture.queue.poll(&PollOptions::default()).await.unwrap().unwrap();
        let host = fixture.backend().hosts().await.unwrap()[0].id;
        first.release(None).await.unwrap();
        fixture.backend().unregister_host(host).await.unwrap();
        assert!(fixture.queue.poll(&PollOptions::default()).await.unwrap().is_some());
        assert!(fixture.backend().hosts().await.unwrap()[0].id > host);
    }

    async fn a_closed_queue_says_so(fixture: &Fixture) {
        let queue: Queue = fixture.another().await;
        queue.close().await;
        assert!(matches!(queue.submit(task("a")).await, Err(Error::Closed)));
        assert!(matches!(queue.get("a").await, Err(Error::Closed)));
        queue.close().await;
    }

    async fn what_was_submitted_before_the_close_is_stored(fixture: &Fixture) {
        let queue = fixture.another().await;
        let submits: Vec<_> = (0..50)
            .map(|number| {
                let queue = queue.clone();
                tokio::spawn(async move { queue.submit(task(&number.to_string())).await })
            })
            .collect();
        queue.close().await;
        let mut stored = 0;
        for (number, submit) in submits.into_iter().enumerate() {
            let exists = fixture.queue.exists(&number.to_string()).await.unwrap();
            match submit.await.unwrap() {
                Ok(_) => {
                    assert!(exists);
                    stored += 1;
                }
                Err(Error::Closed) => assert!(!exists),
                Err(other) => panic!("{other}"),
            }
        }
        assert_eq!(fixture.queue.stats().await.unwrap().ready, stored);
    }
}
