//! Files that cannot be used, and processes that die.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use laelaps_queue::{Config, Error, LeaseAnswer, PollOptions, Queue, State};
use laelaps_test_databases::{PATIENCE, eventually};
use sqlx::Connection;

use crate::fixture::{Database, Fixture, task};

fn at(path: &Path) -> Config {
    Config { patience: Duration::from_millis(200), ..Config::new(format!("sqlite:{}", path.display())) }
}

async fn refused(path: &Path) -> Error {
    Queue::open(&at(path)).await.expect_err("such a file cannot be opened")
}

#[tokio::test]
async fn a_url_that_names_no_usable_database_is_refused() {
    let cases = [
        ("", "url: names no database; write sqlite:PATH, for example sqlite:laelaps.db"),
        ("laelaps.db", "url: names no database; write sqlite:PATH, for example sqlite:laelaps.db"),
        ("sqlite:", "url: names no file; write sqlite:PATH, for example sqlite:laelaps.db"),
        ("sqlite://", "url: names no file; write sqlite:PATH, for example sqlite:laelaps.db"),
        ("sqlite::memory:", "url: a database in memory would lose its tasks; name a file"),
        ("sqlite:a.db?mode=ro", "url: options are not taken in the URL (found \"?mode=ro\"); the file's name alone is enough"),
        ("redis://host", "url: \"redis\" is not a known kind of database; write sqlite:PATH, postgres://... or mysql://..."),
    ];
    for (url, expected) in cases {
        let refused = Queue::open(&Config::new(url)).await.expect_err(url);
        assert_eq!(refused.to_string(), expected);
    }
}

#[tokio::test]
async fn a_folder_that_is_missing_or_in_the_way_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let error = refused(&folder.path().join("missing/queue.db")).await.to_string();
    assert!(error.contains("missing/queue.db: the folder ") && error.ends_with("missing does not exist"), "{error}");
    let error = refused(folder.path()).await.to_string();
    assert!(error.ends_with(": is a folder, not a database file"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_no_database_is_named_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notes.txt");
    let text = "these are notes, not tasks\n".repeat(100);
    std::fs::write(&path, &text).unwrap();
    let error = refused(&path).await;
    assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().ends_with("notes.txt: file is not a database"), "{error}");
    assert!(error.hint().is_some() && !error.is_retryable());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[tokio::test]
async fn a_damaged_database_is_named() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit_some("a", 200).await;
    fixture.queue.close().await;
    let mut bytes = std::fs::read(fixture.path()).unwrap();
    for byte in bytes.iter_mut().skip(4096) {
        *byte = 0x5a;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.db");
    std::fs::write(&path, bytes).unwrap();
    let error = match Queue::open(&at(&path)).await {
        Ok(queue) => queue.submit(task("b")).await.expect_err("a damaged database cannot store"),
        Err(error) => error,
    };
    assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
    assert!(error.to_string().contains("damaged.db: database disk image is malformed"), "{error}");
}

#[tokio::test]
async fn a_database_that_another_program_keeps_locked_is_waited_for_and_then_named() {
    let fixture = Fixture::new(Database::Sqlite).await;
    let queue = Queue::open(&at(&fixture.path())).await.unwrap();
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(fixture.path());
    let mut other = sqlx::SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::query("BEGIN IMMEDIATE").execute(&mut other).await.unwrap();
    // Who has more patience just waits.
    let patient = fixture.queue.clone();
    let submit = tokio::spawn(async move { patient.submit(task("b")).await });
    let error = queue.submit(task("a")).await.unwrap_err();
    assert!(matches!(&error, Error::Locked { waited, .. } if *waited >= Duration::from_millis(200)), "{error:?}");
    assert!(error.is_retryable() && error.hint().is_some());
    assert!(error.to_string().contains("queue.db: locked by another program for "), "{error}");
    assert!(!submit.is_finished());
    sqlx::query("COMMIT").execute(&mut other).await.unwrap();
    assert!(submit.await.unwrap().is_ok());
    assert!(!queue.exists("a").await.unwrap());
    fixture.audit().await;
}

/// Set for a child process that permissions have to stop.
const STOPPED_BY_MODES: &str = "LAELAPS_TEST_STOPPED_BY_MODES";

#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the only way to tell something to a child that is this very test program")]
async fn a_read_only_database_is_named() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.queue.close().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("read-only.db");
    std::fs::copy(fixture.path(), &path).unwrap();
    set_immutable_mode(&path, 0o444);
    if writes_despite_mode(&path) {
        // Root may write to anything, until it has given that up.
        assert!(std::env::var_os(STOPPED_BY_MODES).is_none(), "setpriv leaves the right to override modes");
        let child = Command::new("setpriv")
            .args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "files::a_read_only_database_is_named", "--nocapture"])
            .env(STOPPED_BY_MODES, "yes")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&child.stderr));
        return;
    }
    set_immutable_mode(folder.path(), 0o555);
    let outcome = match Queue::open(&at(&path)).await {
        Ok(queue) => queue.submit(task("a")).await.map(drop),
        Err(error) => Err(error),
    };
    set_immutable_mode(folder.path(), 0o755);
    let error = outcome.expect_err("a read-only database cannot store");
    assert!(matches!(error, Error::ReadOnly { .. } | Error::File { .. }), "{error:?}");
    assert!(error.to_string().contains("read-only.db: "), "{error}");
}

fn set_immutable_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn writes_despite_mode(path: &Path) -> bool {
    std::fs::File::options().append(true).open(path).is_ok()
}

#[tokio::test]
async fn a_hosts_folder_that_cannot_be_made_is_named() {
    let fixture = Fixture::new(Database::Sqlite).await;
    std::fs::write(format!("{}-hosts", fixture.path().display()), "in the way").unwrap();
    let description = laelaps_queue::HostDescription { name: "tester".to_owned(), process_id: 1, identity: None };
    let error = fixture.backend().register_host(&description).await.unwrap_err();
    assert!(matches!(error, Error::File { .. }), "{error:?}");
    assert!(error.to_string().ends_with("queue.db-hosts: the folder of the hosts' locks cannot be made"), "{error}");
    assert!(fixture.backend().hosts().await.unwrap().is_empty(), "a host without a lock is not entered");
}

/// Where a child process finds the database that it works on until it is killed.
const CHILD_DATABASE: &str = "LAELAPS_TEST_CHILD_DATABASE";

async fn work(queue: &Queue, polls: usize) -> usize {
    let mut finished = 0;
    for _ in 0..polls {
        for mut task in queue.poll_many(&PollOptions { limit: 5, ..PollOptions::default() }).await.unwrap() {
            finished += usize::from(task.finish(None, None).await.unwrap() == LeaseAnswer::Held);
        }
    }
    finished
}

/// Run as a child process, it works on the database that it was given, leaves most of its tasks to others, and holds some until it is killed; else it
/// works on a database of its own.
#[tokio::test]
#[expect(clippy::disallowed_methods, reason = "the only way to hand something to a child that is this very test program")]
async fn a_worker_finishes_what_it_polls() {
    if let Some(path) = std::env::var_os(CHILD_DATABASE) {
        let queue = Queue::open(&Config::new(format!("sqlite:{}", Path::new(&path).display()))).await.unwrap();
        work(&queue, 200).await;
        let held = queue.poll_many(&PollOptions { limit: 5, ..PollOptions::default() }).await.unwrap();
        assert_eq!(held.len(), 5);
        std::future::pending::<()>().await;
    }
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit_some("a", 23).await;
    assert_eq!(work(&fixture.queue, 10).await, 23);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_process_loses_nothing_and_its_tasks_come_back_at_once() {
    let fixture = Fixture::new(Database::Sqlite).await;
    fixture.submit_some("a", 3_000).await;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "files::a_worker_finishes_what_it_polls", "--nocapture"])
        .env(CHILD_DATABASE, fixture.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually(PATIENCE, "the child works", async || {
        let finished = fixture.queue.stats().await.unwrap().finished;
        if finished >= 20 { Ok(()) } else { Err(format!("{finished} finished")) }
    })
    .await;
    child.kill().unwrap();
    child.wait().unwrap();
    fixture.audit().await;
    let before = fixture.queue.stats().await.unwrap();
    assert!(before.finished < 3_000 && before.finished + before.running + before.ready == 3_000, "{before:?}");
    let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
    assert_eq!(reclaimed.tasks.len() as u64, before.running);
    assert_eq!(reclaimed.dead_hosts.len(), 1);
    let host = fixture.host().await;
    let mut finished = before.finished;
    loop {
        let tasks = fixture.claim(host, 500).await;
        if tasks.is_empty() {
            break;
        }
        let group: Vec<_> = tasks.iter().map(|task| crate::fixture::settled(task, crate::fixture::finish())).collect();
        fixture.backend().settle(&group).await.unwrap();
        finished += tasks.len() as u64;
    }
    assert_eq!(finished, 3_000);
    assert_eq!(fixture.state("a2999").await, State::Finished);
    fixture.audit().await;
}
