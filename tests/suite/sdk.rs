//! The Rust SDK through the real host: hooks and decisions as PerfectQueue's applications have them.

use std::time::Duration;

use laelaps_queue::{Queue, State};
use laelaps_tests::{Host, PATIENCE, Signal, Site, eventually, output, submit, task, wait_for_state};
use serde_json::{Value, json};

/// A host with the guest `steps`, and one task of this plan.
async fn steps(plan: Value) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("steps");
    site.configure(json!({ "retry_wait": 0.05, "max_attempts": 2, "routes": [{ "pattern": ".", "plugin": "steps" }] }));
    let queue = site.queue().await;
    submit(&queue, &[task("one", "steps", plan)]).await;
    let host = site.start().await;
    (site, queue, host)
}

/// What the handler's steps wrote to the log, in order.
fn log(host: &Host) -> Vec<String> {
    let steps = ["before_perform", "after_perform", "unexpected_error_raised", "perform"];
    let lines = host.lines_with(" guest: ");
    lines.iter().filter_map(|line| steps.iter().find(|step| line.contains(*step)).map(|step| (*step).to_owned())).collect()
}

#[tokio::test]
async fn before_perform_and_after_around_a_finished_task() {
    let (_site, queue, host) = steps(json!({})).await;
    let one = wait_for_state(&queue, "one", State::Finished, PATIENCE).await;
    assert_eq!(output(&one)["performed"], "one");
    host.logged("after_perform", PATIENCE).await;
    assert_eq!(log(&host), ["before_perform", "perform", "after_perform"]);
    host.stop().await;
}

#[tokio::test]
async fn a_before_hook_that_says_no_releases_the_task_and_nothing_else_runs() {
    let (_site, queue, host) = steps(json!({ "before": false })).await;
    eventually(PATIENCE, "it was released", async || {
        let attempts = queue.backend().attempts("one").await.unwrap();
        if attempts.iter().any(|attempt| attempt.event == "release") { Ok(()) } else { Err(format!("{attempts:?}")) }
    })
    .await;
    queue.backend().cancel("one", Duration::from_secs(60)).await.unwrap();
    let one = queue.backend().get("one").await.unwrap().unwrap();
    assert_eq!(one.attempts, 0, "a release does not count");
    assert!(log(&host).iter().all(|step| step == "before_perform"), "neither perform nor after_perform ran: {:?}", log(&host));
    host.signal(Signal::QUIT);
}

#[tokio::test]
async fn after_perform_runs_even_if_perform_failed() {
    let (_site, queue, host) = steps(json!({ "perform": "fail" })).await;
    let one = wait_for_state(&queue, "one", State::Failed, PATIENCE).await;
    assert_eq!(one.attempts, 2);
    host.logged_times("after_perform", 2, PATIENCE).await;
    host.logged_times("unexpected_error_raised", 2, PATIENCE).await;
    let steps = log(&host);
    assert_eq!(steps.iter().filter(|step| *step == "after_perform").count(), 2, "{steps:?}");
    assert_eq!(
        steps.iter().filter(|step| *step == "unexpected_error_raised").count(),
        2,
        "the decider was asked each time: {steps:?}"
    );
    assert_eq!(one.error_code.as_deref(), Some("gave-up"), "on the last attempt it decided to reject");
    host.stop().await;
}

#[tokio::test]
async fn a_decision_settles_the_task_and_an_unknown_one_is_an_error_of_its_own() {
    let (_site, queue, host) = steps(json!({ "perform": "come_back" })).await;
    let one = wait_for_state(&queue, "one", State::Failed, PATIENCE).await;
    assert_eq!((one.attempts, one.error_code.as_deref()), (2, Some("max-attempts")), "it asked for a retry twice");
    submit(&queue, &[task("two", "steps", json!({ "perform": "fly" }))]).await;
    let two = wait_for_state(&queue, "two", State::Failed, PATIENCE).await;
    assert!(two.error_message.as_ref().is_some_and(|message| message.contains("fly")), "{two:?}");
    host.stop().await;
}

#[tokio::test]
async fn data_that_does_not_fit_the_handler_s_type_is_rejected_with_its_place() {
    let (_site, queue, host) = steps(json!({ "before": "perhaps" })).await;
    let one = wait_for_state(&queue, "one", State::Failed, PATIENCE).await;
    assert_eq!((one.attempts, one.error_code.as_deref()), (1, Some("bad-data")), "no second attempt would help");
    assert!(one.error_message.as_ref().is_some_and(|message| message.contains("before")), "{one:?}");
    host.stop().await;
}
