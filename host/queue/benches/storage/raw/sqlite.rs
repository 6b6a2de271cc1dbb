//! SQLite: a transaction that claims, and one that settles. Only one connection can write at a time, so one is the limit.

use serde_json::json;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Row as _, SqlSafeStr as _, SqlStr};

use super::{ALIVE_MS, RETENTION_MS};
use crate::home::sqlite;
use crate::statements::statement;

const CLAIM: &str = include_str!("../../../src/sqlite/claim.rs");
const CHOOSE: &str = include_str!("../../../src/sqlite/choose.rs");
const SETTLE: &str = include_str!("../../../src/sqlite/settle.rs");
const ACCOUNTS: &str = include_str!("../../../src/sqlite/accounts.rs");
const PIECES: &str = include_str!("../../../src/sqlite/pieces.rs");
const WRITER: &str = include_str!("../../../src/sqlite/writer.rs");
const SOURCES: [&str; 6] = [CLAIM, CHOOSE, SETTLE, ACCOUNTS, PIECES, WRITER];

struct Statements {
    begin: SqlStr,
    begin_later: SqlStr,
    look: SqlStr,
    open_accounts: SqlStr,
    candidates: SqlStr,
    sum: SqlStr,
    take: SqlStr,
    held: SqlStr,
    plugins: SqlStr,
    finish: SqlStr,
    retain: SqlStr,
    changes: SqlStr,
}

impl Statements {
    fn read() -> Self {
        let one = |source, name| AssertSqlSafe(statement(source, &SOURCES, name)).into_sql_str();
        let together = |source, names: &[&str]| {
            let statements: Vec<String> = names.iter().map(|name| statement(source, &SOURCES, name)).collect();
            AssertSqlSafe(statements.join(";\n")).into_sql_str()
        };
        let changes = ["ENTER_ACCOUNTS", "CHANGE_ACCOUNTS", "LEAVE_ACCOUNTS", "ENTER_TALLY", "CHANGE_TALLY", "LEAVE_TALLY"];
        Self {
            begin: one(WRITER, "BEGIN"),
            begin_later: one(WRITER, "BEGIN_LATER"),
            look: one(CLAIM, "LOOK"),
            open_accounts: one(CHOOSE, "OPEN_ACCOUNTS"),
            candidates: one(CHOOSE, "CANDIDATES_OF_ONE"),
            sum: one(CLAIM, "SUM"),
            take: together(CLAIM, &["TAKE_FROM_READY", "TAKE_FROM_SUSPECT", "COUNT_UP", "TAKE", "TAKEN"]),
            held: one(SETTLE, "HELD"),
            plugins: one(SETTLE, "FIND"),
            finish: one(SETTLE, "FINISH"),
            retain: one(SETTLE, "RETAIN"),
            changes: together(ACCOUNTS, &changes),
        }
    }
}

pub(super) async fn work(url: String, host: i64, limit: i64) -> usize {
    let mut connection = sqlite(&url).await;
    let statements = Statements::read();
    let mut finished = 0;
    loop {
        let leases = claim(&mut connection, &statements, host, limit).await;
        if leases.is_empty() {
            return finished;
        }
        finished += settle(&mut connection, &statements, leases).await;
    }
}

async fn begin(connection: &mut SqliteConnection, begin: &SqlStr) -> i64 {
    let rows = sqlx::query(begin.clone()).fetch_all(connection).await.unwrap();
    // The state of the log, the time, and the version of the data.
    rows[1].get(0)
}

async fn end(connection: &mut SqliteConnection) {
    sqlx::query("COMMIT").execute(connection).await.unwrap();
}

/// Tasks and their leases.
async fn claim(connection: &mut SqliteConnection, statements: &Statements, host: i64, limit: i64) -> Vec<(i64, i64)> {
    let now = begin(connection, &statements.begin_later).await;
    let look: (bool, Option<i64>, i64, i64, i64) =
        sqlx::query_as(statements.look.clone()).bind(host).fetch_one(&mut *connection).await.unwrap();
    let (_, _, _, lease, pick) = look;
    let accounts = sqlx::query(statements.open_accounts.clone()).bind(limit).bind(i64::MIN).bind(1_i64).bind(0_i64);
    let Some(account) = accounts.fetch_optional(&mut *connection).await.unwrap() else {
        end(connection).await;
        return Vec::new();
    };
    let head: (i64, i64) = (account.get(4), account.get(5));
    let rest = sqlx::query(statements.candidates.clone()).bind("").bind("").bind(head.0).bind(head.1).bind(limit - 1);
    let mut tasks = vec![head.1];
    tasks.extend(rest.fetch_all(&mut *connection).await.unwrap().iter().map(|row| row.get::<i64, _>(1)));
    sqlx::query(statements.sum.clone()).bind(json!(tasks).to_string()).fetch_one(&mut *connection).await.unwrap();
    let count = i64::try_from(tasks.len()).unwrap();
    let take = json!({
        "tasks": tasks, "first_lease": lease + 1, "lease": lease + count, "pick": pick + count, "host": host, "until": now + ALIVE_MS, "alone": 0,
    });
    let rows = sqlx::query(statements.take.clone()).bind(take.to_string()).fetch_all(&mut *connection).await.unwrap();
    let mut leases = Vec::with_capacity(rows.len());
    for row in &rows {
        let columns: serde_json::Value = serde_json::from_str(row.get(0)).unwrap();
        std::hint::black_box(row.get::<Vec<u8>, _>(1));
        leases.push((columns[0].as_i64().unwrap(), columns[1].as_i64().unwrap()));
    }
    let changes = json!({ "accounts": [["", "", -count, count, pick + count]], "tally": [] });
    sqlx::query(statements.changes.clone()).bind(changes.to_string()).execute(&mut *connection).await.unwrap();
    end(connection).await;
    leases
}

async fn settle(connection: &mut SqliteConnection, statements: &Statements, leases: Vec<(i64, i64)>) -> usize {
    let now = begin(connection, &statements.begin).await;
    let by_task: Vec<String> = leases.iter().map(|(task, lease)| format!("\"{task}\":{lease}")).collect();
    let asked = format!("{{{}}}", by_task.join(","));
    let held = sqlx::query_scalar(statements.held.clone()).bind(asked.clone()).bind(now).bind(false);
    let held: String = held.fetch_one(&mut *connection).await.unwrap();
    let held: Vec<serde_json::Value> = serde_json::from_str(&held).unwrap();
    assert_eq!(held.len(), leases.len());
    let digests = json!(["0123456789abcdef".repeat(4)]).to_string();
    sqlx::query(statements.plugins.clone()).bind(digests).fetch_optional(&mut *connection).await.unwrap();
    let finish = sqlx::query(statements.finish.clone()).bind(asked).bind(now).bind(false).bind("finish").bind(1_i64);
    finish.bind(RETENTION_MS).execute(&mut *connection).await.unwrap();
    let tasks: Vec<i64> = leases.iter().map(|(task, _)| *task).collect();
    let retain = sqlx::query(statements.retain.clone()).bind(json!([[now + RETENTION_MS, tasks]]).to_string());
    retain.execute(&mut *connection).await.unwrap();
    let ended = i64::try_from(held.len()).unwrap();
    let changes = json!({
        "accounts": [["", "", 0, -ended, null]], "tally": [["type", "", "bench", -ended], ["ended", "", "finished", ended]],
    });
    sqlx::query(statements.changes.clone()).bind(changes.to_string()).execute(&mut *connection).await.unwrap();
    end(connection).await;
    held.len()
}
