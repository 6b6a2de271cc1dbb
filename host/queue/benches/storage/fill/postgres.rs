//! On PostgreSQL.

use sqlx::{Connection as _, PgConnection};

use super::{DATA, ENDED_TOGETHER};

const WAITING: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    created AS (
        INSERT INTO laelaps.task (id, created_at, run_at, bytes, key, type, user_name, queue, data)
        SELECT nextval('laelaps.task_number'), now, now, octet_length($4), 'task-' || n,
            CASE $5::int8 WHEN 1 THEN 'bench' ELSE 'bench-' || n % $5 END,
            CASE WHEN $3 = 0 THEN '' ELSE 'user-' || n / $5 % $3 END, CASE $5 WHEN 1 THEN '' ELSE 'queue-' || n % $5 END, $4
        FROM clock, generate_series($1::int8, $2::int8) AS n RETURNING id, turn, bytes, type, user_name, queue),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, user_name, queue) SELECT turn, id, bytes, user_name, queue FROM created ORDER BY id),
    entered AS (
        INSERT INTO laelaps.account AS account (queue, user_name, head_turn, head_task, picked)
        SELECT DISTINCT ON (queue, user_name) queue, user_name, turn, id, (SELECT last_value FROM laelaps.pick_number)
        FROM created WHERE user_name <> '' ORDER BY queue, user_name, turn, id
        ON CONFLICT (queue, user_name) DO UPDATE SET head_turn = excluded.head_turn, head_task = excluded.head_task WHERE account.head_task IS NULL)
    INSERT INTO laelaps.tally (queue, type, live) SELECT queue, type, count(*) FROM created GROUP BY queue, type";

pub(super) async fn waiting(url: &str, first: i64, last: i64, users: i64, queues: i64) {
    let mut connection = PgConnection::connect(url).await.expect("the server serves");
    let query = sqlx::query(WAITING).bind(first).bind(last).bind(users).bind(DATA.as_bytes()).bind(queues);
    query.execute(&mut connection).await.expect("the tables are there");
}

const FINISHED: &str = "WITH created AS (
        INSERT INTO laelaps.task (id, created_at, run_at, finished_at, retained_until, state, attempts, event, lease, host, bytes, key, type, data)
        SELECT nextval('laelaps.task_number'), 1, 1, 1, 1, 'finished', 1, 'finish', nextval('laelaps.lease_number'), 1,
            octet_length($3), 'ended-' || n, 'bench', $3
        FROM generate_series($1::int8, $2::int8) AS n RETURNING id),
    retained AS (
        INSERT INTO laelaps.retention (until, tasks) SELECT 1, array_agg(id ORDER BY id) FROM created GROUP BY id / $4 ORDER BY id / $4)
    INSERT INTO laelaps.tally (type, finished) SELECT 'bench', count(*) FROM created";

pub(super) async fn finished(url: &str, first: i64, last: i64) {
    let mut connection = PgConnection::connect(url).await.expect("the server serves");
    let query = sqlx::query(FINISHED).bind(first).bind(last).bind(DATA.as_bytes()).bind(ENDED_TOGETHER);
    query.execute(&mut connection).await.expect("the tables are there");
}
