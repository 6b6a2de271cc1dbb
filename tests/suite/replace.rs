//! A handler is replaced by dropping a file, while tasks flow.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::symlink;

use laelaps_queue::{Queue, State};
use laelaps_tests::{
    Host, LONG, PATIENCE, Signal, Site, all_tasks, digest, eventually, guest, measured, output, scaled, submit, task,
    wait_for_finished, wait_for_state, wait_for_stats, with_edition,
};
use serde_json::json;

async fn zoo() -> (Site, Queue, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let host = site.start().await;
    (site, queue, host)
}

/// Submits tasks until one of them ran on this version.
async fn serves(queue: &Queue, component: &[u8]) {
    let wanted = digest(component);
    let mut number = 0;
    eventually(LONG, &format!("version {} serves", &wanted[..12]), async || {
        number += 1;
        let key = format!("probe-{}-{number}", &wanted[..12]);
        submit(queue, &[task(&key, "silent", json!({}))]).await;
        let probe = wait_for_state(queue, &key, State::Finished, PATIENCE).await;
        let found = probe.plugin_digest.unwrap();
        if found == wanted { Ok(()) } else { Err(format!("{} serves", &found[..12])) }
    })
    .await;
}

/// The same bytes with holes in the code.
fn damaged(component: &[u8]) -> Vec<u8> {
    let mut broken = component.to_vec();
    let middle = broken.len() / 2;
    broken[middle..middle + 64].fill(0xff);
    broken
}

#[tokio::test]
async fn every_way_of_replacing_a_file_is_noticed() {
    let (site, queue, host) = zoo().await;
    let edition = |number| with_edition(&guest("zoo"), number);
    let path = site.plugin_path("zoo");

    site.plug("zoo", &edition(1)); // rename over
    serves(&queue, &edition(1)).await;

    fs::write(&path, edition(2)).unwrap(); // write in place
    serves(&queue, &edition(2)).await;

    fs::remove_file(&path).unwrap(); // a symbolic link instead of a file, and then another
    fs::create_dir(site.path("versions")).unwrap();
    for number in [3, 4] {
        fs::write(site.path(&format!("versions/{number}")), edition(number)).unwrap();
        let beside = site.path("plugins/.link");
        symlink(site.path(&format!("versions/{number}")), &beside).unwrap();
        fs::rename(&beside, &path).unwrap();
        serves(&queue, &edition(number)).await;
    }

    // The same content again, under a new modification time, is no event. What is told of another plugin comes after all that was told before.
    site.plug("other", &edition(5));
    host.logged(&digest(&edition(5))[..12], PATIENCE).await;
    let lines = host.lines_with(&digest(&edition(4))[..12]).len();
    fs::write(site.path("versions/4"), edition(4)).unwrap();
    site.plug("other", &edition(6));
    host.logged(&digest(&edition(6))[..12], PATIENCE).await;
    assert_eq!(host.lines_with(&digest(&edition(4))[..12]).len(), lines);
    host.stop().await;
}

#[tokio::test]
async fn a_folder_that_is_swapped_as_a_whole_is_noticed() {
    // As Kubernetes mounts a ConfigMap: zoo.wasm -> ..data/zoo.wasm, ..data -> ..2026_1, and ..data is what changes.
    let site = Site::new().await;
    let queue = site.queue().await;
    let put = |generation: &str, component: &[u8]| {
        let folder = site.path("plugins").join(format!("..{generation}"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("zoo.wasm"), component).unwrap();
        let beside = site.path("plugins/..data_tmp");
        symlink(format!("..{generation}"), &beside).unwrap();
        fs::rename(beside, site.path("plugins/..data")).unwrap();
    };
    put("2026_1", &guest("zoo"));
    symlink("..data/zoo.wasm", site.plugin_path("zoo")).unwrap();
    let host = site.start().await;
    serves(&queue, &guest("zoo")).await;
    put("2026_2", &with_edition(&guest("zoo"), 2));
    serves(&queue, &with_edition(&guest("zoo"), 2)).await;
    host.stop().await;
}

#[tokio::test]
async fn a_half_written_file_never_serves_and_the_whole_one_does() {
    let (site, queue, host) = zoo().await;
    let next = with_edition(&guest("zoo"), 2);
    let path = site.plugin_path("zoo");
    // An upload that breaks off in the middle, for longer than any settling time, and is then resumed.
    fs::write(&path, &next[..next.len() / 3]).unwrap();
    host.logged(&digest(&next[..next.len() / 3])[..12], PATIENCE).await;
    submit(&queue, &[task("meanwhile", "silent", json!({}))]).await;
    let meanwhile = wait_for_state(&queue, "meanwhile", State::Finished, PATIENCE).await;
    assert_eq!(meanwhile.plugin_digest, Some(digest(&guest("zoo"))), "the version before goes on serving");
    OpenOptions::new().append(true).open(&path).unwrap().write_all(&next[next.len() / 3..]).unwrap();
    serves(&queue, &next).await;
    host.stop().await;
}

/// A component that imports an empty interface of this name.
fn importing(component: &[u8], interface: &str) -> Vec<u8> {
    let mut bytes = component.to_vec();
    bytes.extend([7, 3, 1, 0x42, 0]); // the type section: one instance type without members
    let length = u8::try_from(interface.len()).unwrap();
    bytes.extend([10, length + 5, 1, 0, length]); // the import section: one import, its name ...
    bytes.extend(interface.as_bytes());
    bytes.extend([5, 0]); // ... and that it is an instance of type 0
    bytes
}

laelaps_tests::on_every_database! {
    async fn an_attempt_keeps_its_version_and_the_next_one_gets_the_new() {
        let (site, queue, host) = zoo().await;
        submit(&queue, &[task("old", "edition", json!({ "mark": "/marks/begun", "gate": "/marks/gate" }))]).await;
        eventually(PATIENCE, "the attempt runs", async || if site.marks("begun").is_empty() { Err(String::new()) } else { Ok(()) })
            .await;
        let second = guest("zoo-2");
        site.plug("zoo", &second);
        serves(&queue, &second).await;
        submit(&queue, &[task("new", "edition", json!({}))]).await;
        let new = wait_for_state(&queue, "new", State::Finished, PATIENCE).await;
        assert_eq!(output(&new)["edition"], 2);
        site.open_gate("gate");
        let old = wait_for_state(&queue, "old", State::Finished, PATIENCE).await;
        assert_eq!(output(&old)["edition"], 1, "the version it began with is still there");
        assert_eq!(old.plugin_digest, Some(digest(&guest("zoo"))), "and is the one stored with it");
        host.stop().await;
    }

    async fn a_new_file_name_is_a_new_plugin_without_a_restart() {
        let site = Site::new().await;
        // What waits for a plugin begins when it comes, not after a time.
        site.configure(json!({ "retry_wait": 36_000, "routes": [site.route(json!({ "pattern": ".", "plugin": "late" }))] }));
        let queue = site.queue().await;
        let host = site.start().await;
        submit(&queue, &[task("early", "silent", json!({}))]).await;
        let line = host.logged("wait for a plugin", PATIENCE).await;
        assert!(line.contains("WARN") && line.contains("silent") && line.contains("late"), "{line}");
        let early = queue.backend().get("early").await.unwrap().unwrap();
        assert_eq!((early.state.is_terminal(), early.attempts), (false, 0), "waiting for a plugin counts for nothing");
        site.plug("late", &guest("zoo"));
        let early = wait_for_state(&queue, "early", State::Finished, PATIENCE).await;
        assert_eq!(early.attempts, 1);
        host.stop().await;
    }

    async fn a_deleted_file_takes_its_plugin_out_of_service_until_it_is_back() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "retry_wait": 36_000 }));
        let queue = site.queue().await;
        let host = site.start().await;
        submit(&queue, &[task("running", "silent", json!({ "mark": "/marks/begun", "gate": "/marks/gate" }))]).await;
        eventually(PATIENCE, "the attempt runs", async || if site.marks("begun").is_empty() { Err(String::new()) } else { Ok(()) })
            .await;
        fs::remove_file(site.plugin_path("zoo")).unwrap();
        host.signal(Signal::CONT); // look now
        host.logged("the plugin's file was deleted", PATIENCE).await;
        submit(&queue, &[task("waits", "echo", json!({}))]).await;
        host.logged("wait for a plugin", PATIENCE).await;
        site.open_gate("gate");
        wait_for_state(&queue, "running", State::Finished, PATIENCE).await;
        site.plug_guest("zoo");
        wait_for_state(&queue, "waits", State::Finished, PATIENCE).await;
        host.stop().await;
    }

    async fn a_file_that_does_not_fit_is_refused_with_the_reason_and_changes_nothing() {
        let (site, queue, host) = zoo().await;
        let component_of_nothing = b"\0asm\x0d\0\x01\0".to_vec();
        // Each with words that its refusal has to contain.
        let refused: [(&str, Vec<u8>, &[&str]); 7] = [
            ("empty", Vec::new(), &["empty"]),
            ("text", b"#!/bin/sh\necho hello\n".to_vec(), &["not WebAssembly"]),
            ("core", b"\0asm\x01\0\0\0".to_vec(), &["core WebAssembly module", "component"]),
            ("other-world", component_of_nothing.clone(), &["laelaps:worker/handler"]),
            ("needs-more", importing(&component_of_nothing, "acme:cloud/storage@1.2.3"), &["acme:cloud/storage"]),
            ("damaged", damaged(&guest("zoo")), &[]),
            ("cut", guest("zoo")[..guest("zoo").len() / 2].to_vec(), &[]),
        ];
        for (name, bytes, words) in &refused {
            site.plug("zoo", bytes);
            let line = host.logged(&digest(bytes)[..12], LONG).await;
            assert!(line.contains("refused"), "{name}: {line}");
            for word in *words {
                assert!(line.contains(word), "{name}: {word:?} is missing in: {line}");
            }
            let key = format!("after-{name}");
            submit(&queue, &[task(&key, "silent", json!({}))]).await;
            let after = wait_for_state(&queue, &key, State::Finished, PATIENCE).await;
            assert_eq!(after.plugin_digest, Some(digest(&guest("zoo"))), "{name}: the version before goes on serving");
        }
        // Said once each, not at every look.
        host.signal(Signal::CONT);
        host.signal(Signal::WINCH);
        serves(&queue, &guest("zoo")).await;
        for (name, bytes, _) in &refused {
            assert_eq!(host.lines_with(&digest(bytes)[..12]).len(), 1, "{name} is refused once");
        }
        host.stop().await;
    }

    async fn swaps_under_load_fail_no_task_and_lose_none() {
        let swaps = scaled(100).max(20);
        let site = Site::new().await;
        let original = guest("zoo");
        site.plug("zoo", &original);
        site.configure(json!({ "processors": 4, "task_prefetch": 8 }));
        let queue = site.queue().await;
        let host = site.start().await;
        let mut good = HashSet::from([digest(&original)]);
        let mut count = 0;
        for number in 1..=swaps {
            // Work for this swap and the next: there is always a backlog while the file changes.
            let load = (0..50).map(|task_number| task(format!("task-{number}-{task_number}"), "compute", json!({ "ms": 4 })));
            submit(&queue, &load.collect::<Vec<_>>()).await;
            // However slow the machine is, the tasks are not so far behind that versions come and go without one.
            wait_for_stats(&queue, "the tasks of the swap before are finished", LONG, |stats| stats.finished >= count as u64).await;
            count += 50;
            let next = with_edition(&original, u32::try_from(number).unwrap());
            if number % 10 == 0 {
                // One time cut off in the middle, one time damaged.
                let broken = if number % 20 == 0 { next[..next.len() / 2].to_vec() } else { damaged(&next) };
                site.plug("zoo", &broken);
                host.logged(&digest(&broken)[..12], LONG).await;
            } else {
                good.insert(digest(&next));
                site.plug("zoo", &next);
                host.logged(&digest(&next)[..12], LONG).await;
            }
        }
        wait_for_finished(&queue, count, LONG).await;
        let tasks = all_tasks(&queue).await;
        assert!(
            tasks.iter().all(|task| task.attempts == 1 && task.error_code.is_none()),
            "each task took one attempt, without a failure"
        );
        let used: HashSet<String> = tasks.into_iter().map(|task| task.plugin_digest.unwrap()).collect();
        assert!(used.is_subset(&good), "only good versions ran");
        measured("swaps under load, and versions that tasks ran on", format!("{swaps}, {}", used.len()));
        assert!(used.len() > swaps / 4, "the swaps happened while tasks ran: {} versions in {swaps} swaps", used.len());
        host.stop().await;
    }
}
