//! Held tasks: there, and nobody's to run until they are released.

use std::time::Duration;

use laelaps_queue::{Claim, Error, LeaseAnswer, NewTask, State, Submitted};

use crate::fixture::{Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of, with_follow_ups};
use crate::promises;

/// A task whose data stands beside it wherever large data does.
fn large(key: &str) -> NewTask {
    NewTask { data: format!(r#"{{"x":"{}"}}"#, "x".repeat(1_000)).into_bytes(), ..task(key) }
}

promises! {
    async fn a_held_task_is_claimed_by_nobody_and_outlives_clean_up(fixture: &Fixture) {
        let host = fixture.host().await;
        let past = Some(fixture.backend().now().await.unwrap());
        fixture.submit(&[task("a").on_hold(), task_of("u", "b", Some(0)).on_hold(), NewTask { run_at: past, ..task("c") }.on_hold()]).await;
        for (alone, ignore_users) in [(true, false), (true, true), (false, false), (false, true)] {
            let claimed = fixture.backend().claim(&Claim { alone, ignore_users, ..Claim::new(host, 9, LONG) }).await.unwrap();
            assert!(claimed.tasks.is_empty() && !claimed.alone_waiting);
            assert_eq!(claimed.next_due_in, None, "it never becomes due");
        }
        assert!(fixture.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.is_empty());
        assert_eq!(fixture.backend().clean_up(100).await.unwrap(), 0);
        let held = fixture.get("c").await;
        assert!(held.is_held());
        assert_eq!((held.state, held.run_at, held.data.as_deref()), (State::Waiting, NewTask::HELD_AT, Some(&br#"{"n":1}"#[..])));
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.scheduled, stats.oldest_ready_ms), (0, 3, None));
    }

    async fn a_task_that_is_due_later_is_waited_for_beside_held_ones(fixture: &Fixture) {
        let host = fixture.host().await;
        let later = |after| async move { Some(fixture.backend().now().await.unwrap().plus(Duration::from_millis(after))) };
        fixture.submit(&[task("held").on_hold(), NewTask { run_at: later(3_600_000).await, ..task("later") }]).await;
        let claim = Claim { alone: true, ..Claim::new(host, 9, LONG) };
        let due_in = fixture.backend().claim(&claim).await.unwrap().next_due_in;
        assert!(due_in.is_some_and(|due_in| due_in <= Duration::from_secs(3_600)), "{due_in:?}");
        let soon = later(30).await;
        fixture.submit(&[NewTask { run_at: soon, ..task("soon") }]).await;
        fixture.passes(soon.unwrap()).await;
        assert_eq!(keys(&fixture.claim(host, 9).await), ["soon"]);
    }

    async fn a_released_task_runs_once_and_in_its_users_limit(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[large("a").on_hold(), task_of("u", "b", Some(1)).on_hold(), task_of("u", "c", Some(1)).on_hold()]).await;
        for key in ["a", "b", "c"] {
            assert!(fixture.backend().release_held(key).await.unwrap());
        }
        let released = fixture.get("a").await;
        assert!(!released.is_held() && released.run_at <= fixture.backend().now().await.unwrap());
        fixture.audit().await;
        let mut claimed = fixture.claim(host, 9).await;
        claimed.sort_by(|one, other| one.key.cmp(&other.key));
        assert_eq!(keys(&claimed), ["a", "b"]);
        assert_eq!(claimed[0].data, large("a").data);
        fixture.backend().settle(&claimed.iter().map(|task| settled(task, finish())).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(keys(&fixture.claim(host, 9).await), ["c"]);
        assert_eq!(fixture.state("a").await, State::Finished);
    }

    async fn a_task_is_released_or_dropped_once_and_only_if_it_is_held(fixture: &Fixture) {
        let host = fixture.host().await;
        let backend = fixture.backend();
        let last = NewTask { run_at: Some(NewTask::RUN_AT_MAX), ..task("last moment") };
        fixture.submit(&[task("running")]).await;
        fixture.claim(host, 1).await;
        fixture.submit(&[task("ready"), last, task("released").on_hold(), task("dropped").on_hold()]).await;
        assert!(backend.release_held("released").await.unwrap());
        assert!(backend.drop_held("dropped").await.unwrap());
        for key in ["running", "ready", "last moment", "released", "dropped", "never there", "", "\0"] {
            assert!(!backend.release_held(key).await.unwrap(), "{key}");
            assert!(!backend.drop_held(key).await.unwrap(), "{key}");
        }
        assert!(!fixture.queue.exists("dropped").await.unwrap());
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.running, stats.ready, stats.scheduled), (1, 2, 1));
    }

    async fn a_held_task_has_its_key_until_it_is_dropped(fixture: &Fixture) {
        fixture.submit(&[large("a").on_hold()]).await;
        let again = [task("a"), task("a").on_hold()];
        assert_eq!(fixture.queue.submit_many(&again).await.unwrap(), [Submitted::AlreadyExists; 2]);
        assert!(fixture.get("a").await.is_held());
        assert!(fixture.backend().drop_held("a").await.unwrap());
        assert_eq!(fixture.queue.stats().await.unwrap().types, []);
        assert_eq!(fixture.queue.submit(task("a")).await.unwrap(), Submitted::Created);
        assert_eq!(fixture.get("a").await.data.as_deref(), Some(&br#"{"n":1}"#[..]));
        assert_eq!(keys(&fixture.claim(fixture.host().await, 9).await), ["a"]);
    }

    async fn of_all_who_release_and_drop_a_task_at_once_one_does(fixture: &Fixture) {
        const ROUNDS: usize = 20;
        let other = fixture.another().await;
        let mut dropped = 0;
        for round in 0..ROUNDS {
            let key = format!("k{round}");
            fixture.submit(&[task_of("u", &key, None).on_hold()]).await;
            let (one, two) = (fixture.backend(), other.backend());
            let answers = tokio::join!(one.release_held(&key), two.drop_held(&key), one.drop_held(&key), two.release_held(&key));
            let released = usize::from(answers.0.unwrap()) + usize::from(answers.3.unwrap());
            let gone = usize::from(answers.1.unwrap()) + usize::from(answers.2.unwrap());
            assert_eq!(released + gone, 1);
            assert_eq!(fixture.queue.exists(&key).await.unwrap(), released == 1);
            dropped += gone;
        }
        fixture.audit().await;
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.scheduled), ((ROUNDS - dropped) as u64, 0));
        assert_eq!(fixture.claim(fixture.host().await, 50).await.len(), ROUNDS - dropped);
        other.close().await;
    }

    async fn a_release_wakes_who_waits_for_work(fixture: &Fixture) {
        fixture.submit(&[task("a").on_hold()]).await;
        // What was said about the submit.
        while tokio::time::timeout(Duration::from_millis(100), fixture.backend().wakeup()).await.is_ok() {}
        let (waited, released) = tokio::join!(tokio::time::timeout(PATIENCE, fixture.backend().wakeup()), fixture.backend().release_held("a"));
        assert!(waited.is_ok() && released.unwrap());
    }

    async fn held_keys_are_told_by_prefix_in_the_order_of_their_bytes(fixture: &Fixture) {
        let names = ["a%", "a_", "a\\", "ab", "a\u{7e}", "a\u{ff}", "aä", "a\u{d7ff}x", "a\u{e000}", "a\u{10ffff}", "A", "b", "\u{10ffff}x"];
        let mut tasks = names.map(|name| task(name).on_hold()).to_vec();
        tasks.extend([task("a free one"), NewTask { run_at: Some(NewTask::RUN_AT_MAX), ..task("a late one") }]);
        fixture.submit(&tasks).await;
        let held = |prefix: &'static str| async move { fixture.backend().held(prefix).await.unwrap() };
        let sorted = |prefix: &str| {
            let mut names: Vec<&str> = names.into_iter().filter(|name| name.starts_with(prefix)).collect();
            names.sort_by(|one, other| one.as_bytes().cmp(other.as_bytes()));
            names
        };
        for prefix in ["", "a", "a%", "a_", "a\\", "a\u{ff}", "a\u{fe}", "a\u{d7ff}", "a\u{e000}", "a\u{10ffff}", "\u{10ffff}", "%", "_", "A", "c", "\0"] {
            assert_eq!(held(prefix).await, sorted(prefix), "{prefix}");
        }
        fixture.backend().release_held("a%").await.unwrap();
        fixture.backend().drop_held("a_").await.unwrap();
        assert_eq!(held("a").await, sorted("a").into_iter().filter(|name| !["a%", "a_"].contains(name)).collect::<Vec<_>>());
    }

    async fn at_most_ten_thousand_held_keys_are_told(fixture: &Fixture) {
        let tasks: Vec<NewTask> = (0..10_001).map(|number| task(&format!("{number:05}")).on_hold()).collect();
        fixture.submit(&tasks[1..]).await;
        fixture.submit(&tasks[..1]).await;
        let held = fixture.backend().held("").await.unwrap();
        assert_eq!((held.len(), held[0].as_str(), held[9_999].as_str()), (10_000, "00000", "09999"));
    }

    async fn what_is_not_settled_is_told_by_prefix(fixture: &Fixture) {
        let host = fixture.host().await;
        let unsettled = |prefix: &'static str| async move { fixture.backend().has_unsettled(prefix).await.unwrap() };
        fixture.submit(&[task("a%1")]).await;
        assert!(unsettled("a%").await && unsettled("a").await && unsettled("").await && unsettled("a%1").await);
        for prefix in ["a_", "%", "_", "a%10", "a%2", "aa", "b", "A", "\0", "a\u{ff}", "\u{10ffff}"] {
            assert!(!unsettled(prefix).await, "{prefix}");
        }
        let claimed = fixture.claim(host, 1).await;
        assert!(unsettled("a%").await, "running");
        fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        assert!(!unsettled("a%").await && !unsettled("").await, "finished");
        for key in ["b\u{ff}", "b\u{d7ff}", "b\u{10ffff}", "\u{10ffff}\u{10ffff}"] {
            fixture.submit(&[task(key).on_hold()]).await;
            let whole = fixture.backend().has_unsettled(key).await.unwrap();
            let first = fixture.backend().has_unsettled(&key[..key.char_indices().nth(1).unwrap().0]).await.unwrap();
            assert!(whole && first, "{key}");
            fixture.backend().drop_held(key).await.unwrap();
            assert!(!fixture.backend().has_unsettled(key).await.unwrap(), "{key}");
        }
        fixture.submit(&[task("c1"), task("c2")]).await;
        fixture.queue.cancel("c1").await.unwrap();
        fixture.queue.force_finish("c2", None).await.unwrap();
        assert!(!unsettled("c").await, "ended by hand");
    }

    async fn an_operator_can_end_a_held_task_but_not_make_it_run(fixture: &Fixture) {
        fixture.submit(&[task("a").on_hold(), task("b").on_hold()]).await;
        let refused = fixture.queue.retry("a").await.unwrap_err();
        assert!(matches!(refused, Error::WrongState { state: State::Waiting, .. }), "{refused}");
        assert!(refused.to_string().starts_with("task \"a\" is waiting: it is held until who submitted it releases it"), "{refused}");
        assert!(fixture.get("a").await.is_held());
        fixture.queue.cancel("a").await.unwrap();
        fixture.queue.force_finish("b", None).await.unwrap();
        for key in ["a", "b"] {
            assert!(!fixture.get(key).await.is_held());
            assert!(!fixture.backend().release_held(key).await.unwrap() && !fixture.backend().drop_held(key).await.unwrap());
        }
        assert_eq!((fixture.state("a").await, fixture.state("b").await), (State::Cancelled, State::Finished));
        assert_eq!(fixture.backend().held("").await.unwrap(), [""; 0]);
    }

    async fn a_follow_up_can_be_held(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("first")]).await;
        let claimed = fixture.claim(host, 1).await;
        let settlement = with_follow_ups(vec![task("then").on_hold()], settled(&claimed[0], finish()));
        assert_eq!(fixture.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
        assert!(fixture.get("then").await.is_held());
        assert!(fixture.claim(host, 9).await.is_empty());
    }
}
