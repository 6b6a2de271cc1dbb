//! File operations that never come back, as on a mount whose server is gone.

use super::*;

/// A host on which the file `hangs` cannot be opened by the first `hung` attempts, with one route to each of two plugins by the type's first
/// letter: `z` and `o`.
async fn site(hung: u32) -> (Site, Queue, Host) {
    let site = Site::new().await;
    let zoo = laelaps_tests::guest("zoo");
    site.plug("zoo", &zoo);
    site.plug("other", &zoo);
    let route =
        |kind: &str, plugin: &str| site.route(json!({ "type": kind, "plugin": plugin, "max_attempts": 1, "time_limit": "0.2s" }));
    site.configure(json!({
        "processors": 4,
        "child_heartbeat_interval": 0.1,
        "child_heartbeat_limit": LIMIT_S,
        "routes": [route("read-file", "zoo"), site.route(json!({ "type": "list-folder", "plugin": "zoo" })),
            site.route(json!({ "type": "write-file", "plugin": "other" }))],
    }));
    let queue = site.queue().await;
    let host = site.start_with_fault(&format!("block-file=hangs:{hung}")).await;
    (site, queue, host)
}

#[tokio::test]
async fn a_hung_mount_under_one_plugin_leaves_the_files_of_others_alone_and_its_threads_are_replaced() {
    let (site, queue, host) = site(16).await;
    let hang: Vec<_> =
        (0..16).map(|number| task(format!("hung-{number}"), "read-file", json!({ "path": "/marks/hangs" }))).collect();
    submit(&queue, &hang).await;
    for hung in &hang {
        // Stopped by its time limit, though its file operation is not.
        let hung = wait_for_state(&queue, &hung.key, State::Failed, PATIENCE).await;
        let message = hung.error_message.unwrap();
        assert!(message.contains("time limit"), "{message}");
    }
    let write = |key: &str| task(key, "write-file", json!({ "path": format!("/marks/{key}") }));
    submit(&queue, &[write("beside")]).await;
    wait_for_state(&queue, "beside", State::Finished, PATIENCE).await;

    // Its own files serve again once its threads were given up.
    submit(&queue, &[task("after", "list-folder", json!({ "path": "/marks" }))]).await;
    let line = host.logged("file operations do not come back", PATIENCE).await;
    for part in ["ERROR", "plugin=\"zoo\"", "threads_lost_max=16"] {
        assert!(line.contains(part), "{part}: {line}");
    }
    wait_for_state(&queue, "after", State::Finished, PATIENCE).await;
    assert!(host.lines_with("this host drains").is_empty(), "they are not the host's own threads");
    std::fs::write(site.path("unblock"), "").unwrap();
    host.logged("a lost thread has come back from a file operation", PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn a_plugin_whose_threads_all_hang_fails_at_once_and_a_host_ends_in_spite_of_them() {
    let (_site, queue, host) = site(32).await;
    let mut number = 0;
    // Sixteen threads, and as many again that replaced them.
    let hopeless = async {
        loop {
            let batch: Vec<_> = (number..number + 8)
                .map(|number| task(format!("hung-{number}"), "read-file", json!({ "path": "/marks/hangs" })))
                .collect();
            number += 8;
            submit(&queue, &batch).await;
            for hung in &batch {
                wait_for_state(&queue, &hung.key, State::Failed, PATIENCE).await;
            }
            if !host.lines_with("its file operations fail until one comes back").is_empty() {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, hopeless).await.expect("all threads hang");
    submit(&queue, &[task("fails", "read-file", json!({ "path": "/marks/file" }))]).await;
    let failed = wait_for_state(&queue, "fails", State::Failed, PATIENCE).await;
    let message = failed.error_message.unwrap();
    assert!(message.contains("no thread could run this file operation"), "{message}");
    submit(&queue, &[task("beside", "write-file", json!({ "path": "/marks/beside" }))]).await;
    wait_for_state(&queue, "beside", State::Finished, PATIENCE).await;
    host.stop().await;
}
