//! Shell scripts beside a peer that shares no code with ours: kazoo, doing to the nodes what the Perl module does.

use std::path::Path;
use std::process::Stdio;

use laelaps_tests::{LONG, PATIENCE, waiting_for, workspace_file};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::{Place, end};

pub(super) struct Peer {
    _process: Child,
    calls: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    /// At the root `/q` of a place.
    pub(super) fn start(place: &Place) -> Peer {
        let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../kazoo/bin/python");
        assert!(python.exists(), "{} is missing: tests/run --prepare makes it", python.display());
        let servers = place.servers.strip_suffix(&place.chroot).expect("a chroot");
        let mut process = Command::new(python)
            .arg(workspace_file("host/watchdog/tests/suite/foreign_client.py"))
            .args([servers, &format!("{}/q", place.chroot)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("python starts");
        let calls = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped")).lines();
        Peer { _process: process, calls, answers }
    }

    pub(super) async fn call(&mut self, call: Value) -> Value {
        self.calls.write_all(format!("{call}\n").as_bytes()).await.expect("the peer listens");
        let line = waiting_for("a peer's answer", tokio::time::timeout(LONG, self.answers.next_line())).await;
        let line = line.expect("the peer answers");
        let answer: Value = serde_json::from_str(&line.expect("a line").expect("the peer lives")).expect("JSON");
        assert!(answer.get("error").is_none(), "{call}: {answer}");
        answer["is"].clone()
    }
}

#[tokio::test]
async fn a_foreign_master_sees_a_command_under_its_timer() {
    let place = Place::new("foreign_master").await;
    let mut master = Peer::start(&place);
    master.call(json!(["create_queue", 3600, ["a", "b"], true])).await;
    let script = r#"consume() { "$LAELAPS" watchdog --session-timeout 60s consume; }
        mkfifo go; read line <go; consume; consume; echo "exit $?"; read line <go"#;
    let child = place.under_timer(&["--process", "sh:1"], script);
    assert_eq!(master.call(json!(["wait_sync", 300])).await, true);
    assert_eq!(master.call(json!(["check_timers"])).await, json!([1, 0]));
    assert_eq!(master.call(json!(["get_timers", false])).await.as_object().unwrap().keys().next().unwrap(), "sh:1");
    assert_eq!(master.call(json!(["queue_count"])).await, 2);
    place.appears_as_pipe("go").await;
    place.go("go").await;
    laelaps_tests::eventually(PATIENCE, "both are taken", async || match master.call(json!(["queue_count"])).await {
        Value::Number(left) if left.as_u64() == Some(0) => Ok(()),
        other => Err(other.to_string()),
    })
    .await;
    place.go("go").await;
    let answer = end(child).await.success();
    let mut lines: Vec<&str> = answer.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["a", "b", "exit 0"]);
    assert_eq!(master.call(json!(["check_timers"])).await, json!([0, 0]), "the command is done");
    master.call(json!(["clear_timers"])).await;
    assert_eq!(place.watchdog(&["attach", "/q"]).await.code, Some(5));
}

#[tokio::test]
async fn a_foreign_child_works_for_a_shell_master() {
    let place = Place::new("foreign_child").await;
    let told = place.says(&["create-queue", "/q", "a", "b", "--sync-start"]).await;
    assert_eq!(told, "made /q with 2 items and its barrier\n");
    let mut child = Peer::start(&place);
    child.call(json!(["attach_queue", 3600])).await;
    child.call(json!(["create_timer", "perl:1"])).await;
    let _ = place.says(&["wait-sync", "/q"]).await;
    assert_eq!(place.timers().await[0]["process"], "perl:1");
    assert_eq!(child.call(json!(["consume"])).await, "a");
    assert_eq!(place.says(&["queue-count", "/q"]).await, "1\n");
    assert_eq!(child.call(json!(["kick_dog"])).await, true);
    assert_eq!(place.says(&["consume", "/q"]).await, "b\n");
    assert_eq!(child.call(json!(["consume"])).await, Value::Null);
    let _ = place.says(&["clear-timers", "/q"]).await;
    assert_eq!(child.call(json!(["kick_dog"])).await, false);
}
