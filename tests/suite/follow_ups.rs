//! What a handler may submit: nothing in another's name, and not without end.

use laelaps_queue::{Filter, NewTask, Queue, State, Submitted, Task};
use laelaps_tests::{
    Database, Host, LONG, PATIENCE, Site, all_tasks, eventually, output, submit, task, wait_for_finished, wait_for_state,
};
use serde_json::{Value, json};

/// A route to the guest that submits, with these follow-ups granted; null: nothing is said about them.
fn route(matcher: &str, types: &str, follow_ups: &Value) -> Value {
    let mut route = json!({ matcher: types, "plugin": "zoo" });
    if !follow_ups.is_null() {
        route["grants"] = json!({ "follow_ups": follow_ups });
    }
    route
}

/// A host whose guest `zoo` handles every type but `write-file`, which goes to the same guest under the name of `clerk`, granted a folder.
async fn site(follow_ups: Value, processors: u32) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.plug("clerk", &laelaps_tests::guest("zoo"));
    let clerk = site.route(json!({ "type": "write-file", "plugin": "clerk" }));
    site.configure(json!({ "processors": processors, "routes": [clerk, route("pattern", ".", &follow_ups)] }));
    let queue = site.queue().await;
    let host = site.start().await;
    (site, queue, host)
}

/// What `submit` was told of its follow-up; None if it was taken.
fn refusal(parent: &Task) -> Option<String> {
    output(parent)["refusals"].get(0).map(|refusal| refusal["code"].as_str().unwrap().to_owned())
}

/// Let the guest submit one task as `data` says, and answer what it was told.
async fn tried(queue: &Queue, key: &str, data: Value) -> Option<String> {
    submit(queue, &[NewTask { user: Some("rex".to_owned()), max_running: Some(1), ..task(key, "submit", data) }]).await;
    refusal(&wait_for_state(queue, key, State::Finished, PATIENCE).await)
}

laelaps_tests::on_every_native_database! {
    async fn a_handler_cannot_work_through_another_plugin_nor_in_anothers_name() {
        let (site, queue, host) = site(Value::Null, 2).await;
        let not_granted = Some("not-granted".to_owned());
        let write = json!({ "path": "/marks/stolen", "text": "x" });
        let deputy = json!({ "key": "zoo/deputy", "kind": "write-file", "data": write });
        assert_eq!(tried(&queue, "deputy", deputy).await, not_granted, "a route to another plugin");
        assert_eq!(tried(&queue, "key", json!({ "key": "invoice-7" })).await, not_granted, "a key of somebody else's");
        assert_eq!(tried(&queue, "user", json!({ "key": "zoo/user", "user": "fido" })).await, not_granted);
        assert_eq!(tried(&queue, "limit", json!({ "key": "zoo/limit", "user": "rex", "max_running": 2 })).await, not_granted);
        assert_eq!(tried(&queue, "long", json!({ "key": format!("zoo/{}", "k".repeat(252)) })).await, Some("invalid-key".to_owned()));
        assert_eq!(tried(&queue, "own", json!({ "key": "zoo/own" })).await, None);
        assert_eq!(tried(&queue, "extends", json!({ "key": "extends-1" })).await, None);
        for key in ["zoo/own", "extends-1"] {
            let child = wait_for_state(&queue, key, State::Finished, PATIENCE).await;
            assert_eq!((child.user.as_deref(), child.max_running), (Some("rex"), Some(1)), "within its user's limit");
        }
        for key in ["zoo/deputy", "zoo/user", "zoo/limit"] {
            assert!(!queue.exists(key).await.unwrap(), "{key}");
        }
        assert_eq!(queue.submit(task("invoice-7", "silent", json!({}))).await.unwrap(), Submitted::Created, "its producer has the key");
        assert!(!site.path("marks/stolen").exists());
        // What a producer asks for is done.
        submit(&queue, &[task("clerk", "write-file", write)]).await;
        wait_for_state(&queue, "clerk", State::Finished, PATIENCE).await;
        assert!(site.path("marks/stolen").exists());
        host.stop().await;
    }

    async fn what_a_route_grants_is_taken() {
        let follow_ups = json!({ "types": ["write-file"], "users": "any", "keys": "invoice-" });
        let (site, queue, host) = site(follow_ups, 2).await;
        let write = |key: &str, user| json!({ "key": key, "user": user, "kind": "write-file", "data": { "path": "/marks/x", "text": "x" } });
        assert_eq!(tried(&queue, "granted", write("invoice-7", "fido")).await, None);
        assert_eq!(tried(&queue, "other-key", write("zoo/7", "fido")).await, Some("not-granted".to_owned()));
        assert_eq!(tried(&queue, "other-type", json!({ "key": "invoice-8" })).await, Some("not-granted".to_owned()), "its own type is not named");
        let invoice = wait_for_state(&queue, "invoice-7", State::Finished, PATIENCE).await;
        assert_eq!(invoice.user.as_deref(), Some("fido"));
        assert!(site.path("marks/x").exists());
        host.stop().await;
    }

    async fn a_fork_bomb_ends_and_good_tasks_go_on() {
        let (_site, queue, host) = site(json!({ "depth": 6, "waiting": 12 }), 2).await;
        submit(&queue, &[task("bomb", "fork", json!({}))]).await;
        let good: Vec<NewTask> = (0..50).map(|number| task(format!("good{number}"), "silent", json!({}))).collect();
        submit(&queue, &good).await;
        for task in &good {
            wait_for_state(&queue, &task.key, State::Finished, PATIENCE).await;
        }
        eventually(LONG, "the bomb has burnt out", async || {
            let stats = queue.stats().await.unwrap();
            let live = stats.ready + stats.scheduled + stats.running;
            // Two attempts at once may each submit two that the other does not see, beside themselves.
            assert!(live <= 12 + 4 + 2 + 1, "{stats:?}");
            if live == 0 { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
        let all = all_tasks(&queue).await;
        assert!(all.len() <= 50 + 127, "no more than seven generations: {}", all.len());
        assert!(all.iter().all(|task| task.state == State::Finished));
        let codes = codes(&queue).await;
        assert!(codes.iter().any(|code| code == "too-deep" || code == "too-many-waiting"), "{codes:?}");
        assert!(codes.iter().all(|code| code == "too-deep" || code == "too-many-waiting"), "{codes:?}");
        host.stop().await;
    }

    async fn a_task_may_submit_its_successor_for_ever_if_it_waits() {
        let (_site, queue, host) = site(json!({ "depth": 2, "waiting": 1 }), 1).await;
        submit(&queue, &[task("first", "fork", json!({ "count": 1, "delay_ms": 60_000 }))]).await;
        for generation in 1..=8 {
            wait_for_finished(&queue, generation, PATIENCE).await;
            let waiting = keys_of(&queue, State::Waiting).await;
            assert_eq!(waiting.len(), 1, "generation {generation}: {:?}", codes(&queue).await);
            queue.retry(&waiting[0]).await.unwrap();
        }
        assert!(codes(&queue).await.is_empty());
        host.stop().await;
    }

    async fn a_bomb_whose_forks_wait_is_bounded_by_what_waits() {
        let (_site, queue, host) = site(json!({ "waiting": 5 }), 1).await;
        submit(&queue, &[task("bomb", "fork", json!({ "delay_ms": 3_600_000 }))]).await;
        for finished in 1..=15 {
            wait_for_finished(&queue, finished, PATIENCE).await;
            let waiting = keys_of(&queue, State::Waiting).await;
            // One attempt at a time: none is missed.
            assert!((1..=5).contains(&waiting.len()), "{}", waiting.len());
            queue.retry(&waiting[0]).await.unwrap();
        }
        assert!(codes(&queue).await.contains(&"too-many-waiting".to_owned()));
        host.stop().await;
    }

    async fn each_bound_is_told_by_a_code_of_its_own() {
        let (_site, queue, host) = site(json!({ "depth": 0, "waiting": 2 }), 1).await;
        assert_eq!(tried(&queue, "deep", json!({ "key": "zoo/deep" })).await, Some("too-deep".to_owned()));
        let later = queue.backend().now().await.unwrap().0 + 3_600_000;
        submit(&queue, &[task("many", "submit", json!({ "count": 4, "run_at_ms": later }))]).await;
        let many = output(&wait_for_state(&queue, "many", State::Finished, PATIENCE).await);
        assert_eq!((&many["submitted"], &many["refusals"][0]["code"]), (&json!(2), &json!("too-many-waiting")));
        let message = many["refusals"][0]["message"].as_str().unwrap();
        assert!(message.starts_with("2 follow-ups that come from the same task have not ended"), "{message}");
        // Another task has a count of its own.
        submit(&queue, &[task("other", "submit", json!({ "count": 2, "run_at_ms": later }))]).await;
        assert_eq!(output(&wait_for_state(&queue, "other", State::Finished, PATIENCE).await)["submitted"], 2);
        // What is cancelled waits no more.
        queue.cancel("many-follow-up-0").await.unwrap();
        host.stop().await;
    }
}

/// Where PerfectQueue's handlers were, one may submit what it likes, but not without end.
#[tokio::test]
async fn on_perfectqueues_table_anything_may_be_submitted_but_not_without_end() {
    laelaps_tests::on(Database::PerfectQueue, Box::pin(on_perfectqueue())).await;
}

async fn on_perfectqueue() {
    let (site, queue, host) = site(Value::Null, 2).await;
    let write = json!({ "key": "invoice-7", "kind": "write-file", "data": { "path": "/marks/x", "text": "x" }, "user": "fido" });
    assert_eq!(tried(&queue, "deputy", write).await, None);
    wait_for_state(&queue, "invoice-7", State::Finished, PATIENCE).await;
    assert!(site.path("marks/x").exists());
    host.stop().await;
    let clerk = site.route(json!({ "type": "write-file", "plugin": "clerk" }));
    let bounded = route("pattern", ".", &json!({ "depth": 3, "keys": "ours/" }));
    site.configure(json!({ "routes": [clerk, bounded] }));
    let host = site.start().await;
    submit(&queue, &[task("foreign", "fork", json!({})), task("bomb", "fork", json!({ "prefix": "ours/" }))]).await;
    // The root and 2 + 4 + 8.
    wait_for_finished(&queue, 2 + 2 + 14, LONG).await;
    let codes = codes(&queue).await;
    assert_eq!(codes.iter().filter(|code| *code == "not-granted").count(), 2, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| *code == "too-deep").count(), 16, "{codes:?}");
    host.stop().await;
}

async fn keys_of(queue: &Queue, state: State) -> Vec<String> {
    let filter = Filter { states: vec![state], limit: 100, ..Filter::default() };
    queue.list(&filter).await.unwrap().tasks.into_iter().map(|task| task.key).collect()
}

/// The codes with which forks were refused.
async fn codes(queue: &Queue) -> Vec<String> {
    let filter = Filter {
        states: vec![State::Finished],
        task_type: Some("fork".to_owned()),
        limit: 10_000,
        with_data: true,
        ..Filter::default()
    };
    let forks = queue.list(&filter).await.unwrap().tasks;
    let codes = forks.iter().flat_map(|fork| output(fork)["codes"].as_array().unwrap().clone());
    codes.map(|code| code.as_str().unwrap().to_owned()).collect()
}
