//! The database of a run, and what is done to it.

mod perfectqueue;

pub(super) use self::perfectqueue::number_by_moment;

use std::path::Path;
use std::time::Duration;

use laelaps_queue::{Backend, Error, TaskId};
use laelaps_test_databases::gate::{Gate, Protocol};
use laelaps_test_databases::{Clock, Going, PATIENCE, Replication, mariadb, postgres};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Executor, MySqlConnection, PgConnection};

use super::fault::Worker;
use super::history::{Answer, Asked, Recorder, history_of};
use super::worker::Orders;
use super::{Database, Fixture};

/// The database of a run.
pub(super) struct Place {
    pub(super) database: Database,
    /// For those in whose way no fault is put. It leads to the primary, whichever that is.
    pub(super) url: String,
    fixture: Fixture,
    server: Server,
    gate: Option<Gate>,
    clock: Option<Clock>,
}

/// A server with one that can take its place. They may be killed, since no other test uses them.
enum Server {
    None,
    Postgres(Box<postgres::Pair>),
    MariaDb(Box<mariadb::Pair>),
}

impl Place {
    /// A database, with a clock that can be set if a replica never takes the primary's place without what it had.
    pub(super) async fn make(database: Database, replication: Replication) -> Self {
        let clock = (replication == Replication::Synchronous).then(Clock::right);
        let (url, server) = match database {
            Database::Sqlite => (None, Server::None),
            Database::Postgres => {
                let pair = postgres::Pair::start(replication, clock.as_ref()).await;
                (Some(pair.primary().create_database().await), Server::Postgres(Box::new(pair)))
            }
            Database::MariaDb => {
                let pair = Box::pin(mariadb::Pair::start(replication, clock.as_ref())).await;
                (Some(pair.create_database().await), Server::MariaDb(Box::new(pair)))
            }
        };
        let gate = match server.port() {
            Some((port, protocol)) => Some(Gate::before(port, protocol).await),
            None => None,
        };
        let fixture = match (url, &gate) {
            (Some(url), Some(gate)) => Fixture::on(database, through(&url, gate)).await,
            _ => Fixture::new(database).await,
        };
        Self { database, url: fixture.config.url.clone(), fixture, server, gate, clock }
    }

    /// In words.
    pub(super) fn name(&self) -> String {
        if self.fixture.is_perfectqueue() { "PerfectQueue's table".to_owned() } else { format!("{:?}", self.database) }
    }

    pub(super) fn backend(&self) -> &dyn Backend {
        self.fixture.backend().as_ref()
    }

    /// One more way to the server, if there is one.
    pub(super) async fn gate(&self) -> Option<Gate> {
        let (port, protocol) = self.server.port()?;
        Some(Gate::before(port, protocol).await)
    }

    /// What a worker is to have in its environment: without a server its own clock is the queue's.
    pub(super) fn environment(&self) -> Vec<(String, String)> {
        match (&self.server, &self.clock) {
            (Server::None, Some(clock)) => clock.environment(),
            _ => Vec::new(),
        }
    }

    pub(super) fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    /// Set the queue's clock to so many seconds ahead of ours.
    pub(super) fn set_clock(&self, ahead_seconds: i64, recorder: &Recorder) {
        let clock = self.clock.as_ref().expect("a place with a clock");
        let asking = recorder.ask(Asked::Clock(ahead_seconds * 1_000));
        clock.set(ahead_seconds);
        asking.answered(Answer::Done);
    }

    /// Let the replica take the primary's place, and lead everybody there.
    pub(super) async fn promote(&mut self, going: Going, gates: &[Gate]) {
        match &mut self.server {
            Server::None => {}
            Server::Postgres(pair) => pair.promote(going).await,
            Server::MariaDb(pair) => pair.promote(going).await,
        }
        let (port, _) = self.server.port().expect("a server");
        gates.iter().chain(&self.gate).for_each(|gate| gate.lead_to(port));
    }

    /// Make the former primary the replica.
    pub(super) async fn rejoin(&mut self) {
        match &mut self.server {
            Server::None => {}
            Server::Postgres(pair) => pair.rejoin().await,
            Server::MariaDb(pair) => pair.rejoin().await,
        }
    }

    /// From now on the replica misses everything.
    pub(super) async fn fall_behind(&self) {
        match &self.server {
            Server::None => {}
            Server::Postgres(pair) => pair.fall_behind().await,
            Server::MariaDb(pair) => pair.fall_behind().await,
        }
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
            environment: self.environment(),
        };
        (0..count).map(|number| Worker::start(orders(number))).collect()
    }

    pub(super) async fn restart(&mut self) {
        match &mut self.server {
            Server::None => {}
            Server::Postgres(pair) => pair.restart().await,
            Server::MariaDb(pair) => pair.restart().await,
        }
    }

    /// A producer stores tasks of these keys, and takes its time; then it changes its mind.
    pub(super) async fn hold(&self, keys: &[String], time: Duration) {
        if self.fixture.is_perfectqueue() {
            return self.hold_rows(keys, time).await;
        }
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
                    let submit = sqlx::query("CALL laelaps_submit(?, 'chaos', '{}', NULL)").bind(key);
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
    pub(super) async fn damage(&self, keys: &[String], histories: &Path) {
        note_damage(keys, histories);
        let keys = serde_json::to_string(keys).expect("JSON");
        if self.fixture.is_perfectqueue() {
            return self.damage_rows(&keys).await;
        }
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
    pub(super) async fn has_unreadable_rows(&self) -> bool {
        match self.database {
            Database::Sqlite => {
                let known = self.fixture.backend().get_by_id(TaskId(0)).await;
                // Before tasks could be named by number, one such row stopped every claim.
                !matches!(known, Err(Error::NotSupported { .. }))
            }
            Database::Postgres => false,
            // Texts are texts in PerfectQueue's table.
            Database::MariaDb => !self.fixture.is_perfectqueue(),
        }
    }

    /// Make the rows of these tasks such that nobody can read them, of those that still wait.
    pub(super) async fn spoil(&self, keys: &[String], histories: &Path) {
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

/// The same database, through this gate.
pub(super) fn through(url: &str, gate: &Gate) -> String {
    let (before, name) = url.rsplit_once('/').expect("a server's URL");
    let (before, _) = before.rsplit_once(':').expect("a server's URL");
    format!("{before}:{}/{name}", gate.port())
}

impl Server {
    /// The primary's.
    fn port(&self) -> Option<(u16, Protocol)> {
        match self {
            Self::None => None,
            Self::Postgres(pair) => Some((pair.primary().port(), Protocol::Postgres)),
            Self::MariaDb(pair) => Some((pair.primary().port(), Protocol::MySql)),
        }
    }
}
