//! Queues: a host serves those that it names, no further than their shares, and a task and its follow-ups stay where they were put.

use laelaps_queue::{NewTask, Queue, State, Task};
use laelaps_tests::{
    Database, LONG, PATIENCE, Signal, Site, eventually, guest, output, submit, task, wait_for_finished, wait_for_state,
    wait_for_stats,
};
use serde_json::{Value, json};

fn of(queue: &str, task: NewTask) -> NewTask {
    NewTask { queue: Some(queue.to_owned()), ..task }
}

async fn get(queue: &Queue, key: &str) -> Task {
    queue.backend().get(key).await.unwrap().unwrap()
}

/// Waits until so many guests have left this mark.
async fn have_begun(site: &Site, mark: &str, times: usize) {
    eventually(LONG, &format!("{times} have left the mark {mark}"), async || {
        let begun = site.marks(mark).len();
        if begun == times { Ok(()) } else { Err(format!("{begun}")) }
    })
    .await;
}

laelaps_tests::on_every_native_database! {
    async fn a_queue_never_has_more_running_than_its_share_while_others_go_on() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": 4, "task_prefetch": 8, "queues": { "mail": { "processors": 1 }, "default": {} } }));
        let queue = site.queue().await;
        let mail: Vec<NewTask> = (0..5)
            .map(|number| {
                let data = json!({ "mark": "/marks/mail", "gate": format!("/marks/gate-{number}") });
                let user = (number % 2 == 1).then(|| "ann".to_owned());
                NewTask { priority: number, user, max_running: None, ..of("mail", task(format!("mail-{number}"), "silent", data)) }
            })
            .collect();
        submit(&queue, &mail).await;
        let host = site.start().await;
        let mut others = 0;
        for round in 1..=5 {
            have_begun(&site, "mail", round).await;
            let more: Vec<NewTask> = (0..40).map(|number| task(format!("default-{round}-{number}"), "silent", json!({}))).collect();
            submit(&queue, &more).await;
            others += more.len();
            wait_for_finished(&queue, others + round - 1, PATIENCE).await;
            assert_eq!(site.marks("mail").len(), round, "the others of mail wait for this one");
            // What is claimed ahead counts as running.
            assert_eq!(queue.stats().await.unwrap().running, 1);
            let begun = site.marks("mail")[round - 1].split(' ').next().unwrap().replace("mail-", "gate-");
            site.open_gate(&begun);
        }
        wait_for_finished(&queue, others + 5, PATIENCE).await;
        host.stop().await;
    }

    async fn a_host_leaves_the_queues_alone_that_it_does_not_name_and_another_takes_them() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "queues": { "mail": {} }, "host_name": "mailer" }));
        let queue = site.queue().await;
        let tasks = |name: &str| -> Vec<NewTask> { (0..10).map(|number| of(name, task(format!("{name}-{number}"), "silent", json!({})))).collect() };
        submit(&queue, &tasks("default")).await;
        submit(&queue, &tasks("reports")).await;
        let mailer = site.start().await;
        submit(&queue, &tasks("mail")).await;
        wait_for_finished(&queue, 10, PATIENCE).await;
        for name in ["default", "reports"] {
            for number in 0..10 {
                let left = get(&queue, &format!("{name}-{number}")).await;
                assert_eq!((left.state, left.attempts, left.queue.as_str()), (State::Waiting, 0, name));
            }
        }
        // Without `queues` a host serves all.
        site.configure(json!({ "host_name": "everything" }));
        let everything = site.start().await;
        wait_for_finished(&queue, 30, PATIENCE).await;
        everything.stop().await;
        mailer.stop().await;
    }

    async fn a_restart_takes_over_which_queues_a_host_serves() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "queues": { "mail": {} } }));
        let queue = site.queue().await;
        let host = site.start().await;
        submit(&queue, &[task("waits", "silent", json!({})), of("mail", task("runs", "silent", json!({})))]).await;
        wait_for_state(&queue, "runs", State::Finished, PATIENCE).await;
        // One that is refused leaves the old one in force.
        site.configure(json!({ "queues": {} }));
        host.signal(Signal::HUP);
        host.logged("found no queue", PATIENCE).await;
        submit(&queue, &[of("mail", task("runs too", "silent", json!({})))]).await;
        wait_for_state(&queue, "runs too", State::Finished, PATIENCE).await;
        assert_eq!(get(&queue, "waits").await.state, State::Waiting);
        site.configure(json!({ "queues": { "default": {} } }));
        host.signal(Signal::HUP);
        wait_for_state(&queue, "waits", State::Finished, PATIENCE).await;
        host.stop().await;
    }

    async fn a_follow_up_waits_in_its_tasks_queue_unless_its_route_grants_another() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let grants = json!({ "follow_ups": { "queues": ["reports"] } });
        site.configure(json!({
            "queues": { "mail": { "processors": 1 } },
            "routes": [{ "type": "submit", "plugin": "zoo", "grants": grants }, { "pattern": ".", "plugin": "zoo" }],
        }));
        let (queue, host) = (site.queue().await, site.start().await);
        // By the frozen function, by the resource, and where a grant is needed.
        let asked = [
            ("plain", json!({}), None),
            ("urgent", json!({ "priority": -1 }), None),
            ("own", json!({ "queue": "mail" }), None),
            ("granted", json!({ "queue": "reports" }), None),
            ("foreign", json!({ "queue": "video" }), Some("not-granted")),
            ("back", json!({ "queue": "default" }), Some("not-granted")),
            ("empty", json!({ "queue": "" }), Some("invalid-data")),
            ("wrong", json!({ "queue": "two words" }), Some("invalid-data")),
            ("long", json!({ "queue": "x".repeat(65) }), Some("invalid-data")),
        ];
        for (key, data, refused) in asked {
            submit(&queue, &[of("mail", task(key, "submit", data))]).await;
            let told = output(&wait_for_state(&queue, key, State::Finished, PATIENCE).await);
            assert_eq!(told["refusals"][0]["code"].as_str(), refused, "{key}: {told}");
        }
        for key in ["plain", "urgent", "own"] {
            assert_eq!(wait_for_state(&queue, &format!("{key}-follow-up-0"), State::Finished, PATIENCE).await.queue, "mail");
        }
        let granted = get(&queue, "granted-follow-up-0").await;
        assert_eq!((granted.state, granted.queue.as_str()), (State::Waiting, "reports"), "nobody serves that queue");
        // Nothing is granted where nothing is said, and a handler is told its task's queue.
        site.configure(json!({}));
        host.stop().await;
        let host = site.start().await;
        submit(&queue, &[of("mail", task("ungranted", "submit", json!({ "queue": "reports" }))), of("mail", task("describe", "describe", json!({})))]).await;
        submit(&queue, &[task("describe default", "describe", json!({}))]).await;
        let told = output(&wait_for_state(&queue, "ungranted", State::Finished, PATIENCE).await);
        assert_eq!(
            told["refusals"][0],
            json!({ "number": 0, "code": "not-granted", "message":
                "the queue \"reports\" is neither the task's own, \"mail\", nor among those that follow_ups of the route's grants names" })
        );
        for (key, expected) in [("describe", "mail"), ("describe default", "default")] {
            assert_eq!(output(&wait_for_state(&queue, key, State::Finished, PATIENCE).await)["queue"], expected);
        }
        host.stop().await;
    }

    async fn the_command_line_puts_tasks_into_queues_and_tells_them() {
        let site = Site::new().await;
        let queue = site.queue().await;
        let laelaps = async |arguments: &[&str]| site.laelaps([&["-c", "laelaps.yml"], arguments].concat()).await.success().stdout;
        laelaps(&["submit", "b", "silent", "{}"]).await;
        assert!(!laelaps(&["stats"]).await.contains("queue"), "with the default queue alone nothing is said of queues");
        laelaps(&["submit", "a", "silent", "{}", "--queue", "mail"]).await;
        let lines = "{\"key\":\"c\",\"type\":\"silent\",\"data\":{}}\n{\"key\":\"d\",\"type\":\"silent\",\"data\":{},\"queue\":\"default\"}\n";
        let submitted = site.laelaps_with_input(["-c", "laelaps.yml", "submit", "--file", "-", "--queue", "mail"], lines).await;
        assert!(submitted.success().stdout.starts_with("2 submitted"));
        for (key, expected) in [("a", "mail"), ("b", "default"), ("c", "mail"), ("d", "default")] {
            assert_eq!(get(&queue, key).await.queue, expected, "{key}");
            let shown: Value = serde_json::from_str(&laelaps(&["show", key, "--json"]).await).unwrap();
            assert_eq!(shown["queue"], expected);
            assert!(laelaps(&["show", key]).await.lines().any(|line| line.split_whitespace().eq(["queue", expected])), "{key}");
        }
        for (name, expected) in [("mail", "a c"), ("default", "b d"), ("nobody", "")] {
            let listed = laelaps(&["list", "--queue", name, "--json"]).await;
            let keys: Vec<String> = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["key"].as_str().unwrap().to_owned()).collect();
            assert_eq!(keys.join(" "), expected);
        }
        laelaps(&["cancel", "d"]).await;
        let stats: Value = serde_json::from_str(&laelaps(&["stats", "--json"]).await).unwrap();
        assert_eq!(stats["queues"], json!([["mail", 2], ["default", 1]]));
        let told = laelaps(&["stats"]).await;
        for expected in [["mail", "2"], ["default", "1"]] {
            assert!(told.lines().any(|line| line.split_whitespace().eq(expected)), "{told}");
        }
        site.configure(json!({ "processors": 4, "queues": { "mail": { "processors": 3 }, "default": {} } }));
        let checked = laelaps(&["check"]).await;
        assert!(checked.contains("queues         default, mail (at most 3)\n"), "{checked}");
    }

    async fn stats_and_check_name_the_types_that_no_live_host_serves() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let (routes, absent) = (json!([{ "type": "silent", "plugin": "zoo" }, { "pattern": "^later", "plugin": "absent" }]), "absent");
        site.configure(json!({ "queues": { "mail": {}, "default": {} }, "routes": routes }));
        let queue = site.queue().await;
        let held = |queue: &str, name: &str, key: &str| of(queue, task(key, name, json!({}))).on_hold();
        submit(&queue, &[held("mail", "silent", "a"), held("mail", "later/1", "b"), held("mail", "later/1", "c"), held("video", "silent", "d"), held("default", "other", "e")]).await;
        let stats = async || -> Value {
            serde_json::from_str(&site.laelaps(["-c", "laelaps.yml", "stats", "--json"]).await.success().stdout).unwrap()
        };
        let row = |queue: &str, name: &str, tasks: u64| json!({ "queue": queue, "type": name, "tasks": tasks });
        let all = [row("mail", "later/1", 2), row("default", "other", 1), row("mail", "silent", 1), row("video", "silent", 1)];
        assert_eq!(stats().await["unserved"], json!(all), "no host is there");
        let check = async || site.laelaps(["-c", "laelaps.yml", "check"]).await.stderr;
        assert!(!check().await.contains("no live host serves"), "before the first host there is nothing to warn of");

        let host = site.start().await;
        let becomes = async |expected: Value| {
            eventually(PATIENCE, "the host says what it serves", async || {
                let unserved = stats().await["unserved"].take();
                if unserved == expected { Ok(()) } else { Err(unserved.to_string()) }
            })
            .await;
        };
        becomes(json!([all[0], all[1], all[3]])).await;
        let serves = stats().await["hosts"][0]["serves"].take();
        let of_zoo = json!({ "type": "silent", "plugin": "zoo", "is_loaded": true });
        let of_absent = json!({ "pattern": "^later", "plugin": absent, "is_loaded": false });
        assert_eq!(serves, json!({ "queues": ["default", "mail"], "routes": [of_zoo, of_absent] }));
        let told = site.laelaps(["-c", "laelaps.yml", "stats"]).await.success().stdout;
        let head = ["served", "by", "no", "live", "host", "queue", "waiting", "or", "running"];
        for expected in [&head[..], &["later/1", "mail", "2"], &["other", "default", "1"], &["silent", "video", "1"]] {
            assert!(told.lines().any(|line| line.split_whitespace().eq(expected.iter().copied())), "{expected:?}: {told}");
        }
        let warned = check().await;
        let expected = "3 types that no live host serves: later/1 in queue mail (2 tasks), other in queue default (1 task), silent in queue video (1 task)";
        assert!(warned.contains(expected), "{warned}");

        // A plugin that is dropped is served from then on.
        site.plug(absent, &guest("zoo"));
        becomes(json!([all[1], all[3]])).await;
        host.stop().await;
        assert_eq!(stats().await["unserved"], json!(all));
    }

    async fn a_follow_up_of_a_queue_counts_on_its_users_account_there() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": 4 }));
        let (queue, host) = (site.queue().await, site.start().await);
        let ann = |name: &str, key: &str| {
            let data = json!({ "mark": format!("/marks/{name}"), "gate": "/marks/gate" });
            NewTask { user: Some("ann".to_owned()), max_running: Some(1), ..of(name, task(key, "silent", data)) }
        };
        submit(&queue, &[ann("mail", "mail 1"), ann("mail", "mail 2"), ann("reports", "reports 1"), ann("reports", "reports 2")]).await;
        // One of each queue at once, and no more.
        have_begun(&site, "mail", 1).await;
        have_begun(&site, "reports", 1).await;
        wait_for_stats(&queue, "two run", PATIENCE, |stats| stats.running == 2).await;
        submit(&queue, &[task("other", "silent", json!({}))]).await;
        wait_for_state(&queue, "other", State::Finished, PATIENCE).await;
        assert_eq!((site.marks("mail").len(), site.marks("reports").len()), (1, 1));
        site.open_gate("gate");
        wait_for_finished(&queue, 5, PATIENCE).await;
        host.stop().await;
    }
}

/// On SQLite a dead host's tasks come back at once.
#[tokio::test]
async fn a_task_that_runs_alone_runs_on_a_host_of_its_queue_and_others_of_it_wait_for_its_end() {
    let site = Site::new().await;
    assert_eq!(site.database(), Database::Sqlite);
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let held = |queue: &str, key: &str| of(queue, task(key, "silent", json!({ "mark": "/marks/begun", "gate": "/marks/gate" })));
    submit(&queue, &[held("mail", "suspect")]).await;
    site.configure(json!({ "queues": { "mail": { "processors": 1 }, "default": {} } }));
    for deaths in 1..=2 {
        let mut host = site.start().await;
        have_begun(&site, "begun", deaths).await;
        host.kill().await;
    }
    // A host of another queue neither runs it nor comes to an end for it.
    site.configure(json!({ "queues": { "default": { "processors": 1 } } }));
    let other = site.start().await;
    submit(&queue, &[task("other", "silent", json!({}))]).await;
    wait_for_state(&queue, "other", State::Finished, PATIENCE).await;
    assert_eq!(get(&queue, "suspect").await.state, State::Waiting);
    other.stop().await;
    site.configure(json!({ "queues": { "mail": { "processors": 1 }, "default": {} } }));
    let host = site.start().await;
    have_begun(&site, "begun", 3).await;
    submit(&queue, &[task("waits", "silent", json!({}))]).await;
    site.open_gate("gate");
    for key in ["suspect", "waits"] {
        wait_for_state(&queue, key, State::Finished, PATIENCE).await;
    }
    let (suspect, waits) = (get(&queue, "suspect").await, get(&queue, "waits").await);
    assert!(suspect.finished_at <= waits.finished_at, "it ran alone");
    host.stop().await;
}
