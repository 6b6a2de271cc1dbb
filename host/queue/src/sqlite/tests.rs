//! What only SQLite promises: how statements find their rows, what an idle queue writes, and what a full disk does.

mod flushes;
mod large;
mod producers;

use sqlx::Row as _;
use sqlx::sqlite::SqliteConnection;
use tempfile::TempDir;

use super::*;
use crate::{Event, State, Submitted};

pub(super) async fn opened(folder: &TempDir, change: impl FnOnce(SqliteConnectOptions) -> SqliteConnectOptions) -> Sqlite {
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
const LOOKED_UP: [(&str, &str, &str); 37] = [
    ("due", claim::DUE, "SEARCH scheduled USING PRIMARY KEY (run_at=? AND task=?)"),
    ("kinds that wait apart", unserved::KINDS, "SEARCH unserved USING PRIMARY KEY (queue=? AND type>?)"),
    ("first of a kind", unserved::FIRST, "SEARCH unserved USING PRIMARY KEY (queue=? AND type=? AND user>?)"),
    ("suspect", choose::SUSPECT, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN"),
    ("heads", choose::HEADS, "SCAN account USING INDEX account_without_user"),
    ("heads of queues", choose::HEADS_OF_QUEUES, "SEARCH account USING PRIMARY KEY (queue=? AND user=?)"),
    ("nobody's", choose::NOBODYS, "SEARCH ready USING PRIMARY KEY (queue=? AND user=? AND (turn,task)>(?,?))"),
    (
        "nobody's of several",
        choose::NOBODYS_OF_SEVERAL,
        "SEARCH later USING PRIMARY KEY (queue=? AND user=? AND (turn,task)>(?,?))",
    ),
    ("ends of users", by_time::ENDS_OF_USERS, "SCAN ready USING COVERING INDEX ready_in_turn"),
    ("users of one", by_time::FIRST_OF_USERS, "SEARCH ready USING COVERING INDEX ready_in_turn (queue=?)"),
    ("queues of users", by_time::FIRST_OF_USERS_OF_ALL, "SEARCH ready USING COVERING INDEX ready_in_turn (queue>?)"),
    ("first of users", by_time::FIRST_OF_USERS_OF_ALL, "SEARCH ready USING COVERING INDEX ready_in_turn (queue=?)"),
    (
        "later of users",
        by_time::FIRST_OF_USERS_OF_QUEUES,
        "SEARCH later USING COVERING INDEX ready_in_turn (queue=? AND (turn,task)>(?,?))",
    ),
    (
        "places of users",
        by_time::FIRST_OF_USERS_OF_QUEUES,
        "SEARCH place USING COVERING INDEX ready_in_turn (queue=? AND turn=? AND task=?)",
    ),
    ("open accounts", choose::OPEN_ACCOUNTS, "SCAN account USING INDEX account_by_weight"),
    ("open queues", choose::OPEN_QUEUES, "SEARCH account EXISTS USING INDEX account_of_queue_by_age (queue=?)"),
    (
        "oldest of a queue",
        choose::OPEN_ACCOUNTS_OF_QUEUE,
        "SEARCH account USING INDEX account_of_queue_by_age (queue=? AND picked<?)",
    ),
    ("heaviest of a queue", choose::OPEN_ACCOUNTS_OF_QUEUE, "SEARCH account USING INDEX account_of_queue_by_weight (queue=?)"),
    ("candidates of one", choose::CANDIDATES_OF_ONE, "SEARCH ready USING PRIMARY KEY (queue=? AND user=? AND (turn,task)>(?,?))"),
    (
        "candidates of several",
        choose::CANDIDATES_OF_SEVERAL,
        "SEARCH later USING PRIMARY KEY (queue=? AND user=? AND (turn,task)>(?,?))",
    ),
    ("take from ready", claim::TAKE_FROM_READY, "SEARCH ready USING PRIMARY KEY (queue=? AND user=? AND turn=? AND task=?)"),
    ("take from suspect", claim::TAKE_FROM_SUSPECT, "SEARCH suspect USING PRIMARY KEY (turn=? AND task=?)"),
    ("leave accounts", accounts::LEAVE_ACCOUNTS, "SEARCH account USING PRIMARY KEY (queue=? AND user=?)"),
    ("leave tally", accounts::LEAVE_TALLY, "SEARCH tally USING PRIMARY KEY (what=? AND queue=? AND name=?)"),
    ("take", claim::TAKE, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("taken", claim::TAKEN, "SEARCH task_data USING INTEGER PRIMARY KEY (rowid=?) LEFT-JOIN"),
    ("held", settle::HELD, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("finish", settle::FINISH, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("settle", settle::SETTLE, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("trim attempts", settle::TRIM_ATTEMPTS, "SEARCH attempt USING PRIMARY KEY (task=?)"),
    ("change accounts", accounts::CHANGE_ACCOUNTS, "SEARCH account USING PRIMARY KEY (queue=? AND user=?)"),
    ("change tally", accounts::CHANGE_TALLY, "SEARCH tally USING PRIMARY KEY (what=? AND queue=? AND name=?)"),
    ("renew", keep::RENEW, "SEARCH task USING INTEGER PRIMARY KEY (rowid=?)"),
    ("strays", hosts::STRAYS, "SEARCH task USING COVERING INDEX task_running (host=? AND until<?)"),
    ("held keys", read::HELD, "SEARCH scheduled USING PRIMARY KEY (run_at=?)"),
    ("unsettled", read::UNSETTLED, "SEARCH task USING INDEX task_key (key>? AND key<?)"),
    ("over", operate::OVER, "SEARCH retention USING INDEX retention_until (until<?)"),
];

/// What grows with the backlog or with what is retained.
const LARGE: [&str; 9] = ["task", "task_data", "ready", "scheduled", "unserved", "account", "retention", "attempt", "tally"];

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
            let in_order = [
                "INDEX account_by_weight",
                "INDEX account_without_limit",
                "INDEX account_without_user",
                "COVERING INDEX ready_in_turn",
            ];
            let in_order = in_order.iter().any(|index| step.contains(&format!("USING {index}")));
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
    let claim = Claim { alone: true, ..Claim::new(host, 10, Duration::from_secs(60)) };
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
    let sqlite = opened(&folder, small(130)).await;
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
    let claim = Claim::new(host, 1, Duration::from_secs(60));
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
                                sqlx::query("INSERT INTO tally (what, name, tasks) VALUES ('type', ?1, 1)")
                                    .bind(number)
                                    .execute(session.db())
                                    .await?;
                                sqlx::query("INSERT INTO tally (what, name, tasks) VALUES ('nonsense', 'x', 1)")
                                    .execute(session.db())
                                    .await?;
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

/// A moment that no test waits out.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn host(sqlite: &Sqlite) -> HostId {
    sqlite.register_host(&HostDescription { name: "tester".to_owned(), process_id: 1, identity: None }).await.unwrap()
}

pub(super) fn asking(host: HostId, limit: u32) -> Claim {
    let alive_time = Duration::from_secs(3_600);
    Claim::new(host, limit, alive_time)
}

fn finished(task: &crate::ClaimedTask) -> Settlement {
    let event = Event::Finish { output: None, retention: None };
    Settlement::of(task.lease_ref, event, crate::Attempt::of(task), &Policy::default(), 0.0, None, Vec::new())
}

fn of_user(key: &str, max_running: Option<u32>) -> NewTask {
    NewTask { user: Some("u".to_owned()), max_running, ..NewTask::new(key, "type", "{}") }
}

#[tokio::test]
async fn what_another_process_submits_wakes_a_host_and_what_the_host_writes_does_not() {
    let folder = TempDir::new().unwrap();
    let sqlite = Arc::new(opened(&folder, |options| options).await);
    let host = host(&sqlite).await;
    let other = opened(&folder, |options| options).await;
    let mut producer = options(&folder.path().join("queue.db")).connect().await.unwrap();
    for round in 0..3 {
        // A hint that is left over from before.
        let _ = tokio::time::timeout(Duration::ZERO, sqlite.wakeup()).await;
        let hints = Arc::clone(&sqlite);
        let waiter = tokio::spawn(async move { hints.wakeup().await });
        // Nobody polls: without the hint this would wait for ever.
        match round {
            0 => drop(other.submit(&[NewTask::new("a", "type", "{}")]).await.unwrap()),
            1 => drop(sqlx::raw_sql("INSERT INTO submit (key, type) VALUES ('b', 'type')").execute(&mut producer).await.unwrap()),
            _ => drop(other.submit(&[NewTask { run_at: Some(NewTask::RUN_AT_MAX), ..NewTask::new("c", "type", "{}") }]).await),
        }
        tokio::time::timeout(PATIENCE, waiter).await.expect("woken by what the other wrote").unwrap();
        let seen = sqlite.seen.changes();
        for _ in 0..20 {
            let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
            sqlite.settle(&claimed.iter().map(finished).collect::<Vec<_>>()).await.unwrap();
            sqlite.note_plugins(host, &[fastrand::u64(..).to_string()]).await.unwrap();
        }
        sqlite.writer.looker().look().await.unwrap();
        assert_eq!(sqlite.seen.changes(), seen, "its own writes are nobody else's");
    }
    sqlite.close().await;
}

#[tokio::test]
async fn the_end_of_a_limited_users_task_wakes_who_claims() {
    let folder = TempDir::new().unwrap();
    let sqlite = Arc::new(opened(&folder, |options| options).await);
    let host = host(&sqlite).await;
    sqlite.submit(&[of_user("a", Some(1)), of_user("b", Some(1)), of_user("c", Some(1))]).await.unwrap();
    for ended_by_hand in [false, true] {
        // The hints of what came before.
        let _ = tokio::time::timeout(Duration::ZERO, sqlite.wakeup()).await;
        let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
        assert_eq!(claimed.len(), 1);
        let hints = Arc::clone(&sqlite);
        let waiter = tokio::spawn(async move { hints.wakeup().await });
        if ended_by_hand {
            sqlite.cancel(&claimed[0].key, Duration::ZERO).await.unwrap();
        } else {
            sqlite.settle(&[finished(&claimed[0])]).await.unwrap();
        }
        tokio::time::timeout(PATIENCE, waiter).await.expect("woken by the end").unwrap();
    }
    sqlite.close().await;
}

#[tokio::test]
async fn a_claim_holds_back_no_more_tasks_of_limited_users_than_it_may() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = host(&sqlite).await;
    let mut tasks: Vec<NewTask> = (0..10).map(|number| of_user(&format!("limited{number}"), Some(9))).collect();
    tasks.extend((0..4).map(|number| NewTask::new(format!("free{number}"), "type", "{}")));
    // Of a user, but without a limit; and behind it one with.
    tasks.push(NewTask { user: Some("v".to_owned()), ..NewTask::new("mixed0", "type", "{}") });
    tasks.push(NewTask { user: Some("v".to_owned()), max_running: Some(5), ..NewTask::new("mixed1", "type", "{}") });
    sqlite.submit(&tasks).await.unwrap();
    for (limited, of_limited, of_others) in [(Some(0), 0, 5), (Some(2), 2, 0), (Some(50), 6, 0), (None, 2, 0)] {
        let claimed = sqlite.claim(&Claim { limited, ..asking(host, 6) }).await.unwrap().tasks;
        let has_limit = claimed.iter().filter(|task| task.max_running.is_some() && task.user.is_some()).count();
        assert_eq!((has_limit, claimed.len() - has_limit), (of_limited, of_others), "{limited:?}");
    }
    sqlite.close().await;
}

#[tokio::test]
async fn a_file_that_is_replaced_or_deleted_under_a_host_ends_it() {
    for is_replaced in [true, false] {
        let folder = TempDir::new().unwrap();
        let sqlite = opened(&folder, |options| options).await;
        let host = host(&sqlite).await;
        sqlite.submit(&[NewTask::new("a", "type", "{}"), NewTask::new("b", "type", "{}")]).await.unwrap();
        let claimed = sqlite.claim(&asking(host, 1)).await.unwrap().tasks;
        for name in ["queue.db", "queue.db-wal", "queue.db-shm"] {
            std::fs::remove_file(folder.path().join(name)).unwrap();
        }
        if is_replaced {
            opened(&folder, |options| options).await.close().await;
        }
        let settled = sqlite.settle(&[finished(&claimed[0])]).await.unwrap_err();
        assert!(matches!(settled, Error::File { .. }) && !settled.is_retryable(), "{settled:?}");
        assert!(settled.to_string().contains("queue.db: was deleted or replaced while it was open"), "{settled}");
        // A host that is told so ends; what registers again is told why.
        assert!(matches!(sqlite.claim(&asking(host, 1)).await, Err(Error::UnknownHost(unknown)) if unknown == host));
        let description = HostDescription { name: "tester".to_owned(), process_id: 1, identity: None };
        assert!(matches!(sqlite.register_host(&description).await, Err(Error::File { .. })));
        sqlite.close().await;
        assert_eq!(folder.path().join("queue.db").exists(), is_replaced, "nothing is made anew by who has the old one");
    }
}

#[tokio::test]
async fn updates_are_made_together_and_each_is_answered_for_itself() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = host(&sqlite).await;
    let tasks: Vec<NewTask> = (0..4).map(|number| NewTask::new(number.to_string(), "type", "{}")).collect();
    sqlite.submit(&tasks).await.unwrap();
    let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    sqlite.cancel("1", Duration::from_secs(60)).await.unwrap();
    let update = |task: usize, members: &str| Update { lease_ref: claimed[task].lease_ref, members: members.as_bytes().to_vec() };
    let updates = [
        update(0, r#"{"a":1}"#),
        update(1, r#"{"a":1}"#),
        update(2, "[]"),
        update(0, r#"{"a":2,"b":3}"#),
        update(3, r#"{"c":4}"#),
    ];
    let transactions = sqlite.seen.looks();
    let answers = sqlite.update_many(&updates).await.unwrap();
    assert_eq!(sqlite.seen.looks() - transactions, 2, "one for each of the two updates of one task");
    let [Ok(LeaseAnswer::Held), Ok(LeaseAnswer::Lost), Err(refused), Ok(LeaseAnswer::Held), Ok(LeaseAnswer::Held)] =
        answers.as_slice()
    else {
        panic!("{answers:?}")
    };
    assert!(matches!(refused, Error::InvalidTask { key, .. } if key == "2"));
    let data = async |key: &str| String::from_utf8(sqlite.get(key).await.unwrap().unwrap().data.unwrap()).unwrap();
    assert_eq!((data("0").await.as_str(), data("1").await.as_str()), (r#"{"a":2,"b":3}"#, "{}"));
    assert_eq!((data("2").await.as_str(), data("3").await.as_str()), ("{}", r#"{"c":4}"#));
    // More than a round holds.
    let many: Vec<Update> = (0..600).map(|number| update(3, &format!(r#"{{"n":{number}}}"#))).collect();
    assert!(sqlite.update_many(&many[..20]).await.unwrap().iter().all(|answer| matches!(answer, Ok(LeaseAnswer::Held))));
    assert_eq!(data("3").await, r#"{"c":4,"n":19}"#);
    assert!(sqlite.update_many(&[]).await.unwrap().is_empty());
    sqlite.close().await;
}

/// Tasks of one state, as far as a list looks at them: how many, and of which type, user and key.
fn fill_state(state: State, name: &str, count: usize) -> String {
    let is_ended = matches!(state, State::Finished | State::Failed | State::Cancelled);
    let (until, ended) = (if state == State::Running { "9" } else { "NULL" }, if is_ended { "9" } else { "NULL" });
    let place = if state == State::Waiting {
        format!(
            "INSERT INTO ready (queue, user, turn, task) SELECT queue, user, turn, id FROM task WHERE state = 'waiting' AND type = '{name}'"
        )
    } else {
        String::new()
    };
    format!(
        "WITH RECURSIVE numbers (number) AS (SELECT 1 UNION ALL SELECT number + 1 FROM numbers WHERE number < {count})
        INSERT INTO task (key, type, user, state, created_at, run_at, until, finished_at, retained_until)
        SELECT '{name} ' || number || '{state}', '{name}', '{name}', '{state}', 1, 1, {until}, {ended}, {ended} FROM numbers; {place}",
        state = state.as_str()
    )
}

#[tokio::test]
async fn a_page_of_a_list_costs_what_a_page_costs_whatever_else_there_is() {
    use std::sync::atomic::{AtomicU64, Ordering};
    const MANY: usize = 50_000;
    for standing in State::ALL {
        let folder = TempDir::new().unwrap();
        let sqlite = opened(&folder, |options| options).await;
        // A thousand steps of SQLite's machine count as one.
        let steps = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&steps);
        let pool = SqlitePoolOptions::new().max_connections(1).after_connect(move |connection, _| {
            let counted = Arc::clone(&counted);
            Box::pin(async move {
                connection.lock_handle().await?.set_progress_handler(1_000, move || {
                    counted.fetch_add(1, Ordering::SeqCst);
                    true
                });
                Ok(())
            })
        });
        let pool = pool.connect_with(options(&folder.path().join("queue.db"))).await.unwrap();
        let others = State::ALL.into_iter().filter(|state| *state != standing);
        let mut fill = fill_state(standing, "many", MANY);
        others.clone().for_each(|state| fill.push_str(&format!("; {}", fill_state(state, "few", 3))));
        let mut meddler = options(&folder.path().join("queue.db")).connect().await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(fill)).execute(&mut meddler).await.unwrap();
        let few = || Some("few".to_owned());
        let mut filters: Vec<(Filter, usize, u64)> = others
            .map(|state| {
                (Filter { states: vec![state], ..Filter::default() }, 3, if state == State::Finished { 500 } else { 20 })
            })
            .collect();
        filters.extend([
            (Filter { states: vec![standing], ..Filter::default() }, 20, 20),
            (Filter { task_type: few(), ..Filter::default() }, 12, 500),
            (Filter { user: few(), ..Filter::default() }, 12, 500),
            (Filter { key_prefix: few(), ..Filter::default() }, 12, 20),
        ]);
        for (filter, count, most) in filters {
            let mut filter = Filter { limit: 20, ..filter };
            let mut found = 0;
            while found < count {
                let before = steps.load(Ordering::SeqCst);
                let page = list::list(&pool, &filter).await.unwrap();
                let cost = steps.load(Ordering::SeqCst) - before;
                assert!(cost <= most, "{cost} thousand steps for {filter:?} among {MANY} that are {standing:?}");
                found += page.tasks.len();
                assert!(page.next.is_some() || found == count, "{found} of {count} for {filter:?} beside {standing:?}");
                filter.after = page.next;
            }
        }
        sqlite.close().await;
    }
}

#[tokio::test]
async fn a_task_that_must_run_alone_drains_one_host_and_only_if_it_may_run() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let (one, two) = (host(&sqlite).await, host(&sqlite).await);
    sqlite.submit(&[of_user("suspect", Some(1)), of_user("other", Some(1))]).await.unwrap();
    // It was lost twice.
    let mut meddler = options(&folder.path().join("queue.db")).connect().await.unwrap();
    let lost = "DELETE FROM ready WHERE task = 1; UPDATE task SET lost = 2, lost_at = 1, alone = 1 WHERE id = 1;
        INSERT INTO suspect (turn, task) SELECT turn, id FROM task WHERE id = 1;
        UPDATE account SET ready = 1, head_task = 2, head_turn = (SELECT turn FROM task WHERE id = 2);";
    sqlx::raw_sql(lost).execute(&mut meddler).await.unwrap();
    let claimed = sqlite.claim(&asking(one, 9)).await.unwrap();
    assert_eq!(
        (claimed.tasks.len(), claimed.alone_waiting),
        (1, false),
        "its user has one running, so nobody ends anything for it"
    );
    assert!(!sqlite.claim(&asking(two, 9)).await.unwrap().alone_waiting);
    sqlite.settle(&[finished(&claimed.tasks[0])]).await.unwrap();
    for _ in 0..2 {
        assert!(sqlite.claim(&asking(two, 9)).await.unwrap().alone_waiting);
        assert!(!sqlite.claim(&asking(one, 9)).await.unwrap().alone_waiting, "one host is enough");
    }
    // With that host gone, it is another's turn.
    sqlite.unregister_host(two).await.unwrap();
    assert!(sqlite.claim(&asking(one, 9)).await.unwrap().alone_waiting);
    let alone = sqlite.claim(&Claim { alone: true, ..asking(one, 1) }).await.unwrap();
    assert_eq!((alone.tasks.len(), alone.alone_waiting), (1, false));
    sqlite.close().await;
}

#[tokio::test]
async fn a_group_with_more_output_than_one_statement_takes_is_stored_whole() {
    let folder = TempDir::new().unwrap();
    let sqlite = opened(&folder, |options| options).await;
    let host = host(&sqlite).await;
    let tasks: Vec<NewTask> = (0..5).map(|number| NewTask::new(number.to_string(), "type", "{}")).collect();
    sqlite.submit(&tasks).await.unwrap();
    let claimed = sqlite.claim(&asking(host, 9)).await.unwrap().tasks;
    let output = |place: usize| if place == 2 { Vec::new() } else { vec![u8::try_from(place).unwrap(); 16 << 20] };
    let settled = claimed.iter().enumerate().map(|(place, task)| {
        let event = Event::Finish { output: Some(output(place)), retention: None };
        Settlement::of(task.lease_ref, event, crate::Attempt::of(task), &Policy::default(), 0.0, None, Vec::new())
    });
    sqlite.settle(&settled.collect::<Vec<_>>()).await.unwrap();
    for (place, task) in claimed.iter().enumerate() {
        assert!(sqlite.get(&task.key).await.unwrap().unwrap().output == Some(output(place)), "{place}");
    }
    sqlite.close().await;
}
