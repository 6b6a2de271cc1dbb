//! The host as a daemon: what it tells its service manager, and the files it keeps.

use std::fs;
use std::process::Command;

use laelaps_queue::State;
use laelaps_tests::{
    PATIENCE, Signal, Site, digest, eventually, guest, laelaps, submit, task, wait_for_state, with_edition, workspace_file,
};
use serde_json::{Value, json};

#[tokio::test]
async fn ready_means_that_tasks_are_claimed_and_plugins_serve() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let queue = site.queue().await;
    let mut host = site.start().await;
    submit(&queue, &[task("first", "silent", json!({}))]).await;
    wait_for_state(&queue, "first", State::Finished, PATIENCE).await;
    assert!(host.lines_with("wait for a plugin").is_empty(), "the plugins were there before the host said so");
    host.signal(Signal::TERM);
    host.notified("STOPPING=1", PATIENCE).await;
    assert!(host.exited(PATIENCE).await.success());
}

#[tokio::test]
async fn the_pid_file_names_the_process_and_refuses_a_second_host() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.queue().await;
    let path = site.path("laelaps.pid");
    // A stale one, of a process that is gone, does not matter.
    fs::write(&path, "1\n").unwrap();
    let host = site.start_with(&["--pid-file", "laelaps.pid"], &[]).await;
    assert_eq!(fs::read_to_string(&path).unwrap().trim(), host.process_id().to_string());
    let second = site.laelaps(["-c", "laelaps.yml", "run", "--pid-file", "laelaps.pid"]).await;
    assert_ne!(second.code, Some(0));
    assert!(second.stderr.contains("laelaps.pid") && second.stderr.contains(&host.process_id().to_string()), "{}", second.stderr);
    host.stop().await;
    assert!(!path.exists(), "the file goes with the host");
}

#[tokio::test]
async fn a_host_without_its_tables_says_how_to_make_them() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    let answer = site.laelaps(["-c", "laelaps.yml", "run"]).await;
    assert_ne!(answer.code, Some(0));
    assert!(answer.stderr.contains("laelaps init"), "{}", answer.stderr);
    let _ = site.laelaps(["-c", "laelaps.yml", "init"]).await.success();
    site.start().await.stop().await;
}

#[tokio::test]
async fn a_log_file_has_what_standard_error_would_have() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "log": site.path("from-configuration.log") }));
    site.queue().await;
    let host = site.start().await;
    eventually(PATIENCE, "the log says ready", async || {
        let text = fs::read_to_string(site.path("from-configuration.log")).map_err(|error| error.to_string())?;
        if text.contains("ready") { Ok(()) } else { Err(text) }
    })
    .await;
    assert_eq!(host.line_count(), 0, "and standard error has nothing");
    host.stop().await;
}

#[tokio::test]
async fn stats_lists_the_hosts_and_the_plugin_versions_that_they_served() {
    let site = Site::new().await;
    site.plug_guest("zoo");
    site.configure(json!({ "host_name": "kennel" }));
    site.queue().await;
    let host = site.start().await;
    let (first, second) = (guest("zoo"), with_edition(&guest("zoo"), 1));
    site.plug("zoo", &second);
    let told = eventually(PATIENCE, "both versions are noted", async || {
        let told = site.laelaps(["-c", "laelaps.yml", "stats", "--json"]).await.success().stdout;
        let told: Value = serde_json::from_str(&told).unwrap();
        let noted = told["hosts"][0]["plugins"].as_array().map_or(0, Vec::len);
        if noted == 2 { Ok(told) } else { Err(told.to_string()) }
    })
    .await;
    let kennel = &told["hosts"][0];
    assert_eq!(kennel["plugins"], json!([digest(&first), digest(&second)]));
    assert_eq!(
        (&kennel["name"], &kennel["process_id"], &kennel["alive"]),
        (&json!("kennel"), &json!(host.process_id()), &json!(true))
    );
    let shown = site.laelaps(["-c", "laelaps.yml", "stats"]).await.success().stdout;
    let versions = format!("{}, {}", &digest(&first)[..12], &digest(&second)[..12]);
    let row = shown.lines().last().unwrap();
    assert!(row.contains("kennel") && row.contains("yes") && row.ends_with(&versions), "{shown}");
    host.stop().await;
}

#[test]
fn the_unit_for_systemd_speaks_the_language_of_our_signals() {
    let text = fs::read_to_string(workspace_file("deploy/laelaps.service")).unwrap();
    let values = |key: &str| -> Vec<&str> {
        let lines = text.lines().filter_map(|line| line.split_once('='));
        lines.filter(|(name, _)| *name == key).map(|(_, value)| value).collect()
    };
    assert_eq!(values("Type"), ["notify"], "the host says itself when it is ready");
    assert_eq!(values("KillSignal"), ["SIGTERM"], "the graceful shutdown");
    assert_eq!(values("ExecReload"), ["/bin/kill -USR1 $MAINPID"], "the graceful restart");
    let [user] = values("User")[..] else { panic!("it names its user: {:?}", values("User")) };
    assert!(!user.is_empty() && user != "root" && user != "0", "{user}");
    for command in values("ExecStartPre").into_iter().chain(values("ExecStart")) {
        assert!(command.starts_with("/usr/bin/laelaps -c /etc/laelaps/laelaps.yml -e production "), "{command}");
    }
    assert_eq!(values("ExecStart").len(), 1);
}

#[test]
fn the_unit_for_systemd_is_understood_by_systemd() {
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        eprintln!("this machine has no systemd-analyze: the unit is only read by the test beside this one");
        return;
    };
    assert!(version.status.success());
    // The program and the user of the unit are not installed here.
    let text = fs::read_to_string(workspace_file("deploy/laelaps.service")).unwrap();
    let text = text.replace("/usr/bin/laelaps", &laelaps().display().to_string()).replace("=laelaps\n", "=root\n");
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("laelaps.service");
    fs::write(&unit, text).unwrap();
    let verified = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&unit).output().unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    let complaints: Vec<&str> = said.lines().filter(|line| line.contains("laelaps.service")).collect();
    assert!(complaints.is_empty(), "{said}");
}
