//! Worker processes that are killed and stopped, connections that go silent or lose the answer to a commit, servers that are killed or give way to
//! their replicas, clocks that step, producers that hold keys: in any mix, and none of it may lose a task, give one to two, or accept a stale write.
//! A replica that has not got what came last loses it, and still no lease is given out twice and no stale write accepted.
//!
//! Everything that a process asks and hears is written down ([`history`]), and must be what a queue that keeps its promises can answer
//! ([`checker`]; [`planted`] shows that it finds what it is there for). In the end the tables are compared with one another as well.
//!
//! `tests/run` does some seconds of it, with the same faults each time; `tests/soak chaos` does 1,000,000 tasks on each database (or `LAELAPS_TASKS`),
//! with a new seed. `LAELAPS_SEED=NUMBER` repeats the faults and their order; what the workers were doing just then is theirs.

mod checker;
mod clock;
mod fault;
mod history;
mod place;
mod planted;
mod worker;

use std::time::{Duration, Instant};

use laelaps_queue::{Error, Filter, NewTask, Queue};
use laelaps_test_databases::{LONG, Replication, eventually};
use tempfile::TempDir;

use self::checker::check;
use self::fault::Faults;
use self::history::{Answer, Asked, Left, Operation, Recorder, history_of, read};
use self::place::Place;
use self::worker::{config, new_task, submit};
use crate::explorer::{is_full, seed, variable};
use crate::fixture::{Database, Fixture};

/// Tasks that producers submit.
const TASKS: usize = 1_000;
const TASKS_FULL: usize = 1_000_000;
/// A fault for so many tasks: at full size 125, most of them over within two seconds.
const TASKS_OF_FAULT: usize = 8_000;
/// Tasks of a run that loses some.
const TASKS_LOST: usize = 300;
/// The task that is lost for sure.
const LOST: &str = "lost";
/// The fewest faults of a run in which nothing may be lost.
const FAULTS_MIN: usize = 12;
/// Tasks of one submit.
const BATCH: usize = 50;
/// Tasks ended by hand in one part of a run.
const BY_HAND: usize = 3;

/// The producer, and the operator: the test's own process, which nobody kills.
struct Producer {
    queue: Queue,
    recorder: Recorder,
    random: fastrand::Rng,
    next: usize,
}

impl Producer {
    async fn submit(&mut self, count: usize) {
        let mut keys: Vec<String> = (self.next..self.next + count).map(|number| format!("k{number}")).collect();
        self.next += count;
        while !keys.is_empty() {
            let rest = keys.split_off(keys.len().min(BATCH));
            let batch: Vec<NewTask> = keys.into_iter().map(|key| new_task(key, &mut self.random)).collect();
            // A good producer submits again until it is told.
            eventually(LONG, "tasks are submitted", async || {
                submit(&self.recorder, self.queue.backend().as_ref(), &batch).await.map_err(|error| error.to_string())
            })
            .await;
            keys = rest;
        }
    }

    /// Wait until about so many tasks are left, so that each fault meets work under way.
    async fn wait_for_work_to_get_on(&self, left: usize) {
        eventually(LONG, "the work gets on", async || {
            let stats = self.queue.stats().await.map_err(|error| error.to_string())?;
            if usize::try_from(stats.ready).is_ok_and(|ready| ready <= left) { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
    }

    /// End or revive some tasks, whatever they are doing.
    async fn meddle(&mut self) {
        let (backend, retention) = (self.queue.backend(), config("").policy.retention);
        for _ in 0..BY_HAND {
            let key = format!("k{}", self.random.usize(..self.next));
            let (asked, done) = match self.random.u32(..3) {
                0 => (Asked::Cancel(key.clone()), backend.cancel(&key, retention)),
                1 => (Asked::ForceFinish(key.clone()), backend.force_finish(&key, retention)),
                _ => (Asked::Retry(key.clone()), backend.retry(&key)),
            };
            let asking = self.recorder.ask(asked);
            let done = done.await;
            asking.answered(match done {
                Ok(()) => Answer::Done,
                Err(error) if error.is_about_the_request() => Answer::Refused,
                Err(_) => Answer::Unknown,
            });
        }
    }
}

/// How many tasks a run has.
fn size() -> usize {
    let tasks = variable("LAELAPS_TASKS").map(|tasks| tasks.parse().expect("LAELAPS_TASKS is a number"));
    tasks.unwrap_or(if is_full() { TASKS_FULL } else { TASKS })
}

/// Nothing is lost with a server, whoever takes its place.
async fn chaos(making: impl Future<Output = Place>) {
    let (place, history, left) = run(making, Replication::Synchronous, size()).await;
    let name = place.name();
    let begun = Instant::now();
    let wrong = check(&history, &left);
    assert!(wrong.is_empty(), "LAELAPS_SEED repeats the faults; {} operations show {wrong:#?}", history.len());
    let checked = begun.elapsed().as_secs_f64();
    let Told { claimed, refused, unheard } = Told::of(&history);
    println!(
        "chaos on {name}: {} operations, {unheard} without an answer; {claimed} attempts, {refused} writes refused",
        history.len()
    );
    assert!(claimed > left.len() && refused > 0 && unheard > 0, "nothing came of the faults");
    place.audit().await;
    println!("chaos on {name}: checked in {checked:.1} s, audited in {:.1} s", begun.elapsed().as_secs_f64() - checked);
}

/// What a replica has not got is lost.
async fn chaos_with_losses(database: Database) {
    let (place, mut history, left) =
        run(Box::pin(Place::make(database, Replication::Asynchronous)), Replication::Asynchronous, TASKS_LOST).await;
    let wrong = check(&history, &left);
    assert!(wrong.is_empty(), "LAELAPS_SEED repeats the faults; {} operations show {wrong:#?}", history.len());
    history.retain(|operation| operation.asked != Asked::Lose);
    let lost = check(&history, &left);
    println!("chaos on {database:?}: {} operations show that something was lost, as {:?}", history.len(), lost.first());
    assert!(!lost.is_empty() && left.iter().all(|task| task.key != LOST), "nothing was lost");
    place.audit().await;
}

/// Let workers do tasks while faults happen, and then what is left. Answers the database, all that was asked and answered, and
/// what is there in the end.
async fn run(making: impl Future<Output = Place>, replication: Replication, tasks: usize) -> (Place, Vec<Operation>, Vec<Left>) {
    let (seed, begun) = (seed(), Instant::now());
    let mut random = fastrand::Rng::with_seed(seed);
    let histories = TempDir::new().expect("a folder for histories");
    let mut place = making.await;
    let name = place.name();
    let queue = Queue::open(&config(&place.url)).await.expect("the database can be opened");
    let recorder = Recorder::new(&history_of(histories.path(), "producer"));
    let mut producer = Producer { queue, recorder, random: random.fork(), next: 0 };
    let mut faults = Faults::begin(&place, replication, histories.path(), random).await;
    let parts = (tasks / TASKS_OF_FAULT).max(faults.fewest());
    let ready = begun.elapsed().as_secs_f64();
    println!("chaos on {name}: {tasks} tasks, {parts} faults, LAELAPS_SEED={seed}; made ready in {ready:.1} s");
    for _ in 0..parts {
        producer.submit(tasks.div_ceil(parts)).await;
        producer.wait_for_work_to_get_on(tasks.div_ceil(parts)).await;
        faults.one(&mut place, producer.next).await;
        producer.meddle().await;
    }
    faults.end().await;
    let left = everything_ends(&producer.queue, histories.path(), &place).await;
    let took = begun.elapsed().as_secs_f64();
    println!("chaos on {name}: {} tasks in the end, after {took:.1} s; {}", left.len(), faults.told());
    producer.queue.close().await;
    let history = place.in_order(read(histories.path()));
    (place, history, left)
}

/// What a history has to tell, so that it is known to be one of trouble.
struct Told {
    /// Tasks handed out.
    claimed: usize,
    /// Writes under a lease that had ended.
    refused: usize,
    /// Operations without an answer.
    unheard: usize,
}

impl Told {
    fn of(history: &[Operation]) -> Self {
        let claimed =
            history.iter().map(|operation| if let Answer::Claimed(tasks) = &operation.answer { tasks.len() } else { 0 });
        let refused = history.iter().map(|operation| match &operation.answer {
            Answer::Held(answers) => answers.iter().filter(|held| !**held).count(),
            _ => 0,
        });
        let unheard = history.iter().filter(|operation| operation.answer == Answer::Unknown);
        Self { claimed: claimed.sum(), refused: refused.sum(), unheard: unheard.count() }
    }
}

/// Let new workers do what is left, with nothing in their way.
async fn everything_ends(queue: &Queue, histories: &std::path::Path, place: &Place) -> Vec<Left> {
    let mut workers = place.workers(histories, "last", 2);
    eventually(LONG, "all tasks come to their ends", async || {
        let stats = queue.stats().await.map_err(|error| error.to_string())?;
        if stats.ready + stats.scheduled + stats.running == 0 { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    for worker in &mut workers {
        worker.stop().await;
    }
    let (mut left, mut spoilt) = (Vec::new(), Vec::new());
    let mut filter = Filter { limit: 10_000, ..Filter::default() };
    loop {
        let page = queue.list(&filter).await.expect("tasks can be listed");
        for task in page.tasks {
            // What cannot be read of a key that was spoilt is shown behind the rest of it.
            let key = task.key.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned();
            if key != task.key {
                spoilt.push(task.id);
            }
            left.push(Left { task: task.id.0, key, state: task.state });
        }
        filter.after = page.next;
        if filter.after.is_none() {
            break;
        }
    }
    // Nobody names these by their keys any more. An operator removes them, by their numbers.
    for task in spoilt {
        let removed = queue.backend().cancel_by_id(task, Duration::ZERO).await;
        assert!(removed.as_ref().err().is_none_or(Error::is_about_the_request), "{removed:?}");
    }
    left
}

/// So long is a fault that lasts, at most.
const FAULT_MAX: Duration = Duration::from_millis(2_500);

macro_rules! on_databases {
    ($($module:ident: $database:ident;)+) => {
        $(mod $module {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn whatever_fails_no_task_is_lost_or_done_by_two_who_both_hold_it() {
                use super::{Place, Replication};
                super::chaos(Box::pin(Place::make(super::Database::$database, Replication::Synchronous))).await;
            }
        })+
    };
}
on_databases! {
    on_sqlite: Sqlite;
    on_postgres: Postgres;
    on_mariadb: MariaDb;
}

macro_rules! with_losses {
    ($($module:ident: $database:ident;)+) => {
        mod with_losses {
            $(mod $module {
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn a_replica_that_takes_over_without_what_came_last_accepts_no_stale_write() {
                    super::super::chaos_with_losses(super::super::Database::$database).await;
                }
            })+
        }
    };
}
with_losses! {
    on_postgres: Postgres;
    on_mariadb: MariaDb;
}

mod on_perfectqueue {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whatever_fails_no_task_is_lost_or_done_by_two_who_both_hold_it() {
        super::chaos(Box::pin(super::Place::of_perfectqueue())).await;
    }
}
