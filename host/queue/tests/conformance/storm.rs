//! Everything at once, in any order: whatever is done to a queue, no task is lost and nothing drifts.

use std::time::Duration;

use laelaps_queue::{
    Beat, Claim, ClaimedTask, Compression, Event, FailureKind, Filter, HostId, LeaseAnswer, NewTask, Settlement, State, Timestamp,
};

use crate::fixture::{Database, Fixture, LONG, finish, settled, task, with_follow_ups};

/// Steps of one storm, with an audit after every few.
const STEPS: usize = 300;
const AUDIT_EVERY: usize = 25;
/// Distinct keys, so that submits also meet keys that exist.
const KEYS: u32 = 120;

struct Storm {
    fixture: Fixture,
    random: fastrand::Rng,
    /// With what a watchdog knows them by.
    hosts: Vec<(HostId, String)>,
    /// What hosts believe to have, some of it long lost.
    claimed: Vec<ClaimedTask>,
}

impl Storm {
    async fn begin(database: Database, seed: u64) -> Self {
        Self::over(Fixture::new(database).await, seed).await
    }

    async fn over(fixture: Fixture, seed: u64) -> Self {
        let mut storm = Self { fixture, random: fastrand::Rng::with_seed(seed), hosts: Vec::new(), claimed: Vec::new() };
        for _ in 0..2 {
            let host = storm.host().await;
            storm.hosts.push(host);
        }
        storm
    }

    /// A host with an identity that is never given twice, also not to another storm of other seed.
    async fn host(&mut self) -> (HostId, String) {
        let identity = format!("{:x}", self.random.u64(..));
        (self.fixture.host_as(&identity).await, identity)
    }

    fn new_task(&mut self) -> NewTask {
        let key = format!("k{}", self.random.u32(..KEYS));
        let user = match self.random.u32(..4) {
            0 => None,
            user => Some(format!("u{user}")),
        };
        NewTask {
            task_type: format!("t{}", self.random.u32(..3)),
            user,
            max_running: [None, Some(0), Some(1), Some(3)][self.random.usize(..4)],
            max_attempts: [None, Some(1), Some(2)][self.random.usize(..3)],
            compression: [Compression::None, Compression::Gzip][self.random.usize(..2)],
            ..task(&key)
        }
    }

    fn follow_up(&mut self, parent: &ClaimedTask) -> NewTask {
        NewTask { descent: Some(parent.descent.of_follow_up(None, parent.claimed_at)), ..self.new_task() }
    }

    fn event(&mut self) -> Event {
        let delay = [None, Some(Duration::ZERO), Some(Duration::from_millis(20))][self.random.usize(..3)];
        match self.random.u32(..8) {
            0..3 => Event::Finish { output: Some(b"out".to_vec()), retention: delay },
            3 => Event::Retry { delay },
            4 => Event::Release { delay },
            5 => Event::Failure { kind: FailureKind::Reject, code: "no".to_owned(), message: "never".to_owned() },
            6 => Event::Trap { message: "boom".to_owned() },
            _ => Event::Stopped,
        }
    }

    async fn step(&mut self) {
        match self.random.u32(..24) {
            0..4 => self.submit().await,
            4..9 => self.claim().await,
            9..14 => self.settle().await,
            14 => self.heartbeat().await,
            15..17 => self.by_hand().await,
            17 => drop(self.fixture.backend().reclaim(&self.fixture.config.policy).await.unwrap()),
            18 => drop(self.fixture.backend().clean_up(self.random.u32(1..20)).await.unwrap()),
            19..22 => self.move_held().await,
            22 => self.hand_a_host_on().await,
            _ => self.replace_a_host().await,
        }
    }

    async fn submit(&mut self) {
        let now = self.fixture.backend().now().await.unwrap();
        let count = self.random.usize(1..20);
        let mut tasks: Vec<NewTask> = (0..count).map(|_| self.new_task()).collect();
        for task in &mut tasks {
            if self.random.u32(..4) == 0 {
                task.run_at = Some(Timestamp(now.0 + i64::from(self.random.u32(..60))));
            }
            task.held = self.random.u32(..6) == 0;
        }
        self.fixture.submit(&tasks).await;
    }

    async fn claim(&mut self) {
        let claim = Claim {
            host: self.hosts[self.random.usize(..self.hosts.len())].0,
            limit: self.random.u32(1..12),
            alive_time: [LONG, Duration::from_millis(15)][usize::from(self.random.u32(..5) == 0)],
            alone: self.random.bool(),
            ignore_users: self.random.u32(..4) == 0,
            accepts: None,
            limited: None,
            queues: None,
        };
        self.claimed.append(&mut self.fixture.backend().claim(&claim).await.unwrap().tasks);
    }

    async fn settle(&mut self) {
        let count = self.random.usize(..8).min(self.claimed.len());
        let mut group = Vec::new();
        for _ in 0..count {
            let place = self.random.usize(..self.claimed.len());
            // Some are kept by a worker that does not know better, and settled again later.
            let task = if self.random.u32(..5) == 0 { self.claimed[place].clone() } else { self.claimed.swap_remove(place) };
            let event = self.event();
            let follow_ups =
                if event.keeps_follow_ups() && self.random.u32(..3) == 0 { vec![self.follow_up(&task)] } else { Vec::new() };
            group.push(with_follow_ups(follow_ups, settled(&task, event)));
            if self.claimed.is_empty() {
                break;
            }
        }
        assert_eq!(self.fixture.backend().settle(&group).await.unwrap().len(), group.len());
    }

    async fn heartbeat(&mut self) {
        let beats: Vec<Beat> = self
            .claimed
            .iter()
            .take(10)
            .map(|task| Beat { lease_ref: task.lease_ref, alive_time: Duration::from_millis(30), progress: None })
            .collect();
        self.fixture.backend().heartbeat(&beats).await.unwrap();
        if let Some(task) = self.claimed.first() {
            self.fixture.backend().update_data(task.lease_ref, br#"{"updated":true}"#).await.unwrap();
        }
    }

    /// Refusals are right answers here.
    async fn by_hand(&mut self) {
        let key = format!("k{}", self.random.u32(..KEYS));
        let retention = Duration::from_millis(self.random.u64(..40));
        let _ = match self.random.u32(..3) {
            0 => self.fixture.backend().cancel(&key, retention).await,
            1 => self.fixture.backend().force_finish(&key, retention).await,
            _ => self.fixture.backend().retry(&key).await,
        };
    }

    /// Release or drop some of what is held. Others may do the same.
    async fn move_held(&mut self) {
        let prefix = format!("k{}", self.random.u32(..10));
        for key in self.fixture.backend().held(&prefix).await.unwrap() {
            match self.random.u32(..3) {
                0 => drop(self.fixture.backend().release_held(&key).await.unwrap()),
                1 => drop(self.fixture.backend().drop_held(&key).await.unwrap()),
                _ => {}
            }
        }
    }

    async fn hand_a_host_on(&mut self) {
        let place = self.random.usize(..self.hosts.len());
        let identities = [self.hosts[place].1.clone()];
        self.fixture.backend().hand_on(&identities, &self.fixture.config.policy).await.unwrap();
        self.hosts[place] = self.host().await;
    }

    async fn replace_a_host(&mut self) {
        let place = self.random.usize(..self.hosts.len());
        self.fixture.backend().unregister_host(self.hosts[place].0).await.unwrap();
        self.hosts[place] = self.host().await;
    }

    /// Work until nothing waits or runs any more.
    async fn calm(&mut self) {
        for key in self.fixture.backend().held("").await.unwrap() {
            assert!(self.fixture.backend().release_held(&key).await.unwrap());
        }
        for (host, _) in std::mem::take(&mut self.hosts) {
            self.fixture.backend().unregister_host(host).await.unwrap();
        }
        let host = self.fixture.host().await;
        let started = std::time::Instant::now();
        loop {
            assert!(
                started.elapsed() < crate::fixture::PATIENCE * 4,
                "the queue does not come to an end: {:?}",
                self.fixture.queue.stats().await
            );
            self.fixture.backend().reclaim(&self.fixture.config.policy).await.unwrap();
            let claim = Claim { alone: true, ..Claim::new(host, 50, LONG) };
            let tasks = self.fixture.backend().claim(&claim).await.unwrap().tasks;
            let ends: Vec<Settlement> = tasks.iter().map(|task| settled(task, finish())).collect();
            let answers = self.fixture.backend().settle(&ends).await.unwrap();
            assert!(answers.iter().all(|answer| *answer == LeaseAnswer::Held));
            let stats = self.fixture.queue.stats().await.unwrap();
            if stats.ready + stats.scheduled + stats.running == 0 {
                return;
            }
        }
    }
}

async fn a_storm(database: Database, seed: u64) {
    let mut storm = Storm::begin(database, seed).await;
    for step in 0..STEPS {
        storm.step().await;
        if step % AUDIT_EVERY == 0 {
            storm.fixture.audit().await;
        }
    }
    storm.fixture = {
        // As it is found after a crash in the middle of it.
        let crashed = storm.fixture.crash().await;
        crashed.audit().await;
        crashed.bury().await;
        storm.hosts.clear();
        crashed
    };
    storm.calm().await;
    storm.fixture.audit().await;
    let filter = Filter { states: vec![State::Waiting, State::Running], limit: 10, ..Filter::default() };
    assert!(storm.fixture.queue.list(&filter).await.unwrap().tasks.is_empty());
}

async fn storms(database: Database, seeds: std::ops::Range<u64>) {
    let mut storms = tokio::task::JoinSet::new();
    let expected = seeds.end - seeds.start;
    for seed in seeds {
        storms.spawn(a_storm(database, seed));
    }
    let mut calmed = 0;
    while let Some(storm) = storms.join_next().await {
        storm.expect("every storm is weathered");
        calmed += 1;
    }
    assert_eq!(calmed, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_done_in_whatever_order_nothing_drifts_and_everything_ends_on_sqlite() {
    storms(Database::Sqlite, 0..6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_done_in_whatever_order_nothing_drifts_and_everything_ends_on_mariadb() {
    storms(Database::MariaDb, 10..14).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_done_in_whatever_order_nothing_drifts_and_everything_ends_on_postgres() {
    storms(Database::Postgres, 20..24).await;
}

/// Several hosts at once on one database of a server, each through connections of its own.
async fn storms_at_once(database: Database) {
    let fixture = Fixture::new(database).await;
    let mut storms = tokio::task::JoinSet::new();
    for seed in 0..4 {
        let fixture = fixture.beside().await;
        storms.spawn(async move {
            let mut storm = Storm::over(fixture, seed).await;
            for _ in 0..STEPS {
                storm.step().await;
            }
            for (host, _) in std::mem::take(&mut storm.hosts) {
                storm.fixture.backend().unregister_host(host).await.unwrap();
            }
            storm.fixture.queue.close().await;
        });
    }
    while let Some(storm) = storms.join_next().await {
        storm.expect("every storm is weathered");
    }
    fixture.audit().await;
    let mut storm = Storm { fixture, random: fastrand::Rng::with_seed(4), hosts: Vec::new(), claimed: Vec::new() };
    storm.calm().await;
    storm.fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_several_hosts_do_at_once_nothing_drifts_and_everything_ends_on_postgres() {
    storms_at_once(Database::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_several_hosts_do_at_once_nothing_drifts_and_everything_ends_on_mariadb() {
    storms_at_once(Database::MariaDb).await;
}
