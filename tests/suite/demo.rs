//! `laelaps demo`, as somebody who has just cloned the repository sees it.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use laelaps_tests::laelaps;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(120);

/// The demo, with a folder of its own for temporary files and nothing else to start from.
fn demo(folder: &Path, tasks: &str) -> Command {
    let mut command = Command::new(laelaps());
    command.args(["demo", "--tasks", tasks]).current_dir(folder).env_clear().env("TMPDIR", folder).env("HOME", folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn left_behind(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn the_demo_replaces_a_component_while_tasks_flow_loses_nothing_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let output = tokio::time::timeout(PATIENCE, demo(folder.path(), "60").output()).await.expect("the demo ends").unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("60 tasks submitted, 60 finished, 0 lost"), "{said}");
    assert!(said.contains("edition 1, sha256 ") && said.contains("edition 2, sha256 "), "both versions ran: {said}");
    assert!(said.contains("4000 requests"), "{said}");
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}

#[tokio::test]
async fn an_interrupted_demo_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = demo(folder.path(), "10000").spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun = tokio::time::timeout(PATIENCE, lines.next_line()).await.expect("the demo begins").unwrap();
    assert!(begun.is_some_and(|line| line.contains("run in")), "the host runs");
    let process = rustix::process::Pid::from_raw(i32::try_from(child.id().unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    let status = tokio::time::timeout(PATIENCE, child.wait()).await.expect("the demo ends").unwrap();
    assert!(!status.success());
    assert_eq!(left_behind(folder.path()), Vec::<String>::new());
}
