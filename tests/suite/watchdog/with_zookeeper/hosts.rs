//! A fleet of real hosts: who dies, freezes or is cut off loses its tasks to the others within seconds, and nothing else does.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use laelaps_queue::{Config, Queue, State, Task};
use laelaps_test_databases::{Durability, postgres};
use laelaps_test_zookeeper::{Ensemble, Server, TICK, shared};
use laelaps_tests::{
    Database, Host, LONG, PATIENCE, Proxy, Signal, Site, all_tasks, eventually, measured, on, promised, submit, task,
    wait_for_finished,
};
use serde_json::{Value, json};

use super::Place;

mod killed;
mod outages;
mod stuck;

/// The session timeout of every host here; the servers' tick is 500 ms.
const SESSION: Duration = Duration::from_secs(2);
/// The longest that servers with this tick allow.
const LONGEST_SESSION: Duration = Duration::from_secs(10);
/// How long a host may go without a kick, where the test is not about that.
const LONG_TIMER: u64 = 30;
/// The same where it is.
const TIMER: Duration = Duration::from_secs(2);

impl Place {
    /// The members of a host's section that put it into the fleet `/fleet`.
    fn watchdog_at(&self, servers: &str, timer_seconds: u64) -> Value {
        json!({ "servers": servers, "root": "/fleet", "session_timeout": SESSION.as_secs(), "timer": timer_seconds })
    }

    /// Starts a host of the fleet with so many processors; `changes` replaces members of its section.
    async fn host(&self, processors: usize, timer_seconds: u64, changes: Value) -> Host {
        self.configure(processors, timer_seconds, changes);
        self.site.start().await
    }

    fn configure(&self, processors: usize, timer_seconds: u64, changes: Value) {
        let watchdog = self.watchdog_at(&self.servers, timer_seconds);
        let mut section = json!({ "processors": processors, "poll_interval": 0.2, "watchdog": watchdog });
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
        eventually(PATIENCE, &format!("the fleet has {count} hosts"), async || {
            let hosts = self.fleet().await;
            let identities = hosts.iter().map(|host| host["identity"].as_str().expect("a text").to_owned()).collect();
            if hosts.len() == count { Ok(identities) } else { Err(format!("{hosts:?}")) }
        })
        .await
    }
}

/// Tasks that say that they have begun, and wait for the gate.
async fn submit_held(queue: &Queue, range: std::ops::Range<usize>) {
    let held = |number| task(format!("held-{number}"), "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" }));
    submit(queue, &range.map(held).collect::<Vec<_>>()).await;
}

/// Waits until attempts of held tasks have begun so often in all.
async fn have_begun(site: &Site, times: usize) {
    eventually(LONG, &format!("held tasks have begun {times} times"), async || {
        let begun = site.marks("held").len();
        if begun == times { Ok(()) } else { Err(format!("{begun}")) }
    })
    .await;
}

/// Waits until all are finished: each counted once, and lost as often as its key says it was.
async fn all_finish(queue: &Queue, count: usize, lost: impl Fn(&Task) -> u32) {
    wait_for_finished(queue, count, LONG).await;
    for task in held_tasks(queue).await {
        assert_eq!((task.state, task.attempts, task.lost), (State::Finished, 1, lost(&task)), "{}", task.key);
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
    assert!(told.contains("fleet          /fleet: 1 host, sessions end after 2s"), "{told}");
    host.stop().await;
    assert!(place.fleet().await.is_empty(), "a host that ends leaves the fleet, and does not let its session time out");
}
