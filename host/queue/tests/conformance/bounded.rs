//! What stands beside the tasks does not grow with the tasks that are done: thousands of types, users with limits, retries, failures, follow-ups,
//! reports of progress, cancellations, and hosts that come, leave and die.
//!
//! A host looks after its database once a second. So the mill here does as many tasks as a fast host does in a second, looks after the database
//! once, and counts the rows of every table but the tasks' own. The tables are those that the database names: a new one is counted too, and may
//! have few rows unless [`most`] says something else. `tests/run` does some ten thousand tasks on each database, `tests/soak` as many as take
//! about a minute.

use std::time::{Duration, Instant};

use laelaps_queue::{
    Backoff, Beat, Claim, ClaimedTask, Config, Event, FailureKind, HostDescription, HostId, Kind, LeaseAnswer, NewTask,
    PerfectQueue, PluginVersion, Policy, Progress, Queue, Settlement, Verdict,
};
use laelaps_test_databases::{eventually, unique_name};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, SqliteConnection};

use crate::explorer::{is_full, tables};
use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, LONG, PATIENCE, settled_by, task, with_follow_ups};

/// Types of tasks that are about at once. New ones come and old ones go.
const TYPES: usize = 3_000;
/// Users that have work at once. They change too.
const USERS: usize = 200;
/// Tasks that wait all the time.
const WAITING: usize = 3_000;
/// Tasks submitted together.
const SUBMITTED: usize = 500;
/// Tasks that end between two looks after the database.
const BETWEEN_LOOKS: usize = 10_000;
/// Looks of a run of the suite, and of a soak.
const LOOKS: [usize; 2] = [2, 60];
/// Rows of a table that has one for each host, batch or plugin version under way, and hardly any on an idle queue.
const FEW: usize = 100;
/// Hosts that are gone and still kept, for tracing lost attempts.
const HOSTS_KEPT: usize = 1_000;

/// The most rows of a table right after a look, whatever was done until then.
fn most(table: &str, is_idle: bool) -> usize {
    match table.trim_start_matches("laelaps_") {
        // A type may have a row that is put together, and some that are not yet.
        "tally" => TYPES * 4,
        "host" | "host_plugin" => HOSTS_KEPT + FEW,
        // One row for each task that has not ended.
        "task_data" | "ready" | "ready_of_user" | "scheduled" | "suspect" | "unserved" | "descendant" | "account"
        | "account_change" | "attempt" | "failure" | "progress"
            if !is_idle =>
        {
            WAITING * 2
        }
        // PerfectQueue's: one row for each task of which the table cannot say everything.
        table if table.ends_with("_laelaps") && !is_idle => WAITING * 2,
        _ => FEW,
    }
}

/// More deaths than are few, of hosts so long ago that they count no more.
async fn old_deaths(database: Database, config: &Config) {
    match (database, &config.kind) {
        (Database::Sqlite, _) => {
            const DIED: &str = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 200)
                INSERT INTO plugin_death (host, plugin, at) SELECT -10000 - n, 1, 0 FROM n";
            let mut connection = SqliteConnection::connect(&config.url).await.unwrap();
            sqlx::raw_sql(DIED).execute(&mut connection).await.unwrap();
        }
        (Database::Postgres, _) => {
            const DIED: &str =
                "INSERT INTO plugin_death (host, plugin, at) SELECT -10000 - n, 1, 0 FROM generate_series(1, 200) AS n";
            sqlx::raw_sql(DIED).execute(&mut raw(config).await).await.unwrap();
        }
        (Database::MariaDb, kind) => {
            let sql = match kind {
                Kind::PerfectQueue(PerfectQueue { table, .. }) => format!(
                    "INSERT INTO {table}_laelaps_death (host, name, digest, at) SELECT seq, 'grind', 'd1', 0 FROM seq_1_to_200;
                    ALTER TABLE {table}_laelaps_hosts AUTO_INCREMENT = 20000"
                ),
                _ => {
                    "INSERT INTO laelaps_plugin_death (host, plugin, at)
                    WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 200) SELECT -10000 - n, 1, 0 FROM n"
                        .to_owned()
                }
            };
            let mut connection = MySqlConnection::connect(&config.url).await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
        }
    }
}

/// Two processes on one database, and what they have done to it.
struct Mill {
    database: Database,
    config: Config,
    queues: [Queue; 2],
    hosts: [HostId; 2],
    hosts_so_far: usize,
    random: fastrand::Rng,
    /// Tasks submitted, and tasks and follow-ups that have not ended.
    submitted: usize,
    live: usize,
    ended: usize,
    /// The table of the tasks, which is not looked at.
    tasks: String,
    /// Somebody else, and what it does after each step.
    beside: Option<(MySqlConnection, String)>,
}

impl Mill {
    async fn open(database: Database, config: Config, tasks: &str) -> Self {
        // Everything is over at once.
        let policy = Policy {
            backoff: Backoff::Fixed(Duration::ZERO),
            retry_wait: Duration::ZERO,
            retention: Duration::ZERO,
            failed_retention: Duration::ZERO,
            ..config.policy
        };
        let config = Config { policy, ..config };
        let queues = [Queue::open(&config).await.unwrap(), Queue::open(&config).await.unwrap()];
        queues[0].init().await.unwrap();
        old_deaths(database, &config).await;
        let mut mill = Self {
            database,
            config,
            queues,
            hosts: [HostId(0); 2],
            hosts_so_far: 0,
            random: fastrand::Rng::with_seed(1),
            submitted: 0,
            live: 0,
            ended: 0,
            tasks: tasks.to_owned(),
            beside: None,
        };
        mill.hosts = [mill.host(0).await, mill.host(1).await];
        mill
    }

    /// A host of one of the processes, with the plugin versions that it serves and runs.
    async fn host(&mut self, process: usize) -> HostId {
        self.hosts_so_far += 1;
        let identity = Some(format!("host {}", self.hosts_so_far));
        let description = HostDescription { name: "mill".to_owned(), process_id: std::process::id(), identity };
        let backend = self.queues[process].backend();
        let host = backend.register_host(&description).await.unwrap();
        let version = PluginVersion { name: "grind".to_owned(), digest: "d1".to_owned() };
        backend.note_plugins(host, std::slice::from_ref(&version.digest)).await.unwrap();
        backend.note_running(host, &[version]).await.unwrap();
        // Not where hosts are told apart by other means.
        let _ = backend.give_sign(host, LONG).await;
        host
    }

    fn new_task(&mut self) -> NewTask {
        self.submitted += 1;
        let number = self.submitted;
        let user = number.is_multiple_of(2).then(|| format!("u{}", number % USERS + number / 100));
        let max_running = user.as_ref().map(|_| u32::try_from(number % 3 + 1).unwrap());
        let task_type = format!("t{}", number % TYPES + number / 10);
        NewTask { task_type, user, max_running, ..task(&format!("k{number}")) }
    }

    async fn fill(&mut self) {
        while self.live < WAITING {
            let tasks: Vec<NewTask> = (0..SUBMITTED).map(|_| self.new_task()).collect();
            self.queues[0].submit_many(&tasks).await.unwrap();
            self.live += tasks.len();
        }
    }

    /// What becomes of an attempt. Most finish.
    fn end(&mut self, of: &ClaimedTask) -> Settlement {
        let finish = || Event::Finish { output: Some(b"out".to_vec()), retention: None };
        let event = match self.random.u32(..20) {
            0 => Event::Retry { delay: Some(Duration::ZERO) },
            1 => Event::Retry { delay: Some(Duration::from_millis(5)) },
            2 => Event::Trap { message: "boom".to_owned() },
            3 => Event::Release { delay: None },
            4 => Event::Failure { kind: FailureKind::Reject, code: "no".to_owned(), message: "never".to_owned() },
            5 => {
                let descent = Some(of.descent.of_follow_up(None, of.claimed_at));
                let follow_up = NewTask { descent, ..self.new_task() };
                return with_follow_ups(vec![follow_up], settled_by(&self.config.policy, of, finish()));
            }
            _ => finish(),
        };
        settled_by(&self.config.policy, of, event)
    }

    async fn claim(&self, process: usize, limit: u32) -> Vec<ClaimedTask> {
        let host = self.hosts[process];
        let claim = Claim { alone: true, ..Claim::new(host, limit, LONG) };
        self.queues[process].backend().claim(&claim).await.unwrap().tasks
    }

    /// Claim some, report about some of these, cancel one now and then, and settle all.
    async fn step(&mut self, process: usize) {
        let limit = [1, 10, 100][self.random.usize(..3)];
        let tasks = self.claim(process, limit).await;
        if tasks.is_empty() {
            return;
        }
        let beat = |task: &ClaimedTask| Beat {
            lease_ref: task.lease_ref,
            alive_time: LONG,
            progress: Some(Progress { done: 1, total: None, note: "half".to_owned() }),
        };
        let backend = std::sync::Arc::clone(self.queues[process].backend());
        backend.heartbeat(&tasks.iter().step_by(10).map(beat).collect::<Vec<Beat>>()).await.unwrap();
        if self.random.u32(..5) == 0 {
            backend.cancel(&tasks[0].key, Duration::ZERO).await.unwrap();
            self.ends(1);
        }
        let group: Vec<Settlement> = tasks.iter().map(|task| self.end(task)).collect();
        let answers = backend.settle(&group).await.unwrap();
        for (settlement, _) in group.iter().zip(answers).filter(|(_, answer)| *answer == LeaseAnswer::Held) {
            self.live += settlement.follow_ups.len();
            self.ends(usize::from(!matches!(settlement.verdict(), Verdict::Wait { .. })));
        }
        if let Some((connection, sql)) = &mut self.beside {
            sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await.unwrap();
        }
    }

    fn ends(&mut self, tasks: usize) {
        self.live -= tasks;
        self.ended += tasks;
    }

    /// What hosts do once a second. Before it one of them dies with what it has, and the other leaves in good order.
    async fn look_after(&mut self) {
        self.claim(0, 5).await;
        let died = format!("host {}", self.hosts_so_far - 1);
        let policy = self.config.policy.clone();
        self.queues[1].backend().hand_on(&[died], &policy).await.unwrap();
        self.queues[1].backend().unregister_host(self.hosts[1]).await.unwrap();
        self.hosts = [self.host(0).await, self.host(1).await];
        for queue in &self.queues {
            queue.backend().reclaim(&policy).await.unwrap();
        }
        self.queues[0].clean_up().await.unwrap();
    }

    /// The rows of every table beside the tasks'.
    async fn rows(&self) -> Vec<(String, usize)> {
        let count = |tables: Vec<String>| {
            let one = |table: &String| format!("SELECT '{table}', count(*) FROM {table}");
            let beside = tables.iter().filter(|table| **table != self.tasks);
            AssertSqlSafe(beside.map(one).collect::<Vec<String>>().join(" UNION ALL "))
        };
        let names = tables(self.database);
        let rows: Vec<(String, i64)> = match self.database {
            Database::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.config.url).await.unwrap();
                let names = sqlx::query_scalar(names).fetch_all(&mut connection).await.unwrap();
                sqlx::query_as(count(names)).fetch_all(&mut connection).await.unwrap()
            }
            Database::Postgres => {
                let mut connection = raw(&self.config).await;
                let names = sqlx::query_scalar(names).fetch_all(&mut connection).await.unwrap();
                sqlx::query_as(count(names)).fetch_all(&mut connection).await.unwrap()
            }
            Database::MariaDb => {
                let mut connection = MySqlConnection::connect(&self.config.url).await.unwrap();
                let names = sqlx::query_scalar(names).fetch_all(&mut connection).await.unwrap();
                sqlx::query_as(count(names)).fetch_all(&mut connection).await.unwrap()
            }
        };
        rows.into_iter().map(|(table, rows)| (table, usize::try_from(rows).unwrap())).collect()
    }

    /// No table has more rows than it may. What is put together in the background may still be on its way.
    async fn is_bounded(&self, is_idle: bool) {
        eventually(PATIENCE, "what stands beside the tasks is bounded", async || {
            let rows = self.rows().await;
            let over: Vec<_> = rows.iter().filter(|(table, rows)| *rows > most(table, is_idle)).collect();
            if over.is_empty() { Ok(()) } else { Err(format!("after {} tasks {over:?}", self.ended)) }
        })
        .await;
    }

    async fn grind(&mut self, looks: usize) {
        for look in 1..=looks {
            let began = Instant::now();
            while self.ended < look * BETWEEN_LOOKS {
                self.fill().await;
                let process = usize::from(self.random.bool());
                self.step(process).await;
                assert!(began.elapsed() < PATIENCE * 5, "{} tasks have ended, and {} are live", self.ended, self.live);
            }
            self.look_after().await;
            self.is_bounded(false).await;
        }
        // Until nothing is left.
        let began = Instant::now();
        while self.live > 0 {
            self.step(0).await;
            assert!(began.elapsed() < PATIENCE, "{} tasks are live", self.live);
        }
        // Not all that is left lies where one look begins.
        for _ in 0..3 {
            self.look_after().await;
        }
        self.is_bounded(true).await;
        for queue in &self.queues {
            queue.close().await;
        }
    }
}

async fn grind(database: Database) {
    let fixture = Fixture::empty(database).await;
    let tasks = if matches!(database, Database::MariaDb) { "laelaps_task" } else { "task" };
    let mut mill = Mill::open(database, fixture.config.clone(), tasks).await;
    mill.grind(LOOKS[usize::from(is_full())]).await;
    fixture.audit().await;
}

mod on_sqlite {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_table_grows_with_the_tasks_that_are_done() {
        super::grind(super::Database::Sqlite).await;
    }
}

mod on_postgres {
    use super::*;

    /// Rows that are dead, and looks for ended leases beside them.
    const DEAD: i64 = 300_000;
    const LOOKS: i64 = 40;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_table_grows_with_the_tasks_that_are_done() {
        grind(Database::Postgres).await;
    }

    /// What claims leave behind stays in the index while a transaction is old. A look that walked over it each time would take longer with
    /// every task that is done.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn looks_for_ended_leases_do_not_walk_over_dead_rows_again_and_again() {
        let fixture = Fixture::new(Database::Postgres).await;
        let mut old = raw(&fixture.config).await;
        sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM host").execute(&mut old).await.unwrap();
        let mut beside = raw(&fixture.config).await;
        // Their leases would have ended ten minutes ago.
        let fill = format!(
            "INSERT INTO claim SELECT n, 0, (extract(epoch FROM clock_timestamp()) * 1000)::int8 - 600000, '{{}}' FROM generate_series(1, {DEAD}) AS n;
            DELETE FROM claim"
        );
        sqlx::raw_sql(AssertSqlSafe(fill)).execute(&mut beside).await.unwrap();
        let host = Queue::open(&fixture.config).await.unwrap();
        for _ in 0..LOOKS {
            host.backend().reclaim(&fixture.config.policy).await.unwrap();
        }
        // A session says what it has read when it ends at the latest.
        host.close().await;
        let read = eventually(PATIENCE, "the server has counted the looks", async || {
            const READ: &str = "SELECT idx_scan, idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'claim_check_at'";
            let (looks, read): (i64, i64) = sqlx::query_as(READ).fetch_one(&mut beside).await.unwrap();
            if looks >= LOOKS { Ok(read) } else { Err(format!("{looks} looks")) }
        })
        .await;
        // The first one meets all; later ones only as long as such a look is quick, or once in a while.
        assert!((DEAD..DEAD * LOOKS / 4).contains(&read), "{read} entries of {DEAD} dead rows were read");
        sqlx::raw_sql("ROLLBACK").execute(&mut old).await.unwrap();
    }
}

mod on_mariadb {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_table_grows_with_the_tasks_that_are_done() {
        super::grind(super::Database::MariaDb).await;
    }
}

mod on_perfectqueues_table {
    use super::*;

    /// Ruby's workers remove what is over, and know nothing of the table beside it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_table_beside_it_grows_with_the_tasks_that_are_done() {
        for ruby_cleans_up in [false, true] {
            let fixture = Fixture::empty(Database::MariaDb).await;
            // The lock that goes by its name is the whole server's.
            let table = unique_name("bounded");
            let kind = Kind::PerfectQueue(PerfectQueue { table: table.clone(), cleanup_interval: 20, side_table: true });
            let mut mill = Mill::open(Database::MariaDb, Config { kind, ..fixture.config.clone() }, &table).await;
            if ruby_cleans_up {
                let ruby = MySqlConnection::connect(&fixture.config.url).await.unwrap();
                mill.beside = Some((ruby, format!("DELETE FROM {table} WHERE timeout <= UNIX_TIMESTAMP() - 1000000000")));
            }
            mill.grind(LOOKS[usize::from(is_full())]).await;
        }
    }
}
