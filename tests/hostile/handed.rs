//! Large things that a guest hands to its host, and much of them.

use laelaps_queue::{NewTask, State};
use laelaps_tests::guest;
use serde_json::json;

use super::{Yard, attack};

/// Tasks of the attacker at once: the more, the more memory.
const AT_ONCE: u32 = 6;

async fn yard(kinds: &str, members: serde_json::Value) -> Yard {
    let mut route = json!({ "pattern": format!("^({kinds})$"), "plugin": "zoo" });
    route.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    Yard::open_with(json!({ "processors": AT_ONCE + 1 }), &[route], &[("zoo", guest("zoo"))]).await
}

fn together(mut tasks: Vec<NewTask>) -> Vec<NewTask> {
    for task in &mut tasks {
        task.max_running = Some(AT_ONCE);
    }
    tasks
}

#[tokio::test]
async fn large_updates_of_several_tasks_at_once_cost_the_host_little() {
    let mut yard = yard("update-large", json!({ "time_limit": 86_400 })).await;
    yard.survives("large updates of several tasks at once", async |yard, round| {
        let tasks = (0..AT_ONCE).map(|number| attack(format!("large-{round}-{number}"), "update-large", json!({}))).collect();
        for ended in yard.ends(&together(tasks)).await {
            assert_eq!(ended.state, State::Finished, "{:?}", ended.error_message);
            let _ = yard.queue.backend().force_finish(&ended.key, std::time::Duration::ZERO).await;
        }
    })
    .await;
}

#[tokio::test]
async fn huge_texts_are_refused_in_the_call_or_end_the_attempt() {
    let mut yard = yard("huge-text|huge-output", json!({ "time_limit": 86_400 })).await;
    yard.survives("huge texts", async |yard, round| {
        let mut tasks: Vec<_> = ["log", "note", "setting", "key", "kind", "members"]
            .iter()
            .map(|to| attack(format!("huge-{to}-{round}"), "huge-text", json!({ "to": to })))
            .collect();
        tasks.push(attack(format!("huge-output-{round}"), "huge-output", json!({ "bytes": 30 << 20 })));
        for ended in yard.ends(&together(tasks)).await {
            if ended.state == State::Failed {
                let code = ended.error_code.as_deref().unwrap_or_default();
                assert!(["malformed", "memory", "trap"].contains(&code), "{}: {code} {:?}", ended.key, ended.error_message);
                assert!(!ended.error_message.unwrap_or_default().is_empty());
            }
        }
    })
    .await;
}

#[tokio::test]
async fn endless_output_is_bounded_with_and_without_lines() {
    let mut yard = yard("endless-line|stdout-flood|stderr-flood|log-flood|heartbeat-flood", json!({ "time_limit": 0.5 })).await;
    yard.survives("endless output", async |yard, round| {
        let kinds = ["endless-line", "stdout-flood", "stderr-flood", "log-flood", "heartbeat-flood"];
        let tasks = kinds.iter().map(|kind| attack(format!("{kind}-{round}"), kind, json!({}))).collect();
        for ended in yard.ends(&together(tasks)).await {
            assert_eq!((ended.state, ended.error_code.as_deref()), (State::Failed, Some("time-out")), "{}", ended.key);
        }
    })
    .await;
    let longest = yard.host.lines_with("").iter().map(String::len).max().unwrap_or(0);
    assert!(longest <= 128 << 10, "a line of the log has {longest} bytes");
}
