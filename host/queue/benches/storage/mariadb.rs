//! The queue on MariaDB, on a server of the bench's own with the durability that servers have by default.

use laelaps_test_databases::{Durability, mariadb};
use sqlx::MySqlConnection;

use super::*;

pub(super) async fn run(asked: impl Fn(&str) -> bool, quick: bool) {
    let scale = if quick { 10 } else { 1 };
    println!("MariaDB, innodb_flush_log_at_trx_commit=1, {} bytes of data a task\n", DATA.len());
    let server = mariadb::Server::start(Durability::Disk).await;
    if asked("submit") {
        submits(&server, 20_000 / scale).await;
    }
    for batch in [100, 500] {
        if asked("path") {
            path(&server, 200_000 / scale, batch).await;
        }
    }
    if asked("backlog") {
        backlogs(&server, if quick { &[1_000, 10_000, 100_000] } else { &[10_000, 100_000, 1_000_000] }).await;
    }
}

async fn queue(server: &mariadb::Server) -> (Queue, String) {
    let url = server.create_database().await;
    let queue = Queue::open(&Config::new(url.clone())).await.unwrap();
    queue.init().await.unwrap();
    (queue, url)
}

async fn submits(server: &mariadb::Server, count: usize) {
    println!("submit                       tasks/s");
    let (queue, _) = queue(server).await;
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
async fn path(server: &mariadb::Server, count: usize, batch: usize) {
    println!("claim and finish in batches of {batch}, {count} waiting");
    let mut best = 0.0_f64;
    for connections in [1, 2, 4] {
        let raw = by_hand(server, count, batch, connections).await;
        println!("  raw, {connections} connections       {raw:9.0} tasks/s");
        best = best.max(raw);
    }
    for callers in [1, 2] {
        let (rate, bytes) = through_the_crate(server, count, batch, callers).await;
        println!(
            "  the crate, {callers} callers     {rate:9.0} tasks/s   {:.2} of raw   {bytes:6.0} bytes of redo a task",
            rate / best
        );
    }
    println!();
}

/// Answers the rate, and the bytes of redo a task from its submit to its end.
async fn through_the_crate(server: &mariadb::Server, count: usize, batch: usize, callers: usize) -> (f64, f64) {
    let (queue, url) = queue(server).await;
    let mut connection = MySqlConnection::connect(&url).await.unwrap();
    let before = redo_bytes(&mut connection).await;
    fill(&queue, count, |_| None).await;
    let started = Instant::now();
    let mut working = tokio::task::JoinSet::new();
    for _ in 0..callers {
        working.spawn(work(queue.clone(), batch));
    }
    let finished: usize = working.join_all().await.into_iter().sum();
    assert_eq!(finished, count);
    let rate = rate(count, started.elapsed());
    let bytes = redo_bytes(&mut connection).await - before;
    queue.close().await;
    (rate, bytes / count as f64)
}

async fn redo_bytes(connection: &mut MySqlConnection) -> f64 {
    let bytes: String = sqlx::query_scalar(
        "SELECT CAST(variable_value AS CHAR) FROM information_schema.global_status WHERE variable_name = 'INNODB_OS_LOG_WRITTEN'",
    )
    .fetch_one(connection)
    .await
    .unwrap();
    bytes.parse().unwrap()
}

/// The same tables and transactions with the least that they cannot do without: take out of ready, lease, read, finish under the fence,
/// enter for removal, count.
async fn by_hand(server: &mariadb::Server, count: usize, batch: usize, connections: usize) -> f64 {
    let (queue, url) = queue(server).await;
    fill(&queue, count, |_| None).await;
    queue.close().await;
    let started = Instant::now();
    let mut working = tokio::task::JoinSet::new();
    for _ in 0..connections {
        let url = url.clone();
        // On threads of their own: each is one program.
        working.spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut connection = MySqlConnection::connect(&url).await.unwrap();
                statement(&mut connection, "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED").await;
                while one_batch(&mut connection, i64::try_from(batch).unwrap()).await {}
            });
        });
    }
    working.join_all().await;
    rate(count, started.elapsed())
}

async fn statement(connection: &mut MySqlConnection, sql: &'static str) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

/// Number, lease, key, type, data.
type Leased = (i64, i64, Vec<u8>, Vec<u8>, Vec<u8>);

async fn one_batch(connection: &mut MySqlConnection, limit: i64) -> bool {
    statement(connection, "START TRANSACTION").await;
    let ready = "SELECT turn, task FROM laelaps_ready WHERE queue = '' ORDER BY turn, task LIMIT ? FOR UPDATE SKIP LOCKED";
    let places: Vec<(i64, i64)> = sqlx::query_as(ready).bind(limit).fetch_all(&mut *connection).await.unwrap();
    if places.is_empty() {
        statement(connection, "ROLLBACK").await;
        return false;
    }
    let rows = serde_json::to_string(&places).unwrap();
    let ids = serde_json::to_string(&places.iter().map(|(_, task)| task).collect::<Vec<_>>()).unwrap();
    let enter = "INSERT INTO laelaps_claim (host, look_at, tasks) VALUES (1, 4102444800000, ?)";
    let claim = sqlx::query(enter).bind(&ids).execute(&mut *connection).await.unwrap().last_insert_id();
    let first = i64::try_from(claim).unwrap() * 1_024;
    let out = "DELETE r FROM JSON_TABLE(?, '$[*]' COLUMNS (turn BIGINT PATH '$[0]', task BIGINT PATH '$[1]')) AS s
        STRAIGHT_JOIN laelaps_ready AS r ON r.queue = '' AND r.turn = s.turn AND r.task = s.task";
    sqlx::query(out).bind(rows).execute(&mut *connection).await.unwrap();
    let lease = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (place FOR ORDINALITY, id BIGINT PATH '$')) AS s STRAIGHT_JOIN laelaps_task AS t ON t.id = s.id
        SET t.state = 'running', t.lease = ? + s.place, t.host = 1, t.until = 4102444800000";
    sqlx::query(lease).bind(&ids).bind(first).execute(&mut *connection).await.unwrap();
    let read = "SELECT t.id, t.lease, t.`key`, t.type, d.data FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
        STRAIGHT_JOIN laelaps_task AS t ON t.id = s.id STRAIGHT_JOIN laelaps_task_data AS d ON d.task = t.id";
    let tasks: Vec<Leased> = sqlx::query_as(read).bind(&ids).fetch_all(&mut *connection).await.unwrap();
    statement(connection, "COMMIT; START TRANSACTION").await;
    let leases = serde_json::to_string(&tasks.iter().map(|task| (task.0, task.1)).collect::<Vec<_>>()).unwrap();
    let held = "SELECT t.id, t.type FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]')) AS s
        STRAIGHT_JOIN laelaps_task AS t ON t.id = s.task WHERE t.lease = s.lease AND t.state = 'running' AND t.until > ? FOR UPDATE";
    let held: Vec<(i64, Vec<u8>)> = sqlx::query_as(held).bind(&leases).bind(0).fetch_all(&mut *connection).await.unwrap();
    assert_eq!(held.len(), tasks.len());
    let finish = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]')) AS s STRAIGHT_JOIN laelaps_task AS t ON t.id = s.task
        SET t.state = 'finished', t.until = 0, t.event = 'finish', t.attempts = t.attempts + 1, t.finished_at = 1, t.retained_until = 1";
    sqlx::query(finish).bind(&leases).execute(&mut *connection).await.unwrap();
    sqlx::query("INSERT INTO laelaps_retention (until, tasks) VALUES (1, ?)").bind(&ids).execute(&mut *connection).await.unwrap();
    let tally = "INSERT INTO laelaps_tally (what, name, tasks) VALUES ('type', 'bench', ?), ('ended', 'finished', ?)";
    let ended = i64::try_from(held.len()).unwrap();
    sqlx::query(tally).bind(-ended).bind(ended).execute(&mut *connection).await.unwrap();
    statement(connection, "COMMIT").await;
    true
}

/// A claim of ten at growing backlogs.
async fn backlogs(server: &mariadb::Server, sizes: &[usize]) {
    println!("claim of 10, median of 200, in milliseconds (with its commit)");
    println!("   waiting      plain       fair, no users   fair, 1,000 users   fair, a user for each task");
    for &size in sizes {
        let mut figures = Vec::new();
        for (users, ignore_users) in [(0, true), (0, false), (1_000, false), (usize::MAX, false)] {
            figures.push(claims_at(server, size, users, ignore_users).await);
        }
        println!("{size:10} {:10.2} {:16.2} {:18.2} {:22.2}", figures[0], figures[1], figures[2], figures[3]);
    }
}

async fn claims_at(server: &mariadb::Server, size: usize, users: usize, ignore_users: bool) -> f64 {
    let (queue, _) = queue(server).await;
    fill(&queue, size, |number| (users > 0).then(|| format!("user-{}", number % users))).await;
    let claim = claim_of(&queue, 10, ignore_users).await;
    // What hosts do every second: changes of users' accounts are folded in, at most a hundred thousand a time.
    for _ in 0..=size / 100_000 {
        queue.backend().reclaim(&Policy::default()).await.unwrap();
    }
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
