//! How many tasks a second come in from applications: each producer has a connection of its own and submits one task in each of its transactions,
//! with the SQL that the queue has for them. Beside it a bare INSERT of the same row, into a table with the same columns and indexes that
//! nothing else is done with. 0.8 of that was wanted and is not reached, so nothing is promised: see ARCHITECTURE.md.

use std::time::Instant;

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, MySqlConnection, PgConnection};
use tokio::task::JoinSet;

use crate::home::{Home, settle_down};
use crate::report::{Report, ratios};
use crate::words::Words;
use crate::work::rate;

/// Producers at once, and how many tasks they submit together in a round.
const PRODUCERS: [(usize, usize); 3] = [(1, 1_000), (16, 8_000), (64, 16_000)];
const DATA: &str = r#"{"url":"https://example.org/a/rather/long/path?with=a&query=string","tries":3,"priority":"usual"}"#;

/// A table for the bare rows; statements with the key as their first and the data as their second parameter.
struct Sql {
    bare_table: &'static str,
    bare: &'static str,
    submit: &'static str,
}

const POSTGRES: Sql = Sql {
    bare_table: "CREATE TABLE bare (LIKE laelaps.task INCLUDING ALL)",
    bare: "INSERT INTO bare (created_at, run_at, bytes, key, type, data)
        SELECT now, now, octet_length($2), $1, 'bench', convert_to($2, 'UTF8') FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now) AS clock",
    submit: "SELECT laelaps.submit($1, 'bench', $2)",
};
const MARIADB: Sql = Sql {
    bare_table: "CREATE TABLE bare LIKE laelaps_task; ALTER TABLE bare ADD COLUMN data LONGBLOB NOT NULL",
    bare: "INSERT INTO bare (`key`, type, created_at, run_at, data)
        VALUES (?, 'bench', ROUND(1000 * UNIX_TIMESTAMP(NOW(3))), ROUND(1000 * UNIX_TIMESTAMP(NOW(3))), ?)",
    submit: "CALL laelaps_submit(?, 'bench', ?, NULL)",
};

pub(crate) async fn measure(home: &Home, words: &Words, report: &mut Report) {
    let sql = if matches!(home, Home::Postgres(_)) { &POSTGRES } else { &MARIADB };
    for (producers, count) in PRODUCERS {
        let each = words.scaled(count) / producers;
        let (mut submitted, mut bare) = (Vec::new(), Vec::new());
        for _ in 0..words.rounds() {
            let fresh = home.fresh().await;
            execute(&fresh.url, sql.bare_table).await;
            settle_down(&fresh.url).await;
            submitted.push(rate_of(&fresh.url, producers, each, sql.submit).await);
            settle_down(&fresh.url).await;
            bare.push(rate_of(&fresh.url, producers, each, sql.bare).await);
            fresh.drop().await;
        }
        report.figure(home.word(), &format!("{producers} producers: one submit a transaction"), "tasks/s", &submitted);
        report.figure(home.word(), &format!("{producers} producers: one bare INSERT a transaction"), "rows/s", &bare);
        report.figure(home.word(), &format!("{producers} producers: submit / bare INSERT"), "x", &ratios(&submitted, &bare));
    }
}

async fn execute(url: &str, sql: &'static str) {
    if url.starts_with("postgres:") {
        PgConnection::connect(url).await.unwrap().execute(sqlx::raw_sql(sql)).await.unwrap();
    } else {
        MySqlConnection::connect(url).await.unwrap().execute(sqlx::raw_sql(sql)).await.unwrap();
    }
}

async fn rate_of(url: &str, producers: usize, each: usize, sql: &'static str) -> f64 {
    let mut connected = JoinSet::new();
    for producer in 0..producers {
        connected.spawn(Producer::connect(url.to_owned(), producer));
    }
    let connected = connected.join_all().await;
    let started = Instant::now();
    let mut working = JoinSet::new();
    for mut producer in connected {
        working.spawn(async move {
            for number in 0..each {
                producer.run(sql, number).await;
            }
        });
    }
    working.join_all().await;
    rate(producers * each, started.elapsed())
}

enum Producer {
    Postgres(PgConnection, usize),
    MariaDb(MySqlConnection, usize),
}

impl Producer {
    async fn connect(url: String, number: usize) -> Self {
        if url.starts_with("postgres:") {
            Self::Postgres(PgConnection::connect(&url).await.unwrap(), number)
        } else {
            Self::MariaDb(MySqlConnection::connect(&url).await.unwrap(), number)
        }
    }

    async fn run(&mut self, sql: &'static str, task: usize) {
        let sql = AssertSqlSafe(sql);
        match self {
            Self::Postgres(connection, number) => {
                sqlx::query(sql).bind(format!("{number}-{task}")).bind(DATA).execute(connection).await.map(drop).unwrap();
            }
            Self::MariaDb(connection, number) => {
                sqlx::query(sql).bind(format!("{number}-{task}")).bind(DATA).execute(connection).await.map(drop).unwrap();
            }
        }
    }
}
