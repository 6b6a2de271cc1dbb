//! The table as Ruby's programs use it: the facts stand in the reference of PerfectQueue's table.

use std::ops::Range;

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection};
use sqlx::{ConnectOptions as _, Row as _};

pub(super) const NAME: &str = "tasks";

/// 100 bytes with the type.
const DATA: &str = r#"{"payload":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx","type":"bench"}"#;

const FILL: &str = "INSERT INTO tasks (id, timeout, data, created_at, resource, max_running)
    SELECT CONCAT('task-', ? + seq), UNIX_TIMESTAMP() - 1, ?, UNIX_TIMESTAMP() - 1, CONCAT('user-', (? + seq) MOD ?), ?
    FROM seq_0_to_999999 WHERE seq < ?";

const CHOOSE_FAIR: &str =
    "SELECT id, timeout, data, created_at, resource, max_running, IFNULL(max_running, 1) / (IFNULL(running, 0) + 1) AS weight
    FROM tasks LEFT JOIN (
        SELECT resource AS res, COUNT(1) AS running FROM tasks AS T
        WHERE timeout > UNIX_TIMESTAMP() AND created_at IS NOT NULL AND resource IS NOT NULL GROUP BY resource
    ) AS R ON resource = res
    WHERE 1300000000 < timeout AND timeout <= UNIX_TIMESTAMP() AND created_at IS NOT NULL
        AND (max_running - running IS NULL OR max_running - running > 0)
    ORDER BY weight DESC, timeout ASC LIMIT ?";

const ACQUIRE: &str = "UPDATE tasks JOIN (
        SELECT id FROM tasks FORCE INDEX (index_tasks_on_timeout)
        WHERE 1300000000 < timeout AND timeout <= ? AND created_at IS NOT NULL ORDER BY timeout ASC LIMIT ?
    ) AS t1 USING (id) SET timeout = ?, owner = CONNECTION_ID()";
const ACQUIRED: &str =
    "SELECT id, data, created_at, resource, max_running FROM tasks WHERE timeout = ? AND owner = CONNECTION_ID()";
/// Of a set at once, fenced as ours are, since one for each task is what makes Ruby slow.
const FINISH: &str =
    "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) PATH '$')) AS s STRAIGHT_JOIN tasks AS t ON t.id = s.id
    SET t.created_at = NULL, t.resource = NULL, t.timeout = UNIX_TIMESTAMP() - 1000000000 + 300
    WHERE t.created_at IS NOT NULL AND t.timeout = ? AND t.owner = CONNECTION_ID()";

pub(super) struct Table {
    pub(super) url: String,
    connection: MySqlConnection,
}

impl Table {
    pub(super) async fn connect(url: String) -> Self {
        let options: MySqlConnectOptions = url.parse().unwrap();
        let connection = options.disable_statement_logging().connect().await.unwrap();
        Self { url, connection }
    }

    /// Rows that wait, by turns of so many users.
    pub(super) async fn fill(&mut self, numbers: Range<usize>, users: i64, max_running: i64) {
        let first = i64::try_from(numbers.start).unwrap();
        let count = i64::try_from(numbers.len()).unwrap();
        let query = sqlx::query(FILL).bind(first).bind(DATA).bind(first).bind(users).bind(max_running).bind(count);
        assert_eq!(query.execute(&mut self.connection).await.unwrap().rows_affected(), numbers.len() as u64);
    }

    /// The tasks are nobody's.
    pub(super) async fn leave_users(&mut self) {
        sqlx::query("UPDATE tasks SET resource = NULL, max_running = NULL").execute(&mut self.connection).await.unwrap();
    }

    /// How many rows PerfectQueue's query for the fair order finds.
    pub(super) async fn rubys_fair_choice(&mut self, limit: i64) -> usize {
        sqlx::query(CHOOSE_FAIR).bind(limit).fetch_all(&mut self.connection).await.unwrap().len()
    }

    /// Acquire by age and finish everything, in batches.
    pub(super) async fn work_off(&mut self, batch: usize) -> usize {
        let limit = i64::try_from(batch).unwrap();
        let mut finished = 0;
        loop {
            let ids = self.acquire(limit, finished).await;
            if ids.0.is_empty() {
                return finished;
            }
            let asked = serde_json::to_string(&ids.0).unwrap();
            let done = sqlx::query(FINISH).bind(asked).bind(ids.1).execute(&mut self.connection).await.unwrap();
            assert_eq!(done.rows_affected(), ids.0.len() as u64);
            finished += ids.0.len();
        }
    }

    /// The keys, and the time that their leases end. Each batch has an end of its own, as otherwise a second would have several.
    async fn acquire(&mut self, limit: i64, already: usize) -> (Vec<String>, i64) {
        let db = &mut self.connection;
        sqlx::query("SELECT GET_LOCK(?, 10)").bind(NAME).fetch_one(&mut *db).await.unwrap();
        let now: i64 = sqlx::query_scalar("SELECT UNIX_TIMESTAMP()").fetch_one(&mut *db).await.unwrap();
        let until = now + 3_600 + i64::try_from(already).unwrap() / limit;
        sqlx::query(ACQUIRE).bind(now).bind(limit).bind(until).execute(&mut *db).await.unwrap();
        let rows = sqlx::query(ACQUIRED).bind(until).fetch_all(&mut *db).await.unwrap();
        sqlx::query("SELECT RELEASE_LOCK(?)").bind(NAME).fetch_one(&mut *db).await.unwrap();
        rows.iter().for_each(|row| drop(std::hint::black_box(row.get::<Vec<u8>, _>(1))));
        (rows.iter().map(|row| row.get(0)).collect(), until)
    }
}
