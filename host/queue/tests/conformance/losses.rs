//! Tasks that are lost with their hosts, and data that is damaged.

use std::time::Duration;

use laelaps_queue::{Claim, Claimed, Event, HostDescription, HostId, NewTask, State};

use crate::fixture::{Fixture, LONG, finish, keys, settled, task, task_of};
use crate::promises;

/// A host that claims and dies with what it has. Answers what it had.
pub(crate) async fn doomed(fixture: &Fixture, limit: u32, alone: bool) -> Claimed {
    let queue = fixture.another().await;
    let description = HostDescription { name: "doomed".to_owned(), process_id: 1, identity: None };
    let host = queue.backend().register_host(&description).await.unwrap();
    let claim = Claim { alone, ..Claim::new(host, limit, LONG) };
    let claimed = queue.backend().claim(&claim).await.unwrap();
    queue.backend().close().await;
    fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    claimed
}

fn asking(host: HostId, alone: bool) -> Claim {
    Claim { alone, ..Claim::new(host, 50, LONG) }
}

promises! {
    async fn a_task_that_kills_its_host_ends_failed_and_harms_no_other_for_long(fixture: &Fixture) {
        fixture.submit(&[task("killer"), task("good")]).await;
        assert_eq!(doomed(fixture, 2, false).await.tasks.len(), 2);
        let killer = fixture.get("killer").await;
        assert_eq!((killer.state, killer.lost, killer.attempts), (State::Waiting, 1, 0));
        assert_eq!(doomed(fixture, 2, false).await.tasks.len(), 2);
        // From now on each runs alone.
        let host = fixture.host().await;
        let claimed = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert!(claimed.tasks.is_empty() && claimed.alone_waiting);
        assert_eq!(keys(&doomed(fixture, 50, true).await.tasks), ["killer"]);
        let good = fixture.backend().claim(&asking(host, true)).await.unwrap();
        assert_eq!(keys(&good.tasks), ["good"]);
        assert!(good.tasks[0].alone && good.alone_waiting);
        fixture.backend().settle(&[settled(&good.tasks[0], finish())]).await.unwrap();
        for _ in 0..2 {
            assert_eq!(keys(&doomed(fixture, 50, true).await.tasks), ["killer"]);
        }
        let killer = fixture.get("killer").await;
        assert_eq!((killer.state, killer.lost, killer.error_code.as_deref()), (State::Failed, 5, Some("lost")));
        assert_eq!(fixture.state("good").await, State::Finished);
        assert_eq!(fixture.queue.attempts("killer").await.unwrap().iter().filter(|record| record.event == "lost").count(), 5);
    }

    async fn what_a_host_gives_back_or_loses_keeps_its_place(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("first", 2).await;
        fixture.submit_some("second", 2).await;
        let claimed = fixture.claim(host, 2).await;
        assert_eq!(keys(&claimed), ["first0", "first1"]);
        // One is given back by a host that drains, the other handed back by its handler.
        fixture.backend().settle(&[settled(&claimed[0], Event::Stopped), settled(&claimed[1], Event::Release { delay: None })]).await.unwrap();
        fixture.submit_some("third", 1).await;
        let claimed = fixture.claim(host, 3).await;
        assert_eq!(keys(&claimed), ["first0", "second0", "second1"], "what was handed back on purpose is behind");
        for task in &claimed {
            fixture.backend().settle(&[settled(task, finish())]).await.unwrap();
        }
        assert_eq!(keys(&doomed(fixture, 1, false).await.tasks), ["first1"]);
        fixture.submit_some("fourth", 1).await;
        assert_eq!(keys(&fixture.claim(host, 9).await), ["first1", "third0", "fourth0"], "what was lost is where it was");
    }

    async fn alone_is_alone(fixture: &Fixture) {
        fixture.submit(&[task("suspect")]).await;
        doomed(fixture, 1, false).await;
        doomed(fixture, 1, false).await;
        fixture.submit_some("other", 3).await;
        let host = fixture.host().await;
        let company = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert_eq!(keys(&company.tasks), ["other0", "other1", "other2"]);
        assert!(company.alone_waiting);
        let alone = fixture.backend().claim(&asking(host, true)).await.unwrap();
        assert_eq!(keys(&alone.tasks), ["suspect"]);
        assert!(alone.tasks[0].alone && !alone.alone_waiting);
        assert_eq!((alone.tasks[0].lost, alone.tasks[0].lost_alone), (2, 0));
    }

    async fn who_asks_alone_gets_ordinary_work_if_nothing_has_to_be_alone(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit_some("a", 3).await;
        let claimed = fixture.backend().claim(&asking(host, true)).await.unwrap();
        assert_eq!(claimed.tasks.len(), 3);
        assert!(!claimed.alone_waiting);
    }

    async fn a_task_that_waits_to_be_alone_keeps_its_users_limit(fixture: &Fixture) {
        fixture.submit(&[task_of("u", "suspect", Some(1))]).await;
        doomed(fixture, 1, false).await;
        doomed(fixture, 1, false).await;
        let (one, two) = (fixture.host().await, fixture.host().await);
        fixture.submit(&[task_of("u", "other", Some(1))]).await;
        assert_eq!(keys(&fixture.claim(one, 9).await), ["other"]);
        assert!(fixture.backend().claim(&asking(two, true)).await.unwrap().tasks.is_empty());
    }

    async fn a_handler_that_asks_for_another_attempt_lifts_the_suspicion(fixture: &Fixture) {
        fixture.submit(&[task("suspect")]).await;
        doomed(fixture, 1, false).await;
        doomed(fixture, 1, false).await;
        let host = fixture.host().await;
        let alone = fixture.backend().claim(&asking(host, true)).await.unwrap();
        let later = laelaps_queue::Event::Retry { delay: Some(Duration::from_millis(60)) };
        fixture.backend().settle(&[settled(&alone.tasks[0], later)]).await.unwrap();
        fixture.audit().await;
        fixture.passes(fixture.get("suspect").await.run_at).await;
        // Whatever ended hosts before, this attempt did not.
        let company = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert_eq!((company.tasks.len(), company.tasks[0].lost, company.tasks[0].alone), (1, 0, false));
    }

    async fn a_retry_by_hand_lifts_the_suspicion(fixture: &Fixture) {
        fixture.submit(&[task("suspect")]).await;
        doomed(fixture, 1, false).await;
        doomed(fixture, 1, false).await;
        fixture.queue.cancel("suspect").await.unwrap();
        fixture.queue.retry("suspect").await.unwrap();
        let host = fixture.host().await;
        let claimed = fixture.backend().claim(&asking(host, false)).await.unwrap();
        assert_eq!((claimed.tasks.len(), claimed.tasks[0].lost, claimed.tasks[0].alone), (1, 0, false));
    }

    async fn a_lease_that_runs_out_ends_its_attempt(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[NewTask { max_attempts: Some(1), ..task("a") }]).await;
        let claimed = fixture.claim_for(host, 1, Duration::from_millis(30)).await.remove(0);
        fixture.passes(claimed.until).await;
        let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        assert_eq!((reclaimed.tasks.len(), reclaimed.dead_hosts.len()), (1, 0));
        assert_eq!((reclaimed.tasks[0].key.as_str(), reclaimed.tasks[0].host), ("a", host));
        let again = fixture.claim(host, 1).await.remove(0);
        // Where a host's life can be seen, nobody is to blame: this one lives.
        let lost = u32::from(!fixture.sees_life());
        assert_eq!((again.attempt, again.lost), (1, lost), "a lost attempt does not count");
    }

    async fn damaged_data_is_set_aside_and_stops_nobody(fixture: &Fixture) {
        let host = fixture.host().await;
        let gzip = |key: &str| NewTask { compression: laelaps_queue::Compression::Gzip, ..task(key) };
        fixture.submit(&[task("good1"), gzip("torn"), gzip("flipped"), task("no json"), task("missing"), task("good2")]).await;
        fixture.damage().await;
        assert_eq!(keys(&fixture.claim(host, 50).await), ["good1", "good2"]);
        for key in ["torn", "flipped", "no json", "missing"] {
            let aside = fixture.get(key).await;
            assert_eq!((aside.state, aside.error_code.as_deref()), (State::Failed, Some("damaged-data")), "{key}");
            assert!(aside.error_message.is_some_and(|message| message.starts_with("the stored data cannot be used: ")));
        }
        // Whoever lists or reads them is not stopped either.
        let filter = laelaps_queue::Filter { limit: 100, with_data: true, ..Default::default() };
        assert_eq!(fixture.queue.list(&filter).await.unwrap().tasks.len(), 6);
    }
}
