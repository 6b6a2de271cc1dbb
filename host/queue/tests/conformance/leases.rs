//! The fence: what a worker does whose lease has ended changes nothing.

use std::time::Duration;

use laelaps_queue::{Beat, ClaimedTask, Event, FailureKind, LeaseAnswer, NewTask, Progress, Settlement, State, Task};
use laelaps_test_databases::eventually;

use crate::fixture::{Fixture, LONG, PATIENCE, finish, settled, task, with_follow_ups};
use crate::promises;

fn beat(task: &ClaimedTask, alive_time: Duration) -> Beat {
    let progress = Some(Progress { done: 7, total: Some(9), note: "stale".to_owned() });
    Beat { lease_ref: task.lease_ref, alive_time, progress }
}

/// Whatever a worker may do with a task, by one who has lost it.
async fn changes_nothing(fixture: &Fixture, stale: &ClaimedTask) {
    let before: Task = fixture.get(&stale.key).await;
    let attempts = fixture.queue.attempts(&stale.key).await.unwrap().len();
    let same = |after: Task| {
        assert_eq!(serde_json::to_string(&before).unwrap(), serde_json::to_string(&after).unwrap());
        assert_eq!((&before.data, &before.output), (&after.data, &after.output));
    };
    let backend = fixture.backend();
    assert_eq!(backend.heartbeat(&[beat(stale, LONG)]).await.unwrap(), [LeaseAnswer::Lost]);
    same(fixture.get(&stale.key).await);
    assert_eq!(backend.update_data(stale.lease_ref, br#"{"stale":true}"#).await.unwrap(), LeaseAnswer::Lost);
    same(fixture.get(&stale.key).await);
    let events = [
        Event::Finish { output: Some(b"stale".to_vec()), retention: Some(Duration::ZERO) },
        Event::Retry { delay: None },
        Event::Release { delay: None },
        Event::Failure { kind: FailureKind::Reject, code: "stale".to_owned(), message: String::new() },
        Event::Stopped,
        Event::Lost,
    ];
    for event in events {
        let settlement = with_follow_ups(vec![task("stale follow-up")], settled(stale, event.clone()));
        assert_eq!(backend.settle(&[settlement]).await.unwrap(), [LeaseAnswer::Lost], "{event:?}");
        same(fixture.get(&stale.key).await);
    }
    assert_eq!(fixture.queue.attempts(&stale.key).await.unwrap().len(), attempts);
    assert!(!fixture.queue.exists("stale follow-up").await.unwrap());
}

promises! {
    async fn a_lease_that_ran_out_untouched_is_lost(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim_for(host, 1, Duration::from_millis(40)).await.remove(0);
        fixture.passes(stale.until).await;
        changes_nothing(fixture, &stale).await;
        assert_eq!(fixture.state("a").await, State::Running, "until somebody takes it back");
    }

    async fn a_stale_worker_cannot_finish_its_successors_attempt(fixture: &Fixture) {
        let (host, other) = (fixture.host().await, fixture.host().await);
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim_for(host, 1, Duration::from_millis(40)).await.remove(0);
        fixture.passes(stale.until).await;
        assert_eq!(fixture.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.len(), 1);
        changes_nothing(fixture, &stale).await;
        let taken = fixture.claim(other, 1).await.remove(0);
        assert!(taken.lease_ref.lease > stale.lease_ref.lease);
        changes_nothing(fixture, &stale).await;
        assert_eq!(fixture.backend().settle(&[settled(&taken, finish())]).await.unwrap(), [LeaseAnswer::Held]);
        changes_nothing(fixture, &stale).await;
    }

    async fn a_cancelled_task_is_lost_to_its_worker(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim(host, 1).await.remove(0);
        fixture.queue.cancel("a").await.unwrap();
        assert_eq!(fixture.state("a").await, State::Cancelled);
        changes_nothing(fixture, &stale).await;
    }

    async fn a_task_finished_by_force_is_lost_to_its_worker(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim(host, 1).await.remove(0);
        fixture.queue.force_finish("a", None).await.unwrap();
        assert_eq!(fixture.state("a").await, State::Finished);
        changes_nothing(fixture, &stale).await;
    }

    async fn a_new_life_of_a_task_is_not_its_old_attempt(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim(host, 1).await.remove(0);
        fixture.queue.cancel("a").await.unwrap();
        fixture.queue.retry("a").await.unwrap();
        changes_nothing(fixture, &stale).await;
        let taken = fixture.claim(host, 1).await.remove(0);
        assert_eq!(taken.lease_ref.task, stale.lease_ref.task);
        changes_nothing(fixture, &stale).await;
    }

    async fn an_attempt_is_settled_once(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let claimed = fixture.claim(host, 2).await;
        let twice = [settled(&claimed[0], finish()), settled(&claimed[0], Event::Retry { delay: None }), settled(&claimed[1], finish())];
        let answers = fixture.backend().settle(&twice).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Held, LeaseAnswer::Lost, LeaseAnswer::Held]);
        assert_eq!(fixture.state("a").await, State::Finished);
        changes_nothing(fixture, &claimed[0]).await;
    }

    async fn a_stale_settlement_does_not_harm_its_group(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 3).await;
        let claimed = fixture.claim(host, 3).await;
        fixture.queue.cancel("a1").await.unwrap();
        let group: Vec<Settlement> = claimed.iter().map(|task| settled(task, finish())).collect();
        let answers = fixture.backend().settle(&group).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Held, LeaseAnswer::Lost, LeaseAnswer::Held]);
        assert_eq!(fixture.state("a1").await, State::Cancelled);
    }

    async fn heartbeats_renew_and_never_shorten(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let claimed = fixture.claim(host, 2).await;
        let answers = fixture.backend().heartbeat(&[beat(&claimed[0], Duration::ZERO), beat(&claimed[1], LONG * 2)]).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Held, LeaseAnswer::Held]);
        assert_eq!(fixture.get("a").await.until, Some(claimed[0].until));
        assert!(fixture.get("b").await.until.unwrap() >= claimed[1].until.plus(LONG));
        let progress = fixture.get("a").await.progress.unwrap();
        assert_eq!((progress.done, progress.total, progress.note.as_str()), (7, Some(9), "stale"));
    }

    async fn a_renewed_lease_outlives_its_first_end(fixture: &Fixture) {
        let host = fixture.host().await;
        for seconds in [2, 10, 50] {
            fixture.submit(&[task(&format!("a{seconds}"))]).await;
            let claimed = fixture.claim_for(host, 1, Duration::from_secs(seconds)).await.remove(0);
            let renewed = fixture.backend().heartbeat(&[beat(&claimed, LONG)]).await.unwrap();
            if renewed == [LeaseAnswer::Lost] && fixture.backend().now().await.unwrap() >= claimed.until {
                // This machine is too busy for so short a lease.
                fixture.queue.cancel(&claimed.key).await.unwrap();
                continue;
            }
            assert_eq!(renewed, [LeaseAnswer::Held]);
            fixture.passes(claimed.until).await;
            assert!(fixture.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.is_empty());
            assert_eq!(fixture.backend().settle(&[settled(&claimed, finish())]).await.unwrap(), [LeaseAnswer::Held]);
            return;
        }
        panic!("no lease was renewed before its end");
    }

    async fn progress_ends_with_its_attempt(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        fixture.backend().heartbeat(&[beat(&claimed, LONG)]).await.unwrap();
        fixture.backend().settle(&[settled(&claimed, Event::Retry { delay: None })]).await.unwrap();
        assert_eq!(fixture.get("a").await.progress, None);
        fixture.claim(host, 1).await;
        assert_eq!(fixture.get("a").await.progress, None, "the next attempt has not said anything");
    }

    async fn a_claim_that_is_given_up_leaves_no_task_running(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 30).await;
        let claim = laelaps_queue::Claim::new(host, 1, LONG);
        let mut received = 0;
        for patience in 0..60 {
            let claiming = fixture.backend().claim(&claim);
            // Whether it answers in time is open.
            if let Ok(claimed) = tokio::time::timeout(Duration::from_micros(patience * 40), claiming).await {
                received += claimed.unwrap().tasks.len() as u64;
            }
        }
        // Those under way are decided in the end, and what undoes them has followed.
        eventually(PATIENCE, "what nobody waits for is given back", async || {
            let running = fixture.queue.stats().await.unwrap().running;
            if running == received { Ok(()) } else { Err(format!("{running} running, {received} received")) }
        })
        .await;
    }

    async fn lease_numbers_grow_and_never_repeat(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 20).await;
        let mut last = 0;
        for _ in 0..5 {
            let claimed = fixture.claim(host, 20).await;
            assert_eq!(claimed.len(), 20);
            for task in &claimed {
                assert!(task.lease_ref.lease.0 > last);
                last = task.lease_ref.lease.0;
            }
            let releases: Vec<Settlement> = claimed.iter().map(|task| settled(task, Event::Release { delay: None })).collect();
            fixture.backend().settle(&releases).await.unwrap();
        }
        // Not even when everything is gone and the database was closed.
        let done: Vec<Settlement> = fixture
            .claim(host, 20)
            .await
            .iter()
            .map(|task| settled(task, Event::Finish { output: None, retention: Some(Duration::ZERO) }))
            .collect();
        fixture.backend().settle(&done).await.unwrap();
        fixture.passes(fixture.backend().now().await.unwrap()).await;
        assert_eq!(fixture.queue.clean_up().await.unwrap(), 20);
        let reopened = fixture.crash().await;
        let host = reopened.host().await;
        reopened.submit(&[task("b")]).await;
        assert!(reopened.claim(host, 1).await[0].lease_ref.lease.0 > last + 20);
    }

    async fn updated_data_survives_a_failure_and_keeps_its_form(fixture: &Fixture) {
        let host = fixture.host().await;
        for compression in [laelaps_queue::Compression::None, laelaps_queue::Compression::Gzip] {
            let key = format!("{compression:?}");
            fixture.submit(&[NewTask { data: br#"{"z": 1.0,"a":[1, 2]}"#.to_vec(), compression, ..task(&key) }]).await;
            let claimed = fixture.claim(host, 1).await.remove(0);
            let answer = fixture.backend().update_data(claimed.lease_ref, br#"{"b":null,"a":{"x":1}}"#).await.unwrap();
            assert_eq!(answer, LeaseAnswer::Held);
            fixture.backend().update_data(claimed.lease_ref, br#"{"c":1e400}"#).await.unwrap();
            fixture.backend().settle(&[settled(&claimed, Event::Trap { message: "boom".to_owned() })]).await.unwrap();
            let again = fixture.claim(host, 1).await.remove(0);
            assert_eq!(again.data, br#"{"z":1.0,"a":{"x":1},"b":null,"c":1e400}"#);
            assert_eq!((again.key, again.task_type, again.compression), (key, "type".to_owned(), compression));
        }
    }

    async fn an_update_that_is_no_object_or_too_large_is_refused(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        let refused = fixture.backend().update_data(claimed.lease_ref, b"[]").await.unwrap_err();
        assert!(refused.to_string().starts_with("task \"a\": the update is not a JSON object"), "{refused}");
        let huge = format!(r#"{{"x":"{}"}}"#, "x".repeat(NewTask::DATA_BYTES_MAX - 8));
        let refused = fixture.backend().update_data(claimed.lease_ref, huge.as_bytes()).await.unwrap_err();
        assert_eq!(refused.to_string(), "task \"a\": the updated data has 16777222 bytes; at most 16777216 are allowed");
        assert_eq!(fixture.get("a").await.data.as_deref(), Some(&br#"{"n":1}"#[..]));
    }

    async fn updates_at_once_all_count(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[NewTask { data: Vec::new(), ..task("a") }]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        let updates = (0..20).map(|number| {
            let backend = std::sync::Arc::clone(fixture.backend());
            let lease_ref = claimed.lease_ref;
            tokio::spawn(async move { backend.update_data(lease_ref, format!(r#"{{"{number}":true}}"#).as_bytes()).await })
        });
        for update in updates.collect::<Vec<_>>() {
            assert_eq!(update.await.unwrap().unwrap(), LeaseAnswer::Held);
        }
        let data: serde_json::Value = serde_json::from_slice(&fixture.get("a").await.data.unwrap()).unwrap();
        assert_eq!(data.as_object().unwrap().len(), 20);
    }
}
