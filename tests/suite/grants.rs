//! A handler reaches what its route grants, and nothing else.

use std::fs;

use laelaps_queue::{Queue, State};
use laelaps_tests::{PATIENCE, Site, all_tasks, eventually, output, submit, task, wait_for_finished, wait_for_state};
use serde_json::{Value, json};

/// Runs one task on the zoo under these grants; returns its output, or its error message.
async fn visit(site: &Site, queue: &Queue, grants: Value, kind: &str, data: Value) -> Result<Value, String> {
    site.configure(json!({ "routes": [{ "pattern": ".", "plugin": "zoo", "max_attempts": 1, "grants": grants }] }));
    let host = site.start_with(&[], &[("SECRET", "hunter2"), ("GRANTED", "yes"), ("LAELAPS_X", "1")]).await;
    let key = format!("visit-{}", all_tasks(queue).await.len());
    submit(queue, &[task(&key, kind, data)]).await;
    let visit = eventually(PATIENCE, "the visit is over", async || {
        let visit = queue.backend().get(&key).await.unwrap().unwrap();
        if visit.state.is_terminal() { Ok(visit) } else { Err(format!("{visit:?}")) }
    })
    .await;
    host.stop().await;
    if visit.state == State::Finished { Ok(output(&visit)) } else { Err(visit.error_message.unwrap()) }
}

async fn zoo() -> (Site, Queue) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    fs::write(site.path("marks/file"), "content").unwrap();
    fs::write(site.path("outside"), "not yours").unwrap();
    (site, queue)
}

#[tokio::test]
async fn nothing_is_granted_by_default() {
    let (site, queue) = zoo().await;
    let nothing = || json!({});
    for path in ["/marks/file", "/", ".", "laelaps.yml", "/etc/hostname", "/proc/self/environ"] {
        let kind = if path.ends_with('/') || path == "." { "list-folder" } else { "read-file" };
        let answer = visit(&site, &queue, nothing(), kind, json!({ "path": path })).await;
        assert!(answer.is_err(), "{path}: {answer:?}");
    }
    let seen = visit(&site, &queue, nothing(), "environment", json!({})).await.unwrap();
    assert_eq!(seen["environment"], json!({}), "no variable");
    assert_eq!(seen["arguments"], json!([]), "no argument");
    let connection = visit(&site, &queue, nothing(), "connect", json!({})).await.unwrap();
    assert_eq!(connection["connected"], false, "no network");
}

#[tokio::test]
async fn a_folder_is_granted_read_only_or_writable_and_never_left() {
    let (site, queue) = zoo().await;
    let grant = |writable: bool| json!({ "folders": [{ "host": site.path("marks"), "guest": "/given", "writable": writable }] });
    let read = visit(&site, &queue, grant(false), "read-file", json!({ "path": "/given/file" })).await.unwrap();
    assert_eq!(read["text"], "content");
    let mut attempts = vec![("write-file", "/given/new"), ("write-file", "/given/file"), ("remove-file", "/given/file")];
    for (kind, path) in attempts.drain(..) {
        let answer = visit(&site, &queue, grant(false), kind, json!({ "path": path })).await;
        assert!(answer.is_err(), "{kind} {path}: {answer:?}");
    }
    assert_eq!(fs::read_to_string(site.path("marks/file")).unwrap(), "content");

    visit(&site, &queue, grant(true), "write-file", json!({ "path": "/given/new", "text": "from inside" })).await.unwrap();
    assert_eq!(fs::read_to_string(site.path("marks/new")).unwrap(), "from inside");

    std::os::unix::fs::symlink(site.path("outside"), site.path("marks/way-out")).unwrap();
    for path in ["/given/../outside", "/given/way-out", "/given/../../etc/hostname"] {
        let answer = visit(&site, &queue, grant(true), "read-file", json!({ "path": path })).await;
        assert!(answer.is_err(), "{path}: {answer:?}");
    }
}

#[tokio::test]
async fn environment_variables_are_granted_by_name() {
    let (site, queue) = zoo().await;
    let grants = json!({ "environment": ["GRANTED", "NOT_SET"] });
    let seen = visit(&site, &queue, grants, "environment", json!({})).await.unwrap();
    assert_eq!(seen["environment"], json!({ "GRANTED": "yes" }), "the named one that is set, and no other");
}

#[tokio::test]
async fn open_handles_are_bounded() {
    let (site, queue) = zoo().await;
    let grants = json!({ "folders": [{ "host": site.path("marks"), "guest": "/given" }] });
    let seen = visit(&site, &queue, grants, "open-many", json!({ "path": "/given/file", "count": 10_000 })).await;
    let refused_early = match &seen {
        Ok(seen) => seen["open"].as_u64().unwrap() < 200,
        Err(message) => !message.is_empty(),
    };
    assert!(refused_early, "{seen:?}");
}

#[tokio::test]
async fn memory_is_empty_for_every_attempt() {
    let (site, queue) = zoo().await;
    site.configure(json!({ "processors": 2 }));
    let host = site.start().await;
    let tasks: Vec<_> =
        (0..200).map(|number| task(format!("visit-{number}"), "leftovers", json!({ "fingerprint": number % 255 + 1 }))).collect();
    submit(&queue, &tasks).await;
    wait_for_finished(&queue, 200, PATIENCE).await;
    for visit in all_tasks(&queue).await {
        let seen = output(&visit);
        assert_eq!((&seen["found_static"], &seen["found_grown"]), (&json!(0), &json!(0)), "{}: {seen}", visit.key);
    }
    submit(&queue, &[task("calls", "calls", json!({}))]).await;
    let calls = wait_for_state(&queue, "calls", State::Finished, PATIENCE).await;
    assert_eq!(output(&calls)["calls"], 1, "a fresh instance for every attempt");
    host.stop().await;
}
