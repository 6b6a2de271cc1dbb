use laelaps_queue::Progress;
use laelaps_tests::{PATIENCE, eventually};

use super::*;
use crate::trial::{LONG, Trial, stale};

fn progress(done: u64) -> Option<Progress> {
    Some(Progress { done, total: None, note: String::new() })
}

async fn progress_becomes(trial: &Trial, done: u64) {
    eventually(PATIENCE, &format!("the progress is {done}"), async || {
        let task = trial.queue.backend().get("task-0").await.unwrap().unwrap();
        if task.progress.as_ref().is_some_and(|progress| progress.done == done) { Ok(()) } else { Err(format!("{task:?}")) }
    })
    .await;
}

#[tokio::test]
async fn progress_is_answered_from_the_lease_known_here_and_the_last_of_it_is_written() {
    let trial = Trial::open().await;
    let task = trial.claimed(1).await.remove(0);
    let (leases, _control) = trial.holding(&task, LONG, LONG);
    assert_eq!(leases.note_progress(task.lease_ref, progress(1)), Some(true));
    progress_becomes(&trial, 1).await;
    for done in 2..=1_000 {
        assert_eq!(leases.note_progress(task.lease_ref, progress(done)), Some(true));
    }
    progress_becomes(&trial, 1_000).await;
    leases.settling(task.lease_ref);
    assert_eq!(leases.note_progress(task.lease_ref, progress(1_001)), Some(true));
    assert!(leases.beat(task.lease_ref, None, Some(LONG)).await, "with a time to hold it for, the database is asked");
    leases.forget(task.lease_ref);
    assert_eq!(leases.note_progress(task.lease_ref, None), Some(false));
}

#[tokio::test]
async fn a_lease_that_may_have_run_out_is_known_by_the_database_alone() {
    let trial = Trial::open().await;
    let task = trial.claimed(1).await.remove(0);
    let (leases, _control) = trial.holding(&task, Duration::ZERO, LONG);
    assert_eq!(leases.note_progress(task.lease_ref, progress(1)), None);
    assert!(leases.is_behind());
    assert!(leases.beat(task.lease_ref, progress(1), Some(LONG)).await, "it has not run out there");
    assert!(!leases.is_behind());
    assert_eq!(leases.note_progress(task.lease_ref, progress(2)), Some(true));
}

#[tokio::test]
async fn a_lease_that_the_database_calls_lost_is_held_no_more() {
    let trial = Trial::open().await;
    let task = trial.claimed(1).await.remove(0);
    let lost = ClaimedTask { lease_ref: stale(&task), ..task };
    let (leases, control) = trial.holding(&lost, Duration::ZERO, Duration::from_millis(10));
    control.until(|control| control.state() == Some(Cancellation::LeaseLost)).await;
    assert_eq!(leases.note_progress(lost.lease_ref, progress(1)), Some(false));
    assert!(leases.is_lost(lost.lease_ref) && !leases.is_behind(), "nothing is left to ask about it");
}

#[tokio::test]
async fn an_outcome_that_waits_is_not_lost_because_the_database_does_not_answer() {
    let trial = Trial::open().await;
    let tasks = trial.claimed(2).await;
    let (leases, running) = trial.holding(&tasks[0], Duration::ZERO, Duration::from_millis(10));
    let settling = Arc::new(Control::new());
    leases.hold(&tasks[1], Instant::now(), Duration::ZERO, Arc::clone(&settling));
    leases.settling(tasks[1].lease_ref);
    trial.queue.close().await;
    // A renewal that came before the end of the queue has told both that they hold, for no time at all.
    running.until(|control| control.state() == Some(Cancellation::LeaseLost)).await;
    assert_eq!(settling.state(), None);
    assert!(!leases.is_lost(tasks[1].lease_ref));
}
