//! Masters and children that are not ours: kazoo's client, doing to the nodes what WatchdogQueue's Perl does.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{LONG, eventually};
use laelaps_watchdog::{NewQueue, TimerCount};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::place::{Place, TIMER, items, soon};

/// A foreign process at the root `/q` of a place.
struct Peer {
    process: Child,
    calls: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Peer {
    fn start(place: &Place) -> Peer {
        let python = Path::new(env!("CARGO_TARGET_TMPDIR")).join("../kazoo/bin/python");
        assert!(python.exists(), "{} is missing: tests/run --prepare makes it", python.display());
        let mut process = Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/suite/foreign_client.py"))
            .args([place.servers(), &place.absolute("/q")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("python starts");
        let calls = process.stdin.take().expect("piped");
        let answers = BufReader::new(process.stdout.take().expect("piped")).lines();
        Peer { process, calls, answers }
    }

    async fn ask(&mut self, call: Value) -> Value {
        self.calls.write_all(format!("{call}\n").as_bytes()).await.expect("the peer listens");
        let line = soon("the peer answers", self.answers.next_line()).await.expect("a line").expect("the peer lives");
        serde_json::from_str(&line).expect("JSON")
    }

    /// The answer of a call that works.
    async fn call(&mut self, call: Value) -> Value {
        let answer = self.ask(call.clone()).await;
        assert!(answer.get("error").is_none(), "{call}: {answer}");
        answer["is"].clone()
    }

    async fn kill(mut self) {
        self.process.kill().await.expect("killed");
    }
}

#[tokio::test]
async fn our_master_and_a_foreign_child_understand_each_other() {
    let place = Place::new("foreign_child").await;
    let master = place.master(&NewQueue { sync_start: true, ..items(3) }).await;
    let mut child = Peer::start(&place);
    child.call(json!(["attach_queue", 120])).await;
    assert_eq!(child.call(json!(["check_exists", place.absolute("/q/sync")])).await, true);
    child.call(json!(["create_timer", "perl:1"])).await;
    assert!(master.wait_sync(LONG).await.unwrap());
    assert_eq!(master.check_timers().await.unwrap(), TimerCount { alive: 1, expired: 0 });
    assert_eq!(child.call(json!(["consume"])).await, "0");
    assert_eq!(master.queue_count().await.unwrap(), 2);
    assert_eq!(child.call(json!(["fetch_node", place.absolute("/q")])).await, "watchdog");

    let mut strict = place.client().await;
    strict.attach_queue(Duration::from_millis(1_500)).await.unwrap();
    let expired = eventually(LONG, "the child that does not kick expires", async || {
        let timers = strict.get_timers(true).await.unwrap();
        timers.first().cloned().ok_or("none expired".to_owned())
    })
    .await;
    assert_eq!(expired.process_name(), "perl:1");
    // On a busy machine it expires again before it is looked at; then it kicks again.
    eventually(LONG, "the child that kicks lives", async || {
        assert_eq!(child.call(json!(["kick_dog"])).await, true);
        let count = strict.check_timers().await.unwrap();
        if count == (TimerCount { alive: 1, expired: 0 }) { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;

    assert_eq!(child.call(json!(["consume"])).await, "1");
    assert_eq!(child.call(json!(["consume"])).await, "2");
    assert_eq!(child.call(json!(["consume"])).await, Value::Null);
    master.clear_timers().await.unwrap();
    assert_eq!(child.call(json!(["kick_dog"])).await, false);
    child.kill().await;
}

#[tokio::test]
async fn a_foreign_master_and_our_child_understand_each_other() {
    let place = Place::new("foreign_master").await;
    let mut master = Peer::start(&place);
    master.call(json!(["create_queue", 1, ["a", "b"], true])).await;
    let error = place.client().await.create_queue(&items(1), TIMER).await.unwrap_err();
    assert!(matches!(error, laelaps_watchdog::Error::RootExists { half_filled: false, .. }), "{error}");

    let child = place.child().await;
    assert_eq!(child.fetch_node("/q").await.unwrap().data, b"watchdog");
    assert_eq!(child.fetch_node("/q/sync").await.unwrap().data, b"sync");
    assert!(child.check_exists("/q/sync").await.unwrap());
    assert!(!child.wait_sync(Duration::ZERO).await.unwrap());
    let timer = child.create_timer(b"rust:1").await.unwrap();
    assert_eq!(master.call(json!(["wait_sync", 300])).await, true);
    assert!(!child.check_exists("/q/sync").await.unwrap());
    assert_eq!(master.call(json!(["queue_count"])).await, 2);
    let mut taken = vec![child.consume().await.unwrap().unwrap().data, child.consume().await.unwrap().unwrap().data];
    taken.sort_unstable();
    assert_eq!(taken, [b"a", b"b"]);
    assert_eq!(child.consume().await.unwrap(), None);
    assert_eq!(master.call(json!(["queue_count"])).await, 0);

    eventually(LONG, "the master sees that we are late", async || {
        let count = master.call(json!(["check_timers"])).await;
        if count == json!([1, 1]) { Ok(()) } else { Err(count.to_string()) }
    })
    .await;
    // On a busy machine we are late again before the master looks; then we kick again.
    eventually(LONG, "the master sees our kick", async || {
        let kicked = Instant::now();
        assert!(timer.kick_dog().await.unwrap());
        let count = master.call(json!(["check_timers"])).await;
        let ages = master.call(json!(["get_timers", false])).await;
        // The servers' clock tells milliseconds.
        let age = Duration::from_secs_f64(ages["rust:1"].as_f64().expect("our age").max(0.0));
        assert!(age <= kicked.elapsed() + Duration::from_millis(100), "{age:?}");
        if count == json!([1, 0]) { Ok(()) } else { Err(count.to_string()) }
    })
    .await;

    timer.end().await.unwrap();
    assert_eq!(master.call(json!(["check_timers"])).await, json!([0, 0]), "a master is done when every timer is gone");
    let timer = child.create_timer(b"rust:2").await.unwrap();
    master.call(json!(["clear_timers"])).await;
    assert!(!timer.kick_dog().await.unwrap());
    assert!(matches!(child.queue_count().await, Err(laelaps_watchdog::Error::NoRoot(_))));
}

#[tokio::test]
async fn ours_and_foreign_children_race_for_the_same_items_and_each_is_taken_once() {
    let place = Place::new("mixed").await;
    place.master(&items(300)).await;
    let mut peers = [Peer::start(&place), Peer::start(&place)];
    // Both are connected before the race begins.
    for peer in &mut peers {
        peer.call(json!(["attach_queue", 120])).await;
    }
    let (ours, mut all) = (place.child().await, Vec::new());
    let mut foreign_items = 0;
    let [first, second] = &mut peers;
    loop {
        let (one, two, three) = tokio::join!(first.call(json!(["consume"])), second.call(json!(["consume"])), async {
            ours.consume().await.unwrap()
        });
        let before = all.len();
        for item in [one, two].iter().filter_map(Value::as_str) {
            foreign_items += 1;
            all.push(item.to_owned());
        }
        all.extend(three.map(|item| String::from_utf8(item.data).unwrap()));
        if all.len() == before {
            break;
        }
    }
    all.sort_unstable_by_key(|item| item.parse::<usize>().unwrap());
    assert_eq!(all, (0..300).map(|n| n.to_string()).collect::<Vec<_>>());
    assert!(foreign_items > 0 && foreign_items < 300, "{foreign_items} went to the foreign children");
}

#[tokio::test]
async fn a_perl_peer_gets_the_first_1023_bytes_as_we_warn() {
    let place = Place::new("cut").await;
    let mut master = place.client().await;
    let queue = NewQueue { items: vec![vec![b'x'; 2_000], b"short".to_vec()], ..NewQueue::default() };
    assert_eq!(master.create_queue(&queue, TIMER).await.unwrap(), 1);
    let mut child = Peer::start(&place);
    assert_eq!(child.call(json!(["consume"])).await.as_str().unwrap().len(), 1_023);
    assert_eq!(child.call(json!(["consume"])).await, "short");
}
