//! The host as a daemon: what it tells its service manager, and the files it keeps.

use std::fs;

use laelaps_queue::State;
use laelaps_tests::{PATIENCE, Signal, Site, eventually, submit, task, wait_for_state};
use serde_json::json;

#[tokio::test]
async fn ready_means_that_tasks_are_claimed_and_plugins_serve() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let mut host = site.start().await;
    submit(&queue, &[task("first", "silent", json!({}))]).await;
    wait_for_state(&queue, "first", State::Finished, PATIENCE).await;
    assert!(host.lines_with("wait for a plugin").is_empty(), "the plugins were there before the host said so");
    host.signal(Signal::TERM);
    host.notified("STOPPING=1", PATIENCE).await;
    assert!(host.exited(PATIENCE).await.success());
}

#[tokio::test]
async fn the_pid_file_names_the_process_and_refuses_a_second_host() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.queue().await;
    let path = site.path("laelaps.pid");
    // A stale one, of a process that is gone, does not matter.
    fs::write(&path, "1\n").unwrap();
    let host = site.start_with(&["--pid-file", "laelaps.pid"], &[]).await;
    assert_eq!(fs::read_to_string(&path).unwrap().trim(), host.process_id().to_string());
    let second = site.laelaps(["-c", "laelaps.yml", "run", "--pid-file", "laelaps.pid"]).await;
    assert_ne!(second.code, Some(0));
    assert!(second.stderr.contains("laelaps.pid") && second.stderr.contains(&host.process_id().to_string()), "{}", second.stderr);
    host.stop().await;
    assert!(!path.exists(), "the file goes with the host");
}

#[tokio::test]
async fn a_host_without_its_tables_says_how_to_make_them() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let answer = site.laelaps(["-c", "laelaps.yml", "run"]).await;
    assert_ne!(answer.code, Some(0));
    assert!(answer.stderr.contains("laelaps init"), "{}", answer.stderr);
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    site.start().await.stop().await;
}

#[tokio::test]
async fn a_log_file_has_what_standard_error_would_have() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "log": site.path("from-configuration.log") }));
    site.queue().await;
    let host = site.start().await;
    eventually(PATIENCE, "the log says ready", async || {
        let text = fs::read_to_string(site.path("from-configuration.log")).map_err(|error| error.to_string())?;
        if text.contains("ready") { Ok(()) } else { Err(text) }
    })
    .await;
    assert_eq!(host.line_count(), 0, "and standard error has nothing");
    host.stop().await;
}
