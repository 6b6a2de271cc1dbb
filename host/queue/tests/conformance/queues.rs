//! Named queues: whoever asks for some of them gets their tasks alone, in the order that holds without queues, whatever waits in the others.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Claim, ClaimedTask, Error, Event, Filter, HostId, NewTask, QueuedType, Timestamp};

use crate::fixture::{Fixture, LONG, finish, keys, settled, task, task_of};
use crate::promises;

fn of(queue: &str, task: NewTask) -> NewTask {
    NewTask { queue: Some(queue.to_owned()), ..task }
}

fn asking(host: HostId, limit: u32, queues: &[&str]) -> Claim {
    let queues = Some(Arc::from(queues.iter().map(|queue| (*queue).to_owned()).collect::<Vec<String>>()));
    Claim { queues, ..Claim::new(host, limit, LONG) }
}

async fn claim(fixture: &Fixture, host: HostId, limit: u32, queues: &[&str]) -> Vec<ClaimedTask> {
    fixture.backend().claim(&asking(host, limit, queues)).await.unwrap().tasks
}

/// Claims until one finds nothing: what was submitted elsewhere is found by a later look at the latest.
async fn all(fixture: &Fixture, host: HostId, queues: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    loop {
        let claimed = claim(fixture, host, 100, queues).await;
        if claimed.is_empty() {
            return found;
        }
        found.extend(claimed.into_iter().map(|task| task.key));
    }
}

promises! {
    async fn a_claim_takes_the_tasks_of_its_queues_alone(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), of("mail", task("b")), of("default", task("c")), of("video/large", task("d"))]).await;
        fixture.submit(&[of("mail", task_of("u", "e", None)), task_of("u", "f", None), of("video/large", task_of("v", "g", Some(1)))]).await;
        assert_eq!(claim(fixture, host, 9, &["nobody-knows"]).await.len(), 0);
        let claimed = claim(fixture, host, 9, &["mail"]).await;
        assert!(claimed.iter().all(|task| task.queue == "mail"));
        let mut mail: Vec<&str> = keys(&claimed);
        mail.sort_unstable();
        assert_eq!(mail, ["b", "e"]);
        let claimed = claim(fixture, host, 9, &["default", "nobody-knows"]).await;
        assert!(claimed.iter().all(|task| task.queue == "default"));
        let mut found: Vec<&str> = keys(&claimed);
        found.sort_unstable();
        assert_eq!(found, ["a", "c", "f"]);
        let mut rest = all(fixture, host, &["default", "mail", "video/large"]).await;
        rest.sort_unstable();
        assert_eq!(rest, ["d", "g"]);
        assert_eq!(fixture.get("b").await.queue, "mail");
        assert_eq!(fixture.get("c").await.queue, "default");
    }

    async fn without_queues_a_claim_takes_from_all_in_the_order_of_their_turns(fixture: &Fixture) {
        let host = fixture.host().await;
        let queues = ["mail", "default", "video", "reports"];
        for number in 0..20 {
            fixture.submit(&[of(queues[number % 4], task(&format!("{number:02}")))]).await;
        }
        fixture.submit(&[NewTask { priority: -1, ..of("video", task("urgent")) }]).await;
        let mut expected = vec!["urgent".to_owned()];
        expected.extend((0..20).map(|number| format!("{number:02}")));
        assert_eq!(keys(&fixture.claim(host, 21).await), expected);
        // Of some of the queues as well.
        for number in 20..32 {
            fixture.submit(&[of(queues[number % 4], task(&format!("{number:02}")))]).await;
        }
        assert_eq!(keys(&claim(fixture, host, 4, &["reports", "mail"]).await), ["20", "23", "24", "27"]);
        assert_eq!(keys(&fixture.claim(host, 9).await), ["21", "22", "25", "26", "28", "29", "30", "31"]);
    }

    async fn many_waiting_in_one_queue_keep_nobody_from_another(fixture: &Fixture) {
        let host = fixture.host().await;
        for batch in 0..4 {
            let bulk = |number: usize| of("bulk", task(&format!("bulk {batch} {number}")));
            let of_users = |number: usize| of("bulk", task_of(&format!("user {number}"), &format!("users {batch} {number}"), Some(1)));
            fixture.submit(&(0..500).map(bulk).chain((0..500).map(of_users)).collect::<Vec<_>>()).await;
        }
        fixture.submit(&[of("urgent", task("a")), of("urgent", task_of("user 7", "b", Some(1)))]).await;
        let mut found = all(fixture, host, &["urgent"]).await;
        found.sort_unstable();
        assert_eq!(found, ["a", "b"]);
        assert_eq!(all(fixture, host, &["urgent"]).await, [""; 0]);
        assert_eq!(claim(fixture, host, 20, &["bulk", "urgent"]).await.len(), 20);
    }

    async fn a_users_limit_counts_within_a_queue(fixture: &Fixture) {
        let host = fixture.host().await;
        for number in 0..3 {
            fixture.submit(&[of("mail", task_of("u", &format!("mail {number}"), Some(1)))]).await;
            fixture.submit(&[of("video", task_of("u", &format!("video {number}"), Some(2)))]).await;
        }
        let first = fixture.claim(host, 9).await;
        let mut found: Vec<&str> = keys(&first);
        found.sort_unstable();
        assert_eq!(found, ["mail 0", "video 0", "video 1"]);
        assert_eq!(fixture.claim(host, 9).await.len(), 0);
        let mail = first.iter().find(|task| task.queue == "mail").unwrap();
        fixture.backend().settle(&[settled(mail, finish())]).await.unwrap();
        assert_eq!(claim(fixture, host, 9, &["video"]).await.len(), 0);
        assert_eq!(keys(&claim(fixture, host, 9, &["mail", "video"]).await), ["mail 1"]);
    }

    async fn a_task_keeps_its_queue_whatever_becomes_of_it(fixture: &Fixture) {
        let host = fixture.host().await;
        let soon = Timestamp(fixture.backend().now().await.unwrap().0 + 50);
        fixture.submit(&[of("mail", task("scheduled")), of("mail", task_of("u", "scheduled of u", Some(9)))]
            .map(|task| NewTask { run_at: Some(soon), ..task })).await;
        fixture.submit(&[of("mail", task("held")).on_hold(), of("mail", task("cancelled")), of("mail", task_of("u", "cancelled of u", None))]).await;
        for key in ["cancelled", "cancelled of u"] {
            fixture.queue.cancel(key).await.unwrap();
            fixture.queue.retry(key).await.unwrap();
        }
        assert!(fixture.queue.release_held("held").await.unwrap());
        fixture.submit(&["stopped", "retried", "released"].map(|key| of("mail", task(key)))).await;
        fixture.passes(soon).await;
        assert_eq!(all(fixture, host, &["default"]).await, [""; 0]);
        let claimed = claim(fixture, host, 9, &["mail"]).await;
        let mut found: Vec<&str> = keys(&claimed);
        found.sort_unstable();
        assert_eq!(found, ["cancelled", "cancelled of u", "held", "released", "retried", "scheduled", "scheduled of u", "stopped"]);
        for task in &claimed {
            let event = match task.key.as_str() {
                "stopped" => Event::Stopped,
                "released" => Event::Release { delay: Some(Duration::ZERO) },
                _ => Event::Retry { delay: Some(Duration::ZERO) },
            };
            fixture.backend().settle(&[settled(task, event)]).await.unwrap();
        }
        assert_eq!(all(fixture, host, &["default"]).await, [""; 0]);
        assert_eq!(all(fixture, host, &["mail"]).await.len(), 8);
    }

    async fn without_regard_to_users_queues_still_count(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), of("mail", task_of("u", "b", Some(1))), of("mail", task("c")), task_of("u", "d", None)]).await;
        fixture.submit(&[of("mail", task_of("u", "e", Some(1))), of("video", task("f"))]).await;
        let claim = Claim { ignore_users: true, ..asking(host, 9, &["mail", "video"]) };
        assert_eq!(keys(&fixture.backend().claim(&claim).await.unwrap().tasks), ["b", "c", "e", "f"]);
        let claim = Claim { queues: None, ..claim };
        assert_eq!(keys(&fixture.backend().claim(&claim).await.unwrap().tasks), ["a", "d"]);
    }

    async fn a_thousand_queues_are_claimed_in_order(fixture: &Fixture) {
        let host = fixture.host().await;
        let names: Vec<String> = (0..1_000).map(|number| format!("queue-{number:03}")).collect();
        for batch in names.chunks(100) {
            let tasks = batch.iter().map(|queue| of(queue, task(queue)));
            let of_users = batch.iter().map(|queue| of(queue, task_of("u", &format!("u {queue}"), Some(1))));
            fixture.submit(&tasks.chain(of_users).collect::<Vec<_>>()).await;
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut found = claim(fixture, host, 10, &names).await;
        found.extend(fixture.claim(host, 10).await);
        assert_eq!(found.len(), 20);
        let left: Vec<&str> = names.iter().rev().copied().collect();
        found.extend(claim(fixture, host, 1_000, &left).await);
        while found.len() < 2_000 {
            let more = fixture.claim(host, 1_000).await;
            assert!(!more.is_empty(), "only {} tasks were found", found.len());
            found.extend(more);
        }
        let of_nobody: Vec<&str> = found.iter().filter(|task| task.user.is_none()).map(|task| task.key.as_str()).collect();
        let mut sorted = of_nobody.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), 1_000);
    }

    async fn what_was_taken_between_users_keeps_no_claim_by_time_from_many_queues(fixture: &Fixture) {
        const QUEUES: usize = 1_100;
        let host = fixture.host().await;
        let names: Vec<String> = (0..QUEUES).map(|number| format!("queue-{number:04}")).collect();
        for round in 0..2 {
            for batch in names.chunks(275) {
                let tasks = batch.iter().map(|queue| of(queue, task_of("u", &format!("{round} {queue}"), None)));
                fixture.submit(&tasks.collect::<Vec<_>>()).await;
            }
        }
        let by_time = Claim { ignore_users: true, queues: None, ..asking(host, 10, &[]) };
        let mut found = fixture.backend().claim(&by_time).await.unwrap().tasks.len();
        // What stands first in the queues goes, one task of each.
        while found < QUEUES {
            let between = fixture.claim(host, 100).await.len();
            assert!(between > 0, "{found} were found");
            found += between;
        }
        while found < 2 * QUEUES {
            let more = fixture.backend().claim(&by_time).await.unwrap().tasks.len();
            assert!(more > 0, "{found} were found");
            found += more;
        }
        assert_eq!(fixture.backend().claim(&by_time).await.unwrap().tasks.len(), 0);
    }

    async fn lists_and_stats_tell_queues(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), of("mail", task("b")), of("mail", task("c")), of("video", task("d")).on_hold()]).await;
        let claimed = claim(fixture, host, 1, &["mail"]).await;
        let filter = |queue: &str| Filter { queue: Some(queue.to_owned()), limit: 10, ..Filter::default() };
        for (queue, expected) in [("mail", vec!["b", "c"]), ("default", vec!["a"]), ("video", vec!["d"]), ("none", vec![])] {
            let page = fixture.backend().list(&filter(queue)).await.unwrap();
            assert_eq!(page.tasks.iter().map(|task| task.key.as_str()).collect::<Vec<_>>(), expected, "{queue}");
        }
        let queues = fixture.queue.stats().await.unwrap().queues;
        assert_eq!(queues, [("mail".to_owned(), 2), ("default".to_owned(), 1), ("video".to_owned(), 1)]);
        fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        fixture.queue.cancel("c").await.unwrap();
        fixture.queue.retry("c").await.unwrap();
        fixture.queue.drop_held("d").await.unwrap();
        let queues = fixture.queue.stats().await.unwrap().queues;
        assert_eq!(queues, [("default".to_owned(), 1), ("mail".to_owned(), 1)]);
    }

    async fn types_are_counted_by_queue(fixture: &Fixture) {
        let host = fixture.host().await;
        assert_eq!(fixture.backend().types().await.unwrap(), Some(Vec::new()));
        let typed = |queue: &str, name: &str, key: &str| NewTask { task_type: name.to_owned(), ..of(queue, task(key)) };
        fixture
            .submit(&[
                typed("mail", "a", "1"),
                typed("mail", "a", "2"),
                typed("mail", "a", "3").on_hold(),
                typed("default", "a", "4"),
                typed("default", "b", "5"),
                typed("default", "b", "6"),
            ])
            .await;
        let counted = async || -> Vec<(String, String, u64)> {
            let types = fixture.backend().types().await.unwrap().unwrap();
            types.into_iter().map(|QueuedType { queue, task_type, tasks }| (queue, task_type, tasks)).collect()
        };
        let row = |queue: &str, name: &str, tasks: u64| (queue.to_owned(), name.to_owned(), tasks);
        assert_eq!(counted().await, [row("mail", "a", 3), row("default", "b", 2), row("default", "a", 1)]);
        let claimed = claim(fixture, host, 2, &["mail"]).await;
        assert_eq!(counted().await[0], row("mail", "a", 3), "running ones count as well");
        fixture.backend().settle(&claimed.iter().map(|task| settled(task, finish())).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(counted().await, [row("default", "b", 2), row("default", "a", 1), row("mail", "a", 1)]);
    }

    async fn a_name_that_no_queue_can_have_is_refused(fixture: &Fixture) {
        let long = "x".repeat(65);
        for (queue, problem) in [
            ("", "the queue's name is empty"),
            (long.as_str(), "the queue's name has 65 bytes; at most 64 are allowed"),
            ("two words", "the queue's name contains ' '; letters and digits of ASCII and _ - . : / are allowed"),
            ("größe", "the queue's name contains 'ö'; letters and digits of ASCII and _ - . : / are allowed"),
        ] {
            let refused = fixture.backend().submit(&[of(queue, task("key"))]).await.unwrap_err();
            let Error::InvalidTask { problem: found, .. } = refused else { panic!("{refused:?}") };
            assert_eq!(found, problem);
        }
        assert!(!fixture.queue.exists("key").await.unwrap());
        let host = fixture.host().await;
        fixture.submit(&[of(&"x".repeat(64), task("longest"))]).await;
        assert_eq!(all(fixture, host, &[&"x".repeat(64)]).await, ["longest"]);
    }
}
