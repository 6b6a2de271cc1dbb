use super::*;
use crate::trial::Trial;

fn digest(content: &str) -> Digest {
    Digest::of(content.as_bytes())
}

#[tokio::test]
async fn a_version_is_written_once_however_many_attempts_run_on_it() {
    let trial = Trial::open().await;
    let versions = Versions::new(trial.backend(), trial.host);
    let control = Control::new();
    let first = versions.begin("zoo".into(), digest("one"), &control).await.unwrap();
    assert!(!versions.0.lock().is_changed, "the database has it");
    let (second, is_noted) = versions.0.enter("zoo".into(), digest("one"));
    assert!(is_noted && versions.0.lock().changed(false).is_none());
    drop((first, second));
    let third = versions.0.enter("zoo".into(), digest("one"));
    assert!(third.1, "between two attempts it stays");
    let (_other, is_noted) = versions.0.enter("zoo".into(), digest("two"));
    assert!(!is_noted);
    assert_eq!(versions.0.lock().changed(false).map(|all| all.len()), Some(2), "another one is another set");
}

#[tokio::test]
async fn a_version_leaves_the_set_when_it_has_not_run_for_a_while_and_is_entered_anew() {
    let trial = Trial::open().await;
    let versions = Versions::new(trial.backend(), trial.host);
    let control = Control::new();
    drop(versions.begin("zoo".into(), digest("one"), &control).await);
    assert!(versions.0.lock().changed(true).is_none(), "not at once");
    for entry in versions.0.lock().running.values_mut() {
        entry.empty_since = entry.empty_since.and_then(|since| since.checked_sub(SHRINK_AFTER));
    }
    assert_eq!(versions.0.lock().changed(true), Some(Vec::new()));
    let (_running, is_noted) = versions.0.enter("zoo".into(), digest("one"));
    assert!(!is_noted, "whether or not the database has heard that it left");
}

#[tokio::test]
async fn an_attempt_that_is_told_to_stop_does_not_wait_for_the_database() {
    let trial = Trial::open().await;
    // The database takes no set of a host that it does not know.
    let versions = Versions::new(trial.backend(), laelaps_queue::HostId(i64::MAX));
    let control = Control::new();
    control.cancel(crate::plugin::Cancellation::Graceful);
    assert!(versions.begin("zoo".into(), digest("one"), &control).await.is_none());
    // What an attempt that was given up has left is gone with it.
    assert!(versions.0.lock().running.values().all(|entry| entry.count == 0));
}
