//! Hosts that a watchdog watches: what they run is found when they die.

use std::time::Duration;

use laelaps_queue::{Beat, Error, Event, LeaseAnswer, NewTask, Policy, State};
use laelaps_test_databases::LONG as PATIENCE_MAX;

use crate::fixture::{LONG, Site, asking, finish, keys, settled, task};

const SHORT: Duration = Duration::from_millis(100);

fn tasks(prefix: &str, count: usize) -> Vec<NewTask> {
    (0..count).map(|n| task(&format!("{prefix}{n:04}"))).collect()
}

#[tokio::test]
async fn what_a_dead_host_runs_is_handed_on_at_once_and_nothing_else() {
    let site = Site::new().await;
    let (other, mut ruby) = (site.another().await, site.ruby().await);
    let (dead, second, left_alone) = (site.watched("dead").await, other.watched("alive").await, other.host().await);
    for (prefix, of, host) in [("a", &site, dead), ("b", &other, second), ("c", &other, left_alone)] {
        site.submit(&tasks(prefix, 2)).await;
        assert_eq!(of.claim(host, 9).await.len(), 2);
    }
    site.submit(&[task("waiting")]).await;
    let rows = "SELECT CAST(SHA2(GROUP_CONCAT(timeout, owner, created_at ORDER BY id), 256) AS CHAR) FROM {t} WHERE id > 'b'";
    let before = ruby.text(rows).await;
    assert!(other.hand_on("nobody").await.is_empty());
    let reclaimed = other.backend().hand_on(&["dead".to_owned()], &Policy::default()).await.unwrap();
    let hosts: Vec<_> = reclaimed.tasks.iter().map(|lost| (lost.host, lost.failed)).collect();
    assert_eq!(hosts, [(dead, false); 2]);
    let struck_off: Vec<_> = reclaimed.dead_hosts.iter().map(|host| (host.id, host.identity.as_deref(), host.running)).collect();
    assert_eq!(struck_off, [(dead, Some("dead"), 2)]);
    assert_eq!(ruby.text(rows).await, before);
    // Both kinds of workers may have them now.
    ruby.run("UPDATE {t} SET timeout = timeout + 3600 WHERE id = 'waiting'").await;
    assert_eq!(ruby.acquire_fair(300, 1).await, ["a0000"]);
    assert_eq!(keys(&other.claim(second, 9).await), ["a0001"]);
    assert!(other.hand_on("dead").await.is_empty(), "neither Ruby's nor the other host's");
}

#[tokio::test]
async fn a_host_that_was_taken_for_dead_changes_nothing() {
    let site = Site::new().await;
    let (other, mut ruby) = (site.another().await, site.ruby().await);
    let host = site.watched("h").await;
    site.submit(&tasks("a", 5)).await;
    let stale = site.claim(host, 5).await;
    assert_eq!(other.hand_on("h").await.len(), 5);
    let before = ruby.row("a0000").await;
    assert_eq!(site.beat(&stale[0]).await, LeaseAnswer::Lost);
    assert_eq!(ruby.row("a0000").await, before);
    let before = ruby.row("a0001").await;
    assert_eq!(site.backend().update_data(stale[1].lease_ref, br#"{"stale":1}"#).await.unwrap(), LeaseAnswer::Lost);
    assert_eq!(ruby.row("a0001").await, before);
    assert_eq!(site.settle(&stale[2], finish()).await, LeaseAnswer::Lost);
    assert_eq!(site.settle(&stale[3], Event::Release { delay: None }).await, LeaseAnswer::Lost);
    // Nor when the row runs again, with the very time that stood there: the fair acquire of Ruby leaves what stands in `owner`.
    ruby.run(&format!("UPDATE {{t}} SET timeout = {} WHERE id = 'a0004'", stale[4].until.0 / 1_000)).await;
    for task in stale.iter().rev() {
        site.changes_nothing(task).await;
    }
}

#[tokio::test]
async fn a_row_that_ruby_has_meanwhile_is_left_to_it() {
    for fair in [true, false] {
        let site = Site::new().await;
        let (host, mut ruby) = (site.watched("h").await, site.ruby().await);
        site.submit(&[task("a")]).await;
        let stale = site.claim_for(host, 1, SHORT).await.remove(0);
        site.passes(stale.until).await;
        // The fair acquire leaves our token there.
        let stolen = if fair { ruby.acquire_fair(300, 9).await } else { ruby.acquire_unfair(300, 9).await };
        assert_eq!(stolen, ["a"]);
        let before = ruby.row("a").await;
        assert_eq!(before.4 == stale.lease_ref.lease.0.unsigned_abs(), fair);
        assert!(site.hand_on("h").await.is_empty());
        assert_eq!(ruby.row("a").await, before);
    }
}

#[tokio::test]
async fn what_was_handed_on_is_not_handed_on_again_while_ruby_has_it() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.watched("h").await, site.ruby().await);
    site.submit(&tasks("a", 2)).await;
    assert_eq!(site.claim(host, 2).await.len(), 2);
    assert_eq!(site.hand_on("h").await, ["a0000", "a0001"]);
    assert_eq!(ruby.acquire_fair(300, 1).await, ["a0000"]);
    let before = (ruby.row("a0000").await, ruby.row("a0001").await);
    // As it would be if the host had more tasks, and were not struck off yet.
    let sql = "INSERT INTO {h} (id, identity, name, process_id, started_at, seen_at, until) VALUES (HOST, 'h', '', 1, 1, 1, 2147483646)";
    ruby.run(&sql.replace("HOST", &host.0.to_string())).await;
    assert!(site.hand_on("h").await.is_empty());
    assert_eq!((ruby.row("a0000").await, ruby.row("a0001").await), before);
}

#[tokio::test]
async fn what_waits_for_its_time_is_left_alone() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.watched("h").await, site.ruby().await);
    let later = Duration::from_secs(200);
    let soon = site.backend().now().await.unwrap().plus(later);
    site.submit(&[task("retried"), task("released"), task("stopped"), task("running")]).await;
    site.submit(&[NewTask { run_at: Some(soon), ..task("scheduled") }]).await;
    let later = Some(later);
    for task in site.claim(host, 9).await {
        let event = match task.key.as_str() {
            "retried" => Event::Retry { delay: later },
            "released" => Event::Release { delay: later },
            "stopped" => Event::Stopped,
            _ => continue,
        };
        assert_eq!(site.settle(&task, event).await, LeaseAnswer::Held);
    }
    let mut before = Vec::new();
    for key in ["retried", "released", "stopped", "scheduled"] {
        before.push(ruby.row(key).await);
    }
    assert_eq!(site.hand_on("h").await, ["running"]);
    for (key, before) in ["retried", "released", "stopped", "scheduled"].into_iter().zip(before) {
        assert_eq!(ruby.row(key).await, before);
    }
}

#[tokio::test]
async fn a_loss_is_counted_once_when_the_task_is_claimed_again() {
    let site = Site::new().await;
    let (host, other) = (site.watched("h").await, site.another().await);
    let second = other.watched("i").await;
    site.submit(&[task("a")]).await;
    let _ = site.claim(host, 1).await;
    assert_eq!(other.hand_on("h").await, ["a"]);
    assert!(other.hand_on("h").await.is_empty());
    let again = other.claim(second, 1).await.remove(0);
    assert_eq!((again.lost, again.attempt), (1, 1));
    other.settle(&again, Event::Stopped).await;
    let again = other.claim(second, 1).await.remove(0);
    assert_eq!(again.lost, 1);
    assert_eq!(other.settle(&again, finish()).await, LeaseAnswer::Held);
    let events: Vec<String> = site.queue.attempts("a").await.unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!((events, site.get("a").await.lost), (vec!["lost".to_owned(), "stop".to_owned(), "finish".to_owned()], 1));
}

#[tokio::test]
async fn a_task_that_ends_its_hosts_is_found_out() {
    let site = Site::new().await;
    site.submit(&[task("killer")]).await;
    for round in 0..6 {
        let host = site.watched(&format!("h{round}")).await;
        let company = site.backend().claim(&asking(host, 9)).await.unwrap();
        let alone = company.alone_waiting;
        let claimed =
            if alone { site.backend().claim(&laelaps_queue::Claim { alone, ..asking(host, 9) }).await.unwrap() } else { company };
        assert_eq!(claimed.tasks.len(), usize::from(round < 5), "round {round}");
        assert_eq!(site.hand_on(&format!("h{round}")).await.len(), claimed.tasks.len());
    }
    let killer = site.get("killer").await;
    assert_eq!((killer.state, killer.lost, killer.error_code.as_deref()), (State::Failed, 5, Some("lost")));
}

#[tokio::test]
async fn a_host_that_was_handed_on_claims_nothing_until_it_registers_again() {
    let site = Site::new().await;
    let (host, other) = (site.watched("h").await, site.watched("i").await);
    assert!(site.hand_on("h").await.is_empty());
    for _ in 0..2 {
        let refused = site.backend().claim(&asking(host, 1)).await;
        assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host), "{refused:?}");
        site.submit(&[task("a")]).await;
    }
    let again = site.watched("h2").await;
    assert!(again > host && again != other, "no number comes twice");
    assert_eq!(keys(&site.claim(again, 1).await), ["a"]);
    site.backend().unregister_host(host).await.unwrap();
}

#[tokio::test]
async fn a_claim_that_is_under_way_when_its_host_is_gone_takes_nothing() {
    for leaves in [false, true] {
        let site = Site::new().await;
        let (host, mut ruby, mut watcher) = (site.watched("h").await, site.ruby().await, site.ruby().await);
        if leaves {
            // It holds something, so that its row stays.
            site.submit(&[task("held")]).await;
            assert_eq!(site.claim(host, 1).await.len(), 1);
        }
        site.submit(&[task("a")]).await;
        assert!(ruby.lock().await);
        let backend = std::sync::Arc::clone(site.backend());
        let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
        crate::lock::somebody_waits(&mut watcher).await;
        if leaves {
            site.backend().unregister_host(host).await.unwrap();
        } else {
            assert!(site.hand_on("h").await.is_empty());
        }
        let before = watcher.row("a").await;
        ruby.unlock().await;
        assert!(claiming.await.unwrap().unwrap().tasks.is_empty());
        assert_eq!(watcher.row("a").await, before);
        assert_eq!(site.hand_on("h").await.len(), usize::from(leaves));
    }
}

#[tokio::test]
async fn whatever_is_claimed_meanwhile_nothing_stays_with_a_host_that_is_handed_on() {
    let site = Site::new().await;
    let (host, other) = (site.watched("h").await, site.another().await);
    site.submit(&tasks("a", 300)).await;
    let backend = std::sync::Arc::clone(site.backend());
    let (claimed, mut first) = tokio::sync::oneshot::channel();
    let claiming = tokio::spawn(async move {
        let mut claimed = Some(claimed);
        let mut keys = Vec::new();
        loop {
            match backend.claim(&asking(host, 3)).await {
                Ok(some) => keys.extend(some.tasks.into_iter().map(|task| task.key)),
                Err(Error::UnknownHost(_)) => return keys,
                Err(error) => panic!("{error}"),
            }
            if keys.len() > 30
                && let Some(claimed) = claimed.take()
            {
                claimed.send(()).unwrap();
            }
        }
    });
    (&mut first).await.unwrap();
    let mut handed_on = Vec::new();
    loop {
        let some = other.hand_on("h").await;
        if some.is_empty() {
            break;
        }
        handed_on.extend(some);
    }
    let claiming = tokio::time::timeout(PATIENCE_MAX, claiming);
    let mut claimed = claiming.await.expect("the host is told that it is gone").unwrap();
    handed_on.sort();
    claimed.sort();
    assert_eq!(handed_on, claimed);
    assert_eq!(site.ruby().await.number("SELECT COUNT(*) FROM {t} WHERE timeout > UNIX_TIMESTAMP()").await, 0);
}

#[tokio::test]
async fn what_a_host_has_renewed_is_handed_on_too() {
    let site = Site::new().await;
    let (host, other) = (site.watched("h").await, site.another().await);
    site.submit(&tasks("a", 2)).await;
    let claimed = site.claim_for(host, 2, LONG / 2).await;
    assert_eq!(site.beat(&claimed[0]).await, LeaseAnswer::Held);
    let beat = Beat { lease_ref: claimed[1].lease_ref, alive_time: LONG * 2, progress: None };
    assert_eq!(site.backend().heartbeat(&[beat]).await.unwrap(), [LeaseAnswer::Held]);
    assert_eq!(site.backend().update_data(claimed[1].lease_ref, br#"{"m":1}"#).await.unwrap(), LeaseAnswer::Held);
    assert_eq!(other.hand_on("h").await, ["a0000", "a0001"]);
}

#[tokio::test]
async fn many_tasks_are_handed_on_a_thousand_at_a_time() {
    let site = Site::new().await;
    let host = site.watched("h").await;
    site.submit(&tasks("a", 2_500)).await;
    for limit in [1_000, 1_000, 500] {
        assert_eq!(site.claim(host, limit).await.len(), limit as usize);
    }
    let mut seen: Vec<String> = Vec::new();
    for expected in [1_000, 1_000, 500, 0] {
        assert_eq!(site.backend().hosts().await.unwrap().len(), usize::from(expected > 0), "it is struck off with its last task");
        let some = site.hand_on("h").await;
        assert_eq!(some.len(), expected);
        seen.extend(some);
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 2_500);
    assert_eq!(site.queue.stats().await.unwrap().ready, 2_500);
}

#[tokio::test]
async fn without_our_tables_no_host_has_an_identity() {
    let site = Site::plain().await;
    let host = site.watched("h").await;
    site.submit(&[task("a")]).await;
    let claimed = site.claim(host, 1).await.remove(0);
    let hosts = site.backend().hosts().await.unwrap();
    assert_eq!((hosts.len(), hosts[0].id, hosts[0].identity.as_deref(), hosts[0].running), (1, host, None, 1));
    assert!(site.hand_on("h").await.is_empty());
    assert_eq!(site.settle(&claimed, finish()).await, LeaseAnswer::Held);
    site.backend().unregister_host(host).await.unwrap();
    assert!(site.backend().hosts().await.unwrap().is_empty());
}

#[tokio::test]
async fn all_hosts_that_are_watched_are_known_to_all() {
    let site = Site::new().await;
    let other = site.another().await;
    let (first, second, plain) = (site.watched("h").await, other.watched("i").await, site.host().await);
    site.submit(&tasks("a", 6)).await;
    for (of, host, count) in [(&site, first, 1), (&other, second, 2), (&site, plain, 3)] {
        assert_eq!(of.claim(host, count).await.len(), count as usize);
    }
    let told = async |site: &Site| -> Vec<_> {
        let hosts = site.backend().hosts().await.unwrap();
        let mut told: Vec<_> = hosts.into_iter().map(|host| (host.id, host.identity, host.running, host.alive)).collect();
        told.sort_by_key(|host| host.0);
        told
    };
    let (h, i) = (Some("h".to_owned()), Some("i".to_owned()));
    let both = [(first, h.clone(), 1, Some(true)), (second, i.clone(), 2, None), (plain, None, 3, Some(true))];
    assert_eq!(told(&site).await, both);
    assert_eq!(told(&other).await, [(first, h, 1, None), (second, i, 2, Some(true))]);
}

#[tokio::test]
async fn a_host_that_leaves_is_struck_off_when_it_holds_nothing() {
    let site = Site::new().await;
    let (idle, busy) = (site.watched("idle").await, site.watched("busy").await);
    site.submit(&[task("a")]).await;
    let claimed = site.claim(busy, 1).await.remove(0);
    for host in [idle, busy] {
        site.backend().unregister_host(host).await.unwrap();
    }
    let hosts = site.backend().hosts().await.unwrap();
    let told: Vec<_> = hosts.iter().map(|host| (host.identity.as_deref(), host.running, host.alive)).collect();
    assert_eq!(told, [(Some("busy"), 1, Some(false))]);
    let dead = site.watched("dead").await;
    assert!(site.hand_on("dead").await.is_empty(), "what others hold that have left is not host {dead:?}'s");
    let handed_on = site.backend().hand_on(&["busy".to_owned(), "idle".to_owned()], &Policy::default()).await.unwrap();
    assert_eq!((handed_on.tasks.len(), handed_on.dead_hosts.len()), (1, 0), "it had left before");
    assert_eq!(site.settle(&claimed, finish()).await, LeaseAnswer::Lost);
    assert!(site.backend().hosts().await.unwrap().is_empty());
}

#[tokio::test]
async fn hosts_that_are_long_gone_are_struck_off_by_the_next() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    let (gone, holding) = (site.watched("gone").await, site.watched("holding").await);
    site.submit(&[task("a")]).await;
    assert_eq!(site.claim(holding, 1).await.len(), 1);
    ruby.run("UPDATE {h} SET seen_at = seen_at - 8 * 24 * 3600000").await;
    let fresh = site.watched("fresh").await;
    let ids: Vec<_> = site.backend().hosts().await.unwrap().into_iter().map(|host| host.id).collect();
    assert_eq!(ids, [holding, fresh]);
    assert!(matches!(site.backend().claim(&asking(gone, 1)).await, Err(Error::UnknownHost(_))));
}

#[tokio::test]
async fn a_number_that_running_tasks_carry_is_given_to_nobody() {
    let site = Site::new().await;
    let (first, mut ruby) = (site.watched("h").await, site.ruby().await);
    site.submit(&[task("a")]).await;
    let claimed = site.claim(first, 1).await.remove(0);
    // Somebody empties the table, and the server counts from the beginning.
    ruby.run("TRUNCATE TABLE {h}").await;
    let next = site.watched("i").await;
    assert_ne!(next, first);
    assert!(site.hand_on("i").await.is_empty());
    assert_eq!(site.settle(&claimed, finish()).await, LeaseAnswer::Held);
}

#[tokio::test]
async fn when_the_numbers_are_used_up_hosts_go_on_without_being_watched() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    ruby.run("ALTER TABLE {h} AUTO_INCREMENT = 4194303").await;
    let (last, unwatched) = (site.watched("last").await, site.watched("h").await);
    site.submit(&tasks("a", 2)).await;
    let claimed = [site.claim(last, 1).await.remove(0), site.claim(unwatched, 1).await.remove(0)];
    let hosts = site.backend().hosts().await.unwrap();
    let told: Vec<_> = hosts.iter().map(|host| (host.id, host.identity.as_deref(), host.running)).collect();
    assert_eq!(told.len(), 2);
    assert!(told.contains(&(last, Some("last"), 1)) && told.contains(&(unwatched, None, 1)), "{told:?}");
    assert!(site.hand_on("h").await.is_empty());
    assert_eq!(site.hand_on("last").await, ["a0000"]);
    let settlements = [settled(&claimed[0], finish()), settled(&claimed[1], finish())];
    assert_eq!(site.backend().settle(&settlements).await.unwrap(), [LeaseAnswer::Lost, LeaseAnswer::Held]);
}
