//! Who is suspected on PostgreSQL: tasks that were lost, plugin versions whose hosts died, and how suspicion ends. And who waits for a user's limit.

use std::time::Duration;

use laelaps_queue::{
    Accepts, Claim, ClaimedTask, Error, Event, HostDescription, HostId, LeaseRef, PluginVersion, Policy, Queue, Reclaimed, State,
};
use laelaps_test_databases::PATIENCE;
use sqlx::postgres::PgListener;

use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, LONG, finish, keys, settled, task, task_of};

async fn fixture() -> Fixture {
    Fixture::new(Database::Postgres).await
}

fn asking(host: HostId, alone: bool) -> Claim {
    Claim { alone, ..Claim::new(host, 50, LONG) }
}

async fn register(queue: &Queue, identity: &str) -> HostId {
    let identity = Some(identity.to_owned());
    queue.backend().register_host(&HostDescription { name: "far".to_owned(), process_id: 1, identity }).await.unwrap()
}

/// A host claims and is thought dead; answers it, and what it had.
async fn thought_dead(fixture: &Fixture, identity: &str, alone: bool) -> (HostId, Vec<ClaimedTask>, Reclaimed) {
    let host = register(&fixture.queue, identity).await;
    let claimed = fixture.backend().claim(&asking(host, alone)).await.unwrap().tasks;
    let lost = fixture.backend().hand_on(&[identity.to_owned()], &fixture.config.policy).await.unwrap();
    (host, claimed, lost)
}

fn leases(tasks: &[ClaimedTask]) -> Vec<LeaseRef> {
    tasks.iter().map(|task| task.lease_ref).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_that_returns_takes_its_losses_back() {
    let fixture = fixture().await;
    let sum = async || fixture.get("a").await.lost + fixture.get("b").await.lost;
    fixture.submit(&[task("a"), task_of("u", "b", Some(1))]).await;
    let (one, first, _) = thought_dead(&fixture, "one", false).await;
    let (two, second, _) = thought_dead(&fixture, "two", false).await;
    assert_eq!((first.len(), second.len(), sum().await), (2, 2, 4));
    let host = fixture.host().await;
    assert!(fixture.backend().claim(&asking(host, false)).await.unwrap().tasks.is_empty(), "both wait to run alone");
    assert_eq!(fixture.backend().excuse(two, &leases(&second)).await.unwrap(), 2);
    assert_eq!(sum().await, 2);
    assert_eq!(fixture.backend().excuse(two, &leases(&second)).await.unwrap(), 0, "once");
    let claimed = fixture.backend().claim(&asking(host, false)).await.unwrap();
    assert_eq!((claimed.tasks.len(), claimed.alone_waiting), (2, false), "in company again");
    assert!(claimed.tasks.iter().all(|task| task.lost == 1 && !task.alone));
    fixture.audit().await;
    // Also while they run; what is then given back does not bring them back.
    assert_eq!(fixture.backend().excuse(one, &leases(&first)).await.unwrap(), 2);
    let group: Vec<_> = claimed.tasks.iter().map(|task| settled(task, Event::Stopped)).collect();
    fixture.backend().settle(&group).await.unwrap();
    assert_eq!(sum().await, 0);
    let records = fixture.queue.attempts("a").await.unwrap();
    assert_eq!(records.iter().map(|record| record.event.as_str()).collect::<Vec<_>>(), ["excused", "excused", "stop"]);
    // What was not lost is not excused.
    assert_eq!(fixture.backend().excuse(host, &leases(&claimed.tasks)).await.unwrap(), 0);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_suspect_that_waits_apart_runs_in_company_once_its_losses_are_taken_back() {
    let fixture = fixture().await;
    fixture.submit(&[task("a")]).await;
    thought_dead(&fixture, "one", false).await;
    let (two, second, _) = thought_dead(&fixture, "two", false).await;
    let host = fixture.host().await;
    let nothing = Claim { accepts: Some(Accepts::new(|_| false)), ..asking(host, true) };
    assert!(fixture.backend().claim(&nothing).await.unwrap().tasks.is_empty());
    let places: i64 =
        sqlx::query_scalar("SELECT count(*) FROM unserved").fetch_one(&mut raw(&fixture.config).await).await.unwrap();
    assert_eq!(places, 1, "a host that runs nothing met it");
    assert_eq!(fixture.backend().excuse(two, &leases(&second)).await.unwrap(), 1);
    fixture.audit().await;
    let claimed = fixture.backend().claim(&asking(host, false)).await.unwrap().tasks;
    assert_eq!(claimed.iter().map(|task| (task.lost, task.alone)).collect::<Vec<_>>(), [(1, false)]);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_while_alone_is_taken_back_as_one_and_what_failed_stays_failed() {
    let fixture = fixture().await;
    fixture.submit(&[task("a")]).await;
    thought_dead(&fixture, "one", false).await;
    thought_dead(&fixture, "two", false).await;
    let mut alone = Vec::new();
    for identity in ["three", "four", "five"] {
        alone.push(thought_dead(&fixture, identity, true).await);
    }
    assert!(alone[2].2.tasks[0].failed, "the policy of the fixture waits for nothing");
    let (host, tasks, _) = &alone[0];
    assert!(tasks[0].alone);
    assert_eq!(fixture.backend().excuse(*host, &leases(tasks)).await.unwrap(), 1);
    let failed = fixture.get("a").await;
    assert_eq!((failed.state, failed.lost), (State::Failed, 4));
    let counts = "SELECT (lost, lost_alone)::text FROM task";
    let mut operator = raw(&fixture.config).await;
    assert_eq!(sqlx::query_scalar::<_, String>(counts).fetch_one(&mut operator).await.unwrap(), "(4,2)");
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_task_fails_by_suspicion_before_its_time_has_passed_since_it_was_lost_first() {
    let fixture = fixture().await;
    fixture.submit(&[task("a")]).await;
    let policy = Policy { suspicion: Duration::from_secs(3_600), ..fixture.config.policy.clone() };
    let lose = async |identity: &str, alone| {
        let host = register(&fixture.queue, identity).await;
        assert_eq!(fixture.backend().claim(&asking(host, alone)).await.unwrap().tasks.len(), 1, "{identity}");
        fixture.backend().hand_on(&[identity.to_owned()], &policy).await.unwrap().tasks.remove(0)
    };
    for (number, alone) in [false, false, true, true, true].into_iter().enumerate() {
        assert!(!lose(&format!("h{number}"), alone).await.failed);
    }
    let waits = fixture.get("a").await;
    assert_eq!((waits.state, waits.lost), (State::Waiting, 5));
    assert!(waits.run_at > fixture.backend().now().await.unwrap(), "later and later");
    fixture.meddle("UPDATE task SET lost_at = lost_at - 3600000").await;
    fixture.queue.cancel("a").await.unwrap();
    fixture.audit().await;
    // A retry by hand forgets all of it; then the same again, an hour later.
    fixture.queue.retry("a").await.unwrap();
    for (number, alone) in [false, false, true, true].into_iter().enumerate() {
        assert!(!lose(&format!("i{number}"), alone).await.failed);
    }
    fixture.meddle("UPDATE task SET lost_at = lost_at - 3600000").await;
    assert!(lose("last", true).await.failed);
    assert_eq!(fixture.state("a").await, State::Failed);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_that_ran_alone_on_three_dead_hosts_is_under_quarantine_until_it_is_released() {
    let fixture = fixture().await;
    let backend = fixture.backend();
    let version = |name: &str| PluginVersion { name: name.to_owned(), digest: format!("digest of {name}") };
    let (bad, good) = (version("bad"), version("good"));
    let die = async |identity: &str, versions: &[PluginVersion]| {
        let host = register(&fixture.queue, identity).await;
        backend.note_running(host, &[version("before")]).await.unwrap();
        backend.note_running(host, versions).await.unwrap();
        backend.hand_on(&[identity.to_owned()], &fixture.config.policy).await.unwrap();
        backend.hand_on(&[identity.to_owned()], &fixture.config.policy).await.unwrap();
        host
    };
    die("1", std::slice::from_ref(&bad)).await;
    die("2", &[bad.clone(), good.clone()]).await;
    die("3", &[]).await;
    let excused = die("4", std::slice::from_ref(&bad)).await;
    assert_eq!(backend.quarantined().await.unwrap(), [], "two so far");
    backend.excuse(excused, &[]).await.unwrap();
    die("5", std::slice::from_ref(&bad)).await;
    assert_eq!(backend.quarantined().await.unwrap(), [], "one of them lives");
    // Leases that end say it too, and once.
    let host = fixture.host().await;
    fixture.submit_some("a", 2).await;
    backend.note_running(host, std::slice::from_ref(&bad)).await.unwrap();
    for _ in 0..2 {
        let claimed = fixture.claim_for(host, 1, Duration::from_millis(1)).await.remove(0);
        fixture.passes(claimed.until).await;
        assert_eq!(backend.reclaim(&fixture.config.policy).await.unwrap().tasks.len(), 1);
    }
    let quarantine = backend.quarantined().await.unwrap();
    assert_eq!((quarantine.len(), quarantine[0].version.clone(), quarantine[0].deaths), (1, bad.clone(), 3));
    // One that leaves in good order runs nothing.
    let leaving = fixture.host().await;
    backend.note_running(leaving, std::slice::from_ref(&good)).await.unwrap();
    backend.unregister_host(leaving).await.unwrap();
    assert!(matches!(backend.note_running(leaving, &[]).await, Err(Error::UnknownHost(_))));
    assert!(backend.release_plugin(&bad.digest).await.unwrap());
    assert!(!backend.release_plugin(&bad.digest).await.unwrap() && !backend.release_plugin("unknown").await.unwrap());
    assert_eq!(backend.quarantined().await.unwrap(), []);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_suspect_drains_one_host_and_none_while_its_user_is_at_its_limit() {
    let fixture = fixture().await;
    fixture.submit(&[task_of("u", "suspect", Some(1))]).await;
    thought_dead(&fixture, "one", false).await;
    thought_dead(&fixture, "two", false).await;
    let (one, two) = (fixture.host().await, fixture.host().await);
    let waits = async |host, alone| fixture.backend().claim(&asking(host, alone)).await.unwrap();
    assert!(waits(one, false).await.alone_waiting);
    assert!(!waits(two, false).await.alone_waiting, "it is reserved");
    assert!(waits(one, false).await.alone_waiting, "for this one still");
    fixture.meddle("UPDATE suspect SET reserved_until = 0").await;
    assert!(waits(two, false).await.alone_waiting, "not for ever");
    // Another task of its user runs: nothing can be done now.
    fixture.submit(&[task_of("u", "other", Some(1))]).await;
    let other = waits(one, false).await;
    assert_eq!((keys(&other.tasks), other.alone_waiting), (vec!["other"], false));
    assert!(!waits(two, false).await.alone_waiting);
    fixture.backend().settle(&[settled(&other.tasks[0], finish())]).await.unwrap();
    assert_eq!(keys(&waits(one, true).await.tasks), ["suspect"], "who runs nothing takes it, reserved or not");
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_takes_no_more_of_limited_users_than_can_begin() {
    let fixture = fixture().await;
    let host = fixture.host().await;
    let mut tasks: Vec<_> = (0..6)
        .flat_map(|number| [task_of("u", &format!("u{number}"), Some(6)), task_of("v", &format!("v{number}"), Some(6))])
        .collect();
    tasks.extend((0..3).flat_map(|number| [task(&format!("free{number}")), task_of("w", &format!("w{number}"), None)]));
    fixture.submit(&tasks).await;
    let claim = async |limit, limited| {
        let claimed = fixture.backend().claim(&Claim { limit, limited, ..asking(host, false) }).await.unwrap().tasks;
        let limited = claimed.iter().filter(|task| task.max_running.is_some()).count();
        (limited, claimed.len() - limited)
    };
    assert_eq!(claim(2, Some(0)).await, (0, 2), "others, although these are first in the order");
    assert_eq!(claim(4, Some(1)).await, (1, 3), "and none but one of these");
    assert_eq!(claim(50, Some(3)).await, (3, 1));
    fixture.audit().await;
    assert_eq!(claim(50, None).await, (8, 0));
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_ends_wakes_claims_if_it_opens_a_user_and_only_then() {
    let fixture = fixture().await;
    let (host, other) = (fixture.host().await, fixture.another().await);
    fixture.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1)), task_of("v", "c", Some(1)), task("d")]).await;
    let claimed = fixture.claim(host, 9).await;
    assert_eq!(claimed.len(), 3);
    let of = |key: &str| claimed.iter().find(|task| task.key == key).unwrap();
    // The notices of the submit come first.
    tokio::time::timeout(PATIENCE, fixture.queue.wakeup()).await.unwrap();
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    let mut sender = raw(&fixture.config).await;
    let heard_before = async |heard: &mut PgListener, sender: &mut sqlx::PgConnection, word: &str| {
        sqlx::query("SELECT pg_notify('laelaps', $1)").bind(word).execute(sender).await.unwrap();
        let mut notices = 0;
        while tokio::time::timeout(PATIENCE, heard.recv()).await.expect("a notice").unwrap().payload() != word {
            notices += 1;
        }
        notices
    };
    // Nobody waits for these: what the bell rang for ends with the queue that settled.
    other.backend().settle(&[settled(of("c"), finish()), settled(of("d"), finish())]).await.unwrap();
    other.close().await;
    assert_eq!(heard_before(&mut heard, &mut sender, "quiet").await, 0);
    let other = fixture.another().await;
    let waiting = other.clone();
    let woken = tokio::spawn(async move { waiting.wakeup().await });
    other.backend().settle(&[settled(of("a"), finish())]).await.unwrap();
    tokio::time::timeout(PATIENCE, woken).await.expect("who settled is woken").unwrap();
    other.close().await;
    assert!(heard_before(&mut heard, &mut sender, "rung").await >= 1, "and so are others");
    assert_eq!(keys(&fixture.claim(host, 9).await), ["b"]);
    fixture.audit().await;
}
