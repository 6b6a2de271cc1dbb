//! How attempts and tasks end: settlements, follow-ups, retention, and what operators do by hand.

use std::time::Duration;

use laelaps_queue::{AttemptRecord, Error, Event, FailureKind, LeaseAnswer, NewTask, Settlement, State, Submitted};

use crate::fixture::{Fixture, finish, keys, settled, task, task_of, with_follow_ups};
use crate::promises;

const AT_ONCE: Event = Event::Finish { output: None, retention: Some(Duration::ZERO) };

fn rejected() -> Event {
    Event::Failure { kind: FailureKind::Reject, code: "bad-input".to_owned(), message: "line 7 is torn".to_owned() }
}

promises! {
    async fn a_finished_task_keeps_output_version_and_attempt(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        let event = Event::Finish { output: Some(b"\x00\xff out".to_vec()), retention: Some(Duration::from_secs(9)) };
        let mut settlement = settled(&claimed, event);
        settlement.plugin_digest = Some("d1".into());
        assert_eq!(fixture.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
        let finished = fixture.get("a").await;
        assert_eq!(finished.output.as_deref(), Some(&b"\x00\xff out"[..]));
        assert_eq!((finished.state, finished.attempts, finished.plugin_digest.as_deref()), (State::Finished, 1, Some("d1")));
        assert_eq!(finished.retained_until, finished.finished_at.map(|moment| moment.plus(Duration::from_secs(9))));
        assert_eq!((finished.until, finished.host), (None, None));
        let attempts = fixture.queue.attempts("a").await.unwrap();
        assert_eq!(attempts.len(), 1);
        assert_eq!((attempts[0].event.as_str(), attempts[0].attempt, attempts[0].lease), ("finish", 1, claimed.lease_ref.lease));
        assert_eq!(attempts[0].plugin_digest.as_deref(), Some("d1"));
        assert_eq!(attempts[0].host, format!("tester, process {}", std::process::id()));
    }

    async fn an_empty_output_is_an_output(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let claimed = fixture.claim(host, 2).await;
        let with = Event::Finish { output: Some(Vec::new()), retention: None };
        fixture.backend().settle(&[settled(&claimed[0], with), settled(&claimed[1], finish())]).await.unwrap();
        assert_eq!(fixture.get("a").await.output.as_deref(), Some(&b""[..]));
        assert_eq!(fixture.get("b").await.output, None);
    }

    async fn a_failed_task_tells_why(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        fixture.backend().settle(&[settled(&claimed, rejected())]).await.unwrap();
        let failed = fixture.get("a").await;
        assert_eq!((failed.state, failed.attempts), (State::Failed, 1));
        assert_eq!((failed.error_code.as_deref(), failed.error_message.as_deref()), (Some("bad-input"), Some("line 7 is torn")));
        assert_eq!(fixture.queue.stats().await.unwrap().failed, 1);
        assert!(fixture.claim(host, 1).await.is_empty());
    }

    async fn a_retried_task_waits_for_its_delay_and_counts(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("soon"), task("late")]).await;
        let claimed = fixture.claim(host, 2).await;
        let retry = |place: usize, delay: Duration| settled(&claimed[place], Event::Retry { delay: Some(delay) });
        let group = [retry(0, Duration::from_millis(50)), retry(1, Duration::from_secs(3600))];
        fixture.backend().settle(&group).await.unwrap();
        let waiting = fixture.get("soon").await;
        assert_eq!((waiting.state, waiting.attempts), (State::Waiting, 1));
        fixture.passes(waiting.run_at).await;
        let again = fixture.claim(host, 9).await;
        assert_eq!((keys(&again), again[0].attempt), (vec!["soon"], 2));
    }

    async fn max_attempts_ends_a_task_as_failed(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[NewTask { max_attempts: Some(3), ..task("a") }]).await;
        for attempt in 1..=3 {
            let claimed = fixture.claim(host, 1).await.remove(0);
            assert_eq!((claimed.attempt, claimed.max_attempts), (attempt, Some(3)));
            fixture.backend().settle(&[settled(&claimed, Event::Trap { message: format!("trap {attempt}") })]).await.unwrap();
        }
        let failed = fixture.get("a").await;
        assert_eq!((failed.state, failed.attempts, failed.error_message.as_deref()), (State::Failed, 3, Some("trap 3")));
        let events: Vec<(u32, String)> =
            fixture.queue.attempts("a").await.unwrap().into_iter().map(|record| (record.attempt, record.event)).collect();
        assert_eq!(events, [(1, "trap".to_owned()), (2, "trap".to_owned()), (3, "trap".to_owned())]);
    }

    async fn a_released_task_is_free_at_once_and_nothing_counts(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[NewTask { max_attempts: Some(1), ..task("a") }]).await;
        for releases in 0..3 {
            let claimed = fixture.claim(host, 1).await.remove(0);
            assert_eq!((claimed.attempt, claimed.releases), (1, releases));
            fixture.backend().settle(&[settled(&claimed, Event::Release { delay: None })]).await.unwrap();
        }
        let claimed = fixture.claim(host, 1).await.remove(0);
        fixture.backend().settle(&[settled(&claimed, finish())]).await.unwrap();
        assert_eq!(fixture.get("a").await.attempts, 1);
    }

    async fn only_the_newest_attempts_are_kept(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        for _ in 0..AttemptRecord::KEPT + 5 {
            let claimed = fixture.claim(host, 2).await;
            let settlements: Vec<Settlement> = claimed.iter().map(|task| settled(task, Event::Retry { delay: None })).collect();
            fixture.backend().settle(&settlements).await.unwrap();
        }
        for key in ["a", "b"] {
            let numbers: Vec<u32> = fixture.queue.attempts(key).await.unwrap().iter().map(|record| record.attempt).collect();
            assert_eq!(numbers, (6..=25).collect::<Vec<u32>>());
        }
        let claimed = fixture.claim(host, 1).await.remove(0);
        fixture.backend().settle(&[settled(&claimed, finish())]).await.unwrap();
        let attempts = fixture.queue.attempts(&claimed.key).await.unwrap();
        assert_eq!((attempts.len(), attempts[19].attempt, attempts[19].event.as_str()), (20, 26, "finish"));
    }

    async fn follow_ups_are_stored_with_the_settlement(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b"), task("c"), task("taken")]).await;
        let claimed = fixture.claim(host, 4).await;
        let with = |place: usize, event: Event, names: &[&str]| {
            let follow_ups = names.iter().map(|name| NewTask { task_type: "next".to_owned(), ..task(name) }).collect();
            with_follow_ups(follow_ups, settled(&claimed[place], event))
        };
        let group = [
            with(0, finish(), &["a1", "taken", "a2", "a1"]),
            with(1, Event::Retry { delay: None }, &["b1", "a1"]),
            with(2, Event::Release { delay: None }, &["c1"]),
        ];
        fixture.backend().settle(&group).await.unwrap();
        for name in ["a1", "a2", "b1", "c1"] {
            assert_eq!((fixture.state(name).await, fixture.get(name).await.task_type.as_str()), (State::Waiting, "next"));
        }
        assert_eq!(fixture.get("taken").await.task_type, "type", "an existing key counts as submitted, and is left alone");
    }

    async fn follow_ups_of_a_lost_lease_are_not_stored(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let claimed = fixture.claim(host, 2).await;
        fixture.queue.cancel("a").await.unwrap();
        let with = |place: usize, name: &str| with_follow_ups(vec![task(name)], settled(&claimed[place], finish()));
        let answers = fixture.backend().settle(&[with(0, "a1"), with(1, "b1")]).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Lost, LeaseAnswer::Held]);
        assert!(!fixture.queue.exists("a1").await.unwrap());
        assert!(fixture.queue.exists("b1").await.unwrap());
    }

    async fn a_bad_follow_up_settles_nothing(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task("b")]).await;
        let claimed = fixture.claim(host, 2).await;
        let bad = with_follow_ups(vec![task("good"), task("bad\n")], settled(&claimed[0], finish()));
        let refused = fixture.backend().settle(&[bad, settled(&claimed[1], finish())]).await;
        assert!(matches!(refused, Err(Error::InvalidTask { .. })));
        assert_eq!((fixture.state("a").await, fixture.state("b").await), (State::Running, State::Running));
        assert!(!fixture.queue.exists("good").await.unwrap());
    }

    async fn retention_ends_when_it_was_said_to(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 4).await;
        let claimed = fixture.claim(host, 4).await;
        let keep = |place: usize, retention: Duration| settled(&claimed[place], Event::Finish { output: Some(vec![1]), retention: Some(retention) });
        let group = [keep(0, Duration::ZERO), keep(1, Duration::from_millis(50)), keep(2, Duration::from_secs(3600)), keep(3, Duration::MAX)];
        fixture.backend().settle(&group).await.unwrap();
        fixture.passes(fixture.get("a1").await.retained_until.unwrap()).await;
        assert_eq!(fixture.backend().clean_up(100).await.unwrap(), 2);
        assert!(!fixture.queue.exists("a0").await.unwrap() && !fixture.queue.exists("a1").await.unwrap());
        assert_eq!(fixture.queue.submit(task("a0")).await.unwrap(), Submitted::Created, "the key is free again");
        assert_eq!(fixture.queue.clean_up().await.unwrap(), 0);
        assert!(fixture.queue.exists("a2").await.unwrap() && fixture.queue.exists("a3").await.unwrap());
    }

    async fn clean_up_takes_at_most_what_it_was_told(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 25).await;
        let group: Vec<Settlement> = fixture.claim(host, 25).await.iter().map(|task| settled(task, AT_ONCE)).collect();
        fixture.backend().settle(&group).await.unwrap();
        fixture.passes(fixture.get("a0").await.retained_until.unwrap()).await;
        let mut removed = Vec::new();
        for _ in 0..4 {
            removed.push(fixture.backend().clean_up(10).await.unwrap());
            fixture.audit().await;
        }
        assert_eq!(removed, [10, 10, 5, 0]);
    }

    async fn a_task_with_a_new_life_is_not_cleaned_up(fixture: &Fixture) {
        fixture.submit(&[task("a"), task("b")]).await;
        for key in ["a", "b"] {
            fixture.backend().cancel(key, Duration::ZERO).await.unwrap();
        }
        fixture.passes(fixture.get("b").await.retained_until.unwrap()).await;
        fixture.queue.retry("a").await.unwrap();
        assert_eq!(fixture.queue.clean_up().await.unwrap(), 1);
        assert_eq!(fixture.state("a").await, State::Waiting);
        fixture.backend().cancel("a", Duration::from_secs(3600)).await.unwrap();
        assert_eq!(fixture.queue.clean_up().await.unwrap(), 0);
    }

    async fn waiting_tasks_can_be_cancelled_and_finished_wherever_they_wait(fixture: &Fixture) {
        let host = fixture.host().await;
        let later = fixture.backend().now().await.unwrap().plus(Duration::from_secs(3600));
        fixture.submit(&[task("ready"), task_of("u", "of a user", Some(1)), NewTask { run_at: Some(later), ..task("later") }]).await;
        fixture.queue.cancel("ready").await.unwrap();
        fixture.queue.force_finish("of a user", None).await.unwrap();
        fixture.queue.cancel("later").await.unwrap();
        assert!(fixture.claim(host, 9).await.is_empty());
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.scheduled, stats.finished, stats.cancelled), (0, 0, 1, 2));
        assert_eq!(fixture.queue.attempts("ready").await.unwrap().len(), 0);
    }

    async fn what_has_ended_cannot_be_ended_again(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        fixture.queue.cancel("a").await.unwrap();
        for refused in [fixture.queue.cancel("a").await, fixture.queue.force_finish("a", None).await] {
            assert!(matches!(refused, Err(Error::AlreadyEnded { key, state: State::Cancelled }) if key == "a"));
        }
        for missing in [fixture.queue.cancel("x").await, fixture.queue.force_finish("x", None).await, fixture.queue.retry("x").await] {
            assert!(matches!(missing, Err(Error::NotFound(key)) if key == "x"));
        }
    }

    async fn retry_by_hand_gives_a_new_life_or_makes_due(fixture: &Fixture) {
        let host = fixture.host().await;
        let later = fixture.backend().now().await.unwrap().plus(Duration::from_secs(3600));
        fixture.submit(&[NewTask { max_attempts: Some(1), ..task("failed") }, task("finished"), NewTask { run_at: Some(later), ..task("later") }]).await;
        let claimed = fixture.claim(host, 2).await;
        assert_eq!(keys(&claimed), ["failed", "finished"]);
        let running = fixture.queue.retry("failed").await;
        assert!(matches!(running, Err(Error::WrongState { state: State::Running, .. })));
        fixture.backend().settle(&[settled(&claimed[0], rejected()), settled(&claimed[1], finish())]).await.unwrap();
        let finished = fixture.queue.retry("finished").await;
        assert!(matches!(finished, Err(Error::WrongState { state: State::Finished, .. })));
        fixture.queue.retry("failed").await.unwrap();
        fixture.queue.retry("later").await.unwrap();
        let claimed = fixture.claim(host, 9).await;
        assert_eq!(keys(&claimed), ["failed", "later"]);
        assert_eq!((claimed[0].attempt, claimed[0].max_attempts), (1, Some(1)));
        assert_eq!(fixture.get("failed").await.error_code, None);
    }

    async fn a_group_of_a_thousand_settles_as_one(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..1_000).map(|number| task_of(&format!("u{}", number % 7), &number.to_string(), None)).collect();
        fixture.submit(&tasks).await;
        let claimed = fixture.claim(host, 1_000).await;
        let event = |number: usize| match number % 4 {
            0 => finish(),
            1 => Event::Retry { delay: Some(Duration::from_secs(60)) },
            2 => Event::Release { delay: None },
            _ => rejected(),
        };
        let group: Vec<Settlement> = claimed.iter().enumerate().map(|(number, task)| settled(task, event(number))).collect();
        assert_eq!(fixture.backend().settle(&group).await.unwrap(), vec![LeaseAnswer::Held; 1_000]);
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.finished, stats.scheduled, stats.ready, stats.failed, stats.running), (250, 250, 250, 250, 0));
    }
}
