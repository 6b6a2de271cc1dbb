//! What only a PostgreSQL server can do to a queue, and what it can do for producers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use laelaps_queue::{
    Claim, Config, Connections, Error, HostDescription, LeaseAnswer, NewTask, Queue, Settlement, State, Submitted, Tls,
};
use laelaps_test_databases::postgres::{Server, shared};
use laelaps_test_databases::{Durability, LONG as PATIENT, PATIENCE, eventually};
use sqlx::postgres::PgListener;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::fixture::postgres::raw;
use crate::fixture::{Database, Fixture, LONG, after_each, finish, keys, patient, settled, task, task_of};
use crate::{behind, lost};

async fn fixture() -> Fixture {
    Fixture::new(Database::Postgres).await
}

/// A queue that does not wait for servers.
fn impatient(url: impl Into<String>) -> Config {
    Config { patience: Duration::from_millis(50), connections: patient(), ..Config::new(url) }
}

async fn refused(config: &Config) -> String {
    let error = Queue::open(config).await.expect_err("such a database cannot be used");
    assert!(error.hint().is_some(), "{error}");
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

/// Claim and finish until all of `count` tasks are finished; adds to `finished` what this worker finished. A task that was claimed for nobody would
/// be missing for the hour that its lease lasts.
async fn work(queue: Queue, count: usize, finished: Arc<AtomicUsize>) {
    let description = HostDescription { name: "worker".to_owned(), process_id: 1, identity: None };
    let host = queue.backend().register_host(&description).await.unwrap();
    let claim = Claim::new(host, 20, LONG);
    loop {
        let tasks = queue.backend().claim(&claim).await.unwrap().tasks;
        let group: Vec<Settlement> = tasks.iter().map(|task| settled(task, finish())).collect();
        let answers = queue.backend().settle(&group).await.unwrap();
        let held = answers.iter().filter(|answer| **answer == LeaseAnswer::Held).count();
        finished.fetch_add(held, Ordering::SeqCst);
        queue.backend().reclaim(&laelaps_queue::Policy::default()).await.unwrap();
        if tasks.is_empty() && queue.stats().await.unwrap().finished == count as u64 {
            return;
        }
    }
}

/// Four workers until all is done, and what is done to them meanwhile. Each settlement is told as done once.
async fn weathered(queue: &Queue, count: usize, fault: impl AsyncFnOnce(&AtomicUsize)) {
    let finished = Arc::new(AtomicUsize::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        workers.spawn(work(queue.clone(), count, Arc::clone(&finished)));
    }
    let working = async {
        while let Some(worker) = workers.join_next().await {
            worker.expect("no worker gives up");
        }
        assert_eq!(finished.load(Ordering::SeqCst), count, "each settlement was answered as held once");
    };
    tokio::join!(working, fault(&finished));
}

fn many(count: usize) -> Vec<NewTask> {
    let user = |number: usize| number.is_multiple_of(3).then(|| format!("u{}", number % 5));
    (0..count).map(|number| NewTask { user: user(number), max_running: Some(7), ..task(&number.to_string()) }).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_lose_nothing() {
    const TASKS: usize = 3_000;
    let fixture = fixture().await;
    fixture.submit(&many(TASKS)).await;
    let mut connection = raw(&fixture.config).await;
    let mut cut = 0;
    weathered(&fixture.queue, TASKS, async |finished| {
        after_each(20, TASKS, finished, async || {
            const CUT: &str = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid() AND query NOT LIKE '%DATABASE%'";
            cut += sqlx::query_scalar::<_, i64>(CUT).fetch_one(&mut connection).await.unwrap();
        })
        .await;
    })
    .await;
    assert!(cut > 0);
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_comes_back_loses_nothing() {
    const TASKS: usize = 2_000;
    let mut server = Server::start(Durability::Process).await;
    let config = Config { patience: PATIENT, connections: patient(), ..Config::new(server.create_database().await) };
    let queue = Queue::open(&config).await.unwrap();
    queue.init().await.unwrap();
    queue.submit_many(&many(TASKS)).await.unwrap();
    weathered(&queue, TASKS, async |finished| {
        after_each(TASKS / 3, TASKS, finished, async || {
            server.kill();
            Box::pin(server.restart()).await;
        })
        .await;
    })
    .await;
    let stats = queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (TASKS as u64, 0, 0));
    // Its connections have died while they were idle.
    server.kill();
    Box::pin(server.restart()).await;
    assert_eq!(queue.backend().audit().await.unwrap(), Vec::<String>::new());
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
            let started = Instant::now();
            for number in 0.. {
                other.submit(task(&format!("{round}{number}"))).await.unwrap();
                // What comes before the listener listens is not heard.
                if tokio::time::timeout(Duration::from_millis(100), &mut waiting).await.is_ok() {
                    return;
                }
                assert!(started.elapsed() < PATIENT, "nobody is woken {round}");
            }
        }
    };
    let listeners = || async {
        let mut connection = raw(&fixture.config).await;
        const LISTENS: &str = "SELECT array_agg(pid) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'laelaps listener'";
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
    let connections = Connections { listen: false, ..patient() };
    let deaf = Queue::open(&Config { connections, ..fixture.config.clone() }).await.unwrap();
    let host =
        deaf.backend().register_host(&HostDescription { name: "deaf".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let claim = Claim::new(host, 9, LONG);
    assert!(deaf.backend().claim(&claim).await.unwrap().tasks.is_empty());
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    fixture.submit_some("a", 3).await;
    // Whoever listens has heard of it ...
    tokio::time::timeout(PATIENCE, heard.recv()).await.expect("a notice").unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(300), deaf.wakeup()).await.is_err(), "... and nobody told this one");
    const LISTENERS: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND application_name = 'laelaps listener'";
    let listeners: i64 = sqlx::query_scalar(LISTENERS).fetch_one(&mut raw(&fixture.config).await).await.unwrap();
    assert_eq!(listeners, 0);
    assert_eq!(deaf.backend().claim(&claim).await.unwrap().tasks.len(), 3);
    deaf.close().await;
}

/// How many notices were sent before now and are not heard yet: notices come in the order of their transactions.
async fn notices_so_far(heard: &mut PgListener, sender: &mut PgConnection) -> u128 {
    sqlx::query("SELECT pg_notify('laelaps', 'so far')").execute(sender).await.unwrap();
    let mut notices = 0;
    while tokio::time::timeout(PATIENCE, heard.recv()).await.expect("a notice").unwrap().payload() != "so far" {
        notices += 1;
    }
    notices
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_submits_share_a_notice() {
    const SUBMITS: usize = 200;
    let fixture = fixture().await;
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    let (queue, mut producer) = (fixture.another().await, raw(&fixture.config).await);
    let begun = Instant::now();
    for number in 0..SUBMITS {
        queue.submit(task(&number.to_string())).await.unwrap();
    }
    // It waits for the last notice.
    queue.close().await;
    let took = begun.elapsed();
    let notices = notices_so_far(&mut heard, &mut producer).await;
    // One at the beginning, one in 20 ms, and the last.
    let most = took.as_millis() / 20 + 2;
    assert!((1..=most).contains(&notices), "{notices} notices of {SUBMITS} submits in {took:?}, at most {most}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_wakes_hosts_that_wait_and_spares_itself_the_notice_while_none_does() {
    let fixture = fixture().await;
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    let mut producer = raw(&fixture.config).await;
    let mut number = 0;
    // Fifty tasks of one transaction; how many notices came of them.
    let mut notices = async || {
        number += 1;
        let submit = format!("SELECT laelaps.submit('{number}-' || n, 'type') FROM generate_series(1, 50) AS n");
        sqlx::query(AssertSqlSafe(submit)).execute(&mut producer).await.unwrap();
        notices_so_far(&mut heard, &mut producer).await
    };
    assert_eq!(notices().await, 0, "nobody waits");
    let host = fixture.host().await;
    let queue = fixture.queue.clone();
    let waiting = tokio::spawn(async move { queue.wakeup().await });
    eventually(PATIENCE, "the host waits, and a notice is sent", async || match notices().await {
        1 => Ok(()),
        0 => Err("no notice".to_owned()),
        more => panic!("{more} notices of one transaction"),
    })
    .await;
    tokio::time::timeout(PATIENCE, waiting).await.expect("it is woken").unwrap();
    // It has more than enough to do.
    eventually(PATIENCE, "no notice any more", async || {
        assert_eq!(fixture.claim(host, 10).await.len(), 10);
        if notices().await == 0 { Ok(()) } else { Err("a notice".to_owned()) }
    })
    .await;
    // It has done everything.
    while !fixture.claim(host, 10_000).await.is_empty() {}
    eventually(
        PATIENCE,
        "notices are sent again",
        async || if notices().await == 1 { Ok(()) } else { Err("no notice".to_owned()) },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_cannot_see_who_waits_now_sends_a_notice() {
    let fixture = fixture().await;
    let mut heard = PgListener::connect(&fixture.direct_url().await).await.unwrap();
    heard.listen("laelaps").await.unwrap();
    let (mut producer, mut sender) = (raw(&fixture.config).await, raw(&fixture.config).await);
    for isolation in ["REPEATABLE READ", "SERIALIZABLE"] {
        // By its snapshot nobody waits, whoever begins to.
        let submit = format!("BEGIN ISOLATION LEVEL {isolation}; SELECT 1; SELECT laelaps.submit('{isolation}', 'type'); COMMIT");
        sqlx::raw_sql(AssertSqlSafe(submit)).execute(&mut producer).await.unwrap();
        assert_eq!(notices_so_far(&mut heard, &mut sender).await, 1, "{isolation}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_producer_commits_that_saw_nobody_wait_is_found_by_who_waits_then() {
    let fixture = fixture().await;
    let mut producer = raw(&fixture.config).await;
    let mut transaction = producer.begin().await.unwrap();
    sqlx::query("SELECT laelaps.submit('a', 'type')").execute(&mut *transaction).await.unwrap();
    let host = fixture.host().await;
    assert!(fixture.claim(host, 10).await.is_empty());
    // It looks again now and then, and finds nothing.
    for _ in 0..3 {
        tokio::time::timeout(PATIENCE, fixture.queue.wakeup()).await.expect("it looks again");
        assert!(fixture.claim(host, 10).await.is_empty());
    }
    transaction.commit().await.unwrap();
    let found = async {
        loop {
            fixture.queue.wakeup().await;
            if !fixture.claim(host, 10).await.is_empty() {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it is found without polling");
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

/// Claims until all of `count` tasks were claimed; answers their keys in that order.
async fn claimed_in_turn(fixture: &Fixture, count: usize) -> Vec<String> {
    let host = fixture.host().await;
    let mut found = Vec::with_capacity(count);
    eventually(PATIENCE, "all are claimed", async || {
        found.extend(fixture.claim(host, 1_000).await.into_iter().map(|task| task.key));
        if found.len() == count { Ok(()) } else { Err(format!("{} are", found.len())) }
    })
    .await;
    found
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_that_another_program_fills_are_found_and_come_in_one_order() {
    let fixture = fixture().await;
    let other = fixture.another().await;
    let fill = async |numbers: std::ops::Range<usize>| {
        for number in numbers {
            let queue = ["mail", "default", "video"][number % 3].to_owned();
            other.submit(NewTask { queue: Some(queue), ..task(&number.to_string()) }).await.unwrap();
        }
    };
    fill(0..9).await;
    // The first claim looks from the head, so it knows all of them.
    assert_eq!(claimed_in_turn(&fixture, 9).await, ["0", "1", "2", "3", "4", "5", "6", "7", "8"]);
    fixture.submit(&[task("a")]).await;
    let new = NewTask { queue: Some("new".to_owned()), ..task("b") };
    other.submit(new).await.unwrap();
    fill(9..12).await;
    let mut found = claimed_in_turn(&fixture, 5).await;
    found.sort_unstable();
    assert_eq!(found, ["10", "11", "9", "a", "b"], "a later look finds a queue that is new");
    other.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_queues_than_a_look_around_may_find_are_found_in_several() {
    let fixture = fixture().await;
    let other = fixture.another().await;
    let of = |number: usize| NewTask { queue: Some(format!("q{number:04}")), ..task(&number.to_string()) };
    other.submit_many(&(0..2_300).map(of).collect::<Vec<NewTask>>()).await.unwrap();
    other.close().await;
    assert_eq!(claimed_in_turn(&fixture, 2_300).await.len(), 2_300);
    fixture.audit().await;
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
    let user =
        "SELECT laelaps.submit('b', 'report', NULL, '{\"user\": \"u\", \"max_running\": 0, \"max_attempts\": 3, \"run_at\": 7}')";
    assert!(created(&mut producer, user).await.unwrap());
    assert!(
        created(
            &mut producer,
            "SELECT laelaps.submit('later', 'report', options => json_build_object('run_at', now() + interval '1 h')::text)"
        )
        .await
        .unwrap()
    );
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
            "SELECT laelaps.submit('x', 'report', '{}', json_build_object('colour', 1))",
            "options: no option is called \"colour\"; there are user, queue, run_at, priority, max_running, max_attempts and gzip",
        ),
        (
            "SELECT laelaps.submit('x', 'report', '{}', '{\"user\": \"u\", \"user\": \"v\"}'::json)",
            "options: \"user\" is there twice",
        ),
        (
            "SELECT laelaps.submit('x', 'report', '{}'::json, jsonb_build_object('user', repeat('x', 256)))",
            "user: at most 255 bytes of text, without control characters",
        ),
        (
            "SELECT laelaps.submit('x', 'report', '{}'::jsonb, jsonb_build_object('user', repeat('x', 65536)))",
            "options: a JSON object, at most 65536 bytes",
        ),
        (
            "SELECT laelaps.submit('x', 'report', options => '{\"gzip\": true}')",
            "gzip: false; what is submitted in SQL is not compressed",
        ),
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
    let connections = Connections { tls: Some(Tls::Required), ..patient() };
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

/// How many sessions wait for a lock.
async fn waiting(watcher: &mut PgConnection) -> i64 {
    const WAITING: &str = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    sqlx::query_scalar(WAITING).fetch_one(watcher).await.unwrap()
}

/// A claim that is stopped in the middle of it by a lock on its task, while its host is handed on.
async fn handed_on_in_the_middle_of_a_claim(user: Option<&str>) {
    let fixture = fixture().await;
    let host = fixture.host_as("s1").await;
    fixture.submit(&[NewTask { user: user.map(str::to_owned), ..task("a") }]).await;
    let mut stopper = raw(&fixture.config).await;
    sqlx::raw_sql("BEGIN; SELECT FROM laelaps.task WHERE key = 'a' FOR UPDATE").execute(&mut stopper).await.unwrap();
    let (claimer, policy) = (fixture.queue.clone(), fixture.config.policy.clone());
    let claim = Claim::new(host, 1, LONG);
    let claiming = tokio::spawn(async move { claimer.backend().claim(&claim).await });
    let mut watcher = raw(&fixture.config).await;
    eventually(PATIENCE, "the claim comes to where it is stopped", async || {
        let waiting = waiting(&mut watcher).await;
        if waiting == 1 { Ok(()) } else { Err(format!("{waiting} wait")) }
    })
    .await;
    let handing = fixture.another().await;
    let handing = tokio::spawn(async move { handing.backend().hand_on(&["s1".to_owned()], &policy).await });
    eventually(PATIENCE, "the claim is waited for", async || {
        assert!(!handing.is_finished(), "the claim is waited for");
        let waiting = waiting(&mut watcher).await;
        if waiting == 2 { Ok(()) } else { Err(format!("{waiting} wait")) }
    })
    .await;
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
