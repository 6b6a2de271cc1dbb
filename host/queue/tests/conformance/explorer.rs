//! Explores what two processes do to each other's tasks at once: every pair of operations, on a task in every state, in the orders in which
//! their statements can come; after each the tables are compared with one another.
//!
//! On a server each process stands behind a gate that lets its statements go one by one (`laelaps_test_databases::gate`), so that an order is
//! what it says, whatever the machine does meanwhile. A statement that waits for a lock of the other process is told by the server, and the
//! other goes on. With few statements all orders are tried; else those with one switch from one to the other and back, and some at random.
//! On SQLite one process writes at a time, and an operation is one transaction: there the two go one after the other, and both at once.
//!
//! `tests/run` begins with the same seed each time and tries what was seen to matter, and a few of the rest; `tests/soak explore` tries every
//! pair, with a new seed (`LAELAPS_SCHEDULES=NUMBER`: at most so many schedules of each). A test that fails prints the seed, the pair and the
//! statements; `LAELAPS_SEED=NUMBER` repeats it.

mod answers;
mod arena;
mod on_sqlite;
mod operation;
mod planted;
mod schedule;

use std::fmt::{Display, Formatter};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;

use laelaps_queue::{Accepts, Claim, Settlement};

use self::arena::Arena;
pub(crate) use self::arena::is_waiting;
use self::operation::{Operation, Outcome, Place, Scene, contradiction};
use self::schedule::{Schedule, Side, orders};
use crate::fixture::{Database, Fixture, LONG, finish, settled};

/// With no more orders than this all are tried.
const ALL_ORDERS_MAX: usize = 70;
/// Schedules of one case at random, beside those with one switch: in `tests/soak explore`, and in `tests/run`.
const RANDOM_OF_CASE: [usize; 2] = [12, 2];
/// Cases that `tests/run` draws, and the schedules that it tries of each beside the serial ones.
const DRAWN: usize = 16;
const OF_DRAWN: usize = 3;
/// Of so many schedules one is worked off, which takes as long as the schedule.
const CALMED_EVERY: usize = 4;
/// Cases between two signs of life of a long run.
const TOLD_EVERY: usize = 100;

/// Two operations on a task in one state.
#[derive(Clone, Copy, Debug)]
struct Case {
    operations: [Operation; 2],
    place: Place,
    with_user: bool,
}

impl Case {
    /// Every case that is worth a look.
    fn all(of_perfectqueue: bool) -> Vec<Self> {
        let mut cases = Vec::new();
        for (number, left) in Operation::ALL.into_iter().enumerate() {
            let others = Operation::ALL[number..].iter().filter(|right| !of_perfectqueue || left.is_beside(**right));
            for right in others {
                let elsewhere = if of_perfectqueue { Place::Apart } else { Place::Damaged };
                let is_met = |place: &Place| left.meets(*place) && right.meets(*place) && *place != elsewhere;
                for place in Place::ALL.into_iter().filter(is_met) {
                    cases.extend([false, true].map(|with_user| Self { operations: [left, *right], place, with_user }));
                }
            }
        }
        cases
    }

    /// What was seen to go wrong once, or has the most to lose: tried in every run.
    fn known(of_perfectqueue: bool) -> Vec<Self> {
        if of_perfectqueue {
            let known = [
                ([Operation::Claim, Operation::Cancel], Place::Lost),
                ([Operation::Claim, Operation::Excuse], Place::Lost),
                ([Operation::Claim, Operation::Cancel], Place::Damaged),
                ([Operation::Claim, Operation::HandOn], Place::Ready),
            ];
            return known.map(|(operations, place)| Self { operations, place, with_user: false }).to_vec();
        }
        let due = [Operation::Cancel, Operation::Retry].map(|operation| ([operation, Operation::Claim], Place::Due));
        let others = [
            ([Operation::ForceFinish, Operation::Claim], Place::Ready),
            ([Operation::Claim, Operation::ClaimOfStranger], Place::Ready),
            ([Operation::Claim, Operation::ClaimOfStranger], Place::Apart),
            ([Operation::Cancel, Operation::Claim], Place::Apart),
            ([Operation::Retry, Operation::ClaimOfStranger], Place::Ready),
            ([Operation::Finish, Operation::Reclaim], Place::Overdue),
            ([Operation::Finish, Operation::HandOn], Place::Running),
            ([Operation::GiveSign, Operation::HandOn], Place::Running),
        ];
        due.into_iter().chain(others).map(|(operations, place)| Self { operations, place, with_user: true }).collect()
    }
}

/// Prints where it was if the test fails meanwhile.
struct Told(Case);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("explorer: while {}", self.0);
        }
    }
}

impl Display for Case {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { operations: [left, right], place, with_user } = self;
        write!(formatter, "{left:?} and {right:?} of a task that is {place:?}{}", if *with_user { ", of a user" } else { "" })
    }
}

/// Tries cases one after the other.
struct Explorer {
    arena: Arena,
    name: String,
    seed: u64,
    random: fastrand::Rng,
    scenes: usize,
    /// Cases that went wrong.
    wrong: Vec<String>,
}

impl Explorer {
    async fn begin(fixture: Fixture, database: Database) -> Self {
        let seed = seed();
        let name = if fixture.is_perfectqueue() { "PerfectQueue's table".to_owned() } else { format!("{database:?}") };
        println!("explorer of {name}: LAELAPS_SEED={seed}");
        Self {
            arena: Arena::open(fixture, database).await,
            name,
            seed,
            random: fastrand::Rng::with_seed(seed),
            scenes: 0,
            wrong: Vec::new(),
        }
    }

    /// One schedule of a case, from its scene to the audit. Answers how many statements each side did; None if something went wrong.
    async fn schedule(&mut self, case: Case, schedule: Schedule) -> Option<[usize; 2]> {
        let _told = Told(case);
        self.scenes += 1;
        let place = (case.place, case.with_user);
        let scene = Scene::set(&self.arena.fixture, self.arena.queues(), case.operations, self.scenes, place).await;
        let run = self.arena.run(&scene, case.operations, schedule).await;
        let problem = judge(&self.arena.fixture, case, scene, &run.outcomes, self.scenes.is_multiple_of(CALMED_EVERY)).await;
        self.arena.forget().await;
        let Err(problem) = problem else { return Some(run.statements()) };
        eprintln!("explorer: {case}: {problem}");
        for (side, statement) in &run.steps {
            eprintln!("  {side:?}: {statement}");
        }
        eprintln!("  {:?}; LAELAPS_SEED={} repeats it", run.outcomes, self.seed);
        self.wrong.push(format!("{case}: {problem}"));
        None
    }

    /// At most `most` schedules of a case: one after the other, then all orders, or all with one switch and some at random. Ends with the first
    /// that goes wrong.
    async fn case(&mut self, case: Case, most: usize) {
        let mut statements = [0, 0];
        for first in Side::BOTH {
            let Some(counted) = self.schedule(case, Schedule::serial(first)).await else { return };
            statements[first.place()] = counted[first.place()];
        }
        for schedule in self.schedules(statements).into_iter().take(most) {
            if self.schedule(case, schedule).await.is_none() {
                return;
            }
        }
    }

    fn schedules(&mut self, statements: [usize; 2]) -> Vec<Schedule> {
        if orders(statements, ALL_ORDERS_MAX + 1) <= ALL_ORDERS_MAX {
            let mut all = Schedule::all(statements);
            self.random.shuffle(&mut all);
            return all;
        }
        let switches = |side: Side| (1..statements[side.place()]).map(move |done| Schedule::one_switch(side, done));
        let mut schedules: Vec<Schedule> = Side::BOTH.into_iter().flat_map(switches).collect();
        self.random.shuffle(&mut schedules);
        let at_random = RANDOM_OF_CASE[usize::from(!is_full())];
        schedules.extend((0..at_random).map(|_| Schedule::random(statements, &mut self.random)));
        schedules
    }

    async fn end(self) {
        println!(
            "explorer of {}: {} schedules; {} statements while the other waited",
            self.name, self.scenes, self.arena.blocked
        );
        assert!(self.arena.blocked > 0, "no operation ever waited for the other: these were not at once");
        assert!(self.wrong.is_empty(), "LAELAPS_SEED={} repeats {:#?}", self.seed, self.wrong);
        self.arena.close().await;
    }
}

/// Both outcomes can be true and the tables agree with one another; `to_the_end`: and what waits can be claimed.
async fn judge(
    fixture: &Arc<Fixture>,
    case: Case,
    scene: Scene,
    outcomes: &[Result<Outcome, laelaps_queue::Error>; 2],
    to_the_end: bool,
) -> Result<(), String> {
    if let Some(contradiction) = contradiction(outcomes) {
        return Err(contradiction);
    }
    let mut found = fixture.backend().audit().await.unwrap();
    // What was damaged stays so until a claim meets it.
    found.retain(|finding| case.place != Place::Damaged || !finding.starts_with("compressed data can be read"));
    if !found.is_empty() {
        return Err(found.join("; "));
    }
    let fixture = Arc::clone(fixture);
    let judged = tokio::spawn(async move {
        fixture.audit().await;
        if to_the_end {
            calm(&fixture, &scene).await;
            fixture.audit().await;
        }
    });
    judged.await.map_err(|error| match error.into_panic().downcast::<String>() {
        Ok(words) => *words,
        Err(_) => "it panics".to_owned(),
    })
}

/// The host dies; claim what waits then, and finish it: what two operations left behind keeps nobody from it. One claim may only bring in what the
/// next one takes.
async fn calm(fixture: &Fixture, scene: &Scene) {
    const CLAIMS: usize = 4;
    fixture.backend().hand_on(&[scene.identity().to_owned()], &fixture.config.policy).await.unwrap();
    let host = fixture.host().await;
    let mut waiting = 1;
    for _ in 0..CLAIMS {
        // To PerfectQueue a task that waits for its time is one that runs, and its user's others wait.
        let ignore_users = fixture.is_perfectqueue();
        let accepts = Some(Accepts::new(|_| true));
        let claim = Claim { alone: true, ignore_users, accepts, ..Claim::new(host, 10, LONG) };
        let tasks = fixture.backend().claim(&claim).await.unwrap().tasks;
        let ends: Vec<Settlement> = tasks.iter().map(|task| settled(task, finish())).collect();
        fixture.backend().settle(&ends).await.unwrap();
        waiting = fixture.queue.stats().await.unwrap().ready;
        if waiting == 0 {
            return;
        }
    }
    panic!("{waiting} tasks wait that no claim finds");
}

/// Statements that answer the names of all tables.
pub(crate) fn tables(database: Database) -> &'static str {
    match database {
        Database::Sqlite => "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'",
        Database::Postgres => "SELECT tablename::text FROM pg_tables WHERE schemaname = 'laelaps'",
        Database::MariaDb => {
            "SELECT CAST(table_name AS CHAR) FROM information_schema.tables WHERE table_schema = database() AND table_type = 'BASE TABLE'"
        }
    }
}

/// Takes all that follows from tasks away; numbers go on.
fn forget(database: Database, tables: &[String]) -> String {
    const STAY: [&str; 4] = ["schema", "migration", "counter", "plugin_version"];
    let mut statements = match database {
        Database::Sqlite => "BEGIN IMMEDIATE; ".to_owned(),
        Database::Postgres | Database::MariaDb => "BEGIN; ".to_owned(),
    };
    for table in tables.iter().filter(|table| !STAY.iter().any(|stays| table.contains(stays))) {
        // The account of the tasks without user stays.
        let which = if table == "laelaps_account" { " WHERE user <> ''" } else { "" };
        statements.push_str(&format!("DELETE FROM {table}{which}; "));
    }
    statements + "COMMIT"
}

#[expect(clippy::disallowed_methods, reason = "tests read what tests/run sets")]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Whether this is `tests/soak explore`.
pub(crate) fn is_full() -> bool {
    variable("LAELAPS_SCALE").is_some_and(|scale| scale == "full")
}

/// A run of the suite tries the same each time: what it finds is somebody's change. A soak looks for what nobody has seen.
pub(crate) fn seed() -> u64 {
    let asked =
        variable("LAELAPS_SEED").map(|seed| seed.parse().unwrap_or_else(|error| panic!("LAELAPS_SEED is {seed:?}: {error}")));
    asked.unwrap_or_else(|| if is_full() { RandomState::new().hash_one("explorer") >> 16 } else { 1 })
}

async fn explore(fixture: Fixture, database: Database) {
    let of_perfectqueue = fixture.is_perfectqueue();
    let mut explorer = Explorer::begin(fixture, database).await;
    for case in Case::known(of_perfectqueue) {
        explorer.case(case, usize::MAX).await;
    }
    let mut cases = Case::all(of_perfectqueue);
    explorer.random.shuffle(&mut cases);
    let most = variable("LAELAPS_SCHEDULES").map_or(usize::MAX, |most| most.parse().expect("LAELAPS_SCHEDULES is a number"));
    // Times there are whole seconds, and a scene may have to wait for the next.
    let few = if of_perfectqueue { DRAWN / 2 } else { DRAWN };
    let (drawn, schedules) = if is_full() { (cases.len(), most) } else { (few, OF_DRAWN) };
    for (number, case) in cases.into_iter().take(drawn).enumerate() {
        if number % TOLD_EVERY == 0 {
            println!("explorer of {}: {number} of {drawn} cases, {} schedules", explorer.name, explorer.scenes);
        }
        explorer.case(case, schedules).await;
    }
    explorer.end().await;
}

mod on_postgres {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_order_of_two_operations_makes_the_tables_disagree() {
        super::explore(super::Fixture::new(super::Database::Postgres).await, super::Database::Postgres).await;
    }
}

mod on_mariadb {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_order_of_two_operations_makes_the_tables_disagree() {
        super::explore(super::Fixture::new(super::Database::MariaDb).await, super::Database::MariaDb).await;
    }
}

/// Its lease is its own process's, and its lock the server's; the rest is as it is on MariaDB.
mod on_perfectqueue {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_order_of_two_operations_makes_the_tables_disagree() {
        super::explore(super::Fixture::perfectqueue().await, super::Database::MariaDb).await;
    }
}
