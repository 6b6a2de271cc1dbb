//! Types that some hosts do not serve: a claim is given none of them, and whoever serves them gets them at once, in the order that holds without.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Accepts, Claim, ClaimedTask, Event, Filter, HostId, NewTask, Policy, Queue, State};

use laelaps_test_databases::eventually;

use crate::fixture::{Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of};
use crate::promises;

fn typed(task_type: &str, task: NewTask) -> NewTask {
    NewTask { task_type: task_type.to_owned(), ..task }
}

/// A claim of a host that serves these types alone. What was learnt by others is not known to it.
fn serving(host: HostId, limit: u32, types: &[&str]) -> Claim {
    let types: Vec<String> = types.iter().map(|name| (*name).to_owned()).collect();
    let accepts = Some(Accepts::new(move |name| types.iter().any(|served| served == name)));
    Claim { accepts, ..Claim::new(host, limit, LONG) }
}

async fn claim(fixture: &Fixture, claim: Claim) -> Vec<ClaimedTask> {
    fixture.backend().claim(&claim).await.unwrap().tasks
}

/// Claims until none finds anything, as a host does that is woken as long as it puts tasks apart.
async fn all(fixture: &Fixture, asked: &Claim) -> Vec<String> {
    let mut found = Vec::new();
    let mut idle = 0;
    while idle < 3 {
        let claimed = claim(fixture, asked.clone()).await;
        idle = if claimed.is_empty() { idle + 1 } else { 0 };
        found.extend(claimed.into_iter().map(|task| task.key));
    }
    found
}

/// What a claim met beside what it was given is put apart meanwhile.
async fn has_ready(fixture: &Fixture, tasks: u64) {
    let counted = async || {
        let stats = fixture.queue.stats().await.unwrap();
        if stats.ready == tasks { Ok(()) } else { Err(format!("{stats:?}")) }
    };
    eventually(PATIENCE, "what is not served waits", counted).await;
}

promises! {
    async fn a_host_is_given_what_it_serves_alone_and_the_others_find_the_rest(fixture: &Fixture) {
        let (one, other) = (fixture.host().await, fixture.host_as("other").await);
        for number in 0..6 {
            fixture.submit(&[typed(if number % 2 == 0 { "even" } else { "odd" }, task(&format!("{number}")))]).await;
            let user = format!("user {}", number % 3);
            fixture.submit(&[typed(if number % 2 == 0 { "even" } else { "odd" }, task_of(&user, &format!("of {number}"), Some(2)))]).await;
        }
        let mut even = all(fixture, &serving(one, 9, &["even"])).await;
        even.sort_unstable();
        assert_eq!(even, ["0", "2", "4", "of 0", "of 2", "of 4"]);
        has_ready(fixture, 6).await;
        fixture.audit().await;
        for key in ["1", "3", "5", "of 1", "of 3", "of 5"] {
            let waits = fixture.get(key).await;
            assert_eq!((waits.state, waits.attempts, waits.error_code), (State::Waiting, 0, None), "{key}");
            assert!(fixture.queue.attempts(key).await.unwrap().is_empty(), "nothing has happened to {key}");
        }
        let mut odd = all(fixture, &serving(other, 9, &["odd"])).await;
        odd.sort_unstable();
        assert_eq!(odd, ["1", "3", "5", "of 1", "of 3", "of 5"]);
        fixture.audit().await;
    }

    async fn what_was_put_apart_keeps_its_place_in_the_order(fixture: &Fixture) {
        let host = fixture.host().await;
        for number in 0..4 {
            let (name, priority) = if number % 2 == 0 { ("a", 0) } else { ("b", number) };
            fixture.submit(&[NewTask { priority, ..typed(name, task(&format!("{number}"))) }]).await;
            fixture.submit(&[NewTask { priority, ..typed(name, task_of("u", &format!("u{number}"), None)) }]).await;
        }
        assert_eq!(all(fixture, &serving(host, 9, &["none"])).await, [""; 0]);
        fixture.submit(&[typed("a", task("late")), NewTask { priority: -1, ..typed("b", task("urgent")) }, typed("a", task_of("u", "ulate", None))]).await;
        let mut found = Vec::new();
        // One at a time, so that the order is the claims'.
        loop {
            let claimed = claim(fixture, serving(host, 1, &["a", "b"])).await;
            let Some(task) = claimed.first() else { break };
            fixture.backend().settle(&[settled(task, finish())]).await.unwrap();
            found.push(task.key.clone());
        }
        let (users, nobodys): (Vec<&str>, Vec<&str>) = found.iter().map(String::as_str).partition(|key| key.starts_with('u') && *key != "urgent");
        assert_eq!(nobodys, ["urgent", "0", "2", "late", "1", "3"]);
        assert_eq!(users, ["u0", "u2", "ulate", "u1", "u3"]);
    }

    async fn nobody_waits_behind_many_that_no_host_serves(fixture: &Fixture) {
        let host = fixture.host().await;
        for batch in 0..2 {
            let stranger = |number: usize| typed(&format!("type {}", number % 7), task(&format!("{batch} {number}")));
            let of_users = |number: usize| typed("strange", task_of(&format!("user {number}"), &format!("u {batch} {number}"), Some(1)));
            fixture.submit(&(0..300).map(stranger).chain((0..100).map(of_users)).collect::<Vec<_>>()).await;
        }
        fixture.submit(&[typed("served", task("a")), typed("served", task_of("user 7", "b", None))]).await;
        let asked = serving(host, 50, &["served"]);
        let mut found = Vec::new();
        for _ in 0..100 {
            found.extend(claim(fixture, asked.clone()).await.into_iter().map(|task| task.key));
            if found.len() == 2 {
                break;
            }
        }
        found.sort_unstable();
        assert_eq!(found, ["a", "b"]);
        has_ready(fixture, 800).await;
        fixture.audit().await;
        assert_eq!(fixture.queue.list(&Filter { states: vec![State::Waiting], limit: 1_000, ..Filter::default() }).await.unwrap().tasks.len(), 800);
    }

    async fn who_takes_one_at_a_time_comes_quickly_through_what_is_others_business(fixture: &Fixture) {
        let host = fixture.host().await;
        for batch in 0..5 {
            let strange = |number: usize| typed("strange", task(&format!("{batch} {number}")));
            fixture.submit(&(0..500).map(strange).collect::<Vec<_>>()).await;
        }
        for number in 0..20 {
            fixture.submit(&[typed("served", task(&format!("{number:02}")))]).await;
        }
        let asked = serving(host, 1, &["served"]);
        let mut found = Vec::new();
        for _ in 0..6 {
            found = claim(fixture, asked.clone()).await;
            if !found.is_empty() {
                break;
            }
        }
        assert_eq!(keys(&found), ["00"], "no more than was asked for");
        // What more it met on the way is put apart meanwhile, and comes back in its order.
        for number in 1..20 {
            let next = eventually(PATIENCE, "the next one comes", async || {
                let claimed = claim(fixture, asked.clone()).await;
                if claimed.is_empty() { Err("none".to_owned()) } else { Ok(claimed) }
            });
            assert_eq!(keys(&next.await), [format!("{number:02}")]);
        }
        fixture.audit().await;
    }

    async fn a_plugin_that_comes_finds_all_that_waited_for_it(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..120).map(|number| match number % 3 {
            0 => typed("late", task(&format!("{number}"))),
            1 => typed("late", task_of(&format!("u{}", number % 5), &format!("{number}"), None)),
            _ => typed("later", NewTask { queue: Some("mail".to_owned()), ..task_of("u", &format!("{number}"), None) }),
        }).collect();
        fixture.submit(&tasks).await;
        assert_eq!(all(fixture, &serving(host, 100, &["early"])).await, [""; 0]);
        assert_eq!(all(fixture, &serving(host, 7, &["late"])).await.len(), 80);
        let of_mail = |queue: &str| Claim { queues: Some(Arc::from([queue.to_owned()])), ..serving(host, 50, &["later"]) };
        assert_eq!(all(fixture, &of_mail("default")).await, [""; 0]);
        assert_eq!(all(fixture, &of_mail("mail")).await.len(), 40);
        fixture.audit().await;
    }

    async fn each_user_has_its_turn_among_what_comes_back(fixture: &Fixture) {
        let host = fixture.host().await;
        let many: Vec<NewTask> = (0..300).map(|number| typed("late", task_of("a", &format!("a{number}"), None))).collect();
        fixture.submit(&many).await;
        fixture.submit(&[typed("late", task_of("z", "z", None)), typed("late", task("nobody"))]).await;
        assert_eq!(all(fixture, &serving(host, 100, &["early"])).await, [""; 0]);
        let accepts = serving(host, 4, &["late"]);
        let mut claims = 0;
        let mut found: Vec<String> = Vec::new();
        while !(found.contains(&"z".to_owned()) && found.contains(&"nobody".to_owned())) {
            claims += 1;
            assert!(claims <= 10, "after {claims} claims: {found:?}");
            found.extend(claim(fixture, accepts.clone()).await.into_iter().map(|task| task.key));
        }
    }

    async fn whoever_accepts_all_finds_what_was_put_apart(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[typed("strange", task("a"))]).await;
        assert_eq!(all(fixture, &serving(host, 9, &["early"])).await, [""; 0]);
        assert_eq!(keys(&fixture.claim(host, 9).await), ["a"]);
    }

    async fn what_waits_apart_is_a_waiting_task_to_everybody_else(fixture: &Fixture) {
        let host = fixture.host().await;
        let queue: &Queue = &fixture.queue;
        for key in ["cancelled", "finished", "retried"] {
            fixture.submit(&[typed("strange", task(key)), typed("strange", task_of("u", &format!("{key} of u"), Some(1)))]).await;
        }
        let serves = serving(host, 9, &["early"]);
        assert_eq!(all(fixture, &serves).await, [""; 0]);
        for of in ["", " of u"] {
            queue.cancel(&format!("cancelled{of}")).await.unwrap();
            queue.force_finish(&format!("finished{of}"), None).await.unwrap();
            queue.retry(&format!("retried{of}")).await.unwrap();
        }
        fixture.audit().await;
        assert_eq!(all(fixture, &serves).await, [""; 0]);
        let mut found = all(fixture, &serving(host, 9, &["strange"])).await;
        found.sort_unstable();
        assert_eq!(found, ["retried", "retried of u"]);
        fixture.audit().await;
    }

    async fn a_suspect_of_a_type_that_is_not_served_still_runs_alone_where_it_is(fixture: &Fixture) {
        fixture.submit(&[typed("strange", task("suspect"))]).await;
        for lost in 0..Policy::LOST_MAX {
            let identity = format!("lost {lost}");
            let host = fixture.host_as(&identity).await;
            assert_eq!(claim(fixture, serving(host, 1, &["strange"])).await.len(), 1);
            fixture.backend().hand_on(&[identity], &fixture.config.policy).await.unwrap();
        }
        fixture.passes(fixture.get("suspect").await.run_at).await;
        let host = fixture.host().await;
        let alone = |types| Claim { alone: true, ..serving(host, 3, types) };
        assert_eq!(all(fixture, &alone(&["early"])).await, [""; 0]);
        fixture.audit().await;
        assert_eq!(fixture.get("suspect").await.lost, Policy::LOST_MAX);
        assert_eq!(claim(fixture, serving(host, 3, &["strange"])).await.len(), 0, "not in company");
        let claimed = claim(fixture, alone(&["strange"])).await;
        assert_eq!((keys(&claimed), claimed[0].alone), (vec!["suspect"], true));
        fixture.audit().await;
    }

    async fn a_task_that_its_host_cannot_run_after_all_waits_apart_too(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[typed("strange", task_of("u", "a", Some(1))), typed("early", task_of("u", "b", Some(1)))]).await;
        let claimed = fixture.claim(host, 1).await;
        assert_eq!(keys(&claimed), ["a"]);
        let settlement = settled(&claimed[0], Event::Unrouted { message: "no route".to_owned() });
        fixture.backend().settle(&[settlement]).await.unwrap();
        fixture.audit().await;
        assert_eq!(all(fixture, &serving(host, 9, &["early"])).await, ["b"], "its user is kept back by nothing");
        assert_eq!(fixture.queue.attempts("a").await.unwrap().len(), 0);
    }

    async fn a_host_that_looked_a_moment_ago_is_told_when_to_come_back(fixture: &Fixture) {
        let (one, other) = (fixture.host().await, fixture.host_as("other").await);
        let there = fixture.beside().await;
        let (asked, elsewhere) = (serving(one, 9, &["late"]), serving(other, 9, &["early"]));
        assert_eq!(claim(fixture, asked.clone()).await.len(), 0);
        fixture.submit(&[typed("late", task("a"))]).await;
        assert_eq!(all(&there, &elsewhere).await, [""; 0]);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let claimed = fixture.backend().claim(&asked).await.unwrap();
            if !claimed.tasks.is_empty() {
                break;
            }
            let wait = claimed.next_due_in.expect("it did not look yet");
            assert!(tokio::time::Instant::now() < deadline, "it never looks");
            // As a host does.
            let _ = tokio::time::timeout(wait, fixture.backend().wakeup()).await;
        }
    }
}
