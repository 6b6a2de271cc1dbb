//! Losses: how they are counted, and how they are taken back; versions that hosts die with.

use std::time::Duration;

use laelaps_queue::{Claim, ClaimedTask, HostId, LeaseAnswer, PluginVersion, Policy, Queue, State};

use crate::fixture::{Site, asking, finish, keys, task, task_of};

/// A lease that is over at once: times are whole seconds.
const SHORT: Duration = Duration::from_millis(100);

fn version(digest: &str) -> PluginVersion {
    PluginVersion { name: "p".to_owned(), digest: digest.to_owned() }
}

/// Claim task `a` and let its lease run out.
async fn lose(site: &Site, host: HostId, alone: bool) -> ClaimedTask {
    let claim = Claim { alive_time: SHORT, alone, ..asking(host, 1) };
    let mut tasks = site.backend().claim(&claim).await.unwrap().tasks;
    assert_eq!(keys(&tasks), ["a"]);
    site.passes(tasks[0].until).await;
    tasks.remove(0)
}

/// Whether `a` has to run alone, and how often it was lost, once the loss before was counted. It is due again afterwards.
async fn counted(site: &Site) -> (bool, u32) {
    let host = site.host().await;
    let claimed = site.backend().claim(&asking(host, 1)).await.unwrap();
    for task in &claimed.tasks {
        site.settle(task, laelaps_queue::Event::Stopped).await;
    }
    (claimed.alone_waiting, site.get("a").await.lost)
}

#[tokio::test]
async fn a_host_that_comes_back_takes_its_losses_back() {
    let site = Site::new().await;
    let other = site.another().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let mut lost = Vec::new();
    for _ in 0..2 {
        lost.push(lose(&site, host, false).await);
    }
    assert_eq!(counted(&other).await, (true, 2), "lost twice, it runs alone");
    let stale: Vec<_> = lost.iter().map(|task| task.lease_ref).collect();
    assert_eq!(site.beat(&lost[1]).await, LeaseAnswer::Lost);
    assert_eq!(site.backend().excuse(host, &stale[1..]).await.unwrap(), 1);
    assert_eq!(site.backend().excuse(host, &stale[1..]).await.unwrap(), 0, "once");
    // A claim that knew it as a suspect forgets that.
    assert_eq!(counted(&other).await, (false, 1));
    assert_eq!(site.backend().excuse(host, &stale).await.unwrap(), 1);
    let events: Vec<_> = site.backend().attempts("a").await.unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(events.iter().filter(|event| *event == "excused").count(), 2, "{events:?}");
    let third = other.host().await;
    let claimed = other.claim(third, 1).await.remove(0);
    assert_eq!((claimed.lost, claimed.lost_alone, claimed.alone), (0, 0, false));
}

#[tokio::test]
async fn a_loss_that_was_excused_before_anybody_counted_it_is_never_counted() {
    let site = Site::new().await;
    let other = site.another().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    for _ in 0..3 {
        let lost = lose(&site, host, false).await;
        site.backend().excuse(host, &[lost.lease_ref]).await.unwrap();
    }
    assert_eq!(counted(&other).await, (false, 0));
}

#[tokio::test]
async fn losses_that_a_watchdog_found_are_taken_back_with_the_hosts_death() {
    let site = Site::new().await;
    let other = site.another().await;
    let host = site.watched("h").await;
    site.backend().note_running(host, &[version("d")]).await.unwrap();
    site.submit(&[task("a")]).await;
    let stale = site.claim(host, 1).await.remove(0);
    assert_eq!(other.hand_on("h").await, ["a"]);
    assert_eq!(counted(&other).await, (false, 1));
    assert_eq!(site.beat(&stale).await, LeaseAnswer::Lost);
    assert_eq!(site.backend().excuse(host, &[stale.lease_ref]).await.unwrap(), 1);
    assert_eq!(counted(&other).await, (false, 0));
    assert!(!other.backend().release_plugin("d").await.unwrap(), "no death is left");
}

/// The site with a policy that suspects for so long.
async fn suspecting(site: &Site, suspicion: Duration) -> Site {
    let mut config = site.config.clone();
    config.policy = Policy { suspicion, ..config.policy };
    Site { queue: Queue::open(&config).await.unwrap(), config }
}

#[tokio::test]
async fn no_task_fails_by_losses_before_suspicion_has_lasted() {
    let site = Site::new().await;
    let patient = suspecting(&site, Duration::from_secs(3_600)).await;
    let host = patient.host().await;
    site.submit(&[task("a")]).await;
    for alone in [false, false, true, true] {
        // The first claim meets the loss and sees that the task has to run alone.
        if alone {
            assert!(patient.backend().claim(&asking(host, 1)).await.unwrap().alone_waiting);
        }
        lose(&patient, host, alone).await;
    }
    assert!(patient.backend().claim(&asking(host, 1)).await.unwrap().alone_waiting);
    lose(&patient, host, true).await;
    // Lost alone three times: it waits a sixtieth of the hour, and has not failed.
    let waiting = patient.backend().claim(&asking(host, 1)).await.unwrap();
    assert!(waiting.tasks.is_empty() && !waiting.alone_waiting);
    let task = patient.get("a").await;
    assert_eq!((task.state, task.lost), (State::Waiting, 5));
    let wait = task.run_at.since(patient.backend().now().await.unwrap());
    assert!(wait > Duration::from_secs(40) && wait < Duration::from_secs(62), "{wait:?}");
    // The hour is over, and the next loss is one too many.
    let mut ruby = site.ruby().await;
    ruby.run("UPDATE {s} SET lost_at = lost_at - 3700000, state = NULL").await;
    ruby.run("UPDATE {t} SET timeout = UNIX_TIMESTAMP() - 1").await;
    assert!(patient.backend().claim(&asking(host, 1)).await.unwrap().alone_waiting);
    lose(&patient, host, true).await;
    assert!(patient.backend().claim(&asking(host, 1)).await.unwrap().tasks.is_empty());
    assert_eq!(patient.state("a").await, State::Failed);
}

#[tokio::test]
async fn a_suspect_drains_one_host_at_a_time_and_none_while_its_user_is_at_its_limit() {
    let site = Site::new().await;
    let (second, third) = (site.another().await, site.another().await);
    let (one, two, three) = (site.watched("one").await, second.watched("two").await, third.host().await);
    let ask = async |site: &Site, host, alone| site.backend().claim(&Claim { alone, ..asking(host, 9) }).await.unwrap();
    site.submit(&[task_of("u", "a", Some(1))]).await;
    for _ in 0..2 {
        lose(&third, three, false).await;
    }
    for _ in 0..2 {
        assert!(ask(&site, one, false).await.alone_waiting);
        assert!(!ask(&second, two, false).await.alone_waiting, "one host is enough");
    }
    // Of greater weight than the suspect.
    site.submit(&[task_of("u", "other", Some(5))]).await;
    let other = ask(&site, one, false).await;
    assert_eq!((keys(&other.tasks), other.alone_waiting), (vec!["other"], false), "nobody ends anything for what may not run");
    assert!(!ask(&second, two, false).await.alone_waiting);
    assert!(ask(&site, one, true).await.tasks.is_empty());
    site.settle(&other.tasks[0], finish()).await;
    assert!(ask(&site, one, false).await.alone_waiting, "it stays reserved");
    // With that host gone, it is another's turn.
    third.hand_on("one").await;
    assert!(ask(&second, two, false).await.alone_waiting);
    assert!(!ask(&third, three, false).await.alone_waiting);
    let alone = ask(&third, three, true).await;
    assert_eq!((keys(&alone.tasks), alone.alone_waiting), (vec!["a"], false), "who runs nothing takes it, reserved or not");
    assert!(!ask(&second, two, false).await.alone_waiting);
}

#[tokio::test]
async fn without_our_tables_a_users_limit_holds_and_nobody_ends_anything() {
    let site = Site::plain().await;
    let host = site.host().await;
    site.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
    for _ in 0..3 {
        let claimed = site.backend().claim(&Claim { alive_time: SHORT, ..asking(host, 9) }).await.unwrap();
        assert_eq!((claimed.tasks.len(), claimed.alone_waiting), (1, false));
        assert!(site.claim(host, 9).await.is_empty(), "the other one waits for it");
        site.passes(claimed.tasks[0].until).await;
    }
}

#[tokio::test]
async fn another_ending_of_an_attempt_ends_the_suspicion() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    lose(&site, host, false).await;
    let again = site.claim(host, 1).await.remove(0);
    assert_eq!(again.lost, 1);
    assert_eq!(ruby.number("SELECT COUNT(*) FROM {s} WHERE lost_at IS NOT NULL").await, 1);
    site.settle(&again, laelaps_queue::Event::Retry { delay: None }).await;
    assert_eq!(ruby.number("SELECT COUNT(*) FROM {s} WHERE lost_at IS NOT NULL OR lost > 0").await, 0);
}

#[tokio::test]
async fn a_version_that_three_hosts_died_with_is_under_quarantine() {
    let site = Site::new().await;
    let other = site.another().await;
    for (round, running) in [vec!["bad"], vec!["bad", "good"], vec!["bad"], vec![]].into_iter().enumerate() {
        let identity = format!("h{round}");
        let host = site.watched(&identity).await;
        site.backend().note_running(host, &[version("before")]).await.unwrap();
        let versions: Vec<_> = running.into_iter().map(version).collect();
        site.backend().note_running(host, &versions).await.unwrap();
        assert!(other.hand_on(&identity).await.is_empty());
        assert!(other.hand_on(&identity).await.is_empty(), "a host dies once");
        assert!(other.backend().quarantined().await.unwrap().is_empty());
    }
    // The third is not found by a watchdog, but by its lease.
    let third = site.watched("third").await;
    site.backend().note_running(third, &[version("bad")]).await.unwrap();
    site.submit(&[task("a")]).await;
    lose(&site, third, false).await;
    let host = other.host().await;
    let claimed = other.claim(host, 1).await.remove(0);
    assert_eq!(other.settle(&claimed, finish()).await, LeaseAnswer::Held);
    let quarantined = other.backend().quarantined().await.unwrap();
    assert_eq!(quarantined.iter().map(|found| (&found.version, found.deaths)).collect::<Vec<_>>(), [(&version("bad"), 3)]);
    // It lives after all.
    site.backend().excuse(third, &[]).await.unwrap();
    assert!(other.backend().quarantined().await.unwrap().is_empty());
    assert!(other.backend().release_plugin("bad").await.unwrap());
    assert!(!other.backend().release_plugin("bad").await.unwrap());
}

#[tokio::test]
async fn a_host_that_left_in_good_order_has_died_of_nothing() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    let host = site.watched("h").await;
    site.backend().note_running(host, &[version("d")]).await.unwrap();
    site.submit(&[task("a")]).await;
    lose(&site, host, false).await;
    site.backend().unregister_host(host).await.unwrap();
    site.hand_on("h").await;
    assert_eq!(counted(&site).await, (false, 1));
    assert_eq!(ruby.number("SELECT COUNT(*) FROM {d}").await, 0);
}

#[tokio::test]
async fn without_our_tables_nothing_is_counted_or_noted() {
    let site = Site::plain().await;
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let lost = lose(&site, host, false).await;
    site.backend().note_running(host, &[version("d")]).await.unwrap();
    assert_eq!(site.backend().excuse(host, &[lost.lease_ref]).await.unwrap(), 0);
    assert!(site.backend().quarantined().await.unwrap().is_empty());
    assert!(!site.backend().release_plugin("d").await.unwrap());
}

/// A note of ours that somebody has spoilt counts for nothing, and stops nobody.
#[tokio::test]
async fn a_note_with_a_state_that_is_none_stops_no_claim() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[laelaps_queue::NewTask { max_attempts: Some(3), ..task("a") }, task("b")]).await;
    ruby.run("UPDATE {s} SET state = 'oops'").await;
    assert_eq!(keys(&site.claim(host, 9).await), ["a", "b"]);
    assert_eq!(site.state("a").await, State::Running);
}
