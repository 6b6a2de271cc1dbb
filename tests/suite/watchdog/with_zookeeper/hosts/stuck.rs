//! Hosts that live and do not get on: frozen, stuck in themselves, before a disk or a database that takes nothing.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use super::*;

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
    let stuck = place.host(5, TIMER, json!({ "url": through_cable, "statement_timeout": 5 })).await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let next = place.host(5, TIMER, json!({ "url": url })).await;
    place.has_hosts(2).await;
    stuck.logged("this host acts for its fleet", LONG).await;
    cable.cut();
    stuck.logged("this host is not well", LONG).await;
    next.logged("this host acts for its fleet", LONG).await;
    have_begun(&place.site, 10).await;
    place.site.open_gate("gate");
    all_finish(&queue, 5, |_| 1).await;
    // Its session lived on. When the database answers it learns that it was struck off, and comes back as another.
    cable.mend();
    stuck.logged("registering again", LONG).await;
    stuck.logged_times("ready", 2, LONG).await;
    next.stop().await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 6, LONG).await;
    stuck.stop().await;
}

mod frozen {
    use super::*;

    laelaps_tests::on_every_database! {
        async fn a_frozen_host_loses_its_tasks_and_what_it_writes_when_it_wakes_changes_nothing() {
            let place = Place::new(&format!("frozen_{:?}", Site::database_of_the_test())).await;
            place.site.plug_guest("zoo");
            let queue = place.site.queue().await;
            let frozen = place.host_to_be_lost(5, LONG_TIMER, json!({ "task_heartbeat_interval": 60 })).await;
            submit_held(&queue, 0..5).await;
            have_begun(&place.site, 5).await;
            let other = place.host(5, LONG_TIMER, json!({})).await;
            let before = place.has_hosts(2).await;

            crate::fleet::freeze(&frozen, &queue).await;
            let since = Instant::now();
            have_begun(&place.site, 10).await;
            promised("a frozen host: the last of its tasks runs elsewhere", since.elapsed(), noticed());
            // Its own guests find the gate open when it wakes, and finish at once, under leases that it has lost.
            place.site.open_gate("gate");
            all_finish(&queue, 5, |_| 1).await;
            let finished = held_tasks(&queue).await;
            frozen.signal(Signal::CONT);
            frozen.logged("registering again", LONG).await;
            frozen.logged_times("ready", 2, LONG).await;
            let after = place.has_hosts(2).await;
            assert_eq!(before.intersection(&after).count(), 1, "the frozen one has become another: {before:?}, {after:?}");
            all_are_excused(&queue, &finished).await;

            // It works on, under its new name.
            other.stop().await;
            submit(&queue, &[task("after", "silent", json!({}))]).await;
            wait_for_finished(&queue, 6, LONG).await;
            frozen.stop().await;
        }
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
        let found = tokio::time::timeout(LONG, read).await;
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
    place.configure(6, TIMER, json!({}));
    let mut blocked = place.site.spawn_with(&["--log", "log.fifo"], &[]);
    disk.take_until("ready").await;
    submit_held(&queue, 0..5).await;
    have_begun(&place.site, 5).await;
    let before = place.has_hosts(1).await;
    disk.block();
    // What a handler logs is written down by its host, which comes to stand there.
    submit(&queue, &[task("writes", "log", json!({}))]).await;
    let other = place.host(6, TIMER, json!({})).await;
    have_begun(&place.site, 10).await;
    place.site.open_gate("gate");
    all_finish(&queue, 6, |_| 1).await;
    let finished = held_tasks(&queue).await;
    disk.take_until("registering again").await;
    disk.take_until("ready").await;
    let after = place.has_hosts(2).await;
    assert!(before.is_disjoint(&after), "it is another one now: {before:?}, {after:?}");
    all_are_excused(&queue, &finished).await;
    other.stop().await;
    blocked.signal(Signal::TERM);
    disk.take_until("ended").await;
    assert!(blocked.exited(LONG).await.success());
}

/// A host that gets stuck in itself: only the program that tests build can be told to.
mod with_faults {
    use super::*;

    #[tokio::test]
    async fn leases_under_a_new_session_survive_a_late_takeover_of_the_old_one_and_end_with_their_own() {
        on(Database::Postgres, Box::pin(late_takeover())).await;
    }

    /// The acting host is slow: while it is about to hand on what a host had, that host comes back and works on under a new name. Then it is
    /// killed.
    async fn late_takeover() {
        const HELD: usize = 5;
        let place = Place::new("late").await;
        let cable = Proxy::to(shared().await.port()).await;
        place.site.plug_guest("zoo");
        let queue = place.site.queue().await;
        place.configure(1, LONG_TIMER, json!({}));
        let acting = place.site.start_with_fault("block-at=hand-on").await;
        submit_held(&queue, 0..1).await;
        have_begun(&place.site, 1).await;
        let watchdog = place.watchdog_at(&place.through(&cable), SESSION, LONG_TIMER);
        let mut victim = place.host(HELD, LONG_TIMER, json!({ "watchdog": watchdog })).await;
        submit_held(&queue, 1..1 + HELD).await;
        have_begun(&place.site, 1 + HELD).await;
        let before = place.has_hosts(2).await;

        cable.cut();
        acting.logged("fault injection: this thread is blocked", LONG).await;
        victim.logged("ZooKeeper session is over: stopping what it runs", LONG).await;
        cable.mend();
        victim.logged_times("ready", 2, LONG).await;
        have_begun(&place.site, 1 + 2 * HELD).await;
        let after = place.has_hosts(2).await;
        let old = before.difference(&after).next().expect("the victim is another one now");
        let other = place.host(HELD, LONG_TIMER, json!({})).await;

        std::fs::write(place.site.path("unblock"), "").unwrap();
        let line = acting.logged("the tasks of dead hosts are handed on", LONG).await;
        assert!(line.contains(old.as_str()) && line.contains("tasks=0"), "{old}: {line}");
        let stats = queue.stats().await.unwrap();
        assert_eq!(
            (stats.running, stats.ready),
            (1 + HELD as u64, 0),
            "the new session lives, and its leases with it: {stats:?}"
        );
        victim.kill().await;
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
        place.configure(5, TIMER, json!({ "task_heartbeat_interval": 60 }));
        let stuck = place.site.start_with_fault("block-at=claimed:2").await;
        submit_held(&queue, 0..1).await;
        have_begun(&place.site, 1).await;
        submit_held(&queue, 1..4).await;
        stuck.logged("fault injection: this thread is blocked", LONG).await;
        let other = place.host(5, TIMER, json!({})).await;
        // What runs there, and what was claimed and has not begun.
        have_begun(&place.site, 5).await;
        let before = place.has_hosts(2).await;
        place.site.open_gate("gate");
        // Only its claim loop stands: what it learns of its leases meanwhile it takes back at once.
        wait_for_finished(&queue, 4, LONG).await;
        let finished = held_tasks(&queue).await;
        std::fs::write(place.site.path("unblock"), "").unwrap();
        stuck.logged("registering again", LONG).await;
        stuck.logged_times("ready", 2, LONG).await;
        let after = place.has_hosts(2).await;
        assert_eq!(before.intersection(&after).count(), 1, "it is another one now: {before:?}, {after:?}");
        all_are_excused(&queue, &finished).await;
        other.stop().await;
        stuck.stop().await;
    }
}
