//! The fair order is PerfectQueue's.

use std::collections::HashMap;

use laelaps_queue::{Event, NewTask};
use laelaps_test_databases::PATIENCE;

use crate::fixture::{Site, finish, keys, task, task_of};

#[tokio::test]
async fn one_by_one_it_is_rubys_own() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    let now = ruby.now().await;
    let users = [None, Some("a"), Some("b"), Some("c"), Some("d")];
    let limits = [None, Some(0), Some(1), Some(2), Some(5)];
    for number in 0..60_i64 {
        let place = usize::try_from(number).unwrap();
        let (user, limit) = (users[place * 7 % 5], limits[place * 3 % 5]);
        ruby.submit_at(&format!("k{number:02}"), b"{}", now - 100 + number * 11 % 7, user, limit).await;
    }
    // Ruby runs some of them, and a scheduled task counts as well.
    assert_eq!(ruby.acquire_fair(300, 5).await.len(), 5);
    ruby.submit_at("scheduled", b"{}", now + 1_000, Some("c"), Some(3)).await;
    let mut taken = 0;
    loop {
        let first = ruby.fair(1).await;
        let claimed = site.claim(host, 1).await;
        assert_eq!(keys(&claimed), first, "after {taken}");
        taken += 1;
        match claimed.first() {
            None => break,
            // A third of them ends, so that users have room again.
            Some(task) if taken % 3 == 0 => drop(site.settle(task, finish()).await),
            Some(_) => {}
        }
    }
    assert!(taken > 10, "{taken}");
}

#[tokio::test]
async fn a_batch_does_not_go_over_a_limit_and_shares_by_weight() {
    let site = Site::new().await;
    let host = site.host().await;
    let of = |user: &'static str, most| (0..20).map(move |n| task_of(user, &format!("{user}{n:02}"), most));
    let tasks: Vec<NewTask> =
        of("one", Some(1)).chain(of("three", Some(3))).chain(of("six", Some(6))).chain(of("null", None)).collect();
    site.submit(&tasks).await;
    let claimed = site.claim(host, 16).await;
    let mut by_user: HashMap<String, usize> = HashMap::new();
    for task in &claimed {
        *by_user.entry(task.user.clone().unwrap()).or_default() += 1;
    }
    assert_eq!(by_user, HashMap::from([("one", 1), ("three", 3), ("six", 6), ("null", 6)].map(|(user, n)| (user.to_owned(), n))));
    // Two hosts together as little as one.
    let other = site.another().await;
    let second = other.host().await;
    let more = other.claim(second, 50).await;
    assert!(more.iter().all(|task| task.user.as_deref() == Some("null")) && more.len() == 14);
    site.settle(&claimed[0], finish()).await;
    let next = other.claim(second, 50).await;
    assert_eq!(next.iter().map(|task| task.user.clone()).collect::<Vec<_>>(), [claimed[0].user.clone()]);
}

#[tokio::test]
async fn users_are_one_whatever_their_case() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task_of("User", "a", Some(1)), task_of("user", "b", Some(1)), task_of("USER", "c", Some(1)), task("d")]).await;
    assert_eq!(keys(&site.claim(host, 9).await), ["a", "d"]);
}

#[tokio::test]
async fn a_user_behind_a_long_backlog_does_not_wait_for_its_end() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    ruby.run(
        "INSERT INTO {t} (id, timeout, data, created_at, resource)
        SELECT CONCAT('flood', seq), UNIX_TIMESTAMP() - 1000, '{\"type\":\"t\"}', 1, 'flood' FROM seq_1_to_30000",
    )
    .await;
    assert_eq!(site.claim(host, 10).await.len(), 10);
    site.submit(&[task_of("small", "one", Some(1))]).await;
    let started = std::time::Instant::now();
    while !site.claim(host, 2).await.iter().any(|task| task.key == "one") {
        assert!(started.elapsed() < PATIENCE, "the walk comes to its end");
    }
    let flood = ruby.number("SELECT COUNT(*) FROM {t} WHERE timeout <= UNIX_TIMESTAMP()").await;
    assert!(flood > 20_000, "{flood} of the backlog left: it was not waited for");
}

#[tokio::test]
async fn without_users_it_is_the_order_of_age() {
    let site = Site::new().await;
    let host = site.host().await;
    for n in 0..5 {
        site.submit(&[task_of("u", &format!("a{n}"), Some(1))]).await;
    }
    let claim = laelaps_queue::Claim { ignore_users: true, ..crate::fixture::asking(host, 3) };
    let claimed = site.backend().claim(&claim).await.unwrap().tasks;
    assert_eq!(keys(&claimed), ["a0", "a1", "a2"]);
    for task in &claimed {
        site.settle(task, Event::Release { delay: None }).await;
    }
    let claim = laelaps_queue::Claim { limit: 9, ..claim };
    assert_eq!(site.backend().claim(&claim).await.unwrap().tasks.len(), 5);
}
