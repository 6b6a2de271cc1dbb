//! Who is blamed for a lost host, and how blame is taken back: a loss is provisional, and a plugin version counts beside the task.

use std::time::Duration;

use laelaps_queue::{
    Claim, ClaimedTask, Event, HostDescription, HostId, LeaseRef, PluginVersion, Policy, Quarantine, Queue, Settlement, State,
};

use crate::fixture::{Fixture, LONG, finish, keys, settled, task, task_of};
use crate::promises;

fn version(name: &str) -> PluginVersion {
    PluginVersion { name: name.to_owned(), digest: format!("{name}-digest") }
}

fn asking(host: HostId, alone: bool) -> Claim {
    Claim { alone, ..Claim::new(host, 50, LONG) }
}

/// A host of another process, by the watchdog's name.
async fn guest(fixture: &Fixture, identity: &str) -> (Queue, HostId) {
    let queue = fixture.another().await;
    let description = HostDescription { name: "guest".to_owned(), process_id: 1, identity: Some(identity.to_owned()) };
    let host = queue.backend().register_host(&description).await.unwrap();
    (queue, host)
}

/// A host that claims, and is then thought dead: its tasks are handed on. Answers what it had.
async fn thought_dead(fixture: &Fixture, identity: &str, alone: bool) -> (HostId, Vec<ClaimedTask>) {
    let host = fixture.host_as(identity).await;
    let tasks = fixture.backend().claim(&asking(host, alone)).await.unwrap().tasks;
    fixture.backend().hand_on(&[identity.to_owned()], &fixture.config.policy).await.unwrap();
    (host, tasks)
}

fn leases(tasks: &[ClaimedTask]) -> Vec<LeaseRef> {
    tasks.iter().map(|task| task.lease_ref).collect()
}

/// A host that dies while these run on it.
async fn dies_with(fixture: &Fixture, identity: &str, versions: &[PluginVersion]) -> HostId {
    let (queue, host) = guest(fixture, identity).await;
    queue.backend().note_running(host, versions).await.unwrap();
    // Closing it would be leaving in good order.
    drop(queue);
    fixture.backend().hand_on(&[identity.to_owned()], &fixture.config.policy).await.unwrap();
    host
}

promises! {
    async fn a_host_that_returns_takes_its_losses_back(fixture: &Fixture) {
        fixture.submit(&[task("a"), task("b")]).await;
        let (first, once) = thought_dead(fixture, "one", false).await;
        let (second, twice) = thought_dead(fixture, "two", false).await;
        assert_eq!((keys(&once), keys(&twice)), (vec!["a", "b"], vec!["a", "b"]));
        assert_eq!((fixture.get("a").await.lost, fixture.get("b").await.lost), (2, 2));
        let host = fixture.host().await;
        let asked = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert!(asked.tasks.is_empty() && asked.alone_waiting, "both are suspects");
        // A lease that never was is passed over.
        let mut asked = leases(&twice[..1]);
        asked.push(LeaseRef { task: twice[1].lease_ref.task, lease: laelaps_queue::Lease(i64::MAX) });
        assert_eq!(fixture.backend().excuse(second, &asked).await.unwrap(), 1);
        assert_eq!(fixture.backend().excuse(second, &asked).await.unwrap(), 0, "once is enough");
        assert_eq!((fixture.get("a").await.lost, fixture.get("b").await.lost), (1, 2));
        fixture.audit().await;
        let company = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert_eq!(keys(&company.tasks), ["a"], "it runs in company again");
        assert_eq!(fixture.backend().excuse(first, &leases(&once)).await.unwrap(), 2);
        assert_eq!((fixture.get("a").await.lost, fixture.get("b").await.lost), (0, 1));
        let events: Vec<String> = fixture.queue.attempts("a").await.unwrap().into_iter().map(|record| record.event).collect();
        assert_eq!(events, ["excused", "excused"]);
        assert_eq!(keys(&fixture.backend().claim(&asking(host, false)).await.unwrap().tasks), ["b"]);
    }

    async fn a_suspect_drains_one_host_at_a_time_and_none_while_its_user_is_at_its_limit(fixture: &Fixture) {
        fixture.submit(&[task_of("u", "suspect", Some(1))]).await;
        thought_dead(fixture, "one", false).await;
        thought_dead(fixture, "two", false).await;
        let (one, two, three) = (fixture.host().await, fixture.host().await, fixture.host().await);
        let ask = async |host, alone| fixture.backend().claim(&asking(host, alone)).await.unwrap();
        fixture.submit(&[task_of("u", "other", Some(1))]).await;
        let other = ask(one, false).await;
        assert_eq!((keys(&other.tasks), other.alone_waiting), (vec!["other"], false));
        for host in [one, two, one] {
            assert!(!ask(host, false).await.alone_waiting, "nobody ends anything for what may not run");
        }
        assert!(ask(two, true).await.tasks.is_empty());
        fixture.backend().settle(&[settled(&other.tasks[0], finish())]).await.unwrap();
        for _ in 0..2 {
            assert!(ask(two, false).await.alone_waiting);
            assert!(!ask(one, false).await.alone_waiting, "one host is enough");
        }
        // With that host gone, it is another's turn.
        fixture.backend().unregister_host(two).await.unwrap();
        assert!(ask(one, false).await.alone_waiting);
        assert!(!ask(three, false).await.alone_waiting);
        let alone = ask(three, true).await;
        assert_eq!((keys(&alone.tasks), alone.alone_waiting), (vec!["suspect"], false), "who runs nothing takes it, reserved or not");
        assert!(!ask(one, false).await.alone_waiting);
    }

    async fn as_many_hosts_drain_as_there_are_suspects(fixture: &Fixture) {
        fixture.submit(&[task("a"), task("b")]).await;
        thought_dead(fixture, "one", false).await;
        thought_dead(fixture, "two", false).await;
        let hosts = [fixture.host().await, fixture.host().await, fixture.host().await];
        for _ in 0..2 {
            let mut drain = Vec::new();
            for host in hosts {
                drain.push(fixture.backend().claim(&asking(host, false)).await.unwrap().alone_waiting);
            }
            assert_eq!(drain, [true, true, false]);
        }
    }

    async fn an_excused_loss_of_a_limited_user_opens_its_account(fixture: &Fixture) {
        fixture.submit(&[task_of("u", "a", Some(1)), task_of("u", "b", Some(1))]).await;
        thought_dead(fixture, "one", false).await;
        let (second, twice) = thought_dead(fixture, "two", false).await;
        assert_eq!(keys(&twice), ["a"]);
        assert_eq!(fixture.backend().excuse(second, &leases(&twice)).await.unwrap(), 1);
        let host = fixture.host().await;
        // A suspect lets the others go first, also when it is none any more.
        for key in ["b", "a"] {
            let claimed = fixture.claim(host, 9).await;
            assert_eq!(keys(&claimed), [key]);
            fixture.audit().await;
            fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        }
    }

    async fn a_loss_that_counts_no_more_is_not_taken_back_twice(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        let (first, once) = thought_dead(fixture, "one", false).await;
        let host = fixture.host().await;
        // The handler itself says what follows: nothing is left of the suspicion.
        let claimed = fixture.claim(host, 1).await;
        fixture.backend().settle(&[settled(&claimed[0], Event::Retry { delay: None })]).await.unwrap();
        assert_eq!(fixture.get("a").await.lost, 0);
        fixture.passes(fixture.backend().now().await.unwrap()).await;
        thought_dead(fixture, "two", false).await;
        assert_eq!(fixture.get("a").await.lost, 1);
        fixture.backend().excuse(first, &leases(&once)).await.unwrap();
        assert_eq!(fixture.get("a").await.lost, 1, "that of the other host stands");
    }

    async fn a_task_that_failed_by_suspicion_stays_failed(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        let mut lost = Vec::new();
        for (number, alone) in [false, false, true, true, true].into_iter().enumerate() {
            lost.push(thought_dead(fixture, &number.to_string(), alone).await);
        }
        assert_eq!(fixture.state("a").await, State::Failed);
        let (host, tasks) = lost.pop().unwrap();
        assert_eq!(fixture.backend().excuse(host, &leases(&tasks)).await.unwrap(), 1);
        let failed = fixture.get("a").await;
        assert_eq!((failed.state, failed.lost, failed.error_code.as_deref()), (State::Failed, 4, Some("lost")));
    }

    async fn nothing_fails_on_suspicion_before_its_time(fixture: &Fixture) {
        let policy = Policy { suspicion: Duration::from_secs(3_600), ..fixture.config.policy.clone() };
        fixture.submit(&[task("a")]).await;
        for number in 0..5 {
            let identity = number.to_string();
            let host = fixture.host_as(&identity).await;
            let claimed = fixture.backend().claim(&asking(host, true)).await.unwrap().tasks;
            assert_eq!(keys(&claimed), ["a"], "lost {number} times");
            let before = fixture.backend().now().await.unwrap();
            fixture.backend().hand_on(&[identity], &policy).await.unwrap();
            let lost = fixture.get("a").await;
            assert_eq!((lost.state, lost.lost), (State::Waiting, number + 1));
            // From the third loss alone on it waits longer and longer, from a sixtieth of that time on.
            assert_eq!(lost.run_at >= before.plus(Duration::from_secs(60)), number == 4, "{lost:?}");
        }
        // With a time that has passed since the first loss, the next one is the last. The first wait has to be over.
        fixture.queue.retry("a").await.unwrap();
        assert_eq!(fixture.get("a").await.lost, 5, "a waiting task that is made due keeps its losses");
        thought_dead(fixture, "last", true).await;
        assert_eq!(fixture.state("a").await, State::Failed);
    }

    async fn a_lost_lease_of_a_living_host_is_nobodys_fault_where_life_is_seen(fixture: &Fixture) {
        if !fixture.sees_life() {
            return;
        }
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        for round in 1..=4 {
            let claimed = fixture.claim_for(host, 1, Duration::from_millis(20)).await.remove(0);
            assert!(!claimed.alone, "round {round}");
            fixture.passes(claimed.until).await;
            let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
            assert_eq!((reclaimed.tasks.len(), reclaimed.dead_hosts.len()), (1, 0));
        }
        let innocent = fixture.get("a").await;
        assert_eq!((innocent.lost, innocent.attempts, innocent.state), (0, 0, State::Waiting));
        assert_eq!(fixture.queue.attempts("a").await.unwrap().last().map(|record| record.event.clone()).as_deref(), Some("overdue"));
    }

    async fn a_version_that_hosts_die_of_is_put_under_quarantine_and_released(fixture: &Fixture) {
        let before = fixture.backend().now().await.unwrap();
        for number in 0..Quarantine::DEATHS {
            assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
            dies_with(fixture, &format!("alone{number}"), &[version("bad")]).await;
            // In company nobody knows who it was.
            dies_with(fixture, &format!("company{number}"), &[version("bad"), version("other")]).await;
            dies_with(fixture, &format!("idle{number}"), &[]).await;
        }
        let quarantined = fixture.another().await.backend().quarantined().await.unwrap();
        assert_eq!(quarantined.iter().map(|found| (&found.version, found.deaths)).collect::<Vec<_>>(), [(&version("bad"), 3)]);
        assert!(quarantined[0].since >= before);
        assert!(fixture.backend().release_plugin("bad-digest").await.unwrap());
        assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
        assert!(!fixture.backend().release_plugin("bad-digest").await.unwrap());
        assert!(!fixture.backend().release_plugin("unknown").await.unwrap());
    }

    async fn only_what_runs_when_a_host_dies_counts(fixture: &Fixture) {
        for number in 0..Quarantine::DEATHS {
            let identity = format!("busy{number}");
            let (queue, host) = guest(fixture, &identity).await;
            for versions in [vec![version("bad")], vec![version("bad"), version("good")], vec![version("good")]] {
                queue.backend().note_running(host, &versions).await.unwrap();
            }
            drop(queue);
            fixture.backend().hand_on(std::slice::from_ref(&identity), &fixture.config.policy).await.unwrap();
            fixture.backend().hand_on(&[identity], &fixture.config.policy).await.unwrap();
        }
        let quarantined = fixture.backend().quarantined().await.unwrap();
        assert_eq!(quarantined.iter().map(|found| (&found.version, found.deaths)).collect::<Vec<_>>(), [(&version("good"), 3)]);
    }

    async fn a_host_that_leaves_in_good_order_counts_against_nobody(fixture: &Fixture) {
        for number in 0..Quarantine::DEATHS {
            let (queue, host) = guest(fixture, &format!("leaver{number}")).await;
            queue.backend().note_running(host, &[version("good")]).await.unwrap();
            queue.backend().unregister_host(host).await.unwrap();
            queue.close().await;
        }
        fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
    }

    async fn a_host_that_returns_takes_its_death_back(fixture: &Fixture) {
        let mut hosts = Vec::new();
        for number in 0..Quarantine::DEATHS {
            hosts.push(dies_with(fixture, &format!("host{number}"), &[version("good")]).await);
        }
        assert_eq!(fixture.backend().quarantined().await.unwrap().len(), 1);
        fixture.backend().excuse(hosts[0], &[]).await.unwrap();
        assert_eq!(fixture.backend().quarantined().await.unwrap(), []);
    }

    async fn a_dead_host_of_a_suspect_counts_against_task_and_version(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        let (queue, host) = guest(fixture, "doomed").await;
        queue.backend().note_running(host, &[version("bad")]).await.unwrap();
        let claimed = queue.backend().claim(&asking(host, false)).await.unwrap().tasks;
        queue.close().await;
        fixture.backend().hand_on(&["doomed".to_owned()], &fixture.config.policy).await.unwrap();
        assert_eq!(fixture.get("a").await.lost, 1);
        let late: Vec<Settlement> = claimed.iter().map(|task| settled(task, finish())).collect();
        assert_eq!(fixture.backend().settle(&late).await.unwrap(), [laelaps_queue::LeaseAnswer::Lost]);
        assert_eq!(fixture.backend().excuse(host, &leases(&claimed)).await.unwrap(), 1);
        assert_eq!(fixture.get("a").await.lost, 0);
    }
}
