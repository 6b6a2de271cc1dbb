//! Tasks that nobody may acquire until they are released.

use std::time::Duration;

use laelaps_queue::{Claim, Error, Event, NewTask, State, Submitted, Timestamp};

use crate::fixture::{Site, asking, finish, keys, settled, table, task, task_of, with_follow_ups};

/// The event horizon.
const HELD: i64 = 1_300_000_000;

#[tokio::test]
async fn a_held_task_is_acquired_by_nobody_and_removed_by_no_clean_up() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        site.submit(&[task("ours").on_hold(), task("theirs").on_hold()]).await;
        let row = ruby.row("ours").await;
        assert!((row.0, row.4) == (HELD, 0) && row.2.is_some());
        assert!(ruby.acquire_fair(300, 9).await.is_empty() && ruby.acquire_unfair(300, 9).await.is_empty());
        for ignore_users in [true, false] {
            let claimed = site.backend().claim(&Claim { ignore_users, ..asking(host, 9) }).await.unwrap();
            assert!(claimed.tasks.is_empty() && claimed.next_due_in.is_none(), "{ignore_users}");
        }
        assert_eq!((ruby.clean_up().await, site.queue.clean_up().await.unwrap()), (0, 0));
        let held = site.get("ours").await;
        assert!(held.is_held() && held.run_at == NewTask::HELD_AT);
        assert!(site.backend().release_held("ours").await.unwrap());
        assert!(!site.get("ours").await.is_held());
        assert_eq!(keys(&site.claim(host, 9).await), ["ours"]);
        assert!(site.backend().release_held("theirs").await.unwrap());
        assert_eq!(ruby.acquire_fair(300, 9).await, ["theirs"]);
        assert!(ruby.finish("theirs", 300).await);
    }
}

#[tokio::test]
async fn a_held_task_takes_nothing_of_its_users_room() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task_of("u", "held", Some(1)).on_hold(), task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
    assert_eq!(ruby.acquire_fair(300, 9).await.len(), 2, "a batch of Ruby's goes over the limit, but counts none as running");
    ruby.run("UPDATE {t} SET timeout = UNIX_TIMESTAMP() WHERE id IN ('a', 'b')").await;
    assert_eq!(site.claim(host, 9).await.len(), 1);
}

#[tokio::test]
async fn a_held_task_is_released_or_dropped_once() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut ruby, backend) = (site.host().await, site.ruby().await, site.backend());
        let counted = NewTask { max_attempts: side_table.then_some(3), ..task("dropped") };
        site.submit(&[counted.on_hold(), task("released").on_hold(), task("waiting"), task("for ever")]).await;
        assert!(backend.drop_held("DROPPED").await.unwrap(), "the table is blind to case");
        assert!(backend.release_held("released").await.unwrap());
        site.queue.force_finish("for ever", Some(Duration::from_secs(1 << 40))).await.unwrap();
        assert_eq!(ruby.row("for ever").await.0, HELD, "it has ended, and is retained as long as can be");
        for key in ["dropped", "released", "waiting", "for ever", "no such"] {
            assert!(!backend.release_held(key).await.unwrap() && !backend.drop_held(key).await.unwrap(), "{key}");
        }
        let claimed = site.claim(host, 9).await;
        assert_eq!(claimed.len(), 2, "neither what waited nor what was released is gone");
        assert!(!backend.release_held("waiting").await.unwrap() && !backend.drop_held("waiting").await.unwrap());
        assert_eq!(backend.held("").await.unwrap(), Vec::<String>::new());
        if side_table {
            assert_eq!(ruby.number("SELECT COUNT(*) FROM {s} WHERE id = 'dropped'").await, 0, "what was noted goes with it");
        }
        assert_eq!(site.queue.submit(task("dropped")).await.unwrap(), Submitted::Created, "its key is free");
    }
}

#[tokio::test]
async fn held_tasks_are_found_by_the_beginning_of_their_keys_which_is_no_pattern() {
    let site = Site::new().await;
    let host = site.host().await;
    let named = ["a%b.1", "a%b.2", "aXb.1", "a_b.1", "a\\b.1", "a\\%b.1", "A%b.1", "a%b", "é.1", "e.1", "a ", "a"];
    site.submit(&named.map(|key| task(key).on_hold())[..6]).await;
    // One by one, since the table takes some of them for one key.
    for key in &named[6..] {
        site.queue.submit(task(key).on_hold()).await.unwrap();
    }
    site.submit(&[task("a%b.waits")]).await;
    let held = async |prefix: &str| site.backend().held(prefix).await.unwrap();
    assert_eq!(held("a%b.").await, ["a%b.1", "a%b.2"]);
    assert_eq!(held("a_b").await, ["a_b.1"]);
    assert_eq!(held("a\\").await, ["a\\%b.1", "a\\b.1"]);
    assert_eq!(held("a\\%").await, ["a\\%b.1"]);
    assert_eq!(held("A").await, Vec::<String>::new(), "A%b.1 was a%b.1 to the table");
    assert_eq!(held("a%B").await, Vec::<String>::new());
    assert_eq!(held("é").await, ["é.1"][..usize::from(site.queue.exists("é.1").await.unwrap())]);
    let all = held("").await;
    assert!(all.is_sorted() && all.contains(&"aXb.1".to_owned()) && !all.contains(&"a%b.waits".to_owned()));
    assert_eq!(keys(&site.claim(host, 9).await), ["a%b.waits"]);
}

#[tokio::test]
async fn tasks_that_have_not_ended_are_found_by_the_beginning_of_their_keys_which_is_no_pattern() {
    let site = Site::new().await;
    let (host, mut ruby, backend) = (site.host().await, site.ruby().await, site.backend());
    let unsettled = async |prefix: &str| backend.has_unsettled(prefix).await.unwrap();
    assert!(!unsettled("").await);
    site.submit(&[task("b%1"), task("c_1"), task("d\\1"), task("held.1").on_hold()]).await;
    for prefix in ["", "b", "b%", "b%1", "c_", "d\\", "d\\1", "held."] {
        assert!(unsettled(prefix).await, "{prefix}");
    }
    for prefix in ["%", "_", "b_", "%1", "c%", "d%", "\\", "b%1.", "held.1.", "x"] {
        assert!(!unsettled(prefix).await, "{prefix}");
    }
    let claimed = site.claim(host, 9).await;
    assert!(unsettled("b%").await, "it runs");
    for task in &claimed {
        site.settle(task, finish()).await;
    }
    assert!(!unsettled("b").await && !unsettled("c").await && unsettled("h").await);
    assert!(backend.drop_held("held.1").await.unwrap() && !unsettled("").await);
    // What nobody can read has failed.
    ruby.submit("torn", b"\x1f\x8bthis is no gzip").await;
    assert!(unsettled("torn").await);
    assert!(site.claim(host, 9).await.is_empty());
    assert!(site.state("torn").await == State::Failed && !unsettled("torn").await);
}

#[tokio::test]
async fn a_held_task_is_not_retried_by_hand_but_can_be_ended() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let ended = if side_table { State::Cancelled } else { State::Finished };
        site.submit(&[task("a").on_hold(), task("b").on_hold()]).await;
        let refused = site.queue.retry("a").await.unwrap_err();
        assert!(matches!(refused, Error::WrongState { state: State::Waiting, .. }), "{refused}");
        assert!(refused.to_string().contains("held"), "{refused}");
        assert!(site.get("a").await.is_held());
        site.queue.cancel("a").await.unwrap();
        site.queue.force_finish("b", None).await.unwrap();
        assert_eq!((site.state("a").await, site.state("b").await), (ended, State::Finished));
        assert!(!site.backend().release_held("a").await.unwrap());
        if side_table {
            site.queue.retry("a").await.unwrap();
            assert_eq!(keys(&site.claim(site.host().await, 9).await), ["a"], "a new life is not held");
        }
    }
}

#[tokio::test]
async fn held_tasks_are_counted_as_waiting_and_listed() {
    let site = Site::new().await;
    site.submit(&[task("a").on_hold(), task("b"), NewTask { task_type: "rare".to_owned(), ..task("c") }.on_hold()]).await;
    site.submit(&[task("done")]).await;
    site.queue.force_finish("done", Some(Duration::from_secs(1 << 40))).await.unwrap();
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled, stats.running, stats.finished), (1, 2, 0, 1));
    assert_eq!(stats.types, [("type".to_owned(), 2), ("rare".to_owned(), 1)]);
    let filter = laelaps_queue::Filter { states: vec![State::Waiting], limit: 9, ..Default::default() };
    let listed = site.queue.list(&filter).await.unwrap().tasks;
    let held: Vec<(&str, bool)> = listed.iter().map(|task| (task.key.as_str(), task.is_held())).collect();
    assert_eq!(held, [("a", true), ("c", true), ("b", false)]);
}

#[tokio::test]
async fn follow_ups_can_be_held_and_what_they_ask_for_stays() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let claimed = site.claim(host, 1).await.remove(0);
    // Beyond what the table can hold, if it counted for anything.
    let follow_up = NewTask { run_at: Some(Timestamp(3_000_000_000_000)), max_attempts: Some(2), ..task("b") }.on_hold();
    let settlement = with_follow_ups(vec![follow_up], settled(&claimed, Event::Release { delay: None }));
    site.backend().settle(&[settlement]).await.unwrap();
    assert_eq!(site.backend().held("b").await.unwrap(), ["b"]);
    assert!(site.backend().release_held("b").await.unwrap());
    let claimed = site.claim(host, 9).await;
    assert_eq!(claimed.iter().find(|task| task.key == "b").unwrap().max_attempts, Some(2));
}
