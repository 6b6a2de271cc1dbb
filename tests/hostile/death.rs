//! A host that dies while it admits a module.

use laelaps_queue::State;
use laelaps_tests::{LONG, PATIENCE, Site, digest, eventually, guest, submit, task, wait_for_state};
use serde_json::json;

use super::wat::{HANDLE, plugin};

/// A module whose start never ends, and whose name comes before all others.
const DEADLY: &str = "a-deadly";

/// A site with a deadly module and a good one, and a folder of its own for compiled code.
async fn site() -> Site {
    let site = Site::new().await;
    let routes = [json!({ "pattern": "^good", "plugin": "good" })];
    site.configure(json!({ "plugin_cache": "compiled", "poll_interval": 0.01, "routes": routes }));
    site.plug("good", &guest("noop"));
    site.plug(DEADLY, &deadly());
    site
}

fn deadly() -> Vec<u8> {
    let handler = format!("(func (export \"handle\") {HANDLE} unreachable)");
    plugin(&format!("{handler} (func $start (loop $for_ever (br $for_ever))) (start $start)"))
}

/// Waits until the host has compiled the deadly module: it tries to start it then, for ten seconds.
async fn is_being_tried(site: &Site) {
    let compiled = digest(&deadly());
    eventually(LONG, "the deadly module is compiled", async || {
        let kept: Vec<String> = std::fs::read_dir(site.path("compiled"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        if kept.iter().any(|name| name.starts_with(&compiled) && name.ends_with(".cwasm")) {
            Ok(())
        } else {
            Err(format!("{kept:?}"))
        }
    })
    .await;
}

#[tokio::test]
async fn after_a_death_during_admission_the_next_start_leaves_that_file_for_last_and_names_it() {
    let site = site().await;
    let queue = site.queue().await;
    let mut first = site.spawn_with(&[], &[]);
    is_being_tried(&site).await;
    first.kill().await;

    let second = site.spawn_with(&[], &[]);
    let refused = second.logged("does not start within 10 s", LONG).await;
    assert!(refused.contains(DEADLY), "{refused}");
    let named = second.lines_with("died while");
    assert!(named.len() == 1 && named[0].contains(DEADLY), "{named:?}");
    let lines = second.lines_with("");
    let place = |text: &str| lines.iter().position(|line| line.contains(text) && line.contains("plugin=")).unwrap_or(usize::MAX);
    assert!(place("the plugin serves") < place("does not start within"), "the good one serves first: {lines:#?}");
    submit(&queue, &[task("good", "good", json!({}))]).await;
    wait_for_state(&queue, "good", State::Finished, PATIENCE).await;
    second.stop().await;

    // It was refused in the end, and nobody died: there is nothing left to say.
    let third = site.start().await;
    assert!(third.lines_with("died while").is_empty(), "{:?}", third.lines_with("died while"));
    third.stop().await;
}

#[tokio::test]
async fn the_compiling_child_ends_with_its_host() {
    let site = Site::new().await;
    site.configure(json!({ "plugin_cache": "compiled", "routes": [] }));
    // Much work: it is still being compiled when the host is gone.
    let step = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.load (i32.wrap_i64 (local.get 0)))) (i64.const 7)))";
    let handler = format!("(import \"room\" \"memory\" (memory 1)) (func (export \"handle\") {HANDLE} unreachable)");
    let heavy = format!("(func (param i64) {})", step.repeat(4_000)).repeat(100);
    site.plug("heavy", &plugin(&format!("{handler} {heavy}")));
    site.queue().await;
    let mut host = site.spawn_with(&[], &[]);
    let child = eventually(PATIENCE, "the compiling child is there", async || {
        let children = format!("/proc/{0}/task", host.process_id());
        let tasks = std::fs::read_dir(children).unwrap().flatten();
        let children = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok()).collect::<String>();
        let is_compiler = |process: &&str| {
            std::fs::read(format!("/proc/{process}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).any(|argument| argument == b"compile-plugin"))
        };
        children.split_whitespace().find(is_compiler).map(str::to_owned).ok_or(children.clone())
    })
    .await;
    host.kill().await;
    eventually(PATIENCE, "the compiling child is gone", async || {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or('X', |(_, rest)| rest.chars().next().unwrap());
        if "XZ".contains(state) { Ok(()) } else { Err(stat) }
    })
    .await;
}
