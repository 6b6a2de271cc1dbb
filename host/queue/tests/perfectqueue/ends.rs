//! How tasks end, what Ruby sees of it, and what is removed.

use std::time::Duration;

use laelaps_queue::{
    Config, Error, Event, FailureKind, Filter, Kind, LeaseAnswer, NewTask, PerfectQueue, Queue, Settlement, State, Submitted,
};
use laelaps_test_databases::{PATIENCE, eventually};

use crate::fixture::{Site, finish, keys, settled, table, task, task_of, with_follow_ups};

const DELETE_OFFSET: i64 = 1_000_000_000;

fn rejected() -> Event {
    Event::Failure { kind: FailureKind::Reject, code: "bad-input".to_owned(), message: "line 7 is torn".to_owned() }
}

#[tokio::test]
async fn a_finished_task_is_finished_to_ruby_and_keeps_its_output_beside() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task_of("u", "a", Some(1)), task("b")]).await;
    let claimed = site.claim(host, 2).await;
    let before = ruby.now().await;
    let with = Event::Finish { output: Some(b"\x00\xff out".to_vec()), retention: Some(Duration::from_secs(9)) };
    let mut settlement = settled(&claimed[0], with);
    settlement.plugin_digest = Some("d1".into());
    let empty = Event::Finish { output: Some(Vec::new()), retention: None };
    let answers = site.backend().settle(&[settlement, settled(&claimed[1], empty)]).await.unwrap();
    assert_eq!(answers, [LeaseAnswer::Held, LeaseAnswer::Held]);
    let (time, _, created_at, user, _) = ruby.row("a").await;
    assert_eq!((created_at, user), (None, None));
    let (finished_at, after) = (time + DELETE_OFFSET - 9, ruby.now().await);
    assert!((before..=after + 1).contains(&finished_at), "the time is that of PerfectQueue's finish");
    let finished = site.get("a").await;
    assert_eq!((finished.state, finished.attempts, finished.plugin_digest.as_deref()), (State::Finished, 1, Some("d1")));
    assert_eq!((finished.output.as_deref(), finished.user.as_deref()), (Some(&b"\x00\xff out"[..]), Some("u")));
    assert_eq!(finished.retained_until.map(|moment| moment.0), Some((time + DELETE_OFFSET) * 1_000));
    assert_eq!(site.get("b").await.output.as_deref(), Some(&b""[..]));
    let attempts = site.queue.attempts("a").await.unwrap();
    assert_eq!((attempts.len(), attempts[0].event.as_str(), attempts[0].attempt), (1, "finish", 1));
    assert_eq!(attempts[0].host, format!("tester, process {}", std::process::id()));
    assert!(!ruby.finish("a", 300).await, "Ruby sees that it is finished already");
}

#[tokio::test]
async fn failed_and_cancelled_tasks_are_finished_rows_that_we_know_better() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task_of("u", "a failed", None), task_of("u", "b cancelled", None), task("forced")]).await;
    let claimed = site.claim(host, 1).await.remove(0);
    assert_eq!(site.settle(&claimed, rejected()).await, LeaseAnswer::Held);
    site.queue.cancel("b cancelled").await.unwrap();
    site.queue.force_finish("forced", None).await.unwrap();
    for key in ["a failed", "b cancelled", "forced"] {
        assert_eq!(ruby.row(key).await.2, None, "{key}");
    }
    let failed = site.get("a failed").await;
    assert_eq!((failed.state, failed.error_code.as_deref()), (State::Failed, Some("bad-input")));
    assert_eq!((site.state("b cancelled").await, site.state("forced").await), (State::Cancelled, State::Finished));
    let stats = site.queue.stats().await.unwrap();
    assert_eq!((stats.failed, stats.cancelled, stats.finished, stats.ready), (1, 1, 1, 0));
    assert!(matches!(site.queue.cancel("a failed").await, Err(Error::AlreadyEnded { state: State::Failed, .. })));
    assert!(matches!(site.queue.force_finish("no such", None).await, Err(Error::NotFound(_))));
    // A new life, with their user.
    site.queue.retry("a failed").await.unwrap();
    site.queue.retry("b cancelled").await.unwrap();
    assert!(matches!(site.queue.retry("forced").await, Err(Error::WrongState { state: State::Finished, .. })));
    let again = site.claim(host, 9).await;
    assert_eq!(again.len(), 2);
    assert!(again.iter().all(|task| task.user.as_deref() == Some("u") && task.attempt == 1));
    assert!(matches!(site.queue.retry("a failed").await, Err(Error::WrongState { state: State::Running, .. })));
}

#[tokio::test]
async fn without_our_table_everything_works_that_needs_none() {
    let site = Site::plain().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&(0..6).map(|n| task(&format!("a{n}"))).collect::<Vec<_>>()).await;
    let claimed = site.claim(host, 6).await;
    let events = [finish(), rejected(), Event::Retry { delay: Some(Duration::from_secs(60)) }, Event::Stopped];
    let group: Vec<Settlement> = claimed.iter().zip(events).map(|(task, event)| settled(task, event)).collect();
    assert_eq!(site.backend().settle(&group).await.unwrap(), [LeaseAnswer::Held; 4]);
    site.queue.cancel("a4").await.unwrap();
    site.changes_nothing(&claimed[4]).await;
    assert_eq!(site.settle(&claimed[5], finish()).await, LeaseAnswer::Held);
    for key in ["a0", "a1", "a4", "a5"] {
        assert_eq!((site.state(key).await, ruby.row(key).await.2), (State::Finished, None));
    }
    assert_eq!(site.state("a2").await, State::Running, "as PerfectQueue says of what waits for its time");
    assert!(matches!(site.queue.retry("a2").await, Err(Error::NotSupported { .. })));
    assert!(matches!(site.queue.retry("a1").await, Err(Error::NotSupported { .. })));
    assert_eq!(keys(&site.claim(host, 9).await), ["a3"]);
    assert!(site.queue.attempts("a0").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_group_with_lost_leases_tells_each_apart() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (host, mut ruby) = (site.host().await, site.ruby().await);
        site.submit(&(0..5).map(|n| task(&format!("a{n}"))).collect::<Vec<_>>()).await;
        let claimed = site.claim(host, 5).await;
        assert!(ruby.finish("a1", 300).await && ruby.heartbeat("a3", 100).await);
        let group: Vec<Settlement> = claimed.iter().chain(&claimed[..1]).map(|task| settled(task, finish())).collect();
        use LeaseAnswer::{Held, Lost};
        assert_eq!(site.backend().settle(&group).await.unwrap(), [Held, Lost, Held, Lost, Held, Lost]);
        assert!(ruby.row("a3").await.2.is_some(), "Ruby's is not finished");
    }
}

#[tokio::test]
async fn what_ruby_wrote_since_counts_and_not_what_we_noted() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let claimed = site.claim(host, 1).await.remove(0);
    site.settle(&claimed, Event::Retry { delay: Some(Duration::from_secs(600)) }).await;
    assert_eq!(site.state("a").await, State::Waiting);
    assert!(ruby.heartbeat("a", 100).await);
    assert_eq!(site.state("a").await, State::Running, "as far as the table tells");
    assert!(ruby.finish("a", 10).await);
    let finished = site.get("a").await;
    assert_eq!((finished.state, finished.attempts), (State::Finished, 0), "how it ended was not ours to note");
}

#[tokio::test]
async fn a_waiting_task_is_made_due() {
    let site = Site::new().await;
    let host = site.host().await;
    let far = site.backend().now().await.unwrap().plus(Duration::from_secs(3600));
    site.submit(&[NewTask { run_at: Some(far), ..task("a") }, task("b")]).await;
    assert_eq!(keys(&site.claim(host, 9).await), ["b"]);
    site.queue.retry("a").await.unwrap();
    assert_eq!(keys(&site.claim(host, 9).await), ["a"]);
}

#[tokio::test]
async fn rows_are_removed_when_their_retention_is_over() {
    // Its claims leave the removal to the test.
    let seldom = PerfectQueue { cleanup_interval: u32::MAX, ..table(true) };
    let site = Site::with(seldom.clone()).await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&(0..4).map(|n| task(&format!("a{n}"))).collect::<Vec<_>>()).await;
    let claimed = site.claim(host, 3).await;
    let at_once = Event::Finish { output: Some(b"x".to_vec()), retention: Some(Duration::ZERO) };
    site.settle(&claimed[0], at_once).await;
    site.settle(&claimed[1], finish()).await;
    site.settle(&claimed[2], finish()).await;
    // Ruby removes one of them with its own clean-up.
    ruby.run("DELETE FROM {t} WHERE id = 'a2'").await;
    assert_eq!(site.queue.clean_up().await.unwrap(), 1);
    assert!(!site.queue.exists("a0").await.unwrap() && site.queue.exists("a1").await.unwrap());
    assert_eq!(ruby.number("SELECT COUNT(*) FROM {s}").await, 1, "what was noted goes with its task");
    ruby.run("UPDATE {t} SET timeout = timeout - 300 WHERE id = 'a1'").await;
    // After each claim that finds something, with an interval of 0.
    let kind = Kind::PerfectQueue(PerfectQueue { cleanup_interval: 0, ..seldom });
    let config = Config { kind, ..site.config.clone() };
    let always = Site { queue: Queue::open(&config).await.unwrap(), config };
    assert_eq!(keys(&always.claim(always.host().await, 9).await), ["a3"]);
    eventually(PATIENCE, "the claim removes it", async || {
        if site.queue.exists("a1").await.unwrap() { Err("it is there".to_owned()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test]
async fn lists_are_in_the_order_of_times_and_filter() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&(0..25).map(|n| task(&format!("a{n:02}"))).collect::<Vec<_>>()).await;
    site.submit(&[NewTask { task_type: "other".to_owned(), ..task_of("u", "A%", None) }]).await;
    ruby.run("UPDATE {t} SET timeout = timeout - 10 WHERE id = 'a24'").await;
    let mut seen: Vec<String> = Vec::new();
    let mut after = None;
    loop {
        // Each page by another process.
        let page = site.another().await.queue.list(&Filter { limit: 10, after, ..Filter::default() }).await.unwrap();
        seen.extend(page.tasks.into_iter().map(|task| task.key));
        after = page.next;
        if after.is_none() {
            break;
        }
    }
    assert_eq!((seen.len(), seen[0].as_str()), (26, "a24"));
    let listed = async |filter: Filter| -> Vec<String> {
        let page = site.queue.list(&Filter { limit: 100, ..filter }).await.unwrap();
        page.tasks.into_iter().map(|task| task.key).collect()
    };
    assert_eq!(listed(Filter { task_type: Some("other".to_owned()), ..Filter::default() }).await, ["A%"]);
    assert_eq!(listed(Filter { user: Some("u".to_owned()), ..Filter::default() }).await, ["A%"]);
    assert_eq!(listed(Filter { key_prefix: Some("A%".to_owned()), ..Filter::default() }).await, ["A%"]);
    assert_eq!(listed(Filter { key_prefix: Some("a1".to_owned()), ..Filter::default() }).await.len(), 10);
    let claimed = site.claim(host, 3).await;
    site.settle(&claimed[0], rejected()).await;
    site.settle(&claimed[1], finish()).await;
    assert_eq!(listed(Filter { states: vec![State::Running], ..Filter::default() }).await, [claimed[2].key.clone()]);
    assert_eq!(listed(Filter { states: vec![State::Failed], ..Filter::default() }).await, [claimed[0].key.clone()]);
    assert_eq!(listed(Filter { states: vec![State::Failed, State::Finished], ..Filter::default() }).await.len(), 2);
    assert_eq!(listed(Filter { states: vec![State::Waiting], ..Filter::default() }).await.len(), 23);
}

#[tokio::test]
async fn a_key_is_free_as_soon_as_its_retention_is_over() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let host = site.host().await;
        site.submit(&[task("a"), task("b"), task("next")]).await;
        let over = Event::Finish { output: None, retention: Some(Duration::ZERO) };
        let tasks = site.claim(host, 3).await;
        for task in tasks.iter().filter(|task| task.key != "b") {
            assert_eq!(site.settle(task, over.clone()).await, LeaseAnswer::Held);
        }
        // No clean-up has taken place since.
        assert_eq!(site.queue.submit(task("a")).await.unwrap(), Submitted::Created);
        assert_eq!(site.queue.submit(task("a")).await.unwrap(), Submitted::AlreadyExists);
        let parent = tasks.iter().find(|task| task.key == "b").unwrap();
        let settlement = with_follow_ups(vec![task("next"), task("a")], settled(parent, over));
        assert_eq!(site.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
        let mut claimed: Vec<String> = site.claim(host, 9).await.into_iter().map(|task| task.key).collect();
        claimed.sort();
        assert_eq!(claimed, ["a", "next"]);
    }
}
