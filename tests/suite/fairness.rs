//! Users and their limits, checked from a history that the database itself records.

use std::collections::HashMap;

use laelaps_queue::NewTask;
use laelaps_tests::{Database, LONG, Site, eventually, scaled, submit, task, wait_for_finished};
use serde_json::json;
use sqlx::mysql::MySqlConnection;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _};

/// Notes each task that begins to run, or runs no more, in the transaction that makes it so. A number is drawn within that transaction: a
/// claim that counts on somebody's end comes after that end's commit, and so does its number.
const RECORD_ON_SQLITE: &str = "
    CREATE TABLE history (id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, more INTEGER NOT NULL);
    CREATE TRIGGER record AFTER UPDATE OF state ON task WHEN (OLD.state = 'running') <> (NEW.state = 'running')
    BEGIN INSERT INTO history (user, more) VALUES (NEW.user, CASE NEW.state WHEN 'running' THEN 1 ELSE -1 END); END";

const RECORD_ON_POSTGRES: &str = "
    CREATE TABLE history (id bigserial PRIMARY KEY, user_name text NOT NULL, more int8 NOT NULL);
    CREATE FUNCTION record() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO public.history (user_name, more) VALUES (NEW.user_name, CASE NEW.state WHEN 'running' THEN 1 ELSE -1 END);
        RETURN NULL; END $$;
    CREATE TRIGGER record AFTER UPDATE ON laelaps.task FOR EACH ROW
        WHEN ((OLD.state = 'running') <> (NEW.state = 'running')) EXECUTE FUNCTION record()";

const RECORD_ON_MARIADB: [&str; 2] = [
    "CREATE TABLE history (id BIGINT AUTO_INCREMENT PRIMARY KEY, user VARBINARY(255) NOT NULL, more BIGINT NOT NULL)",
    "CREATE TRIGGER record AFTER UPDATE ON laelaps_task FOR EACH ROW
        IF (OLD.state = 'running') <> (NEW.state = 'running') THEN
            INSERT INTO history (user, more) VALUES (NEW.user, IF(NEW.state = 'running', 1, -1));
        END IF",
];

async fn sqlite(site: &Site) -> SqliteConnection {
    SqliteConnectOptions::new().filename(site.path("queue.db")).connect().await.unwrap()
}

async fn record(site: &Site) {
    match site.database() {
        Database::Sqlite => {
            sqlite(site).await.execute(RECORD_ON_SQLITE).await.unwrap();
        }
        Database::Postgres => {
            PgConnection::connect(site.url()).await.unwrap().execute(RECORD_ON_POSTGRES).await.unwrap();
        }
        Database::MariaDb => {
            let mut connection = MySqlConnection::connect(site.url()).await.unwrap();
            for sql in RECORD_ON_MARIADB {
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            }
        }
        Database::PerfectQueue => unreachable!("this promise is only of our own tables"),
    }
}

async fn history(site: &Site) -> Vec<(String, i64)> {
    match site.database() {
        Database::Sqlite => {
            sqlx::query_as("SELECT user, more FROM history ORDER BY id").fetch_all(&mut sqlite(site).await).await.unwrap()
        }
        Database::Postgres => {
            let mut connection = PgConnection::connect(site.url()).await.unwrap();
            sqlx::query_as("SELECT user_name, more FROM history ORDER BY id").fetch_all(&mut connection).await.unwrap()
        }
        Database::MariaDb => {
            let mut connection = MySqlConnection::connect(site.url()).await.unwrap();
            let sql = "SELECT CAST(user AS CHAR CHARACTER SET utf8mb4), more FROM history ORDER BY id";
            sqlx::query_as(sql).fetch_all(&mut connection).await.unwrap()
        }
        Database::PerfectQueue => unreachable!("this promise is only of our own tables"),
    }
}

const USERS: usize = 200;

/// A user's limit: 1 to 8.
fn limit(user: usize) -> u32 {
    u32::try_from(user % 8).unwrap() + 1
}

laelaps_tests::on_every_native_database! {
    /// Four hosts, 200 users, and one host that dies in the middle.
    async fn no_user_ever_has_more_running_than_its_limit() {
        let count = scaled(50_000);
        let site = Site::new().await;
        site.plug_guest("zoo");
        let section = |alive_time: u32| json!({
            "processors": 8,
            "task_prefetch": 24,
            "alive_time": alive_time,
            "task_heartbeat_interval": 0.5,
            "retention_time": 86_400,
        });
        // The host that dies is known by its leases, except on SQLite; those of the others must not end because the machine is slow.
        site.configure(section(10));
        let queue = site.queue().await;
        record(&site).await;
        let tasks: Vec<NewTask> = (0..count)
            .map(|number| NewTask {
                user: Some(format!("user-{}", number % USERS)),
                max_running: Some(limit(number % USERS)),
                ..task(format!("task-{number}"), "silent", json!({}))
            })
            .collect();
        submit(&queue, &tasks).await;
        let mut hosts = vec![site.start().await];
        site.configure(section(86_400));
        for _ in 0..3 {
            hosts.push(site.start().await);
        }
        eventually(LONG, "a quarter of the tasks is finished", async || {
            let stats = queue.stats().await.unwrap();
            if stats.finished >= count as u64 / 4 { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
        hosts.remove(0).kill().await;
        hosts.push(site.start().await);
        wait_for_finished(&queue, count, LONG).await;
        for host in hosts {
            host.stop().await;
        }

        let mut running: HashMap<String, i64> = HashMap::new();
        let mut begun = 0;
        for (user, more) in history(&site).await {
            let now = running.entry(user.clone()).or_default();
            *now += more;
            begun += usize::from(more > 0);
            let number: usize = user.strip_prefix("user-").unwrap().parse().unwrap();
            assert!(*now <= i64::from(limit(number)), "{user} has {now} running, its limit is {}", limit(number));
        }
        assert!(begun >= count, "{begun} attempts began");
        assert!(running.values().all(|now| *now == 0), "all ended: {running:?}");
    }
}
