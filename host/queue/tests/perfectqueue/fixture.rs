//! A table of its own for each test.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use laelaps_queue::{
    Accepts, Attempt, Backend, Backoff, Beat, Claim, Claimed, ClaimedTask, Config, Connections, Event, HostDescription, HostId,
    Kind, LeaseAnswer, NewTask, PerfectQueue, Policy, Queue, Settlement, State, Task, Timestamp,
};
use laelaps_test_databases::{LONG as PATIENCE_MAX, PATIENCE, eventually, mariadb};

use crate::ruby::Ruby;

/// A lease that does not end within a test.
pub(crate) const LONG: Duration = Duration::from_secs(300);

pub(crate) struct Site {
    pub(crate) config: Config,
    pub(crate) queue: Queue,
}

/// A table with a name of its own, whichever process makes it: by it goes the lock, which is the whole server's.
pub(crate) fn table(side_table: bool) -> PerfectQueue {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let table = format!("tasks{}_{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    PerfectQueue { table, cleanup_interval: 20, side_table }
}

impl Site {
    /// A table as Ruby makes it, and ours beside it.
    pub(crate) async fn new() -> Self {
        Self::with(table(true)).await
    }

    /// Without ours.
    pub(crate) async fn plain() -> Self {
        Self::with(table(false)).await
    }

    pub(crate) async fn with(table: PerfectQueue) -> Self {
        let site = Self::empty(table).await;
        site.queue.init().await.expect("an empty database can be initialised");
        site
    }

    /// A database without tables.
    pub(crate) async fn empty(table: PerfectQueue) -> Self {
        Self::on(mariadb::shared().await.create_database().await, table).await
    }

    /// A database without tables, on whichever server.
    pub(crate) async fn on(url: String, table: PerfectQueue) -> Self {
        let policy = Policy {
            backoff: Backoff::Fixed(Duration::ZERO),
            retry_wait: Duration::ZERO,
            suspicion: Duration::ZERO,
            ..Policy::default()
        };
        // Time limits that no busy machine reaches.
        let connections = Connections { connect_timeout: PATIENCE, statement_timeout: PATIENCE_MAX, ..Connections::default() };
        let kind = Kind::PerfectQueue(table);
        let config = Config { policy, kind, connections, patience: PATIENCE_MAX, ..Config::new(url) };
        let queue = Queue::open(&config).await.expect("the server serves");
        Self { config, queue }
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        self.queue.backend()
    }

    /// The same table as another process opens it.
    pub(crate) async fn another(&self) -> Self {
        Self { config: self.config.clone(), queue: Queue::open(&self.config).await.unwrap() }
    }

    /// A worker in Ruby.
    pub(crate) async fn ruby(&self) -> Ruby {
        Ruby::connect(&self.config.url, self.table()).await
    }

    pub(crate) fn table(&self) -> &str {
        let Kind::PerfectQueue(table) = &self.config.kind else { unreachable!("a table of PerfectQueue") };
        &table.table
    }

    /// Whether our tables stand beside it.
    pub(crate) fn has_ours(&self) -> bool {
        let Kind::PerfectQueue(table) = &self.config.kind else { unreachable!("a table of PerfectQueue") };
        table.side_table
    }

    pub(crate) async fn host(&self) -> HostId {
        let description = HostDescription { name: "tester".to_owned(), process_id: std::process::id(), identity: None };
        self.backend().register_host(&description).await.unwrap()
    }

    /// One that a watchdog knows.
    pub(crate) async fn watched(&self, identity: &str) -> HostId {
        let identity = Some(identity.to_owned());
        let description = HostDescription { name: "tester".to_owned(), process_id: std::process::id(), identity };
        self.backend().register_host(&description).await.unwrap()
    }

    /// What a watchdog does about a host that has died. Answers the keys, in their order.
    pub(crate) async fn hand_on(&self, identity: &str) -> Vec<String> {
        let handed_on = self.backend().hand_on(&[identity.to_owned()], &Policy::default()).await.unwrap();
        let mut keys: Vec<String> = handed_on.tasks.into_iter().map(|lost| lost.key).collect();
        keys.sort();
        keys
    }

    pub(crate) async fn submit(&self, tasks: &[NewTask]) {
        self.queue.submit_many(tasks).await.expect("good tasks can be submitted");
    }

    pub(crate) async fn claim(&self, host: HostId, limit: u32) -> Vec<ClaimedTask> {
        self.claim_for(host, limit, LONG).await
    }

    pub(crate) async fn claim_for(&self, host: HostId, limit: u32, alive_time: Duration) -> Vec<ClaimedTask> {
        self.backend().claim(&Claim { alive_time, ..asking(host, limit) }).await.expect("a registered host can claim").tasks
    }

    pub(crate) async fn claim_types(&self, host: HostId, limit: u32, ignore_users: bool, accepts: &Accepts) -> Claimed {
        let claim = Claim { ignore_users, accepts: Some(accepts.clone()), ..asking(host, limit) };
        self.backend().claim(&claim).await.expect("a registered host can claim")
    }

    pub(crate) async fn settle(&self, task: &ClaimedTask, event: Event) -> LeaseAnswer {
        self.backend().settle(&[settled(task, event)]).await.unwrap()[0]
    }

    pub(crate) async fn beat(&self, task: &ClaimedTask) -> LeaseAnswer {
        let beat = Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None };
        self.backend().heartbeat(&[beat]).await.unwrap()[0]
    }

    pub(crate) async fn get(&self, key: &str) -> Task {
        self.queue.get(key).await.unwrap().unwrap_or_else(|| panic!("there is no task {key}"))
    }

    pub(crate) async fn state(&self, key: &str) -> State {
        self.get(key).await.state
    }

    /// Wait until the server's clock is past a moment.
    pub(crate) async fn passes(&self, moment: Timestamp) {
        eventually(PATIENCE, "the server's clock gets past a moment", async || {
            let now = self.backend().now().await.unwrap();
            if now > moment { Ok(()) } else { Err(format!("{now:?}, not past {moment:?}")) }
        })
        .await;
    }

    /// Whatever a worker may do with a task, by one who has lost it: nothing changes.
    pub(crate) async fn changes_nothing(&self, stale: &ClaimedTask) {
        let mut ruby = self.ruby().await;
        let before = ruby.row(&stale.key).await;
        assert_eq!(self.beat(stale).await, LeaseAnswer::Lost);
        assert_eq!(self.backend().update_data(stale.lease_ref, br#"{"stale":1}"#).await.unwrap(), LeaseAnswer::Lost);
        for event in [finish(), Event::Retry { delay: None }, Event::Release { delay: None }, Event::Stopped] {
            let settlement = with_follow_ups(vec![task("stale follow-up")], settled(stale, event));
            assert_eq!(self.backend().settle(&[settlement]).await.unwrap(), [LeaseAnswer::Lost]);
        }
        assert_eq!(ruby.row(&stale.key).await, before);
        assert!(!self.queue.exists("stale follow-up").await.unwrap());
    }
}

pub(crate) fn asking(host: HostId, limit: u32) -> Claim {
    Claim::new(host, limit, LONG)
}

pub(crate) fn task(key: &str) -> NewTask {
    NewTask::new(key, "type", r#"{"n":1}"#)
}

pub(crate) fn task_of(user: &str, key: &str, max_running: Option<u32>) -> NewTask {
    NewTask { user: Some(user.to_owned()), max_running, ..task(key) }
}

pub(crate) fn settled(task: &ClaimedTask, event: Event) -> Settlement {
    let policy = Policy {
        backoff: Backoff::Fixed(Duration::ZERO),
        retry_wait: Duration::ZERO,
        suspicion: Duration::ZERO,
        ..Policy::default()
    };
    Settlement::of(task.lease_ref, event, Attempt::of(task), &policy, 0.5, None, Vec::new())
}

/// The same with other follow-ups.
pub(crate) fn with_follow_ups(follow_ups: Vec<NewTask>, settlement: Settlement) -> Settlement {
    let mut settlement = settlement;
    settlement.follow_ups = follow_ups;
    settlement
}

pub(crate) fn finish() -> Event {
    Event::Finish { output: None, retention: None }
}

pub(crate) fn keys(tasks: &[ClaimedTask]) -> Vec<&str> {
    tasks.iter().map(|task| task.key.as_str()).collect()
}
