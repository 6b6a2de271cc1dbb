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
async fn what_handlers_write_is_bounded_and_what_they_delete_gives_room_back() {
    let (site, queue) = zoo().await;
    let folder = |more: Value| {
        let mut folder = json!({ "host": site.path("marks"), "guest": "/given", "writable": true });
        folder.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "folders": [folder] })
    };
    let (small, few) = (folder(json!({ "size_limit": "10KiB" })), folder(json!({ "file_limit": 0 })));
    let write = |bytes: usize| json!({ "path": "/given/new", "text": "x".repeat(bytes) });
    visit(&site, &queue, small.clone(), "write-file", write(10_240)).await.unwrap();
    fs::remove_file(site.path("marks/new")).unwrap();
    let refused = visit(&site, &queue, small.clone(), "write-file", write(10_241)).await.unwrap_err();
    // Rust's C library tells of every error on a stream as of an I/O error.
    assert!(refused.contains("/given/new: Quota exceeded") || refused.contains("/given/new: I/O error"), "{refused}");
    assert!(fs::metadata(site.path("marks/new")).unwrap().len() <= 10_240);
    fs::remove_file(site.path("marks/new")).unwrap();
    let refused = visit(&site, &queue, few, "write-file", write(1)).await.unwrap_err();
    assert!(refused.contains("/given/new: Quota exceeded"), "{refused}");

    // One host, several tasks: counted over all of them, and given back.
    site.configure(
        json!({ "processors": 1, "routes": [{ "pattern": ".", "plugin": "zoo", "max_attempts": 1, "grants": small }] }),
    );
    let host = site.start().await;
    let steps =
        [("write-file", 10_000, State::Finished), ("remove-file", 0, State::Finished), ("write-file", 10_001, State::Finished)];
    for (step, (kind, bytes, state)) in steps.into_iter().enumerate() {
        submit(&queue, &[task(format!("step-{step}"), kind, write(bytes))]).await;
        wait_for_state(&queue, &format!("step-{step}"), state, PATIENCE).await;
    }
    submit(&queue, &[task("another", "write-file", json!({ "path": "/given/another", "text": "x".repeat(1_000) }))]).await;
    wait_for_state(&queue, "another", State::Failed, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn pipes_and_devices_are_not_opened_and_keep_no_thread() {
    let (site, queue) = zoo().await;
    let pipe = std::process::Command::new("mkfifo").arg(site.path("marks/pipe")).status().unwrap();
    assert!(pipe.success());
    site.configure(json!({ "routes": [{
        "pattern": ".", "plugin": "zoo", "max_attempts": 1, "time_limit": "1m",
        "grants": { "folders": [{ "host": site.path("marks"), "guest": "/given", "writable": true }, { "host": "/dev", "guest": "/dev" }] },
    }] }));
    let host = site.start().await;
    // More than there were threads for files of all plugins together.
    let (mut tasks, devices) = (Vec::new(), ["/given/pipe", "/dev/null", "/dev/zero"]);
    for number in 0..100 {
        let kind = if number % 2 == 0 { "read-file" } else { "write-file" };
        tasks.push(task(format!("visit-{number}"), kind, json!({ "path": devices[number % 3] })));
    }
    submit(&queue, &tasks).await;
    for visit in &tasks {
        // Only the pipe may be written to as far as its grant goes.
        let visit = wait_for_state(&queue, &visit.key, State::Failed, PATIENCE).await;
        let message = visit.error_message.unwrap();
        assert!(message.contains("Operation not permitted"), "{}: {message}", visit.key);
    }
    submit(&queue, &[task("good", "read-file", json!({ "path": "/given/file" }))]).await;
    wait_for_state(&queue, "good", State::Finished, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_large_folder_costs_the_host_the_same_however_often_it_is_listed() {
    const FILES: usize = 20_000;
    let (site, queue) = zoo().await;
    fs::create_dir(site.path("marks/large")).unwrap();
    for number in 0..FILES {
        fs::write(site.path(&format!("marks/large/{number:0100}")), "").unwrap();
    }
    site.configure(
        json!({ "processors": 1, "routes": [site.route(json!({ "pattern": ".", "handles": 1_000, "max_attempts": 1 }))] }),
    );
    let host = site.start().await;
    let peak = || {
        let status = fs::read_to_string(format!("/proc/{}/status", host.process_id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
    };
    let list = |key: &str, count: usize| task(key, "list-many", json!({ "path": "/marks/large", "count": count }));
    submit(&queue, &[list("one", 1)]).await;
    wait_for_state(&queue, "one", State::Finished, PATIENCE).await;
    let before = peak();
    // Whole listings would be some 3 MB each.
    submit(&queue, &[list("many", 100)]).await;
    let many = wait_for_state(&queue, "many", State::Finished, PATIENCE).await;
    assert_eq!(output(&many)["listings"], 100);
    let more = peak() - before;
    assert!(more < 40, "the host's memory grew by {more} MiB");
    host.stop().await;
}

#[tokio::test]
async fn a_folder_within_one_that_handlers_may_write_to_is_refused_by_check_and_at_the_start() {
    let (site, _) = zoo().await;
    fs::create_dir(site.path("marks/in")).unwrap();
    let grant =
        |path: &str, guest: &str, writable: bool| json!({ "host": site.path(path), "guest": guest, "writable": writable });
    site.configure(json!({ "routes": [
        { "type": "a", "plugin": "zoo", "grants": { "folders": [grant("marks/in", "/in", false)] } },
        { "type": "b", "plugin": "zoo", "grants": { "folders": [grant("marks", "/marks", true)] } },
    ] }));
    let expected = format!(
        "the folder {} lies within {}, to which handlers of route 2",
        site.path("marks/in").display(),
        site.path("marks").display()
    );
    let answer = site.laelaps(["-c", "laelaps.yml", "check"]).await;
    assert_eq!(answer.code, Some(3), "{answer:?}");
    assert!(answer.stderr.contains(&expected), "{answer:?}");
    let mut host = site.spawn_with(&[], &[]);
    assert_eq!(host.exited(PATIENCE).await.code(), Some(3));
    host.logged(&expected, PATIENCE).await;
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
