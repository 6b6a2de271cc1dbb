//! A queue of a test's own, on a machine that no other test of this program uses meanwhile.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Attempt, Claim, ClaimedTask, Config, Connections, Event, HostDescription, LeaseAnswer, Policy, Queue, Settlement,
};
use laelaps_test_databases::{LONG, PATIENCE, mariadb, postgres};
use tempfile::TempDir;
use tokio::sync::{Mutex, MutexGuard};

/// Whose turn it is.
static TURN: Mutex<()> = Mutex::const_new(());

#[derive(Clone, Copy)]
pub(crate) enum Database {
    Sqlite,
    Postgres,
    MariaDb,
}

/// One test's time with the machine.
pub(crate) struct Turn {
    database: Database,
    _turn: MutexGuard<'static, ()>,
}

pub(crate) struct Site {
    pub(crate) queue: Queue,
    pub(crate) url: String,
    _folder: Option<TempDir>,
}

impl Turn {
    pub(crate) async fn on(database: Database) -> Self {
        Self { database, _turn: TURN.lock().await }
    }

    /// An empty queue.
    pub(crate) async fn site(&self) -> Site {
        let (url, folder) = match self.database {
            Database::Sqlite => {
                let folder = TempDir::new().expect("a temporary folder can be made");
                (format!("sqlite:{}", folder.path().join("queue.db").display()), Some(folder))
            }
            Database::Postgres => (postgres::shared().await.create_database().await, None),
            Database::MariaDb => (mariadb::shared().await.create_database().await, None),
        };
        // Time limits that no busy machine reaches.
        let connections = Connections { connect_timeout: PATIENCE, statement_timeout: LONG, ..Connections::default() };
        let config = Config { connections, patience: LONG, ..Config::new(url.as_str()) };
        let queue = Queue::open(&config).await.expect("the database can be opened");
        queue.init().await.expect("an empty database can be initialised");
        Site { queue, url, _folder: folder }
    }
}

impl Site {
    pub(crate) async fn claim_of(&self, limit: u32, ignore_users: bool) -> Claim {
        let description = HostDescription { name: "scale".to_owned(), process_id: std::process::id(), identity: None };
        let host = self.queue.backend().register_host(&description).await.expect("the queue answers");
        Claim { ignore_users, ..Claim::new(host, limit, Duration::from_secs(3_600)) }
    }

    pub(crate) async fn claim(&self, claim: &Claim) -> Vec<ClaimedTask> {
        self.queue.backend().claim(claim).await.expect("the queue answers").tasks
    }

    /// Finish tasks, whose leases hold.
    pub(crate) async fn finish(&self, tasks: &[ClaimedTask]) {
        let policy = Policy::default();
        let event = Event::Finish { output: None, retention: None };
        let settle =
            |task: &ClaimedTask| Settlement::of(task.lease_ref, event.clone(), Attempt::of(task), &policy, 0.0, None, Vec::new());
        let group: Vec<Settlement> = tasks.iter().map(settle).collect();
        let answers = self.queue.backend().settle(&group).await.expect("the queue answers");
        assert!(answers.iter().all(|answer| *answer == LeaseAnswer::Held));
    }

    /// What a host does every second.
    pub(crate) async fn enter_changes(&self) {
        self.queue.backend().reclaim(&Policy::default()).await.expect("the queue answers");
    }
}

/// The median times of two things, done several times in turn, so that whatever else slows the machine down slows down both.
pub(crate) async fn medians_of(times: usize, mut one: impl AsyncFnMut(), mut other: impl AsyncFnMut()) -> (Duration, Duration) {
    let (mut of_one, mut of_other) = (Vec::with_capacity(times), Vec::with_capacity(times));
    for _ in 0..times {
        let begun = Instant::now();
        one().await;
        of_one.push(begun.elapsed());
        let begun = Instant::now();
        other().await;
        of_other.push(begun.elapsed());
    }
    (median(&mut of_one), median(&mut of_other))
}

/// The median of at least one time.
pub(crate) fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
