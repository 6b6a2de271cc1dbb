//! Real servers, real processes.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use laelaps_test_zookeeper::{Server, shared, unique_name};
use laelaps_tests::{Answer, LONG, PATIENCE, Proxy, Signal, Site, eventually, laelaps, waiting_for};
use laelaps_watchdog::fleet::{Dead, Fleet, Health, Host, HostError, Identity, Options, Standing};
use laelaps_watchdog::{NewQueue, Root, WatchdogQueue};
use rustix::process::{Pid, kill_process};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

mod foreign_client;
mod hosts;
mod intake;

/// A session that outlives every pause which a busy machine makes, where a test does not wait for its end.
const LONG_SESSION: Duration = Duration::from_secs(60);
/// A session that a busy machine does not end either, for tests that wait for its end.
const SESSION: Duration = Duration::from_secs(10);

/// A site and a chroot of its own on a server.
struct Place {
    site: Site,
    servers: String,
    chroot: String,
}

impl Place {
    /// On the server that all tests share. `name` is the test's.
    async fn new(name: &str) -> Place {
        Place::on(&shared().await.address(), name).await
    }

    async fn on(address: &str, name: &str) -> Place {
        let site = Site::new().await;
        // Other processes have tests of this name on the same servers.
        let chroot = unique_name(&format!("/{name}"));
        let marker = WatchdogQueue::new(&options(address), &format!("{chroot}/marker")).await;
        let mut marker = marker.expect("the server lets us in");
        let new = NewQueue { parents: true, ..NewQueue::default() };
        marker.create_queue(&new, PATIENCE).await.expect("a chroot for the test");
        marker.clear_timers().await.expect("only the chroot stays");
        Place { site, servers: format!("{address}{chroot}"), chroot }
    }

    /// Where to connect through a cable to the servers.
    fn through(&self, cable: &Proxy) -> String {
        format!("127.0.0.1:{}{}", cable.port(), self.chroot)
    }

    /// `laelaps watchdog COMMAND ARGUMENTS` on our servers.
    async fn watchdog(&self, arguments: &[&str]) -> Answer {
        let session = seconds(LONG_SESSION);
        self.site.laelaps(["watchdog", "--servers", &self.servers, "--session-timeout", &session].iter().chain(arguments)).await
    }

    /// What such a command prints, which has to succeed.
    async fn says(&self, arguments: &[&str]) -> String {
        self.watchdog(arguments).await.success().stdout
    }

    /// A shell script that calls the program as `watchdog COMMAND`, in the site's folder.
    fn script(&self, script: &str) -> Child {
        let session = seconds(LONG_SESSION);
        let script = format!("watchdog() {{ \"$LAELAPS\" watchdog --session-timeout {session} \"$@\"; }}\n{script}");
        let mut command = Command::new("sh");
        command.args(["-eu", "-c", &script]).current_dir(self.site.folder()).kill_on_drop(true);
        command.env("LAELAPS", laelaps()).env("LAELAPS_WATCHDOG_SERVERS", &self.servers).env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a shell")
    }

    /// `laelaps watchdog create-timer ARGUMENTS -- sh -c SCRIPT`.
    fn under_timer(&self, arguments: &[&str], script: &str) -> Child {
        self.under_timer_of(LONG_SESSION, arguments, script)
    }

    /// The same with a session of this timeout.
    fn under_timer_of(&self, session: Duration, arguments: &[&str], script: &str) -> Child {
        let mut command = Command::new(laelaps());
        command.args(["watchdog", "--servers", &self.servers, "--session-timeout", &seconds(session)]);
        command.args(["create-timer", "/q"]).args(arguments);
        command.args(["--", "sh", "-c", script]).current_dir(self.site.folder()).kill_on_drop(true);
        command.env("LAELAPS", laelaps()).env("NO_COLOR", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("laelaps starts")
    }

    async fn timers(&self) -> Vec<Value> {
        let told = self.says(&["get-timers", "/q", "--json"]).await;
        told.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// Writes a line to the script's pipe of this name, as soon as the script reads it.
    async fn go(&self, name: &str) {
        let written = tokio::fs::write(self.site.path(name), "go\n");
        tokio::time::timeout(LONG, written).await.expect("the script reads its pipe").expect("a pipe takes a line");
    }

    /// Waits until the script has made a pipe of this name.
    async fn appears_as_pipe(&self, name: &str) {
        let path = self.site.path(name);
        eventually(PATIENCE, name, async || if path.exists() { Ok(()) } else { Err("no such pipe".to_owned()) }).await;
    }

    /// Waits until the script has left a file of this name.
    async fn appears(&self, name: &str) -> String {
        let path = self.site.path(name);
        eventually(PATIENCE, name, async || {
            std::fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n')).ok_or_else(|| "no such file".to_owned())
        })
        .await
    }
}

/// How to connect, with a [`LONG_SESSION`].
fn options(servers: &str) -> laelaps_watchdog::Options {
    laelaps_watchdog::Options { session_timeout: LONG_SESSION, ..laelaps_watchdog::Options::new(servers) }
}

/// As an argument.
fn seconds(time: Duration) -> String {
    format!("{}s", time.as_secs())
}

async fn end(child: Child) -> Answer {
    let ended = waiting_for("a command's end", tokio::time::timeout(LONG, child.wait_with_output())).await;
    let ended = ended.expect("it ends").expect("its output");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Answer { code: ended.status.code(), stdout: text(ended.stdout), stderr: text(ended.stderr) }
}

fn send(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().expect("it runs").cast_signed()).expect("a process number");
    kill_process(pid, signal).expect("it is ours");
}

#[tokio::test]
async fn shell_scripts_as_master_and_children_work_off_a_queue() {
    let place = Place::new("scripts").await;
    let master = place.script(
        r#"
        printf '%s\n' 'one item' 'two items' three | watchdog create-queue /q four five --file - --sync-start
        watchdog wait-sync /q
        while [ "$(watchdog queue-count /q)" != 0 ] || [ -n "$(watchdog get-timers /q --json)" ]; do watchdog check-timers /q; done
        watchdog clear-timers /q
        "#,
    );
    eventually(PATIENCE, "the queue is there", async || {
        let answer = place.watchdog(&["attach", "/q"]).await;
        if answer.code == Some(0) { Ok(()) } else { Err(answer.stderr) }
    })
    .await;
    // Nobody works before both are there: the first to come could do it all, and the master would clear the queue before the other one.
    let work = |name: &str| {
        let begin = format!("mkfifo go-{name}; echo up >up-{name}; read line <go-{name}");
        format!("{begin}; while item=$(\"$LAELAPS\" watchdog --session-timeout 60s consume); do echo \"$item\" >>done; done")
    };
    let children = ["a", "b"].map(|name| place.under_timer(&["--process", name], &work(name)));
    for name in ["a", "b"] {
        place.appears(&format!("up-{name}")).await;
    }
    for name in ["a", "b"] {
        place.go(&format!("go-{name}")).await;
    }
    for child in children {
        let _ = end(child).await.success();
    }
    let told = end(master).await.success();
    assert!(told.stdout.starts_with("made /q with 5 items and its barrier\n"), "{}", told.stdout);
    assert!(told.stdout.ends_with("deleted 1 node of /q\n"), "{}", told.stdout);
    let done = std::fs::read_to_string(place.site.path("done")).unwrap();
    let mut done: Vec<&str> = done.lines().collect();
    done.sort_unstable();
    assert_eq!(done, ["five", "four", "one item", "three", "two items"]);
}

#[tokio::test]
async fn every_no_and_every_refusal_has_its_exit_code_and_a_hint() {
    let place = Place::new("codes").await;
    let mut told = String::new();
    for arguments in [
        &["attach", "/q"][..],
        &["consume", "/q"],
        &["clear-timers", "/q"],
        &["create-timer", "/q", "--", "true"],
        &["kick-dog", "/q", "timer-0000000000"],
        &["create-queue", "/a/b/q"],
        &["create-queue", "q"],
        &["create-queue", "/q", "--sync-start", "--access", "ourselves"],
        &["create-queue", "/q", "--sync-start"],
        &["create-queue", "/q"],
        &["wait-sync", "/q", "--wait", "10ms"],
        &["consume", "/q"],
        &["consume", "/q", "--json"],
        &["queue-count", "/q"],
        &["check-timers", "/q"],
        &["get-timers", "/q"],
        &["status", "/q"],
        &["status", "/q", "--json"],
        &["check-exists", "/q/sync"],
        &["check-exists", "/q/nothing"],
        &["fetch-node", "/q"],
        &["fetch-node", "/q/nothing"],
        &["kick-dog", "/q", "timer-0000000000"],
        &["kick-dog", "/q", "sync"],
        &["create-timer", "/q", "--", "./no-such-command"],
        &["wait-sync", "/q", "--wait", "10m"],
        &["clear-timers", "/q"],
        &["create-queue", "/a/b/q", "--parents", "--json"],
    ] {
        let answer = place.watchdog(arguments).await;
        told.push_str(&format!("$ laelaps watchdog {}\nexit code {}\n", arguments.join(" "), answer.code.unwrap_or(-1)));
        for (name, text) in [("standard output", answer.stdout), ("standard error", answer.stderr)] {
            if !text.is_empty() {
                told.push_str(&format!("--- {name}\n{text}"));
            }
        }
    }
    insta::assert_snapshot!(told);
}

#[tokio::test]
async fn queues_that_are_made_and_cleared_stand_in_the_audit_log() {
    let place = Place::new("audited").await;
    place.site.configure(json!({ "audit_log": "audit" }));
    for command in ["create-queue", "queue-count", "clear-timers"] {
        let _ = place.says(&[command, "/q", "-c", "laelaps.yml"]).await;
    }
    let noted = std::fs::read_to_string(place.site.path("audit")).unwrap();
    let noted: Vec<Value> = noted.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let commands: Vec<&Value> = noted.iter().map(|entry| &entry["command"]).collect();
    assert_eq!(commands, ["watchdog create-queue", "watchdog clear-timers"]);
    assert_eq!(noted[0]["root"], "/q");
}

#[tokio::test]
async fn items_a_perl_child_gets_cut_are_warned_of_and_larger_ones_are_refused() {
    let place = Place::new("sizes").await;
    let file = place.site.path("items");
    std::fs::write(&file, format!("{}\n{}\n", "x".repeat(1_023), "y".repeat(1_024))).unwrap();
    let file = file.display().to_string();
    let answer = place.watchdog(&["create-queue", "/q", "--file", &file]).await.success();
    assert_eq!(answer.stdout, "made /q with 2 items\n");
    assert!(answer.stderr.contains("1 item of more than 1023 bytes"), "{}", answer.stderr);
    std::fs::write(&file, "z".repeat(1 << 20)).unwrap();
    let answer = place.watchdog(&["create-queue", "/r", "--file", &file]).await;
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert!(answer.stderr.contains("item 0 has 1048576 bytes, at most 1040384 are allowed"), "{}", answer.stderr);
    // An item that is no text comes out byte by byte.
    std::fs::write(&file, b"\xff\x00z").unwrap();
    let _ = place.says(&["create-queue", "/b", "--file", &file]).await;
    assert_eq!(place.says(&["consume", "/b", "--json"]).await, "{\"item_hex\":\"ff007a\",\"name\":\"queue-0000000000\"}\n");
}

#[tokio::test]
async fn create_timer_exits_as_its_command_and_its_timer_goes_with_it() {
    let place = Place::new("exits").await;
    let _ = place.says(&["create-queue", "/q", "--sync-start"]).await;
    for (script, code) in [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)] {
        let answer = end(place.under_timer(&[], script)).await;
        assert_eq!((answer.code, answer.stderr.as_str()), (Some(code), ""), "{script}");
        assert_eq!(place.timers().await, Vec::<Value>::new());
    }
    assert_eq!(place.watchdog(&["check-exists", "/q/sync"]).await.code, Some(9), "the first timer has removed the barrier");
}

#[tokio::test]
async fn a_process_identifier_a_perl_master_sees_cut_is_warned_of() {
    let place = Place::new("identifier").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    for (bytes, warns) in [(1_023, false), (1_024, true)] {
        let answer = end(place.under_timer(&["--process", &"x".repeat(bytes)], "exit 0")).await;
        assert_eq!(answer.code, Some(0), "{answer:?}");
        assert_eq!(answer.stderr.contains("a process identifier of 1024 bytes"), warns, "{}", answer.stderr);
    }
}

#[tokio::test]
async fn signals_are_passed_on_to_the_command() {
    let place = Place::new("signals").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    for (signal, name) in [(Signal::TERM, "TERM"), (Signal::INT, "INT"), (Signal::HUP, "HUP"), (Signal::USR1, "USR1")] {
        // A pipe that nobody writes to: the shell waits for it, and for the signal.
        let script = format!(
            "mkfifo pipe-{name}; trap 'echo got {name}; kill $!; exit 40' {name}; cat pipe-{name} & echo up >up-{name}; wait"
        );
        let child = place.under_timer(&["--process", name], &script);
        place.appears(&format!("up-{name}")).await;
        assert_eq!(place.timers().await[0]["process"], name);
        send(&child, signal);
        let answer = end(child).await;
        assert_eq!((answer.code, answer.stdout), (Some(40), format!("got {name}\n")));
    }
}

#[tokio::test]
async fn a_master_that_clears_the_queue_ends_the_commands_unless_they_go_on() {
    let place = Place::new("cleared").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    let ended = "mkfifo a; trap 'kill $!; exit 41' TERM; cat a & echo up >up-a; wait";
    let ended = place.under_timer(&["--kick", "50ms"], ended);
    let goes_on = place.under_timer(&["--kick", "50ms", "--go-on"], "mkfifo b; echo up >up-b; read line <b");
    for name in ["up-a", "up-b"] {
        place.appears(name).await;
    }
    assert_eq!(place.says(&["clear-timers", "/q"]).await, "deleted 3 nodes of /q\n");
    let answer = end(ended).await;
    assert_eq!(
        (answer.code, answer.stderr.as_str()),
        (Some(41), "warning: the master has cleared the queue; ending the command\n")
    );
    place.go("b").await;
    let answer = end(goes_on).await;
    assert_eq!(answer.code, Some(0), "{answer:?}");
}

#[tokio::test]
async fn a_command_that_kicks_by_itself_is_seen_to_hang_and_to_live() {
    let place = Place::new("hangs").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    let script =
        r#"mkfifo go; read line <go; "$LAELAPS" watchdog --session-timeout 60s kick-dog; echo kicked $? >kicked; read line <go"#;
    let child = place.under_timer(&["--no-kick", "--process", "slow"], script);
    eventually(PATIENCE, "the timer expires", async || {
        let answer = place.watchdog(&["check-timers", "/q", "--timer", "300ms"]).await;
        if answer.code == Some(9) && answer.stdout == "1 timer, 1 of them expired\n" {
            Ok(())
        } else {
            Err(format!("{answer:?}"))
        }
    })
    .await;
    let expired = place.says(&["get-timers", "/q", "--timer", "300ms", "--expired", "--json"]).await;
    let before: Value = serde_json::from_str(&expired).unwrap();
    assert_eq!((&before["process"], &before["timer"]), (&json!("slow"), &json!("timer-0000000000")));
    place.appears_as_pipe("go").await;
    place.go("go").await;
    assert_eq!(place.appears("kicked").await, "kicked 0\n");
    let version = place.says(&["fetch-node", "/q/timer-0000000000", "--json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&version).unwrap()["version"], 1, "kicked once, by the command");
    place.go("go").await;
    let _ = end(child).await.success();
}

#[tokio::test]
async fn a_command_whose_session_expired_gets_a_new_timer() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "expired").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    let script = "mkfifo a; echo up >up; read line <a; exit 3";
    let mut child = place.under_timer_of(SESSION, &["--kick", "50ms"], script);
    place.appears("up").await;
    let first = place.timers().await[0].clone();
    let mut complaints = BufReader::new(child.stderr.take().expect("piped")).lines();
    server.freeze();
    // After seven fifths of the timeout the client takes its session for lost.
    let complaint = tokio::time::timeout(LONG, complaints.next_line()).await.expect("a complaint").unwrap().unwrap();
    assert!(complaint.contains("the ZooKeeper session has expired"), "{complaint}");
    server.thaw();
    let second = eventually(LONG, "one timer, under another session", async || match place.timers().await.as_slice() {
        [timer] if timer["session"] != first["session"] => Ok(timer.clone()),
        other => Err(format!("{other:?}")),
    })
    .await;
    assert_eq!(second["process"], first["process"]);
    place.go("a").await;
    let answer = end(child).await;
    assert_eq!(answer.code, Some(3), "{answer:?}");
    let told = complaints.next_line().await.unwrap().expect("a second line");
    assert_eq!(told, "warning: connected again, under a new session and with a new timer");
}

#[tokio::test]
async fn a_command_that_kicks_by_itself_gets_no_timer_that_it_does_not_know() {
    let server = Server::start().await;
    let place = Place::on(&server.address(), "expired_no_kick").await;
    let _ = place.says(&["create-queue", "/q"]).await;
    let script = "mkfifo a; echo up >up; read line <a; exit 3";
    let mut child = place.under_timer_of(SESSION, &["--no-kick"], script);
    place.appears("up").await;
    let mut complaints = BufReader::new(child.stderr.take().expect("piped")).lines();
    server.freeze();
    let complaint = tokio::time::timeout(LONG, complaints.next_line()).await.expect("a complaint").unwrap().unwrap();
    assert!(complaint.contains("the timer is gone, and kick-dog answers so"), "{complaint}");
    server.thaw();
    eventually(LONG, "no timer is left", async || match place.timers().await.as_slice() {
        [] => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    place.go("a").await;
    let answer = end(child).await;
    assert_eq!(answer.code, Some(3), "{answer:?}");
    assert_eq!(complaints.next_line().await.unwrap(), None, "it was not connected again");
}

/// A host that is always well, and owns nothing.
struct Idle;

impl Host for Idle {
    fn health(&self) -> Health {
        Health::Well
    }

    fn database_reached_since(&self) -> Option<std::time::Instant> {
        None
    }

    async fn owners(&self) -> Result<Vec<Identity>, HostError> {
        Ok(Vec::new())
    }

    async fn hand_on(&self, _dead: &[Dead]) -> Result<(), HostError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_fleet_is_shown_and_never_cleared() {
    let place = Place::new("fleet").await;
    let options = Options {
        session: options(&place.servers),
        root: Root::new("/hosts").unwrap(),
        timer: LONG,
        description: json!({ "name": "ann", "process": 4 }).as_object().unwrap().clone(),
    };
    let fleet = Fleet::join(options, Arc::new(Idle)).unwrap();
    let mut standing = fleet.standing();
    let present = standing.wait_for(Standing::is_acting);
    let _ = tokio::time::timeout(PATIENCE, present).await.expect("the host is present").unwrap();
    let told = place.says(&["status", "/hosts"]).await;
    assert!(
        told.starts_with("/hosts: a fleet of 1 host\n") && told.contains("ann process=4") && told.contains("acting"),
        "{told}"
    );
    let told: Value = serde_json::from_str(&place.says(&["status", "/hosts", "--json"]).await).unwrap();
    assert_eq!((&told["hosts"][0]["acting"], &told["hosts"][0]["description"]["name"]), (&json!(true), &json!("ann")));
    for command in ["clear-timers", "check-timers", "create-timer"] {
        let arguments = if command == "create-timer" { vec![command, "/hosts", "--", "true"] } else { vec![command, "/hosts"] };
        let answer = place.watchdog(&arguments).await;
        assert_eq!(answer.code, Some(6), "{answer:?}");
        assert!(
            answer.stderr.contains("this root is that of a fleet of hosts") && answer.stderr.contains("hint: "),
            "{answer:?}"
        );
    }
    fleet.leave().await;
}
