//! A host that did not run for longer than its leases last, and is back: nobody is to blame for that.

use laelaps_queue::State;
use laelaps_tests::{PATIENCE, Signal, Site, eventually, submit, task, wait_for_state};
use serde_json::json;

use crate::fleet::freeze;

/// More than it takes to be suspected, and to run alone.
const SLEEPS: usize = 3;
const TASKS: usize = 4;

laelaps_tests::on_every_native_database! {
    async fn no_task_is_blamed_for_a_host_that_slept() {
        let site = Site::new().await;
        site.plug_guest("zoo");
        site.configure(json!({ "processors": TASKS, "alive_time": 5, "task_heartbeat_interval": 0.5 }));
        let queue = site.queue().await;
        let data = json!({ "mark": "/marks/held", "gate": "/marks/gate" });
        let held: Vec<_> = (0..TASKS).map(|number| task(format!("held-{number}"), "silent", data.clone())).collect();
        submit(&queue, &held).await;
        let host = site.start().await;
        for sleep in 0..=SLEEPS {
            // All at once, each time: none has to run alone.
            eventually(PATIENCE, "all tasks run at once", async || {
                let (begun, stats) = (site.marks("held").len(), queue.stats().await.unwrap());
                if begun > sleep * TASKS && stats.running == TASKS as u64 { Ok(()) } else { Err(format!("{begun} begun, {stats:?}")) }
            })
            .await;
            eventually(PATIENCE, "no loss counts against a task", async || {
                for task in &held {
                    let task = queue.backend().get(&task.key).await.unwrap().unwrap();
                    if task.lost > 0 {
                        return Err(format!("{} was lost {} times", task.key, task.lost));
                    }
                }
                Ok(())
            })
            .await;
            if sleep == SLEEPS {
                break;
            }
            freeze(&host, &queue).await;
            eventually(PATIENCE, "the leases have run out", async || {
                let now = queue.backend().now().await.unwrap();
                let until = queue.backend().get("held-0").await.unwrap().unwrap().until;
                if until.is_none_or(|until| until < now) { Ok(()) } else { Err(format!("{until:?} at {now:?}")) }
            })
            .await;
            host.signal(Signal::CONT);
        }
        site.open_gate("gate");
        for task in &held {
            wait_for_state(&queue, &task.key, State::Finished, PATIENCE).await;
            // On a busy machine a lease may run out once more, and the excuse come after the end.
            eventually(PATIENCE, "no loss counts against a finished task", async || {
                let finished = queue.backend().get(&task.key).await.unwrap().unwrap();
                if (finished.lost, finished.attempts) == (0, 1) { Ok(()) } else { Err(format!("{finished:?}")) }
            })
            .await;
        }
        host.stop().await;
    }
}
