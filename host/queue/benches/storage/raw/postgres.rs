//! PostgreSQL: a claim is one statement, and so is a settlement.

use std::sync::atomic::{AtomicI64, Ordering};

use sqlx::{AssertSqlSafe, ConnectOptions as _, PgConnection, Row as _, SqlSafeStr as _, postgres::PgConnectOptions};

use super::{ALIVE_MS, RETENTION_MS};
use crate::statements::statement;

const CLAIM: &str = include_str!("../../../src/postgres/claim.rs");
const GOT: &str = include_str!("../../../src/postgres/got.rs");
const SETTLE: &str = include_str!("../../../src/postgres/settle.rs");
const SOURCES: [&str; 3] = [CLAIM, GOT, SETTLE];
static CLAIMS: AtomicI64 = AtomicI64::new(1);
/// Of a claimed row: number, lease, key, type, when it became ready, data.
const COLUMNS: [usize; 6] = [9, 10, 11, 12, 27, 28];

pub(super) async fn work(url: String, host: i64, limit: i64) -> usize {
    let mut connection = connect(&url).await;
    let claim = AssertSqlSafe(statement(CLAIM, &SOURCES, "CLAIM")).into_sql_str();
    let finish = AssertSqlSafe(statement(SETTLE, &SOURCES, "FINISH")).into_sql_str();
    let mut mark = (i64::MIN, i64::MIN);
    let mut finished = 0;
    loop {
        // The crate draws it at random.
        let number = CLAIMS.fetch_add(1, Ordering::Relaxed);
        let rows = sqlx::query(claim.clone())
            .bind(host)
            .bind(limit)
            .bind(mark.0)
            .bind(mark.1)
            .bind(ALIVE_MS)
            .bind(i64::MIN)
            .bind(i64::MIN)
            .bind(false)
            .bind(i64::MIN)
            .bind(i64::MIN)
            .bind(true)
            .bind(false)
            .bind(number)
            .bind("")
            .bind(None::<Vec<String>>)
            .bind(false)
            .fetch_all(&mut connection)
            .await
            .unwrap();
        let mut claimed: Vec<(i64, i64, i64)> = Vec::with_capacity(rows.len());
        let [task, lease, key, task_type, turn, data] = COLUMNS;
        for row in rows.iter().filter(|row| row.get::<Option<i64>, _>(task).is_some()) {
            let read: (String, String, Vec<u8>) = (row.get(key), row.get(task_type), row.get(data));
            std::hint::black_box(read);
            claimed.push((row.get(task), row.get(lease), row.get(turn)));
        }
        claimed.sort_unstable();
        let Some(last) = claimed.iter().map(|(task, _, turn)| (*turn, *task)).max() else { return finished };
        mark = last;
        let (tasks, leases): (Vec<i64>, Vec<i64>) = claimed.iter().map(|(task, lease, _)| (*task, *lease)).unzip();
        let held: Vec<i64> = sqlx::query_scalar(finish.clone())
            .bind(tasks)
            .bind(leases)
            .bind("finish")
            .bind(1)
            .bind(RETENTION_MS)
            .bind(vec![number])
            .bind(Vec::<i64>::new())
            .fetch_one(&mut connection)
            .await
            .unwrap();
        assert_eq!(held.len(), claimed.len());
        finished += held.len();
    }
}

pub(super) async fn connect(url: &str) -> PgConnection {
    let options: PgConnectOptions = url.parse().unwrap();
    let off = ["enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin", "jit"];
    let options = options.options(off.map(|setting| (setting, "off")));
    options.disable_statement_logging().connect().await.unwrap()
}
