//! PostgreSQL's part: a server of its own, the same statements without the crate, and what they write to its log.

use std::time::Instant;

use laelaps_test_databases::Durability;
pub(crate) use laelaps_test_databases::postgres::Server;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, postgres::PgConnectOptions};
use tokio::task::JoinSet;

use crate::{DATA, Fresh, Home, fill, rate, through_the_crate, work};

/// With the server's defaults for durability.
pub(crate) async fn start() -> Server {
    Server::start(Durability::Disk).await
}

/// Claim and finish all of a backlog.
pub(crate) async fn path(home: &Home, server: &Server, count: usize, batch: usize) {
    println!("claim and finish in batches of {batch}, {count} waiting");
    let mut raws = Vec::new();
    for connections in [1, 2, 4] {
        raws.push((connections, of_the_same_layout(home, count, batch, connections).await));
    }
    let best = raws.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    for callers in [1, 2, 4] {
        let rate = through_the_crate(home, count, batch, callers).await;
        println!("  the crate, {callers} at once      {rate:9.0} tasks/s   {:.2} of the best raw", rate / best);
    }
    let single = of_one_table(server, count, batch).await;
    for (connections, rate) in raws {
        println!("  raw, {connections} connections        {rate:9.0} tasks/s   {:.2} of one table", rate / single);
    }
    println!("  one table                {single:9.0} tasks/s");
    let (submitted, worked) = log_bytes(home, count, batch).await;
    println!("  log of changes           {submitted:9.0} bytes a task for the submit, {worked:.0} from claim to finish\n");
}

async fn connect(url: &str) -> PgConnection {
    let options: PgConnectOptions = url.parse().unwrap();
    let options = options.options([("enable_seqscan", "off"), ("enable_hashjoin", "off"), ("enable_mergejoin", "off")]);
    options.disable_statement_logging().connect().await.unwrap()
}

/// The same tables and transactions with the least that they cannot do without: take out of ready, lease, read, finish under the fence,
/// enter for removal.
async fn of_the_same_layout(home: &Home, count: usize, batch: usize, connections: usize) -> f64 {
    let fresh = home.fresh().await;
    fill(&fresh.queue, count, |_| None).await;
    fresh.queue.close().await;
    let mut working = JoinSet::new();
    let started = Instant::now();
    for _ in 0..connections {
        let url = fresh.url.clone();
        working.spawn(async move { raw_work(&mut connect(&url).await, batch).await });
    }
    let finished: usize = working.join_all().await.into_iter().sum();
    assert_eq!(finished, count);
    rate(count, started.elapsed())
}

async fn raw_work(connection: &mut PgConnection, batch: usize) -> usize {
    const CLAIM: &str = "WITH chosen AS MATERIALIZED (
            SELECT ctid AS place, turn, task FROM laelaps.ready WHERE queue = '' AND user_name = '' AND (turn, task) >= ($2, $3)
            ORDER BY turn, task LIMIT $1 FOR UPDATE SKIP LOCKED),
        gone AS (DELETE FROM laelaps.ready WHERE ctid = ANY(ARRAY(SELECT place FROM chosen))),
        taken AS (
            UPDATE laelaps.task SET state = 'running', lease = nextval('laelaps.lease_number'), host = 1,
                until = (extract(epoch FROM statement_timestamp()) * 1000)::int8 + 300000
            WHERE id = ANY(ARRAY(SELECT task FROM chosen)) RETURNING id, lease, key, type, data, turn)
        SELECT * FROM taken";
    const FINISH: &str = "WITH done AS (
            UPDATE laelaps.task SET state = 'finished', until = NULL, event = 'finish', attempts = attempts + 1, plugin = 1,
                finished_at = (extract(epoch FROM statement_timestamp()) * 1000)::int8,
                retained_until = (extract(epoch FROM statement_timestamp()) * 1000)::int8 + 300000
            WHERE id = ANY($1::int8[]) AND state = 'running' AND until > (extract(epoch FROM statement_timestamp()) * 1000)::int8
                AND lease = ($2::int8[])[width_bucket(id, $1::int8[])]
            RETURNING id, lease),
        kept AS (INSERT INTO laelaps.retention (until, tasks) SELECT $3, array_agg(id) FROM done)
        SELECT array_agg(lease) FROM done";
    type Row = (i64, i64, String, String, Vec<u8>, i64);
    let limit = i64::try_from(batch).unwrap();
    let mut mark = (i64::MIN, i64::MIN);
    let mut finished = 0;
    loop {
        let mut rows: Vec<Row> =
            sqlx::query_as(CLAIM).bind(limit).bind(mark.0).bind(mark.1).fetch_all(&mut *connection).await.unwrap();
        rows.sort_unstable_by_key(|row| row.0);
        let Some(last) = rows.iter().map(|row| (row.5, row.0)).max() else {
            return finished;
        };
        mark = last;
        let (tasks, leases): (Vec<i64>, Vec<i64>) = rows.iter().map(|row| (row.0, row.1)).unzip();
        let held: Vec<i64> =
            sqlx::query_scalar(FINISH).bind(tasks).bind(leases).bind(1_i64 << 42).fetch_one(&mut *connection).await.unwrap();
        assert_eq!(held.len(), rows.len());
        finished += rows.len();
    }
}

/// One table, claimed and finished through an index on what waits.
async fn of_one_table(server: &Server, count: usize, batch: usize) -> f64 {
    let mut connection = connect(&server.create_database().await).await;
    for sql in [
        "CREATE TABLE task (id int8 GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL UNIQUE, type text NOT NULL, state text NOT NULL,
            run_at int8 NOT NULL, lease int8 NOT NULL DEFAULT 0, host int8, until int8, attempts int4 NOT NULL DEFAULT 0, finished_at int8,
            data bytea NOT NULL)",
        "CREATE INDEX task_order ON task (run_at, id) WHERE state = 'waiting'",
    ] {
        connection.execute(sql).await.unwrap();
    }
    sqlx::query(
        "INSERT INTO task (key, type, state, run_at, data) SELECT 'task-' || n, 'bench', 'waiting', n, $2 FROM generate_series(1, $1) AS n",
    )
    .bind(i64::try_from(count).unwrap())
    .bind(DATA.as_bytes())
    .execute(&mut connection)
    .await
    .unwrap();
    let limit = i64::try_from(batch).unwrap();
    let started = Instant::now();
    loop {
        let rows: Vec<(i64, i64, String, String, Vec<u8>)> = sqlx::query_as(
            "UPDATE task SET state = 'running', lease = lease + 1, host = 1,
                until = (extract(epoch FROM statement_timestamp()) * 1000)::int8 + 300000
            WHERE id = ANY(ARRAY(SELECT id FROM task WHERE state = 'waiting' ORDER BY run_at, id LIMIT $1 FOR UPDATE SKIP LOCKED))
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
        sqlx::query(
            "UPDATE task SET state = 'finished', until = NULL, attempts = attempts + 1,
                finished_at = (extract(epoch FROM statement_timestamp()) * 1000)::int8
            WHERE id = ANY($1) AND state = 'running' AND until > (extract(epoch FROM statement_timestamp()) * 1000)::int8",
        )
        .bind(rows.iter().map(|row| row.0).collect::<Vec<i64>>())
        .execute(&mut connection)
        .await
        .unwrap();
    }
}

/// What the server writes to its log for a task: for the submit, and from claim to finish.
async fn log_bytes(home: &Home, count: usize, batch: usize) -> (f64, f64) {
    let Fresh { queue, url, .. } = home.fresh().await;
    let mut connection = connect(&url).await;
    connection.execute("CHECKPOINT").await.unwrap();
    let mut places = vec![place(&mut connection).await];
    fill(&queue, count, |_| None).await;
    places.push(place(&mut connection).await);
    assert_eq!(work(queue.clone(), batch).await, count);
    places.push(place(&mut connection).await);
    queue.close().await;
    let each = |from: f64, to: f64| (to - from) / count as f64;
    (each(places[0], places[1]), each(places[1], places[2]))
}

/// How much was written to the log so far.
async fn place(connection: &mut PgConnection) -> f64 {
    const PLACE: &str = "SELECT (pg_current_wal_insert_lsn() - '0/0')::float8";
    sqlx::query_scalar(PLACE).fetch_one(connection).await.unwrap()
}
