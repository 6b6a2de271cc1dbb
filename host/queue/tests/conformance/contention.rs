//! Others who stand in the way on a server: in the opposite order, or for too long.

use std::time::{Duration, Instant};

use laelaps_queue::{Config, Connections, Error, LeaseAnswer, Queue, Settlement, State};
use laelaps_test_databases::{PATIENCE, eventually};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, PgConnection};

use crate::fixture::{Database, Fixture, finish, settled, task};

/// A program that holds rows of tasks in a transaction of its own.
trait Other {
    /// Begin, so that a deadlock is the queue's to give way to.
    async fn begin(&mut self);
    /// Lock a task's row, and wait for it.
    async fn lock(&mut self, key: &str);
    /// Whether somebody else has a task's row.
    async fn is_held(&mut self, key: &str) -> bool;
    /// How many sessions wait for a lock.
    async fn waiting(&mut self) -> i64;
    /// Begin, and keep everybody else's statements about tasks waiting.
    async fn hang(&mut self);
    async fn end(&mut self);
}

impl Other for PgConnection {
    async fn begin(&mut self) {
        // Whoever has waited for so long looks for a deadlock, and gives way.
        sqlx::raw_sql("SET deadlock_timeout = '60s'; BEGIN").execute(self).await.unwrap();
    }

    async fn lock(&mut self, key: &str) {
        sqlx::query("SELECT FROM laelaps.task WHERE key = $1 FOR UPDATE").bind(key).execute(self).await.unwrap();
    }

    async fn is_held(&mut self, key: &str) -> bool {
        sqlx::raw_sql("SAVEPOINT look").execute(&mut *self).await.unwrap();
        const LOOK: &str = "SELECT FROM laelaps.task WHERE key = $1 FOR UPDATE NOWAIT";
        let held = sqlx::query(LOOK).bind(key).execute(&mut *self).await.is_err();
        sqlx::raw_sql("ROLLBACK TO look").execute(self).await.unwrap();
        held
    }

    async fn waiting(&mut self) -> i64 {
        const WAITING: &str =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        sqlx::query_scalar(WAITING).fetch_one(self).await.unwrap()
    }

    async fn hang(&mut self) {
        sqlx::raw_sql("BEGIN; LOCK TABLE laelaps.task IN ACCESS EXCLUSIVE MODE").execute(self).await.unwrap();
    }

    async fn end(&mut self) {
        sqlx::raw_sql("ROLLBACK").execute(self).await.unwrap();
    }
}

impl Other for MySqlConnection {
    async fn begin(&mut self) {
        // The one who has written less gives way.
        const BEGIN: &str =
            "CREATE TABLE IF NOT EXISTS much (n INT); START TRANSACTION; INSERT INTO much SELECT seq FROM seq_1_to_1000";
        sqlx::raw_sql(BEGIN).execute(self).await.unwrap();
    }

    async fn lock(&mut self, key: &str) {
        let sql = format!("SELECT id FROM laelaps_task WHERE `key` = '{key}' FOR UPDATE");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self).await.unwrap();
    }

    async fn is_held(&mut self, key: &str) -> bool {
        let sql = format!("SELECT id FROM laelaps_task WHERE `key` = '{key}' FOR UPDATE NOWAIT");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self).await.is_err()
    }

    async fn waiting(&mut self) -> i64 {
        const WAITING: &str = "SELECT COUNT(*) FROM information_schema.innodb_trx AS t
            JOIN information_schema.processlist AS p ON p.id = t.trx_mysql_thread_id
            WHERE p.db = database() AND t.trx_state = 'LOCK WAIT'";
        // The server looks anew only if nobody has asked for 100 ms.
        sqlx::raw_sql("DO SLEEP(0.2)").execute(&mut *self).await.unwrap();
        sqlx::query_scalar(WAITING).fetch_one(self).await.unwrap()
    }

    async fn hang(&mut self) {
        sqlx::raw_sql("LOCK TABLES laelaps_task WRITE").execute(self).await.unwrap();
    }

    async fn end(&mut self) {
        sqlx::raw_sql("ROLLBACK; UNLOCK TABLES").execute(self).await.unwrap();
    }
}

/// Settlements of two tasks together, while another program has one of them and then wants the other.
async fn a_deadlock_is_tried_again(fixture: &Fixture, other: &mut impl Other, watcher: &mut impl Other) {
    let host = fixture.host().await;
    let mut deadlocks = 0;
    for (first, second) in [("a", "b"), ("c", "d"), ("f", "e"), ("h", "g")] {
        let mut keys = [first, second];
        keys.sort_unstable();
        fixture.submit(&keys.map(task)).await;
        let claimed = fixture.claim(host, 2).await;
        assert_eq!(claimed.len(), 2);
        other.begin().await;
        other.lock(first).await;
        let group: Vec<Settlement> = claimed.iter().map(|task| settled(task, finish())).collect();
        let backend = std::sync::Arc::clone(fixture.backend());
        let settling = tokio::spawn(async move { backend.settle(&group).await });
        eventually(PATIENCE, "the settlement waits for the other's row", async || {
            let waiting = watcher.waiting().await;
            if waiting > 0 { Ok(()) } else { Err(format!("{waiting} wait")) }
        })
        .await;
        if other.is_held(second).await {
            // It is given this row although its holder waits for what nobody has let go of: the holder has given way.
            other.lock(second).await;
            deadlocks += 1;
        }
        assert!(!settling.is_finished());
        other.end().await;
        assert_eq!(settling.await.unwrap().unwrap(), [LeaseAnswer::Held; 2], "{first} before {second}");
    }
    assert!(deadlocks > 0, "rows are locked in one order or the other");
    fixture.audit().await;
}

/// A queue that gives a statement up after a moment, and an operation at once.
async fn hasty(fixture: &Fixture) -> Queue {
    let connections = Connections { statement_timeout: Duration::from_millis(300), ..Connections::default() };
    let config = Config { connections, patience: Duration::from_millis(50), ..fixture.config.clone() };
    Queue::open(&config).await.unwrap()
}

async fn a_statement_that_hangs_is_given_up(fixture: &Fixture, other: &mut impl Other) {
    let queue = hasty(fixture).await;
    queue.submit(task("a")).await.unwrap();
    other.hang().await;
    let asked = Instant::now();
    let error = queue.cancel("a").await.unwrap_err();
    assert!(asked.elapsed() < PATIENCE, "given up after {:?}", asked.elapsed());
    assert!(matches!(error, Error::Database { .. }) && error.is_retryable() && !error.is_about_the_request(), "{error:?}");
    let told = std::error::Error::source(&error).unwrap().to_string();
    assert!(told.contains("statement timeout") || told.contains("max_statement_time"), "{told}");
    other.end().await;
    queue.cancel("a").await.unwrap();
    assert_eq!(fixture.state("a").await, State::Cancelled);
    queue.close().await;
    fixture.audit().await;
}

macro_rules! on_servers {
    ($($module:ident: $database:ident, $connection:ty;)+) => {
        $(mod $module {
            use super::*;

            async fn connected(fixture: &Fixture) -> $connection {
                <$connection>::connect(&fixture.config.url).await.unwrap()
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_deadlock_is_tried_again() {
                let fixture = Fixture::new(Database::$database).await;
                let (mut other, mut watcher) = (connected(&fixture).await, connected(&fixture).await);
                super::a_deadlock_is_tried_again(&fixture, &mut other, &mut watcher).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn a_statement_that_hangs_is_given_up() {
                let fixture = Fixture::new(Database::$database).await;
                super::a_statement_that_hangs_is_given_up(&fixture, &mut connected(&fixture).await).await;
            }
        })+
    };
}
on_servers! {
    on_postgres: Postgres, PgConnection;
    on_mariadb: MariaDb, MySqlConnection;
}
