//! Tasks handed on from hosts that somebody who watches them (a watchdog) says are gone, whether or not their leases have ended.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Beat, Claim, ClaimedTask, Error, Event, HostDescription, HostId, LeaseAnswer, NewTask, Queue, Reclaimed, State,
};

use crate::fixture::{Database, Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of};
use crate::promises;

async fn hand_on(fixture: &Fixture, identities: &[&str]) -> Reclaimed {
    let identities: Vec<String> = identities.iter().map(|identity| (*identity).to_owned()).collect();
    fixture.backend().hand_on(&identities, &fixture.config.policy).await.expect("known hosts can be handed on")
}

fn asking(host: HostId, alone: bool) -> Claim {
    Claim { alone, ..Claim::new(host, 50, LONG) }
}

async fn renewed(fixture: &Fixture, task: &ClaimedTask) -> LeaseAnswer {
    let beat = Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None };
    fixture.backend().heartbeat(&[beat]).await.unwrap()[0]
}

/// Claim until the host is not known any more, as a process would that does not know what is thought of it. Answers what it had.
async fn claim_to_the_end(queue: Queue, host: HostId) -> Vec<ClaimedTask> {
    let mut claimed = Vec::new();
    loop {
        match queue.backend().claim(&Claim { limit: 3, ..asking(host, false) }).await {
            Ok(more) => claimed.extend(more.tasks),
            Err(Error::UnknownHost(unknown)) if unknown == host => return claimed,
            Err(error) => panic!("{error}"),
        }
    }
}

promises! {
    async fn only_what_the_named_hosts_have_is_handed_on(fixture: &Fixture) {
        // The same process under its identities, one after the other, as with ZooKeeper sessions; and a host that nobody watches.
        let (old, new, unwatched) = (fixture.host_as("s1").await, fixture.host_as("s2").await, fixture.host().await);
        fixture.submit_some("a", 7).await;
        let mut of_old = fixture.claim(old, 3).await;
        // What the old one gave back is another's now.
        let given_back = of_old.remove(0);
        fixture.backend().settle(&[settled(&given_back, Event::Stopped)]).await.unwrap();
        let (of_new, of_unwatched) = (fixture.claim(new, 2).await, fixture.claim(unwatched, 2).await);
        assert_eq!(keys(&of_new), ["a0", "a3"]);
        let identities: Vec<_> = fixture.backend().hosts().await.unwrap().into_iter().map(|host| (host.id, host.identity)).collect();
        assert_eq!(identities, [(old, Some("s1".to_owned())), (new, Some("s2".to_owned())), (unwatched, None)]);
        let reclaimed = hand_on(fixture, &["s1"]).await;
        let mut lost: Vec<&str> = reclaimed.tasks.iter().map(|lost| lost.key.as_str()).collect();
        lost.sort_unstable();
        assert_eq!(lost, keys(&of_old));
        assert!(reclaimed.tasks.iter().all(|lost| lost.host == old && !lost.failed));
        let gone: Vec<_> = reclaimed.dead_hosts.iter().map(|host| (host.id, host.identity.as_deref(), host.alive)).collect();
        assert_eq!(gone, [(old, Some("s1"), Some(false))]);
        for task in of_new.iter().chain(&of_unwatched) {
            assert_eq!(renewed(fixture, task).await, LeaseAnswer::Held);
        }
        assert_eq!(fixture.backend().hosts().await.unwrap().len(), 2);
        assert_eq!(keys(&fixture.claim(new, 2).await), keys(&of_old));
    }

    async fn handing_on_leaves_it_to_others_to_take_back_ended_leases(fixture: &Fixture) {
        let (doomed, slow) = (fixture.host_as("s1").await, fixture.host_as("s2").await);
        fixture.submit_some("a", 2).await;
        fixture.claim(doomed, 1).await;
        let ended = fixture.claim_for(slow, 1, Duration::from_millis(20)).await.remove(0);
        fixture.passes(ended.until).await;
        let taken: Vec<HostId> = hand_on(fixture, &["s1"]).await.tasks.into_iter().map(|lost| lost.host).collect();
        assert_eq!(taken, [doomed]);
        assert_eq!(fixture.state(&ended.key).await, State::Running);
    }

    async fn what_was_handed_on_counts_as_lost_and_not_as_an_attempt(fixture: &Fixture) {
        let doomed = fixture.host_as("s1").await;
        fixture.submit(&[NewTask { max_attempts: Some(1), ..task("a") }]).await;
        let stale = fixture.claim(doomed, 1).await.remove(0);
        hand_on(fixture, &["s1"]).await;
        let waiting = fixture.get("a").await;
        assert_eq!((waiting.state, waiting.lost, waiting.attempts), (State::Waiting, 1, 0));
        let record = &fixture.queue.attempts("a").await.unwrap()[0];
        assert_eq!((record.event.as_str(), record.lease), ("lost", stale.lease_ref.lease));
        let again = fixture.claim(fixture.host().await, 1).await.remove(0);
        assert_eq!((again.attempt, again.lost), (1, 1));
    }

    async fn a_task_that_is_handed_on_again_and_again_is_left_alone_and_then_fails(fixture: &Fixture) {
        fixture.submit(&[task("killer")]).await;
        for round in 0..5 {
            let identity = format!("s{round}");
            let host = fixture.host_as(&identity).await;
            let claimed = fixture.backend().claim(&asking(host, true)).await.unwrap().tasks;
            assert_eq!((claimed[0].alone, claimed[0].lost), (round >= 2, round));
            let reclaimed = hand_on(fixture, &[&identity]).await;
            assert_eq!((reclaimed.tasks.len(), reclaimed.tasks[0].failed), (1, round == 4));
        }
        let killer = fixture.get("killer").await;
        assert_eq!((killer.state, killer.lost, killer.error_code.as_deref()), (State::Failed, 5, Some("lost")));
    }

    async fn what_a_handed_on_host_writes_changes_nothing_and_is_told_so(fixture: &Fixture) {
        let doomed = fixture.host_as("s1").await;
        fixture.submit(&[task("a")]).await;
        let stale = fixture.claim(doomed, 1).await.remove(0);
        hand_on(fixture, &["s1"]).await;
        assert_eq!(renewed(fixture, &stale).await, LeaseAnswer::Lost);
        assert_eq!(fixture.backend().update_data(stale.lease_ref, br#"{"n":2}"#).await.unwrap(), LeaseAnswer::Lost);
        assert_eq!(fixture.backend().settle(&[settled(&stale, finish())]).await.unwrap(), [LeaseAnswer::Lost]);
        let waiting = fixture.get("a").await;
        assert_eq!((waiting.state, waiting.data.as_deref()), (State::Waiting, Some(&br#"{"n":1}"#[..])));
        // Nor does it change anything for whoever has the task then.
        let successor = fixture.claim(fixture.host().await, 1).await.remove(0);
        assert_eq!(fixture.backend().settle(&[settled(&stale, finish())]).await.unwrap(), [LeaseAnswer::Lost]);
        assert_eq!(fixture.backend().settle(&[settled(&successor, finish())]).await.unwrap(), [LeaseAnswer::Held]);
    }

    async fn a_handed_on_host_claims_nothing_until_it_registers_anew(fixture: &Fixture) {
        let (idle, busy) = (fixture.host_as("s1").await, fixture.host_as("s1").await);
        fixture.submit_some("a", 2).await;
        fixture.claim(busy, 1).await;
        let gone = hand_on(fixture, &["s1", "nobody"]).await.dead_hosts.len();
        assert_eq!(gone, 2);
        for host in [idle, busy] {
            let refused = fixture.backend().claim(&asking(host, true)).await;
            assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host));
            let refused = fixture.backend().note_plugins(host, &["d".to_owned()]).await;
            assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host));
            // It may still say good-bye.
            fixture.backend().unregister_host(host).await.unwrap();
        }
        let anew = fixture.host_as("s2").await;
        assert_eq!(fixture.claim(anew, 9).await.len(), 2);
    }

    async fn a_host_that_still_has_tasks_cannot_claim_more_of_them(fixture: &Fixture) {
        let doomed = fixture.host_as("s1").await;
        fixture.submit_some("a", 1_600).await;
        assert_eq!(fixture.claim(doomed, 700).await.len() + fixture.claim(doomed, 700).await.len(), 1_400);
        let first = hand_on(fixture, &["s1"]).await;
        assert!((1..=1_000).contains(&first.tasks.len()) && first.dead_hosts.is_empty(), "the host is not struck off while it has tasks");
        let host = &fixture.backend().hosts().await.unwrap()[0];
        assert_eq!((host.running, host.alive), (1_400 - first.tasks.len() as u64, Some(false)));
        assert!(matches!(fixture.backend().claim(&asking(doomed, false)).await, Err(Error::UnknownHost(_))));
        // Whoever takes back what is lost goes on with it.
        let second = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!((first.tasks.len() + second.tasks.len(), second.dead_hosts.len()), (1_400, 1));
        assert!(hand_on(fixture, &["s1"]).await.tasks.is_empty());
    }

    async fn handing_on_many_tasks_comes_to_an_end_in_batches(fixture: &Fixture) {
        const RUNNING: usize = 2_500;
        let doomed = fixture.host_as("s1").await;
        // What it has settled, in claims that may still be remembered, is no reason to stop.
        fixture.submit_some("old", 2_100).await;
        for _ in 0..3 {
            let old = fixture.claim(doomed, 700).await;
            let ends: Vec<_> = old.iter().map(|task| settled(task, finish())).collect();
            for half in ends.chunks(350) {
                fixture.backend().settle(half).await.unwrap();
            }
        }
        fixture.submit_some("a", RUNNING).await;
        for limit in [1_000, 1_000, 500] {
            assert_eq!(fixture.claim(doomed, limit).await.len(), limit as usize);
        }
        let (mut calls, mut taken) = (0, 0);
        loop {
            let batch = hand_on(fixture, &["s1"]).await.tasks.len();
            assert!(batch <= 1_000);
            taken += batch;
            calls += 1;
            if batch == 0 {
                break;
            }
        }
        assert_eq!((taken, fixture.backend().hosts().await.unwrap().len()), (RUNNING, 0));
        assert!(calls <= 5, "{calls} calls");
        assert_eq!(fixture.queue.stats().await.unwrap().ready, RUNNING as u64);
    }

    async fn identities_that_nobody_has_are_passed_over(fixture: &Fixture) {
        let host = fixture.host_as("s1").await;
        fixture.submit(&[task("a")]).await;
        let claimed = fixture.claim(host, 1).await;
        let long = "x".repeat(300);
        for identities in [&[][..], &["s", "s10", "S1", "", "%", "s1 ", "s1\0", long.as_str()][..]] {
            let reclaimed = hand_on(fixture, identities).await;
            assert!(reclaimed.tasks.is_empty() && reclaimed.dead_hosts.is_empty());
        }
        assert_eq!(renewed(fixture, &claimed[0]).await, LeaseAnswer::Held);
        assert_eq!(hand_on(fixture, &["s1"]).await.tasks.len(), 1);
        let again = hand_on(fixture, &["s1"]).await;
        assert!(again.tasks.is_empty() && again.dead_hosts.is_empty());
    }

    async fn an_identity_has_a_bound(fixture: &Fixture) {
        let described = |identity: String| HostDescription { name: "tester".to_owned(), process_id: 1, identity: Some(identity) };
        let longest = "ä".repeat(127) + "x";
        fixture.backend().register_host(&described(longest.clone())).await.unwrap();
        assert_eq!(hand_on(fixture, &[&longest]).await.dead_hosts.len(), 1);
        let refused = fixture.backend().register_host(&described(longest + "y")).await.unwrap_err();
        assert_eq!(refused.to_string(), "the host's identity: has 256 bytes; at most 255 are allowed");
    }

    async fn a_users_limit_holds_right_after_its_tasks_were_handed_on(fixture: &Fixture) {
        let (doomed, survivor) = (fixture.host_as("s1").await, fixture.host_as("s2").await);
        let tasks: Vec<NewTask> = (0..5).map(|number| task_of("u", &format!("a{number}"), Some(3))).collect();
        fixture.submit(&tasks).await;
        assert_eq!(fixture.claim(doomed, 2).await.len() + fixture.claim(survivor, 9).await.len(), 3);
        assert!(fixture.claim(survivor, 9).await.is_empty());
        hand_on(fixture, &["s1"]).await;
        fixture.audit().await;
        assert_eq!(keys(&fixture.claim(survivor, 9).await), ["a0", "a1"], "as many as were handed on, and those first");
        assert!(fixture.claim(survivor, 9).await.is_empty());
    }

    async fn a_claim_that_comes_while_its_host_is_handed_on_is_taken_back_or_refused(fixture: &Fixture) {
        for round in 0..12 {
            let process = fixture.another().await;
            let identity = format!("s{round}");
            let description = HostDescription { name: "stuck".to_owned(), process_id: 1, identity: Some(identity.clone()) };
            let user = (round % 2 == 1).then(|| "u".to_owned());
            let tasks: Vec<NewTask> = (0..400).map(|number| NewTask { user: user.clone(), ..task(&format!("{round}-{number}")) }).collect();
            fixture.submit(&tasks).await;
            let host = process.backend().register_host(&description).await.unwrap();
            let claims: Vec<_> = (0..4).map(|_| tokio::spawn(claim_to_the_end(process.clone(), host))).collect();
            // In the middle of them, a little later in each round.
            let started = Instant::now();
            while fixture.queue.stats().await.unwrap().running <= round * 20 {
                assert!(started.elapsed() < PATIENCE, "the host claims");
            }
            while !hand_on(fixture, &[&identity]).await.tasks.is_empty() {}
            // From here on the host has nothing any more, whatever it believes.
            assert_eq!(fixture.queue.stats().await.unwrap().running, 0, "round {round}");
            for claimed in claims {
                for task in claimed.await.unwrap() {
                    assert_eq!(process.backend().settle(&[settled(&task, finish())]).await.unwrap(), [LeaseAnswer::Lost], "round {round}");
                }
            }
            process.close().await;
            let survivor = fixture.host().await;
            loop {
                // Those that were lost twice run alone.
                let tasks = fixture.backend().claim(&asking(survivor, true)).await.unwrap().tasks;
                let ends: Vec<_> = tasks.iter().map(|task| settled(task, finish())).collect();
                if ends.is_empty() {
                    break;
                }
                fixture.backend().settle(&ends).await.unwrap();
            }
            fixture.backend().unregister_host(survivor).await.unwrap();
        }
        assert_eq!(fixture.queue.stats().await.unwrap().finished, 12 * 400);
    }

    async fn several_who_hand_a_host_on_at_once_take_each_task_once(fixture: &Fixture) {
        let (one, two) = (fixture.host_as("s1").await, fixture.host_as("s2").await);
        fixture.submit_some("a", 400).await;
        for _ in 0..10 {
            fixture.claim(one, 20).await;
            fixture.claim(two, 20).await;
        }
        let other = fixture.another().await;
        let (forwards, backwards) = (["s1".to_owned(), "s2".to_owned()], ["s2".to_owned(), "s1".to_owned()]);
        let policy = &fixture.config.policy;
        let (here, there, reclaimed) =
            tokio::join!(fixture.backend().hand_on(&forwards, policy), other.backend().hand_on(&backwards, policy), other.backend().reclaim(policy));
        let mut keys: Vec<String> = [here, there, reclaimed].into_iter().flat_map(|taken| taken.unwrap().tasks).map(|lost| lost.key).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 400);
        let lost = fixture.get("a0").await.lost;
        assert_eq!((lost, fixture.queue.stats().await.unwrap().ready), (1, 400));
        other.close().await;
    }
}

/// The lock says that the process lives; the watchdog says that it is of no use.
#[tokio::test]
async fn a_host_that_is_stuck_is_struck_off_although_its_process_holds_its_lock() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let process = fixture.another().await;
    let description = HostDescription { name: "stuck".to_owned(), process_id: 1, identity: Some("s1".to_owned()) };
    let stuck = process.backend().register_host(&description).await.unwrap();
    fixture.submit(&[task("a")]).await;
    process.backend().claim(&asking(stuck, false)).await.unwrap();
    let lock = fixture.path().with_file_name(format!("queue.db-hosts/{}.lock", stuck.0));
    assert!(lock.exists());
    assert_eq!(fixture.backend().hosts().await.unwrap()[0].alive, Some(true));
    assert_eq!(hand_on(&fixture, &["s1"]).await.dead_hosts.len(), 1);
    assert!(!lock.exists(), "nobody looks for a life that counts for nothing");
    // What the process does when it moves again.
    assert!(matches!(process.backend().claim(&asking(stuck, false)).await, Err(Error::UnknownHost(_))));
    let anew = HostDescription { identity: Some("s2".to_owned()), ..description };
    let anew = process.backend().register_host(&anew).await.unwrap();
    process.backend().unregister_host(stuck).await.unwrap();
    let hosts = fixture.backend().hosts().await.unwrap();
    assert_eq!(hosts.iter().map(|host| (host.id, host.alive)).collect::<Vec<_>>(), [(anew, Some(true))]);
    assert_eq!(process.backend().claim(&asking(anew, false)).await.unwrap().tasks.len(), 1);
    process.close().await;
    fixture.audit().await;
}
