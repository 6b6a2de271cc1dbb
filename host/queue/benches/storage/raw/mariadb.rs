//! MariaDB: a look without locks, a transaction that claims, and one that settles.

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Row as _, SqlSafeStr as _, SqlStr};

use super::{ALIVE_MS, RETENTION_MS};
use crate::statements::statement;

const CLAIM: &str = include_str!("../../../src/mysql/claim.rs");
const OUTLOOK: &str = include_str!("../../../src/mysql/outlook.rs");
const CHOOSE: &str = include_str!("../../../src/mysql/choose.rs");
const FRONTS: &str = include_str!("../../../src/mysql/fronts.rs");
const MEND: &str = include_str!("../../../src/mysql/mend.rs");
const SETTLE: &str = include_str!("../../../src/mysql/settle.rs");
const ACCOUNTS: &str = include_str!("../../../src/mysql/accounts.rs");
const SESSION: &str = include_str!("../../../src/mysql/session.rs");
const ROWS: &str = include_str!("../../../src/mysql/rows.rs");
const SOURCES: [&str; 9] = [CLAIM, OUTLOOK, CHOOSE, FRONTS, MEND, SETTLE, ACCOUNTS, SESSION, ROWS];
/// As the crate's connections are set.
const SETTINGS: &str = "SET NAMES utf8mb4; SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED;
    SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', autocommit = 1, max_statement_time = 60";

/// A claim is looked at for the first time after this.
const FIRST_LOOK_MS: i64 = 10_000;
const LEASES_OF_CLAIM: i64 = 1 << 20;

struct Statements {
    begin: String,
    look: SqlStr,
    first: SqlStr,
    sum: SqlStr,
    out: SqlStr,
    enter: SqlStr,
    lease: SqlStr,
    leased: SqlStr,
    held: SqlStr,
    finish: SqlStr,
    retain: SqlStr,
    tally: SqlStr,
}

impl Statements {
    fn read() -> Self {
        let of = |source: &'static str, name: &str| statement(source, &SOURCES, name);
        let sql = |source: &'static str, name: &str| AssertSqlSafe(of(source, name)).into_sql_str();
        Self {
            begin: of(SESSION, "BEGIN"),
            look: sql(OUTLOOK, "LOOK"),
            first: sql(FRONTS, "FIRST"),
            sum: sql(CHOOSE, "SUM"),
            out: sql(CLAIM, "READY"),
            enter: sql(CLAIM, "ENTER"),
            lease: sql(CLAIM, "LEASE"),
            leased: sql(CLAIM, "LEASED"),
            held: sql(SETTLE, "HELD"),
            finish: sql(SETTLE, "FINISH"),
            retain: sql(SETTLE, "RETAIN"),
            tally: sql(ACCOUNTS, "TALLY"),
        }
    }
}

pub(super) async fn work(url: String, host: i64, limit: i64) -> usize {
    let mut connection = connect(&url).await;
    let statements = Statements::read();
    let mut mark = (i64::MIN, 0);
    let mut finished = 0;
    loop {
        let leases = claim(&mut connection, &statements, host, limit, &mut mark).await;
        if leases.is_empty() {
            return finished;
        }
        finished += settle(&mut connection, &statements, leases).await;
    }
}

pub(super) async fn connect(url: &str) -> MySqlConnection {
    let options: MySqlConnectOptions = url.parse().unwrap();
    let mut connection = options.disable_statement_logging().connect().await.unwrap();
    run(&mut connection, SETTINGS).await;
    connection
}

pub(super) async fn run(connection: &mut MySqlConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.unwrap();
}

async fn begin(connection: &mut MySqlConnection, statements: &Statements) -> i64 {
    let begin = AssertSqlSafe(statements.begin.as_str());
    sqlx::raw_sql(begin).fetch_all(connection).await.unwrap().last().unwrap().get(0)
}

/// Tasks and their leases, in the order of tasks.
async fn claim(
    connection: &mut MySqlConnection,
    statements: &Statements,
    host: i64,
    limit: i64,
    mark: &mut (i64, i64),
) -> Vec<(i64, i64)> {
    let look = sqlx::query(statements.look.clone()).bind(host).bind(i64::MIN).bind(0);
    let look = look.bind("").bind("\u{ff}").bind("").bind(mark.0).bind("\u{ff}").bind("").bind("").bind(i64::MAX);
    look.fetch_one(&mut *connection).await.unwrap();
    let now = begin(connection, statements).await;
    let first = sqlx::query(statements.first.clone()).bind("").bind(mark.0).bind(mark.1).bind(mark.0).bind(limit);
    let first = first.fetch_all(&mut *connection).await.unwrap();
    let places: Vec<(i64, i64)> = first.iter().map(|row| (row.get(0), row.get(1))).collect();
    let Some(last) = places.last() else {
        run(connection, "ROLLBACK").await;
        return Vec::new();
    };
    *mark = *last;
    let tasks = json(&places.iter().map(|(_, task)| *task).collect::<Vec<i64>>());
    sqlx::query(statements.sum.clone()).bind(&tasks).fetch_one(&mut *connection).await.unwrap();
    let in_queues: Vec<(i64, i64, &str)> = places.iter().map(|(turn, task)| (*turn, *task, "")).collect();
    sqlx::query(statements.out.clone()).bind(json(&in_queues)).execute(&mut *connection).await.unwrap();
    let entered = sqlx::query(statements.enter.clone()).bind(host).bind(now + FIRST_LOOK_MS).bind(&tasks);
    let entered = entered.execute(&mut *connection).await.unwrap().last_insert_id();
    let first = i64::try_from(entered).unwrap() * LEASES_OF_CLAIM;
    let lease =
        sqlx::query(statements.lease.clone()).bind(json(&in_queues)).bind(first).bind(host).bind(now + ALIVE_MS).bind(false);
    lease.execute(&mut *connection).await.unwrap();
    let rows = sqlx::query(statements.leased.clone()).bind(&tasks).bind(first).fetch_all(&mut *connection).await.unwrap();
    let mut leases = Vec::with_capacity(rows.len());
    for row in &rows {
        let read: (Vec<u8>, Vec<u8>, Vec<u8>) = (row.get(2), row.get(3), row.get(13));
        std::hint::black_box(read);
        leases.push((row.get(0), row.get(1)));
    }
    let running = serde_json::json!([["running", "", leases.len(), ""]]).to_string();
    sqlx::query(statements.tally.clone()).bind(running).execute(&mut *connection).await.unwrap();
    run(connection, "COMMIT").await;
    leases.sort_unstable();
    leases
}

async fn settle(connection: &mut MySqlConnection, statements: &Statements, leases: Vec<(i64, i64)>) -> usize {
    let now = begin(connection, statements).await;
    let asked = json(&leases);
    let held = sqlx::query(statements.held.clone()).bind(&asked).bind(false).fetch_all(&mut *connection).await.unwrap();
    assert_eq!(held.len(), leases.len());
    let until = now + RETENTION_MS;
    let finish = sqlx::query(statements.finish.clone()).bind(&asked).bind("finish").bind(1).bind(now).bind(until);
    finish.execute(&mut *connection).await.unwrap();
    let tasks = json(&leases.iter().map(|(task, _)| *task).collect::<Vec<i64>>());
    sqlx::query(statements.retain.clone()).bind(json(&[(until, tasks)])).execute(&mut *connection).await.unwrap();
    let ended = i64::try_from(held.len()).unwrap();
    let tally = serde_json::json!([["type", "bench", -ended, ""], ["ended", "finished", ended, ""], ["running", "", -ended, ""]]);
    sqlx::query(statements.tally.clone()).bind(tally.to_string()).execute(&mut *connection).await.unwrap();
    run(connection, "COMMIT").await;
    held.len()
}

pub(super) fn json<T: serde::Serialize>(rows: &[T]) -> String {
    serde_json::to_string(rows).unwrap()
}
