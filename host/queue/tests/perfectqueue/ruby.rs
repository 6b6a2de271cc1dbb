//! A worker and producer in Ruby, as far as the table sees it. The clock of its machine is the server's plus `ahead`.

use sqlx::{AssertSqlSafe, Connection as _, MySqlConnection, Row as _};

/// A row of the table: time, data, created_at, user, owner.
pub(crate) type Row = (i64, Vec<u8>, Option<i64>, Option<String>, u64);

const DELETE_OFFSET: i64 = 1_000_000_000;

/// What is bound.
enum Value<'v> {
    Number(i64),
    Bytes(&'v [u8]),
    Text(&'v str),
}
use Value::{Bytes, Number, Text};

pub(crate) struct Ruby {
    connection: MySqlConnection,
    table: String,
    /// Seconds that its clock is ahead.
    pub(crate) ahead: i64,
}

impl Ruby {
    pub(crate) async fn connect(url: &str, table: &str) -> Self {
        let connection = MySqlConnection::connect(url).await.expect("the server serves");
        Self { connection, table: table.to_owned(), ahead: 0 }
    }

    fn sql(&self, sql: &str) -> AssertSqlSafe<String> {
        let table = self.table.replace('`', "``");
        AssertSqlSafe(
            sql.replace("{t}", &format!("`{table}`"))
                .replace("{s}", &format!("`{table}_laelaps`"))
                .replace("{h}", &format!("`{table}_laelaps_hosts`"))
                .replace("{d}", &format!("`{table}_laelaps_death`"))
                .replace("{lock}", &table),
        )
    }

    /// Any statement.
    pub(crate) async fn run(&mut self, sql: &str) -> u64 {
        let sql = self.sql(sql);
        sqlx::query(sql).execute(&mut self.connection).await.expect("the statement is right").rows_affected()
    }

    /// Any statements, also those that cannot be prepared.
    pub(crate) async fn run_raw(&mut self, sql: &str) {
        let sql = self.sql(sql);
        sqlx::raw_sql(sql).execute(&mut self.connection).await.expect("the statements are right");
    }

    /// A statement that may fail.
    pub(crate) async fn run_or_not(&mut self, sql: &str) {
        let sql = self.sql(sql);
        // Whatever came of it.
        let _ = sqlx::raw_sql(sql).execute(&mut self.connection).await;
    }

    pub(crate) async fn number(&mut self, sql: &str) -> i64 {
        let sql = self.sql(sql);
        sqlx::query_scalar(sql).fetch_one(&mut self.connection).await.expect("the statement is right")
    }

    pub(crate) async fn text(&mut self, sql: &str) -> String {
        let sql = self.sql(sql);
        sqlx::query_scalar(sql).fetch_one(&mut self.connection).await.expect("the statement is right")
    }

    pub(crate) async fn now(&mut self) -> i64 {
        self.number("SELECT UNIX_TIMESTAMP()").await + self.ahead
    }

    pub(crate) async fn row(&mut self, key: &str) -> Row {
        let sql = self.sql("SELECT timeout, data, created_at, resource, owner FROM {t} WHERE id = ?");
        let row = sqlx::query(sql).bind(key).fetch_one(&mut self.connection).await.expect("the row is there");
        (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))
    }

    /// `client.submit`, at a time.
    pub(crate) async fn submit_at(&mut self, key: &str, data: &[u8], run_at: i64, user: Option<&str>, max_running: Option<i64>) {
        let now = self.now().await;
        let sql = self.sql("INSERT INTO {t} (id, timeout, data, created_at, resource, max_running) VALUES (?, ?, ?, ?, ?, ?)");
        let query = sqlx::query(sql).bind(key).bind(run_at).bind(data).bind(now).bind(user).bind(max_running);
        query.execute(&mut self.connection).await.expect("the key is new");
    }

    /// `client.submit`, now.
    pub(crate) async fn submit(&mut self, key: &str, data: &[u8]) {
        let now = self.now().await;
        self.submit_at(key, data, now, None, None).await;
    }

    /// A write; "try restarting transaction" is tried up to ten times again. Answers the number of rows.
    async fn write(&mut self, sql: &str, values: &[Value<'_>]) -> u64 {
        for _ in 0..10 {
            let sql = self.sql(sql);
            let mut query = sqlx::query(sql);
            for value in values {
                query = match value {
                    Value::Number(number) => query.bind(*number),
                    Value::Bytes(bytes) => query.bind(*bytes),
                    Value::Text(text) => query.bind(*text),
                };
            }
            match query.execute(&mut self.connection).await {
                Ok(written) => return written.rows_affected(),
                Err(error) if error.to_string().contains("try restarting transaction") => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("ten deadlocks in a row");
    }

    pub(crate) async fn lock(&mut self) -> bool {
        let sql = "SELECT GET_LOCK(?, 10)";
        let locked: Option<i64> =
            sqlx::query_scalar(sql).bind(&self.table).fetch_one(&mut self.connection).await.expect("a lock");
        locked == Some(1)
    }

    pub(crate) async fn unlock(&mut self) {
        sqlx::query("SELECT RELEASE_LOCK(?)").bind(&self.table).execute(&mut self.connection).await.expect("a lock");
    }

    /// The keys that its fair acquire would take now, in its order.
    pub(crate) async fn fair(&mut self, max: i64) -> Vec<String> {
        let now = self.now().await;
        let sql = self.sql(
            "SELECT id FROM {t} LEFT JOIN (
                SELECT resource AS res, COUNT(1) AS running FROM {t} AS T
                WHERE timeout > ? AND created_at IS NOT NULL AND resource IS NOT NULL GROUP BY resource
            ) AS R ON resource = res
            WHERE 1300000000 < timeout AND timeout <= ? AND created_at IS NOT NULL
                AND (max_running - running IS NULL OR max_running - running > 0)
            ORDER BY IFNULL(max_running, 1) / (IFNULL(running, 0) + 1) DESC, timeout ASC, id ASC LIMIT ?",
        );
        sqlx::query_scalar(sql).bind(now).bind(now).bind(max).fetch_all(&mut self.connection).await.expect("the order")
    }

    /// The default acquire: leaves `owner` as it is.
    pub(crate) async fn acquire_fair(&mut self, alive: i64, max: i64) -> Vec<String> {
        if !self.lock().await {
            return Vec::new();
        }
        let keys = self.fair(max).await;
        let now = self.now().await;
        let mut taken = 0;
        for key in &keys {
            let sql = "UPDATE {t} SET timeout = ? WHERE id = ? AND timeout <= ? AND created_at IS NOT NULL";
            taken += self.write(sql, &[Number(now + alive), Text(key), Number(now)]).await;
        }
        self.unlock().await;
        // Given up if the count differs.
        if taken == keys.len() as u64 { keys } else { Vec::new() }
    }

    /// The acquire with `disable_resource_limit`.
    pub(crate) async fn acquire_unfair(&mut self, alive: i64, max: i64) -> Vec<String> {
        if !self.lock().await {
            return Vec::new();
        }
        let now = self.now().await;
        let sql = "UPDATE {t} JOIN (SELECT id FROM {t} WHERE 1300000000 < timeout AND timeout <= ? AND created_at IS NOT NULL
                ORDER BY timeout ASC LIMIT ?) AS t1 USING (id)
            SET timeout = ?, owner = CONNECTION_ID()";
        self.write(sql, &[Number(now), Number(max), Number(now + alive)]).await;
        let sql = self.sql("SELECT id FROM {t} WHERE timeout = ? AND owner = CONNECTION_ID() AND created_at IS NOT NULL");
        let keys = sqlx::query_scalar(sql).bind(now + alive).fetch_all(&mut self.connection).await.expect("a read");
        self.unlock().await;
        keys
    }

    /// `task.heartbeat!`, `release!` (0) and `retry!`: not fenced. False: preempted.
    pub(crate) async fn heartbeat(&mut self, key: &str, alive: i64) -> bool {
        let now = self.now().await;
        let sql = "UPDATE {t} SET timeout = ? WHERE id = ? AND created_at IS NOT NULL";
        self.write(sql, &[Number(now + alive), Text(key)]).await > 0
    }

    /// `task.update_data!`, which loses the type.
    pub(crate) async fn update_data(&mut self, key: &str, data: &[u8], alive: i64) -> bool {
        let now = self.now().await;
        let sql = "UPDATE {t} SET timeout = ?, data = ? WHERE id = ? AND created_at IS NOT NULL";
        self.write(sql, &[Number(now + alive), Bytes(data), Text(key)]).await > 0
    }

    /// What follows an acquire now and then.
    pub(crate) async fn clean_up(&mut self) -> u64 {
        let now = self.now().await;
        self.write("DELETE FROM {t} WHERE timeout <= ?", &[Number(now - DELETE_OFFSET)]).await
    }

    /// `task.finish!`. False: already finished.
    pub(crate) async fn finish(&mut self, key: &str, retention: i64) -> bool {
        let now = self.now().await;
        let sql = "UPDATE {t} SET timeout = ?, created_at = NULL, resource = NULL WHERE id = ? AND created_at IS NOT NULL";
        self.write(sql, &[Number(now - DELETE_OFFSET + retention), Text(key)]).await > 0
    }
}
