//! The table of signals, line by line (docs/signals.md).

use std::fs;

use laelaps_queue::{Queue, State};
use laelaps_tests::{
    Host, LONG, PATIENCE, Signal, Site, digest, eventually, guest, output, scaled, submit, task, wait_for_finished,
    wait_for_state, wait_for_stats, with_edition,
};
use serde_json::{Value, json};

/// A site with the zoo and a host; its one processor is busy with the task `held`, of this type and data.
async fn busy(kind: &str, mut data: Value, section: Value) -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let mut all = json!({ "processors": 1 });
    all.as_object_mut().unwrap().extend(section.as_object().unwrap().clone());
    site.configure(all);
    let queue = site.queue().await;
    data["mark"] = json!("/marks/held");
    submit(&queue, &[task("held", kind, data)]).await;
    let host = site.start().await;
    begun(&site, 1).await;
    (site, queue, host)
}

/// The held task has begun so often.
async fn begun(site: &Site, times: usize) {
    eventually(PATIENCE, &format!("the held task has begun {times} times"), async || {
        let marks = site.marks("held");
        if marks.len() == times { Ok(()) } else { Err(format!("{marks:?}")) }
    })
    .await;
}

/// Processes one more task, so everything that was sent before has been seen.
async fn pass(queue: &Queue, key: &str) {
    submit(queue, &[task(key, "silent", json!({}))]).await;
    wait_for_state(queue, key, State::Finished, PATIENCE).await;
}

laelaps_tests::on_every_database! {
    async fn term_asks_the_handler_and_waits_for_its_outcome() {
        for signal in [Signal::TERM, Signal::INT] {
            let (_site, queue, mut host) = busy("wait-cancelled", json!({ "then": "finish" }), json!({})).await;
            host.signal(signal);
            host.notified("STOPPING=1", PATIENCE).await;
            assert!(host.exited(PATIENCE).await.success());
            let held = wait_for_state(&queue, "held", State::Finished, PATIENCE).await;
            assert_eq!(output(&held)["cancelled"], "graceful");
        }
    }

    async fn term_gives_back_what_is_buffered_while_it_waits_for_what_runs() {
        let (site, queue, mut host) = busy("silent", json!({ "gate": "/marks/gate" }), json!({ "task_prefetch": 10 })).await;
        let more: Vec<_> = (0..20).map(|number| task(format!("more-{number}"), "silent", json!({}))).collect();
        submit(&queue, &more).await;
        wait_for_stats(&queue, "ten tasks are buffered", PATIENCE, |stats| stats.running == 11).await;
        host.signal(Signal::TERM);
        wait_for_stats(&queue, "they are free for others", PATIENCE, |stats| stats.running == 1 && stats.ready == 20).await;
        assert!(host.is_running(), "the host waits for its handler");
        site.open_gate("gate");
        assert!(host.exited(PATIENCE).await.success());
        wait_for_state(&queue, "held", State::Finished, PATIENCE).await;
        let more = queue.backend().get("more-0").await.unwrap().unwrap();
        assert_eq!((more.attempts, more.lost), (0, 0));
    }

    async fn a_second_term_is_immediate() {
        let (_site, queue, mut host) = busy("wait-cancelled", json!({ "deaf": true }), json!({})).await;
        host.signal(Signal::TERM);
        host.notified("STOPPING=1", PATIENCE).await;
        assert_eq!(queue.backend().stats().await.unwrap().running, 1, "the first one waits");
        host.signal(Signal::TERM);
        assert!(host.exited(PATIENCE).await.success());
        let held = queue.backend().get("held").await.unwrap().unwrap();
        assert_eq!((held.state, held.attempts, held.lost), (State::Waiting, 0, 0));
    }

    async fn a_graceful_shutdown_becomes_immediate_at_its_limit() {
        let section = json!({ "child_graceful_kill_limit": 0.3 });
        let (_site, queue, mut host) = busy("spin", json!({}), section).await;
        host.signal(Signal::TERM);
        assert!(host.exited(PATIENCE).await.success());
        let held = queue.backend().get("held").await.unwrap().unwrap();
        assert_eq!((held.state, held.attempts), (State::Waiting, 0));
    }

    async fn quit_stops_handlers_of_every_sort_at_once() {
        for kind in ["spin", "sleep", "fill", "wait-cancelled"] {
            let (_site, queue, mut host) = busy(kind, json!({ "deaf": true }), json!({})).await;
            host.signal(Signal::QUIT);
            assert!(host.exited(PATIENCE).await.success(), "{kind}");
            let held = queue.backend().get("held").await.unwrap().unwrap();
            assert_eq!((held.state, held.attempts, held.lost), (State::Waiting, 0, 0), "{kind}");
        }
    }

    async fn usr1_and_hup_read_the_configuration_again() {
        for signal in [Signal::USR1, Signal::HUP] {
            let (site, queue, host) = busy("wait-cancelled", json!({}), json!({})).await;
            site.configure(json!({ "processors": 3, "routes": [
                site.route(json!({ "type": "wait-cancelled", "settings": { "edition": "new" } })),
                site.route(json!({ "pattern": ".", "settings": { "colour": "green" } })),
            ] }));
            host.signal(signal);
            begun(&site, 2).await; // released by the old configuration, claimed again by the new one
            submit(&queue, &[task("asks", "describe", json!({ "setting": "colour" }))]).await;
            let asked = wait_for_state(&queue, "asks", State::Finished, PATIENCE).await;
            assert_eq!(output(&asked)["setting"], "green");
            let held = queue.backend().get("held").await.unwrap().unwrap();
            assert_eq!((held.state, held.attempts), (State::Running, 0), "what was interrupted did not count");
        }
    }

    async fn a_broken_configuration_leaves_the_old_one_in_force() {
        for signal in [Signal::USR1, Signal::HUP] {
            let (site, queue, host) = busy("wait-cancelled", json!({}), json!({ "processors": 2 })).await;
            fs::write(site.path("laelaps.yml"), "development:\n  type: rdb\n  processors: many\n").unwrap();
            host.signal(signal);
            let line = host.logged("the old one stays in force", PATIENCE).await;
            assert!(line.contains("ERROR") && line.contains("laelaps.yml") && line.contains("many"), "it says what is wrong: {line}");
            pass(&queue, "after").await;
            assert_eq!(site.marks("held").len(), 1, "nothing was interrupted for it");
        }
    }

    async fn usr2_opens_the_log_file_anew() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        let queue = site.queue().await;
        let log = site.path("host.log");
        let host = site.start_with(&["--log", "host.log"], &[]).await;
        fs::rename(&log, site.path("host.log.1")).unwrap();
        host.signal(Signal::USR2);
        eventually(PATIENCE, "a new log file is there", async || fs::metadata(&log).map_err(|error| error.to_string())).await;
        submit(&queue, &[task("talks", "log", json!({ "text": "into the new file" }))]).await;
        eventually(PATIENCE, "new lines go to the new file", async || {
            let text = fs::read_to_string(&log).unwrap();
            if text.contains("into the new file") { Ok(()) } else { Err(text) }
        })
        .await;
        assert!(!fs::read_to_string(site.path("host.log.1")).unwrap().contains("into the new file"));
        host.stop().await;
    }

    async fn winch_and_cont_touch_nothing_while_no_plugin_changed() {
        let count = scaled(1_000).max(100);
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": 4 }));
        let queue = site.queue().await;
        let held = (0..2).map(|number| {
            let data = json!({ "mark": "/marks/held", "then": "finish" });
            task(format!("held-{number}"), "wait-cancelled", data)
        });
        let flow = (0..count).map(|number| task(format!("flow-{number}"), "compute", json!({ "ms": 1, "mark": "/marks/flow" })));
        submit(&queue, &held.chain(flow).collect::<Vec<_>>()).await;
        let host = site.start().await;
        begun(&site, 2).await;
        let mut ticks = tokio::time::interval(std::time::Duration::from_millis(20));
        for number in 0..100 {
            ticks.tick().await;
            host.signal(if number % 2 == 0 { Signal::WINCH } else { Signal::CONT });
        }
        wait_for_finished(&queue, count, LONG).await;
        assert_eq!(site.marks("flow").len(), count, "no attempt was interrupted: each task began once");
        assert_eq!(site.marks("held").len(), 2);
        assert_eq!(queue.backend().stats().await.unwrap().running, 2, "handlers were not asked to end");
        host.stop().await;
        let held = wait_for_state(&queue, "held-0", State::Finished, PATIENCE).await;
        assert_eq!(output(&held)["cancelled"], "graceful", "only the shutdown asked them");
    }

    async fn cont_asks_attempts_on_a_replaced_version_to_end() {
        let (site, queue, host) = busy("wait-cancelled", json!({}), json!({})).await;
        let next = with_edition(&guest("zoo"), 2);
        site.plug("zoo", &next);
        host.signal(Signal::CONT);
        begun(&site, 2).await;
        host.signal(Signal::CONT); // nothing has changed any more
        host.stop().await;
        let attempts = queue.backend().attempts("held").await.unwrap();
        let digests: Vec<_> = attempts.iter().map(|attempt| attempt.plugin_digest.clone().unwrap()).collect();
        assert_eq!(digests, [digest(&guest("zoo")), digest(&next)], "released on the old version, run again on the new");
        assert!(attempts.iter().all(|attempt| attempt.event == "release"), "{attempts:?}");
    }

    async fn winch_stops_attempts_on_a_replaced_version_and_runs_them_on_the_new() {
        let (site, queue, host) = busy("wait-cancelled", json!({ "deaf": true }), json!({})).await;
        site.plug("zoo", &with_edition(&guest("zoo"), 2));
        host.signal(Signal::WINCH);
        begun(&site, 2).await;
        let held = queue.backend().get("held").await.unwrap().unwrap();
        assert_eq!((held.state, held.attempts), (State::Running, 0), "being replaced does not count");
        let attempts = queue.backend().attempts("held").await.unwrap();
        assert_eq!(attempts.len(), 1);
        assert_eq!((attempts[0].event.as_str(), attempts[0].plugin_digest.clone().unwrap()), ("stop", digest(&guest("zoo"))));
        host.signal(Signal::QUIT);
    }

    async fn winch_leaves_attempts_of_other_plugins_alone() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.plug("other", &guest("zoo"));
        site.configure(json!({ "routes": [
            site.route(json!({ "type": "wait-cancelled" })),
            site.route(json!({ "type": "silent", "plugin": "other" })),
        ] }));
        let queue = site.queue().await;
        let deaf = json!({ "mark": "/marks/held", "deaf": true });
        submit(
            &queue,
            &[
                task("stays", "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" })),
                task("moves", "wait-cancelled", deaf),
            ],
        )
        .await;
        let host = site.start().await;
        begun(&site, 2).await;
        site.plug("zoo", &with_edition(&guest("zoo"), 2));
        host.signal(Signal::WINCH);
        begun(&site, 3).await;
        assert_eq!(site.marks("held")[2], "moves 1", "only the task of the changed plugin began again");
        site.open_gate("gate");
        wait_for_state(&queue, "stays", State::Finished, PATIENCE).await;
        host.signal(Signal::QUIT);
    }

    async fn a_draining_host_replaces_nothing() {
        // systemd sends CONT right after TERM.
        let (site, queue, mut host) = busy("silent", json!({ "gate": "/marks/gate" }), json!({})).await;
        host.signal(Signal::TERM);
        host.notified("STOPPING=1", PATIENCE).await;
        site.plug("zoo", &with_edition(&guest("zoo"), 2));
        host.signal(Signal::CONT);
        host.signal(Signal::WINCH);
        site.open_gate("gate");
        assert!(host.exited(PATIENCE).await.success());
        let held = wait_for_state(&queue, "held", State::Finished, PATIENCE).await;
        assert_eq!((held.attempts, held.plugin_digest), (1, Some(digest(&guest("zoo")))));
        assert_eq!(site.marks("held").len(), 1);
    }
}
