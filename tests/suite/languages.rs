//! The contract holds in more than one language: a C and a Python component through the real host, with every outcome and the whole context.

use laelaps_queue::{Queue, State};
use laelaps_tests::{Host, LONG, PATIENCE, Signal, Site, eventually, output, submit, task, wait_for_state};
use serde_json::{Value, json};

/// A host that serves this guest.
async fn host(guest: &str) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest(guest);
    site.configure(json!({ "retry_wait": 0.05, "routes": [{
        "pattern": ".", "plugin": guest, "memory": "256MiB", "time_limit": 600, "max_attempts": 2, "settings": { "greeting": "hello" },
    }] }));
    let queue = site.queue().await;
    // A Python runtime takes ten seconds to compile on an idle machine.
    let mut host = site.spawn_with(&[], &[]);
    host.notified("READY=1", LONG).await;
    (site, queue, host)
}

async fn run(queue: &Queue, key: &str, kind: &str, data: Value, state: State) -> laelaps_queue::Task {
    let mut new = task(key, kind, data);
    new.user = Some("rex".to_owned());
    submit(queue, &[new]).await;
    wait_for_state(queue, key, state, PATIENCE).await
}

/// What both do alike. `members` is the data of a task that stores `{"step": 2}`.
async fn keeps_the_contract(queue: &Queue, host: &Host, members: Value) {
    let echo = run(queue, "echo", "echo", json!({ "a": [1, "zwei"] }), State::Finished).await;
    assert_eq!(output(&echo), json!({ "a": [1, "zwei"] }));
    host.logged("echo attempt 1", PATIENCE).await;
    assert!(run(queue, "silent", "silent", json!({}), State::Finished).await.output.is_none());

    let seen = output(&run(queue, "describe", "describe", json!({ "setting": "greeting" }), State::Finished).await);
    let described = queue.backend().get("describe").await.unwrap().unwrap();
    assert_eq!((&seen["key"], &seen["kind"], &seen["user"]), (&json!("describe"), &json!("describe"), &json!("rex")));
    assert_eq!((&seen["attempt"], &seen["max_attempts"], &seen["setting"]), (&json!(1), &json!(2), &json!("hello")));
    assert_eq!(seen["created_at"], described.created_at.0);
    assert!(seen["deadline"].as_i64().unwrap() > described.created_at.0);

    assert_eq!(output(&run(queue, "heartbeat", "heartbeat", json!({}), State::Finished).await)["held"], true);
    assert_eq!(output(&run(queue, "submit", "submit", json!({}), State::Finished).await)["submitted"], 1);
    wait_for_state(queue, "submit-next", State::Finished, PATIENCE).await;

    let updated = run(queue, "update", "update", members, State::Finished).await;
    assert_eq!(serde_json::from_slice::<Value>(&updated.data.unwrap()).unwrap()["step"], 2);

    let failed = run(queue, "fail", "fail", json!({}), State::Failed).await;
    assert_eq!((failed.attempts, failed.error_code.as_deref()), (2, Some("on-purpose")));
    let retried = run(queue, "retry", "retry", json!({ "delay_ms": 10 }), State::Failed).await;
    assert_eq!((retried.attempts, retried.error_code.as_deref()), (2, Some("max-attempts")));
}

/// A graceful stop reaches the handler, which releases its task.
async fn hears_a_graceful_stop(queue: &Queue, mut host: Host) {
    submit(queue, &[task("waits", "wait-cancelled", json!({}))]).await;
    wait_for_state(queue, "waits", State::Running, PATIENCE).await;
    host.signal(Signal::TERM);
    assert!(host.exited(PATIENCE).await.success());
    let waits = queue.backend().get("waits").await.unwrap().unwrap();
    assert_eq!((waits.state, waits.attempts), (State::Waiting, 0));
}

#[tokio::test]
async fn c_components_keep_the_contract() {
    let (_site, queue, host) = host("c").await;
    keeps_the_contract(&queue, &host, json!({ "step": 2 })).await;
    let rejected = run(&queue, "reject", "reject", json!({}), State::Failed).await;
    assert_eq!((rejected.attempts, rejected.error_code.as_deref()), (1, Some("on-purpose")));
    let aborted = run(&queue, "abort", "abort", json!({}), State::Failed).await;
    assert_eq!((aborted.attempts, aborted.error_code.as_deref()), (2, Some("trap")));
    drop(host);
}

#[tokio::test]
async fn python_components_keep_the_contract() {
    let (_site, queue, host) = host("python").await;
    keeps_the_contract(&queue, &host, json!({ "members": { "step": 2 } })).await;
    let rejected = run(&queue, "reject", "fail", json!({ "kind": "reject", "code": "bad" }), State::Failed).await;
    assert_eq!((rejected.attempts, rejected.error_code.as_deref()), (1, Some("bad")));
    let raised = run(&queue, "raise", "raise", json!({}), State::Failed).await;
    assert_eq!((raised.error_code.as_deref(), raised.error_message.as_deref()), (Some("ValueError"), Some("on purpose")));
    eventually(PATIENCE, "what it prints is captured", async || {
        if queue.backend().get("log").await.unwrap().is_none() {
            submit(&queue, &[task("log", "log", json!({ "text": "from Python" }))]).await;
        }
        let lines = host.lines_with("stdout from Python");
        if lines.is_empty() { Err("not yet".to_owned()) } else { Ok(()) }
    })
    .await;
    hears_a_graceful_stop(&queue, host).await;
}

#[tokio::test]
async fn c_components_hear_a_graceful_stop() {
    let (_site, queue, host) = host("c").await;
    hears_a_graceful_stop(&queue, host).await;
}
