use laelaps_queue::{ClaimedTask, NewTask, State};

use super::*;
use crate::excuses::Excuses;
use crate::trial::{LONG, Trial, stale};

fn settled(task: &ClaimedTask, lease_ref: laelaps_queue::LeaseRef, follow_ups: Vec<NewTask>, control: &Arc<Control>) -> Settled {
    let (attempt, policy) = (Attempt::of(task), Policy { max_attempts: Some(1), ..Policy::default() });
    let event = Event::Finish { output: None, retention: Some(LONG) };
    let settlement = Settlement::of(lease_ref, event, attempt, &policy, 0.0, None, follow_ups);
    let (key, control) = (task.key.as_str().into(), Arc::clone(control));
    Settled { settlement, key, attempt, policy, control, unstored: None, is_limited: false }
}

struct Writing {
    trial: Trial,
    settler: Settler,
    writer: JoinHandle<()>,
    tasks: Vec<ClaimedTask>,
}

impl Writing {
    async fn of(count: u32) -> Self {
        let trial = Trial::open().await;
        let tasks = trial.claimed(count).await;
        let leases = Leases::start(trial.backend(), LONG, Excuses::default());
        for task in &tasks {
            leases.hold(task, std::time::Instant::now(), LONG, Arc::default());
        }
        let (settler, writer) = Settler::start(trial.backend(), leases, Arc::default());
        Self { trial, settler, writer, tasks }
    }

    async fn written(self) -> Trial {
        drop(self.settler);
        self.writer.await.unwrap();
        self.trial
    }
}

#[tokio::test]
async fn an_outcome_that_cannot_be_stored_fails_its_own_task_and_the_others_keep_theirs() {
    let writing = Writing::of(20).await;
    for (number, task) in writing.tasks.iter().enumerate() {
        // A key beyond its bound, of which a handler is told in its call.
        let key = if number == 7 { "k".repeat(300) } else { format!("{}/next", task.key) };
        let follow_up = NewTask::new(key, "t", "{}");
        writing.settler.settle(settled(task, task.lease_ref, vec![follow_up], &Arc::default())).await;
    }
    let trial = writing.written().await;
    for number in 0..20 {
        let task = trial.queue.backend().get(&format!("task-{number}")).await.unwrap().unwrap();
        let expected = if number == 7 { (State::Failed, Some("malformed")) } else { (State::Finished, None) };
        assert_eq!((task.state, task.error_code.as_deref()), expected, "{}: {:?}", task.key, task.error_message);
    }
    assert_eq!(trial.queue.stats().await.unwrap().ready, 19, "each stored its follow-up");
}

#[tokio::test]
async fn what_the_database_calls_lost_does_not_count_and_ends_nothing_else() {
    let writing = Writing::of(2).await;
    let [lost, held] = &writing.tasks[..] else { panic!("two tasks") };
    writing.settler.settle(settled(lost, stale(lost), Vec::new(), &Arc::default())).await;
    writing.settler.settle(settled(held, held.lease_ref, Vec::new(), &Arc::default())).await;
    let stats = writing.written().await.queue.stats().await.unwrap();
    assert_eq!((stats.finished, stats.running), (1, 1));
}
