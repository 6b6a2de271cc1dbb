//! The audit log: who changed what a host runs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use laelaps_queue::State;
use laelaps_tests::{
    Host, PATIENCE, Signal, Site, digest, eventually, guest, submit, task, wait_for_finished, wait_for_state, with_edition,
};
use serde_json::{Value, json};

/// All entries of a file, each of which has to be one JSON object on a line of its own.
fn entries(site: &Site, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(site.path(file)).unwrap_or_default();
    assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Waits for so many entries of an event; the last of them.
async fn entry(site: &Site, file: &str, event: &str, count: usize) -> Value {
    let mut found = Vec::new();
    eventually(PATIENCE, &format!("{count} of {event} in {file}"), async || {
        found = entries(site, file).into_iter().filter(|entry| entry["event"] == event).collect();
        if found.len() == count { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    found.pop().unwrap()
}

/// A site whose hosts and commands note in `audit`, and its host.
async fn audited() -> (Site, Host) {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let folders = json!([{ "host": site.path("marks"), "guest": "/marks", "writable": true }]);
    let route = json!({ "pattern": ".", "plugin": "zoo", "grants": { "folders": folders, "environment": ["SECRET"] } });
    site.configure(json!({ "audit_log": "audit", "host_name": "kennel", "routes": [route] }));
    site.queue().await;
    let host = site.start_with(&[], &[("SECRET", "do-not-tell")]).await;
    (site, host)
}

#[tokio::test]
async fn each_version_of_a_plugin_is_noted_with_its_digest_file_and_grants() {
    let (site, host) = audited().await;
    let admitted = entry(&site, "audit", "plugin-admitted", 1).await;
    let first = guest("zoo");
    assert_eq!(admitted["plugin"], "zoo");
    assert_eq!(admitted["sha256"], digest(&first));
    assert_eq!(admitted["size"], first.len());
    assert_eq!(admitted["file"], site.plugin_path("zoo").to_str().unwrap());
    assert_eq!(admitted["host"], "kennel");
    assert_eq!(admitted["pid"], host.process_id());
    let grants = &admitted["grants"][0]["grants"];
    let folder = json!({
        "host": site.path("marks"), "guest": "/marks", "writable": true, "size_limit": 1 << 30, "file_limit": 10_000,
    });
    assert_eq!(grants["folders"][0], folder);
    let follow_ups = json!({ "types": "own", "users": "own", "keys": "own", "queues": "own", "depth": 10, "waiting": 10_000 });
    assert_eq!(grants["follow_ups"], follow_ups);
    assert_eq!(grants["environment"], json!(["SECRET"]), "names, no values");

    let second = with_edition(&first, 2);
    site.plug("zoo", &second);
    let replaced = entry(&site, "audit", "plugin-replaced", 1).await;
    assert_eq!((&replaced["sha256"], &replaced["replaces"]), (&json!(digest(&second)), &json!(digest(&first))));
    site.plug("zoo", b"no module");
    let refused = entry(&site, "audit", "plugin-refused", 1).await;
    assert_eq!((&refused["sha256"], &refused["size"]), (&json!(digest(b"no module")), &json!(9)));
    assert!(!refused["reason"].as_str().unwrap().is_empty());
    fs::remove_file(site.plugin_path("zoo")).unwrap();
    let removed = entry(&site, "audit", "plugin-removed", 1).await;
    assert_eq!(removed["sha256"], digest(&second), "what served to the end");
    host.stop().await;
    let text = fs::read_to_string(site.path("audit")).unwrap();
    assert!(!text.contains("do-not-tell") && !text.contains("://"), "{text}");
    assert_eq!(fs::metadata(site.path("audit")).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn configurations_and_signals_are_noted() {
    let (site, host) = audited().await;
    let configured = entry(&site, "audit", "configuration", 1).await;
    let sha256 = digest(&fs::read(site.path("laelaps.yml")).unwrap());
    assert_eq!((&configured["when"], &configured["sha256"]), (&json!("start"), &json!(sha256)));
    assert_eq!((&configured["environment"], &configured["routes"][0]["plugin"]), (&json!("development"), &json!("zoo")));

    site.configure(json!({ "audit_log": "audit", "host_name": "second" }));
    host.signal(Signal::USR1);
    let restarted = entry(&site, "audit", "configuration", 2).await;
    assert_eq!((&restarted["when"], &restarted["host"]), (&json!("restart"), &json!("second")));
    let signal = entry(&site, "audit", "signal", 1).await;
    assert_eq!(signal["signal"], "USR1");
    assert_eq!(signal["asks"], "graceful restart with the configuration read again");

    fs::write(site.path("laelaps.yml"), "development: {type: none}").unwrap();
    host.logged_times("ready", 2, PATIENCE).await;
    host.signal(Signal::HUP);
    entry(&site, "audit", "configuration-refused", 1).await;
    host.signal(Signal::CONT);
    assert_eq!(entry(&site, "audit", "signal", 3).await["asks"], "graceful replacement of plugins");
    host.stop().await;
    assert_eq!(entry(&site, "audit", "signal", 4).await["asks"], "graceful shutdown");
}

#[tokio::test]
async fn the_audit_log_is_opened_again_by_usr2() {
    let (site, host) = audited().await;
    entry(&site, "audit", "plugin-admitted", 1).await;
    fs::rename(site.path("audit"), site.path("audit.1")).unwrap();
    host.signal(Signal::USR2);
    host.logged("log reopened", PATIENCE).await;
    site.plug("zoo", b"no module");
    entry(&site, "audit", "plugin-refused", 1).await;
    assert_eq!(entry(&site, "audit.1", "signal", 1).await["signal"], "USR2", "what asks for it is the old file's last line");
    host.stop().await;
}

#[tokio::test]
async fn what_operators_change_is_noted_with_who_did_it() {
    let site = Site::new().await;
    site.configure(json!({ "audit_log": "audit" }));
    let queue = site.queue().await;
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    assert_eq!(entry(&site, "audit", "command", 1).await["command"], "init");
    submit(&queue, &[task("one", "silent", json!({})), task("two", "silent", json!({}))]).await;
    let _ = site.laelaps(["-c", "laelaps.yml", "list"]).await.success();
    let _ = site.laelaps(["-c", "laelaps.yml", "cancel", "one"]).await.success();
    let cancelled = entry(&site, "audit", "command", 2).await;
    assert_eq!((&cancelled["command"], &cancelled["task"]), (&json!("cancel"), &json!("one")));
    assert_eq!(cancelled["uid"], rustix::process::getuid().as_raw());
    assert!(cancelled["pid"].as_u64().is_some_and(|pid| pid != u64::from(std::process::id())), "{cancelled}");
    assert_eq!(cancelled["configuration"], site.path("laelaps.yml").to_str().unwrap());
    assert_ne!(site.laelaps(["-c", "laelaps.yml", "cancel", "nobody"]).await.code, Some(0), "what changes nothing is not noted");
    let _ = site.laelaps(["-c", "laelaps.yml", "retry", "one"]).await.success();
    assert_eq!(entry(&site, "audit", "command", 3).await["command"], "retry");
    let _ = site.laelaps(["-c", "laelaps.yml", "force-finish", "two"]).await.success();
    assert_eq!(entry(&site, "audit", "command", 4).await["command"], "force-finish");
    wait_for_state(&queue, "two", State::Finished, PATIENCE).await;
}

#[tokio::test]
async fn a_name_with_a_line_end_cannot_forge_an_entry() {
    let site = Site::new().await;
    site.configure(json!({ "audit_log": "audit" }));
    site.queue().await;
    let name = "odd\n{\"event\":\"plugin-admitted\"}.yml";
    fs::rename(site.path("laelaps.yml"), site.path(name)).unwrap();
    let _ = site.laelaps(["-c", name, "init"]).await.success();
    let entries = entries(&site, "audit");
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(entries[0]["configuration"], site.path(name).to_str().unwrap());
}

#[tokio::test]
async fn an_audit_log_that_takes_nothing_is_said_once_and_stops_nobody() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "audit_log": "/dev/full" }));
    let queue = site.queue().await;
    let host = site.start().await;
    submit(&queue, &[task("one", "silent", json!({})), task("two", "silent", json!({ "gate": "/marks/never" }))]).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    let cancelled = site.laelaps(["-c", "laelaps.yml", "cancel", "two"]).await.success();
    assert!(cancelled.stderr.contains("the audit log /dev/full cannot be written"), "{}", cancelled.stderr);
    assert_eq!(host.lines_with("cannot write the audit log").len(), 1, "of two entries or more");
    host.stop().await;
}
