//! What only SQLite promises: how statements find their rows, what an idle queue writes, and what a full disk does.

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;
use tempfile::TempDir;

use super::*;
use crate::{Event, Submitted};

async fn opened(folder: &TempDir, change: impl FnOnce(SqliteConnectOptions) -> SqliteConnectOptions) -> Sqlite {
    let path = folder.path().join("queue.db");
    let sqlite = Sqlite::open_with(&path, change(options(&path)), &Config::new("unused")).await.unwrap();
    sqlite.init().await.unwrap();
    sqlite
}

async fn plan(connection: &mut SqliteConnection, sql: &str) -> Vec<String> {
    let explained = format!("EXPLAIN QUERY PLAN {sql}");
    let rows = sqlx::raw_sql(sqlx::AssertSqlSafe(explained)).fetch_all(connection).await.unwrap();
    rows.iter().map(|row| row.get("detail")).collect()
}

/// Statements whose cost may grow with their batch, and with nothing else; with what their plan has to contain.
const LOOKED_UP: [(&str, &str, &str); 23] = [
    ("due", claim::DUE, "SEARCH scheduled USING PRIMARY KEY (run_at=? AND task=?)"),
    ("suspect", claim::SUSPECT, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("oldest", claim::OLDEST, "SCAN ready USING COVERING INDEX ready_in_time"),
    ("open accounts", claim::OPEN_ACCOUNTS, "SCAN account USING INDEX account_by_weight"),
    ("candidates of one", claim::CANDIDATES_OF_ONE, "SEARCH ready USING PRIMARY KEY (user=? AND (run_at,task)>(?,?))"),
    ("candidates of several", claim::CANDIDATES_OF_SEVERAL, "SEARCH later USING PRIMARY KEY (user=? AND (run_at,task)>(?,?))"),
    ("take from ready", claim::TAKE_FROM_READY, "SEARCH ready USING PRIMARY KEY (user=? AND run_at=? AND task=?)"),
    ("take from suspect", claim::TAKE_FROM_SUSPECT, "SEARCH suspect USING PRIMARY KEY (run_at=? AND task=?)"),
    ("leave accounts", accounts::LEAVE_ACCOUNTS, "SEARCH account USING PRIMARY KEY (user=?)"),
    ("leave tally", accounts::LEAVE_TALLY, "SEARCH tally USING PRIMARY KEY (what=? AND name=?)"),
    ("take", claim::TAKE, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("taken", claim::TAKEN, "SEARCH task_data USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN"),
    ("held", settle::HELD, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("finish", settle::FINISH, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("settle", settle::SETTLE, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("trim attempts", settle::TRIM_ATTEMPTS, "SEARCH attempt USING PRIMARY KEY (task=?)"),
    ("change accounts", accounts::CHANGE_ACCOUNTS, "SEARCH account USING PRIMARY KEY (user=?)"),
    ("change tally", accounts::CHANGE_TALLY, "SEARCH tally USING PRIMARY KEY (what=? AND name=?)"),
    ("renew", keep::RENEW, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("strays", hosts::STRAYS, "SEARCH task USING COVERING INDEX task_running (host=? AND until<?)"),
    ("held keys", read::HELD, "SEARCH scheduled USING PRIMARY KEY (run_at=?)"),
    ("unsettled", read::UNSETTLED, "SEARCH task USING INDEX task_key (key>? AND key<?)"),
    ("over", operate::OVER, "SEARCH retention USING INDEX retention_until (until<?)"),
];

/// What grows with the backlog or with what is retained.
const LARGE: [&str; 8] = ["task", "task_data", "ready", "scheduled", "account", "retention", "attempt", "tally"];

#[tokio::test]
async fn no_statement_of_the_path_reads_more_than_its_batch() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let mut connection = sqlite.readers.acquire().await.unwrap();
    for (name, sql, expected) in LOOKED_UP {
        let plan = plan(&mut connection, sql).await;
        assert!(plan.iter().any(|step| step == expected), "{name}: {plan:#?}");
        for step in &plan {
            let scanned = step.strip_prefix("SCAN ").and_then(|step| step.split(' ').next());
            let in_order = step.contains("USING INDEX account_by_weight") || step.contains("USING COVERING INDEX ready_in_time");
            assert!(!scanned.is_some_and(|table| LARGE.contains(&table)) || in_order, "{name} reads a whole table: {plan:#?}");
        }
    }
}

#[tokio::test]
async fn an_idle_queue_writes_nothing() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = sqlite.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let size = || std::fs::metadata(folder.path().join("queue.db-wal")).unwrap().len();
    let before = size();
    let claim = Claim { host, limit: 10, alive_time: Duration::from_secs(60), alone: true, ignore_users: false, accepts: None };
    for _ in 0..20 {
        assert!(sqlite.claim(&claim).await.unwrap().tasks.is_empty());
        assert!(sqlite.reclaim(&Policy::default()).await.unwrap().tasks.is_empty());
        assert_eq!(sqlite.clean_up(100).await.unwrap(), 0);
    }
    assert_eq!(size(), before);
}

#[tokio::test]
async fn a_full_disk_is_named_loses_nothing_and_passes() {
    let folder = TempDir::new().unwrap();
    // SQLite says that the disk is full in the same way when the database may not have more pages.
    let small = |pages: u32| move |options: SqliteConnectOptions| options.pragma("max_page_count", pages.to_string());
    let sqlite = opened(&folder, small(120)).await;
    let host = sqlite.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let task = |number: usize| NewTask::new(number.to_string(), "type", format!(r#"{{"x":"{}"}}"#, "x".repeat(3_000)));
    let mut stored = 0;
    let error = loop {
        match sqlite.submit(&[task(stored)]).await {
            Ok(answers) => assert_eq!(answers, [Submitted::Created]),
            Err(error) => break error,
        }
        stored += 1;
    };
    assert!(matches!(error, Error::Full { .. }), "{error:?}");
    assert!(error.to_string().ends_with("queue.db: no space left for the database"), "{error}");
    assert!(error.is_retryable() && error.hint().is_some());
    // What needs no room goes on, what needs some fails, and neither disturbs the other, together in one transaction or not.
    let both = tokio::join!(sqlite.submit(&[]), sqlite.get("0"), async {
        sqlite.submit(&[task(stored)]).await.map_err(|error| error.to_string())
    });
    assert!(both.0.is_ok() && both.1.unwrap().is_some() && both.2.is_err());
    let claim = Claim { host, limit: 1, alive_time: Duration::from_secs(60), alone: false, ignore_users: false, accepts: None };
    let claimed = sqlite.claim(&claim).await.unwrap().tasks.remove(0);
    let event = Event::Finish { output: None, retention: Some(Duration::ZERO) };
    let settlement =
        Settlement::of(claimed.lease_ref, event, crate::Attempt::of(&claimed), &Policy::default(), 0.0, None, Vec::new());
    assert_eq!(sqlite.settle(&[settlement]).await.unwrap(), [LeaseAnswer::Held]);
    sqlite.close().await;
    // With room again everything is there.
    let sqlite = opened(&folder, |options| options).await;
    assert_eq!(sqlite.stats().await.unwrap().ready, stored as u64 - 1);
    assert_eq!(sqlite.submit(&[task(stored)]).await.unwrap(), [Submitted::Created]);
    sqlite.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_operation_that_fails_takes_only_its_own_changes_back() {
    let folder = TempDir::new().unwrap();
    let sqlite = Arc::new(opened(&folder, |options| options).await);
    let operations: Vec<_> = (0..60)
        .map(|number| {
            let sqlite = Arc::clone(&sqlite);
            tokio::spawn(async move {
                if number % 3 == 0 {
                    let failed = sqlite
                        .writer
                        .run::<(), _>("failing", move |session| {
                            Box::pin(async move {
                                sqlx::query("INSERT INTO tally VALUES ('type', ?1, 1)")
                                    .bind(number)
                                    .execute(session.db())
                                    .await?;
                                sqlx::query("INSERT INTO tally VALUES ('nonsense', 'x', 1)").execute(session.db()).await?;
                                Ok(())
                            })
                        })
                        .await;
                    assert!(matches!(failed, Err(Error::Database { doing: "failing", .. })), "{failed:?}");
                } else {
                    sqlite.submit(&[NewTask::new(number.to_string(), "type", "{}")]).await.unwrap();
                }
            })
        })
        .collect();
    for operation in operations {
        operation.await.unwrap();
    }
    let stats = sqlite.stats().await.unwrap();
    assert_eq!((stats.ready, stats.types), (40, vec![("type".to_owned(), 40)]));
    sqlite.close().await;
}

#[tokio::test]
async fn a_producer_that_speaks_sql_submits_like_any_other() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = sqlite.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap();
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    let submit =
        "INSERT INTO submit (key, type, data) VALUES ('a', 'first', '{\"n\": 1}'), ('a', 'second', NULL), ('b', 'bare', NULL);
        INSERT INTO submit (key, type, user, max_running) VALUES ('c', 'of a user', 'u', 1), ('d', 'of a user', 'u', 1);
        INSERT INTO submit (key, type, run_at) VALUES ('e', 'later', 32503680000000), ('f', 'past', -1);";
    sqlx::raw_sql(submit).execute(&mut producer).await.unwrap();
    assert_eq!(sqlite.submit(&[NewTask::new("a", "third", "{}")]).await.unwrap(), [Submitted::AlreadyExists]);
    let claim = Claim { host, limit: 10, alive_time: Duration::from_secs(60), alone: false, ignore_users: false, accepts: None };
    let mut claimed = sqlite.claim(&claim).await.unwrap().tasks;
    claimed.sort_by(|one, other| one.key.cmp(&other.key));
    let seen: Vec<(&str, &str, &[u8])> =
        claimed.iter().map(|task| (task.key.as_str(), task.task_type.as_str(), task.data.as_slice())).collect();
    let expected: [(&str, &str, &[u8]); 4] =
        [("a", "first", b"{\"n\": 1}"), ("b", "bare", b"{}"), ("c", "of a user", b"{}"), ("f", "past", b"{}")];
    assert_eq!(seen, expected);
    let stats = sqlite.stats().await.unwrap();
    assert_eq!((stats.ready, stats.scheduled, stats.running), (1, 1, 4));
    assert_eq!(stats.types[0], ("of a user".to_owned(), 2));
    sqlite.close().await;
}

#[tokio::test]
async fn a_producer_that_speaks_sql_is_told_what_is_wrong() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    let cases = [
        ("(NULL, 't', '{}', NULL, NULL, NULL, NULL)", "key: "),
        ("('', 't', '{}', NULL, NULL, NULL, NULL)", "key: "),
        ("(7, 't', '{}', NULL, NULL, NULL, NULL)", "key: "),
        ("('a' || char(10), 't', '{}', NULL, NULL, NULL, NULL)", "key: "),
        ("('a' || char(133), 't', '{}', NULL, NULL, NULL, NULL)", "key: "),
        ("('a', printf('%.*c', 256, 'x'), '{}', NULL, NULL, NULL, NULL)", "type: "),
        ("('a', 't', '{}', 'u' || char(9), NULL, NULL, NULL)", "user: "),
        ("('a', 't', '[]', NULL, NULL, NULL, NULL)", "data: "),
        ("('a', 't', 'oops', NULL, NULL, NULL, NULL)", "data: "),
        ("('a', 't', x'7b7d', NULL, NULL, NULL, NULL)", "data: "),
        ("('a', 't', '{}', NULL, -1, NULL, NULL)", "max_running: "),
        ("('a', 't', '{}', NULL, NULL, 0, NULL)", "max_attempts: "),
        ("('a', 't', '{}', NULL, NULL, NULL, 1.5)", "run_at: "),
    ];
    for (row, expected) in cases {
        let sql = format!("INSERT INTO submit (key, type, data, user, max_running, max_attempts, run_at) VALUES {row}");
        let refused = sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut producer).await.expect_err(row);
        let message = refused.as_database_error().unwrap().message().to_owned();
        assert!(message.starts_with(expected), "{row}: {message}");
    }
    assert_eq!(sqlite.stats().await.unwrap().types, []);
    sqlite.close().await;
}
