//! Where follow-ups come from: their root, their depth, and how many of a root have not ended.

use std::time::Duration;

use laelaps_queue::{ClaimedTask, Descent, Event, FailureKind, LeaseAnswer, NewTask, PollOptions, State, TaskId};

use crate::fixture::{Fixture, finish, keys, settled, task, with_follow_ups};
use crate::losses::doomed;
use crate::promises;

fn rejected() -> Event {
    Event::Failure { kind: FailureKind::Reject, code: "bad-input".to_owned(), message: "line 7 is torn".to_owned() }
}

/// A follow-up of a task, due at once.
fn of(parent: &ClaimedTask, key: &str) -> NewTask {
    NewTask { descent: Some(parent.descent.of_follow_up(None, parent.claimed_at)), ..task(key) }
}

/// How many relatives a task has.
async fn relatives(fixture: &Fixture, task: &ClaimedTask) -> u32 {
    fixture.backend().relatives(task.descent.root, task.lease_ref.task, 1_000).await.unwrap().expect("this queue keeps them")
}

/// A task that has finished with these follow-ups, which are then claimed in their order.
async fn family(fixture: &Fixture, names: &[&str]) -> (ClaimedTask, Vec<ClaimedTask>) {
    let host = fixture.host().await;
    fixture.submit(&[task("root")]).await;
    let root = fixture.claim(host, 1).await.remove(0);
    let follow_ups = names.iter().map(|name| of(&root, name)).collect();
    let group = [with_follow_ups(follow_ups, settled(&root, finish()))];
    assert_eq!(fixture.backend().settle(&group).await.unwrap(), [LeaseAnswer::Held]);
    let mut children = fixture.claim(host, 100).await;
    children.sort_by_key(|child| child.lease_ref.task.0);
    assert_eq!(keys(&children), names);
    (root, children)
}

promises! {
    async fn a_follow_up_knows_its_root_and_its_depth(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[NewTask { max_running: Some(7), ..task("root") }, task("other")]).await;
        let mut last = fixture.claim(host, 1).await.remove(0);
        assert_eq!(last.descent, Descent { root: last.lease_ref.task, depth: 0 }, "a producer's task is its own root");
        assert_eq!(last.max_running, Some(7));
        let root = last.lease_ref.task;
        let other = fixture.claim(host, 1).await.remove(0);
        for depth in 1..=3 {
            let group = [with_follow_ups(vec![of(&last, &format!("generation {depth}"))], settled(&last, finish()))];
            fixture.backend().settle(&group).await.unwrap();
            last = fixture.claim(host, 1).await.remove(0);
            assert_eq!((last.key.as_str(), last.descent), (format!("generation {depth}").as_str(), Descent { root, depth }));
            assert_eq!(last.max_running, None);
        }
        assert_eq!(relatives(fixture, &last).await, 0, "it does not count itself");
        assert_eq!(relatives(fixture, &other).await, 0);
        // A later attempt is of the same descent.
        fixture.backend().settle(&[settled(&last, Event::Retry { delay: Some(Duration::ZERO) })]).await.unwrap();
        assert_eq!(fixture.claim(host, 1).await[0].descent, Descent { root, depth: 3 });
    }

    async fn follow_ups_count_until_they_end_however_they_end(fixture: &Fixture) {
        let names = ["finishes", "fails", "is cancelled", "is finished", "waits", "runs"];
        let (root, children) = family(fixture, &names).await;
        let by_name = |name: &str| children.iter().find(|child| child.key == name).unwrap();
        let (backend, runs) = (fixture.backend(), by_name("runs"));
        assert_eq!(relatives(fixture, &root).await, 6);
        assert_eq!(relatives(fixture, runs).await, 5, "its own row does not count");
        let group = [settled(by_name("finishes"), finish()), settled(by_name("fails"), rejected())];
        backend.settle(&group).await.unwrap();
        assert_eq!(relatives(fixture, runs).await, 3);
        backend.settle(&[settled(by_name("waits"), Event::Release { delay: None })]).await.unwrap();
        assert_eq!(relatives(fixture, runs).await, 3, "it waits again");
        fixture.queue.cancel("is cancelled").await.unwrap();
        fixture.queue.force_finish("is finished", None).await.unwrap();
        fixture.audit().await;
        assert_eq!(relatives(fixture, runs).await, 1);
        fixture.queue.cancel("waits").await.unwrap();
        assert_eq!(relatives(fixture, runs).await, 0);
        assert_eq!(backend.relatives(root.descent.root, root.lease_ref.task, 1).await.unwrap(), Some(1), "only the running one is left");
    }

    async fn an_operators_retry_gives_a_follow_up_back_to_its_root(fixture: &Fixture) {
        let (root, children) = family(fixture, &["fails", "is cancelled"]).await;
        fixture.backend().settle(&[settled(&children[0], rejected())]).await.unwrap();
        fixture.queue.cancel("is cancelled").await.unwrap();
        assert_eq!(relatives(fixture, &root).await, 0);
        for (revived, key) in [(1, "fails"), (2, "is cancelled")] {
            fixture.queue.retry(key).await.unwrap();
            assert_eq!(relatives(fixture, &root).await, revived);
        }
        fixture.audit().await;
        // That it waits already changes nothing.
        fixture.queue.retry("fails").await.unwrap();
        assert_eq!(relatives(fixture, &root).await, 2);
        assert_eq!(fixture.claim(fixture.host().await, 1).await[0].descent, Descent { root: root.lease_ref.task, depth: 1 });
    }

    async fn a_lost_follow_up_counts_until_it_is_given_up(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("root")]).await;
        let root = fixture.claim(host, 1).await.remove(0);
        fixture.backend().settle(&[with_follow_ups(vec![of(&root, "lost")], settled(&root, finish()))]).await.unwrap();
        for (alone, left) in [(false, 1), (false, 1), (true, 1), (true, 1), (true, 0)] {
            let claimed = doomed(fixture, 1, alone).await;
            assert_eq!(claimed.tasks[0].descent, Descent { root: root.lease_ref.task, depth: 1 });
            assert_eq!(relatives(fixture, &root).await, left);
        }
        assert_eq!(fixture.state("lost").await, State::Failed);
    }

    async fn no_more_follow_ups_are_counted_than_asked_for(fixture: &Fixture) {
        let names: Vec<String> = (0..9).map(|number| format!("n{number}")).collect();
        let (root, _) = family(fixture, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
        for (limit, counted) in [(0, 0), (1, 1), (8, 8), (9, 9), (10, 9), (u32::MAX, 9)] {
            assert_eq!(fixture.backend().relatives(root.descent.root, root.lease_ref.task, limit).await.unwrap(), Some(counted));
        }
    }

    async fn a_follow_up_whose_key_is_there_counts_for_nobody(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("one"), task("two"), task("there")]).await;
        let mut claimed = fixture.claim(host, 2).await;
        claimed.sort_by(|one, other| one.key.cmp(&other.key));
        let [one, two] = claimed.try_into().unwrap();
        let group = [
            with_follow_ups(vec![of(&one, "there"), of(&one, "new")], settled(&one, finish())),
            with_follow_ups(vec![of(&two, "new"), of(&two, "there")], settled(&two, finish())),
        ];
        fixture.backend().settle(&group).await.unwrap();
        assert_eq!((relatives(fixture, &one).await, relatives(fixture, &two).await), (1, 0), "the first to submit it has it");
        for claimed in fixture.claim(host, 9).await {
            let root = if claimed.key == "new" { one.lease_ref.task } else { claimed.lease_ref.task };
            assert_eq!(claimed.descent.root, root, "{}", claimed.key);
        }
    }

    async fn what_is_left_over_goes_with_its_task(fixture: &Fixture) {
        let (root, children) = family(fixture, &["a", "b"]).await;
        let at_once = || Event::Finish { output: None, retention: Some(Duration::ZERO) };
        fixture.backend().settle(&[settled(&children[0], at_once())]).await.unwrap();
        // As a fault would leave it.
        fixture.leave_descendant_a().await;
        assert_eq!(relatives(fixture, &root).await, 2);
        fixture.passes(fixture.get("a").await.retained_until.unwrap()).await;
        fixture.queue.clean_up().await.unwrap();
        assert!(!fixture.queue.exists("a").await.unwrap());
        assert_eq!(relatives(fixture, &root).await, 1);
    }

    async fn a_held_follow_up_counts_until_it_is_dropped(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("root")]).await;
        let root = fixture.claim(host, 1).await.remove(0);
        let group = [with_follow_ups(vec![of(&root, "held").on_hold()], settled(&root, finish()))];
        fixture.backend().settle(&group).await.unwrap();
        assert_eq!(relatives(fixture, &root).await, 1);
        assert!(fixture.queue.drop_held("held").await.unwrap());
        assert_eq!(relatives(fixture, &root).await, 0);
    }

    async fn a_worker_in_rust_hands_its_descent_on(fixture: &Fixture) {
        fixture.submit(&[task("root")]).await;
        let mut root = fixture.queue.poll(&PollOptions::default()).await.unwrap().unwrap();
        let soon = fixture.backend().now().await.unwrap().plus(Duration::from_secs(30));
        let later = fixture.backend().now().await.unwrap().plus(Duration::from_secs(3_600));
        for (key, run_at) in [("now", None), ("soon", Some(soon)), ("later", Some(later))] {
            root.submit(NewTask { run_at, ..task(key) }).unwrap();
        }
        root.finish(None, None).await.unwrap();
        for (key, depth) in [("now", 1), ("soon", 1), ("later", 0)] {
            fixture.queue.retry(key).await.unwrap();
            let claimed = fixture.queue.poll(&PollOptions::default()).await.unwrap().unwrap();
            let descent = Descent { root: root.task().lease_ref.task, depth };
            assert_eq!((claimed.key(), claimed.task().descent), (key, descent));
        }
        assert_eq!(fixture.backend().relatives(root.task().descent.root, root.task().lease_ref.task, 9).await.unwrap(), Some(3));
    }
}

#[test]
fn a_follow_up_that_waits_for_a_minute_starts_again() {
    let now = laelaps_queue::Timestamp(1_000_000);
    let parent = Descent { root: TaskId(7), depth: 9 };
    let depth = |after: u64| parent.of_follow_up(Some(now.plus(Duration::from_millis(after))), now).depth;
    assert_eq!(parent.of_follow_up(None, now), Descent { root: TaskId(7), depth: 10 });
    assert_eq!((depth(0), depth(58_999), depth(59_000), depth(60_000), depth(3_600_000)), (10, 10, 0, 0, 0));
    let deepest = Descent { depth: u32::MAX, ..parent };
    assert_eq!(deepest.of_follow_up(None, now).depth, u32::MAX);
}
