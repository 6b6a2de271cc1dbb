//! What a host needs of its machine's memory, whatever its guests do.

use laelaps_queue::NewTask;
use laelaps_tests::{LONG, PATIENCE, Site, eventually, scaled, submit, task, wait_for_finished};
use serde_json::json;

const MEBIBYTE: u64 = 1 << 20;

#[tokio::test]
async fn large_updates_at_once_keep_the_host_below_half_a_gigabyte() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "processors": 4 }));
    let queue = site.queue().await;
    let host = site.start().await;
    let before = host.memory_peak();
    let large = |number| task(format!("large-{number}"), "update-large", json!({ "times": 2 }));
    let tasks: Vec<NewTask> = (0..scaled(40)).map(large).collect();
    submit(&queue, &tasks).await;
    wait_for_finished(&queue, tasks.len(), LONG).await;
    let peak = host.memory_peak();
    assert!(peak < 512 * MEBIBYTE, "{} MiB, {} before the tasks", peak / MEBIBYTE, before / MEBIBYTE);
    host.stop().await;
}

#[tokio::test]
async fn only_as_many_tasks_are_claimed_as_fit_into_the_budget_of_memory() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let route = site.route(json!({ "pattern": ".", "memory": "48MiB" }));
    site.configure(json!({ "processors": 8, "task_prefetch": 8, "memory_total": "128MiB", "routes": [route] }));
    let queue = site.queue().await;
    let host = site.start().await;
    let before = host.memory_peak();
    let members = json!({ "bytes": 40 << 20, "mark": "/marks/begun", "hold": "/marks/gate" });
    let tasks: Vec<NewTask> = (0..12).map(|number| task(format!("holds-{number}"), "allocate", members.clone())).collect();
    submit(&queue, &tasks).await;
    host.logged("claiming pauses", PATIENCE).await;
    eventually(PATIENCE, "both have begun", async || {
        let begun = site.marks("begun");
        if begun.len() == 2 { Ok(()) } else { Err(format!("{begun:?}")) }
    })
    .await;
    assert_eq!(queue.stats().await.unwrap().running, 2, "as many as fit, none of them waits in the host");
    site.open_gate("gate");
    wait_for_finished(&queue, tasks.len(), LONG).await;
    host.logged("claiming goes on", PATIENCE).await;
    assert_eq!(host.lines_with("claiming pauses").len(), 1, "it is said once");
    let needed = host.memory_peak() - before;
    assert!(needed < 192 * MEBIBYTE, "{} MiB for tasks that have 40 each", needed / MEBIBYTE);
    host.stop().await;
}

#[tokio::test]
async fn tasks_that_exceed_the_budget_of_memory_run_one_at_a_time() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "processors": 4, "memory_total": "32MiB" }));
    let needed = needed_by(&site, |number| task(format!("large-{number}"), "allocate", json!({ "bytes": 40 << 20 }))).await;
    assert!(needed < 96, "{needed} MiB for one task at a time that has 40");
}

#[tokio::test]
async fn instances_that_wait_to_be_used_again_make_room_for_others() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.plug("other", &laelaps_tests::guest("zoo"));
    let routes = json!([{ "type": "allocate", "plugin": "zoo" }, { "type": "allocate-too", "plugin": "other" }]);
    let section = json!({ "processors": 1, "memory_total": "64MiB", "max_request_per_child": 100, "routes": routes });
    site.configure(section);
    let needed = needed_by(&site, |number| {
        let task_type = if number % 2 == 0 { "allocate" } else { "allocate-too" };
        task(format!("{task_type}-{number}"), task_type, json!({ "bytes": 40 << 20 }))
    });
    let needed = needed.await;
    assert!(needed < 64, "{needed} MiB");
}

/// The most memory that a host needs more for six tasks than before, in MiB.
async fn needed_by(site: &Site, make: impl Fn(u32) -> NewTask) -> u64 {
    let queue = site.queue().await;
    let host = site.start().await;
    let before = host.memory_peak();
    let tasks: Vec<NewTask> = (0..6).map(make).collect();
    submit(&queue, &tasks).await;
    wait_for_finished(&queue, tasks.len(), LONG).await;
    let needed = host.memory_peak() - before;
    host.stop().await;
    needed / MEBIBYTE
}
