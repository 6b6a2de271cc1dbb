//! What only a MySQL or MariaDB server can do to a queue: cut connections, die, refuse, and let producers in that speak SQL.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use laelaps_queue::{
    Claim, Config, Error, Event, HostDescription, LeaseAnswer, NewTask, Queue, SchemaStatus, Settlement, State, Submitted,
};
use laelaps_test_databases::{PATIENCE, eventually, mariadb, unique_name};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};

use crate::fixture::{Database, Fixture, LONG, after_each, finish, keys, patient, settled, task, task_of};
use crate::{behind, lost};

/// Tasks of a storm, and the hosts that work in it.
const STORM_TASKS: usize = 2_000;
const STORM_HOSTS: usize = 4;

/// Claim and settle until all tasks of the storm are settled. Whatever fails is tried again, as a host does it.
async fn work(queue: Queue, settled_tasks: Arc<AtomicUsize>) {
    let description = HostDescription { name: "worker".to_owned(), process_id: 1, identity: None };
    let host = queue.backend().register_host(&description).await.unwrap();
    let claim = Claim::new(host, 20, LONG);
    while settled_tasks.load(Ordering::SeqCst) < STORM_TASKS {
        let tasks = match queue.backend().claim(&claim).await {
            Ok(claimed) => claimed.tasks,
            Err(error) => {
                assert!(error.is_retryable(), "{error:?}");
                continue;
            }
        };
        let group: Vec<Settlement> = tasks.iter().map(|task| settled(task, finish())).collect();
        let answers = loop {
            match queue.backend().settle(&group).await {
                Ok(answers) => break answers,
                Err(error) => assert!(error.is_retryable(), "{error:?}"),
            }
        };
        // Also a settlement whose first answer was lost with its connection is known to have been ours.
        assert_eq!(answers, vec![LeaseAnswer::Held; tasks.len()]);
        settled_tasks.fetch_add(tasks.len(), Ordering::SeqCst);
        if tasks.is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    queue.close().await;
}

/// A storm of which every task has to be settled once, whatever `fault` does meanwhile. A task that was claimed for nobody would be missing for the
/// hour that its lease lasts.
async fn weathered(fixture: &Fixture, fault: impl AsyncFnOnce(&AtomicUsize)) {
    let tasks: Vec<NewTask> = (0..STORM_TASKS)
        .map(|number| match number % 4 {
            0 => task_of(&format!("u{}", number % 7), &format!("a{number}"), Some(30)),
            _ => task(&format!("a{number}")),
        })
        .collect();
    fixture.submit(&tasks).await;
    let settled_tasks = Arc::new(AtomicUsize::new(0));
    let mut hosts = tokio::task::JoinSet::new();
    for _ in 0..STORM_HOSTS {
        hosts.spawn(work(fixture.another().await, Arc::clone(&settled_tasks)));
    }
    let working = async {
        while let Some(host) = hosts.join_next().await {
            host.expect("no host gives up");
        }
    };
    tokio::join!(working, fault(&settled_tasks));
    assert_eq!(settled_tasks.load(Ordering::SeqCst), STORM_TASKS, "no task is settled twice");
    let stats = fixture.queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.ready, stats.running), (STORM_TASKS as u64, 0, 0));
    fixture.audit().await;
}

/// Kill some connections to a database; answers how many.
async fn kill_some(killer: &mut MySqlConnection, database: &str) -> Result<usize, sqlx::Error> {
    const VICTIMS: &str = "SELECT CAST(id AS UNSIGNED) FROM information_schema.processlist WHERE db = ? ORDER BY RAND() LIMIT 3";
    let victims: Vec<u64> = sqlx::query_scalar(VICTIMS).bind(database).fetch_all(&mut *killer).await?;
    let mut killed = 0;
    for victim in victims {
        // It may have gone by itself.
        killed += usize::from(sqlx::raw_sql(AssertSqlSafe(format!("KILL {victim}"))).execute(&mut *killer).await.is_ok());
    }
    Ok(killed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_killed_in_the_middle_of_a_storm_lose_nothing() {
    // A server of its own: killing under load is hard on it, and others shall not suffer if it dies of that.
    let mut server = mariadb::Server::start(laelaps_test_databases::Durability::Process).await;
    let fixture = Fixture::on(Database::MariaDb, server.create_database().await).await;
    let database = fixture.config.url.rsplit_once('/').unwrap().1.to_owned();
    weathered(&fixture, async |settled_tasks| {
        let mut killer = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
        let mut killed = 0;
        after_each(20, STORM_TASKS, settled_tasks, async || match kill_some(&mut killer, &database).await {
            Ok(more) => killed += more,
            Err(error) => {
                eprintln!("the server did not survive it, and is started again: {error}");
                Box::pin(server.restart()).await;
                killer = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
            }
        })
        .await;
        assert!(killed > 0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_and_started_again_in_the_middle_of_a_storm_loses_nothing() {
    let mut server = mariadb::Server::start(laelaps_test_databases::Durability::Process).await;
    let fixture = Fixture::on(Database::MariaDb, server.create_database().await).await;
    weathered(&fixture, async |settled_tasks| {
        after_each(STORM_TASKS / 3, STORM_TASKS, settled_tasks, async || {
            server.kill();
            Box::pin(server.restart()).await;
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_done_although_the_answer_was_lost_is_told_as_done() {
    lost::what_was_done_although_the_answer_was_lost_is_told_as_done(Database::MariaDb, b"COMMIT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_enters_before_the_mark_is_claimed_within_the_bound() {
    let fixture = Fixture::new(Database::MariaDb).await;
    // An old snapshot: what is claimed from now on stays in the server's way.
    let mut old = producer(&fixture).await;
    sqlx::raw_sql("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION WITH CONSISTENT SNAPSHOT")
        .execute(&mut old)
        .await
        .unwrap();
    let mut slow = producer(&fixture).await;
    let submit = "START TRANSACTION; CALL laelaps_submit('slow', 'type', NULL, NULL)";
    sqlx::raw_sql(submit).execute(&mut slow).await.unwrap();
    behind::what_enters_before_the_mark_is_claimed_within_the_bound(&fixture, async || {
        sqlx::raw_sql("COMMIT").execute(&mut slow).await.unwrap();
    })
    .await;
}

async fn refused(url: String) -> Error {
    let config = Config { patience: Duration::from_millis(50), connections: patient(), ..Config::new(url) };
    match Queue::open(&config).await {
        Err(error) => error,
        Ok(queue) => queue.init().await.expect_err("the server refuses"),
    }
}

#[tokio::test]
async fn what_a_server_refuses_is_told_with_a_hint_and_without_the_password() {
    let server = mariadb::shared().await;
    let mut root = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
    let url = server.create_database().await;
    let database = url.rsplit_once('/').unwrap().1;
    // Users are the whole server's, which other programs may use as well.
    let (reader, stranger) = (unique_name("reader"), unique_name("stranger"));
    let users = format!(
        "CREATE USER {reader}@'127.0.0.1' IDENTIFIED BY 'secret'; GRANT SELECT ON {database}.* TO {reader}@'127.0.0.1';
        CREATE USER {stranger}@'127.0.0.1' IDENTIFIED BY 'secret';"
    );
    sqlx::raw_sql(AssertSqlSafe(users)).execute(&mut root).await.unwrap();
    let at = |user: &str, database: &str| format!("mysql://{user}@127.0.0.1:{}/{database}", server.port());
    let cases = [
        (at(&format!("{reader}:wrong-secret"), database), "user or password is wrong"),
        (at(&format!("{stranger}:secret"), database), "the user may not use this database"),
        (at("root", "no_such_database"), "there is no such database"),
        (at(&format!("{reader}:secret"), database), "the user lacks a privilege"),
        (format!("{url}?ssl-mode=required"), "the server does not offer the encryption"),
        ("mysql://root:secret@127.0.0.1:1/q".to_owned(), "the server cannot be reached"),
    ];
    for (url, hint) in cases {
        let error = refused(url.clone()).await;
        assert!(error.hint().is_some_and(|told| told.starts_with(hint)), "{url}: {error:?}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

#[tokio::test]
async fn an_empty_database_of_a_server_says_that_it_has_no_tables() {
    let fixture = Fixture::empty(Database::MariaDb).await;
    for refused in [fixture.queue.submit(task("a")).await.unwrap_err(), fixture.queue.get("a").await.unwrap_err()] {
        assert!(matches!(refused, Error::NotInitialised), "{refused}");
    }
}

#[tokio::test]
async fn what_init_did_can_be_planned_done_again_and_compared() {
    let fixture = Fixture::empty(Database::MariaDb).await;
    fixture.meddle("CREATE TABLE someone_elses (id INT); CREATE TABLE laelaps_task (id INT)").await;
    let plan = fixture.backend().plan().await.unwrap();
    assert_eq!(plan.iter().map(|step| step.version).collect::<Vec<_>>(), [1]);
    assert!(plan[0].sql.contains("CREATE TABLE IF NOT EXISTS laelaps_task"), "{}", plan[0].sql);
    assert_eq!(fixture.queue.schema_status().await.unwrap(), SchemaStatus::Missing, "a plan changes nothing");
    // A table of that name was there before: it is told.
    fixture.queue.init().await.unwrap();
    let drift = fixture.backend().drift().await.unwrap();
    assert!(drift.contains(&"column laelaps_task.lease is missing".to_owned()), "{drift:?}");
    assert!(drift.iter().all(|difference| difference.contains("laelaps_task.")), "{drift:?}");
    // As it would be found after a crash between two statements.
    fixture.meddle("DROP TABLE laelaps_task, laelaps_tally; DROP PROCEDURE laelaps_submit; DELETE FROM laelaps_schema").await;
    assert_eq!(fixture.queue.init().await.unwrap().applied, [1]);
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    assert_eq!(fixture.backend().plan().await.unwrap(), []);
    fixture
        .meddle(
            "ALTER TABLE laelaps_host ADD COLUMN rack TEXT; ALTER TABLE laelaps_ready_of_user DROP KEY in_turn; DROP TABLE laelaps_progress;
            ALTER TABLE laelaps_task MODIFY `key` VARCHAR(100) NOT NULL; DROP PROCEDURE laelaps_submit; CREATE TABLE laelaps_x (id INT)",
        )
        .await;
    let mut drift = fixture.backend().drift().await.unwrap();
    drift.sort();
    let expected = [
        "column laelaps_host.rack is not ours",
        "column laelaps_task.key is of type varchar(100), init makes it varbinary(255)",
        "index laelaps_ready_of_user.in_turn is missing",
        "procedure laelaps_submit is missing",
        "table laelaps_progress is missing",
        "table laelaps_x is not ours",
    ];
    assert_eq!(drift, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_programs_that_initialise_one_database_of_a_server_make_one_schema() {
    let fixture = Fixture::empty(Database::MariaDb).await;
    let inits = (0..8).map(|_| {
        let config = fixture.config.clone();
        tokio::spawn(async move {
            let queue = Queue::open(&config).await.unwrap();
            let migration = queue.init().await.unwrap();
            queue.close().await;
            migration.applied.len()
        })
    });
    let mut applied = 0;
    for init in inits.collect::<Vec<_>>() {
        applied += init.await.unwrap();
    }
    assert_eq!(applied, 1);
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    fixture.submit(&[task("a")]).await;
    fixture.audit().await;
}

async fn producer(fixture: &Fixture) -> MySqlConnection {
    MySqlConnection::connect(&fixture.config.url).await.unwrap()
}

#[tokio::test]
async fn a_producer_that_speaks_sql_submits_like_any_other() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let mut producer = producer(&fixture).await;
    let submit = r#"CALL laelaps_submit('a', 'first', '{"n": 1}', NULL);
        CALL laelaps_submit('a', 'second', NULL, NULL); CALL laelaps_submit('b', 'bare', NULL, NULL);
        CALL laelaps_submit('c', 'of a user', NULL, '{"user":"u","max_running":1}'); CALL laelaps_submit('d', 'of a user', NULL, '{"user":"u","max_running":1}');
        CALL laelaps_submit('e', 'later', NULL, '{"user":"","run_at":32503680000}'); CALL laelaps_submit('f', 'past', NULL, '{"run_at":-1}');
        CALL laelaps_submit('large', 'large', CONCAT('{"x":"', REPEAT('x', 9000000), '"}'), NULL)"#;
    sqlx::raw_sql(submit).execute(&mut producer).await.unwrap();
    assert_eq!(fixture.queue.submit(task("a")).await.unwrap(), Submitted::AlreadyExists);
    let mut claimed = fixture.claim(host, 10).await;
    claimed.sort_by(|one, other| one.key.cmp(&other.key));
    assert_eq!(keys(&claimed), ["a", "b", "c", "f", "large"], "one of the user's at once");
    assert_eq!((claimed[0].task_type.as_str(), claimed[0].data.as_slice()), ("first", &br#"{"n": 1}"#[..]));
    assert_eq!((claimed[1].data.as_slice(), claimed[2].user.as_deref()), (&b"{}"[..], Some("u")));
    assert_eq!(claimed[4].data.len(), 9_000_008);
    let stats = fixture.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled, stats.running), (1, 1, 5));
    fixture.audit().await;
}

#[tokio::test]
async fn what_a_producer_submits_in_its_transaction_comes_and_goes_with_it() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let mut producer = producer(&fixture).await;
    let call = |key: &str| format!("CALL laelaps_submit('{key}', 't', NULL, NULL)");
    sqlx::raw_sql("CREATE TABLE orders (id INT PRIMARY KEY); START TRANSACTION; INSERT INTO orders VALUES (1)")
        .execute(&mut producer)
        .await
        .unwrap();
    sqlx::raw_sql(AssertSqlSafe(call("a"))).execute(&mut producer).await.unwrap();
    let early = fixture.claim(host, 9).await;
    assert!(early.is_empty() && !fixture.queue.exists("a").await.unwrap(), "not before the commit");
    // A call that is refused takes nothing of the transaction along.
    assert!(sqlx::raw_sql(AssertSqlSafe(call(""))).execute(&mut producer).await.is_err());
    sqlx::raw_sql("COMMIT; START TRANSACTION").execute(&mut producer).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(call("b"))).execute(&mut producer).await.unwrap();
    sqlx::raw_sql("ROLLBACK").execute(&mut producer).await.unwrap();
    assert_eq!(keys(&fixture.claim(host, 9).await), ["a"]);
    let orders: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM orders").fetch_one(&mut producer).await.unwrap();
    assert_eq!(orders, 1);
    fixture.audit().await;
}

#[tokio::test]
async fn a_producer_that_speaks_sql_is_told_what_is_wrong() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let mut producer = producer(&fixture).await;
    let cases = [
        ("NULL, 't', '{}', NULL", "key: "),
        ("'', 't', '{}', NULL", "key: "),
        ("CONCAT('a', CHAR(10)), 't', '{}', NULL", "key: "),
        ("CONCAT('a', _utf8mb4 0xC285), 't', '{}', NULL", "key: "),
        ("'a', REPEAT('x', 256), '{}', NULL", "type: "),
        ("'a', 't', '[]', NULL", "data: "),
        ("'a', 't', 'oops', NULL", "data: "),
        ("'a', 't', '{}', '{\"colour\":1}'", "options: no option is called \"colour\"; there are queue, user, "),
        (r#"'a', 't', '{}', '{"\\u0075ser":"u"}'"#, "options: their names are written without escapes"),
        (
            r#"'a', 't', '{}', CONCAT('{"user":"', REPEAT('x', 65536), '"}')"#,
            "options: a JSON object as text, at most 65536 bytes",
        ),
        (r#"'a', 't', '{}', '{"gzip":true}'"#, "gzip: false"),
        (r#"'a', 't', '{}', '{"queue":"two words"}'"#, "queue: 1 to 64 letters, digits and _ - . : /"),
        (
            r#"'a', 't', '{}', '{"an option with a long name":1}'"#,
            "options: no option is called \"an option with a lon\"; there are queue, user, run_at, priority, max_running, max_attempts and gzip",
        ),
    ];
    for (row, expected) in cases {
        let sql = format!("CALL laelaps_submit({row})");
        let refused = sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut producer).await.expect_err(row);
        let message = refused.as_database_error().unwrap().message().to_owned();
        assert!(message.starts_with(expected), "{row}: {message}");
    }
    assert_eq!(fixture.queue.stats().await.unwrap().types, []);
    fixture.audit().await;
}

#[tokio::test]
async fn the_crate_submits_in_a_callers_transaction() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let mut producer = producer(&fixture).await;
    let mut transaction = producer.begin().await.unwrap();
    let answers = fixture.queue.submit_in(&mut *transaction, &[task("a"), task_of("u", "b", Some(1)), task("a")]).await.unwrap();
    assert_eq!(answers, [Submitted::Created, Submitted::Created, Submitted::AlreadyExists]);
    assert!(!fixture.queue.exists("a").await.unwrap());
    transaction.commit().await.unwrap();
    assert!(fixture.queue.exists("a").await.unwrap());
    let mut transaction = producer.begin().await.unwrap();
    fixture.queue.submit_in(&mut *transaction, &[task("c")]).await.unwrap();
    transaction.rollback().await.unwrap();
    assert!(!fixture.queue.exists("c").await.unwrap());
    let sqlite = Fixture::new(Database::Sqlite).await;
    let mut transaction = producer.begin().await.unwrap();
    let foreign = sqlite.queue.submit_in(&mut *transaction, &[task("c")]).await.unwrap_err();
    assert!(matches!(foreign, Error::NotSupported { .. }), "{foreign}");
    let host = fixture.host().await;
    assert_eq!(fixture.claim(host, 9).await.len(), 2);
    fixture.audit().await;
}

#[tokio::test]
async fn data_that_grows_and_shrinks_over_its_parts_stays_whole() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a")]).await;
    let claimed = fixture.claim(host, 1).await.remove(0);
    for length in [9_000_000, 5_000_000, 3] {
        let members = format!(r#"{{"x":"{}"}}"#, "x".repeat(length));
        assert_eq!(fixture.backend().update_data(claimed.lease_ref, members.as_bytes()).await.unwrap(), LeaseAnswer::Held);
        let expected = format!(r#"{{"n":1,"x":"{}"}}"#, "x".repeat(length));
        assert_eq!(fixture.get("a").await.data.as_deref(), Some(expected.as_bytes()), "{length}");
    }
    let output = vec![7; 9_000_000];
    let event = Event::Finish { output: Some(output.clone()), retention: None };
    fixture.backend().settle(&[settled(&claimed, event)]).await.unwrap();
    assert_eq!(fixture.get("a").await.output, Some(output));
    fixture.audit().await;
}

#[tokio::test]
async fn a_host_that_nobody_saw_for_long_is_struck_off_once_it_has_nothing() {
    let fixture = Fixture::new(Database::MariaDb).await;
    // Its process never says that it is here, as it would while it reclaims.
    let silent = fixture.beside().await;
    let host = silent.host().await;
    fixture.submit(&[task("a")]).await;
    let claimed = silent.claim(host, 1).await;
    fixture.meddle("UPDATE laelaps_host SET seen_at = 1").await;
    let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert!(reclaimed.tasks.is_empty() && reclaimed.dead_hosts.is_empty(), "it has a lease that lasts: {reclaimed:?}");
    fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
    fixture.meddle("UPDATE laelaps_claim SET look_at = 1").await;
    let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert_eq!(reclaimed.dead_hosts.iter().map(|gone| gone.id).collect::<Vec<_>>(), [host]);
    assert_eq!(fixture.state("a").await, State::Finished);
    assert!(fixture.backend().hosts().await.unwrap().is_empty());
}

/// How long a session waits for a lock before the server gives its statement up, as the crate sets it (src/mysql/connect.rs).
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How often to look if the machine is so busy that this is not long enough.
const TRIES: usize = 20;

/// Whether a statement like this runs in the database.
async fn runs(watcher: &mut MySqlConnection, like: &str) -> Result<(), String> {
    const RUNS: &str = "SELECT EXISTS (SELECT 1 FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE ?)";
    match sqlx::query_scalar::<_, bool>(RUNS).bind(like).fetch_one(watcher).await.unwrap() {
        true => Ok(()),
        false => Err(format!("nothing like {like}")),
    }
}

/// A claim that is stopped in the middle of it by a lock on where its task waits, while its host is handed on. False if that took so long that the
/// server may have given the claim's wait up, which lets the hand-on go first: that says nothing.
async fn handed_on_in_the_middle_of_a_claim(user: &str) -> bool {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host_as("s1").await;
    fixture.submit(&[NewTask { user: Some(user.to_owned()), ..task("a") }]).await;
    let mut stopper = producer(&fixture).await;
    sqlx::raw_sql("START TRANSACTION; SELECT task FROM laelaps_ready_of_user FOR UPDATE").execute(&mut stopper).await.unwrap();
    let (claimer, policy) = (fixture.queue.clone(), fixture.config.policy.clone());
    let claim = Claim::new(host, 1, LONG);
    let (mut watcher, handing) = (producer(&fixture).await, fixture.another().await);
    let begun = Instant::now();
    let claiming = tokio::spawn(async move { claimer.backend().claim(&claim).await });
    eventually(PATIENCE, "the claim comes to where it is stopped", async || {
        runs(&mut watcher, "DELETE r FROM JSON_TABLE%laelaps_ready_of_user%").await
    })
    .await;
    let handing = tokio::spawn(async move { handing.backend().hand_on(&["s1".to_owned()], &policy).await });
    let waits = eventually(PATIENCE, "the claim is waited for", async || match handing.is_finished() {
        true => Ok(false),
        false => runs(&mut watcher, "UPDATE%laelaps_host%left_at%").await.map(|()| true),
    })
    .await;
    sqlx::raw_sql("COMMIT").execute(&mut stopper).await.unwrap();
    if begun.elapsed() >= LOCK_WAIT {
        return false;
    }
    assert!(waits, "the claim is waited for");
    assert_eq!(keys(&claiming.await.unwrap().unwrap().tasks), ["a"]);
    let taken = handing.await.unwrap().unwrap();
    assert_eq!((taken.tasks.len(), taken.dead_hosts.len()), (1, 1), "and what it took is taken back");
    assert_eq!(fixture.state("a").await, State::Waiting);
    fixture.audit().await;
    true
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_is_handed_on_after_its_claims_that_are_under_way() {
    for _ in 0..TRIES {
        if handed_on_in_the_middle_of_a_claim("u").await {
            return;
        }
    }
    panic!("each of {TRIES} times it took longer than {LOCK_WAIT:?} to look");
}
