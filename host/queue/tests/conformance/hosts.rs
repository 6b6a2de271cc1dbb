//! Hosts: registered, alive, dead.

use laelaps_queue::{Claim, Error, HostId, LeaseAnswer, ServedRoute, ServedTypes, Serves};

use crate::fixture::{Fixture, LONG, finish, settled, task};
use crate::promises;

promises! {
    async fn hosts_get_numbers_that_never_repeat(fixture: &Fixture) {
        let (one, two) = (fixture.host().await, fixture.host().await);
        assert!(two > one);
        fixture.backend().unregister_host(two).await.unwrap();
        assert!(fixture.host().await > two);
    }

    async fn a_host_of_this_process_is_alive_and_counts_its_tasks(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.host().await;
        fixture.submit_some("a", 3).await;
        fixture.claim(host, 2).await;
        let hosts = fixture.backend().hosts().await.unwrap();
        assert_eq!(hosts.len(), 2);
        assert_eq!((hosts[0].id, hosts[0].name.as_str(), hosts[0].process_id), (host, "tester", std::process::id()));
        let alive = fixture.sees_life().then_some(true);
        assert_eq!((hosts[0].running, hosts[0].alive, hosts[1].running), (2, alive, 0));
        let other = fixture.another().await;
        assert_eq!(other.backend().hosts().await.unwrap()[0].alive, alive, "also as another process sees it");
        assert!(other.backend().reclaim(&fixture.config.policy).await.unwrap().tasks.is_empty());
        other.close().await;
    }

    async fn a_dead_hosts_tasks_come_back_at_once(fixture: &Fixture) {
        let survivor = fixture.host().await;
        let other = fixture.another().await;
        let description = laelaps_queue::HostDescription { name: "doomed".to_owned(), process_id: 1, identity: None };
        let doomed = other.backend().register_host(&description).await.unwrap();
        fixture.submit_some("a", 3).await;
        let claim = Claim::new(doomed, 2, LONG);
        let stale = other.backend().claim(&claim).await.unwrap().tasks;
        // Its locks go with it, as with the process.
        other.backend().close().await;
        let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!(reclaimed.tasks.len(), 2);
        assert!(reclaimed.tasks.iter().all(|lost| lost.host == doomed && !lost.failed));
        assert_eq!(reclaimed.dead_hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>(), ["doomed"]);
        assert_eq!(fixture.backend().settle(&[settled(&stale[0], finish())]).await.unwrap(), [LeaseAnswer::Lost]);
        assert_eq!(fixture.claim(survivor, 9).await.len(), 3);
        assert_eq!(fixture.backend().hosts().await.unwrap().len(), 1);
        let record = &fixture.queue.attempts(&stale[0].key).await.unwrap()[0];
        assert_eq!((record.event.as_str(), record.host.as_str()), ("lost", "doomed, process 1"));
    }

    async fn a_dead_hosts_many_tasks_come_back_in_batches(fixture: &Fixture) {
        let other = fixture.another().await;
        let description = laelaps_queue::HostDescription { name: "doomed".to_owned(), process_id: 1, identity: None };
        let doomed = other.backend().register_host(&description).await.unwrap();
        fixture.submit_some("a", 1_500).await;
        for _ in 0..2 {
            let claim = Claim::new(doomed, 1_000, LONG);
            other.backend().claim(&claim).await.unwrap();
        }
        other.backend().close().await;
        let first = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!((first.tasks.len(), first.dead_hosts.len()), (1_000, 0), "the host is not struck off while it has tasks");
        let second = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!((second.tasks.len(), second.dead_hosts.len()), (500, 1));
        let third = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert!(third.tasks.is_empty() && third.dead_hosts.is_empty());
    }

    async fn a_host_that_left_with_tasks_is_found_dead(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        fixture.claim(host, 1).await;
        fixture.backend().unregister_host(host).await.unwrap();
        let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!((reclaimed.tasks.len(), reclaimed.dead_hosts.len()), (1, 1));
    }

    async fn only_a_registered_host_can_claim(fixture: &Fixture) {
        fixture.submit(&[task("a")]).await;
        let gone = fixture.host().await;
        fixture.backend().unregister_host(gone).await.unwrap();
        for host in [gone, HostId(999)] {
            let claim = Claim::new(host, 1, LONG);
            let refused = fixture.backend().claim(&claim).await;
            assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host));
            let refused = fixture.backend().note_plugins(host, &["d".to_owned()]).await;
            assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host));
            let refused = fixture.backend().note_serves(host, &Serves::default()).await;
            assert!(matches!(refused, Err(Error::UnknownHost(unknown)) if unknown == host));
        }
        assert_eq!(fixture.queue.stats().await.unwrap().ready, 1);
    }

    async fn a_host_notes_the_versions_it_serves(fixture: &Fixture) {
        let host = fixture.host().await;
        let digests = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        fixture.backend().note_plugins(host, &digests(&["d1", "d2"])).await.unwrap();
        fixture.backend().note_plugins(host, &digests(&["d2", "d3"])).await.unwrap();
        fixture.backend().note_plugins(host, &[]).await.unwrap();
        assert_eq!(fixture.backend().host_plugins(host).await.unwrap(), digests(&["d1", "d2", "d3"]));
        assert_eq!(fixture.backend().host_plugins(HostId(999)).await.unwrap(), digests(&[]));
    }

    async fn a_host_says_what_it_serves(fixture: &Fixture) {
        let (host, silent) = (fixture.host().await, fixture.host().await);
        let other = fixture.another().await;
        let said = async || -> Vec<_> { other.backend().hosts().await.unwrap().into_iter().map(|host| (host.id, host.serves)).collect() };
        assert_eq!(said().await, [(host, None), (silent, None)]);
        let route = |types, is_loaded| ServedRoute { types, plugin: "p/1".to_owned(), is_loaded };
        let routes = vec![
            route(ServedTypes::Type("gr\u{f6}\u{df}e '\"\\".to_owned()), true),
            route(ServedTypes::Pattern("^\u{0}[\u{1F43A}]$".to_owned()), false),
        ];
        let mut serves = Serves { queues: Some(vec!["mail".to_owned(), "default".to_owned()]), routes };
        // As many and as large as a configuration may have them, the first time.
        let mut large = serves.clone();
        large.routes.extend((0..998).map(|_| route(ServedTypes::Type("t".repeat(255)), true)));
        for serves in [&large, &serves, &serves, &Serves::default()] {
            fixture.backend().note_serves(host, serves).await.unwrap();
            assert_eq!(said().await, [(host, Some(serves.clone())), (silent, None)]);
        }
        serves.routes.clear();
        fixture.backend().note_serves(silent, &serves).await.unwrap();
        fixture.backend().unregister_host(host).await.unwrap();
        assert_eq!(said().await, [(silent, Some(serves))]);
        other.close().await;
    }

    async fn two_hosts_settle_each_of_many_tasks_once(fixture: &Fixture) {
        let other = fixture.another().await;
        fixture.submit_some("a", 1_000).await;
        let work = |queue: laelaps_queue::Queue| async move {
            let description = laelaps_queue::HostDescription { name: "worker".to_owned(), process_id: 1, identity: None };
            let host = queue.backend().register_host(&description).await.unwrap();
            let claim = Claim::new(host, 17, LONG);
            let mut held = 0;
            loop {
                let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
                if tasks.is_empty() {
                    return held;
                }
                let group: Vec<_> = tasks.iter().map(|task| settled(task, finish())).collect();
                let answers = queue.backend().settle(&group).await.unwrap();
                held += answers.iter().filter(|answer| **answer == LeaseAnswer::Held).count();
            }
        };
        let (one, two) = tokio::join!(tokio::spawn(work(fixture.queue.clone())), tokio::spawn(work(other.clone())));
        assert_eq!(one.unwrap() + two.unwrap(), 1_000);
        assert_eq!(fixture.queue.stats().await.unwrap().finished, 1_000);
        other.close().await;
    }
}
