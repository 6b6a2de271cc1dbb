//! The table "what follows an outcome" of the design, row by row, and what has to hold whatever happens.

use proptest::prelude::*;

use super::*;
use crate::{Lease, TaskId};

fn policy() -> Policy {
    Policy {
        backoff: Backoff::Fixed(Duration::from_secs(7)),
        retry_wait: Duration::from_secs(300),
        retention: Duration::from_secs(60),
        failed_retention: Duration::from_secs(600),
        max_attempts: None,
        suspicion: Duration::from_secs(3_600),
    }
}

fn first_attempt() -> Attempt {
    Attempt { attempt: 1, max_attempts: None, releases: 0, lost: 0, lost_alone: 0, alone: false, lost_for: Duration::ZERO }
}

fn failure(kind: FailureKind) -> Event {
    Event::Failure { kind, code: "code".to_owned(), message: "words".to_owned() }
}

fn what_counts_as_an_attempt() -> Vec<Event> {
    vec![
        Event::Retry { delay: None },
        failure(FailureKind::Retry),
        Event::Trap { message: "unreachable".to_owned() },
        Event::TimedOut { limit: Duration::from_secs(1) },
        Event::OutOfMemory { limit_bytes: 1 << 26 },
        Event::Malformed { message: "output too large".to_owned() },
    ]
}

fn wait(delay: Duration, counted: bool, releases: u32) -> Verdict {
    Verdict::Wait { delay: Some(delay), counted, releases, lost: 0, lost_alone: 0, alone: false }
}

fn in_place(releases: u32) -> Verdict {
    Verdict::Wait { delay: None, counted: false, releases, lost: 0, lost_alone: 0, alone: false }
}

#[test]
fn a_finish_is_kept_for_the_retention_unless_it_says_otherwise() {
    let output = Some(b"out".to_vec());
    let event = Event::Finish { output: output.clone(), retention: None };
    assert_eq!(
        decide(&event, first_attempt(), &policy(), 0.0),
        Verdict::Finish { output: output.clone(), retention: Duration::from_secs(60) }
    );
    let event = Event::Finish { output: output.clone(), retention: Some(Duration::ZERO) };
    assert_eq!(decide(&event, first_attempt(), &policy(), 0.0), Verdict::Finish { output, retention: Duration::ZERO });
}

#[test]
fn what_may_go_better_next_time_waits_for_the_backoff_and_counts() {
    let attempt = Attempt { releases: 9, ..first_attempt() };
    for event in what_counts_as_an_attempt() {
        assert_eq!(decide(&event, attempt, &policy(), 0.0), wait(Duration::from_secs(7), true, 0), "{event:?}");
    }
}

#[test]
fn a_retry_waits_as_long_as_it_asked() {
    let event = Event::Retry { delay: Some(Duration::from_secs(2)) };
    assert_eq!(decide(&event, first_attempt(), &policy(), 0.0), wait(Duration::from_secs(2), true, 0));
}

#[test]
fn the_last_allowed_attempt_ends_as_failed() {
    let of_the_queue = Policy { max_attempts: Some(3), ..policy() };
    let failed = Verdict::Fail { retention: Duration::from_secs(600), lost: 0, lost_alone: 0, counted: true };
    for event in what_counts_as_an_attempt() {
        let second = Attempt { attempt: 2, ..first_attempt() };
        assert!(matches!(decide(&event, second, &of_the_queue, 0.0), Verdict::Wait { .. }), "{event:?}");
        let third = Attempt { attempt: 3, ..first_attempt() };
        assert_eq!(decide(&event, third, &of_the_queue, 0.0), failed, "{event:?}");
        let its_own = Attempt { max_attempts: Some(4), ..third };
        assert!(matches!(decide(&event, its_own, &of_the_queue, 0.0), Verdict::Wait { .. }), "{event:?}");
    }
    let with_delay = Event::Retry { delay: Some(Duration::from_secs(2)) };
    assert_eq!(decide(&with_delay, Attempt { attempt: 3, ..first_attempt() }, &of_the_queue, 0.0), failed);
}

#[test]
fn a_rejection_ends_as_failed_at_once() {
    let failed = Verdict::Fail { retention: Duration::from_secs(600), lost: 0, lost_alone: 0, counted: true };
    assert_eq!(decide(&failure(FailureKind::Reject), first_attempt(), &policy(), 0.0), failed);
}

#[test]
fn a_released_task_waits_behind_the_others_a_stopped_one_in_its_old_place_and_nothing_is_counted() {
    let attempt = Attempt { attempt: 1, max_attempts: Some(1), ..first_attempt() };
    assert_eq!(decide(&Event::Release { delay: None }, attempt, &policy(), 0.0), wait(Duration::ZERO, false, 1));
    assert_eq!(decide(&Event::Stopped, attempt, &policy(), 0.0), in_place(1));
    let delayed = Event::Release { delay: Some(Duration::from_secs(5)) };
    assert_eq!(decide(&delayed, attempt, &policy(), 0.0), wait(Duration::from_secs(5), false, 1));
}

#[test]
fn the_thousandth_release_in_a_row_backs_off() {
    let before = Attempt { releases: 998, ..first_attempt() };
    assert_eq!(decide(&Event::Release { delay: None }, before, &policy(), 0.0), wait(Duration::ZERO, false, 999));
    let at = Attempt { releases: 999, ..first_attempt() };
    assert_eq!(decide(&Event::Release { delay: None }, at, &policy(), 0.0), wait(Duration::from_secs(300), false, 1_000));
    assert_eq!(decide(&Event::Stopped, at, &policy(), 0.0), wait(Duration::from_secs(300), false, 1_000));
    let longer = Event::Release { delay: Some(Duration::from_secs(900)) };
    assert_eq!(decide(&longer, at, &policy(), 0.0), wait(Duration::from_secs(900), false, 1_000));
    assert_eq!(decide(&Event::Retry { delay: None }, at, &policy(), 0.0), wait(Duration::from_secs(7), true, 0));
}

#[test]
fn a_task_whose_plugin_is_under_quarantine_waits_and_never_fails() {
    let attempt = Attempt { attempt: 50, max_attempts: Some(1), releases: 5, ..first_attempt() };
    let event = Event::Quarantined { message: "under quarantine".to_owned() };
    assert_eq!(decide(&event, attempt, &policy(), 0.0), wait(Duration::from_secs(300), false, 0));
}

#[test]
fn a_task_without_route_waits_for_a_host_that_serves_it_as_it_was() {
    let attempt =
        Attempt { attempt: 50, max_attempts: Some(1), releases: 5, lost: 4, lost_alone: 2, alone: true, ..first_attempt() };
    let event = Event::Unrouted { message: "no route".to_owned() };
    let unserved = Verdict::Unserved { delay: Duration::from_secs(300), lost: 4, lost_alone: 2, alone: true };
    assert_eq!(decide(&event, attempt, &policy(), 0.0), unserved);
}

#[test]
fn a_task_lost_twice_runs_alone_and_lost_alone_again_and_again_for_an_hour_fails() {
    let mut attempt = Attempt { releases: 3, max_attempts: Some(1), ..first_attempt() };
    let (mut history, mut delays) = (Vec::new(), Vec::new());
    let end = loop {
        match decide(&Event::Lost, attempt, &policy(), 0.0) {
            Verdict::Wait { delay, counted, releases, lost, lost_alone, alone } => {
                assert_eq!((delay.is_some(), counted, releases), (alone, false, 3), "only a suspect goes behind");
                history.push((lost, lost_alone, alone));
                let delay = delay.unwrap_or_default();
                delays.push(delay.as_secs() / 60);
                // A host dies of it at once.
                attempt = Attempt { lost, lost_alone, alone, lost_for: attempt.lost_for + delay, ..attempt };
            }
            end => break end,
        }
    };
    assert_eq!(history[..4], [(1, 0, false), (2, 0, true), (3, 1, true), (4, 2, true)]);
    assert_eq!(delays, [0, 0, 0, 0, 1, 2, 4, 8, 16, 32], "minutes");
    assert_eq!(end, Verdict::Fail { retention: Duration::from_secs(600), lost: 11, lost_alone: 9, counted: false });
    let early = Attempt { lost: 99, lost_alone: 98, alone: true, lost_for: Duration::from_secs(3_599), ..first_attempt() };
    assert!(matches!(decide(&Event::Lost, early, &policy(), 0.0), Verdict::Wait { .. }), "an outage fails no task");
    let at_once = Policy { suspicion: Duration::ZERO, ..policy() };
    let third = Attempt { lost: 4, lost_alone: 2, alone: true, ..first_attempt() };
    assert!(matches!(decide(&Event::Lost, third, &at_once, 0.0), Verdict::Fail { lost_alone: 3, .. }));
}

#[test]
fn a_handler_that_gives_a_sign_of_its_own_is_no_suspect_any_more() {
    let suspect = Attempt { lost: 4, lost_alone: 2, alone: true, lost_for: Duration::from_secs(9), ..first_attempt() };
    let mut signs = what_counts_as_an_attempt();
    signs.push(Event::Release { delay: None });
    for event in signs {
        let verdict = decide(&event, suspect, &policy(), 0.0);
        assert!(matches!(verdict, Verdict::Wait { lost: 0, lost_alone: 0, alone: false, .. }), "{event:?}: {verdict:?}");
    }
    // These may have ended before the handler ran.
    for event in [Event::Stopped, Event::Overdue, Event::Quarantined { message: String::new() }] {
        let verdict = decide(&event, suspect, &policy(), 0.0);
        assert!(matches!(verdict, Verdict::Wait { lost: 4, lost_alone: 2, alone: true, .. }), "{event:?}: {verdict:?}");
    }
}

#[test]
fn only_what_the_handler_itself_decided_keeps_its_follow_ups() {
    let follow_ups = vec![NewTask::new("next", "type", "{}")];
    let lease_ref = LeaseRef { task: TaskId(1), lease: Lease(1) };
    let kept = |event: Event| {
        !Settlement::of(lease_ref, event, first_attempt(), &policy(), 0.0, None, follow_ups.clone()).follow_ups.is_empty()
    };
    assert!(kept(Event::Finish { output: None, retention: None }));
    assert!(kept(Event::Retry { delay: None }));
    assert!(kept(Event::Release { delay: None }));
    for event in [failure(FailureKind::Retry), failure(FailureKind::Reject), Event::Stopped, Event::Lost] {
        assert!(!kept(event.clone()), "{event:?}");
    }
    assert!(!kept(Event::Trap { message: String::new() }));
    assert!(!kept(Event::TimedOut { limit: Duration::ZERO }));
    assert!(!kept(Event::OutOfMemory { limit_bytes: 0 }));
    assert!(!kept(Event::Malformed { message: String::new() }));
    assert!(!kept(Event::Unrouted { message: String::new() }));
    assert!(!kept(Event::Quarantined { message: String::new() }));
}

#[test]
fn a_retry_that_ends_as_failed_says_why() {
    let attempt = Attempt { attempt: 3, max_attempts: Some(3), ..first_attempt() };
    let lease_ref = LeaseRef { task: TaskId(1), lease: Lease(1) };
    let settlement = Settlement::of(lease_ref, Event::Retry { delay: None }, attempt, &policy(), 0.0, None, Vec::new());
    assert_eq!(settlement.error_code.as_deref(), Some("max-attempts"));
    assert_eq!(settlement.error_message.as_deref(), Some("another try was asked for after attempt 3, the last allowed"));
}

#[test]
fn long_words_are_cut_between_characters() {
    let event = Event::Trap { message: "ä".repeat(4_000) };
    let lease_ref = LeaseRef { task: TaskId(1), lease: Lease(1) };
    let settlement = Settlement::of(lease_ref, event, first_attempt(), &policy(), 0.0, None, Vec::new());
    let message = settlement.error_message.expect("a trap has words");
    assert_eq!(message.len(), 4_096);
    assert!(message.chars().all(|character| character == 'ä'));
}

fn any_attempt() -> impl Strategy<Value = Attempt> {
    (1u32.., any::<Option<u32>>(), any::<u32>(), any::<u32>(), any::<u32>(), any::<bool>()).prop_map(
        |(attempt, max_attempts, releases, lost, lost_alone, alone)| Attempt {
            attempt,
            max_attempts: max_attempts.map(|most| most.max(1)),
            releases,
            lost,
            lost_alone,
            alone,
            lost_for: Duration::from_secs(u64::from(releases)),
        },
    )
}

fn any_event() -> impl Strategy<Value = Event> {
    let delay = prop_oneof![Just(None), (0u64..100_000).prop_map(|ms| Some(Duration::from_millis(ms)))];
    prop_oneof![
        delay.clone().prop_map(|retention| Event::Finish { output: None, retention }),
        delay.clone().prop_map(|delay| Event::Retry { delay }),
        delay.prop_map(|delay| Event::Release { delay }),
        Just(failure(FailureKind::Retry)),
        Just(failure(FailureKind::Reject)),
        any::<String>().prop_map(|message| Event::Trap { message }),
        Just(Event::TimedOut { limit: Duration::from_secs(1) }),
        any::<u64>().prop_map(|limit_bytes| Event::OutOfMemory { limit_bytes }),
        any::<String>().prop_map(|message| Event::Malformed { message }),
        Just(Event::Stopped),
        any::<String>().prop_map(|message| Event::Unrouted { message }),
        any::<String>().prop_map(|message| Event::Quarantined { message }),
        Just(Event::Lost),
        Just(Event::Overdue),
    ]
}

proptest! {
    #[test]
    fn suspicion_grows_by_losses_alone(event in any_event(), attempt in any_attempt(), random in 0.0f64..1.0) {
        let before = (attempt.lost, attempt.lost_alone, attempt.alone);
        if let Verdict::Wait { lost, lost_alone, alone, .. } = decide(&event, attempt, &policy(), random) {
            if event == Event::Lost {
                prop_assert!(lost >= before.0 && lost_alone >= before.1 && alone >= before.2);
            } else {
                prop_assert!((lost, lost_alone, alone) == before || (lost, lost_alone, alone) == (0, 0, false));
            }
        }
    }

    #[test]
    fn without_a_limit_only_rejection_and_being_lost_alone_fail(event in any_event(), attempt in any_attempt(), random in 0.0f64..1.0) {
        let attempt = Attempt { max_attempts: None, ..attempt };
        if let Verdict::Fail { .. } = decide(&event, attempt, &policy(), random) {
            let rejected = matches!(event, Event::Failure { kind: FailureKind::Reject, .. });
            let lost_alone = event == Event::Lost && attempt.lost_alone.saturating_add(u32::from(attempt.alone)) >= 3;
            prop_assert!(rejected || lost_alone);
        }
    }

    #[test]
    fn no_waiting_task_has_used_up_its_attempts(event in any_event(), attempt in any_attempt(), random in 0.0f64..1.0) {
        if let Verdict::Wait { counted: true, .. } = decide(&event, attempt, &policy(), random) {
            prop_assert!(attempt.max_attempts.is_none_or(|most| attempt.attempt < most));
        }
    }

    #[test]
    fn words_of_a_settlement_keep_their_bounds(event in any_event(), attempt in any_attempt(), random in 0.0f64..1.0) {
        let lease_ref = LeaseRef { task: TaskId(1), lease: Lease(1) };
        let name = event.name();
        let settlement = Settlement::of(lease_ref, event, attempt, &policy(), random, None, Vec::new());
        prop_assert_eq!(settlement.event, name);
        prop_assert!(settlement.error_message.as_ref().is_none_or(|message| message.len() <= Settlement::ERROR_MESSAGE_BYTES_MAX));
        prop_assert!(settlement.error_code.as_ref().is_none_or(|code| code.len() <= Settlement::ERROR_CODE_BYTES_MAX));
        if let Verdict::Fail { .. } = settlement.verdict() {
            prop_assert!(!["release", "stop", "overdue", "unrouted"].contains(&settlement.event));
        }
    }
}
