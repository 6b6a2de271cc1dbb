//! Others who keep a transaction open on a MariaDB server: nobody waits for them who need not.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{
    Beat, Claim, ClaimedTask, Config, Error, Event, HostId, LeaseAnswer, NewTask, Queue, State, Submitted, Timestamp, Update,
};
use laelaps_test_databases::{Durability, eventually, mariadb, unique_name};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};

use crate::explorer::is_waiting;
use crate::fixture::{Database, Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of, with_follow_ups};

async fn beside(fixture: &Fixture) -> MySqlConnection {
    MySqlConnection::connect(&fixture.config.url).await.unwrap()
}

async fn run(connection: &mut MySqlConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.unwrap();
}

/// A claim that does not wait for anybody.
async fn claim_at_once(fixture: &Fixture, host: HostId, ignore_users: bool, alone: bool) -> Vec<ClaimedTask> {
    let claim = Claim { alone, ignore_users, ..Claim::new(host, 9, LONG) };
    let claimed = tokio::time::timeout(PATIENCE, fixture.backend().claim(&claim)).await;
    claimed.expect("nobody is waited for").unwrap().tasks
}

/// Tables with so few rows that the server thinks it quicker to read all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producers_open_transaction_stops_no_claim() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let mut producer = beside(&fixture).await;
    fixture.submit(&[task("before"), task_of("u", "before of u", Some(9))]).await;
    run(
        &mut producer,
        "ANALYZE TABLE laelaps_task, laelaps_ready, laelaps_ready_of_user, laelaps_account_change, laelaps_account",
    )
    .await;
    assert_eq!(claim_at_once(&fixture, host, false, false).await.len(), 2);
    let submits = "START TRANSACTION; CALL laelaps_submit('open', 'type', NULL, NULL);
        CALL laelaps_submit('open of u', 'type', NULL, '{\"user\":\"u\",\"max_running\":9}'); CALL laelaps_submit('open of v', 'type', NULL, '{\"user\":\"v\",\"max_running\":1}');
        CALL laelaps_submit('open later', 'type', NULL, '{\"run_at\":4102444800}')";
    run(&mut producer, submits).await;
    for round in 0..3 {
        let name = |what: &str| format!("{what}{round}");
        fixture.submit(&[task(&name("a")), task_of("u", &name("b"), Some(9)), task_of("w", &name("c"), Some(2))]).await;
        let claimed = claim_at_once(&fixture, host, round == 1, round == 2).await;
        assert_eq!(claimed.len(), 3, "{:?}", keys(&claimed));
        let beats: Vec<Beat> =
            claimed.iter().map(|task| Beat { lease_ref: task.lease_ref, alive_time: LONG, progress: None }).collect();
        let renewed = tokio::time::timeout(PATIENCE, fixture.backend().heartbeat(&beats)).await;
        assert_eq!(renewed.expect("nobody is waited for").unwrap(), [LeaseAnswer::Held; 3]);
        let ends: Vec<_> = claimed.iter().map(|task| settled(task, finish())).collect();
        let answers = tokio::time::timeout(PATIENCE, fixture.backend().settle(&ends)).await;
        assert_eq!(answers.expect("nobody is waited for").unwrap(), [LeaseAnswer::Held; 3]);
        let reclaimed = tokio::time::timeout(PATIENCE, fixture.backend().reclaim(&fixture.config.policy)).await;
        reclaimed.expect("nobody is waited for").unwrap();
    }
    run(&mut producer, "COMMIT").await;
    // What entered behind the place where claims have come to is found within a second.
    let mut found = Vec::new();
    eventually(PATIENCE, "the producer's tasks are claimed", async || {
        found.extend(claim_at_once(&fixture, host, false, false).await.into_iter().map(|task| task.key));
        if found.len() == 3 { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    fixture.audit().await;
}

/// Two keys of follow-ups: the open transaction has one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settlement_whose_follow_ups_key_is_held_is_busy_and_changes_nothing() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit_some("a", 3).await;
    let claimed = fixture.claim(host, 3).await;
    let mut producer = beside(&fixture).await;
    run(&mut producer, "START TRANSACTION; CALL laelaps_submit('next', 'type', NULL, NULL)").await;
    let with_next = with_follow_ups(vec![task("next")], settled(&claimed[0], finish()));
    let group = [settled(&claimed[1], finish()), with_next.clone()];
    let busy = tokio::time::timeout(PATIENCE, fixture.backend().settle(&group)).await.expect("it does not wait for long");
    let error = busy.unwrap_err();
    assert!(matches!(error, Error::Busy { .. }) && error.is_retryable() && !error.is_about_the_request(), "{error:?}");
    assert_eq!(fixture.state("a1").await, State::Running);
    // What has no follow-ups, or others, is settled meanwhile, and others submit.
    let other = with_follow_ups(vec![task("other")], settled(&claimed[2], finish()));
    for settlement in [settled(&claimed[1], finish()), other] {
        let answer = tokio::time::timeout(PATIENCE, fixture.backend().settle(&[settlement])).await;
        assert_eq!(answer.expect("nobody is waited for").unwrap(), [LeaseAnswer::Held]);
    }
    let waiting = {
        let queue = fixture.queue.clone();
        tokio::spawn(async move { queue.submit(task("next")).await })
    };
    for number in 0..20 {
        let key = format!("free{number}");
        let stored = tokio::time::timeout(PATIENCE, fixture.queue.submit(task(&key))).await;
        assert_eq!(stored.expect("nobody is waited for").unwrap(), Submitted::Created);
    }
    run(&mut producer, "COMMIT").await;
    assert_eq!(waiting.await.unwrap().unwrap(), Submitted::AlreadyExists);
    assert_eq!(fixture.backend().settle(&[with_next]).await.unwrap(), [LeaseAnswer::Held]);
    fixture.audit().await;
}

/// Somebody holds the row of the second task: what is written of the first is nobody's yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_of_several_tasks_are_one_transaction() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    fixture.submit(&[task("a"), task("b")]).await;
    let claimed = fixture.claim(host, 2).await;
    let mut holder = beside(&fixture).await;
    run(&mut holder, "START TRANSACTION; SELECT id FROM laelaps_task WHERE `key` = 'b' FOR UPDATE").await;
    let update = |task: &ClaimedTask| Update { lease_ref: task.lease_ref, members: br#"{"m":1}"#.to_vec() };
    let updates: Vec<Update> = claimed.iter().map(update).collect();
    let backend = Arc::clone(fixture.backend());
    let updating = tokio::spawn(async move { backend.update_many(&updates).await });
    let mut watcher = beside(&fixture).await;
    eventually(PATIENCE, "it waits for the row", async || {
        const SESSIONS: &str = "SELECT CAST(id AS UNSIGNED) FROM information_schema.processlist WHERE db = DATABASE()";
        let sessions: Vec<u64> = sqlx::query_scalar(SESSIONS).fetch_all(&mut watcher).await.unwrap();
        let status = sqlx::raw_sql("SHOW ENGINE INNODB STATUS").fetch_one(&mut watcher).await.unwrap();
        let status: String = status.try_get(2).unwrap();
        let waits = sessions.iter().any(|session| is_waiting(&status, u32::try_from(*session).unwrap()));
        if waits { Ok(()) } else { Err(format!("none of {sessions:?} waits")) }
    })
    .await;
    assert_eq!(fixture.get("a").await.data, Some(br#"{"n":1}"#.to_vec()));
    run(&mut holder, "COMMIT").await;
    let answers = updating.await.unwrap().unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Ok(LeaseAnswer::Held))), "{answers:?}");
    assert_eq!(fixture.get("a").await.data, Some(br#"{"n":1,"m":1}"#.to_vec()));
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_is_not_moved_while_somebody_holds_its_task() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let soon = fixture.backend().now().await.unwrap().plus(Duration::from_millis(200));
    let due = |key: &str| NewTask { run_at: Some(soon), ..task_of("u", key, Some(1)) };
    fixture.submit(&[due("held"), due("free")]).await;
    let mut holder = beside(&fixture).await;
    run(&mut holder, "START TRANSACTION; SELECT id FROM laelaps_task WHERE `key` = 'held' FOR UPDATE").await;
    fixture.passes(soon).await;
    assert_eq!(keys(&claim_at_once(&fixture, host, false, false).await), ["free"]);
    // A cancellation that has its row finds it where it stood.
    let left: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM laelaps_scheduled").fetch_one(&mut holder).await.unwrap();
    assert_eq!(left, 1);
    run(&mut holder, "COMMIT").await;
    fixture.queue.cancel("held").await.unwrap();
    fixture.audit().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_dead_host_has_is_handed_on_around_a_row_that_somebody_holds() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let doomed = fixture.host_as("s1").await;
    fixture.submit_some("a", 5).await;
    assert_eq!(fixture.claim(doomed, 5).await.len(), 5);
    let mut holder = beside(&fixture).await;
    run(&mut holder, "START TRANSACTION; SELECT id FROM laelaps_task WHERE `key` = 'a2' FOR UPDATE").await;
    let names = ["s1".to_owned()];
    let first = tokio::time::timeout(PATIENCE, fixture.backend().hand_on(&names, &fixture.config.policy)).await;
    let first = first.expect("nobody is waited for").unwrap();
    assert_eq!((first.tasks.len(), first.dead_hosts.len()), (4, 0), "{first:?}");
    let around = tokio::time::timeout(PATIENCE, fixture.backend().reclaim(&fixture.config.policy)).await;
    assert!(around.expect("nobody is waited for").unwrap().tasks.is_empty());
    run(&mut holder, "COMMIT").await;
    let rest = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert_eq!((rest.tasks.len(), rest.dead_hosts.len()), (1, 1), "{rest:?}");
    fixture.audit().await;
}

/// Settings of a server under which programs work as before, and ours as well.
const HOSTILE: &str = "SET GLOBAL sql_safe_updates = 1; SET GLOBAL sql_select_limit = 1; SET GLOBAL completion_type = 2; SET GLOBAL max_join_size = 1;
    SET GLOBAL max_allowed_packet = 262144; SET GLOBAL autocommit = 0; SET GLOBAL tx_isolation = 'SERIALIZABLE'; SET GLOBAL tx_read_only = 1;
    SET GLOBAL sql_mode = 'ANSI_QUOTES,ONLY_FULL_GROUP_BY,PAD_CHAR_TO_FULL_LENGTH'; SET GLOBAL max_recursive_iterations = 2";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_servers_settings_change_nothing() {
    let server = mariadb::Server::start(Durability::Process).await;
    let mut root = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
    let url = server.create_database().await;
    run(&mut root, HOSTILE).await;
    let fixture = Fixture::on(Database::MariaDb, url).await;
    let host = fixture.host().await;
    let long = "ä\"".repeat(80);
    let tasks: Vec<NewTask> =
        (0..1_500).map(|number| task_of(&format!("{long}{}", number % 9), &format!("{number}{long}"), None)).collect();
    let answers = fixture.queue.submit_many(&tasks).await.unwrap();
    assert!(answers.iter().all(|answer| *answer == Submitted::Created));
    let large = NewTask::new("large", "type", format!(r#"{{"x":"{}"}}"#, "x".repeat(3_000_000)));
    fixture.submit(&[large, NewTask { user: Some("u".to_owned()), ..task("b") }]).await;
    let mut held = Vec::new();
    loop {
        let claimed = fixture.claim(host, 1_000).await;
        if claimed.is_empty() {
            break;
        }
        held.extend(claimed);
    }
    assert_eq!(held.len(), 1_502);
    let (large, others): (Vec<ClaimedTask>, Vec<ClaimedTask>) = held.into_iter().partition(|task| task.key == "large");
    assert_eq!(large[0].data.len(), 3_000_008);
    let members = format!(r#"{{"y":"{}"}}"#, "y".repeat(1_000_000));
    assert_eq!(fixture.backend().update_data(large[0].lease_ref, members.as_bytes()).await.unwrap(), LeaseAnswer::Held);
    let output = Event::Finish { output: Some(vec![7; 2_000_000]), retention: None };
    fixture.backend().settle(&[settled(&large[0], output)]).await.unwrap();
    let words = Event::Trap { message: "\u{1}".repeat(4_096) };
    let ends: Vec<_> = others.iter().map(|task| settled(task, words.clone())).collect();
    for group in ends.chunks(200) {
        assert_eq!(fixture.backend().settle(group).await.unwrap().len(), group.len());
    }
    assert_eq!(fixture.get("large").await.output.map(|output| output.len()), Some(2_000_000));
    assert_eq!(fixture.get("large").await.data.map(|data| data.len()), Some(4_000_015));
    fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert_eq!(fixture.claim(host, 1_000).await.len(), 1_000);
    let mut list = laelaps_queue::Filter { limit: 500, ..Default::default() };
    list.with_data = true;
    assert_eq!(fixture.queue.list(&list).await.unwrap().tasks.len(), 500);
    assert_eq!(fixture.backend().drift().await.unwrap(), [] as [&str; 0]);
    assert_eq!(fixture.backend().audit().await.unwrap(), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_takes_no_writes_any_more_is_left() {
    let server = mariadb::Server::start(Durability::Process).await;
    let mut root = MySqlConnection::connect(&server.url("mysql")).await.unwrap();
    let fixture = Fixture::on(Database::MariaDb, server.create_database().await).await;
    let worker = unique_name("worker");
    let database = fixture.config.url.rsplit_once('/').unwrap().1.to_owned();
    run(
        &mut root,
        &format!("CREATE USER {worker}@'127.0.0.1' IDENTIFIED BY 'secret'; GRANT ALL ON {database}.* TO {worker}@'127.0.0.1'"),
    )
    .await;
    let url = format!("mysql://{worker}:secret@127.0.0.1:{}/{database}", server.port());
    let queue = Queue::open(&Config { url, ..fixture.config.clone() }).await.unwrap();
    queue.submit(task("a")).await.unwrap();
    let sessions = async |root: &mut MySqlConnection| {
        let sql = format!("SELECT CAST(id AS UNSIGNED) FROM information_schema.processlist WHERE user = '{worker}'");
        let ids: Vec<u64> = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(root).await.unwrap();
        ids.into_iter().collect::<BTreeSet<u64>>()
    };
    let before = sessions(&mut root).await;
    assert!(!before.is_empty());
    run(&mut root, "SET GLOBAL read_only = 1").await;
    let error = queue.submit(task("b")).await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error:?}");
    let after = sessions(&mut root).await;
    assert!(before.intersection(&after).next().is_none(), "{before:?} {after:?}");
    run(&mut root, "SET GLOBAL read_only = 0").await;
    assert_eq!(queue.submit(task("b")).await.unwrap(), Submitted::Created);
}

#[tokio::test]
async fn opening_keeps_trying_for_as_long_as_patience_says() {
    let patience = Duration::from_secs(2);
    let nowhere = Config { patience, ..Config::new("mysql://root@127.0.0.1:1/q") };
    let began = std::time::Instant::now();
    let error = Queue::open(&nowhere).await.unwrap_err();
    assert!(matches!(error, Error::Connect { .. }) && error.is_retryable(), "{error:?}");
    assert!(began.elapsed() >= patience / 2, "given up after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_free_once_its_retention_has_ended_also_on_an_idle_queue() {
    let fixture = Fixture::new(Database::MariaDb).await;
    let host = fixture.host().await;
    let producer = Arc::new(tokio::sync::Mutex::new(beside(&fixture).await));
    fixture.submit(&[task("a"), task("b"), task("kept")]).await;
    let claimed = fixture.claim(host, 3).await;
    let at_once = || Event::Finish { output: Some(b"old".to_vec()), retention: Some(Duration::ZERO) };
    let ends = [settled(&claimed[0], at_once()), settled(&claimed[1], at_once()), settled(&claimed[2], finish())];
    fixture.backend().settle(&ends).await.unwrap();
    fixture.passes(fixture.get("b").await.retained_until.unwrap().plus(Duration::from_millis(5))).await;
    let answers = fixture.queue.submit_many(&[task("a"), task("kept"), task("new")]).await.unwrap();
    assert_eq!(answers, [Submitted::Created, Submitted::AlreadyExists, Submitted::Created]);
    let call = "START TRANSACTION; CALL laelaps_submit('b', 'type', '{\"again\":1}', NULL); COMMIT";
    run(&mut *producer.lock().await, call).await;
    let again = fixture.get("b").await;
    assert_eq!((again.state, again.output, again.data), (State::Waiting, None, Some(br#"{"again":1}"#.to_vec())));
    assert_eq!(fixture.get("a").await.state, State::Waiting);
    let stats = fixture.queue.stats().await.unwrap();
    assert_eq!((stats.ready, stats.finished), (3, 1));
    assert_eq!(keys(&fixture.claim(host, 9).await), ["new", "a", "b"]);
    assert!(again.created_at > Timestamp(0));
    fixture.audit().await;
}
