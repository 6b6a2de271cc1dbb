//! A host as child of a WatchdogQueue: its master needs no change, its peers take what they want, and no item is lost or done twice.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt as _;
use std::time::Duration;

use laelaps_queue::{NewTask, Queue, State};
use laelaps_test_databases::{Durability, postgres};
use laelaps_test_zookeeper::Server;
use laelaps_tests::{Host, PATIENCE, Signal, Site, all_tasks, eventually, submit, task, wait_for_finished, wait_for_stats};
use serde_json::{Value, json};

use super::foreign_client::Peer;
use super::{LONG_SESSION, Place};

/// Between two kicks. A host that was silent for two and a half of them is not well, and a busy machine is not to make it so.
const KICK_INTERVAL: Duration = Duration::from_secs(4);
/// How long a child may go without a kick until a foreign master takes it for stuck, in seconds: longer than any test.
const TIMER: u32 = 3_600;

/// The steps of a move, by the names that fault injection has for them.
const STEPS: [&str; 4] = ["intake-held", "intake-taken", "intake-released", "intake-moved"];

impl Place {
    /// A site whose hosts take the items of `/q`; items are JSON objects. `changes` replaces members of the section.
    fn takes_items(&self, changes: Value) {
        self.takes_items_as("laelaps", LONG_SESSION, changes);
    }

    /// The same as a child of this name, with sessions of this timeout.
    fn takes_items_as(&self, process: &str, session: Duration, changes: Value) {
        let queue = json!({
            "servers": self.servers, "root": "/q", "markers": "/markers", "type": "silent", "json": true,
            "session_timeout": session.as_secs(), "kick_interval": KICK_INTERVAL.as_secs(), "process": process,
        });
        let mut section = json!({ "processors": 4, "watchdog_queue": queue });
        section.as_object_mut().expect("an object").extend(changes.as_object().expect("changes are an object").clone());
        self.site.plug_guest("zoo");
        self.site.configure(section);
    }

    async fn queue_of(&self, items: &[String]) {
        let mut arguments = vec!["create-queue", "/q"];
        arguments.extend(items.iter().map(String::as_str));
        let _ = self.says(&arguments).await;
    }

    /// Markers of moves that were not finished.
    async fn marker_count(&self) -> usize {
        let client = zookeeper_client::Client::connector().with_session_timeout(LONG_SESSION);
        let client = client.connect(&self.servers).await.expect("the server lets us in");
        client.list_children("/markers").await.expect("our own root").len()
    }
}

/// Items that leave a mark when their task runs.
fn items(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| json!({ "mark": "/marks/done", "item": number }).to_string()).collect()
}

/// The numbers of the items whose tasks there are.
fn numbers(tasks: &[laelaps_queue::Task]) -> Vec<u64> {
    let number = |task: &laelaps_queue::Task| {
        let data: Value = serde_json::from_slice(task.data.as_deref().expect("listed with data")).expect("JSON");
        data["item"].as_u64().expect("a number")
    };
    let mut numbers: Vec<u64> = tasks.iter().map(number).collect();
    numbers.sort_unstable();
    numbers
}

fn item_number(item: &str) -> u64 {
    serde_json::from_str::<Value>(item).expect("JSON")["item"].as_u64().expect("a number")
}

async fn stop(hosts: impl IntoIterator<Item = Host>) {
    for host in hosts {
        host.stop().await;
    }
}

#[tokio::test]
async fn an_unchanged_master_sees_a_host_as_its_child_until_every_task_has_ended() {
    let place = Place::new("unchanged_master").await;
    place.takes_items(json!({}));
    let queue = place.site.queue().await;
    let host = place.site.start().await;
    let mut master = Peer::start(&place);
    let gated: Vec<Value> = (0..6).map(|number| json!({ "gate": "/marks/gate", "item": number }).to_string().into()).collect();
    master.call(json!(["create_queue", TIMER, gated, true])).await;
    assert_eq!(master.call(json!(["wait_sync", 300])).await, true, "the host has removed the barrier");
    eventually(PATIENCE, "every item is taken", async || match master.call(json!(["queue_count"])).await.as_u64() {
        Some(0) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    wait_for_stats(&queue, "as many run as there are processors", PATIENCE, |stats| stats.running == 4).await;
    // The work is not done: the master still sees its child, which kicks.
    assert_eq!(master.call(json!(["check_timers"])).await, json!([1, 0]));
    let timers = master.call(json!(["get_timers", false])).await;
    assert_eq!(timers.as_object().unwrap().keys().collect::<Vec<_>>(), ["laelaps"]);
    place.site.open_gate("gate");
    eventually(PATIENCE, "the child is done", async || match master.call(json!(["check_timers"])).await {
        counts if counts == json!([0, 0]) => Ok(()),
        counts => Err(counts.to_string()),
    })
    .await;
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (6, 0, 0), "everything had ended before");
    master.call(json!(["clear_timers"])).await;
    assert_eq!(numbers(&all_tasks(&queue).await), (0..6).collect::<Vec<u64>>());

    // The next night: items are numbered from 0 again, and are other tasks.
    let again: Vec<Value> = items(6..9).into_iter().map(Value::from).collect();
    master.call(json!(["create_queue", TIMER, again, true])).await;
    assert_eq!(master.call(json!(["wait_sync", 300])).await, true);
    wait_for_finished(&queue, 9, PATIENCE).await;
    eventually(PATIENCE, "the child is done", async || match master.call(json!(["check_timers"])).await {
        counts if counts == json!([0, 0]) => Ok(()),
        counts => Err(counts.to_string()),
    })
    .await;
    assert_eq!(numbers(&all_tasks(&queue).await), (0..9).collect::<Vec<u64>>());
    host.stop().await;
}

#[tokio::test]
async fn a_peer_and_two_hosts_take_items_from_one_root_and_each_is_somebodys_once() {
    let place = Place::new("shared_root").await;
    place.takes_items(json!({ "poll_interval": 0.2 }));
    let queue = place.site.queue().await;
    let all = items(0..200);
    place.queue_of(&all).await;
    let hosts = [place.site.start().await, place.site.start().await];
    let mut peer = Peer::start(&place);
    peer.call(json!(["attach_queue", TIMER])).await;
    let mut theirs = BTreeSet::new();
    while let Value::String(item) = peer.call(json!(["consume"])).await {
        assert!(theirs.insert(item_number(&item)), "taken twice: {item}");
    }
    let ours = 200 - theirs.len();
    // Until it says so, a host may hold a task for an item that it had read before the peer took it.
    for host in &hosts {
        host.logged("every item is taken, and every task of them has ended", PATIENCE).await;
    }
    let tasks = all_tasks(&queue).await;
    assert!(tasks.iter().all(|task| task.state == State::Finished), "{tasks:?}");
    let taken: Vec<u64> = numbers(&tasks);
    assert_eq!(taken.len(), ours);
    assert!(taken.iter().all(|number| !theirs.contains(number)), "an item is the peer's and ours");
    stop(hosts).await;
}

#[tokio::test]
async fn a_host_warns_of_a_name_that_a_perl_master_sees_cut() {
    let place = Place::new("long_name").await;
    place.takes_items_as(&"x".repeat(1_024), LONG_SESSION, json!({}));
    let _initialised = place.site.queue().await;
    place.queue_of(&[]).await;
    let host = place.site.start().await;
    host.logged("a process identifier longer than 1,023 bytes reaches a Perl peer cut", PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_host_whose_zookeeper_is_down_at_its_start_works_and_takes_items_when_it_comes() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down_for_the_intake").await;
    // It says so when a session timeout has passed.
    place.takes_items_as("laelaps", Duration::from_secs(2), json!({}));
    let queue = place.site.queue().await;
    submit(&queue, &[task("own", "silent", json!({}))]).await;
    place.queue_of(&items(0..3)).await;
    server.kill();
    let host = place.site.start().await;
    host.logged("items cannot be taken now; trying again", PATIENCE).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    server.restart().await;
    wait_for_finished(&queue, 4, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_killed_hosts_items_keep_the_other_child_until_they_are_done() {
    let place = Place::new("the_others_items").await;
    place.takes_items(json!({ "processors": 2 }));
    let queue = place.site.queue().await;
    let gated: Vec<String> = (0..4).map(|number| json!({ "gate": "/marks/gate", "item": number }).to_string()).collect();
    place.queue_of(&gated).await;
    let mut first = place.site.start().await;
    wait_for_stats(&queue, "two run, two wait", PATIENCE, |stats| (stats.running, stats.ready) == (2, 2)).await;
    let second = place.site.start().await;
    second.logged("this host is a child of the queue", PATIENCE).await;
    first.kill().await;
    eventually(PATIENCE, "the other one runs two", async || {
        let lost: u32 = all_tasks(&queue).await.iter().map(|task| task.lost).sum();
        let stats = queue.stats().await.unwrap();
        if (lost, stats.running, stats.ready) == (2, 2, 2) { Ok(()) } else { Err(format!("{lost} lost, {stats:?}")) }
    })
    .await;
    assert!(second.lines_with("every task of them has ended").is_empty());
    place.site.open_gate("gate");
    second.logged("every item is taken, and every task of them has ended", PATIENCE).await;
    assert_eq!(queue.stats().await.unwrap().finished, 4);
    second.stop().await;
}

#[tokio::test]
async fn a_database_outage_leaves_the_child_in_its_masters_sight_until_the_tasks_have_ended() {
    let place = Place::new("outage_of_the_database").await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.takes_items(json!({ "url": url, "pq_connect_timeout": 1 }));
    let queue = place.site.queue_at(&url).await;
    let gated: Vec<String> = (0..3).map(|number| json!({ "gate": "/marks/gate", "item": number }).to_string()).collect();
    place.queue_of(&gated).await;
    let mut master = Peer::start(&place);
    master.call(json!(["attach_queue", TIMER])).await;
    let host = place.site.start().await;
    wait_for_stats(&queue, "all run", PATIENCE, |stats| stats.running == 3).await;
    database.kill();
    host.logged("items cannot be moved now; trying again", PATIENCE).await;
    host.logged("this host is not well: it does not kick its timer in the queue", PATIENCE).await;
    assert_eq!(master.call(json!(["check_timers"])).await, json!([1, 0]), "the work is not done");
    database.restart().await;
    place.site.open_gate("gate");
    host.logged("every item is taken, and every task of them has ended", PATIENCE).await;
    assert_eq!(master.call(json!(["check_timers"])).await, json!([0, 0]));
    wait_for_finished(&queue, 3, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_host_that_is_stopped_at_once_says_what_its_master_may_think_and_is_gone_when_it_ends() {
    let place = Place::new("stopped_at_once").await;
    place.takes_items(json!({ "processors": 1 }));
    let queue = place.site.queue().await;
    let gated: Vec<String> = (0..2).map(|number| json!({ "gate": "/marks/gate", "item": number }).to_string()).collect();
    place.queue_of(&gated).await;
    let mut master = Peer::start(&place);
    master.call(json!(["attach_queue", TIMER])).await;
    let mut host = place.site.start().await;
    wait_for_stats(&queue, "one runs, one waits", PATIENCE, |stats| (stats.running, stats.ready) == (1, 1)).await;
    host.signal(Signal::QUIT);
    assert!(host.exited(PATIENCE).await.success());
    assert_eq!(master.call(json!(["check_timers"])).await, json!([0, 0]), "its timer ended with it, not with its session");
    host.logged("its master may take them for done", PATIENCE).await;
}

#[tokio::test]
async fn the_root_of_the_markers_is_no_queue_to_be_cleared() {
    let place = Place::new("markers_root").await;
    place.takes_items(json!({}));
    let _ = place.site.queue().await;
    let host = place.site.start().await;
    eventually(PATIENCE, "the root of the markers is refused", async || {
        let refused = place.watchdog(&["clear-timers", "/markers"]).await;
        if refused.stderr.contains("/markers: hosts keep the markers") { Ok(()) } else { Err(format!("{refused:?}")) }
    })
    .await;
    let told = place.site.laelaps(["-c", "laelaps.yml", "watchdog", "status"]).await.success().stdout;
    assert_eq!(told, "/q: not there yet\n");
    host.stop().await;
}

#[tokio::test]
async fn a_held_task_waits_for_its_item_and_only_for_it() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue: Queue = site.queue().await;
    let held: NewTask = task("mine", "silent", json!({})).on_hold();
    queue.backend().submit(&[held, task("free", "silent", json!({}))]).await.unwrap();
    let host = site.start().await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    let told = site.laelaps(["-c", "laelaps.yml", "list"]).await.success().stdout;
    assert!(told.lines().any(|line| line.contains("mine") && line.contains("held")), "{told}");
    let refused = site.laelaps(["-c", "laelaps.yml", "retry", "mine"]).await;
    assert_eq!(refused.code, Some(6), "{refused:?}");
    assert!(queue.backend().release_held("mine").await.unwrap());
    wait_for_finished(&queue, 2, PATIENCE).await;
    assert!(all_tasks(&queue).await.iter().all(|task| task.state == State::Finished));
    host.stop().await;
}

/// A host that kills itself at a step: only the program that tests build can be told to.
mod with_faults {
    use super::*;

    #[tokio::test]
    async fn a_host_killed_at_any_step_of_a_move_loses_no_item_and_doubles_none() {
        for (number, step) in STEPS.iter().enumerate() {
            let place = Place::new(&format!("killed_at_{step}")).await;
            place.takes_items(json!({}));
            let queue = place.site.queue().await;
            place.queue_of(&items(0..20)).await;
            // Not at the first item, so that others are moved before and after.
            let fault = format!("abort-at={step}:{}", 3 + number);
            let mut doomed = place.site.spawn_with(&[], &[("LAELAPS_FAULT", &fault)]);
            assert_eq!(doomed.exited(PATIENCE).await.signal(), Some(9), "killed at {step}");
            // A peer takes what is there while nobody of ours lives.
            let mut peer = Peer::start(&place);
            peer.call(json!(["attach_queue", TIMER])).await;
            let mut theirs = BTreeSet::new();
            for _ in 0..3 {
                if let Value::String(item) = peer.call(json!(["consume"])).await {
                    theirs.insert(item_number(&item));
                }
            }
            let host = place.site.start().await;
            wait_for_finished(&queue, 20 - theirs.len(), PATIENCE).await;
            let tasks = all_tasks(&queue).await;
            let taken = numbers(&tasks);
            let expected: Vec<u64> = (0..20).filter(|number| !theirs.contains(number)).collect();
            assert_eq!(taken, expected, "killed at {step}; the peer has {theirs:?}");
            // Each ran once, or once more if it was running when its host was killed.
            let (marks, lost) = (place.site.marks("done"), tasks.iter().map(|task| task.lost as usize).sum::<usize>());
            let ran: BTreeSet<&str> = marks.iter().filter_map(|mark| mark.split(' ').next()).collect();
            assert_eq!(ran.len(), expected.len(), "killed at {step}: {marks:?}");
            assert!(marks.len() <= expected.len() + lost, "killed at {step}: {lost} lost, {marks:?}");
            // The marker of the last item may outlive its task by a moment.
            eventually(PATIENCE, "no marker is left", async || match place.marker_count().await {
                0 => Ok(()),
                left => Err(format!("killed at {step}: {left} markers")),
            })
            .await;
            host.stop().await;
        }
    }

    /// A peer takes what it finds, the very item in question included, while a host is at a step of its move; then the host goes on, or is killed.
    #[tokio::test]
    async fn a_peer_that_races_a_host_at_any_step_of_a_move_costs_no_item_and_doubles_none() {
        for step in STEPS {
            for is_killed in [false, true] {
                let place = Place::new(&format!("raced_at_{step}_{is_killed}")).await;
                place.takes_items(json!({}));
                let queue = place.site.queue().await;
                place.queue_of(&items(0..12)).await;
                let mut peer = Peer::start(&place);
                peer.call(json!(["attach_queue", TIMER])).await;
                let mut host = place.site.start_with_fault(&format!("block-at={step}:4")).await;
                host.logged("fault injection: this thread is blocked", PATIENCE).await;
                let mut theirs = BTreeSet::new();
                // All that is left if the host only holds the fourth, so that it is among them.
                let (limit, taken) = if step == "intake-held" { (12, 9) } else { (4, 4) };
                while theirs.len() < limit
                    && let Value::String(item) = peer.call(json!(["consume"])).await
                {
                    assert!(theirs.insert(item_number(&item)), "taken twice: {item}");
                }
                assert_eq!(theirs.len(), taken, "at {step}: {theirs:?}");
                if is_killed {
                    host.kill().await;
                    host = place.site.start().await;
                } else {
                    std::fs::write(place.site.path("unblock"), "").unwrap();
                }
                host.logged("every item is taken, and every task of them has ended", PATIENCE).await;
                let tasks = all_tasks(&queue).await;
                let expected: Vec<u64> = (0..12).filter(|number| !theirs.contains(number)).collect();
                assert_eq!(numbers(&tasks), expected, "raced at {step}, killed: {is_killed}");
                assert!(tasks.iter().all(|task| task.state == State::Finished), "raced at {step}, killed: {is_killed}");
                let (marks, lost) = (place.site.marks("done"), tasks.iter().map(|task| task.lost as usize).sum::<usize>());
                let ours = expected.len()..=expected.len() + lost;
                assert!(ours.contains(&marks.len()), "raced at {step}: {lost} lost, {marks:?}");
                assert_eq!(place.marker_count().await, 0, "raced at {step}: no marker is left");
                host.stop().await;
            }
        }
    }

    #[tokio::test]
    async fn a_root_that_is_made_again_while_an_item_is_moved_is_another_one() {
        let place = Place::new("made_again").await;
        place.takes_items(json!({}));
        let queue = place.site.queue().await;
        place.queue_of(&items(0..1)).await;
        let host = place.site.start_with_fault("block-at=intake-held").await;
        host.logged("fault injection: this thread is blocked", PATIENCE).await;
        // The next item has the number of the one that is being moved, and is another.
        let _ = place.says(&["clear-timers", "/q"]).await;
        place.queue_of(&items(1..2)).await;
        std::fs::write(place.site.path("unblock"), "").unwrap();
        host.logged("every item is taken, and every task of them has ended", PATIENCE).await;
        assert_eq!(numbers(&all_tasks(&queue).await), [1]);
        assert_eq!(place.site.marks("done").len(), 1);
        assert_eq!(place.marker_count().await, 0);
        host.stop().await;
    }

    #[tokio::test]
    async fn what_a_killed_host_left_half_way_is_made_good_although_the_root_is_cleared_and_made_again() {
        for step in STEPS {
            let place = Place::new(&format!("cleared_after_{step}")).await;
            place.takes_items(json!({}));
            let queue = place.site.queue().await;
            place.queue_of(&items(0..1)).await;
            let mut doomed = place.site.spawn_with(&[], &[("LAELAPS_FAULT", &format!("abort-at={step}"))]);
            assert_eq!(doomed.exited(PATIENCE).await.signal(), Some(9), "killed at {step}");
            // Once its session is over nothing of it stands in the master's way.
            let _ = place.says(&["clear-timers", "/q"]).await;
            place.queue_of(&items(1..2)).await;
            let host = place.site.start().await;
            // An item that was only held went with its root.
            let ours: Vec<u64> = if step == "intake-held" { vec![1] } else { vec![0, 1] };
            wait_for_finished(&queue, ours.len(), PATIENCE).await;
            assert_eq!(numbers(&all_tasks(&queue).await), ours, "killed at {step}");
            host.stop().await;
        }
    }

    #[tokio::test]
    async fn a_marker_that_outlived_its_task_does_not_bring_it_back() {
        let place = Place::new("after_retention").await;
        place.takes_items(json!({ "retention_time": 0, "cleanup_interval": 0 }));
        let queue = place.site.queue().await;
        place.queue_of(&items(0..1)).await;
        let mut doomed = place.site.spawn_with(&[], &[("LAELAPS_FAULT", "abort-at=intake-released")]);
        assert_eq!(doomed.exited(PATIENCE).await.signal(), Some(9));
        // Another host, which is no child of the queue, runs the task; its retention ends, and nobody remembers it.
        place.takes_items(json!({ "retention_time": 0, "cleanup_interval": 0, "watchdog_queue": null }));
        let other = place.site.start().await;
        eventually(PATIENCE, "the task has run and is forgotten", async || {
            queue.backend().clean_up(100).await.map_err(|error| error.to_string())?;
            let left = all_tasks(&queue).await.len();
            if left == 0 && place.site.marks("done").len() == 1 { Ok(()) } else { Err(format!("{left} left")) }
        })
        .await;
        other.stop().await;
        place.takes_items(json!({ "retention_time": 0, "cleanup_interval": 0 }));
        let host = place.site.start().await;
        eventually(PATIENCE, "the marker is gone", async || match place.marker_count().await {
            0 => Ok(()),
            left => Err(format!("{left} markers")),
        })
        .await;
        host.logged("every item is taken, and every task of them has ended", PATIENCE).await;
        assert_eq!(place.site.marks("done").len(), 1, "it ran once");
        host.stop().await;
    }
}
