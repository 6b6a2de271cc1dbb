//! Follow-up tasks as a way to what was granted to others: another route's grants, a producer's key, another user's share, the queue itself.

use laelaps_queue::{NewTask, State, Submitted};
use laelaps_tests::{PATIENCE, all_tasks, guest, output, submit, task};
use serde_json::{Value, json};

use super::{Yard, attack};

/// Follow-ups of one task that have not ended, at most, where the route says nothing else.
const WAITING_MAX: usize = 10_000;

/// A yard whose attacker is the plugin `mallory`, without grants; `write-file` is the type of another plugin that may write.
async fn yard() -> Yard {
    let yard = Yard::open(&[], &[("mallory", guest("zoo")), ("victim", guest("zoo-2"))]).await;
    let folders = json!([{ "host": yard.site.path("marks"), "guest": "/marks", "writable": true }]);
    let routes = [
        json!({ "type": "write-file", "plugin": "victim", "grants": { "folders": folders } }),
        json!({ "pattern": "^(submit|descend|silent)$", "plugin": "mallory" }),
    ];
    yard.reconfigure(&routes).await
}

/// What the host said of one follow-up task, and that nothing was submitted.
async fn refusal(yard: &mut Yard, key: String, data: Value) -> String {
    let ended = yard.ends(&[attack(key, "submit", data)]).await;
    assert_eq!(ended[0].state, State::Finished, "{:?}", ended[0].error_message);
    let told = output(&ended[0]);
    assert_eq!(told["submitted"], 0, "{told}");
    told["refusals"][0]["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_plugin_cannot_submit_to_a_route_of_another_plugin() {
    let mut yard = yard().await;
    yard.survives("tasks for another plugin's route", async |yard, round| {
        let data = json!({ "key": format!("mallory/deputy-{round}"), "kind": "write-file", "data": { "path": "/marks/pwned" } });
        assert_eq!(refusal(yard, format!("deputy-{round}"), data).await, "not-granted");
        assert!(!yard.site.path("marks/pwned").exists());
    })
    .await;
}

#[tokio::test]
async fn a_plugin_cannot_take_a_producers_key_or_another_users_share() {
    let mut yard = yard().await;
    let mut number = 0;
    yard.survives("tasks under others' keys and users", async |yard, round| {
        number += 1;
        let invoice = format!("invoice-{number}");
        for (name, data) in [
            ("key", json!({ "key": invoice })),
            ("victims-key", json!({ "key": format!("victim/{invoice}") })),
            ("user", json!({ "key": format!("mallory/{invoice}"), "user": "somebody-else" })),
        ] {
            assert_eq!(refusal(yard, format!("{name}-{round}"), data).await, "not-granted", "{name}");
        }
        let answer = yard.queue.submit(task(&invoice, "silent", json!({}))).await.unwrap();
        assert_eq!(answer, Submitted::Created, "the producer's key is still free");
    })
    .await;
}

#[tokio::test]
async fn a_chain_of_follow_ups_ends_after_ten() {
    let mut yard = yard().await;
    yard.survives("a chain of follow-ups", async |yard, round| {
        let root = format!("mallory/chain-{round}");
        submit(&yard.queue, &[attack(&root, "descend", json!({ "width": 1 }))]).await;
        let refused = yard.until(PATIENCE, "the chain has ended", async |yard| {
            let chain: Vec<_> = all_tasks(&yard.queue).await.into_iter().filter(|task| task.key.starts_with(&root)).collect();
            assert!(chain.len() <= 12, "the chain has {} tasks", chain.len());
            if chain.iter().any(|task| !task.state.is_terminal()) {
                return Err(format!("{} tasks", chain.len()));
            }
            assert!(chain.iter().all(|task| task.state == State::Finished), "{chain:#?}");
            Ok(chain.iter().map(output).filter(|told| told["code"] == "too-deep").count())
        });
        assert_eq!(refused.await, 1, "the last one is told why");
    })
    .await;
}

/// A yard where one attempt may submit so many follow-ups.
async fn bombed(granted: u32) -> Yard {
    let yard = Yard::open(&[], &[("mallory", guest("zoo"))]).await;
    yard.reconfigure(&[json!({ "type": "descend", "plugin": "mallory", "follow_ups": granted, "retry_wait": 0 })]).await
}

/// Another task whose attempts submit `granted` each until there is no room left for one. `bombs` counts these tasks over all measurements.
async fn bomb(yard: &mut Yard, granted: usize, bombs: &mut usize) {
    *bombs += 1;
    let root = format!("mallory/bomb-{bombs}");
    // They are due in a thousand years, so that all of them wait.
    let data = json!({ "width": granted, "rounds": WAITING_MAX / granted + 1, "run_at_ms": 33_000_000_000_000_u64 });
    let ended = yard.ends(&[NewTask { max_attempts: None, ..attack(&root, "descend", data) }]).await;
    let told = output(&ended[0]);
    assert_eq!((&told["taken"], &told["code"]), (&json!(0), &json!("too-many-waiting")), "{told}");
    let stats = yard.queue.backend().stats().await.unwrap();
    assert_eq!(stats.scheduled, (WAITING_MAX * *bombs) as u64, "as many as one may have, of each: {stats:?}");
}

#[tokio::test]
async fn one_task_cannot_fill_the_queue_with_its_descendants() {
    // What good tasks notice is promised for what an attempt may submit by default.
    let granted = 1_000;
    let (mut yard, mut bombs) = (bombed(granted).await, 0);
    yard.survives("a task with descendants without end", async |yard, _| {
        bomb(yard, granted as usize, &mut bombs).await;
    })
    .await;
}

#[tokio::test]
async fn one_task_with_the_largest_grant_cannot_fill_the_queue_either() {
    // As many as an attempt may ever be granted are stored with its outcome in one transaction: ten thousand rows, for which SQLite's one writer
    // takes some tenths of a second. Whoever grants them lets good tasks wait for that; what is promised is the bound.
    let (mut yard, mut bombs) = (bombed(10_000).await, 0);
    for _ in 0..3 {
        bomb(&mut yard, 10_000, &mut bombs).await;
    }
    yard.is_unharmed("a task with the largest grant of descendants").await;
}
