//! A fleet of real hosts: who dies, freezes or is cut off loses its tasks to the others within seconds, and nothing else does.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use laelaps_queue::{Config, Queue, State, Task};
use laelaps_test_databases::{Durability, postgres};
use laelaps_test_zookeeper::{Ensemble, Server, TICK, shared};
use laelaps_tests::{
    Database, Host, LONG, PATIENCE, Proxy, Signal, Site, all_tasks, eventually, have_begun, measured, on, promised, scaled,
    submit, submit_held, task, wait_for_finished,
};
use serde_json::{Value, json};

use super::{LONG_SESSION, Place, SESSION};

mod killed;
mod outages;
mod stuck;

/// How long a host may go without a kick, where the test is not about that: longer than any test waits. What is noticed then is noticed by
/// the end of a session. Five times in it a host looks again at what it could not do.
const LONG_TIMER: Duration = Duration::from_secs(1_500);
/// The same where it is; half of it is longer than a busy machine keeps a host waiting.
const TIMER: Duration = Duration::from_secs(20);
/// Longer than any test waits, so that no lease ends by itself.
const ALIVE_TIME: Duration = Duration::from_secs(3_600);

/// Whether figures are held to their promises, on a machine that is left alone for it.
fn is_soak() -> bool {
    scaled(10) == 10
}

/// The session timeout of a host that the test takes from its fleet.
fn session_of_the_lost() -> Duration {
    if is_soak() { Duration::from_secs(2) } else { SESSION }
}

/// The promise: one session timeout, one tick of the servers, and a second.
fn noticed() -> Duration {
    session_of_the_lost() + TICK + Duration::from_secs(1)
}

impl Place {
    /// The members of a host's section that put it into the fleet `/fleet`.
    fn watchdog_at(&self, servers: &str, session: Duration, timer: Duration) -> Value {
        json!({ "servers": servers, "root": "/fleet", "session_timeout": session.as_secs(), "timer": timer.as_secs() })
    }

    /// A host that the test takes from its fleet.
    async fn host_to_be_lost(&self, processors: usize, timer: Duration, mut changes: Value) -> Host {
        changes["watchdog"] = self.watchdog_at(&self.servers, session_of_the_lost(), timer);
        self.host(processors, timer, changes).await
    }

    /// Starts a host of the fleet with so many processors; `changes` replaces members of its section. Its session lives as long as it does.
    async fn host(&self, processors: usize, timer: Duration, changes: Value) -> Host {
        self.configure(processors, timer, changes);
        self.site.start().await
    }

    fn configure(&self, processors: usize, timer: Duration, changes: Value) {
        let watchdog = self.watchdog_at(&self.servers, LONG_SESSION, timer);
        let alive_time = ALIVE_TIME.as_secs();
        let mut section =
            json!({ "processors": processors, "poll_interval": 0.2, "alive_time": alive_time, "watchdog": watchdog });
        let members = section.as_object_mut().expect("an object");
        members.extend(changes.as_object().expect("changes are an object").clone());
        self.site.configure(section);
    }

    /// The hosts of the fleet, as `laelaps watchdog status` shows them.
    async fn fleet(&self) -> Vec<Value> {
        let told: Value = serde_json::from_str(&self.says(&["status", "/fleet", "--json"]).await).expect("JSON");
        told["hosts"].as_array().expect("hosts").clone()
    }

    /// Waits until the fleet has so many hosts; their identities.
    async fn has_hosts(&self, count: usize) -> BTreeSet<String> {
        eventually(LONG, &format!("the fleet has {count} hosts"), async || {
            let hosts = self.fleet().await;
            let identities = hosts.iter().map(|host| host["identity"].as_str().expect("a text").to_owned()).collect();
            if hosts.len() == count { Ok(identities) } else { Err(format!("{hosts:?}")) }
        })
        .await
    }
}

/// Waits until all are finished: each counted once, and lost as often as its key says it was.
async fn all_finish(queue: &Queue, count: usize, lost: impl Fn(&Task) -> u32) {
    wait_for_finished(queue, count, LONG).await;
    for task in held_tasks(queue).await {
        assert_eq!((task.state, task.attempts, task.lost), (State::Finished, 1, lost(&task)), "{}", task.key);
    }
}

/// Waits until a host that has come back has taken back all losses of its own, and looks whether that is all that has changed since.
async fn all_are_excused(queue: &Queue, finished: &[Task]) {
    eventually(LONG, "the losses are taken back", async || {
        let lost: u32 = held_tasks(queue).await.iter().map(|task| task.lost).sum();
        if lost == 0 { Ok(()) } else { Err(format!("{lost} losses are left")) }
    })
    .await;
    for (was, is) in finished.iter().zip(held_tasks(queue).await) {
        assert_eq!((was.state, was.attempts, was.finished_at), (is.state, is.attempts, is.finished_at), "{}", is.key);
    }
}

/// The held tasks, without what freezing a host left in the queue.
async fn held_tasks(queue: &Queue) -> Vec<Task> {
    all_tasks(queue).await.into_iter().filter(|task| task.key.starts_with("held-")).collect()
}

#[tokio::test]
async fn a_restart_keeps_a_host_in_its_fleet_and_its_end_leaves_it_at_once() {
    let place = Place::new("restarts").await;
    place.site.plug_guest("zoo");
    let queue = place.site.queue().await;
    let host = place.host(2, LONG_TIMER, json!({})).await;
    host.signal(Signal::USR1);
    host.logged_times("ready", 2, PATIENCE).await;
    submit(&queue, &[task("after", "silent", json!({}))]).await;
    wait_for_finished(&queue, 1, PATIENCE).await;
    let told = place.site.laelaps(["-c", "laelaps.yml", "watchdog", "status"]).await.success().stdout;
    assert!(told.contains("/fleet: a fleet of 1 host\n") && told.contains("acting"), "{told}");
    let told = place.site.laelaps(["-c", "laelaps.yml", "check"]).await.success().stdout;
    assert!(told.contains("fleet          /fleet: 1 host, sessions end after 60s"), "{told}");
    host.stop().await;
    assert!(place.fleet().await.is_empty(), "a host that ends leaves the fleet, and does not let its session time out");
}
