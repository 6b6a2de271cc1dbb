//! Many tasks, and several hosts.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use laelaps_queue::{Queue, State};
use laelaps_tests::{
    Database, Host, LONG, PATIENCE, Signal, Site, all_tasks, eventually, guest, measured, output, scaled, submit, task,
    wait_for_finished, wait_for_state, workspace_file,
};
use serde_json::json;

#[tokio::test]
async fn hosts_that_seemed_dead_register_again_and_work_on() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let (first, second) = (site.start().await, site.start().await);
    // Whoever tidies up there makes each host look dead to the other.
    std::fs::remove_dir_all(site.folder().join("queue.db-hosts")).unwrap();
    first.logged("registering again", PATIENCE).await;
    second.logged("registering again", PATIENCE).await;
    let tasks: Vec<_> = (0..20).map(|number| task(format!("after-{number}"), "silent", json!({}))).collect();
    submit(&queue, &tasks).await;
    wait_for_finished(&queue, 20, PATIENCE).await;
    first.stop().await;
    second.stop().await;
}

/// Stops a host's process at a moment when it does not hold SQLite's lock, which would stop everybody.
pub(crate) async fn freeze(host: &Host, queue: &Queue) {
    for number in 1..=100 {
        host.signal(Signal::STOP);
        let mut probe = task(format!("probe-{number}"), "silent", json!({}));
        probe.run_at = Some(laelaps_queue::Timestamp(4_000_000_000_000));
        // Longer at each try: a machine that is only slow must not look like a lock that is held.
        let patience = Duration::from_secs(1) * number;
        if tokio::time::timeout(patience, queue.backend().submit(&[probe])).await.is_ok() {
            return;
        }
        host.signal(Signal::CONT);
    }
    panic!("the host never lets go of SQLite's lock");
}

/// Leases of so many seconds run out only when their host is dead or frozen, since it renews them all the time.
const SHORT_LEASE_S: u32 = 10;
/// A lease that ends in no test.
const ENDLESS_LEASE_S: u32 = 86_400;

async fn held_has_begun(site: &Site, times: usize) {
    eventually(PATIENCE, &format!("the held task has begun {times} times"), async || {
        let marks = site.marks("held");
        if marks.len() == times { Ok(()) } else { Err(format!("{marks:?}")) }
    })
    .await;
}

laelaps_tests::on_every_database! {
    async fn a_living_host_takes_over_what_a_dead_one_held() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        // A server knows of a host's death by its leases, SQLite does not need them.
        let is_known_by_its_leases = site.database() != Database::Sqlite;
        site.configure(json!({ "alive_time": if is_known_by_its_leases { SHORT_LEASE_S } else { ENDLESS_LEASE_S } }));
        let queue = site.queue().await;
        submit(&queue, &[task("held", "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" }))]).await;
        let mut first = site.start().await;
        held_has_begun(&site, 1).await;
        site.configure(json!({ "alive_time": ENDLESS_LEASE_S }));
        let second = site.start().await;
        first.kill().await;
        held_has_begun(&site, 2).await;
        site.open_gate("gate");
        let held = wait_for_state(&queue, "held", State::Finished, PATIENCE).await;
        assert_eq!((held.lost, held.attempts), (1, 1));
        if site.database() == Database::Sqlite {
            second.logged("a host is dead", PATIENCE).await;
        }
        second.logged("a task was lost with its host or lease", PATIENCE).await;
        second.stop().await;
    }

    async fn two_hosts_on_one_file_settle_each_task_once() {
        let count = scaled(10_000);
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": 4, "task_prefetch": 16, "alive_time": ENDLESS_LEASE_S }));
        let queue = site.queue().await;
        let tasks: Vec<_> =
            (0..count).map(|number| task(format!("task-{number}"), "silent", json!({ "mark": "/marks/all" }))).collect();
        submit(&queue, &tasks).await;
        let hosts = [site.start().await, site.start().await];
        let begun = Instant::now();
        wait_for_finished(&queue, count, LONG).await;
        measured("two hosts, tasks per second (silent, marked)", format!("{:.0}", count as f64 / begun.elapsed().as_secs_f64()));

        let mut runs: HashMap<String, usize> = HashMap::new();
        for mark in site.marks("all") {
            *runs.entry(mark).or_default() += 1;
        }
        assert_eq!(runs.len(), count, "every task ran");
        assert!(runs.values().all(|times| *times == 1), "none ran twice");
        assert!(all_tasks(&queue).await.iter().all(|task| task.attempts == 1 && task.lost == 0));
        for host in hosts {
            host.stop().await;
        }
    }

    async fn ten_thousand_one_line_tasks_are_each_finished_once() {
        let count = scaled(10_000);
        let site = Site::new().await;
        site.plug("access-log", &guest("access-log"));
        site.configure(json!({ "processors": 4, "task_prefetch": 32, "routes": [{ "type": "access-log", "plugin": "access-log" }] }));
        let queue = site.queue().await;
        let log = std::fs::read_to_string(workspace_file("tests/data/apache_access.log")).unwrap();
        let tasks: Vec<_> = log
            .lines()
            .take(count)
            .enumerate()
            .map(|(number, line)| task(format!("line-{number}"), "access-log", json!({ "lines": [line] })))
            .collect();
        assert_eq!(tasks.len(), count);
        submit(&queue, &tasks).await;
        let begun = Instant::now();
        let host = site.start().await;
        wait_for_finished(&queue, count, LONG).await;
        measured(
            "one-line tasks per second, start of the host included",
            format!("{:.0}", count as f64 / begun.elapsed().as_secs_f64()),
        );
        let tasks = all_tasks(&queue).await;
        assert!(tasks.iter().all(|task| task.attempts == 1), "each task was settled once");
        let requests: u64 = tasks.iter().map(|task| output(task)["requests"].as_u64().unwrap()).sum();
        assert_eq!(requests, count as u64, "each line was counted once");
        host.stop().await;
    }

    async fn a_host_that_slept_past_its_lease_changes_nothing_when_it_wakes() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let section = |alive_time: u32| json!({ "processors": 1, "alive_time": alive_time, "task_heartbeat_interval": 0.5, "max_attempts": 5 });
        site.configure(section(SHORT_LEASE_S));
        let queue = site.queue().await;
        submit(&queue, &[task("held", "echo", json!({ "mark": "/marks/held", "gate": "/marks/gate" }))]).await;
        let mut sleeper = site.start().await;
        held_has_begun(&site, 1).await;
        freeze(&sleeper, &queue).await;

        site.configure(section(ENDLESS_LEASE_S));
        let other = site.start().await;
        held_has_begun(&site, 2).await;
        site.open_gate("gate");
        let finished = wait_for_state(&queue, "held", State::Finished, PATIENCE).await;
        // Beside SQLite's file a lock says that the sleeper lives: then it lost nothing, its lease is overdue.
        let lost = u32::from(site.database() != Database::Sqlite);
        assert_eq!((finished.lost, finished.attempts), (lost, 1));

        sleeper.signal(Signal::CONT);
        sleeper.logged("lease", PATIENCE).await;
        submit(&queue, &[task("after", "silent", json!({}))]).await;
        wait_for_state(&queue, "after", State::Finished, PATIENCE).await;
        sleeper.signal(Signal::TERM);
        assert!(sleeper.exited(PATIENCE).await.success());
        let held = queue.backend().get("held").await.unwrap().unwrap();
        assert_eq!(
            (held.state, held.finished_at, held.attempts),
            (State::Finished, finished.finished_at, 1),
            "the stale outcome changed nothing"
        );
        other.stop().await;
    }
}
