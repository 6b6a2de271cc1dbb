//! A fleet of real hosts: who dies, freezes or is cut off loses its tasks to the others within seconds, and nothing else does.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use laelaps_queue::{Config, Queue, State, Task};
use laelaps_test_databases::{Durability, postgres};
use laelaps_test_zookeeper::{Ensemble, Server, TICK, shared};
use laelaps_tests::{
    Database, Host, LONG, PATIENCE, Proxy, Signal, Site, all_tasks, eventually, measured, on, promised, submit, task,
    wait_for_finished,
};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::Place;

/// The session timeout of every host here; the servers' tick is 500 ms.
const SESSION: Duration = Duration::from_secs(2);
/// The longest that servers with this tick allow.
const LONGEST_SESSION: Duration = Duration::from_secs(10);
/// How long a host may go without a kick, where the test is not about that.
const LONG_TIMER: u64 = 30;
/// The same where it is.
const TIMER: Duration = Duration::from_secs(2);

impl Place {
    /// The members of a host's section that put it into the fleet `/fleet`.
    fn watchdog_at(&self, servers: &str, timer_seconds: u64) -> Value {
        json!({ "servers": servers, "root": "/fleet", "session_timeout": SESSION.as_secs(), "timer": timer_seconds })
    }

    /// Starts a host of the fleet with so many processors; `changes` replaces members of its section.
    async fn host(&self, processors: usize, timer_seconds: u64, changes: Value) -> Host {
        self.configure(processors, timer_seconds, changes);
        self.site.start().await
    }

    fn configure(&self, processors: usize, timer_seconds: u64, changes: Value) {
        let watchdog = self.watchdog_at(&self.servers, timer_seconds);
        let mut section = json!({ "processors": processors, "poll_interval": 0.2, "watchdog": watchdog });
        let members = section.as_object_mut().expect("an object");
        members.extend(changes.as_object().expect("changes are an object").clone());
        self.site.configure(section);
    }

    /// The hosts of the fleet, as `laelaps watchdog status` shows them.
    async fn fleet(&self) -> Vec<Value> {
        let told: Value = serde_json::from_str(&self.says(&["status", "/fleet", "--json"]).await).expect("JSON");
        told["hosts"].as_array().expect("hosts").clone()
    }

    /// Waits until the fleet has so many hosts; their identities.
    async fn has_hosts(&self, count: usize) -> BTreeSet<String> {
        eventually(PATIENCE, &format!("the fleet has {count} hosts"), async || {
            let hosts = self.fleet().await;
            let identities = hosts.iter().map(|host| host["identity"].as_str().expect("a text").to_owned()).collect();
            if hosts.len() == count { Ok(identities) } else { Err(format!("{hosts:?}")) }
        })
        .await
    }
}

/// Tasks that say that they have begun, and wait for the gate.
async fn submit_held(queue: &Queue, range: std::ops::Range<usize>) {
    let held = |number| task(format!("held-{number}"), "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" }));
    submit(queue, &range.map(held).collect::<Vec<_>>()).await;
}

/// Waits until attempts of held tasks have begun so often in all.
async fn have_begun(site: &Site, times: usize) {
    eventually(LONG, &format!("held tasks have begun {times} times"), async || {
        let begun = site.marks("held").len();
        if begun == times { Ok(()) } else { Err(format!("{begun}")) }
    })
    .await;
}

/// Waits until all are finished: each counted once, and lost as often as its key says it was.
async fn all_finish(queue: &Queue, count: usize, lost: impl Fn(&Task) -> u32) {
    wait_for_finished(queue, count, LONG).await;
    for task in held_tasks(queue).await {
        assert_eq!((task.state, task.attempts, task.lost), (State::Finished, 1, lost(&task)), "{}", task.key);
    }
}

/// The held tasks, without what freezing a host left in the queue.
async fn held_tasks(queue: &Queue) -> Vec<Task> {
    all_tasks(queue).await.into_iter().filter(|task| task.key.starts_with("held-")).collect()
}

/// The promise: one session timeout, one tick of the servers, and a second.
const PROMISED: Duration = Duration::from_millis(2_000 + 500 + 1_000);

/// A host with a hundred running tasks is killed, alone or together with the acting one, and three others are there (two, then).
async fn a_killed_host_hands_on(with_the_acting_one: bool) {
    const HELD: usize = 100;
    assert_eq!(PROMISED, SESSION + TICK + Duration::from_secs(1));
    let place = Place::alone(&format!("killed_{with_the_acting_one}_{:?}", Site::database_of_the_test())).await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    // Whoever is there first acts.
    let mut acting = place.host(1, LONG_TIMER, json!({})).await;
    let mut victim = place.host(HELD, LONG_TIMER, json!({})).await;
    submit_held(&queue, 0..HELD + 1).await;
    have_begun(&place.site, HELD + 1).await;
    let others = [place.host(60, LONG_TIMER, json!({})).await, place.host(60, LONG_TIMER, json!({})).await];
    place.has_hosts(4).await;

    let killed = Instant::now();
    victim.signal(Signal::KILL);
    let mut lost = HELD;
    if with_the_acting_one {
        acting.signal(Signal::KILL);
        lost += 1;
    }
    have_begun(&place.site, HELD + 1 + lost).await;
    let took = killed.elapsed();
    let what = if with_the_acting_one { "killed together with the acting host" } else { "a killed host" };
    let what = format!("{what}, {:?}: the last of its 100 tasks runs elsewhere", place.site.database());
    measured(&what, format!("{took:?} (session {SESSION:?}, tick {TICK:?}, alive_time 300 s)"));
    promised(&what, took, PROMISED);

    victim.exited(PATIENCE).await;
    place.site.open_gate("gate");
    wait_for_finished(&queue, HELD + 1, LONG).await;
    let tasks = all_tasks(&queue).await;
    assert_eq!(tasks.iter().filter(|task| task.lost == 1 && task.attempts == 1).count(), lost, "lost once, run once more");
    if with_the_acting_one {
        acting.exited(PATIENCE).await;
    } else {
        acting.stop().await;
    }
    for host in others {
        host.stop().await;
    }
}

async fn killed_alone() {
    a_killed_host_hands_on(false).await;
}

async fn killed_with_the_acting_one() {
    a_killed_host_hands_on(true).await;
}

/// On SQLite the lock beside the file tells of a killed host even sooner, so that only servers show what ZooKeeper does.
mod on_postgres {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::Postgres, Box::pin(super::killed_alone())).await;
    }

    #[tokio::test]
    async fn a_host_killed_together_with_the_acting_one_is_noticed_as_soon() {
        on(Database::Postgres, Box::pin(super::killed_with_the_acting_one())).await;
    }
}

mod on_mariadb {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::MariaDb, Box::pin(super::killed_alone())).await;
    }
}

mod on_perfectqueue {
    use super::{Database, on};

    #[tokio::test]
    async fn a_killed_hosts_tasks_run_elsewhere_after_its_session_timeout() {
        on(Database::PerfectQueue, Box::pin(super::killed_alone())).await;
    }
}

/// A log on a disk that has stopped to take anything: a pipe, which somebody may read.
struct BlockedDisk {
    path: PathBuf,
    pipe: pipe::Receiver,
}

impl BlockedDisk {
    fn new(site: &Site) -> Self {
        let path = site.path("log.fifo");
        let made = std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo");
        assert!(made.success());
        let pipe = pipe::OpenOptions::new().read_write(true).open_receiver(&path).expect("a pipe");
        Self { path, pipe }
    }

    /// Nothing can be written any more.
    fn block(&self) {
        let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
        let mut filler = OpenOptions::new().write(true).custom_flags(flags).open(&self.path).expect("a pipe");
        // By pages, then what is left.
        for size in [4096, 1] {
            while filler.write(&vec![b'\n'; size]).is_ok() {}
        }
    }

    /// Takes what is written until this is part of it.
    async fn take_until(&mut self, text: &str) {
        let mut written = String::new();
        let read = async {
            while !written.contains(text) {
                let mut bytes = vec![0; 64 << 10];
                let length = self.pipe.read(&mut bytes).await.expect("a pipe");
                written.push_str(&String::from_utf8_lossy(&bytes[..length]));
            }
        };
        let found = tokio::time::timeout(PATIENCE, read).await;
        assert!(found.is_ok(), "no {text:?} in {written:?}");
    }
}

#[tokio::test]
async fn a_host_whose_disk_takes_nothing_any_more_loses_its_tasks_until_it_does() {
    on(Database::Postgres, Box::pin(a_blocked_disk())).await;
}

async fn a_blocked_disk() {
    let place = Place::new("blocked_disk").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let mut disk = BlockedDisk::new(&place.site);
    place.configure(6, TIMER.as_secs(), json!({}));
    let mut blocked = place.site.spawn_with(&["--log", "log.fifo"], &[]);
    disk.take_until("ready").await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let before = place.has_hosts(1).await;
    disk.block();
    // What a handler logs is written down by its host, which comes to stand there.
    submit(&queue, &[task("writes", "log", json!({}))]).await;
    let other = place.host(6, TIMER.as_secs(), json!({})).await;
    have_begun(&place.site, 10).await;
    place.site.open_gate("gate");
    all_finish(&queue, 6, |_| 1).await;
    let finished = held_tasks(&queue).await;
    disk.take_until("registering again").await;
    disk.take_until("ready").await;
    let after = place.has_hosts(2).await;
    assert!(before.is_disjoint(&after), "it is another one now: {before:?}, {after:?}");
    for (was, is) in finished.iter().zip(held_tasks(&queue).await) {
        assert_eq!((was.attempts, was.lost, was.finished_at), (is.attempts, is.lost, is.finished_at), "{}", is.key);
    }
    other.stop().await;
    blocked.signal(Signal::TERM);
    disk.take_until("ended").await;
    assert!(blocked.exited(PATIENCE).await.success());
}

/// A host that gets stuck in itself: only the program that tests build can be told to.
mod with_faults {
    use super::*;

    #[tokio::test]
    async fn leases_under_a_new_session_survive_a_late_takeover_of_the_old_one_and_end_with_their_own() {
        on(Database::Postgres, Box::pin(late_takeover())).await;
    }

    /// The acting host is slow: while it is about to hand on what a host had, that host comes back, works on under a new name, and is killed.
    async fn late_takeover() {
        const HELD: usize = 5;
        let place = Place::on(&shared().await.address(), "late").await;
        let cable = Proxy::to(shared().await.port()).await;
        place.site.plug_guest("zoo");
        let queue = place.site.queue().await;
        place.configure(1, LONG_TIMER, json!({}));
        let acting = place.site.start_with_fault("block-at=hand-on").await;
        submit_held(&queue, 0..1).await;
        have_begun(&place.site, 1).await;
        let mut watchdog = place.watchdog_at(&format!("127.0.0.1:{}/late", cable.port()), LONG_TIMER);
        watchdog["session_timeout"] = 6.into();
        let mut victim = place.host(HELD, LONG_TIMER, json!({ "watchdog": watchdog })).await;
        submit_held(&queue, 1..1 + HELD).await;
        have_begun(&place.site, 1 + HELD).await;
        let before = place.has_hosts(2).await;

        cable.cut();
        acting.logged("fault injection: this thread is blocked", PATIENCE).await;
        victim.logged("ZooKeeper session is over: stopping what it runs", PATIENCE).await;
        cable.mend();
        victim.logged_times("ready", 2, PATIENCE).await;
        have_begun(&place.site, 1 + 2 * HELD).await;
        let after = place.has_hosts(2).await;
        let old = before.difference(&after).next().expect("the victim is another one now");
        let other = place.host(HELD, LONG_TIMER, json!({})).await;

        victim.kill().await;
        std::fs::write(place.site.path("unblock"), "").unwrap();
        let line = acting.logged("the tasks of dead hosts are handed on", PATIENCE).await;
        assert!(line.contains(old.as_str()) && line.contains("tasks=0"), "{old}: {line}");
        let stats = queue.stats().await.unwrap();
        assert_eq!(
            (stats.running, stats.ready),
            (1 + HELD as u64, 0),
            "the new session lives, and its leases with it: {stats:?}"
        );
        have_begun(&place.site, 1 + 3 * HELD).await;
        place.site.open_gate("gate");
        // Given back when the first session was over, lost with the second one.
        all_finish(&queue, 1 + HELD, |task| u32::from(task.key != "held-0")).await;
        acting.stop().await;
        other.stop().await;
    }

    #[tokio::test]
    async fn a_host_whose_claim_loop_is_stuck_loses_its_tasks_and_what_it_just_claimed() {
        on(Database::Postgres, Box::pin(stuck_in_the_claim_loop())).await;
    }

    async fn stuck_in_the_claim_loop() {
        let place = Place::new("stuck_in_the_claim_loop").await;
        place.site.plug_guest("zoo");
        let queue = place.site.queue().await;
        place.configure(5, TIMER.as_secs(), json!({ "task_heartbeat_interval": 60 }));
        let stuck = place.site.start_with_fault("block-at=claimed:2").await;
        submit_held(&queue, 0..1).await;
        have_begun(&place.site, 1).await;
        submit_held(&queue, 1..4).await;
        stuck.logged("fault injection: this thread is blocked", PATIENCE).await;
        let other = place.host(5, TIMER.as_secs(), json!({})).await;
        // What runs there, and what was claimed and has not begun.
        have_begun(&place.site, 5).await;
        let before = place.has_hosts(2).await;
        place.site.open_gate("gate");
        all_finish(&queue, 4, |_| 1).await;
        std::fs::write(place.site.path("unblock"), "").unwrap();
        stuck.logged("registering again", PATIENCE).await;
        stuck.logged_times("ready", 2, PATIENCE).await;
        let after = place.has_hosts(2).await;
        assert_eq!(before.intersection(&after).count(), 1, "it is another one now: {before:?}, {after:?}");
        all_finish(&queue, 4, |_| 1).await;
        other.stop().await;
        stuck.stop().await;
    }
}

mod frozen {
    use super::*;

    laelaps_tests::on_every_database! {
        async fn a_frozen_host_loses_its_tasks_and_what_it_writes_when_it_wakes_changes_nothing() {
            let place = Place::new(&format!("frozen_{:?}", Site::database_of_the_test())).await;
            place.site.plug_guest("zoo");
            let queue = place.site.queue().await;
            let frozen = place.host(5, TIMER.as_secs(), json!({ "task_heartbeat_interval": 60 })).await;
            submit_held(&queue, 0..5).await;
            have_begun(&place.site, 5).await;
            let other = place.host(5, TIMER.as_secs(), json!({})).await;
            let before = place.has_hosts(2).await;

            crate::fleet::freeze(&frozen, &queue).await;
            let since = Instant::now();
            have_begun(&place.site, 10).await;
            promised("a frozen host: the last of its tasks runs elsewhere", since.elapsed(), TIMER + SESSION);
            // Its own guests find the gate open when it wakes, and finish at once, under leases that it has lost.
            place.site.open_gate("gate");
            all_finish(&queue, 5, |_| 1).await;
            let finished = held_tasks(&queue).await;
            frozen.signal(Signal::CONT);
            frozen.logged("registering again", PATIENCE).await;
            frozen.logged_times("ready", 2, PATIENCE).await;
            let after = place.has_hosts(2).await;
            assert_eq!(before.intersection(&after).count(), 1, "the frozen one has become another: {before:?}, {after:?}");
            for (was, is) in finished.iter().zip(held_tasks(&queue).await) {
                assert_eq!((was.attempts, was.lost, was.finished_at), (is.attempts, is.lost, is.finished_at), "{}", is.key);
            }

            // It works on, under its new name.
            other.stop().await;
            submit(&queue, &[task("after", "silent", json!({}))]).await;
            wait_for_finished(&queue, 6, PATIENCE).await;
            frozen.stop().await;
        }
    }
}

#[tokio::test]
async fn a_database_that_is_down_for_three_timers_makes_nobody_dead() {
    let place = Place::new("outage").await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.site.plug_guest("zoo");
    let queue = Queue::open(&Config::new(&url)).await.unwrap();
    queue.init().await.unwrap();
    let mut hosts = Vec::new();
    for _ in 0..4 {
        hosts.push(place.host(5, TIMER.as_secs(), json!({ "url": url })).await);
    }
    submit_held(&queue, 0..20).await;
    have_begun(&place.site, 20).await;
    let before = place.has_hosts(4).await;
    database.kill();
    eventually(PATIENCE, "nobody has kicked for three timers", async || {
        let ages: Vec<f64> = place.fleet().await.iter().filter_map(|host| host["age_seconds"].as_f64()).collect();
        let all_silent = ages.len() == 4 && ages.iter().all(|age| *age > 3.0 * TIMER.as_secs_f64());
        if all_silent { Ok(()) } else { Err(format!("{ages:?}")) }
    })
    .await;
    database.restart().await;
    eventually(PATIENCE, "everybody kicks again, as who it was", async || {
        let hosts = place.fleet().await;
        let well = hosts.iter().all(|host| host["age_seconds"].as_f64().is_some_and(|age| age < TIMER.as_secs_f64()));
        if well && hosts.len() == 4 { Ok(()) } else { Err(format!("{hosts:?}")) }
    })
    .await;
    assert_eq!(place.has_hosts(4).await, before);
    place.site.open_gate("gate");
    all_finish(&queue, 20, |_| 0).await;
    assert_eq!(place.site.marks("held").len(), 20, "nothing began twice");
    for mut host in hosts {
        assert!(host.is_running());
        host.stop().await;
    }
}

#[tokio::test]
async fn a_stuck_acting_host_whose_session_lives_loses_its_tasks_to_the_next_one() {
    let place = Place::new("stuck").await;
    let database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    let cable = Proxy::to(database.port()).await;
    let through_cable = url.replace(&format!(":{}", database.port()), &format!(":{}", cable.port()));
    place.site.plug_guest("zoo");
    let queue = Queue::open(&Config::new(&url)).await.unwrap();
    queue.init().await.unwrap();
    let stuck = place.host(5, TIMER.as_secs(), json!({ "url": through_cable, "statement_timeout": 5 })).await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let next = place.host(5, TIMER.as_secs(), json!({ "url": url })).await;
    place.has_hosts(2).await;
    stuck.logged("this host acts for its fleet", PATIENCE).await;
    cable.cut();
    stuck.logged("this host is not well", PATIENCE).await;
    next.logged("this host acts for its fleet", PATIENCE).await;
    have_begun(&place.site, 10).await;
    place.site.open_gate("gate");
    all_finish(&queue, 5, |_| 1).await;
    // Its session lived on. When the database answers it learns that it was struck off, and comes back as another.
    cable.mend();
    stuck.logged("registering again", PATIENCE).await;
    stuck.logged_times("ready", 2, PATIENCE).await;
    next.stop().await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 6, LONG).await;
    stuck.stop().await;
}

#[tokio::test]
async fn a_host_that_is_cut_off_from_zookeeper_loses_its_tasks_and_comes_back_as_another() {
    let place = Place::on(&shared().await.address(), "cut_off").await;
    let cable = Proxy::to(shared().await.port()).await;
    let servers = format!("127.0.0.1:{}/cut_off", cable.port());
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let mut watchdog = place.watchdog_at(&servers, LONG_TIMER);
    // The client takes its session for over after seven fifths of it. The servers, and so the others, have to be well before that.
    watchdog["session_timeout"] = 6.into();
    let cut_off = place.host(5, LONG_TIMER, json!({ "watchdog": watchdog })).await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let other = place.host(5, LONG_TIMER, json!({})).await;
    let before = place.has_hosts(2).await;
    cable.cut();
    cut_off.logged("no ZooKeeper server answers: nothing is claimed", PATIENCE).await;
    have_begun(&place.site, 10).await;
    cut_off.logged("ZooKeeper session is over: stopping what it runs", PATIENCE).await;
    cut_off.logged_times("the lease had ended before the outcome was stored", 5, PATIENCE).await;
    place.has_hosts(1).await;
    cable.mend();
    let after = place.has_hosts(2).await;
    assert_eq!(before.intersection(&after).count(), 1, "it is another one now: {before:?}, {after:?}");
    place.site.open_gate("gate");
    all_finish(&queue, 5, |_| 1).await;
    other.stop().await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 6, PATIENCE).await;
    cut_off.stop().await;
}

#[tokio::test]
async fn a_host_that_loses_zookeeper_and_its_database_together_waits_for_both() {
    let place = Place::on(&shared().await.address(), "both").await;
    let cable = Proxy::to(shared().await.port()).await;
    let mut database = postgres::Server::start(Durability::Process).await;
    let url = database.create_database().await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue_at(&url).await;
    let mut watchdog = place.watchdog_at(&format!("127.0.0.1:{}/both", cable.port()), LONG_TIMER);
    watchdog["session_timeout"] = 2.into();
    let mut host = place.host(2, LONG_TIMER, json!({ "url": url, "watchdog": watchdog, "pq_connect_timeout": 1 })).await;
    cable.cut();
    database.kill();
    host.logged("ZooKeeper session is over: stopping what it runs", PATIENCE).await;
    cable.mend();
    host.logged("cannot register this host with the database; trying again", PATIENCE).await;
    assert!(host.is_running());
    database.restart().await;
    host.logged_times("ready", 2, PATIENCE).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn an_ensemble_that_loses_its_leader_a_follower_or_its_majority_costs_no_task_and_no_host() {
    let mut ensemble = Ensemble::start().await;
    let place = Place::on(&ensemble.addresses(), "ensemble").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let mut watchdog = place.watchdog_at(&place.servers, LONG_TIMER);
    watchdog["session_timeout"] = LONGEST_SESSION.as_secs().into();
    let section = json!({ "watchdog": watchdog });
    let mut hosts = [place.host(4, LONG_TIMER, section.clone()).await, place.host(4, LONG_TIMER, section).await];
    submit_held(&queue, 0..4).await;
    have_begun(&place.site, 4).await;
    let before = place.has_hosts(2).await;
    let mut done = 0;
    let mut work_goes_on = async |number: usize| {
        let more: Vec<_> = (0..20).map(|of| task(format!("more-{number}-{of}"), "silent", json!({}))).collect();
        submit(&queue, &more).await;
        done += 20;
        wait_for_finished(&queue, done, PATIENCE).await;
    };

    // The leader, then a follower; each comes back.
    let leader = ensemble.leader().await;
    ensemble.members[leader].kill();
    ensemble.leader().await;
    work_goes_on(0).await;
    ensemble.members[leader].restart().await;
    let leader = ensemble.leader().await;
    let follower = (leader + 1) % 3;
    ensemble.members[follower].kill();
    work_goes_on(1).await;
    ensemble.members[follower].restart().await;

    // The majority: who is alone claims nothing, and runs on.
    let outage = if laelaps_tests::scaled(10) == 10 { Duration::from_secs(20) } else { Duration::from_secs(5) };
    const ALONE: &str = "no ZooKeeper server answers: nothing is claimed";
    let leader = ensemble.leader().await;
    let said: Vec<usize> = hosts.iter().map(|host| host.lines_with(ALONE).len()).collect();
    let lost = Instant::now();
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].kill();
    }
    for (host, said) in hosts.iter().zip(said) {
        host.logged_times(ALONE, said + 1, PATIENCE).await;
    }
    let waiting: Vec<_> = (0..20).map(|number| task(format!("waits-{number}"), "silent", json!({}))).collect();
    submit(&queue, &waiting).await;
    eventually(LONG, "the outage lasts long enough", async || {
        let stats = queue.stats().await.unwrap();
        assert_eq!((stats.finished, stats.ready + stats.running), (40, 24), "nothing is claimed, nothing is lost");
        // Who is alone for longer than a session lasts has to take it for over, and gives back what it runs.
        assert!(stats.running == 4 || lost.elapsed() > LONGEST_SESSION, "what runs, runs on: {stats:?}");
        if lost.elapsed() > outage { Ok(()) } else { Err(format!("{:?}", lost.elapsed())) }
    })
    .await;
    for other in [leader, (leader + 1) % 3] {
        ensemble.members[other].launch();
    }
    wait_for_finished(&queue, 60, LONG).await;
    place.site.open_gate("gate");
    wait_for_finished(&queue, 64, PATIENCE).await;
    if outage < LONGEST_SESSION {
        assert_eq!(place.has_hosts(2).await, before, "every session lives");
    }
    for task in all_tasks(&queue).await {
        assert_eq!((task.attempts, task.lost), (1, 0), "{}", task.key);
    }
    for host in &mut hosts {
        assert!(host.is_running());
    }
    for host in hosts {
        host.stop().await;
    }
}

#[tokio::test]
async fn a_host_waits_for_a_zookeeper_that_is_down_at_its_start_and_ends_when_told() {
    let mut server = Server::start().await;
    let place = Place::on(&server.address(), "down").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    submit(&queue, &[task("waits", "silent", json!({}))]).await;
    server.kill();
    place.configure(2, LONG_TIMER, json!({}));
    let mut waiting = place.site.spawn_with(&[], &[]);
    waiting.notified("STATUS=waiting for ZooKeeper", PATIENCE).await;
    waiting.logged("this host is not in its fleet and claims nothing", PATIENCE).await;
    let mut told_to_end = place.site.spawn_with(&[], &[]);
    told_to_end.notified("STATUS=waiting for ZooKeeper", PATIENCE).await;
    told_to_end.signal(Signal::TERM);
    assert!(told_to_end.exited(PATIENCE).await.success());
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.finished), (1, 0), "nothing is claimed without ZooKeeper");
    server.restart().await;
    waiting.notified("READY=1", PATIENCE).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    waiting.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_a_host_in_its_fleet_and_its_end_leaves_it_at_once() {
    let place = Place::new("restarts").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let host = place.host(2, LONG_TIMER, json!({})).await;
    host.signal(Signal::USR1);
    host.logged_times("ready", 2, PATIENCE).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    let told = place.site.laelaps(["-c", "laelaps.yml", "watchdog", "status"]).await.success().stdout;
    assert!(told.contains("/fleet: a fleet of 1 host\n") && told.contains("acting"), "{told}");
    let told = place.site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stdout;
    assert!(told.contains("fleet          /fleet: 1 host, sessions end after 2s"), "{told}");
    host.stop().await;
    assert!(place.fleet().await.is_empty(), "a host that ends leaves the fleet, and does not let its session time out");
}
