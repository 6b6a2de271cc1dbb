//! Others who stand in the way on a server: in the opposite order, or for too long.

use std::time::Duration;

use laelaps_queue::{Config, Connections, Error, LeaseAnswer, Queue, Settlement, State};
use laelaps_test_databases::{PATIENCE, eventually};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, PgConnection};

use crate::fixture::{Database, Fixture, finish, patient, settled, task};

/// A program that holds rows of tasks in a transaction of its own.
trait Other {
    /// Begin, so that a deadlock is the queue's to give way to.
    async fn begin(&mut self);
    /// Lock a task's row, which nobody else has.
    async fn lock(&mut self, key: &str);
    /// Lock a task's row whose holder waits for a row of this program, and gives way. False if it does not, because it looked for a deadlock
    /// before there was one.
    async fn lock_against(&mut self, key: &str) -> bool;
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
        // Whoever has waited for so long looks for a deadlock, once, and gives way.
        sqlx::raw_sql("SET deadlock_timeout = '1h'; BEGIN").execute(self).await.unwrap();
    }

    async fn lock(&mut self, key: &str) {
        sqlx::query("SELECT FROM laelaps.task WHERE key = $1 FOR UPDATE").bind(key).execute(self).await.unwrap();
    }

    async fn lock_against(&mut self, key: &str) -> bool {
        // The holder looks after a second of waiting: before now, if the machine is busy.
        sqlx::raw_sql("SAVEPOINT wait; SET LOCAL lock_timeout = '10s'").execute(&mut *self).await.unwrap();
        const LOCK: &str = "SELECT FROM laelaps.task WHERE key = $1 FOR UPDATE";
        let Err(error) = sqlx::query(LOCK).bind(key).execute(&mut *self).await else { return true };
        assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("55P03"), "{error}");
        sqlx::raw_sql("ROLLBACK TO wait").execute(self).await.unwrap();
        false
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
        const BEGIN: &str = "CREATE TABLE IF NOT EXISTS much (n INT); START TRANSACTION; INSERT INTO much
            WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1000) SELECT n FROM n";
        sqlx::raw_sql(BEGIN).execute(self).await.unwrap();
    }

    async fn lock(&mut self, key: &str) {
        let sql = format!("SELECT id FROM laelaps_task WHERE `key` = '{key}' FOR UPDATE");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self).await.unwrap();
    }

    async fn lock_against(&mut self, key: &str) -> bool {
        // This server looks for a deadlock whenever a session begins to wait.
        self.lock(key).await;
        true
    }

    async fn is_held(&mut self, key: &str) -> bool {
        let sql = format!("SELECT id FROM laelaps_task WHERE `key` = '{key}' FOR UPDATE NOWAIT");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self).await.is_err()
    }

    async fn waiting(&mut self) -> i64 {
        const WAITING: &str = "SELECT COUNT(*) FROM information_schema.innodb_trx AS t
            JOIN information_schema.processlist AS p ON p.id = t.trx_mysql_thread_id
            WHERE p.db = database() AND t.trx_state = 'LOCK WAIT'";
        // The server looks anew only if nobody has asked for 100 ms, in whichever database.
        sqlx::raw_sql("DO SLEEP(0.15 + 0.25 * RAND())").execute(&mut *self).await.unwrap();
        sqlx::query_scalar(WAITING).fetch_one(self).await.unwrap()
    }

    async fn hang(&mut self) {
        sqlx::raw_sql("LOCK TABLES laelaps_task WRITE").execute(self).await.unwrap();
    }

    async fn end(&mut self) {
        sqlx::raw_sql("ROLLBACK; UNLOCK TABLES").execute(self).await.unwrap();
    }
}

/// Rounds in which a deadlock may come about, and the most if there was none in these.
const ROUNDS: usize = 4;
const ROUNDS_MAX: usize = 40;

/// Settlements of two tasks together, while another program has one of them and then wants the other.
async fn a_deadlock_is_tried_again(fixture: &Fixture, other: &mut impl Other, watcher: &mut impl Other) {
    let host = fixture.host().await;
    let mut deadlocks = 0;
    for round in 0..ROUNDS_MAX {
        let keys = [format!("a{round}"), format!("b{round}")];
        let [first, second] = [&keys[round % 2], &keys[1 - round % 2]];
        fixture.submit(&keys.each_ref().map(|key| task(key))).await;
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
        if other.is_held(second).await && other.lock_against(second).await {
            // It was given this row although its holder waited for what nobody has let go of: the holder has given way.
            deadlocks += 1;
        }
        assert!(!settling.is_finished());
        other.end().await;
        assert_eq!(settling.await.unwrap().unwrap(), [LeaseAnswer::Held; 2], "{first} before {second}");
        if round + 1 >= ROUNDS && deadlocks > 0 {
            break;
        }
    }
    assert!(deadlocks > 0, "rows are locked in one order or the other");
    fixture.audit().await;
}

/// A queue that gives a statement up after a moment, and an operation at once. On a busy machine even opening it may take longer than that.
async fn hasty(fixture: &Fixture) -> Queue {
    let connections = Connections { statement_timeout: Duration::from_millis(300), ..patient() };
    let config = Config { connections, patience: Duration::from_millis(50), ..fixture.config.clone() };
    eventually(PATIENCE, "the queue is opened", async || Queue::open(&config).await.map_err(|error| error.to_string())).await
}

async fn a_statement_that_hangs_is_given_up(fixture: &Fixture, other: &mut impl Other) {
    let queue = hasty(fixture).await;
    fixture.submit(&[task("a")]).await;
    other.hang().await;
    // If a busy machine keeps the server from its turn, the client's own limit may come first.
    eventually(PATIENCE, "the server gives the statement up", async || {
        let error = queue.cancel("a").await.unwrap_err();
        assert!(matches!(error, Error::Database { .. }) && error.is_retryable() && !error.is_about_the_request(), "{error:?}");
        let told = std::error::Error::source(&error).unwrap().to_string();
        let words = ["statement timeout", "max_statement_time", "maximum statement execution time"];
        if words.iter().any(|words| told.contains(words)) { Ok(()) } else { Err(told) }
    })
    .await;
    other.end().await;
    eventually(PATIENCE, "what hung gets done", async || match queue.cancel("a").await {
        // The second, if the answer to an earlier one came too late.
        Ok(()) | Err(Error::AlreadyEnded { .. }) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
    .await;
    assert_eq!(fixture.state("a").await, State::Cancelled);
    queue.close().await;
    fixture.audit().await;
}

macro_rules! on_servers {
    ($($module:ident: $database:ident, $connection:ty;)+) => {
        $(mod $module {
            use super::*;

            async fn connected(fixture: &Fixture) -> $connection {
                <$connection>::connect(&fixture.direct_url().await).await.unwrap()
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
