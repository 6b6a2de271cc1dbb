//! What the queue makes of its database: `cargo bench -p laelaps-queue`, with `-- quick` a tenth of it, with `-- submit`, `path`, `backlog`,
//! `pinned` or `finished` only that part (the last two are PostgreSQL's), with `sqlite`, `postgres` or `mariadb` only that database.
//!
//! Each figure of the crate stands beside raw SQL on the same disk in the same run, on one connection and in batches of the same size: the
//! statements that such a batch cannot do without (`raw`), and a single table whose claim and finish touch an index (`one table`).

#![expect(clippy::unwrap_used, reason = "a bench may stop where it stands")]

#[path = "storage/large.rs"]
mod large;
#[path = "storage/mariadb.rs"]
mod mariadb;

use std::path::Path;
use std::time::{Duration, Instant};

use laelaps_queue::{
    Attempt, Claim, ClaimedTask, Config, Event, HostDescription, LeaseAnswer, NewTask, Policy, Queue, Settlement, Submitted,
};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Connection};
use tempfile::TempDir;

#[path = "storage/postgres.rs"]
mod postgres;

/// 100 bytes, as in the measurements that chose the layout.
const DATA: &str = r#"{"payload":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let quick = arguments.iter().any(|argument| argument == "quick");
    let databases = ["sqlite", "postgres", "mariadb"];
    let named = |database: &str| arguments.iter().any(|argument| argument == database);
    let any_named = databases.into_iter().any(named);
    let parts: Vec<&str> =
        arguments.iter().map(String::as_str).filter(|argument| *argument != "quick" && !databases.contains(argument)).collect();
    for database in databases.into_iter().filter(|database| !any_named || named(database)) {
        let home = match database {
            "sqlite" => Home::Sqlite,
            "postgres" => Home::Postgres(postgres::start().await),
            _ => {
                mariadb::run(|part| parts.is_empty() || parts.contains(&part), quick).await;
                continue;
            }
        };
        measure(&home, &parts, quick).await;
    }
}

async fn measure(home: &Home, parts: &[&str], quick: bool) {
    let asked = |part: &str| parts.is_empty() || parts.contains(&part);
    let scale = if quick { 10 } else { 1 };
    println!("{}, {} bytes of data a task\n", home.name(), DATA.len());
    if asked("submit") {
        submits(home, 20_000 / scale).await;
    }
    for batch in [100, 500] {
        if asked("path") {
            match home {
                Home::Sqlite => path(200_000 / scale, batch).await,
                Home::Postgres(server) => postgres::path(home, server, 200_000 / scale, batch).await,
            }
        }
    }
    if asked("backlog") {
        backlogs(home, if quick { &[1_000, 10_000, 100_000] } else { &[10_000, 100_000, 1_000_000, 5_000_000] }).await;
    }
    if let Home::Postgres(_) = home {
        if asked("pinned") {
            large::pinned(home, 1_000_000 / scale).await;
        }
        if asked("finished") {
            large::finished(home, 10_000_000 / scale).await;
        }
    }
}

/// Where the tasks of a measurement are.
enum Home {
    Sqlite,
    Postgres(postgres::Server),
}

/// A queue without tasks.
struct Fresh {
    queue: Queue,
    url: String,
    _folder: Option<TempDir>,
}

impl Home {
    fn name(&self) -> &'static str {
        match self {
            Self::Sqlite => "SQLite in WAL, synchronous=FULL",
            Self::Postgres(_) => "PostgreSQL as installed",
        }
    }

    async fn fresh(&self) -> Fresh {
        let (url, folder) = match self {
            Self::Sqlite => {
                let folder = tempfile::tempdir().unwrap();
                (format!("sqlite:{}", folder.path().join("queue.db").display()), Some(folder))
            }
            Self::Postgres(server) => (server.create_database().await, None),
        };
        let queue = Queue::open(&Config::new(url.as_str())).await.unwrap();
        queue.init().await.unwrap();
        Fresh { queue, url, _folder: folder }
    }
}

fn task(number: usize) -> NewTask {
    NewTask::new(format!("task-{number}"), "bench", DATA)
}

fn file(fresh: &Fresh) -> &Path {
    Path::new(fresh.url.strip_prefix("sqlite:").unwrap())
}

async fn raw(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .pragma("wal_autocheckpoint", "4000")
        .pragma("cache_size", "-65536")
        .disable_statement_logging()
        .connect()
        .await
        .unwrap()
}

async fn run(connection: &mut SqliteConnection, sql: &'static str) {
    sqlx::query(sql).execute(connection).await.unwrap();
}

fn rate(count: usize, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

async fn submits(home: &Home, count: usize) {
    println!("submit                       tasks/s");
    let Fresh { queue, _folder, .. } = home.fresh().await;
    let one_by_one = count / 20;
    let started = Instant::now();
    for number in 0..one_by_one {
        assert_eq!(queue.submit(task(number)).await.unwrap(), Submitted::Created);
    }
    println!("  one after the other      {:9.0}", rate(one_by_one, started.elapsed()));
    let started = Instant::now();
    let mut submitters = tokio::task::JoinSet::new();
    for submitter in 0..64 {
        let queue = queue.clone();
        submitters.spawn(async move {
            for number in 0..count / 64 {
                queue.submit(task(1_000_000 * (submitter + 1) + number)).await.unwrap();
            }
        });
    }
    submitters.join_all().await;
    println!("  one each by 64 at once   {:9.0}", rate(count / 64 * 64, started.elapsed()));
    for batch in [100, 1_000] {
        let tasks: Vec<NewTask> = (0..count).map(|number| task(100_000_000 * batch + number)).collect();
        let started = Instant::now();
        for chunk in tasks.chunks(batch) {
            queue.submit_many(chunk).await.unwrap();
        }
        println!("  in batches of {batch:5}      {:9.0}", rate(count, started.elapsed()));
    }
    queue.close().await;
    println!();
}

/// Claim and finish all of a backlog.
async fn path(count: usize, batch: usize) {
    println!("claim and finish in batches of {batch}, {count} waiting");
    let (one, two) =
        (through_the_crate(&Home::Sqlite, count, batch, 1).await, through_the_crate(&Home::Sqlite, count, batch, 2).await);
    let raw = of_the_same_layout(count, batch).await;
    let single = of_one_table(count, batch).await;
    println!("  the crate, one caller    {one:9.0} tasks/s   {:.2} of raw", one / raw);
    println!("  the crate, two callers   {two:9.0} tasks/s   {:.2} of raw", two / raw);
    println!("  raw                      {raw:9.0} tasks/s   {:.2} of one table", raw / single);
    println!("  one table                {single:9.0} tasks/s\n");
}

async fn through_the_crate(home: &Home, count: usize, batch: usize, callers: usize) -> f64 {
    let Fresh { queue, _folder, .. } = home.fresh().await;
    fill(&queue, count, |_| None).await;
    let started = Instant::now();
    let mut working = tokio::task::JoinSet::new();
    for _ in 0..callers {
        working.spawn(work(queue.clone(), batch));
    }
    let finished: usize = working.join_all().await.into_iter().sum();
    assert_eq!(finished, count);
    let rate = rate(count, started.elapsed());
    queue.close().await;
    rate
}

async fn fill(queue: &Queue, count: usize, user: impl Fn(usize) -> Option<String>) {
    for first in (0..count).step_by(10_000) {
        let numbers = first..count.min(first + 10_000);
        let tasks: Vec<NewTask> = numbers.map(|number| NewTask { user: user(number), ..task(number) }).collect();
        queue.submit_many(&tasks).await.unwrap();
    }
}

async fn claim_of(queue: &Queue, limit: usize, ignore_users: bool) -> Claim {
    let description = HostDescription { name: "bench".to_owned(), process_id: std::process::id(), identity: None };
    let host = queue.backend().register_host(&description).await.unwrap();
    Claim {
        host,
        limit: u32::try_from(limit).unwrap(),
        alive_time: Duration::from_secs(300),
        alone: false,
        ignore_users,
        accepts: None,
    }
}

async fn work(queue: Queue, batch: usize) -> usize {
    let claim = claim_of(&queue, batch, false).await;
    let mut finished = 0;
    loop {
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        if tasks.is_empty() {
            return finished;
        }
        finished += finish(&queue, &tasks).await;
    }
}

/// Finish what was claimed; answers how many leases held.
async fn finish(queue: &Queue, tasks: &[ClaimedTask]) -> usize {
    let (policy, digest) = (Policy::default(), Some("0123456789abcdef".repeat(4)));
    let event = Event::Finish { output: None, retention: None };
    let settle = |task: &ClaimedTask| {
        Settlement::of(task.lease_ref, event.clone(), Attempt::of(task), &policy, 0.0, digest.clone(), Vec::new())
    };
    let group: Vec<Settlement> = tasks.iter().map(settle).collect();
    let answers = queue.backend().settle(&group).await.unwrap();
    answers.iter().filter(|answer| **answer == LeaseAnswer::Held).count()
}

/// The same tables and transactions with the least that they cannot do without: take out of ready, lease, read, finish under the fence,
/// enter for removal.
async fn of_the_same_layout(count: usize, batch: usize) -> f64 {
    let fresh = Home::Sqlite.fresh().await;
    fill(&fresh.queue, count, |_| None).await;
    fresh.queue.close().await;
    let mut connection = raw(file(&fresh)).await;
    let limit = i64::try_from(batch).unwrap();
    let mut lease = 0_i64;
    let started = Instant::now();
    loop {
        run(&mut connection, "BEGIN IMMEDIATE").await;
        let taken: Vec<i64> = sqlx::query_scalar(
            "DELETE FROM ready WHERE (user, run_at, task) IN (SELECT user, run_at, task FROM ready WHERE user = '' ORDER BY run_at, task LIMIT ?1)
            RETURNING task",
        )
        .bind(limit)
        .fetch_all(&mut connection)
        .await
        .unwrap();
        if taken.is_empty() {
            run(&mut connection, "ROLLBACK").await;
            return rate(count, started.elapsed());
        }
        let ids = serde_json::to_string(&taken).unwrap();
        sqlx::query(
            "UPDATE task SET state = 'running', lease = ?2 + chosen.key, host = 1, until = unixepoch() * 1000 + 300000
            FROM json_each(?1) AS chosen WHERE task.id = chosen.value",
        )
        .bind(ids.clone())
        .bind(lease)
        .execute(&mut connection)
        .await
        .unwrap();
        let rows: Vec<(i64, i64, String, String, Vec<u8>)> = sqlx::query_as(
            "SELECT task.id, task.lease, task.key, task.type, task_data.data FROM json_each(?1) AS chosen
            CROSS JOIN task ON task.id = chosen.value CROSS JOIN task_data ON task_data.task = task.id",
        )
        .bind(ids)
        .fetch_all(&mut connection)
        .await
        .unwrap();
        run(&mut connection, "COMMIT").await;
        lease += limit;
        let leases: Vec<(i64, i64)> = rows.iter().map(|row| (row.0, row.1)).collect();
        let ids: Vec<i64> = rows.iter().map(|row| row.0).collect();
        run(&mut connection, "BEGIN IMMEDIATE").await;
        let held: Vec<i64> = sqlx::query_scalar(
            "UPDATE task SET state = 'finished', until = NULL, event = 'finish', attempts = attempts + 1,
                finished_at = unixepoch() * 1000, retained_until = unixepoch() * 1000 + 300000
            FROM (SELECT value ->> 0 AS id, value ->> 1 AS lease FROM json_each(?1)) AS s
            WHERE task.id = s.id AND task.lease = s.lease AND task.state = 'running' AND task.until > unixepoch() * 1000 RETURNING id",
        )
        .bind(serde_json::to_string(&leases).unwrap())
        .fetch_all(&mut connection)
        .await
        .unwrap();
        assert_eq!(held.len(), rows.len());
        sqlx::query("INSERT INTO retention (until, tasks) VALUES (unixepoch() * 1000 + 300000, ?1)")
            .bind(serde_json::to_string(&ids).unwrap())
            .execute(&mut connection)
            .await
            .unwrap();
        run(&mut connection, "COMMIT").await;
    }
}

/// One table, claimed and finished through an index on state and time.
async fn of_one_table(count: usize, batch: usize) -> f64 {
    let folder = tempfile::tempdir().unwrap();
    let mut connection = raw(&folder.path().join("one.db")).await;
    run(
        &mut connection,
        "CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, type TEXT NOT NULL, state TEXT NOT NULL,
            run_at INTEGER NOT NULL, lease INTEGER, host INTEGER, until INTEGER, attempts INTEGER NOT NULL DEFAULT 0, finished_at INTEGER,
            data TEXT NOT NULL) STRICT",
    )
    .await;
    run(&mut connection, "CREATE INDEX task_order ON task (state, run_at, id)").await;
    sqlx::query(
        "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?1)
        INSERT INTO task (key, type, state, run_at, data) SELECT 'task-' || n, 'bench', 'waiting', n, ?2 FROM number",
    )
    .bind(i64::try_from(count).unwrap())
    .bind(DATA)
    .execute(&mut connection)
    .await
    .unwrap();
    let limit = i64::try_from(batch).unwrap();
    let started = Instant::now();
    loop {
        let rows: Vec<(i64, i64, String, String, Vec<u8>)> = sqlx::query_as(
            "UPDATE task SET state = 'running', lease = coalesce(lease, 0) + 1, host = 1, until = unixepoch() * 1000 + 300000
            WHERE id IN (SELECT id FROM task WHERE state = 'waiting' ORDER BY run_at, id LIMIT ?1)
            RETURNING id, lease, key, type, data",
        )
        .bind(limit)
        .fetch_all(&mut connection)
        .await
        .unwrap();
        if rows.is_empty() {
            connection.close().await.unwrap();
            return rate(count, started.elapsed());
        }
        let leases: Vec<(i64, i64)> = rows.iter().map(|row| (row.0, row.1)).collect();
        sqlx::query(
            "UPDATE task SET state = 'finished', until = NULL, attempts = attempts + 1, finished_at = unixepoch() * 1000
            FROM (SELECT value ->> 0 AS id, value ->> 1 AS lease FROM json_each(?1)) AS s
            WHERE task.id = s.id AND task.lease = s.lease AND task.state = 'running' AND task.until > unixepoch() * 1000",
        )
        .bind(serde_json::to_string(&leases).unwrap())
        .execute(&mut connection)
        .await
        .unwrap();
    }
}

/// A claim of ten at growing backlogs.
async fn backlogs(home: &Home, sizes: &[usize]) {
    println!("claim of 10, median of 200, in milliseconds (with its commit)");
    println!("   waiting      plain       fair, no users   fair, 1,000 users   fair, a user for each task");
    for &size in sizes {
        let mut figures = Vec::new();
        for (users, ignore_users) in [(0, true), (0, false), (1_000, false), (usize::MAX, false)] {
            figures.push(claims_at(home, size, users, ignore_users).await);
        }
        println!("{size:10} {:10.2} {:16.2} {:18.2} {:22.2}", figures[0], figures[1], figures[2], figures[3]);
    }
}

async fn claims_at(home: &Home, size: usize, users: usize, ignore_users: bool) -> f64 {
    let Fresh { queue, _folder, .. } = home.fresh().await;
    fill(&queue, size, |number| (users > 0).then(|| format!("user-{}", number % users))).await;
    let claim = claim_of(&queue, 10, ignore_users).await;
    let mut times = Vec::new();
    for _ in 0..200.min(size / 20) {
        let started = Instant::now();
        assert_eq!(queue.backend().claim(&claim).await.unwrap().tasks.len(), 10);
        times.push(started.elapsed());
    }
    times.sort_unstable();
    queue.close().await;
    times[times.len() / 2].as_secs_f64() * 1_000.0
}
