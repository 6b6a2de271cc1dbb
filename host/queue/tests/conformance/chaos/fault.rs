//! What goes wrong in a run, and where.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use laelaps_queue::{Error, TaskId};
use laelaps_test_databases::gate::{Gate, Protocol};
use laelaps_test_databases::{Durability, PATIENCE, mariadb, postgres};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Executor, MySqlConnection, PgConnection};
use tokio::process::{Child, Command};

use super::history::{Answer, Asked, Recorder};
use super::worker::{Orders, history_of};
use super::{Database, FAULT_MAX, Fixture};

/// Workers at once.
const WORKERS: usize = 3;

/// The database of a run.
pub(super) struct Place {
    database: Database,
    /// For those in whose way no fault is put.
    pub(super) url: String,
    fixture: Fixture,
    server: Server,
}

/// A server that may be killed, since no other test uses it.
enum Server {
    None,
    Postgres(Box<postgres::Server>),
    MariaDb(Box<mariadb::Server>),
}

impl Place {
    pub(super) async fn make(database: Database) -> Self {
        let (url, server) = match database {
            Database::Sqlite => (None, Server::None),
            Database::Postgres => {
                let server = postgres::Server::start(Durability::Process).await;
                (Some(server.create_database().await), Server::Postgres(Box::new(server)))
            }
            Database::MariaDb => {
                let server = Box::pin(mariadb::Server::start(Durability::Process)).await;
                (Some(server.create_database().await), Server::MariaDb(Box::new(server)))
            }
        };
        let fixture = match url {
            Some(url) => Fixture::on(database, url).await,
            None => Fixture::new(database).await,
        };
        Self { database, url: fixture.config.url.clone(), fixture, server }
    }

    /// Everything that follows from something else is what it should be.
    pub(super) async fn audit(&self) {
        self.fixture.audit().await;
        let found = self.fixture.backend().audit().await.expect("the tables can be compared");
        assert!(found.is_empty(), "the audit finds {found:#?}");
    }

    /// Workers with nothing between them and the database.
    pub(super) fn workers(&self, histories: &Path, name: &str, count: usize) -> Vec<Worker> {
        let orders = |number: usize| Orders {
            url: self.url.clone(),
            history: histories.to_path_buf(),
            name: format!("{name}-{number}"),
            seed: u64::try_from(number).expect("a small number"),
            submits: false,
        };
        (0..count).map(|number| Worker::start(orders(number))).collect()
    }

    async fn restart(&mut self) {
        match &mut self.server {
            Server::None => {}
            Server::Postgres(server) => {
                server.kill();
                server.restart().await;
            }
            Server::MariaDb(server) => {
                server.kill();
                server.restart().await;
            }
        }
    }

    /// A producer stores tasks of these keys, and takes its time; then it changes its mind.
    async fn hold(&self, keys: &[String], time: Duration) {
        match self.database {
            Database::Sqlite => {
                let options = SqliteConnectOptions::new().filename(self.fixture.path()).busy_timeout(PATIENCE);
                let mut producer = SqliteConnection::connect_with(&options).await.expect("the file can be opened");
                producer.execute("BEGIN IMMEDIATE").await.expect("the file can be locked");
                tokio::time::sleep(time).await;
                producer.execute("ROLLBACK").await.expect("what was not done can be taken back");
            }
            Database::Postgres => {
                let mut producer = PgConnection::connect(&self.url).await.expect("the server lets us in");
                producer.execute("BEGIN").await.expect("a transaction begins");
                for key in keys {
                    let submit = sqlx::query("SELECT laelaps.submit($1, 'chaos')").bind(key);
                    submit.execute(&mut producer).await.expect("a producer may submit");
                }
                tokio::time::sleep(time).await;
                producer.execute("ROLLBACK").await.expect("what was done can be taken back");
            }
            Database::MariaDb => {
                let mut producer = MySqlConnection::connect(&self.url).await.expect("the server lets us in");
                producer.execute("START TRANSACTION").await.expect("a transaction begins");
                for key in keys {
                    let submit = sqlx::query("CALL laelaps_submit(?, 'chaos', '{}', NULL, NULL, NULL, NULL)").bind(key);
                    submit.execute(&mut producer).await.expect("a producer may submit");
                }
                tokio::time::sleep(time).await;
                producer.execute("ROLLBACK").await.expect("what was done can be taken back");
            }
        }
    }
}

impl Place {
    /// Write nonsense where the data of these tasks is, of those that still wait.
    async fn damage(&self, keys: &[String], histories: &Path) {
        note_damage(keys, histories);
        let keys = serde_json::to_string(keys).expect("JSON");
        match self.database {
            Database::Sqlite => {
                const DAMAGE: &str = "UPDATE task_data SET data = 'oops' WHERE task IN
                    (SELECT id FROM task WHERE state = 'waiting' AND key IN (SELECT value FROM json_each(?)))";
                let options = SqliteConnectOptions::new().filename(self.fixture.path()).busy_timeout(PATIENCE);
                let mut somebody = SqliteConnection::connect_with(&options).await.expect("the file can be opened");
                sqlx::query(DAMAGE).bind(keys).execute(&mut somebody).await.expect("the file can be written");
            }
            Database::Postgres => {
                const DAMAGE: &str = "UPDATE laelaps.task SET data = 'oops' WHERE id = ANY(ARRAY(SELECT id FROM laelaps.task
                    WHERE state = 'waiting' AND key IN (SELECT json_array_elements_text($1::json)) FOR UPDATE SKIP LOCKED))";
                let mut somebody = PgConnection::connect(&self.url).await.expect("the server lets us in");
                sqlx::query(DAMAGE).bind(keys).execute(&mut somebody).await.expect("a superuser may write");
            }
            Database::MariaDb => {
                const DAMAGE: &str = "UPDATE laelaps_task_data SET data = 'oops' WHERE task IN (SELECT id FROM laelaps_task
                    WHERE state = 'waiting' AND JSON_CONTAINS(?, JSON_QUOTE(CONVERT(`key` USING utf8mb4))))";
                let mut somebody = MySqlConnection::connect(&self.url).await.expect("the server lets us in");
                let damaged = sqlx::query(DAMAGE).bind(keys).execute(&mut somebody).await;
                // Others may be in the way.
                assert!(damaged.is_ok() || damaged.is_err_and(|error| error.as_database_error().is_some()));
            }
        }
    }
}

impl Place {
    /// Whether rows are met that nobody can read. Where texts and numbers are what they are declared to be, there are none.
    async fn has_unreadable_rows(&self) -> bool {
        match self.database {
            Database::Sqlite => {
                let known = self.fixture.backend().get_by_id(TaskId(0)).await;
                // Before tasks could be named by number, one such row stopped every claim.
                !matches!(known, Err(Error::NotSupported { .. }))
            }
            Database::Postgres => false,
            Database::MariaDb => true,
        }
    }

    /// Make the rows of these tasks such that nobody can read them, of those that still wait.
    async fn spoil(&self, keys: &[String], histories: &Path) {
        note_damage(keys, histories);
        for key in keys {
            match self.database {
                Database::Sqlite => {
                    const SPOIL: &str =
                        "UPDATE task SET key = CAST(CAST(key AS BLOB) || x'ff' AS TEXT) WHERE key = ? AND state = 'waiting'";
                    let options = SqliteConnectOptions::new().filename(self.fixture.path()).busy_timeout(PATIENCE);
                    let mut somebody = SqliteConnection::connect_with(&options).await.expect("the file can be opened");
                    sqlx::query(SPOIL).bind(key).execute(&mut somebody).await.expect("the file can be written");
                }
                Database::Postgres => {}
                Database::MariaDb => {
                    const SPOIL: &str =
                        "UPDATE laelaps_task SET `key` = CONCAT(`key`, x'ff') WHERE `key` = ? AND state = 'waiting'";
                    let mut somebody = MySqlConnection::connect(&self.url).await.expect("the server lets us in");
                    let spoilt = sqlx::query(SPOIL).bind(key.as_bytes()).execute(&mut somebody).await;
                    // Others may be in the way.
                    assert!(spoilt.is_ok() || spoilt.is_err_and(|error| error.as_database_error().is_some()));
                }
            }
        }
    }
}

/// From now on nobody may be able to read these tasks.
fn note_damage(keys: &[String], histories: &Path) {
    let recorder = Recorder::new(&history_of(histories, "damage"));
    for key in keys {
        recorder.ask(Asked::Damage(key.clone())).answered(Answer::Done);
    }
}

/// A worker that can be killed.
pub(super) struct Worker {
    child: Child,
    orders: Orders,
}

impl Worker {
    fn start(orders: Orders) -> Self {
        Self { child: orders.start(), orders }
    }

    /// Let it end by itself.
    pub(super) async fn stop(&mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().await.expect("a child ends");
        assert!(status.success(), "worker {} ended with {status}", self.orders.name);
    }

    async fn kill(&mut self) {
        let history = history_of(&self.orders.history, &self.orders.name);
        Recorder::beside(&history).dies();
        self.child.kill().await.expect("a child can be killed");
    }

    async fn signal(&self, signal: &str) {
        let process = self.child.id().expect("it runs").to_string();
        let sent = Command::new("kill").args([signal, &process]).status().await.expect("kill is there");
        assert!(sent.success(), "kill {signal} {process}");
    }
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    /// Kill it, and have it taken for dead at once, as a watchdog does.
    HandOn,
    Stop,
    /// Its connections go silent.
    Cut,
    /// The answers to its commits do not arrive.
    Swallow,
    Restart,
    /// A producer holds what workers want to write.
    Hold,
    /// Somebody writes nonsense into tasks' data.
    Damage,
    /// Somebody makes rows that cannot be read.
    Spoil,
}

/// Workers, what stands between them and the database, and what went wrong so far.
pub(super) struct Faults {
    histories: PathBuf,
    random: fastrand::Rng,
    workers: Vec<Worker>,
    gates: Vec<Gate>,
    started: usize,
    done: BTreeMap<Fault, usize>,
    /// Those of the current round.
    next: Vec<Fault>,
    /// Rows may be made such that nobody can read them.
    spoils: bool,
}

impl Faults {
    pub(super) async fn begin(place: &Place, histories: &Path, random: fastrand::Rng) -> Self {
        let histories = histories.to_path_buf();
        let (done, next) = (BTreeMap::new(), Vec::new());
        let spoils = place.has_unreadable_rows().await;
        let mut faults = Self { histories, random, workers: Vec::new(), gates: Vec::new(), started: 0, done, next, spoils };
        for number in 0..WORKERS {
            if let Some((port, protocol)) = place.server.port() {
                faults.gates.push(Gate::before(port, protocol).await);
            }
            let worker = faults.start(place, number);
            faults.workers.push(worker);
        }
        faults
    }

    /// A new worker behind this gate.
    fn start(&mut self, place: &Place, number: usize) -> Worker {
        self.started += 1;
        let url = match self.gates.get(number) {
            Some(gate) => {
                let (before, name) = place.url.rsplit_once('/').expect("a server's URL");
                let (before, _) = before.rsplit_once(':').expect("a server's URL");
                format!("{before}:{}/{name}", gate.port())
            }
            None => place.url.clone(),
        };
        let orders = Orders {
            url,
            history: self.histories.clone(),
            name: format!("w{}", self.started),
            seed: self.random.u64(..),
            submits: true,
        };
        Worker::start(orders)
    }

    /// Each comes once before one comes again.
    fn draw(&mut self) -> Fault {
        if self.next.is_empty() {
            self.next = vec![Fault::Kill, Fault::HandOn, Fault::Stop, Fault::Hold, Fault::Damage];
            if !self.gates.is_empty() {
                self.next.extend([Fault::Cut, Fault::Swallow, Fault::Restart]);
            }
            self.next.extend(self.spoils.then_some(Fault::Spoil));
            self.random.shuffle(&mut self.next);
        }
        self.next.pop().expect("there are some")
    }

    /// Let something go wrong, and be well again.
    pub(super) async fn one(&mut self, place: &mut Place, submitted: usize) {
        let fault = self.draw();
        *self.done.entry(fault).or_default() += 1;
        let number = self.random.usize(..WORKERS);
        let time = FAULT_MAX.mul_f64(self.random.f64());
        match fault {
            Fault::Kill | Fault::HandOn => {
                self.workers[number].kill().await;
                if fault == Fault::HandOn {
                    let identity = self.workers[number].orders.name.clone();
                    let policy = super::config("").policy;
                    // The leases of what is not handed on run out.
                    let _ = place.fixture.backend().hand_on(&[identity], &policy).await;
                }
                self.workers[number] = self.start(place, number);
            }
            Fault::Stop => {
                self.workers[number].signal("-STOP").await;
                tokio::time::sleep(time).await;
                self.workers[number].signal("-CONT").await;
            }
            Fault::Cut => {
                self.gates[number].cut();
                tokio::time::sleep(time).await;
                self.gates[number].mend();
            }
            Fault::Swallow => {
                // PostgreSQL's claims are statements of their own.
                let words = ["COMMIT", "WITH"][usize::from(matches!(place.database, Database::Postgres) && self.random.bool())];
                self.gates[number].swallow(Some(words));
                tokio::time::sleep(time / 4).await;
                self.gates[number].swallow(None);
            }
            Fault::Restart => place.restart().await,
            Fault::Hold => {
                let keys: Vec<String> = (0..20).map(|_| format!("k{}+", self.random.u32(..1_000))).collect();
                place.hold(&keys, time).await;
            }
            Fault::Damage => {
                // Most have ended by now; all the same the key is noted before.
                let keys: Vec<String> = (0..20).map(|number| format!("k{}", submitted.saturating_sub(number))).collect();
                place.damage(&keys, &self.histories).await;
            }
            Fault::Spoil => {
                let keys: Vec<String> = (0..4).map(|number| format!("k{}", submitted.saturating_sub(number))).collect();
                place.spoil(&keys, &self.histories).await;
            }
        }
    }

    /// No more faults, and no more workers.
    pub(super) async fn end(&mut self) {
        for worker in &mut self.workers {
            worker.stop().await;
        }
    }

    /// What went wrong, in words.
    pub(super) fn told(&self) -> String {
        let swallowed: usize = self.gates.iter().map(Gate::swallowed).sum();
        format!("{:?}, {swallowed} answers swallowed", self.done)
    }
}

impl Server {
    fn port(&self) -> Option<(u16, Protocol)> {
        match self {
            Self::None => None,
            Self::Postgres(server) => Some((server.port(), Protocol::Postgres)),
            Self::MariaDb(server) => Some((server.port(), Protocol::MySql)),
        }
    }
}
