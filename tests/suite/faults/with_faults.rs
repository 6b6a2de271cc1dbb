//! What a host makes of faults that only a build for tests has.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use laelaps_queue::{NewTask, Queue, State, Stats};
use laelaps_tests::{
    Host, PATIENCE, Signal, Site, eventually, guest, submit, task, wait_for_finished, wait_for_state, wait_for_stats,
    with_edition,
};
use serde_json::json;

mod hung_files;

/// `laelaps run` ends so when too many threads are stuck (docs/cli.md).
const STUCK: i32 = 10;

/// How long a thread may be silent in these tests, in seconds. Longer than a machine keeps one thread of a process waiting whose others run.
const LIMIT_S: u32 = 3;

/// A site with a host whose threads are stuck in the first `stuck` attempts on tasks of the type `echo`.
async fn site(processors: u32, stuck: u32) -> (Site, Queue, Host) {
    site_with_limit(processors, stuck, LIMIT_S).await
}

async fn site_with_limit(processors: u32, stuck: u32, limit_s: u32) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "processors": processors, "child_heartbeat_interval": 0.1, "child_heartbeat_limit": limit_s }));
    let queue = site.queue().await;
    let host = site.start_with_fault(&format!("block-thread=echo:{stuck}")).await;
    (site, queue, host)
}

fn tasks(kind: &str, name: &str, count: usize) -> Vec<NewTask> {
    (0..count).map(|number| task(format!("{name}-{number}"), kind, json!({}))).collect()
}

/// As many tasks at once as there are processors, each with a timer of its own, which only ends when all of them run.
async fn all_processors_serve(site: &Site, queue: &Queue, processors: usize) {
    let data = json!({ "gate": "/marks/gate", "mark": "/marks/begun" });
    let held: Vec<_> = (0..processors).map(|number| task(format!("held-{number}"), "silent", data.clone())).collect();
    submit(queue, &held).await;
    eventually(PATIENCE, &format!("{processors} tasks run at once"), async || {
        let begun = site.marks("begun").len();
        if begun == processors { Ok(()) } else { Err(begun.to_string()) }
    })
    .await;
    site.open_gate("gate");
    for held in held {
        wait_for_state(queue, &held.key, State::Finished, PATIENCE).await;
    }
}

/// How many threads of the host have this name.
fn threads(host: &Host, name: &str) -> usize {
    let threads = std::fs::read_dir(Path::new("/proc").join(host.process_id().to_string()).join("task")).unwrap();
    let names = threads.flatten().map(|thread| std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default());
    names.filter(|found| found.trim_end() == name).count()
}

/// The threads on which guests run.
fn guest_threads(host: &Host) -> usize {
    threads(host, "laelaps-guest")
}

/// How many of them a host starts with.
async fn guest_threads_at_first(host: &Host) -> usize {
    // A thread has the name of the one that started it until it runs for the first time.
    eventually(PATIENCE, "every thread but the first has a name of its own", async || {
        let unnamed = threads(host, "laelaps");
        if unnamed == 1 { Ok(()) } else { Err(unnamed.to_string()) }
    })
    .await;
    guest_threads(host)
}

async fn guest_threads_become(host: &Host, count: usize) {
    eventually(PATIENCE, &format!("there are {count} threads for guests"), async || {
        let threads = guest_threads(host);
        if threads == count { Ok(()) } else { Err(threads.to_string()) }
    })
    .await;
}

#[tokio::test]
async fn a_stuck_thread_is_replaced_and_its_task_runs_again_while_others_go_on() {
    let (_site, queue, host) = site(2, 1).await;
    let threads = guest_threads_at_first(&host).await;
    submit(&queue, &[task("stuck", "echo", json!({}))]).await;
    host.logged("this thread is blocked", PATIENCE).await;
    let light = tasks("silent", "light", 50);
    submit(&queue, &light).await;
    for light in &light {
        wait_for_state(&queue, &light.key, State::Finished, PATIENCE).await;
    }

    let line = host.logged("a thread shows no sign of life", PATIENCE).await;
    for part in ["ERROR", "task=\"stuck\"", "plugin=\"zoo\"", "limit=3s", "threads_lost=1", "threads_lost_max=4"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    let (_, silence) = line.split_once(" silence=").unwrap();
    let silence: f64 = silence.split_once("s ").unwrap().0.parse().unwrap();
    assert!(silence >= f64::from(LIMIT_S), "{line}");
    let ended = wait_for_state(&queue, "stuck", State::Finished, PATIENCE).await;
    assert_eq!((ended.attempts, ended.lost), (1, 0), "the attempt that got stuck does not count");
    let attempts = queue.backend().attempts("stuck").await.unwrap();
    assert_eq!(attempts[0].event, "stop", "{attempts:?}");
    assert_eq!(host.lines_with("a thread shows no sign of life").len(), 1);
    guest_threads_become(&host, threads + 1).await;
    host.stop().await; // a thread that never comes back keeps nobody from ending
}

#[tokio::test]
async fn with_four_stuck_threads_a_host_works_at_its_full_number() {
    for processors in [1, 40] {
        let (site, queue, host) = site(processors, 4).await;
        let threads = guest_threads_at_first(&host).await;
        let stuck = tasks("echo", "stuck", 4);
        submit(&queue, &stuck).await;
        host.logged_times("a thread shows no sign of life", 4, PATIENCE).await;
        for stuck in &stuck {
            wait_for_state(&queue, &stuck.key, State::Finished, PATIENCE).await;
        }
        let line = host.logged("threads_lost=4", PATIENCE).await;
        assert!(line.contains("ERROR") && line.contains("threads_lost_max=4"), "{line}");
        guest_threads_become(&host, threads + 4).await;
        let processors = usize::try_from(processors).unwrap();
        all_processors_serve(&site, &queue, processors).await;
        submit(&queue, &tasks("compute", "computing", 40)).await;
        submit(&queue, &tasks("silent", "light", 100)).await;
        wait_for_finished(&queue, stuck.len() + processors + 40 + 100, PATIENCE).await;
        assert!(host.lines_with("this host drains").is_empty());
        host.stop().await;
    }
}

#[tokio::test]
async fn a_fifth_stuck_thread_ends_the_host_and_nothing_is_lost() {
    let (site, queue, mut host) = site(6, 5).await;
    submit(&queue, &[task("drained", "wait-cancelled", json!({ "then": "finish" }))]).await;
    submit(&queue, &tasks("echo", "stuck", 5)).await;
    host.logged_times("this thread is blocked", 5, PATIENCE).await;
    let status = host.exited(PATIENCE).await;
    assert_eq!(status.code(), Some(STUCK), "{status}");
    let line = host.logged("this host drains", PATIENCE).await;
    assert!(line.contains("ERROR") && line.contains("threads_lost=5") && line.contains("threads_lost_max=4"), "{line}");
    host.logged("error: 5 threads are stuck in handlers and do not come back", PATIENCE).await;

    let drained = queue.backend().get("drained").await.unwrap().unwrap();
    assert_eq!(drained.state, State::Finished, "what ran elsewhere came to its end");
    let stats = queue.backend().stats().await.unwrap();
    assert_eq!((stats.running, stats.failed), (0, 0), "{stats:?}");
    let next = site.start().await;
    wait_for_finished(&queue, 6, PATIENCE).await;
    for number in 0..5 {
        let stuck = queue.backend().get(&format!("stuck-{number}")).await.unwrap().unwrap();
        assert_eq!((stuck.attempts, stuck.lost), (1, 0), "{stuck:?}");
    }
    next.stop().await;
}

#[tokio::test]
async fn a_thread_that_comes_back_is_not_counted_any_more() {
    let (site, queue, host) = site(2, 4).await;
    let threads = guest_threads_at_first(&host).await;
    let stuck = tasks("echo", "stuck", 4);
    submit(&queue, &stuck).await;
    host.logged_times("a thread shows no sign of life", 4, PATIENCE).await;
    wait_for_finished(&queue, 4, PATIENCE).await;
    guest_threads_become(&host, threads + 4).await;
    host.logged("threads do not come back from handlers threads_lost=4", PATIENCE).await;
    // Nothing runs any more that would make the host look at its threads.
    std::fs::write(site.path("unblock"), "").unwrap();
    // They come back one after the other, so there may be lines that count some of them.
    let line = host.logged("lost threads have come back from handlers threads_lost=0", PATIENCE).await;
    assert!(line.contains("INFO"), "{line}");
    guest_threads_become(&host, threads).await;
    all_processors_serve(&site, &queue, 2).await;
    let mut stopped = 0;
    for stuck in stuck {
        let task = queue.backend().get(&stuck.key).await.unwrap().unwrap();
        assert_eq!((task.state, task.attempts), (State::Finished, 1), "what was answered for changes nothing any more");
        let attempts = queue.backend().attempts(&stuck.key).await.unwrap();
        stopped += attempts.iter().filter(|attempt| attempt.event == "stop").count();
    }
    assert_eq!(stopped, 4);
    host.stop().await;
}

#[tokio::test]
async fn a_host_that_was_stopped_itself_gives_up_no_thread_for_it() {
    const INNOCENT: usize = 4;
    let (site, queue, host) = site(u32::try_from(INNOCENT).unwrap() + 1, 1).await;
    let innocent = (0..INNOCENT)
        .map(|number| task(format!("innocent-{number}"), "compute", json!({ "ms": 3_600_000, "mark": "/marks/begun" })));
    submit(&queue, &innocent.collect::<Vec<_>>()).await;
    eventually(PATIENCE, "they compute", async || {
        let begun = site.marks("begun").len();
        if begun == INNOCENT { Ok(()) } else { Err(begun.to_string()) }
    })
    .await;
    for _ in 0..3 {
        host.signal(Signal::STOP);
        let stopped = Instant::now();
        eventually(PATIENCE, "it was stopped for longer than a thread may be silent", async || {
            let so_far = stopped.elapsed();
            if so_far > Duration::from_millis(u64::from(LIMIT_S) * 1_000 + 500) { Ok(()) } else { Err(format!("{so_far:?}")) }
        })
        .await;
        host.signal(Signal::CONT);
    }
    // It still finds a thread that is really stuck, so it has looked at the others by then.
    submit(&queue, &tasks("echo", "stuck", 1)).await;
    host.logged("task=\"stuck-0\"", PATIENCE).await;
    let given_up = host.lines_with("a thread shows no sign of life");
    assert!(given_up.iter().all(|line| line.contains("task=\"stuck-0\"")), "{given_up:?}");
    host.signal(Signal::QUIT);
}

#[tokio::test]
async fn an_immediate_shutdown_does_not_wait_for_a_stuck_thread() {
    // The thread would be given up after a day: it is still waited for when the signal comes, however slow the machine is.
    let (_site, queue, mut host) = site_with_limit(1, 1, 86_400).await;
    submit(&queue, &tasks("echo", "stuck", 1)).await;
    host.logged("this thread is blocked", PATIENCE).await;
    host.signal(Signal::QUIT);
    assert!(host.exited(PATIENCE).await.success());
    let stuck = queue.backend().get("stuck-0").await.unwrap().unwrap();
    assert_eq!((stuck.state, stuck.attempts, stuck.lost), (State::Waiting, 0, 0));
}

#[tokio::test]
async fn a_host_that_is_killed_between_claim_and_begin_loses_nothing() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let mut host = site.start_with_fault("abort-at=claimed:2").await;
    submit(&queue, &tasks("silent", "first", 1)).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    submit(&queue, &tasks("silent", "second", 2)).await;
    let status = host.exited(PATIENCE).await;
    assert_eq!(status.signal(), Some(9), "{status}");
    // One or both: the processor of the first task may not have been free yet.
    let left = |stats: &Stats| stats.running > 0 && stats.running + stats.ready == 2;
    wait_for_stats(&queue, "the claimed tasks are as they were left", PATIENCE, left).await;
    let next = site.start().await;
    wait_for_finished(&queue, 3, PATIENCE).await;
    next.stop().await;
}

#[tokio::test]
async fn a_fault_that_nobody_knows_is_refused() {
    let site = Site::new().await;
    let mut host = site.spawn_with(&[], &[("LAELAPS_FAULT", "abort-at")]);
    assert_eq!(host.exited(PATIENCE).await.code(), Some(2));
    host.logged("LAELAPS_FAULT holds \"abort-at\"", PATIENCE).await;
}

#[tokio::test]
async fn a_module_that_a_host_died_with_while_it_admitted_it_is_taken_last_and_named() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    // Admitted before `zoo`, by its name, and with another digest.
    site.plug("bane", &with_edition(&guest("zoo"), 1));
    site.configure(json!({}));
    // The host's database.
    let _queue = site.queue().await;
    let mut died = site.spawn_with(&[], &[("LAELAPS_FAULT", "abort-at=admitting")]);
    assert_eq!(died.exited(PATIENCE).await.signal(), Some(9));
    let host = site.start().await;
    let told = host.logged("died while it admitted this file", PATIENCE).await;
    assert!(told.contains("plugin=bane"), "{told}");
    host.logged_times("the plugin serves", 2, PATIENCE).await;
    let order: Vec<bool> = host.lines_with("the plugin serves").iter().map(|line| line.contains("plugin=bane")).collect();
    assert_eq!(order, [false, true], "the other one serves first");
    host.stop().await;
    // It was admitted, so nobody suspects it any more.
    let host = site.start().await;
    host.logged_times("the plugin serves", 2, PATIENCE).await;
    assert!(host.lines_with("died while").is_empty());
    host.stop().await;
}
