//! What only a PostgreSQL server can do to a queue, and what it can do for producers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use laelaps_queue::{
    Claim, Config, Connections, Error, HostDescription, LeaseAnswer, NewTask, Queue, Settlement, State, Submitted, Tls,
};
use laelaps_test_databases::postgres::{Server, shared};
use laelaps_test_databases::{Durability, LONG as PATIENT, PATIENCE, eventually};
use sqlx::postgres::PgListener;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, LONG, finish, keys, settled, task, task_of};
use crate::{behind, lost};

async fn fixture() -> Fixture {
    Fixture::new(Database::Postgres).await
}

/// A queue that does not wait for servers.
fn impatient(url: impl Into<String>) -> Config {
    Config { patience: Duration::from_millis(50), ..Config::new(url) }
}

async fn refused(config: &Config) -> String {
    let error = Queue::open(config).await.expect_err("such a database cannot be used");
    assert!(error.hint().is_some(), "{error}");
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

/// Claim and finish until all of `count` tasks are finished; answers how many this worker finished.
async fn work(queue: Queue, count: u64) -> u64 {
    let description = HostDescription { name: "worker".to_owned(), process_id: 1, identity: None };
    let host = queue.backend().register_host(&description).await.unwrap();
    let claim = Claim { host, limit: 20, alive_time: Duration::from_secs(20), alone: false, ignore_users: false, accepts: None };
    let mut finished = 0;
    loop {
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        let group: Vec<Settlement> = tasks.iter().map(|task| settled(task, finish())).collect();
        let answers = queue.backend().settle(&group).await.unwrap();
        finished += answers.iter().filter(|answer| **answer == LeaseAnswer::Held).count() as u64;
        queue.backend().reclaim(&laelaps_queue::Policy::default()).await.unwrap();
        if tasks.is_empty() && queue.stats().await.unwrap().finished == count {
            return finished;
        }
    }
}

fn many(count: usize) -> Vec<NewTask> {
    let user = |number: usize| number.is_multiple_of(3).then(|| format!("u{}", number % 5));
    (0..count).map(|number| NewTask { user: user(number), max_running: Some(7), ..task(&number.to_string()) }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_lose_nothing() {
    const TASKS: u64 = 3_000;
    let fixture = fixture().await;
    fixture.submit(&many(usize::try_from(TASKS).unwrap())).await;
    let done = Arc::new(AtomicBool::new(false));
    let cutting = {
        let (config, done) = (fixture.config.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            let mut connection = raw(&config).await;
            let mut cut = 0;
            while !done.load(Ordering::Acquire) {
                const CUT: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                    WHERE datname = current_database() AND pid <> pg_backend_pid() AND query NOT LIKE '%DATABASE%'";
                cut += sqlx::query_scalar::<_, i64>(CUT).fetch_one(&mut connection).await.unwrap();
                tokio::time::sleep(Duration::from_millis(40)).await;
            }
            cut
        })
    };
    let workers: Vec<_> = (0..4).map(|_| tokio::spawn(work(fixture.queue.clone(), TASKS))).collect();
    let mut finished = 0;
    for worker in workers {
        finished += worker.await.unwrap();
    }
    done.store(true, Ordering::Release);
    assert!(cutting.await.unwrap() > 0);
    assert_eq!(finished, TASKS, "each settlement was answered as held once");
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_comes_back_loses_nothing() {
    const TASKS: u64 = 2_000;
    let mut server = Server::start(Durability::Process).await;
    let config = Config { patience: PATIENT, ..Config::new(server.create_database().await) };
    let queue = Queue::open(&config).await.unwrap();
    queue.init().await.unwrap();
    queue.submit_many(&many(usize::try_from(TASKS).unwrap())).await.unwrap();
    let workers: Vec<_> = (0..4).map(|_| tokio::spawn(work(queue.clone(), TASKS))).collect();
    for share in [4, 2] {
        eventually(PATIENT, "the workers get on", async || {
            let finished = queue.stats().await.map_err(|error| error.to_string())?.finished;
            if finished >= TASKS / share { Ok(()) } else { Err(finished.to_string()) }
        })
        .await;
        server.kill();
        server.restart().await;
    }
    let mut finished = 0;
    for worker in workers {
        finished += worker.await.unwrap();
    }
    assert_eq!(finished, TASKS, "each settlement was answered as held once");
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (TASKS, 0, 0));
    queue.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_done_although_the_answer_was_lost_is_told_as_done() {
    // One statement is an operation of its own.
    lost::what_was_done_although_the_answer_was_lost_is_told_as_done(Database::Postgres, b"").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_submit_elsewhere_wakes_who_waits_also_after_the_listeners_connection_was_cut() {
    let fixture = fixture().await;
    let other = fixture.another().await;
    let woken = |round: &'static str| {
        let (queue, other) = (fixture.queue.clone(), other.clone());
        async move {
            let mut waiting = tokio::spawn(async move { queue.wakeup().await });
            for number in 0.. {
                other.submit(task(&format!("{round}{number}"))).await.unwrap();
                // What comes before the listener listens is not heard.
                if tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_ok() {
                    return;
                }
                assert!(number < 600, "nobody is woken {round}");
            }
        }
    };
    let listeners = || async {
        let mut connection = raw(&fixture.config).await;
        const LISTENS: &str =
            "SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'";
        sqlx::query_scalar::<_, Option<Vec<i32>>>(LISTENS).fetch_one(&mut connection).await.unwrap().unwrap_or_default()
    };
    woken("first").await;
    // Until the listener is heard of it may be that something else woke it.
    let first = eventually(PATIENCE, "somebody listens", async || {
        let listening = listeners().await;
        if listening.is_empty() { Err("nobody".to_owned()) } else { Ok(listening) }
    })
    .await;
    let mut connection = raw(&fixture.config).await;
    sqlx::query("SELECT pg_terminate_backend(unnest($1))").bind(&first).execute(&mut connection).await.unwrap();
    eventually(PATIENCE, "somebody listens again", async || {
        let listening = listeners().await;
        if listening.iter().any(|listener| !first.contains(listener)) { Ok(()) } else { Err(format!("{listening:?}")) }
    })
    .await;
    woken("again").await;
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_listen_finds_what_comes_by_polling_alone() {
    let fixture = fixture().await;
    let connections = Connections { listen: false, ..Connections::default() };
    let deaf = Queue::open(&Config { connections, ..fixture.config.clone() }).await.unwrap();
    let host =
        deaf.backend().register_host(&HostDescription { name: "deaf".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let claim = Claim { host, limit: 9, alive_time: LONG, alone: false, ignore_users: false, accepts: None };
    assert!(deaf.backend().claim(&claim).await.unwrap().tasks.is_empty());
    let mut heard = PgListener::connect(&fixture.config.url).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    fixture.submit_some("a", 3).await;
    // Whoever listens has heard of it ...
    tokio::time::timeout(PATIENCE, heard.recv()).await.expect("a notice").unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), deaf.wakeup()).await.is_err(), "... and nobody told this one");
    const LISTENERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query ILIKE 'LISTEN%'
        AND application_name = 'laelaps'";
    let listeners: i64 = sqlx::query_scalar(LISTENERS).fetch_one(&mut raw(&fixture.config).await).await.unwrap();
    assert_eq!(listeners, 0);
    assert_eq!(deaf.backend().claim(&claim).await.unwrap().tasks.len(), 3);
    deaf.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_submits_share_a_notice() {
    const SUBMITS: usize = 200;
    let fixture = fixture().await;
    let mut heard = PgListener::connect(&fixture.config.url).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    let begun = std::time::Instant::now();
    for number in 0..SUBMITS {
        fixture.queue.submit(task(&number.to_string())).await.unwrap();
    }
    let took = begun.elapsed();
    let mut notices = 0_u128;
    let mut quiet = PATIENCE;
    while let Ok(notice) = tokio::time::timeout(quiet, heard.recv()).await {
        notice.unwrap();
        notices += 1;
        quiet = Duration::from_secs(1);
    }
    // One at the beginning, one in 20 ms, and the last.
    let most = took.as_millis() / 20 + 2;
    assert!((1..=most).contains(&notices), "{notices} notices of {SUBMITS} submits in {took:?}, at most {most}");
    let mut producer = raw(&fixture.config).await;
    let submit = "SELECT laelaps.submit('b' || n, 'type') FROM generate_series(1, 50) AS n";
    sqlx::query(submit).execute(&mut producer).await.unwrap();
    tokio::time::timeout(PATIENCE, heard.recv()).await.expect("a notice").unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(1), heard.recv()).await.is_err(), "one for each transaction");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_enters_before_the_mark_is_claimed_within_the_bound() {
    let fixture = fixture().await;
    // An old snapshot: what is claimed from now on stays in the server's way.
    let mut old = raw(&fixture.config).await;
    sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1").execute(&mut old).await.unwrap();
    let mut slow = raw(&fixture.config).await;
    let mut transaction = slow.begin().await.unwrap();
    sqlx::query("SELECT laelaps.submit('slow', 'type', wake => false)").execute(&mut *transaction).await.unwrap();
    behind::what_enters_before_the_mark_is_claimed_within_the_bound(&fixture, async || transaction.commit().await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_submits_in_its_own_transaction() {
    let fixture = fixture().await;
    let mut producer = raw(&fixture.config).await;
    let tasks = [task_of("u", "a", Some(1)), task("b"), task("a")];
    let mut transaction = producer.begin().await.unwrap();
    use Submitted::{AlreadyExists, Created};
    assert_eq!(fixture.queue.submit_in(&mut *transaction, &tasks).await.unwrap(), [Created, Created, AlreadyExists]);
    assert!(!fixture.queue.exists("a").await.unwrap(), "not before the commit");
    transaction.rollback().await.unwrap();
    assert!(!fixture.queue.exists("a").await.unwrap());
    let mut transaction = producer.begin().await.unwrap();
    fixture.queue.submit_in(&mut *transaction, &tasks).await.unwrap();
    transaction.commit().await.unwrap();
    let host = fixture.host().await;
    assert_eq!(fixture.claim(host, 9).await.len(), 2);
    fixture.audit().await;
    let sqlite = Fixture::new(Database::Sqlite).await;
    let foreign = sqlite.queue.submit_in(&mut producer, &tasks).await.unwrap_err();
    assert!(matches!(foreign, Error::NotSupported { .. }), "{foreign}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sql_function_submits_once_and_only_what_keeps_its_bounds() {
    let fixture = fixture().await;
    let mut producer = raw(&fixture.config).await;
    let created =
        async |producer: &mut PgConnection, sql: &'static str| sqlx::query_scalar::<_, bool>(sql).fetch_one(producer).await;
    assert!(created(&mut producer, "SELECT laelaps.submit('a', 'report', '{\"month\": 7, \"z\": 1.50}')").await.unwrap());
    assert!(!created(&mut producer, "SELECT laelaps.submit('a', 'other')").await.unwrap());
    let user = "SELECT laelaps.submit('b', 'report', user_name => 'u', max_running => 0, max_attempts => 3, run_at => now() - interval '1 h')";
    assert!(created(&mut producer, user).await.unwrap());
    assert!(created(&mut producer, "SELECT laelaps.submit('later', 'report', run_at => now() + interval '1 h')").await.unwrap());
    let large = "SELECT laelaps.submit('large', 'report', json_build_object('x', repeat('x', 100000)))";
    assert!(created(&mut producer, large).await.unwrap());
    let wrong = [
        ("SELECT laelaps.submit('', 'report')", "key: 1 to 255 bytes of text, without control characters"),
        ("SELECT laelaps.submit(repeat('x', 256), 'report')", "key: 1 to 255 bytes of text, without control characters"),
        ("SELECT laelaps.submit(E'a\\u0085', 'report')", "key: 1 to 255 bytes of text, without control characters"),
        ("SELECT laelaps.submit(NULL, 'report')", "key: 1 to 255 bytes of text, without control characters"),
        ("SELECT laelaps.submit('x', E'\\n')", "type: 1 to 255 bytes of text, without control characters"),
        ("SELECT laelaps.submit('x', 'report', '[1]')", "data: a JSON object, at most 16777216 bytes"),
        (
            "SELECT laelaps.submit('x', 'report', json_build_object('x', repeat('x', 16777216)))",
            "data: a JSON object, at most 16777216 bytes",
        ),
        (
            "SELECT laelaps.submit('x', 'report', user_name => repeat('x', 256))",
            "user_name: at most 255 bytes of text, without control characters",
        ),
        ("SELECT laelaps.submit('x', 'report', max_running => -1)", "max_running: a whole number from 0 to 4294967295"),
        ("SELECT laelaps.submit('x', 'report', max_attempts => 0)", "max_attempts: a whole number from 1 to 4294967295"),
        ("SELECT laelaps.submit('x', 'report', run_at => 'infinity')", "run_at: at most the year 9999"),
    ];
    for (sql, expected) in wrong {
        let error = created(&mut producer, sql).await.unwrap_err();
        assert_eq!(error.as_database_error().unwrap().message(), expected, "{sql}");
    }
    assert!(!fixture.queue.exists("x").await.unwrap());
    let host = fixture.host().await;
    let claimed = fixture.claim(host, 9).await;
    let mut found = keys(&claimed);
    found.sort_unstable();
    assert_eq!(found, ["a", "b", "large"]);
    let of = |key: &str| claimed.iter().find(|task| task.key == key).unwrap();
    assert_eq!((of("a").data.as_slice(), of("a").task_type.as_str()), (&br#"{"month": 7, "z": 1.50}"#[..], "report"));
    assert_eq!((of("b").user.as_deref(), of("b").max_attempts, of("b").data.as_slice()), (Some("u"), Some(3), &b"{}"[..]));
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_needs_no_more_than_the_use_of_the_schema() {
    let fixture = fixture().await;
    let mut admin = raw(&fixture.config).await;
    let role = format!("producer_{}", fastrand::u64(..));
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN"))).execute(&mut admin).await.unwrap();
    let url = fixture.config.url.replace("postgres@", &format!("{role}@"));
    let mut producer = PgConnection::connect(&url).await.unwrap();
    assert!(sqlx::query("SELECT laelaps.submit('a', 'type')").execute(&mut producer).await.is_err());
    let denied = Queue::open(&impatient(&url)).await.unwrap().submit(task("b")).await.unwrap_err();
    assert!(matches!(denied, Error::Denied { .. }) && denied.hint().is_some(), "{denied:?}");
    sqlx::raw_sql(AssertSqlSafe(format!("GRANT USAGE ON SCHEMA laelaps TO {role}"))).execute(&mut admin).await.unwrap();
    sqlx::query("SELECT laelaps.submit('a', 'type')").execute(&mut producer).await.unwrap();
    assert!(sqlx::query("SELECT * FROM laelaps.task").execute(&mut producer).await.is_err());
    assert_eq!(fixture.state("a").await, State::Waiting);
}

#[tokio::test]
async fn a_server_that_cannot_be_used_is_named_with_what_to_do() {
    let server = shared().await;
    let url = server.url("nowhere");
    let place = url.replace("postgres@", "");
    let error = refused(&impatient(&url)).await;
    assert!(error.starts_with(&format!("cannot connect to {place}: ")), "{error}");
    assert!(error.contains("database \"nowhere\" does not exist"), "{error}");
    let stranger = server.url("postgres").replace("postgres@", "stranger:secret@");
    let error = refused(&impatient(&stranger)).await;
    assert!(error.contains("role \"stranger\" does not exist") && !error.contains("secret"), "{error}");
    let error = refused(&impatient("postgres://postgres:secret@127.0.0.1:1/db")).await;
    assert!(error.starts_with("cannot connect to postgres://127.0.0.1:1/db: ") && error.contains("refused"), "{error}");
    let connections = Connections { tls: Some(Tls::Required), ..Connections::default() };
    let error = refused(&Config { connections, ..impatient(server.url("postgres")) }).await;
    assert!(error.contains("server does not support TLS"), "{error}");
    let error = Queue::open(&impatient("postgres://host:port/db")).await.unwrap_err();
    assert!(matches!(error, Error::Config { setting: "url", .. }), "{error:?}");
}

#[tokio::test]
async fn who_may_not_make_tables_is_told_so() {
    let fixture = Fixture::empty(Database::Postgres).await;
    let mut admin = raw(&fixture.config).await;
    let role = format!("nobody_{}", fastrand::u64(..));
    sqlx::raw_sql(AssertSqlSafe(format!("CREATE ROLE {role} LOGIN"))).execute(&mut admin).await.unwrap();
    let url = fixture.config.url.replace("postgres@", &format!("{role}@"));
    let denied = Queue::open(&impatient(url)).await.unwrap().init().await.unwrap_err();
    assert!(matches!(denied, Error::Denied { .. }) && denied.hint().is_some(), "{denied:?}");
    assert!(denied.to_string().ends_with(": creating the tables is not allowed"), "{denied}");
}

/// A claim that is stopped in the middle of it by a lock on its task, while its host is handed on.
async fn handed_on_in_the_middle_of_a_claim(user: Option<&str>) {
    let fixture = fixture().await;
    let host = fixture.host_as("s1").await;
    fixture.submit(&[NewTask { user: user.map(str::to_owned), ..task("a") }]).await;
    let mut stopper = raw(&fixture.config).await;
    sqlx::raw_sql("BEGIN; SELECT FROM laelaps.task WHERE key = 'a' FOR UPDATE").execute(&mut stopper).await.unwrap();
    let (claimer, policy) = (fixture.queue.clone(), fixture.config.policy.clone());
    let claim = Claim { host, limit: 1, alive_time: LONG, alone: false, ignore_users: false, accepts: None };
    let claiming = tokio::spawn(async move { claimer.backend().claim(&claim).await });
    let mut watcher = raw(&fixture.config).await;
    let started = std::time::Instant::now();
    while !sqlx::query_scalar::<_, bool>(
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')",
    )
    .fetch_one(&mut watcher)
    .await
    .unwrap()
    {
        assert!(started.elapsed() < PATIENCE, "the claim does not come to where it is stopped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let handing = fixture.another().await;
    let mut handing = tokio::spawn(async move { handing.backend().hand_on(&["s1".to_owned()], &policy).await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut handing).await;
    assert!(early.is_err(), "the claim is waited for: {early:?}");
    sqlx::raw_sql("COMMIT").execute(&mut stopper).await.unwrap();
    assert_eq!(keys(&claiming.await.unwrap().unwrap().tasks), ["a"]);
    let taken = handing.await.unwrap().unwrap();
    assert_eq!((taken.tasks.len(), taken.dead_hosts.len()), (1, 1), "and what it took is taken back");
    assert_eq!(fixture.state("a").await, State::Waiting);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_is_handed_on_after_its_claims_that_are_under_way() {
    handed_on_in_the_middle_of_a_claim(None).await;
    handed_on_in_the_middle_of_a_claim(Some("u")).await;
}
