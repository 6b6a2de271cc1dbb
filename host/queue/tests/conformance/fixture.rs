//! A database of its own for each promise, and the means to crash it, to wait for its clock, and to audit it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use laelaps_queue::{
    Attempt, Backend, Backoff, Claim, ClaimedTask, Config, Connections, Event, HostDescription, HostId, Kind, NewTask, Policy,
    Queue, Settlement, State, Task, Timestamp,
};
use laelaps_test_databases::{LONG as PATIENCE_MAX, eventually};
use tempfile::TempDir;

pub(crate) use laelaps_test_databases::PATIENCE;

mod mariadb;
mod perfectqueue;
pub(crate) mod postgres;
mod sqlite;

/// The databases that keep the promises.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Database {
    Sqlite,
    Postgres,
    MariaDb,
}

/// A lease that does not end within a test, however slow the machine is.
pub(crate) const LONG: Duration = Duration::from_secs(3_600);

pub(crate) struct Fixture {
    pub(crate) database: Database,
    folder: TempDir,
    pub(crate) config: Config,
    pub(crate) queue: Queue,
}

impl Fixture {
    /// A queue with its tables.
    pub(crate) async fn new(database: Database) -> Self {
        let fixture = Self::empty(database).await;
        fixture.queue.init().await.expect("an empty database can be initialised");
        fixture
    }

    /// A database without tables.
    pub(crate) async fn empty(database: Database) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        let url = match database {
            Database::Sqlite => sqlite::url(&folder),
            Database::Postgres => postgres::url().await,
            Database::MariaDb => mariadb::url().await,
        };
        Self::over(database, folder, url, Kind::Native).await
    }

    /// A queue with its tables in a database of a server of the caller's.
    pub(crate) async fn on(database: Database, url: String) -> Self {
        Self::of_kind(database, url, Kind::Native).await
    }

    /// PerfectQueue's table, with ours beside it. It keeps fewer promises than our own: the explorer and chaos know which.
    pub(crate) async fn perfectqueue() -> Self {
        Self::on_perfectqueue(mariadb::url().await).await
    }

    /// The same in a database of a server of the caller's.
    pub(crate) async fn on_perfectqueue(url: String) -> Self {
        Self::of_kind(Database::MariaDb, url, Kind::PerfectQueue(perfectqueue::table())).await
    }

    async fn of_kind(database: Database, url: String, kind: Kind) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        let fixture = Self::over(database, folder, url, kind).await;
        fixture.queue.init().await.expect("an empty database can be initialised");
        fixture
    }

    async fn over(database: Database, folder: TempDir, url: String, kind: Kind) -> Self {
        let policy = Policy { backoff: Backoff::Fixed(Duration::ZERO), suspicion: Duration::ZERO, ..Policy::default() };
        let config = Config { kind, policy, patience: PATIENCE_MAX, connections: patient(), ..Config::new(url) };
        let queue = Queue::open(&config).await.expect("the database can be opened");
        Self { database, folder, config, queue }
    }

    pub(crate) fn database(&self) -> Database {
        self.database
    }

    pub(crate) fn is_perfectqueue(&self) -> bool {
        self.config.kind != Kind::Native
    }

    /// The name of PerfectQueue's table.
    pub(crate) fn table(&self) -> &str {
        perfectqueue::name(&self.config)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("queue.db")
    }

    /// The database's URL without a bouncer in between.
    pub(crate) async fn direct_url(&self) -> String {
        match self.database {
            Database::Postgres => postgres::direct(&self.config.url).await,
            Database::Sqlite | Database::MariaDb => self.config.url.clone(),
        }
    }

    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        self.queue.backend()
    }

    /// The same database, opened once more, as another process would.
    pub(crate) async fn another(&self) -> Queue {
        Queue::open(&self.config).await.expect("the database can be opened twice")
    }

    /// The same database with another queue, as another process would have it.
    pub(crate) async fn beside(&self) -> Self {
        let folder = TempDir::new().expect("a temporary folder can be made");
        Self::over(self.database, folder, self.config.url.clone(), self.config.kind.clone()).await
    }

    /// The database as it would be found if all machines had stopped at this very moment: what is on the disk, without any clean end.
    pub(crate) async fn crash(&self) -> Self {
        let (folder, url) = match self.database {
            Database::Sqlite => {
                let folder = sqlite::copy(&self.folder);
                let url = sqlite::url(&folder);
                (folder, url)
            }
            Database::Postgres => (TempDir::new().expect("a temporary folder can be made"), postgres::copy(&self.config).await),
            // What a server has committed is as it is for whoever comes next; its own death has tests of its own.
            Database::MariaDb => (TempDir::new().expect("a temporary folder can be made"), self.config.url.clone()),
        };
        Self::over(self.database, folder, url, self.config.kind.clone()).await
    }

    pub(crate) async fn host(&self) -> HostId {
        let description = HostDescription { name: "tester".to_owned(), process_id: std::process::id(), identity: None };
        self.backend().register_host(&description).await.expect("a host can register")
    }

    /// A host that a watchdog knows.
    pub(crate) async fn host_as(&self, identity: &str) -> HostId {
        let identity = Some(identity.to_owned());
        let description = HostDescription { name: "tester".to_owned(), process_id: std::process::id(), identity };
        self.backend().register_host(&description).await.expect("a host can register")
    }

    pub(crate) async fn submit(&self, tasks: &[NewTask]) {
        self.queue.submit_many(tasks).await.expect("good tasks can be submitted");
    }

    /// Tasks `name0`, `name1`, ...
    pub(crate) async fn submit_some(&self, name: &str, count: usize) {
        let tasks: Vec<NewTask> = (0..count).map(|number| task(&format!("{name}{number}"))).collect();
        self.submit(&tasks).await;
    }

    pub(crate) async fn claim(&self, host: HostId, limit: u32) -> Vec<ClaimedTask> {
        self.claim_for(host, limit, LONG).await
    }

    pub(crate) async fn claim_for(&self, host: HostId, limit: u32, alive_time: Duration) -> Vec<ClaimedTask> {
        let claim = Claim::new(host, limit, alive_time);
        self.backend().claim(&claim).await.expect("a registered host can claim").tasks
    }

    pub(crate) async fn get(&self, key: &str) -> Task {
        self.queue.get(key).await.expect("tasks can be read").unwrap_or_else(|| panic!("there is no task {key}"))
    }

    pub(crate) async fn state(&self, key: &str) -> State {
        self.get(key).await.state
    }

    /// Wait until the database's clock is past a moment.
    pub(crate) async fn passes(&self, moment: Timestamp) {
        let started = Instant::now();
        while self.backend().now().await.expect("the database knows the time") <= moment {
            assert!(started.elapsed() < PATIENCE, "the database's clock does not get past {moment:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Run statements beside the queue, as an operator or a fault would.
    pub(crate) async fn meddle(&self, sql: &'static str) {
        match self.database {
            Database::Sqlite => sqlite::meddle(&self.config, sql).await,
            Database::Postgres => postgres::meddle(&self.config, sql).await,
            Database::MariaDb => mariadb::meddle(&self.config, sql).await,
        }
    }

    /// Leave task `a` among the follow-ups that have not ended, although it has.
    pub(crate) async fn leave_descendant_a(&self) {
        self.meddle(match self.database {
            Database::Sqlite | Database::Postgres => {
                "INSERT INTO descendant (task, root) SELECT id, root FROM task WHERE key = 'a'"
            }
            Database::MariaDb => {
                "INSERT INTO laelaps_descendant (task, root) SELECT id, root FROM laelaps_task WHERE `key` = 'a'"
            }
        })
        .await;
    }

    /// Damage the data of tasks named torn, flipped, no json and missing, each in its way.
    pub(crate) async fn damage(&self) {
        self.meddle(match self.database {
            Database::Sqlite => sqlite::DAMAGE,
            Database::Postgres => postgres::DAMAGE,
            Database::MariaDb => mariadb::DAMAGE,
        })
        .await;
    }

    /// Write nonsense where the data of all tasks is, in PerfectQueue's table.
    pub(crate) async fn damage_every_task(&self) {
        perfectqueue::damage(&self.config).await;
    }

    /// Let what all hosts still have count as lost, as it does after a crash: at once where a host's life can be seen, else when its
    /// leases have run out.
    pub(crate) async fn bury(&self) {
        match self.database {
            Database::Sqlite | Database::Postgres => {}
            Database::MariaDb => self.meddle(mariadb::BURY).await,
        }
    }

    /// Whether this database can tell by itself that a host lives.
    pub(crate) fn sees_life(&self) -> bool {
        matches!(self.database, Database::Sqlite)
    }

    /// Everything that follows from something else is what it should be.
    pub(crate) async fn audit(&self) {
        match self.database {
            Database::Sqlite => {
                assert_eq!(self.backend().audit().await.expect("the tables can be compared"), [] as [&str; 0]);
            }
            Database::Postgres => postgres::audit(&self.config).await,
            Database::MariaDb if self.is_perfectqueue() => perfectqueue::audit(&self.config).await,
            Database::MariaDb => mariadb::audit(&self.config).await,
        }
    }
}

/// Connections whose time limits no busy machine reaches.
pub(crate) fn patient() -> Connections {
    Connections { connect_timeout: PATIENCE, statement_timeout: PATIENCE_MAX, ..Connections::default() }
}

/// Does something to those who work, once and then again each time after they have done `step` more, until they have done `total`. So they get
/// on between any two of these, however slow the machine is.
pub(crate) async fn after_each(step: usize, total: usize, done: &AtomicUsize, mut fault: impl AsyncFnMut()) {
    let mut next = 1;
    loop {
        eventually(PATIENCE_MAX, "the work gets on", async || {
            let done = done.load(Ordering::SeqCst);
            if done >= next { Ok(()) } else { Err(format!("{done} of {total} done")) }
        })
        .await;
        if done.load(Ordering::SeqCst) >= total {
            return;
        }
        fault().await;
        next = (done.load(Ordering::SeqCst) + step).min(total);
    }
}

/// An ordinary task.
pub(crate) fn task(key: &str) -> NewTask {
    NewTask::new(key, "type", r#"{"n":1}"#)
}

/// A task of a user.
pub(crate) fn task_of(user: &str, key: &str, max_running: Option<u32>) -> NewTask {
    NewTask { user: Some(user.to_owned()), max_running, ..task(key) }
}

/// What follows an event, by the policy of the fixture.
pub(crate) fn settled(task: &ClaimedTask, event: Event) -> Settlement {
    let policy = Policy { backoff: Backoff::Fixed(Duration::ZERO), suspicion: Duration::ZERO, ..Policy::default() };
    settled_by(&policy, task, event)
}

/// What follows an event, by another policy.
pub(crate) fn settled_by(policy: &Policy, task: &ClaimedTask, event: Event) -> Settlement {
    Settlement::of(task.lease_ref, event, Attempt::of(task), policy, 0.5, None, Vec::new())
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
