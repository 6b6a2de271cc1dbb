//! What follows each outcome, through the whole path: a component says it, the host settles it, the database holds it.

use std::time::{Duration, Instant};

use laelaps_queue::{Compression, NewTask, Queue, State, Task, Timestamp};
use laelaps_tests::{
    Database, Host, PATIENCE, Site, eventually, output, submit, task, wait_for_finished, wait_for_state, wait_for_stats,
};
use serde_json::{Value, json};

async fn zoo(section: Value) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(section);
    let queue = site.queue().await;
    let host = site.start().await;
    (site, queue, host)
}

async fn get(queue: &Queue, key: &str) -> Task {
    queue.backend().get(key).await.unwrap().unwrap()
}

/// The task has been settled so often that its history has this many rows and it waits again.
async fn waits_after(queue: &Queue, key: &str, attempts: usize) -> Task {
    eventually(PATIENCE, &format!("{key} waits after {attempts} attempts"), async || {
        let task = get(queue, key).await;
        let history = queue.backend().attempts(key).await.unwrap();
        if task.state == State::Waiting && history.len() == attempts { Ok(task) } else { Err(format!("{task:?}, {history:?}")) }
    })
    .await
}

laelaps_tests::on_every_database! {
    async fn the_handler_sees_the_task_as_it_was_submitted() {
        let (site, queue, host) = zoo(json!({})).await;
        drop(host);
        site.configure(json!({ "routes": [site.route(json!({ "type": "describe", "time_limit": 3_600, "settings": { "text": "t", "number": 7, "yes": true } }))] }));
        let host = site.start().await;
        let mut described = task("a key / with ümlaut", "describe", json!({ "setting": "yes", "deep": { "er": [null, 1.5] } }));
        described.user = Some("rex".to_owned());
        described.max_attempts = Some(9);
        described.compression = Compression::Gzip;
        submit(&queue, &[described]).await;
        let finished = wait_for_state(&queue, "a key / with ümlaut", State::Finished, PATIENCE).await;
        let seen = output(&finished);
        assert_eq!(seen["key"], "a key / with ümlaut");
        assert_eq!(seen["kind"], "describe");
        assert_eq!(seen["data"], json!({ "setting": "yes", "deep": { "er": [null, 1.5] } }));
        assert_eq!(seen["user"], "rex");
        assert_eq!((&seen["attempt"], &seen["max_attempts"]), (&json!(1), &json!(9)));
        assert_eq!(seen["created_at"], finished.created_at.0);
        assert_eq!(seen["settings"], json!({ "number": "7", "text": "t", "yes": "true" }));
        assert_eq!(seen["setting"], "true");
        let deadline = Timestamp(seen["deadline"].as_i64().unwrap());
        // The attempt may have begun some time after the submit. The clocks count milliseconds.
        let after = deadline.since(finished.created_at);
        assert!((Duration::from_millis(3_599_900)..Duration::from_secs(2 * 3_600)).contains(&after), "{seen}");
        host.stop().await;
    }

    async fn finish_retry_release_and_failures_settle_as_the_table_says() {
        // Longer than any test takes: what is said to wait does not run again while it is looked at.
        let (site, queue, host) = zoo(json!({ "retry_wait": 36_000 })).await;
        let day = json!({ "delay_ms": 86_400_000 });
        submit(
            &queue,
            &[
                task("finish", "finish", json!({ "output": { "a": 1 }, "retention_ms": 3_600_000 })),
                task("retry", "retry", json!({})),
                task("retry-delay", "retry", day.clone()),
                task("release-delay", "release", day),
                task("fail", "fail", json!({ "code": "bad-moon", "message": "it rises" })),
                task("reject", "fail", json!({ "kind": "reject", "code": "bad-address" })),
                task("panic", "panic", json!({ "message": "oh no" })),
                task("huge", "huge-output", json!({})),
                task("flaky", "flaky", json!({})),
            ],
        )
        .await;

        let finish = wait_for_state(&queue, "finish", State::Finished, PATIENCE).await;
        assert_eq!(output(&finish), json!({ "a": 1 }));
        let kept = finish.retained_until.unwrap().since(finish.finished_at.unwrap());
        // PerfectQueue's table has room for whole seconds only.
        let rounded = if site.database() == Database::PerfectQueue { Duration::from_secs(1) } else { Duration::ZERO };
        assert!(kept.abs_diff(Duration::from_secs(3_600)) <= rounded, "the handler's retention: {kept:?}");

        for (key, wait_s, attempts) in [
            ("retry", 36_000, 1),
            ("retry-delay", 86_400, 1),
            ("release-delay", 86_400, 0),
            ("fail", 36_000, 1),
            ("panic", 36_000, 1),
            ("huge", 36_000, 1),
            ("flaky", 36_000, 1),
        ] {
            let waiting = waits_after(&queue, key, 1).await;
            assert_eq!(waiting.attempts, attempts, "{key}: counted attempts");
            let ended = queue.backend().attempts(key).await.unwrap()[0].ended_at;
            assert_eq!(waiting.run_at.since(ended).as_secs(), wait_s, "{key}: waits");
        }
        let fail = get(&queue, "fail").await;
        assert_eq!((fail.error_code.as_deref(), fail.error_message.as_deref()), (Some("bad-moon"), Some("it rises")));
        let panic = get(&queue, "panic").await;
        assert!(panic.error_message.is_some_and(|message| message.contains("unreachable")), "the trap says what it was");
        host.logged("oh no", PATIENCE).await;
        let huge = queue.backend().attempts("huge").await.unwrap();
        assert_eq!(huge[0].event, "malformed");
        let reject = wait_for_state(&queue, "reject", State::Failed, PATIENCE).await;
        assert_eq!((reject.attempts, reject.error_code.as_deref()), (1, Some("bad-address")));

        // A retry by hand: due now, on its second attempt.
        queue.backend().retry("flaky").await.unwrap();
        let flaky = wait_for_state(&queue, "flaky", State::Finished, PATIENCE).await;
        assert_eq!(output(&flaky)["attempt"], 2);
        host.stop().await;
    }

    async fn a_task_out_of_attempts_ends_as_failed() {
        let (_site, queue, host) = zoo(json!({ "retry_wait": 0.01, "max_attempts": 4 })).await;
        let mut own = task("own", "fail", json!({}));
        own.max_attempts = Some(2);
        submit(&queue, &[own, task("queue-s", "retry", json!({}))]).await;
        assert_eq!(wait_for_state(&queue, "own", State::Failed, PATIENCE).await.attempts, 2);
        assert_eq!(wait_for_state(&queue, "queue-s", State::Failed, PATIENCE).await.attempts, 4);
        host.stop().await;
    }

    async fn updated_data_survives_the_trap_that_follows() {
        let (_site, queue, host) = zoo(json!({ "retry_wait": 36_000 })).await;
        let data = json!({ "kept": 1, "members": { "step": 2, "type": "evil", "key": "evil" } });
        let mut compressed = task("compressed", "update-then-panic", data.clone());
        compressed.compression = Compression::Gzip;
        submit(&queue, &[task("plain", "update-then-panic", data), compressed]).await;
        for key in ["plain", "compressed"] {
            let waiting = waits_after(&queue, key, 1).await;
            let data: Value = serde_json::from_slice(&waiting.data.unwrap()).unwrap();
            assert_eq!((&data["kept"], &data["step"]), (&json!(1), &json!(2)), "{key}");
            assert_eq!((waiting.key.as_str(), waiting.task_type.as_str()), (key, "update-then-panic"), "key and type are not data");
        }
        submit(&queue, &[task("no-object", "update", json!({ "raw": "[1]" })), task("no-json", "update", json!({ "raw": "{" }))])
            .await;
        for key in ["no-object", "no-json"] {
            let rejected = wait_for_state(&queue, key, State::Failed, PATIENCE).await;
            assert_eq!(rejected.error_code.as_deref(), Some("invalid-data"), "{key}: the call answers the handler");
        }
        host.stop().await;
    }

    async fn follow_ups_come_with_finish_retry_and_release_and_with_nothing_else() {
        let (site, queue, host) = zoo(json!({ "retry_wait": 36_000 })).await;
        let parent = |then: &str| task(then, "submit", json!({ "count": 3, "then": then }));
        submit(&queue, &[parent("finish"), parent("retry"), parent("release"), parent("fail"), parent("panic")]).await;
        for key in ["finish", "retry", "release"] {
            wait_for_state(&queue, key, State::Finished, PATIENCE).await;
            for number in 0..3 {
                wait_for_state(&queue, &format!("{key}-follow-up-{number}"), State::Finished, PATIENCE).await;
            }
        }
        for key in ["fail", "panic"] {
            waits_after(&queue, key, 1).await;
        }
        host.stop().await;
        // One that runs into its time limit; what the others need has no limit.
        site.configure(json!({ "retry_wait": 36_000, "routes": [site.route(json!({ "pattern": ".", "time_limit": 2 }))] }));
        let host = site.start().await;
        submit(&queue, &[parent("spin")]).await;
        waits_after(&queue, "spin", 1).await;
        for key in ["fail", "panic", "spin"] {
            assert!(queue.backend().get(&format!("{key}-follow-up-0")).await.unwrap().is_none(), "{key} drops its follow-ups");
        }
        host.stop().await;
    }

    async fn a_follow_up_is_a_task_like_any_other_and_a_bad_one_is_refused_in_the_call() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        // Where PerfectQueue's handlers were, any key and user is granted without a word.
        if site.database() != Database::PerfectQueue {
            let grants = json!({ "follow_ups": { "types": "any", "users": "any", "keys": "any" } });
            site.configure(json!({ "routes": [{ "pattern": ".", "plugin": "zoo", "grants": grants }] }));
        }
        let (queue, host) = (site.queue().await, site.start().await);
        submit(
            &queue,
            &[
                task("there", "silent", json!({})),
                task(
                    "options",
                    "submit",
                    json!({ "key": "child", "kind": "echo", "data": { "x": 1 }, "user": "rex", "max_running": 5, "max_attempts": 3,
                "run_at_ms": 2_000_000_000_000u64, "gzip": true }),
                ),
                task("again", "submit", json!({ "key": "there" })),
                task("no-key", "submit", json!({ "key": "" })),
                task("long-key", "submit", json!({ "key": "k".repeat(256) })),
                task("no-object", "submit", json!({ "raw": "[]" })),
                task("late", "submit", json!({ "key": "late child", "run_at_ms": 4_000_000_000_000u64 })),
                task("urgent", "submit", json!({ "key": "urgent child", "priority": -5 })),
                task("too-urgent", "submit", json!({ "key": "too urgent child", "priority": -101 })),
                task("flood", "submit-flood", json!({})),
            ],
        )
        .await;
        // PerfectQueue's times end in January 2038, and its table has no priorities.
        let is_wide = site.database() != Database::PerfectQueue;
        let wide = u32::from(is_wide);
        let taken = [("options", 1), ("again", 1), ("no-key", 0), ("long-key", 0), ("no-object", 0), ("late", wide)];
        for (key, submitted) in taken.into_iter().chain([("urgent", wide), ("too-urgent", 0)]) {
            let finished = wait_for_state(&queue, key, State::Finished, PATIENCE).await;
            assert_eq!(output(&finished)["submitted"], submitted, "{key}: {}", output(&finished));
        }
        let codes = |key: &'static str| {
            let queue = &queue;
            async move { output(&get(queue, key).await)["refusals"][0]["code"].as_str().unwrap().to_owned() }
        };
        assert_eq!(codes("no-key").await, "invalid-key");
        assert_eq!(codes("long-key").await, "invalid-key");
        assert_eq!(codes("no-object").await, "invalid-data");
        assert_eq!(codes("too-urgent").await, "invalid-data");
        if is_wide {
            assert_eq!(wait_for_state(&queue, "urgent child", State::Finished, PATIENCE).await.priority, -5);
        } else {
            assert_eq!(codes("late").await, "invalid-data");
            assert_eq!(codes("urgent").await, "invalid-data");
        }
        let flood = wait_for_state(&queue, "flood", State::Finished, PATIENCE).await;
        assert_eq!((&output(&flood)["code"], &output(&flood)["taken"]), (&json!("too-many"), &json!(1_000)));

        let child = get(&queue, "child").await;
        assert_eq!((child.state, child.task_type.as_str(), child.user.as_deref()), (State::Waiting, "echo", Some("rex")));
        assert_eq!((child.max_running, child.max_attempts, child.run_at), (Some(5), Some(3), Timestamp(2_000_000_000_000)));
        assert_eq!(child.data.unwrap(), br#"{"x":1}"#);
        host.stop().await;
    }

    async fn a_scheduled_task_runs_when_its_time_has_come_and_not_before() {
        let (_site, queue, host) = zoo(json!({})).await;
        let now = queue.backend().now().await.unwrap();
        let mut soon = task("soon", "silent", json!({}));
        soon.run_at = Some(now.plus(Duration::from_millis(1_500)));
        let mut past = task("past", "silent", json!({}));
        past.run_at = Some(Timestamp(0));
        submit(&queue, &[soon.clone(), past]).await;
        wait_for_state(&queue, "past", State::Finished, PATIENCE).await;
        let finished = wait_for_state(&queue, "soon", State::Finished, PATIENCE).await;
        assert!(finished.finished_at.unwrap() >= soon.run_at.unwrap(), "{finished:?}");
        host.stop().await;
    }

    async fn a_user_never_has_more_running_than_its_tasks_allow() {
        let (site, queue, host) = zoo(json!({ "processors": 6 })).await;
        let tasks = (0..6).map(|number| {
            let mut limited = task(format!("limited-{number}"), "silent", json!({ "mark": "/marks/limited", "gate": "/marks/gate" }));
            limited.user = Some("rex".to_owned());
            limited.max_running = Some(2);
            limited
        });
        submit(&queue, &tasks.collect::<Vec<_>>()).await;
        eventually(PATIENCE, "two run", async || {
            let begun = site.marks("limited").len();
            if begun >= 2 { Ok(()) } else { Err(begun.to_string()) }
        })
        .await;
        // Others pass by while they wait.
        submit(&queue, &(0..10).map(|number| task(format!("other-{number}"), "silent", json!({}))).collect::<Vec<_>>()).await;
        wait_for_finished(&queue, 10, PATIENCE).await;
        assert_eq!(site.marks("limited").len(), 2);
        site.open_gate("gate");
        wait_for_finished(&queue, 16, PATIENCE).await;
        host.stop().await;
    }

    async fn the_first_route_that_matches_takes_the_task() {
        let (site, queue, host) = zoo(json!({})).await;
        drop(host);
        let named = |changes: Value, name: &str| {
            let mut route = site.route(changes);
            route["settings"] = json!({ "name": name });
            route
        };
        site.configure(json!({ "routes": [
            named(json!({ "type": "describe" }), "exact"),
            named(json!({ "pattern": "^desc" }), "pattern"),
            named(json!({ "pattern": "." }), "rest"),
        ] }));
        let host = site.start().await;
        submit(&queue, &[task("one", "describe", json!({}))]).await;
        let one = wait_for_state(&queue, "one", State::Finished, PATIENCE).await;
        assert_eq!(output(&one)["settings"]["name"], "exact");
        host.stop().await;
    }

    async fn progress_that_a_handler_reports_is_seen_while_it_runs() {
        let (_site, queue, host) = zoo(json!({})).await;
        submit(&queue, &[task("beats", "heartbeat", json!({ "count": 100_000, "interval_ms": 10 }))]).await;
        let progress = eventually(PATIENCE, "progress is seen", async || {
            get(&queue, "beats").await.progress.ok_or_else(|| "none yet".to_owned())
        })
        .await;
        assert_eq!((progress.total, progress.note.starts_with("step ")), (Some(100_000), true));
        host.signal(laelaps_tests::Signal::QUIT);
    }

    async fn nothing_that_a_handler_writes_passes_for_the_host_s_own_log() {
        let (_site, queue, host) = zoo(json!({ "max_attempts": 1 })).await;
        let forged = "FORGED ERROR laelaps::service: all is lost";
        submit(
            &queue,
            &[
                task("logs", "log", json!({ "text": format!("a\n{forged}\r{forged}\u{1b}[31m") })),
                task("fails", "fail", json!({ "message": format!("b\n{forged}") })),
                task("panics", "panic", json!({ "message": format!("c\n{forged}") })),
            ],
        )
        .await;
        wait_for_stats(&queue, "they ran", PATIENCE, |stats| stats.finished == 1 && stats.failed == 2).await;
        host.logged_times(forged, 7, PATIENCE).await;
        for line in host.lines_with("FORGED") {
            let kept_apart = line.starts_with("    | ") || line.contains(" guest: ");
            assert!(kept_apart && !line.contains('\u{1b}') && !line.contains('\r'), "{line:?}");
        }
        host.stop().await;
    }

    async fn cancelling_a_running_task_stops_its_handler() {
        let (site, queue, host) = zoo(json!({ "processors": 1, "task_heartbeat_interval": 0.1 })).await;
        for (key, finish) in [("cancelled", false), ("forced", true)] {
            submit(&queue, &[task(key, "wait-cancelled", json!({ "mark": "/marks/begun", "deaf": true }))]).await;
            eventually(PATIENCE, "it runs", async || {
                if site.marks("begun").contains(&format!("{key} 1")) { Ok(()) } else { Err(String::new()) }
            })
            .await;
            if finish {
                queue.backend().force_finish(key, Duration::from_secs(60)).await.unwrap();
            } else {
                queue.backend().cancel(key, Duration::from_secs(60)).await.unwrap();
            }
            submit(&queue, &[task(format!("after-{key}"), "silent", json!({}))]).await;
            wait_for_state(&queue, &format!("after-{key}"), State::Finished, PATIENCE).await;
        }
        assert_eq!(get(&queue, "cancelled").await.state, State::Cancelled);
        assert_eq!(get(&queue, "forced").await.state, State::Finished);
        assert_eq!(site.marks("begun").len(), 2, "neither ran again");
        host.stop().await;
    }

    async fn a_lease_is_renewed_for_as_long_as_the_handler_runs() {
        let (site, queue, host) = zoo(json!({ "task_heartbeat_interval": 0.2 })).await;
        submit(&queue, &[task("long", "silent", json!({ "mark": "/marks/begun", "gate": "/marks/gate" }))]).await;
        let mut ends = Timestamp(0);
        // The first is the claim's.
        for renewal in 0..=4 {
            ends = eventually(PATIENCE, &format!("the end of its lease has moved {renewal} times"), async || {
                let until = get(&queue, "long").await.until;
                until.filter(|until| *until > ends).ok_or_else(|| format!("{until:?}, before {ends:?}"))
            })
            .await;
        }
        site.open_gate("gate");
        let long = wait_for_state(&queue, "long", State::Finished, PATIENCE).await;
        assert_eq!((long.attempts, long.lost, site.marks("begun").len()), (1, 0, 1), "one attempt");
        host.stop().await;
    }
}

/// On PerfectQueue's table a type without route is left to other workers.
mod unrouted {
    use super::*;

    laelaps_tests::on_every_native_database! {
        async fn an_unknown_type_waits_with_a_warning_until_a_route_takes_it() {
            let (site, queue, host) = zoo(json!({})).await;
            site.configure(json!({ "routes": [site.route(json!({ "type": "echo" }))] }));
            host.signal(laelaps_tests::Signal::USR1);
            host.logged_times("ready", 2, PATIENCE).await;
            let submitted = Instant::now();
            submit(&queue, &[task("stranger", "silent", json!({}))]).await;
            let line = host.logged("wait for a plugin", PATIENCE).await;
            assert!(line.contains("WARN") && line.contains("no route takes the type"), "{line}");
            submit(&queue, &[task("known", "echo", json!({}))]).await;
            wait_for_state(&queue, "known", State::Finished, PATIENCE).await;
            assert_eq!(get(&queue, "stranger").await.state, State::Waiting);
            site.configure(json!({}));
            host.signal(laelaps_tests::Signal::USR1);
            let stranger = wait_for_state(&queue, "stranger", State::Finished, PATIENCE).await;
            assert_eq!((stranger.attempts, stranger.lost), (1, 0), "the waiting counted for nothing");
            assert_eq!(queue.backend().attempts("stranger").await.unwrap().len(), 1, "nothing happened to it before");
            let minutes = usize::try_from(submitted.elapsed().as_secs() / 60).unwrap();
            assert!(host.lines_with("wait for a plugin").len() <= 1 + minutes, "one warning a minute, not one for every claim");
            host.stop().await;
        }

        async fn hosts_with_different_routes_share_a_queue_and_each_runs_its_own() {
            let site = Site::new().await;
            site.plug_guest("zoo");
            let queue = site.queue().await;
            let mut hosts = Vec::new();
            for name in ["echo", "silent"] {
                let routes = [site.route(json!({ "type": name }))];
                site.configure(json!({ "retry_wait": 36_000, "host_name": name, "routes": routes }));
                hosts.push(site.start().await);
            }
            eventually(PATIENCE, "both say what they serve", async || {
                let hosts = queue.backend().hosts().await.unwrap();
                if hosts.iter().filter(|host| host.serves.is_some()).count() == 2 { Ok(()) } else { Err(format!("{hosts:?}")) }
            })
            .await;
            let of = |number: usize| {
                let user = number.is_multiple_of(3).then(|| format!("user {}", number % 5));
                let name = if number.is_multiple_of(2) { "echo" } else { "silent" };
                NewTask { user, ..task(format!("{number}"), name, json!({})) }
            };
            for batch in 0..4 {
                submit(&queue, &(batch * 50..(batch + 1) * 50).map(of).collect::<Vec<_>>()).await;
            }
            wait_for_finished(&queue, 200, PATIENCE).await;
            for number in 0..200 {
                let key = number.to_string();
                let finished = get(&queue, &key).await;
                assert_eq!((finished.attempts, finished.lost), (1, 0), "{key}");
                assert_eq!(queue.backend().attempts(&key).await.unwrap().len(), 1, "{key} was begun by nobody else");
            }
            for host in hosts {
                assert!(host.lines_with("wait for a plugin").is_empty(), "another one serves what this one does not");
                host.stop().await;
            }
        }
    }
}
