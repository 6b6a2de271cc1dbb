//! What an operator can do about tasks that cannot be read, tables that contradict each other, and plugin versions under which hosts die.

use laelaps_queue::State;
use laelaps_tests::{PATIENCE, Site, eventually, submit, task, wait_for_state};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, SqliteConnection};

/// A site whose queue has two tasks, the first of which has a key that is not text.
async fn damaged() -> Site {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    submit(&queue, &[task("bad", "silent", json!({})), task("good", "silent", json!({}))]).await;
    queue.close().await;
    by_hand(&site, "UPDATE task SET key = CAST(x'6d2dfc' AS TEXT) WHERE key = 'bad'").await;
    site
}

/// Changes rows as no program of ours would.
async fn by_hand(site: &Site, sql: &str) {
    let mut connection = SqliteConnection::connect(site.url()).await.unwrap();
    connection.execute("PRAGMA ignore_check_constraints = ON").await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

async fn told(site: &Site, arguments: &[&str]) -> String {
    site.laelaps([&["-c", "laelaps.yml"], arguments].concat()).await.success().stdout
}

async fn json_of(site: &Site, arguments: &[&str]) -> Value {
    serde_json::from_str(&told(site, arguments).await).unwrap()
}

#[tokio::test]
async fn a_task_that_cannot_be_read_is_listed_shown_and_removed_by_its_number() {
    let site = damaged().await;
    let host = site.start().await;
    let queue = site.queue().await;
    wait_for_state(&queue, "good", State::Finished, PATIENCE).await;
    let listed = eventually(PATIENCE, "the other is set aside", async || {
        let listed = told(&site, &["list", "--unreadable", "--json"]).await;
        if listed.contains("\"failed\"") { Ok(listed) } else { Err(listed) }
    })
    .await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let id = listed["id"].as_i64().unwrap();
    host.logged(&id.to_string(), PATIENCE).await;
    assert_eq!((&listed["key"], &listed["error_code"]), (&json!("m-\u{fffd}"), &json!("unreadable")));
    assert!(listed["unreadable"].as_str().unwrap().contains("key"), "{listed}");
    let number = id.to_string();
    let table = told(&site, &["list"]).await;
    assert!(table.contains("failed, unreadable") && table.contains("2 entries."), "{table}");
    let shown = json_of(&site, &["show", "--id", &number, "--json"]).await;
    assert_eq!((&shown["unreadable"], &shown["history"]), (&listed["unreadable"], &json!([])));
    let warned = site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stderr;
    assert!(
        warned.contains(&format!("1 task set aside, because what is stored of them cannot be read (number {number})")),
        "{warned}"
    );
    assert_eq!(told(&site, &["cancel", "--id", &number]).await, format!("task number {number} is removed\n"));
    let gone = site.laelaps(["-c", "laelaps.yml", "show", "--id", &number]).await;
    assert_eq!(gone.code, Some(5), "{}", gone.stderr);
    assert_eq!(site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stderr, "");
    host.stop().await;
}

#[tokio::test]
async fn a_task_can_be_named_by_its_number() {
    let site = Site::new().await;
    let queue = site.queue().await;
    submit(&queue, &[task("k", "silent", json!({}))]).await;
    let number = queue.get("k").await.unwrap().unwrap().id.0.to_string();
    let listed = json_of(&site, &["list", "--id", &number, "--json"]).await;
    assert_eq!((&listed["key"], &listed["unreadable"]), (&json!("k"), &Value::Null));
    assert_eq!(told(&site, &["cancel", "--id", &number]).await, format!("task number {number} is cancelled\n"));
    assert_eq!(queue.get("k").await.unwrap().unwrap().state, State::Cancelled);
    assert_eq!(told(&site, &["retry", "--id", &number]).await, format!("task number {number} may run now\n"));
    assert_eq!(queue.get("k").await.unwrap().unwrap().state, State::Waiting);
    for command in ["list", "show", "cancel", "retry"] {
        let answer = site.laelaps(["-c", "laelaps.yml", command, "--id", "999999"]).await;
        assert_eq!(answer.code, Some(5), "{command}: {}", answer.stderr);
        assert!(answer.stderr.contains("no task has the number 999999"), "{command}: {}", answer.stderr);
    }
    queue.close().await;
}

#[tokio::test]
async fn check_compares_the_tables_with_each_other_when_asked() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    submit(&queue, &[task("k", "silent", json!({}))]).await;
    let number = queue.get("k").await.unwrap().unwrap().id.0.to_string();
    queue.close().await;
    assert!(told(&site, &["check", "--data"]).await.contains("data           every table agrees with every other"));
    by_hand(&site, "DELETE FROM ready").await;
    let answer = site.laelaps(["-c", "laelaps.yml", "check", "--data"]).await;
    assert_eq!(answer.code, Some(4), "{}", answer.stderr);
    assert!(answer.stdout.lines().any(|line| line.starts_with("  ") && line.contains(&number)), "{}", answer.stdout);
    assert!(answer.stderr.contains("in the data"), "{}", answer.stderr);
    let _ = site.laelaps(["-c", "laelaps.yml", "check"]).await.success();
}

/// Three hosts die while they run nothing but one plugin: it is put aside, told, and runs again once an operator says so.
#[tokio::test]
async fn a_plugin_version_under_quarantine_is_told_and_can_be_released() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    // No task is given up for what its plugin did.
    site.configure(json!({ "suspicion_time": "1h", "audit_log": site.path("audit.jsonl") }));
    let queue = site.queue().await;
    let tasks: Vec<_> =
        (0..3).map(|n| task(format!("k{n}"), "silent", json!({ "mark": "/marks/begun", "gate": "/marks/gate" }))).collect();
    submit(&queue, &tasks).await;
    for _ in 0..3 {
        let before = site.marks("begun").len();
        let mut host = site.start().await;
        eventually(PATIENCE, "a task runs", async || {
            let running = queue.stats().await.map_err(|error| error.to_string())?.running;
            let begun = site.marks("begun").len();
            if running > 0 && begun > before { Ok(()) } else { Err(format!("{running} running, {begun} begun")) }
        })
        .await;
        host.kill().await;
    }
    let host = site.start().await;
    let listed = eventually(PATIENCE, "the version is under quarantine", async || {
        let listed = told(&site, &["plugin", "quarantine", "--json"]).await;
        serde_json::from_str::<Value>(&listed).map_err(|_| listed)
    })
    .await;
    assert_eq!((&listed["plugin"], &listed["deaths"]), (&json!("zoo"), &json!(3)));
    let digest = listed["digest"].as_str().unwrap();
    let warned = site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stderr;
    assert!(warned.contains(&format!("laelaps plugin release {digest}")), "{warned}");
    let released = told(&site, &["plugin", "release", &digest[..8]]).await;
    assert_eq!(released, format!("plugin version {digest} may run again\n"));
    assert!(std::fs::read_to_string(site.path("audit.jsonl")).unwrap().contains("\"plugin release\""));
    assert_eq!(told(&site, &["plugin", "quarantine"]).await, "0 entries.\n");
    site.open_gate("gate");
    host.stop().await;
}
