//! On SQLite.

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _};

use super::{DATA, ENDED_TOGETHER};

/// The last number that was given out before.
const LAST: &str = "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'task'), 0)";

const WAITING: [&str; 5] = [
    "WITH RECURSIVE number (n) AS (SELECT ?2 UNION ALL SELECT n + 1 FROM number WHERE n < ?3)
        INSERT INTO task (key, type, queue, user, created_at, run_at)
        SELECT 'task-' || n, CASE ?6 WHEN 1 THEN 'bench' ELSE 'bench-' || (n % ?6) END, CASE ?6 WHEN 1 THEN '' ELSE 'queue-' || (n % ?6) END,
            CASE WHEN ?4 = 0 THEN '' ELSE 'user-' || (n / ?6 % ?4) END, now, now
        FROM (SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER) AS now) CROSS JOIN number",
    "INSERT INTO task_data (task, bytes, data) SELECT id, length(?5), ?5 FROM task WHERE id > ?1",
    "INSERT INTO ready (queue, user, turn, task, max_running) SELECT queue, user, turn, id, max_running FROM task WHERE id > ?1
        ORDER BY queue, user, turn, id",
    "INSERT INTO account (queue, user, ready, head_turn, head_task, picked)
        SELECT queue, user, count(*), min(turn), min(id), (SELECT pick FROM counter) FROM task WHERE id > ?1 GROUP BY queue, user
        ON CONFLICT (queue, user) DO UPDATE SET ready = ready + excluded.ready, head_turn = coalesce(head_turn, excluded.head_turn),
            head_task = coalesce(head_task, excluded.head_task)",
    "INSERT INTO tally (what, queue, name, tasks) SELECT 'type', queue, type, count(*) FROM task WHERE id > ?1 GROUP BY queue, type
        ON CONFLICT (what, queue, name) DO UPDATE SET tasks = tasks + excluded.tasks",
];

const FINISHED: [&str; 4] = [
    "WITH RECURSIVE number (n) AS (SELECT ?2 UNION ALL SELECT n + 1 FROM number WHERE n < ?3)
        INSERT INTO task (key, type, state, attempts, event, lease, host, created_at, run_at, finished_at, retained_until)
        SELECT 'ended-' || n, 'bench', 'finished', 1, 'finish', n, 1, 1, 1, 1, 1 FROM number",
    "INSERT INTO task_data (task, bytes, data) SELECT id, length(?5), ?5 FROM task WHERE id > ?1",
    "INSERT INTO retention (until, tasks) SELECT 1, json_group_array(id) FROM task WHERE id > ?1 GROUP BY id / ?4",
    "INSERT INTO tally (what, name, tasks) SELECT 'ended', 'finished', count(*) FROM task WHERE id > ?1
        ON CONFLICT (what, queue, name) DO UPDATE SET tasks = tasks + excluded.tasks",
];

pub(super) async fn waiting(url: &str, first: i64, last: i64, users: i64, queues: i64) {
    run(url, &WAITING, first, last, users, queues).await;
}

pub(super) async fn finished(url: &str, first: i64, last: i64) {
    run(url, &FINISHED, first, last, ENDED_TOGETHER, 1).await;
}

async fn run(url: &str, statements: &[&'static str], first: i64, last: i64, number: i64, queues: i64) {
    let file = url.strip_prefix("sqlite:").expect("a file");
    let options = SqliteConnectOptions::new().filename(file).pragma("cache_size", "-262144").disable_statement_logging();
    let mut connection: SqliteConnection = options.connect().await.expect("the file is there");
    sqlx::query("BEGIN IMMEDIATE").execute(&mut connection).await.expect("nobody else writes");
    let before: i64 = sqlx::query_scalar(LAST).fetch_one(&mut connection).await.expect("the tables are there");
    for statement in statements {
        let query = sqlx::query(*statement).bind(before).bind(first).bind(last).bind(number).bind(DATA).bind(queues);
        query.execute(&mut connection).await.expect("the tables are there");
    }
    sqlx::query("COMMIT").execute(&mut connection).await.expect("the disk has room");
    connection.close().await.expect("nothing is under way");
}
