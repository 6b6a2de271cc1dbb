//! Where follow-ups come from, as far as our table beside PerfectQueue's tells.

use std::time::Duration;

use laelaps_queue::{ClaimedTask, Descent, Event, FailureKind, NewTask, State};

use crate::fixture::{Site, finish, keys, settled, task, with_follow_ups};

fn of(parent: &ClaimedTask, key: &str) -> NewTask {
    NewTask { descent: Some(parent.descent.of_follow_up(None, parent.claimed_at)), ..task(key) }
}

async fn relatives(site: &Site, task: &ClaimedTask) -> Option<u32> {
    site.backend().relatives(task.descent.root, task.lease_ref.task, 100).await.unwrap()
}

#[tokio::test]
async fn our_table_knows_root_and_depth_and_counts_what_has_not_ended() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[NewTask { max_running: Some(7), ..task("root") }]).await;
    let root = site.claim(host, 1).await.remove(0);
    assert_eq!((root.descent, root.max_running), (Descent { root: root.lease_ref.task, depth: 0 }, Some(7)));
    let names = ["1 finishes", "2 fails", "3 is cancelled", "4 waits", "5 is ruby's", "6 is finished", "7 runs"];
    let follow_ups = names.iter().map(|name| of(&root, name)).collect();
    site.backend().settle(&[with_follow_ups(follow_ups, settled(&root, finish()))]).await.unwrap();
    assert_eq!(relatives(&site, &root).await, Some(7));
    let mut children = site.claim(host, 9).await;
    children.sort_by(|one, other| one.key.cmp(&other.key));
    assert_eq!(keys(&children), names);
    assert!(children.iter().all(|child| child.descent == Descent { root: root.lease_ref.task, depth: 1 }));
    let [finishes, fails, _, waits, rubys, _, runs] = &children.try_into().unwrap();
    assert_eq!(relatives(&site, runs).await, Some(6), "it does not count itself");
    let failure = Event::Failure { kind: FailureKind::Reject, code: "bad".to_owned(), message: "bad".to_owned() };
    site.settle(finishes, finish()).await;
    site.settle(fails, failure).await;
    site.settle(waits, Event::Retry { delay: Some(Duration::from_secs(60)) }).await;
    site.settle(rubys, Event::Release { delay: None }).await;
    site.queue.cancel("3 is cancelled").await.unwrap();
    site.queue.force_finish("6 is finished", None).await.unwrap();
    assert_eq!(relatives(&site, runs).await, Some(2), "one waits, one is there for Ruby");
    assert!(ruby.finish("5 is ruby's", 300).await);
    assert_eq!(relatives(&site, runs).await, Some(1), "what Ruby has finished has ended too");
    assert_eq!(site.backend().relatives(root.descent.root, runs.lease_ref.task, 0).await.unwrap(), Some(0));
    // An operator's retry gives a follow-up back to its root.
    site.queue.retry("2 fails").await.unwrap();
    assert_eq!(relatives(&site, runs).await, Some(2));
    let again = site.claim(host, 9).await;
    assert_eq!((keys(&again), again[0].descent.depth), (vec!["2 fails"], 1));
    let group = [with_follow_ups(vec![of(&again[0], "grandchild")], settled(&again[0], finish()))];
    site.backend().settle(&group).await.unwrap();
    assert_eq!(site.claim(host, 9).await[0].descent, Descent { root: root.lease_ref.task, depth: 2 });
}

#[tokio::test]
async fn a_follow_up_whose_key_is_there_leaves_it_to_its_root() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("root")]).await;
    let root = site.claim(host, 1).await.remove(0);
    site.submit(&[task("there")]).await;
    let group = [with_follow_ups(vec![of(&root, "there"), of(&root, "new")], settled(&root, finish()))];
    site.backend().settle(&group).await.unwrap();
    assert_eq!(relatives(&site, &root).await, Some(1));
    for claimed in site.claim(host, 9).await {
        assert_eq!(claimed.descent.root == root.lease_ref.task, claimed.key == "new", "{}", claimed.key);
    }
}

#[tokio::test]
async fn without_our_table_every_task_is_a_root_and_nothing_is_counted() {
    let site = Site::plain().await;
    let host = site.host().await;
    site.submit(&[task("root")]).await;
    let root = site.claim(host, 1).await.remove(0);
    site.backend().settle(&[with_follow_ups(vec![of(&root, "child")], settled(&root, finish()))]).await.unwrap();
    let child = site.claim(host, 1).await.remove(0);
    assert_eq!((child.key.as_str(), child.descent), ("child", Descent { root: child.lease_ref.task, depth: 0 }));
    assert_eq!((relatives(&site, &root).await, relatives(&site, &child).await), (None, None));
    assert_eq!(site.state("child").await, State::Running);
}
