//! Large things that a guest hands to its host, and much of them.

use laelaps_queue::{NewTask, State, Task};
use laelaps_tests::guest;
use serde_json::json;

use super::{Yard, attack};

/// Tasks of the attacker at once where memory is looked at: the more, the more. How long good tasks take is measured beside one at a time, as
/// everywhere here: beside more than there are processors it would be the processors that are measured.
const AT_ONCE: u32 = 6;

async fn yard(kinds: &str, members: serde_json::Value) -> Yard {
    let mut route = json!({ "pattern": format!("^({kinds})$"), "plugin": "zoo" });
    route.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
    Yard::open_with(json!({ "processors": AT_ONCE + 1 }), &[route], &[("zoo", guest("zoo"))]).await
}

/// The attack one task at a time, beside good tasks; then all its tasks at once.
async fn survives(yard: &mut Yard, what: &str, tasks: impl Fn(String) -> Vec<NewTask>, is_as_it_must: impl Fn(&Task)) {
    yard.survives(what, async |yard, round| {
        yard.ends(&tasks(round.to_string())).await.iter().for_each(&is_as_it_must);
    })
    .await;
    let together = |task| NewTask { max_running: Some(AT_ONCE), ..task };
    let tasks: Vec<_> = tasks("together".to_owned()).into_iter().map(together).collect();
    yard.ends(&tasks).await.iter().for_each(&is_as_it_must);
    yard.is_unharmed(&format!("{what} at once")).await;
}

#[tokio::test]
async fn large_updates_of_several_tasks_cost_the_host_little() {
    let mut yard = yard("update-large", json!({ "time_limit": 86_400 })).await;
    let tasks = |round: String| {
        // One update of more than a million members keeps a host busy for seconds where nothing is optimised.
        let updates = json!({ "times": 1 });
        (0..AT_ONCE).map(|number| attack(format!("large-{round}-{number}"), "update-large", updates.clone())).collect::<Vec<_>>()
    };
    survives(&mut yard, "large updates", tasks, |ended| {
        assert_eq!(ended.state, State::Finished, "{:?}", ended.error_message);
    })
    .await;
}

#[tokio::test]
async fn huge_texts_are_refused_in_the_call_or_end_the_attempt() {
    let mut yard = yard("huge-text|huge-output", json!({ "time_limit": 86_400 })).await;
    let tasks = |round: String| {
        let mut tasks: Vec<_> = ["log", "note", "setting", "key", "kind", "user", "queue", "members"]
            .iter()
            .map(|to| attack(format!("huge-{to}-{round}"), "huge-text", json!({ "to": to })))
            .collect();
        tasks.push(attack(format!("huge-output-{round}"), "huge-output", json!({ "bytes": 30 << 20 })));
        tasks
    };
    survives(&mut yard, "huge texts", tasks, |ended| {
        if ended.state == State::Failed {
            let code = ended.error_code.as_deref().unwrap_or_default();
            let message = ended.error_message.as_deref().unwrap_or_default();
            assert!(["malformed", "memory", "trap"].contains(&code), "{}: {code} {message}", ended.key);
            assert!(!message.is_empty());
        }
    })
    .await;
}

#[tokio::test]
async fn endless_output_is_bounded_with_and_without_lines() {
    let kinds = ["endless-line", "stdout-flood", "stderr-flood", "log-flood", "heartbeat-flood"];
    let mut yard = yard(&kinds.join("|"), json!({ "time_limit": 0.5 })).await;
    let tasks = |round: String| kinds.iter().map(|kind| attack(format!("{kind}-{round}"), kind, json!({}))).collect::<Vec<_>>();
    survives(&mut yard, "endless output", tasks, |ended| {
        assert_eq!((ended.state, ended.error_code.as_deref()), (State::Failed, Some("time-out")), "{}", ended.key);
    })
    .await;
    let longest = yard.host.lines_with("").iter().map(String::len).max().unwrap_or(0);
    assert!(longest <= 128 << 10, "a line of the log has {longest} bytes");
}
