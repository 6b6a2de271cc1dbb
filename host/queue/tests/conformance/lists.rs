//! What readers see.

use std::time::Duration;

use laelaps_queue::{Event, FailureKind, Filter, NewTask, Settlement, State, TaskId};

use crate::fixture::{Fixture, finish, settled, task, task_of};
use crate::promises;

/// Three of each state, of two types and two users.
async fn one_of_everything(fixture: &Fixture) {
    let host = fixture.host().await;
    let later = fixture.backend().now().await.unwrap().plus(Duration::from_secs(3600));
    let reject = Event::Failure { kind: FailureKind::Reject, code: "c".to_owned(), message: "m".to_owned() };
    fixture.submit(&["f1", "f2", "f3", "x1", "x2", "x3", "r1", "r2", "r3"].map(|key| task_of("u", key, None))).await;
    let claimed = fixture.claim(host, 9).await;
    let mut group: Vec<Settlement> = claimed[..3].iter().map(|task| settled(task, finish())).collect();
    group.extend(claimed[3..6].iter().map(|task| settled(task, reject.clone())));
    fixture.backend().settle(&group).await.unwrap();
    let other = |key: &str| NewTask { task_type: "other".to_owned(), ..task(key) };
    fixture.submit(&[other("c1"), other("c2"), other("c3"), other("w1"), other("w2")]).await;
    fixture.submit(&[NewTask { run_at: Some(later), ..other("w3") }]).await;
    for key in ["c1", "c2", "c3"] {
        fixture.queue.cancel(key).await.unwrap();
    }
}

async fn listed(fixture: &Fixture, filter: Filter) -> Vec<String> {
    let page = fixture.queue.list(&Filter { limit: 100, ..filter }).await.unwrap();
    assert_eq!(page.next, None);
    page.tasks.into_iter().map(|task| task.key).collect()
}

promises! {
    async fn lists_filter_by_state(fixture: &Fixture) {
        one_of_everything(fixture).await;
        let of = |states: &[State]| listed(fixture, Filter { states: states.to_vec(), ..Filter::default() });
        assert_eq!(of(&[State::Waiting]).await, ["w1", "w2", "w3"]);
        assert_eq!(of(&[State::Running]).await, ["r1", "r2", "r3"]);
        assert_eq!(of(&[State::Finished]).await, ["f1", "f2", "f3"]);
        assert_eq!(of(&[State::Failed]).await, ["x1", "x2", "x3"]);
        assert_eq!(of(&[State::Cancelled]).await, ["c1", "c2", "c3"]);
        assert_eq!(of(&[State::Waiting, State::Failed]).await, ["x1", "x2", "x3", "w1", "w2", "w3"]);
        assert_eq!(of(&[State::Finished, State::Running]).await, ["f1", "f2", "f3", "r1", "r2", "r3"]);
        assert_eq!(of(&State::ALL).await.len(), 15);
        assert_eq!(of(&[]).await.len(), 15);
    }

    async fn filters_combine(fixture: &Fixture) {
        one_of_everything(fixture).await;
        let other = Filter { task_type: Some("other".to_owned()), ..Filter::default() };
        assert_eq!(listed(fixture, other.clone()).await, ["c1", "c2", "c3", "w1", "w2", "w3"]);
        assert_eq!(listed(fixture, Filter { states: vec![State::Waiting, State::Running], ..other }).await, ["w1", "w2", "w3"]);
        let of_user = Filter { user: Some("u".to_owned()), states: vec![State::Failed], ..Filter::default() };
        assert_eq!(listed(fixture, of_user.clone()).await, ["x1", "x2", "x3"]);
        assert_eq!(listed(fixture, Filter { key_prefix: Some("x2".to_owned()), ..of_user }).await, ["x2"]);
        assert_eq!(listed(fixture, Filter { user: Some("nobody".to_owned()), ..Filter::default() }).await, [""; 0]);
    }

    async fn key_prefixes_are_bytes_and_not_patterns(fixture: &Fixture) {
        let names = ["a%", "a_", "ab", "aä", "a\u{10ffff}", "a\u{d7ff}x", "A", "b", "\u{10ffff}x"];
        fixture.submit(&names.map(task)).await;
        let with = |prefix: &str| listed(fixture, Filter { key_prefix: Some(prefix.to_owned()), ..Filter::default() });
        assert_eq!(with("a%").await, ["a%"]);
        assert_eq!(with("a_").await, ["a_"]);
        assert_eq!(with("a").await, names[..6]);
        assert_eq!(with("a\u{10ffff}").await, ["a\u{10ffff}"]);
        assert_eq!(with("a\u{d7ff}").await, ["a\u{d7ff}x"]);
        assert_eq!(with("\u{10ffff}").await, ["\u{10ffff}x"]);
        assert_eq!(with("").await.len(), names.len());
    }

    async fn pages_follow_each_other_without_gap_or_repetition(fixture: &Fixture) {
        fixture.submit_some("a", 25).await;
        for filter in [Filter::default(), Filter { states: vec![State::Waiting], ..Filter::default() }, Filter { key_prefix: Some("a".to_owned()), ..Filter::default() }] {
            let mut seen: Vec<TaskId> = Vec::new();
            let mut after = None;
            let mut pages = 0;
            loop {
                let page = fixture.queue.list(&Filter { limit: 10, after, ..filter.clone() }).await.unwrap();
                seen.extend(page.tasks.iter().map(|task| task.id));
                pages += 1;
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            assert_eq!((seen.len(), pages), (25, 3), "{filter:?}");
            assert!(seen.is_sorted_by(|one, next| one < next));
        }
        let exact = fixture.queue.list(&Filter { limit: 25, ..Filter::default() }).await.unwrap();
        assert_eq!((exact.tasks.len(), exact.next), (25, None), "a full last page has no next");
    }

    async fn a_list_brings_data_only_when_asked(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await.remove(0);
        let with_output = Event::Finish { output: Some(b"out".to_vec()), retention: None };
        fixture.backend().settle(&[settled(&claimed, with_output)]).await.unwrap();
        let with = |with_data: bool| Filter { limit: 1, with_data, ..Filter::default() };
        let plain = fixture.queue.list(&with(false)).await.unwrap().tasks.remove(0);
        assert_eq!((plain.data, plain.output), (None, None));
        let whole = fixture.queue.list(&with(true)).await.unwrap().tasks.remove(0);
        assert_eq!((whole.data.as_deref(), whole.output.as_deref()), (Some(&br#"{"n":1}"#[..]), Some(&b"out"[..])));
    }

    async fn a_page_of_large_data_is_cut(fixture: &Fixture) {
        let data = format!(r#"{{"x":"{}"}}"#, "x".repeat(15 << 20)).into_bytes();
        let tasks: Vec<NewTask> = (0..6).map(|number| NewTask { data: data.clone(), ..task(&number.to_string()) }).collect();
        fixture.submit(&tasks).await;
        let filter = Filter { limit: 100, with_data: true, ..Filter::default() };
        let first = fixture.queue.list(&filter).await.unwrap();
        assert_eq!(first.tasks.len(), 4);
        let second = fixture.queue.list(&Filter { after: first.next, ..filter }).await.unwrap();
        assert_eq!((second.tasks.len(), second.next), (2, None));
    }

    async fn stats_count_everything_once(fixture: &Fixture) {
        let empty = fixture.queue.stats().await.unwrap();
        assert_eq!((empty.ready, empty.oldest_ready_ms, empty.types.len()), (0, None, 0));
        one_of_everything(fixture).await;
        let stats = fixture.queue.stats().await.unwrap();
        assert_eq!((stats.ready, stats.scheduled, stats.running), (2, 1, 3));
        assert_eq!((stats.finished, stats.failed, stats.cancelled), (3, 3, 3));
        assert_eq!(stats.types, [("other".to_owned(), 3), ("type".to_owned(), 3)]);
        assert!(stats.oldest_ready_ms.is_some());
    }

    async fn missing_tasks_are_none(fixture: &Fixture) {
        assert!(fixture.queue.get("x").await.unwrap().is_none());
        assert!(!fixture.queue.exists("x").await.unwrap());
        assert!(fixture.queue.attempts("x").await.unwrap().is_empty());
    }
}
