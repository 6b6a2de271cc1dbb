//! The site's queue, as a producer and an operator see it.

use std::time::Duration;

use laelaps_queue::{Config, Filter, Kind, NewTask, PerfectQueue, Queue, State, Stats, Submitted, Task};
use serde_json::Value;

use crate::Site;
use crate::database::{Database, perfectqueue_table};
use crate::patience::eventually;

impl Site {
    /// The site's queue, initialised. Every call opens the database anew.
    pub async fn queue(&self) -> Queue {
        self.queue_at(self.url()).await
    }

    /// The same in another database.
    pub async fn queue_at(&self, url: &str) -> Queue {
        let mut config = Config::new(url);
        if self.database() == Database::PerfectQueue {
            let table = perfectqueue_table();
            config.kind = Kind::PerfectQueue(PerfectQueue { table, cleanup_interval: 200, side_table: true });
        }
        let queue = Queue::open(&config).await.expect("the queue opens");
        queue.backend().init().await.expect("the queue initialises");
        queue
    }
}

/// Waits until the task is in this state, and returns it with data and output.
pub async fn wait_for_state(queue: &Queue, key: &str, state: State, patience: Duration) -> Task {
    eventually(patience, &format!("task {key} is {}", state.as_str()), async || {
        match queue.backend().get(key).await.expect("the queue answers") {
            Some(task) if task.state == state => Ok(task),
            Some(task) => Err(format!("{}, error {:?}: {:?}", task.state.as_str(), task.error_code, task.error_message)),
            None => Err("no such task".to_owned()),
        }
    })
    .await
}

/// Waits until so many tasks are finished.
pub async fn wait_for_finished(queue: &Queue, count: usize, patience: Duration) -> Stats {
    wait_for_stats(queue, &format!("{count} tasks are finished"), patience, |stats| stats.finished == count as u64).await
}

/// Waits until the queue's numbers are as wanted.
pub async fn wait_for_stats(queue: &Queue, promise: &str, patience: Duration, wanted: impl Fn(&Stats) -> bool) -> Stats {
    eventually(patience, promise, async || {
        let stats = queue.backend().stats().await.expect("the queue answers");
        if wanted(&stats) { Ok(stats) } else { Err(format!("{stats:?}")) }
    })
    .await
}

/// A task of this key, type and data.
#[must_use]
pub fn task(key: impl Into<String>, task_type: &str, data: Value) -> NewTask {
    NewTask::new(key, task_type, data.to_string())
}

/// Submits tasks that are all new.
///
/// # Panics
/// If the queue refuses, or has one of the keys already.
pub async fn submit(queue: &Queue, tasks: &[NewTask]) {
    for batch in tasks.chunks(1_000) {
        let answers = queue.backend().submit(batch).await.expect("the queue takes the tasks");
        assert!(answers.iter().all(|answer| *answer == Submitted::Created), "a key was there already");
    }
}

/// Every task of the queue, with data and output.
///
/// # Panics
/// If the queue does not answer.
pub async fn all_tasks(queue: &Queue) -> Vec<Task> {
    let mut filter = Filter { limit: 1_000, with_data: true, ..Filter::default() };
    let mut tasks = Vec::new();
    loop {
        let page = queue.backend().list(&filter).await.expect("the queue answers");
        tasks.extend(page.tasks);
        match page.next {
            Some(next) => filter.after = Some(next),
            None => return tasks,
        }
    }
}

/// What a finished task's handler returned, as JSON.
///
/// # Panics
/// If it returned nothing, or no JSON.
#[must_use]
pub fn output(task: &Task) -> Value {
    let output = task.output.as_ref().unwrap_or_else(|| panic!("task {} has no output", task.key));
    serde_json::from_slice(output).unwrap_or_else(|error| panic!("the output of task {} is not JSON: {error}", task.key))
}
