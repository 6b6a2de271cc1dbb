//! Users with a limit: their tasks are claimed as they can begin, and the end of one is the turn of the next.

use laelaps_queue::{Claim, Event, LeaseAnswer, NewTask, Update};
use laelaps_test_databases::PATIENCE;

use crate::fixture::{Site, asking, finish, keys, table, task, task_of};

#[tokio::test]
async fn the_end_of_a_limited_users_task_wakes_the_claim() {
    for side_table in [true, false] {
        for event in
            [finish(), Event::Failure { kind: laelaps_queue::FailureKind::Reject, code: "c".into(), message: "m".into() }]
        {
            let site = Site::with(table(side_table)).await;
            let host = site.host().await;
            site.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
            let first = site.claim(host, 9).await;
            assert_eq!(keys(&first), ["a"]);
            assert!(site.claim(host, 9).await.is_empty());
            // What the submit left.
            let _ = tokio::time::timeout(std::time::Duration::ZERO, site.backend().wakeup()).await;
            assert_eq!(site.settle(&first[0], event).await, LeaseAnswer::Held);
            tokio::time::timeout(PATIENCE, site.backend().wakeup()).await.expect("the claim is woken");
            assert_eq!(keys(&site.claim(host, 9).await), ["b"]);
        }
    }
}

#[tokio::test]
async fn cancelling_a_limited_users_task_wakes_the_claim() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
    site.claim(host, 9).await;
    let _ = tokio::time::timeout(std::time::Duration::ZERO, site.backend().wakeup()).await;
    site.queue.cancel("a").await.unwrap();
    tokio::time::timeout(PATIENCE, site.backend().wakeup()).await.expect("the claim is woken");
    assert_eq!(keys(&site.claim(host, 9).await), ["b"]);
}

#[tokio::test]
async fn no_more_tasks_of_limited_users_are_claimed_than_can_begin() {
    let site = Site::new().await;
    let host = site.host().await;
    let of_users = (0..6).map(|n| task_of(&format!("u{n}"), &format!("l{n}"), Some(1)));
    let free = (0..3).map(|n| task(&format!("f{n}")));
    let others = (0..2).map(|n| task_of("v", &format!("v{n}"), None));
    site.submit(&of_users.chain(free).chain(others).collect::<Vec<NewTask>>()).await;
    let claim = Claim { limited: Some(2), ..asking(host, 9) };
    let mut claimed: Vec<String> = site.backend().claim(&claim).await.unwrap().tasks.into_iter().map(|task| task.key).collect();
    claimed.sort();
    assert_eq!(claimed, ["f0", "f1", "f2", "l0", "l1", "v0", "v1"]);
    let claim = Claim { limited: Some(0), ..asking(host, 9) };
    assert!(site.backend().claim(&claim).await.unwrap().tasks.is_empty());
    assert_eq!(site.claim(host, 9).await.len(), 4);
}

#[tokio::test]
async fn many_updates_are_made_together_and_each_is_answered_for_itself() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a"), task("b"), task("c")]).await;
    let tasks = site.claim(host, 9).await;
    let of = |place: usize, members: &[u8]| Update { lease_ref: tasks[place].lease_ref, members: members.to_vec() };
    assert_eq!(site.settle(&tasks[2], finish()).await, LeaseAnswer::Held);
    let updates = [of(0, b"{\"m\":1}"), of(1, b"[]"), of(2, b"{\"m\":1}"), of(0, b"{\"k\":2}")];
    let answers = site.backend().update_many(&updates).await.unwrap();
    assert!(matches!(
        answers.as_slice(),
        [Ok(LeaseAnswer::Held), Err(laelaps_queue::Error::InvalidTask { .. }), Ok(LeaseAnswer::Lost), Ok(LeaseAnswer::Held)]
    ));
    assert_eq!(site.get("a").await.data.unwrap(), br#"{"n":1,"m":1,"k":2}"#);
    assert_eq!(site.get("b").await.data.unwrap(), br#"{"n":1}"#);
    for task in &tasks[..2] {
        assert_eq!(site.settle(task, finish()).await, LeaseAnswer::Held);
    }
}
