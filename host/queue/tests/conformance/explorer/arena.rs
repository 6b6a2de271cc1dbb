//! Two processes on one database, each behind a gate, and the means to see that a statement waits for the other's lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{Connections, Error, Queue, Tls};
use laelaps_test_databases::gate::{Gate, InFlight, Protocol};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, PgConnection, Row};
use tokio::sync::watch;

use super::operation::{Operation, Outcome, Scene};
use super::schedule::{Schedule, Side};
use super::{forget, tables};
use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, PATIENCE, patient};

/// After this time without a sign a statement may wait for a lock: the server is asked.
const GRACE: Duration = Duration::from_millis(4);
/// Between two looks while nobody can go on.
const PAUSE: Duration = Duration::from_millis(2);
/// Statements of one schedule, so that one that never ends is noticed.
const STEPS_MAX: usize = 600;

/// The database, and both ways to it.
pub(super) struct Arena {
    pub(super) fixture: Arc<Fixture>,
    watcher: Watcher,
    /// What takes all tasks away.
    forget: String,
    sides: [Process; 2],
    /// Statements that one did while the other waited for a lock.
    pub(super) blocked: usize,
}

/// A process as the database sees it.
struct Process {
    gate: Gate,
    queue: Queue,
}

/// Asks the server who waits for a lock.
enum Watcher {
    Postgres(PgConnection),
    MariaDb(MySqlConnection),
}

/// How far one side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Its next statement is at the gate.
    Ready,
    /// The server keeps its last statement waiting for a lock.
    Blocked,
    /// The operation has ended.
    Ended,
}

/// What a schedule came to.
pub(super) struct Run {
    /// The statements in the order in which they were let go.
    pub(super) steps: Vec<(Side, String)>,
    pub(super) outcomes: [Result<Outcome, Error>; 2],
}

impl Run {
    /// The statements that each side did.
    pub(super) fn statements(&self) -> [usize; 2] {
        Side::BOTH.map(|side| self.steps.iter().filter(|(of, _)| *of == side).count())
    }
}

impl Arena {
    pub(super) async fn open(fixture: Fixture, database: Database) -> Self {
        let mut watcher = Watcher::open(&fixture, database).await;
        let forget = forget(database, &watcher.tables().await);
        let sides = [Process::open(&fixture, database).await, Process::open(&fixture, database).await];
        Self { fixture: Arc::new(fixture), watcher, forget, sides, blocked: 0 }
    }

    /// What the two processes have.
    pub(super) fn queues(&self) -> [&Queue; 2] {
        self.sides.each_ref().map(|side| &side.queue)
    }

    /// Let both operations do their statements in the order of the schedule.
    pub(super) async fn run(&mut self, scene: &Scene, operations: [Operation; 2], schedule: Schedule) -> Run {
        let begin = |side: Side| {
            let process = &self.sides[side.place()];
            process.gate.shut();
            let (scene, queue, operation) = (scene.clone(), process.queue.clone(), operations[side.place()]);
            let (end, ended) = watch::channel(false);
            let acting = tokio::spawn(async move {
                let outcome = scene.act(operation, side, &queue).await;
                end.send_replace(true);
                outcome
            });
            (acting, ended)
        };
        let [(left, left_ended), (right, right_ended)] = Side::BOTH.map(begin);
        let steps = self.step_through(schedule, [left_ended, right_ended]).await;
        Run { steps, outcomes: [left.await.expect("no panic"), right.await.expect("no panic")] }
    }

    async fn step_through(&mut self, mut schedule: Schedule, mut ended: [watch::Receiver<bool>; 2]) -> Vec<(Side, String)> {
        let mut steps = Vec::new();
        let mut begun = Instant::now();
        loop {
            let mut standings = [Standing::Ready; 2];
            for side in Side::BOTH {
                standings[side.place()] = self.standing(side, &mut ended[side.place()]).await;
            }
            if standings == [Standing::Ended; 2] {
                return steps;
            }
            self.blocked += usize::from(standings.contains(&Standing::Blocked) && standings.contains(&Standing::Ready));
            match schedule.next(standings.map(|standing| standing == Standing::Ready)) {
                Some(side) => {
                    let gate = &self.sides[side.place()].gate;
                    steps.extend(gate.let_one_go().map(|statement| (side, statement)));
                    assert!(steps.len() < STEPS_MAX, "there is no end to it: {steps:#?}");
                    begun = Instant::now();
                }
                // A deadlock, until the server has found it; or a lock that is about to be had.
                None => {
                    assert!(begun.elapsed() < PATIENCE, "nobody can go on, {standings:?}: {steps:#?}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Wait until a side is at its gate, at its end, or at a lock.
    async fn standing(&mut self, side: Side, ended: &mut watch::Receiver<bool>) -> Standing {
        let begun = Instant::now();
        let gate = &self.sides[side.place()].gate;
        let mut changes = gate.changes();
        loop {
            changes.mark_unchanged();
            if *ended.borrow() || ended.has_changed().is_err() {
                // What it still does in the background is nobody's turn.
                gate.open();
                return Standing::Ended;
            }
            let (is_waited_at, in_flight) = (gate.is_waited_at(), gate.in_flight());
            if is_waited_at && in_flight.is_empty() {
                return Standing::Ready;
            }
            assert!(begun.elapsed() < PATIENCE, "{side:?} does not get on: {in_flight:?}");
            let sign = async {
                tokio::select! { _ = changes.changed() => {}, _ = ended.changed() => {} }
            };
            let silent = tokio::time::timeout(GRACE, sign).await.is_err();
            if silent && !in_flight.is_empty() && self.watcher.sees_waiting(&in_flight).await {
                return if is_waited_at { Standing::Ready } else { Standing::Blocked };
            }
        }
    }

    /// One of the processes, and the gate before it.
    pub(super) fn process(&self) -> (&Gate, &Queue) {
        (&self.sides[0].gate, &self.sides[0].queue)
    }

    /// Take all tasks away.
    pub(super) async fn forget(&mut self) {
        let sql = AssertSqlSafe(self.forget.clone());
        let done = match &mut self.watcher {
            Watcher::Postgres(connection) => sqlx::raw_sql(sql).execute(connection).await.map(drop),
            Watcher::MariaDb(connection) => sqlx::raw_sql(sql).execute(connection).await.map(drop),
        };
        done.expect("the tables can be emptied");
    }

    /// What stands before each process.
    pub(super) fn gates(&self) -> impl Iterator<Item = &Gate> {
        self.sides.iter().map(|side| &side.gate)
    }

    pub(super) async fn close(self) {
        for side in self.sides {
            side.queue.close().await;
        }
    }
}

impl Process {
    async fn open(fixture: &Fixture, database: Database) -> Self {
        let url = &fixture.config.url;
        let (before, name) = url.rsplit_once('/').expect("a server's URL");
        let (before, port) = before.rsplit_once(':').expect("a server's URL");
        let protocol = if matches!(database, Database::Postgres) { Protocol::Postgres } else { Protocol::MySql };
        let gate = Gate::before(port.parse().expect("a port"), protocol).await;
        let connections = Connections { listen: false, max: 4, tls: Some(Tls::Disabled), ..patient() };
        let url = format!("{before}:{}/{name}", gate.port());
        let queue = Queue::open(&laelaps_queue::Config { url, connections, ..fixture.config.clone() }).await;
        Self { gate, queue: queue.expect("the database can be opened through a gate") }
    }
}

impl Watcher {
    async fn open(fixture: &Fixture, database: Database) -> Self {
        let url = &fixture.config.url;
        match database {
            Database::Sqlite => panic!("an embedded database has no statements to keep waiting"),
            Database::Postgres => Self::Postgres(raw(&fixture.config).await),
            Database::MariaDb => Self::MariaDb(MySqlConnection::connect(url).await.expect("the server lets us in")),
        }
    }

    async fn tables(&mut self) -> Vec<String> {
        let names = match self {
            Self::Postgres(connection) => sqlx::query_scalar(tables(Database::Postgres)).fetch_all(connection).await,
            Self::MariaDb(connection) => sqlx::query_scalar(tables(Database::MariaDb)).fetch_all(connection).await,
        };
        names.expect("tables have names")
    }

    /// Whether the server keeps one of these waiting for a lock.
    async fn sees_waiting(&mut self, in_flight: &[InFlight]) -> bool {
        match self {
            Self::Postgres(connection) => {
                const WAITING: &str = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid)
                    WHERE NOT granted AND client_port = ANY($1))";
                let ports: Vec<i32> = in_flight.iter().map(|statement| i32::from(statement.port)).collect();
                sqlx::query_scalar(WAITING).bind(ports).fetch_one(connection).await.expect("a superuser sees all locks")
            }
            Self::MariaDb(connection) => {
                // The tables of information_schema are as old as 100 ms, and older when asked again before.
                let status = sqlx::raw_sql("SHOW ENGINE INNODB STATUS").fetch_one(&mut *connection).await;
                let status: String = status.and_then(|row| row.try_get(2)).expect("a superuser sees the engine's status");
                let mut sessions = in_flight.iter().filter_map(|statement| statement.session);
                sessions.clone().any(|session| is_waiting(&status, session)) || {
                    // The lock of PerfectQueue's table is none of the engine's.
                    const LOCKS: &str = "SELECT id FROM information_schema.processlist WHERE state = 'User lock'";
                    let waiting = sqlx::query_scalar::<_, i64>(LOCKS).fetch_all(connection).await;
                    let waiting = waiting.expect("a superuser sees all sessions");
                    sessions.any(|session| waiting.contains(&i64::from(session)))
                }
            }
        }
    }
}

/// Whether InnoDB's status tells that a session waits for a lock.
pub(crate) fn is_waiting(status: &str, session: u32) -> bool {
    let name = format!("thread id {session},");
    status
        .split("\n---TRANSACTION ")
        .skip(1)
        .any(|transaction| transaction.contains(&name) && transaction.contains("\nLOCK WAIT "))
}
