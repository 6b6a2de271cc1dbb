//! The host's path of a task beside neighbours: a producer's open transaction, a limit of one, handlers that report all the time.

use std::time::Duration;

use laelaps_queue::{NewTask, Queue, State, Timestamp};
use laelaps_tests::{
    Database, PATIENCE, Site, eventually, measured, promised, scaled, submit, task, wait_for_finished, wait_for_state,
};
use serde_json::{Value, json};
use sqlx::{Connection as _, MySqlConnection, PgConnection, SqliteConnection};

/// A poll that comes in no test: the longest interval that there is, in seconds.
const NEVER_S: u32 = 3_600;
/// An empty task with one report of its progress takes at most so many times as long as one without.
const PROGRESS_PROMISE: f64 = 1.25;
/// Tasks of a user with a limit of one, on a host that runs one at a time, take at most so many times as long as others.
const LIMIT_PROMISE: f64 = 2.0;
/// Times that this is measured: one measurement also tells of what else the machine did.
const ROUNDS: usize = 3;

/// A producer's transaction on a server, which has submitted a task of this key and stays open.
enum Producer {
    Postgres(PgConnection),
    MariaDb(MySqlConnection),
}

impl Producer {
    async fn holds(site: &Site, queue: &Queue, key: &str) -> Self {
        // Due much later, so that it stands in the way of nothing but its key.
        let submitted = [NewTask { run_at: Some(Timestamp(4_000_000_000_000)), ..task(key, "silent", json!({})) }];
        match site.database() {
            Database::Postgres => {
                let mut connection = PgConnection::connect(site.url()).await.unwrap();
                sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
                queue.backend().submit_in((&mut connection).into(), &submitted).await.unwrap();
                Self::Postgres(connection)
            }
            Database::MariaDb => {
                let mut connection = MySqlConnection::connect(site.url()).await.unwrap();
                sqlx::raw_sql("START TRANSACTION").execute(&mut connection).await.unwrap();
                queue.backend().submit_in((&mut connection).into(), &submitted).await.unwrap();
                Self::MariaDb(connection)
            }
            other => panic!("on {other:?} nobody else's transaction holds a key beside the host's"),
        }
    }

    async fn lets_go(self) {
        let done = match self {
            Self::Postgres(mut connection) => sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.map(drop),
            Self::MariaDb(mut connection) => sqlx::raw_sql("ROLLBACK").execute(&mut connection).await.map(drop),
        };
        done.unwrap();
    }
}

async fn a_follow_ups_key_that_a_producer_holds_delays_its_own_task_alone() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "processors": 4, "task_prefetch": 4 }));
    let queue = site.queue().await;
    let producer = Producer::holds(&site, &queue, "zoo/child").await;
    let host = site.start().await;
    let parent = json!({ "key": "zoo/child", "kind": "silent", "mark": "/marks/parent" });
    submit(&queue, &[task("parent", "submit", parent)]).await;
    eventually(PATIENCE, "the parent has begun", async || {
        let marks = site.marks("parent");
        if marks.len() == 1 { Ok(()) } else { Err(format!("{marks:?}")) }
    })
    .await;
    // More than are settled together, one after the other: whatever the parent keeps waiting would be met.
    let others: Vec<_> = (0..100).map(|number| task(format!("other-{number}"), "silent", json!({}))).collect();
    submit(&queue, &others).await;
    wait_for_finished(&queue, others.len(), PATIENCE).await;
    producer.lets_go().await;
    let parent = wait_for_state(&queue, "parent", State::Finished, PATIENCE).await;
    assert_eq!((parent.attempts, parent.lost), (1, 0));
    assert_eq!(site.marks("parent").len(), 1, "its outcome waited, and it did not run again");
    wait_for_state(&queue, "zoo/child", State::Finished, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn on_postgres_a_follow_ups_key_that_a_producer_holds_delays_its_own_task_alone() {
    laelaps_tests::on(Database::Postgres, Box::pin(a_follow_ups_key_that_a_producer_holds_delays_its_own_task_alone())).await;
}

#[tokio::test]
async fn on_mariadb_a_follow_ups_key_that_a_producer_holds_delays_its_own_task_alone() {
    laelaps_tests::on(Database::MariaDb, Box::pin(a_follow_ups_key_that_a_producer_holds_delays_its_own_task_alone())).await;
}

/// Tasks a second of a host with these members in its section.
async fn rate(section: Value, new_task: impl Fn(String) -> NewTask) -> f64 {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(section);
    let queue = site.queue().await;
    let tasks: Vec<_> = (0..scaled(5_000)).map(|number| new_task(format!("task-{number}"))).collect();
    laelaps_tests::rate(&site, &queue, &tasks, Duration::from_millis(10)).await
}

/// Holds two rates against each other, in rounds, so that what else the machine does hits both.
async fn slower(what: &str, promise: f64, mut usual: impl AsyncFnMut() -> f64, mut other: impl AsyncFnMut() -> f64) {
    let mut ratio = f64::INFINITY;
    for _ in 0..ROUNDS {
        let (usual, other) = (usual().await, other().await);
        measured(&format!("tasks per second as usual and of {what}"), format!("{usual:.0}, {other:.0}"));
        ratio = ratio.min(usual / other);
        if ratio <= promise || scaled(2) == 1 {
            break;
        }
    }
    promised(&format!("{what}, times a usual one"), ratio, promise);
}

laelaps_tests::on_every_database! {
    async fn tasks_of_a_user_with_a_limit_follow_each_other_without_a_poll() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        let of_ann = |number| NewTask {
            user: Some("ann".to_owned()),
            max_running: Some(1),
            ..task(format!("task-{number}"), "silent", json!({}))
        };
        let tasks: Vec<_> = (0..30).map(of_ann).collect();
        submit(&queue, &tasks).await;
        site.configure(json!({ "processors": 2, "task_prefetch": 0, "poll_interval": NEVER_S }));
        let host = site.start().await;
        wait_for_finished(&queue, tasks.len(), PATIENCE).await;
        host.stop().await;
    }

    async fn a_report_of_progress_costs_little() {
        let section = json!({ "processors": 4, "task_prefetch": 100, "log_level": "warn" });
        let reporting = async |count: u32| rate(section.clone(), |key| task(key, "heartbeat", json!({ "count": count }))).await;
        slower("a task with one report of its progress", PROGRESS_PROMISE, async || reporting(0).await, async || reporting(1).await)
            .await;
    }

    async fn a_user_with_a_limit_of_one_is_half_as_fast_at_least() {
        let section = json!({ "processors": 1, "task_prefetch": 0, "log_level": "warn" });
        let of = async |user: Option<&str>| {
            let (user, max_running) = (user.map(str::to_owned), user.map(|_| 1));
            let new_task = |key| NewTask { user: user.clone(), max_running, ..task(key, "silent", json!({})) };
            rate(section.clone(), new_task).await
        };
        slower("a task of a user with a limit of one", LIMIT_PROMISE, async || of(None).await, async || of(Some("ann")).await).await;
    }
}

#[tokio::test]
async fn a_handler_reports_on_while_the_database_is_locked() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "log_level": "debug" }));
    let queue = site.queue().await;
    let host = site.start().await;
    let data = json!({ "count": 1_000, "mark": "/marks/begun", "gate": "/marks/gate" });
    submit(&queue, &[task("reports", "heartbeat", data)]).await;
    eventually(PATIENCE, "the task has begun", async || {
        let marks = site.marks("begun");
        if marks.len() == 1 { Ok(()) } else { Err(format!("{marks:?}")) }
    })
    .await;
    let mut neighbour = SqliteConnection::connect(site.url()).await.unwrap();
    sqlx::raw_sql("PRAGMA busy_timeout = 600000; BEGIN IMMEDIATE").execute(&mut neighbour).await.unwrap();
    site.open_gate("gate");
    // Nothing can be written: neither progress nor the outcome.
    host.logged("attempt ended", PATIENCE).await;
    sqlx::raw_sql("ROLLBACK").execute(&mut neighbour).await.unwrap();
    let reported = wait_for_state(&queue, "reports", State::Finished, PATIENCE).await;
    assert_eq!(laelaps_tests::output(&reported)["held"], 1_000);
    host.stop().await;
}

#[tokio::test]
async fn a_user_with_a_limit_is_served_beside_a_buffer_that_is_never_empty() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "processors": 1, "task_prefetch": 20 }));
    let queue = site.queue().await;
    let host = site.start().await;
    let others: Vec<_> = (0..2_000).map(|number| task(format!("other-{number}"), "compute", json!({ "ms": 5 }))).collect();
    submit(&queue, &others).await;
    eventually(PATIENCE, "tasks are being finished", async || {
        let stats = queue.stats().await.unwrap();
        if stats.finished >= 20 { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    let of_ann = NewTask { user: Some("ann".to_owned()), max_running: Some(1), ..task("ann", "silent", json!({})) };
    submit(&queue, &[of_ann]).await;
    wait_for_state(&queue, "ann", State::Finished, PATIENCE).await;
    let stats = queue.stats().await.unwrap();
    assert!(stats.finished < 2_001, "hers did not wait until the others were done: {stats:?}");
    drop(host);
}
