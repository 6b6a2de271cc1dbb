//! One table, as queues mostly have it: what waits is found by an index that a claim and a finish both move. It has no order between users,
//! no counts, and no place from which ended tasks are removed.

use sqlx::{Connection as _, Row as _};

use super::mariadb::{self, json};
use super::postgres;
use crate::fill::DATA;
use crate::home::{Home, sqlite};

pub(super) async fn fill(home: &Home, url: &str, count: i64) {
    match home {
        Home::Sqlite => fill_sqlite(url, count).await,
        Home::Postgres(_) => fill_postgres(url, count).await,
        Home::MariaDb(_) => fill_mariadb(url, count).await,
    }
}

async fn fill_sqlite(url: &str, count: i64) {
    let mut connection = sqlite(url).await;
    for sql in [
        "CREATE TABLE task (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, type TEXT NOT NULL, state TEXT NOT NULL,
            run_at INTEGER NOT NULL, lease INTEGER NOT NULL DEFAULT 0, host INTEGER, until INTEGER, attempts INTEGER NOT NULL DEFAULT 0,
            finished_at INTEGER, data TEXT NOT NULL) STRICT",
        "CREATE INDEX task_order ON task (state, run_at, id)",
    ] {
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }
    let fill = "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < ?1)
        INSERT INTO task (key, type, state, run_at, data) SELECT 'task-' || n, 'bench', 'waiting', n, ?2 FROM number";
    sqlx::query(fill).bind(count).bind(DATA).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

pub(super) async fn on_sqlite(url: String, limit: i64) -> usize {
    const CLAIM: &str = "UPDATE task SET state = 'running', lease = lease + 1, host = 1, until = unixepoch() * 1000 + 3600000
        WHERE id IN (SELECT id FROM task WHERE state = 'waiting' ORDER BY run_at, id LIMIT ?1) RETURNING id, lease, key, type, data";
    const FINISH: &str =
        "UPDATE task SET state = 'finished', until = NULL, attempts = attempts + 1, finished_at = unixepoch() * 1000
        FROM (SELECT value ->> 0 AS id, value ->> 1 AS lease FROM json_each(?1)) AS s
        WHERE task.id = s.id AND task.lease = s.lease AND task.state = 'running' AND task.until > unixepoch() * 1000";
    let mut connection = sqlite(&url).await;
    let mut finished = 0;
    loop {
        let rows: Vec<(i64, i64, String, String, String)> =
            sqlx::query_as(CLAIM).bind(limit).fetch_all(&mut connection).await.unwrap();
        if rows.is_empty() {
            return finished;
        }
        let leases: Vec<(i64, i64)> = rows.iter().map(|row| (row.0, row.1)).collect();
        let done = sqlx::query(FINISH).bind(json(&leases)).execute(&mut connection).await.unwrap();
        assert_eq!(done.rows_affected(), rows.len() as u64);
        finished += rows.len();
    }
}

async fn fill_postgres(url: &str, count: i64) {
    let mut connection = postgres::connect(url).await;
    for sql in [
        "CREATE TABLE task (id int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL UNIQUE, type text NOT NULL, state text NOT NULL,
            run_at int8 NOT NULL, lease int8 NOT NULL DEFAULT 0, host int8, until int8, attempts int4 NOT NULL DEFAULT 0, finished_at int8,
            data bytea NOT NULL)",
        "CREATE INDEX task_order ON task (run_at, id) WHERE state = 'waiting'",
    ] {
        sqlx::query(sql).execute(&mut connection).await.unwrap();
    }
    let fill = "INSERT INTO task (key, type, state, run_at, data)
        SELECT 'task-' || n, 'bench', 'waiting', n, $2 FROM generate_series(1, $1) AS n";
    sqlx::query(fill).bind(count).bind(DATA.as_bytes()).execute(&mut connection).await.unwrap();
}

pub(super) async fn on_postgres(url: String, limit: i64) -> usize {
    const CLAIM: &str = "UPDATE task SET state = 'running', lease = lease + 1, host = 1,
            until = (extract(epoch FROM clock_timestamp()) * 1000)::int8 + 3600000
        WHERE id = ANY(ARRAY(SELECT id FROM task WHERE state = 'waiting' ORDER BY run_at, id LIMIT $1 FOR UPDATE SKIP LOCKED))
        RETURNING id, lease, key, type, data";
    const FINISH: &str = "UPDATE task SET state = 'finished', until = NULL, attempts = attempts + 1,
            finished_at = (extract(epoch FROM clock_timestamp()) * 1000)::int8
        WHERE id = ANY($1::int8[]) AND lease = ($2::int8[])[width_bucket(id, $1::int8[])] AND state = 'running'
            AND until > (extract(epoch FROM statement_timestamp()) * 1000)::int8";
    let mut connection = postgres::connect(&url).await;
    let mut finished = 0;
    loop {
        let mut rows: Vec<(i64, i64, String, String, Vec<u8>)> =
            sqlx::query_as(CLAIM).bind(limit).fetch_all(&mut connection).await.unwrap();
        if rows.is_empty() {
            return finished;
        }
        rows.sort_unstable_by_key(|row| row.0);
        let (tasks, leases): (Vec<i64>, Vec<i64>) = rows.iter().map(|row| (row.0, row.1)).unzip();
        let done = sqlx::query(FINISH).bind(tasks).bind(leases).execute(&mut connection).await.unwrap();
        assert_eq!(done.rows_affected(), rows.len() as u64);
        finished += rows.len();
    }
}

async fn fill_mariadb(url: &str, count: i64) {
    let mut connection = mariadb::connect(url).await;
    let create = "CREATE TABLE task (id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY, `key` VARBINARY(255) NOT NULL UNIQUE, type VARBINARY(255) NOT NULL,
            state ENUM('waiting', 'running', 'finished') NOT NULL, run_at BIGINT NOT NULL, lease BIGINT NOT NULL DEFAULT 0,
            host BIGINT NOT NULL DEFAULT 0, until BIGINT NOT NULL DEFAULT 0, attempts INT NOT NULL DEFAULT 0, finished_at BIGINT NOT NULL DEFAULT 0,
            data MEDIUMBLOB NOT NULL, KEY task_order (state, run_at, id)) ENGINE = InnoDB";
    mariadb::run(&mut connection, create).await;
    let fill = "INSERT INTO task (`key`, type, state, run_at, data)
        SELECT CONCAT('task-', seq), 'bench', 'waiting', seq, ? FROM seq_1_to_1000000 WHERE seq <= ?";
    sqlx::query(fill).bind(DATA).bind(count).execute(&mut connection).await.unwrap();
}

pub(super) async fn on_mariadb(url: String, limit: i64) -> usize {
    const CHOOSE: &str = "SELECT id, lease + 1, `key`, type, data FROM task WHERE state = 'waiting' ORDER BY run_at, id LIMIT ? FOR UPDATE SKIP LOCKED";
    const CLAIM: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]')) AS s STRAIGHT_JOIN task AS t ON t.id = s.id
        SET t.state = 'running', t.lease = t.lease + 1, t.host = 1, t.until = UNIX_TIMESTAMP() * 1000 + 3600000";
    const FINISH: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', lease BIGINT PATH '$[1]')) AS s
            STRAIGHT_JOIN task AS t ON t.id = s.id
        SET t.state = 'finished', t.attempts = t.attempts + 1, t.finished_at = UNIX_TIMESTAMP() * 1000
        WHERE t.lease = s.lease AND t.state = 'running' AND t.until > UNIX_TIMESTAMP() * 1000";
    let mut connection = mariadb::connect(&url).await;
    let mut finished = 0;
    loop {
        mariadb::run(&mut connection, "START TRANSACTION").await;
        let rows = sqlx::query(CHOOSE).bind(limit).fetch_all(&mut connection).await.unwrap();
        if rows.is_empty() {
            return finished;
        }
        let leases: Vec<(i64, i64)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        rows.iter().for_each(|row| drop(std::hint::black_box(row.get::<Vec<u8>, _>(4))));
        sqlx::query(CLAIM).bind(json(&leases)).execute(&mut connection).await.unwrap();
        mariadb::run(&mut connection, "COMMIT").await;
        let done = sqlx::query(FINISH).bind(json(&leases)).execute(&mut connection).await.unwrap();
        assert_eq!(done.rows_affected(), rows.len() as u64);
        finished += rows.len();
    }
}
