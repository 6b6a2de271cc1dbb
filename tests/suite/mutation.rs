//! Rows that no program of ours would write: a database changed by hand, or by who holds it. Reading it is an error at worst, never a panic.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use laelaps_queue::{AcquiredTask, Config, FailureKind, Filter, NewTask, PollOptions, Queue, Result};
use laelaps_tests::{Dice, LONG, Mutation, Site, task};
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqliteConnection};

/// Panics that are known, by a part of what they say. Each belongs to the store's own work; none is known now.
const KNOWN: [&str; 0] = [];

/// What panicked so far, on whatever thread: the database's own threads would hide it.
static PANICS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.lock().unwrap_or_else(PoisonError::into_inner).insert(panic.to_string());
            before(panic);
        }));
    });
}

fn assert_no_panic(changes: &[String]) {
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let unknown: Vec<_> = panics.iter().filter(|panic| !KNOWN.iter().any(|known| panic.contains(known))).collect();
    assert!(unknown.is_empty(), "after {changes:#?}: {unknown:#?}");
}

/// A database with tasks in every state, closed.
async fn template(site: &Site) -> std::path::PathBuf {
    let queue = site.queue().await;
    let tasks: Vec<NewTask> = (0..12)
        .map(|number| NewTask {
            user: (number % 3 == 0).then(|| "a-user".to_owned()),
            max_running: (number % 6 == 0).then_some(2),
            ..task(format!("task-{number}"), "kind", json!({ "number": number }))
        })
        .collect();
    queue.submit_many(&tasks).await.unwrap();
    let mut acquired = queue.poll_many(&PollOptions { limit: 6, ..PollOptions::default() }).await.unwrap();
    acquired[0].finish(Some(b"{}".to_vec()), None).await.unwrap();
    acquired[1].retry(Some(Duration::from_secs(3_600))).await.unwrap();
    acquired[2].fail(FailureKind::Reject, "code", "message").await.unwrap();
    acquired[3].heartbeat(None, None).await.unwrap();
    queue.cancel(acquired[4].key()).await.unwrap();
    queue.close().await;
    let path = site.path("queue.db");
    let mut connection = SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(&path)).await.unwrap();
    sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA journal_mode = DELETE").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    path
}

/// Changes some columns of some rows, against every constraint that can be switched off. Returns the statements.
async fn change(dice: &mut Dice, path: &Path) -> Vec<String> {
    let options = SqliteConnectOptions::new().filename(path).foreign_keys(false).pragma("ignore_check_constraints", "ON");
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    let columns: Vec<(String, String)> = sqlx::query(
        "SELECT m.name, c.name FROM sqlite_schema m JOIN pragma_table_info(m.name) c WHERE m.type = 'table' AND m.name NOT LIKE 'sqlite%'",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap()
    .iter()
    .map(|row| (row.get(0), row.get(1)))
    .collect();
    let mut changes = Vec::new();
    for _ in 0..=dice.below(4) {
        let (table, column) = &columns[dice.below(columns.len())];
        let value = value(dice);
        let rows = if dice.one_in(2) { "" } else { " WHERE abs(random()) % 3 = 0" };
        let statement = format!("UPDATE \"{table}\" SET \"{column}\" = {value}{rows}");
        // What even so cannot be stored is a case without this change.
        if sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut connection).await.is_ok() {
            changes.push(statement.chars().take(200).collect());
        }
    }
    connection.close().await.unwrap();
    changes
}

fn value(dice: &mut Dice) -> String {
    match dice.below(7) {
        0 => "NULL".to_owned(),
        1 | 2 => dice.number().to_string(),
        3 => format!("x'{}'", hexadecimal(&dice.bytes(40))),
        // Texts that are no UTF-8, or none at all.
        4 => format!("CAST(x'{}' AS TEXT)", hexadecimal(&dice.bytes(40))),
        5 => "CAST(zeroblob(3000000) AS TEXT)".to_owned(),
        _ => "9e999".to_owned(),
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything that a host, a producer and an operator do with a queue. What it answers is not looked at: that it answers is.
async fn use_all(queue: &Queue) -> Result<()> {
    let backend = queue.backend();
    let _ =
        (backend.schema_status().await, backend.drift().await, backend.now().await, backend.stats().await, backend.hosts().await);
    let _ = (backend.held("").await, backend.has_unsettled("task").await, queue.clean_up().await);
    for with_data in [false, true] {
        let _ = backend.list(&Filter { limit: 100, with_data, ..Filter::default() }).await;
    }
    for number in 0..12 {
        let key = format!("task-{number}");
        let _ = (backend.get(&key).await, backend.attempts(&key).await);
    }
    let _ = queue.submit(task("new", "kind", json!({}))).await;
    for round in 0..3 {
        let options = PollOptions { limit: 4, ignore_users: round == 1, ..PollOptions::default() };
        let mut acquired: Vec<AcquiredTask> = queue.poll_many(&options).await.unwrap_or_default();
        for (number, task) in acquired.iter_mut().enumerate() {
            let _ = task.heartbeat(None, None).await;
            let _ = task.update_data(b"{\"more\":1}").await;
            let _ = match number % 4 {
                0 => task.finish(None, None).await,
                1 => task.retry(None).await,
                2 => task.release(None).await,
                _ => task.fail(FailureKind::Retry, "code", "message").await,
            };
        }
    }
    for number in 0..12 {
        let key = format!("task-{number}");
        let _ = match number % 3 {
            0 => queue.retry(&key).await,
            1 => queue.cancel(&key).await,
            _ => queue.force_finish(&key, None).await,
        };
    }
    Ok(())
}

#[tokio::test]
async fn mutated_rows_are_read_or_refused_and_nothing_panics() {
    note_panics();
    let site = Site::new().await;
    let template = template(&site).await;
    let path = site.path("mutated.db");
    site.configure(json!({ "url": format!("sqlite:{}", path.display()) }));
    let mut changed = 0;
    let mut mutation = Mutation::begin("rows");
    while let Some(mut dice) = mutation.next_case() {
        for beside in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(site.path(&format!("mutated.db{beside}")));
        }
        fs::copy(&template, &path).unwrap();
        let changes = change(&mut dice, &path).await;
        changed += u32::from(!changes.is_empty());
        if dice.one_in(4) {
            operators_commands(&site, &changes).await;
        }
        let url = format!("sqlite:{}", path.display());
        let used = async {
            let queue = Queue::open(&Config::new(&url)).await?;
            let answer = use_all(&queue).await;
            queue.close().await;
            answer
        };
        // An error is an answer, too.
        let answered = tokio::time::timeout(LONG, Box::pin(used)).await;
        assert!(answered.is_ok(), "it does not answer after {changes:#?}");
        assert_no_panic(&changes);
    }
    assert!(changed > 0, "no change could be stored");
}

/// What an operator looks with, as programs: an exit code of their own, and no panic.
async fn operators_commands(site: &Site, changes: &[String]) {
    for arguments in [&["list", "--json"][..], &["show", "task-3"], &["stats"], &["check"]] {
        let answer = site.laelaps(["-c", "laelaps.yml"].iter().chain(arguments)).await;
        let is_told = answer.code.is_some_and(|code| code <= 10) && !answer.stderr.contains("panicked at");
        let start: String = answer.stderr.chars().take(1_000).collect();
        assert!(
            is_told || KNOWN.iter().any(|known| start.contains(known)),
            "{arguments:?} after {changes:#?}: {:?} {start}",
            answer.code
        );
    }
}
