//! Keys of the configuration that nothing else asks for: each one, given to a real host, does what docs/configuration.md says.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::time::Duration;

use laelaps_queue::{NewTask, Queue, State, Task};
use laelaps_tests::{
    Host, PATIENCE, Signal, Site, all_tasks, eventually, output, submit, task, wait_for_finished, wait_for_state, wait_for_stats,
};
use serde_json::{Value, json};

/// A host whose section has these members as well.
async fn with_section(members: Value) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(members);
    let queue = site.queue().await;
    let host = site.start().await;
    (site, queue, host)
}

/// What becomes of a task in a host whose only route has these members as well.
async fn on_route(members: Value, state: State, visit: NewTask) -> (Site, Host, Task) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let mut route = site.route(json!({ "pattern": ".", "max_attempts": 1 }));
    route.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    site.configure(json!({ "routes": [route] }));
    fs::write(site.path("marks/file"), "to be opened").unwrap();
    let queue = site.queue().await;
    let host = site.start().await;
    let key = visit.key.clone();
    submit(&queue, &[visit]).await;
    let ended = wait_for_state(&queue, &key, state, PATIENCE).await;
    (site, host, ended)
}

#[tokio::test]
async fn max_request_per_child_says_how_many_tasks_an_instance_serves() {
    let (_site, queue, host) = with_section(json!({ "processors": 1, "max_request_per_child": 2 })).await;
    let tasks: Vec<NewTask> = (0..4).map(|number| task(format!("call-{number}"), "calls", json!({}))).collect();
    submit(&queue, &tasks).await;
    wait_for_finished(&queue, 4, PATIENCE).await;
    let mut calls: Vec<u64> = all_tasks(&queue).await.iter().map(|task| output(task)["calls"].as_u64().unwrap()).collect();
    calls.sort_unstable();
    assert_eq!(calls, [1, 1, 2, 2]);
    host.stop().await;
}

#[tokio::test]
async fn disable_resource_limit_claims_without_looking_at_users() {
    let (site, queue, host) = with_section(json!({ "disable_resource_limit": true })).await;
    let tasks: Vec<NewTask> = (0..2)
        .map(|number| NewTask {
            user: Some("ann".to_owned()),
            max_running: Some(1),
            ..task(format!("held-{number}"), "silent", json!({ "gate": "/marks/gate" }))
        })
        .collect();
    submit(&queue, &tasks).await;
    wait_for_stats(&queue, "both tasks of a user who may have one run", PATIENCE, |stats| stats.running == 2).await;
    site.open_gate("gate");
    wait_for_finished(&queue, 2, PATIENCE).await;
    host.stop().await;
}

#[tokio::test]
async fn plugin_cache_keeps_compiled_code_between_starts() {
    let (site, _queue, host) = with_section(json!({ "plugin_cache": "cache" })).await;
    host.stop().await;
    // What is compiled is written beside and renamed: another file.
    let kept = || -> Vec<_> {
        let files = fs::read_dir(site.path("cache")).unwrap().map(|entry| entry.unwrap());
        files.map(|file| (file.file_name(), file.metadata().unwrap().ino())).collect()
    };
    let first = kept();
    assert_eq!(first.len(), 1, "the code of the only plugin: {first:?}");
    site.start().await.stop().await;
    assert_eq!(kept(), first, "nothing was compiled again");
}

#[tokio::test]
async fn plugin_poll_interval_finds_what_the_system_does_not_report() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    // A link whose target changes elsewhere.
    fs::write(site.path("elsewhere.wasm"), "version 0").unwrap();
    symlink(site.path("elsewhere.wasm"), site.plugin_path("linked")).unwrap();
    site.queue().await;
    site.configure(json!({ "plugin_poll_interval": "1d" }));
    let looks_daily = site.start().await;
    site.configure(json!({ "plugin_poll_interval": 0.1 }));
    let host = site.start().await;
    host.logged_times("linked", 1, PATIENCE).await;
    for version in 1..=4 {
        fs::write(site.path("elsewhere.wasm"), format!("version {version}")).unwrap();
        host.logged_times("linked", 1 + version, PATIENCE).await;
    }
    // If both looked at one interval, it would have noticed some of them as well. That it reopens its log comes after all that it said before.
    looks_daily.signal(Signal::USR2);
    looks_daily.logged("log reopened", PATIENCE).await;
    assert_eq!(looks_daily.lines_with("linked").len(), 1, "it has only looked when it started");
    looks_daily.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn output_limit_bounds_what_finish_returns() {
    let visit = task("large", "finish", json!({ "output": "more than ten bytes" }));
    let (_site, _host, failed) = on_route(json!({ "output_limit": 10 }), State::Failed, visit).await;
    assert_eq!(failed.error_code.as_deref(), Some("malformed"));
    assert!(failed.error_message.as_ref().unwrap().contains("10"), "{failed:?}");
}

#[tokio::test]
async fn log_limit_bounds_what_is_kept_of_an_attempt() {
    let visit = task("talks", "log", json!({ "text": "unheard" }));
    let (_site, host, _finished) = on_route(json!({ "log_limit": 0 }), State::Finished, visit).await;
    host.logged("more than its log limit", PATIENCE).await;
    assert!(host.lines_with("unheard").is_empty());
}

#[tokio::test]
async fn handles_bounds_what_is_open_at_once() {
    let visit = || task("opens", "open-many", json!({ "path": "/marks/file", "count": 200 }));
    {
        let (_site, _host, many) = on_route(json!({ "handles": 1_000 }), State::Finished, visit()).await;
        assert_eq!(output(&many)["open"], 200);
    }
    let (_site, _host, refused) = on_route(json!({ "handles": 50 }), State::Failed, visit()).await;
    assert!(refused.error_message.is_some(), "{refused:?}");
}

#[tokio::test]
async fn follow_ups_bounds_the_tasks_that_an_attempt_submits() {
    let visit = task("parent", "submit", json!({ "count": 5 }));
    let (_site, _host, finished) = on_route(json!({ "follow_ups": 2 }), State::Finished, visit).await;
    let told = output(&finished);
    assert_eq!((&told["submitted"], &told["refusals"][0]["code"]), (&json!(2), &json!("too-many")));
}

#[tokio::test]
async fn follow_up_data_bounds_their_data_together() {
    let visit = task("parent", "submit", json!({ "count": 5, "data": { "text": "x".repeat(40) } }));
    let (_site, _host, finished) = on_route(json!({ "follow_up_data": 120 }), State::Finished, visit).await;
    let told = output(&finished);
    assert_eq!((&told["submitted"], &told["refusals"][0]["code"]), (&json!(2), &json!("too-large")));
}

#[tokio::test]
async fn failed_retention_time_says_how_long_a_failed_task_is_kept() {
    let visit = task("bad", "fail", json!({ "kind": "reject" }));
    let (_site, _host, failed) =
        on_route(json!({ "failed_retention_time": "1h", "retention_time": 7 }), State::Failed, visit).await;
    let kept = failed.retained_until.unwrap().since(failed.finished_at.unwrap());
    assert_eq!(kept, Duration::from_secs(3_600));
}

#[tokio::test]
async fn host_name_is_how_the_host_is_called_in_the_database() {
    let (_site, queue, host) = with_section(json!({ "host_name": "kennel-7" })).await;
    let hosts = queue.backend().hosts().await.unwrap();
    assert_eq!(hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>(), ["kennel-7"]);
    host.stop().await;
}

#[tokio::test]
async fn a_running_host_clears_away_what_it_need_not_keep() {
    let (_site, queue, host) = with_section(json!({ "retention_time": 0, "cleanup_interval": 0 })).await;
    submit(&queue, &[task("gone", "silent", json!({}))]).await;
    let mut claims = 0;
    eventually(PATIENCE, "the finished task disappears", async || {
        let Some(task) = queue.backend().get("gone").await.unwrap() else { return Ok(()) };
        if task.state == State::Finished {
            // It goes at the next claim that finds something.
            claims += 1;
            submit(&queue, &[laelaps_tests::task(format!("next-{claims}"), "silent", json!({}))]).await;
        }
        Err(format!("{}, {claims} claims later", task.state.as_str()))
    })
    .await;
    host.stop().await;
}
