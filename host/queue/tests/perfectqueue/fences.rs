//! Two kinds of workers and one row: ours are fenced, Ruby's are not.

use std::time::Duration;

use laelaps_queue::{Event, LeaseAnswer, State};

use crate::fixture::{LONG, Site, asking, finish, keys, task};

const SHORT: Duration = Duration::from_millis(100);

#[tokio::test]
async fn a_lease_stands_in_the_row_and_goes_with_a_release() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a"), task("b")]).await;
    let before = ruby.now().await;
    let claimed = site.claim(host, 2).await;
    assert_eq!(keys(&claimed), ["a", "b"]);
    let row = ruby.row("a").await;
    assert_eq!((row.4, row.0 * 1_000), (claimed[0].lease_ref.lease.0.unsigned_abs(), claimed[0].until.0));
    assert!(row.4 >> 62 == 1, "no connection has this number");
    let now = ruby.now().await;
    assert!((before + 303..=now + 306).contains(&row.0), "rounded up, and apart from what Ruby would write");
    assert_eq!(site.settle(&claimed[0], Event::Release { delay: None }).await, LeaseAnswer::Held);
    assert_eq!(site.settle(&claimed[1], Event::Retry { delay: Some(Duration::from_secs(60)) }).await, LeaseAnswer::Held);
    let (released, retried) = (ruby.row("a").await, ruby.row("b").await);
    assert_eq!((released.4, retried.4), (0, 0));
    assert!(released.0 <= ruby.now().await && retried.0 > now + 50);
    assert_ne!(site.claim(host, 1).await[0].lease_ref, claimed[0].lease_ref, "every claim has a token of its own");
}

#[tokio::test]
async fn a_fair_acquire_of_ruby_within_the_same_second_is_not_our_lease() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let stale = site.claim(host, 1).await.remove(0);
    let (until, ..) = ruby.row("a").await;
    assert_eq!(site.settle(&stale, Event::Release { delay: None }).await, LeaseAnswer::Held);
    // It takes the task and leaves `owner`, with the very time that our lease had.
    let now = ruby.now().await;
    assert_eq!(ruby.acquire_fair(until - now, 1).await, ["a"]);
    site.changes_nothing(&stale).await;
    assert!(ruby.finish("a", 300).await);
    site.changes_nothing(&stale).await;
}

#[tokio::test]
async fn a_token_that_ruby_leaves_in_place_does_not_come_true_again() {
    let site = Site::plain().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let stale = site.claim_for(host, 1, SHORT).await.remove(0);
    site.passes(stale.until).await;
    // Our token stands there still, and Ruby holds the task.
    assert_eq!(ruby.acquire_fair(300, 1).await, ["a"]);
    assert_eq!(ruby.row("a").await.4, stale.lease_ref.lease.0.unsigned_abs());
    site.changes_nothing(&stale).await;
}

#[tokio::test]
async fn ruby_steals_what_ran_out_and_its_finish_stays() {
    for fair in [true, false] {
        let site = Site::new().await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        site.submit(&[task("a")]).await;
        let stale = site.claim_for(host, 1, SHORT).await.remove(0);
        site.passes(stale.until).await;
        let stolen = if fair { ruby.acquire_fair(300, 9).await } else { ruby.acquire_unfair(300, 9).await };
        assert_eq!(stolen, ["a"]);
        site.changes_nothing(&stale).await;
        assert!(site.claim(host, 9).await.is_empty(), "Ruby has it");
        assert!(ruby.finish("a", 300).await);
        site.changes_nothing(&stale).await;
        assert_eq!(site.state("a").await, State::Finished);
    }
}

#[tokio::test]
async fn a_finish_by_ruby_of_what_we_run_ends_our_lease() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let ours = site.claim(host, 1).await.remove(0);
    assert!(ruby.finish("a", 300).await);
    site.changes_nothing(&ours).await;
    assert_eq!(site.state("a").await, State::Finished);
}

#[tokio::test]
async fn a_late_heartbeat_of_ruby_is_noticed_by_our_next_one() {
    // At whatever moment of the seconds after our write, with the same alive time as ours.
    for rounds in [0, 1, 2, 3] {
        let (site, mut ruby, host, ours) = loop {
            let site = Site::new().await;
            let (host, mut ruby) = (site.host().await, site.ruby().await);
            ruby.submit("a", br#"{"type":"t"}"#).await;
            assert_eq!(ruby.acquire_fair(0, 1).await, ["a"]);
            let begun = ruby.now().await;
            let ours = site.claim(host, 1).await.remove(0);
            for _ in 0..rounds {
                let now = site.backend().now().await.unwrap();
                site.passes(now.plus(Duration::from_millis(600))).await;
            }
            let written = ruby.row("a").await.0;
            assert!(ruby.heartbeat("a", 300).await);
            if ruby.row("a").await.0 != written {
                break (site, ruby, host, ours);
            }
            // Three seconds and more after our claim Ruby may write the very value that stands there; a host has renewed by then.
            assert!(ruby.now().await >= begun + 3);
        };
        assert_eq!(site.beat(&ours).await, LeaseAnswer::Lost, "round {rounds}");
        site.changes_nothing(&ours).await;
        assert!(site.claim(host, 1).await.is_empty(), "Ruby has it again");
        assert!(ruby.finish("a", 300).await);
    }
}

#[tokio::test]
async fn a_lost_lease_stays_lost_when_the_row_looks_as_it_did() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let ours = site.claim(host, 1).await.remove(0);
    let (until, ..) = ruby.row("a").await;
    assert!(ruby.heartbeat("a", 77).await);
    assert_eq!(site.beat(&ours).await, LeaseAnswer::Lost);
    let now = ruby.now().await;
    assert!(ruby.heartbeat("a", until - now).await);
    site.changes_nothing(&ours).await;
}

#[tokio::test]
async fn leases_that_run_out_go_to_another_host_and_are_counted() {
    let site = Site::new().await;
    let other = site.another().await;
    let (host, second) = (site.host().await, other.host().await);
    site.submit(&[task("a")]).await;
    let stale = site.claim_for(host, 1, SHORT).await.remove(0);
    let mut taken = other.claim(second, 1).await;
    if taken.is_empty() {
        site.passes(stale.until).await;
        taken = other.claim(second, 1).await;
    }
    assert!(site.backend().now().await.unwrap() >= stale.until, "not before its end");
    let taken = taken.remove(0);
    assert_eq!((taken.lost, taken.attempt, taken.alone), (1, 1, false));
    site.changes_nothing(&stale).await;
    assert_eq!(other.settle(&taken, finish()).await, LeaseAnswer::Held);
    let task = site.get("a").await;
    assert_eq!((task.lost, task.attempts, task.state), (1, 1, State::Finished));
    let events: Vec<String> = site.queue.attempts("a").await.unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(events, ["lost", "finish"]);
}

#[tokio::test]
async fn a_task_that_is_lost_twice_runs_alone_and_fails_after_three_more() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("killer")]).await;
    let lose = async |alone: bool| {
        let claimed = site.backend().claim(&laelaps_queue::Claim { alive_time: SHORT, alone, ..asking(host, 9) }).await.unwrap();
        assert_eq!(keys(&claimed.tasks), ["killer"]);
        assert_eq!(claimed.tasks[0].alone, alone);
        site.passes(claimed.tasks[0].until).await;
    };
    lose(false).await;
    lose(false).await;
    site.submit(&[task("other")]).await;
    let company = site.backend().claim(&asking(host, 9)).await.unwrap();
    assert_eq!((keys(&company.tasks), company.alone_waiting), (vec!["other"], true));
    for _ in 0..3 {
        let company = site.backend().claim(&asking(host, 9)).await.unwrap();
        assert!(company.tasks.is_empty());
        if company.alone_waiting {
            lose(true).await;
        }
    }
    let end = site.backend().claim(&asking(host, 9)).await.unwrap();
    assert!(end.tasks.is_empty());
    let killer = site.get("killer").await;
    assert_eq!((killer.state, killer.lost, killer.error_code.as_deref()), (State::Failed, 5, Some("lost")));
}

#[tokio::test]
async fn heartbeats_renew_and_never_shorten() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a"), task("b")]).await;
    let claimed = site.claim(host, 2).await;
    let progress = laelaps_queue::Progress { done: 7, total: Some(9), note: "half".to_owned() };
    let beat = |place: usize, alive_time| laelaps_queue::Beat {
        lease_ref: claimed[place].lease_ref,
        alive_time,
        progress: Some(progress.clone()),
    };
    let answers = site.backend().heartbeat(&[beat(0, SHORT), beat(1, LONG * 2)]).await.unwrap();
    assert_eq!(answers, [LeaseAnswer::Held, LeaseAnswer::Held]);
    assert_eq!(ruby.row("a").await.0 * 1_000, claimed[0].until.0);
    assert!(ruby.row("b").await.0 * 1_000 >= claimed[1].until.0 + 290_000);
    assert_eq!(site.get("a").await.progress, Some(progress));
    for task in &claimed {
        assert_eq!(site.settle(task, finish()).await, LeaseAnswer::Held);
    }
    assert_eq!(site.get("a").await.progress, None);
}

#[tokio::test]
async fn many_writes_of_one_lease_at_once_do_not_take_each_other_for_losses() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let claimed = site.claim(host, 1).await.remove(0);
    let lease_ref = claimed.lease_ref;
    let mut writes = tokio::task::JoinSet::new();
    for number in 0..20_u64 {
        let backend = std::sync::Arc::clone(site.backend());
        writes.spawn(async move {
            if number % 2 == 0 {
                backend.update_data(lease_ref, format!(r#"{{"{number}":true}}"#).as_bytes()).await.unwrap()
            } else {
                let alive_time = LONG + Duration::from_secs(number * 10);
                backend.heartbeat(&[laelaps_queue::Beat { lease_ref, alive_time, progress: None }]).await.unwrap()[0]
            }
        });
    }
    while let Some(answer) = writes.join_next().await {
        assert_eq!(answer.unwrap(), LeaseAnswer::Held);
    }
    let data: serde_json::Value = serde_json::from_slice(&site.get("a").await.data.unwrap()).unwrap();
    assert_eq!(data.as_object().unwrap().len(), 11);
    assert_eq!(site.settle(&claimed, finish()).await, LeaseAnswer::Held);
}
