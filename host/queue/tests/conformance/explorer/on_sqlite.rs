//! SQLite: an operation is one transaction, and only one process writes at a time. So two processes go one after the other, in both orders, and
//! at once, both having begun while a third keeps the file locked.

use std::sync::Arc;

use laelaps_queue::{Error, Queue};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::sync::oneshot;

use super::operation::{Outcome, Scene};
use super::schedule::Side;
use super::{Case, DRAWN, forget, is_full, judge, seed, tables};
use crate::fixture::{Database, Fixture, PATIENCE};

/// In which order.
#[derive(Clone, Copy, Debug)]
enum Way {
    First(Side),
    AtOnce,
}

struct Arena {
    fixture: Arc<Fixture>,
    processes: [Queue; 2],
    /// Keeps the file locked.
    third: SqliteConnection,
}

impl Arena {
    async fn open() -> Self {
        let fixture = Fixture::new(Database::Sqlite).await;
        let processes = [fixture.another().await, fixture.another().await];
        let options = SqliteConnectOptions::new().filename(fixture.path()).busy_timeout(PATIENCE);
        let third = SqliteConnection::connect_with(&options).await.expect("the file can be opened beside the queue");
        Self { fixture: Arc::new(fixture), processes, third }
    }

    async fn run(&mut self, scene: &Scene, case: Case, way: Way) -> [Result<Outcome, Error>; 2] {
        let act = |side: Side| scene.act(case.operations[side.place()], side, &self.processes[side.place()]);
        match way {
            Way::First(Side::Left) => [act(Side::Left).await, act(Side::Right).await],
            Way::First(Side::Right) => {
                let right = act(Side::Right).await;
                [act(Side::Left).await, right]
            }
            Way::AtOnce => self.at_once(scene, case).await,
        }
    }

    async fn at_once(&mut self, scene: &Scene, case: Case) -> [Result<Outcome, Error>; 2] {
        self.third.execute("BEGIN IMMEDIATE").await.expect("the file can be locked");
        let begin = |side: Side| {
            let (scene, queue, operation) = (scene.clone(), self.processes[side.place()].clone(), case.operations[side.place()]);
            let (begin, begun) = oneshot::channel();
            let acting = tokio::spawn(async move {
                // Nobody may wait for it any more.
                let _ = begin.send(());
                scene.act(operation, side, &queue).await
            });
            (acting, begun)
        };
        let [(left, left_begun), (right, right_begun)] = Side::BOTH.map(begin);
        left_begun.await.expect("it begins");
        right_begun.await.expect("it begins");
        self.third.execute("COMMIT").await.expect("the file can be unlocked");
        [left.await.expect("no panic"), right.await.expect("no panic")]
    }
}

/// Try cases in every way, with something planted in the file before. Answers how many schedules these were, and what went wrong.
pub(super) async fn explore(cases: impl Iterator<Item = Case>, plant: Option<&'static str>) -> (usize, Vec<String>) {
    let mut arena = Arena::open().await;
    let names: Vec<String> = sqlx::query_scalar(tables(Database::Sqlite)).fetch_all(&mut arena.third).await.expect("names");
    let forget = forget(Database::Sqlite, &names);
    if let Some(plant) = plant {
        arena.fixture.meddle(plant).await;
    }
    let mut wrong = Vec::new();
    let mut scenes = 0;
    for case in cases {
        for way in [Way::First(Side::Left), Way::First(Side::Right), Way::AtOnce] {
            scenes += 1;
            let [left, right] = &arena.processes;
            let (operations, place) = (case.operations, (case.place, case.with_user));
            let scene = Scene::set(&arena.fixture, [left, right], operations, scenes, place).await;
            let outcomes = arena.run(&scene, case, way).await;
            if let Err(problem) = judge(&arena.fixture, case, scene, &outcomes, true).await {
                wrong.push(format!("{case}, {way:?}: {problem}; {outcomes:?}"));
            }
            arena.third.execute(AssertSqlSafe(forget.clone())).await.expect("the tables can be emptied");
        }
    }
    (scenes, wrong)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_order_of_two_operations_makes_the_tables_disagree() {
    let seed = seed();
    let mut cases = Case::all(false);
    fastrand::Rng::with_seed(seed).shuffle(&mut cases);
    let drawn = if is_full() { cases.len() } else { DRAWN * 2 };
    let (scenes, wrong) = explore(Case::known(false).into_iter().chain(cases.into_iter().take(drawn)), None).await;
    println!("explorer of Sqlite: {scenes} schedules, LAELAPS_SEED={seed}");
    assert!(wrong.is_empty(), "LAELAPS_SEED={seed} repeats {wrong:#?}");
}
