//! A fleet in the database: hosts are told from dead ones by their signs of life there, and by nothing else.

use std::time::{Duration, Instant};

use laelaps_queue::{HostId, Queue, Sign, State, Task};
use laelaps_tests::{
    Host, LONG, PATIENCE, Server, Signal, Site, all_tasks, eventually, have_begun, measured, promised, scaled, submit,
    submit_held, task, wait_for_finished,
};
use serde_json::{Value, json};

mod calm;

/// How long a host may go without a sign; half of it is longer than a busy machine keeps a host waiting.
const HOST_TIMEOUT: Duration = Duration::from_secs(20);
/// The default, which is promised of, on a machine that is left alone.
const PROMISED_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than any test waits, so that no lease ends by itself.
const ALIVE_TIME: Duration = Duration::from_secs(3_600);
/// A dead host's tasks run elsewhere after so long with that.
const HANDED_ON: Duration = Duration::from_secs(12);

fn host_timeout() -> Duration {
    if scaled(10) == 10 { PROMISED_TIMEOUT } else { HOST_TIMEOUT }
}

/// Starts a host with so many processors; `changes` replaces members of its section.
async fn host(site: &Site, processors: usize, changes: Value) -> Host {
    configure(site, processors, changes);
    site.start().await
}

fn configure(site: &Site, processors: usize, changes: Value) {
    let timeout = host_timeout().as_secs();
    let (alive_time, poll_interval) = (ALIVE_TIME.as_secs(), 0.5);
    let mut section = json!({
        "processors": processors, "poll_interval": poll_interval, "alive_time": alive_time, "host_timeout": timeout,
    });
    let members = section.as_object_mut().expect("an object");
    members.extend(changes.as_object().expect("changes are an object").clone());
    site.configure(section);
}

async fn held_tasks(queue: &Queue) -> Vec<Task> {
    all_tasks(queue).await.into_iter().filter(|task| task.key.starts_with("held-")).collect()
}

async fn signs(queue: &Queue) -> Vec<Sign> {
    queue.backend().signs().await.expect("the queue answers")
}

/// Waits until so many hosts give signs; their numbers.
async fn has_hosts(queue: &Queue, count: usize) -> Vec<HostId> {
    eventually(LONG, &format!("{count} hosts give signs"), async || {
        let signs = signs(queue).await;
        if signs.len() == count { Ok(signs.iter().map(|sign| sign.host).collect()) } else { Err(format!("{signs:?}")) }
    })
    .await
}

/// Waits until each of these hosts has given so many more signs than `before` says; fails if one is gone.
async fn each_gives(queue: &Queue, before: &[Sign], more: i64) {
    eventually(LONG, &format!("each host gives {more} more signs"), async || {
        let now = signs(queue).await;
        let hosts = |signs: &[Sign]| signs.iter().map(|sign| sign.host).collect::<Vec<_>>();
        assert_eq!(hosts(&now), hosts(before), "the same hosts are alive");
        let least = before.iter().zip(&now).map(|(before, now)| now.count - before.count).min();
        if least >= Some(more) { Ok(()) } else { Err(format!("{least:?}")) }
    })
    .await;
}

/// Only servers: beside SQLite's file a lock tells who is dead, and on PerfectQueue's table nobody gives signs.
macro_rules! on_each_server {
    ($(async fn $name:ident() $body:block)+) => {
        $(async fn $name() $body)+

        mod on_postgres {
            $(#[tokio::test]
            async fn $name() {
                laelaps_tests::on(laelaps_tests::Database::Postgres, Box::pin(super::$name())).await;
            })+
        }

        mod on_mariadb {
            $(#[tokio::test]
            async fn $name() {
                laelaps_tests::on(laelaps_tests::Database::MariaDb, Box::pin(super::$name())).await;
            })+
        }
    };
}
use on_each_server;

on_each_server! {
    async fn a_killed_hosts_tasks_run_elsewhere_within_its_host_timeout() {
        const HELD: usize = 20;
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        let mut victim = host(&site, HELD, json!({})).await;
        submit_held(&queue, 0..HELD).await;
        have_begun(&site, HELD).await;
        let others = [host(&site, HELD, json!({})).await, host(&site, HELD, json!({})).await];
        has_hosts(&queue, 3).await;
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stdout;
        let expected = format!("fleet          in the database: 3 hosts, dead after {:?} without a sign of life\n", host_timeout());
        assert!(told.contains(&expected), "{told}");

        let (begun, before) = (Instant::now(), signs(&queue).await);
        victim.kill().await;
        have_begun(&site, 2 * HELD).await;
        let took = begun.elapsed();
        let what = format!("a killed host, {:?}: the last of its tasks runs elsewhere", site.database());
        measured(&what, format!("{took:?} (host_timeout {:?}, alive_time {ALIVE_TIME:?})", host_timeout()));
        promised(&what, took, HANDED_ON);

        // One small write for each host and interval, however busy anybody is.
        let now = signs(&queue).await;
        let most = begun.elapsed().as_secs_f64() / (host_timeout() / 4).as_secs_f64() + 1.0;
        for sign in &now {
            let count = before.iter().find(|before| before.host == sign.host).map(|before| sign.count - before.count);
            assert!(count.is_some_and(|count| count as f64 <= most), "at most {most} signs: {before:?}, {now:?}");
        }
        site.open_gate("gate");
        wait_for_finished(&queue, HELD, LONG).await;
        for task in held_tasks(&queue).await {
            assert_eq!((task.state, task.attempts, task.lost), (State::Finished, 1, 1), "{}", task.key);
        }
        assert_eq!(site.marks("held").len(), 2 * HELD, "none ran a third time");
        for host in others {
            host.stop().await;
        }
        assert_eq!(signs(&queue).await, [], "a host that ends takes its sign with it");
    }

    async fn a_frozen_host_is_struck_off_and_what_it_writes_when_it_wakes_changes_nothing() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        // Not its leases tell it what has become of it.
        let frozen = host(&site, 5, json!({ "task_heartbeat_interval": 60 })).await;
        submit_held(&queue, 0..5).await;
        have_begun(&site, 5).await;
        let other = host(&site, 5, json!({})).await;
        let before = has_hosts(&queue, 2).await;
        crate::fleet::freeze(&frozen, &queue).await;
        have_begun(&site, 10).await;
        // Its own guests find the gate open when it wakes, and finish at once, under leases that it has lost.
        site.open_gate("gate");
        wait_for_finished(&queue, 5, LONG).await;
        let finished = held_tasks(&queue).await;
        assert!(finished.iter().all(|task| (task.attempts, task.lost) == (1, 1)), "{finished:?}");
        frozen.signal(Signal::CONT);
        frozen.logged("registering again", LONG).await;
        frozen.logged_times("ready", 2, LONG).await;
        let after = has_hosts(&queue, 2).await;
        assert_eq!(before.iter().filter(|host| after.contains(host)).count(), 1, "it is another one now: {before:?}, {after:?}");
        eventually(LONG, "the losses are taken back", async || {
            let lost: u32 = held_tasks(&queue).await.iter().map(|task| task.lost).sum();
            if lost == 0 { Ok(()) } else { Err(format!("{lost} losses are left")) }
        })
        .await;
        for (was, is) in finished.iter().zip(held_tasks(&queue).await) {
            assert_eq!((was.state, was.attempts, was.finished_at), (is.state, is.attempts, is.finished_at), "{}", is.key);
        }
        other.stop().await;
        submit(&queue, &[task("after", "silent", json!({}))]).await;
        wait_for_finished(&queue, 6, LONG).await;
        assert_eq!(site.marks("held").len(), 10, "none ran a third time");
        frozen.stop().await;
    }

    async fn a_database_that_is_down_for_longer_than_any_host_may_be_silent_makes_nobody_dead() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let mut server = Box::pin(Server::start(site.database())).await;
        let url = server.create_database().await;
        let queue = site.queue_at(&url).await;
        let mut hosts = Vec::new();
        for _ in 0..4 {
            hosts.push(host(&site, 5, json!({ "url": url })).await);
        }
        submit_held(&queue, 0..20).await;
        have_begun(&site, 20).await;
        has_hosts(&queue, 4).await;
        let before = signs(&queue).await;
        server.kill();
        let down = Instant::now();
        eventually(LONG, "the outage is longer than host_timeout", async || {
            let lasted = down.elapsed();
            if lasted > 2 * host_timeout() { Ok(()) } else { Err(format!("{lasted:?}")) }
        })
        .await;
        server.restart().await;
        // Two more timeouts at least, in which whoever was taken for dead would be struck off.
        each_gives(&queue, &before, 10).await;
        site.open_gate("gate");
        wait_for_finished(&queue, 20, LONG).await;
        for task in held_tasks(&queue).await {
            assert_eq!((task.attempts, task.lost), (1, 0), "{}", task.key);
        }
        assert_eq!(site.marks("held").len(), 20, "nothing began twice");
        for mut host in hosts {
            assert!(host.is_running());
            assert_eq!(host.lines_with("registering again"), [""; 0]);
            host.stop().await;
        }
    }

    async fn a_fleet_that_is_switched_off_gives_no_signs_and_strikes_nobody_off() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        let watching = host(&site, 1, json!({})).await;
        let quiet = host(&site, 1, json!({ "fleet": "none", "host_timeout": null })).await;
        let told = site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stdout;
        assert!(told.contains("fleet          none: a dead host's tasks come back when their leases end, after 3600s\n"), "{told}");
        submit(&queue, &[task("work", "silent", json!({}))]).await;
        wait_for_finished(&queue, 1, PATIENCE).await;
        has_hosts(&queue, 1).await;
        let hosts = queue.backend().hosts().await.unwrap();
        assert_eq!(hosts.iter().filter(|host| host.identity.is_none() && host.alive.is_none()).count(), 1, "{hosts:?}");
        watching.stop().await;
        quiet.stop().await;
    }
}

/// A host that gets stuck in itself: only the program that tests build can be told to.
mod with_faults {
    use super::*;

    on_each_server! {
        async fn a_host_whose_claim_loop_is_stuck_gives_no_sign_and_loses_its_tasks_and_what_it_just_claimed() {
            let site = Site::new().await;
            site.plug_guest("zoo");
            let queue = site.queue().await;
            configure(&site, 5, json!({ "task_heartbeat_interval": 60 }));
            let stuck = site.start_with_fault("block-at=claimed:2").await;
            submit_held(&queue, 0..1).await;
            have_begun(&site, 1).await;
            submit_held(&queue, 1..4).await;
            stuck.logged("fault injection: this thread is blocked", LONG).await;
            let other = host(&site, 5, json!({})).await;
            // What runs there, and what was claimed and has not begun.
            have_begun(&site, 5).await;
            let line = other.logged("the tasks of dead hosts are handed on", LONG).await;
            assert!(line.contains("hosts=") && line.contains("database-"), "{line}");
            site.open_gate("gate");
            wait_for_finished(&queue, 4, LONG).await;
            std::fs::write(site.path("unblock"), "").unwrap();
            stuck.logged("registering again", LONG).await;
            stuck.logged_times("ready", 2, LONG).await;
            has_hosts(&queue, 2).await;
            assert_eq!(site.marks("held").len(), 5, "none ran a third time");
            other.stop().await;
            stuck.stop().await;
        }
    }
}
