//! What becomes of an attempt, whatever its handler does.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps::plugin::{Cancellation, Completion, Control, Limits};
use laelaps_queue::{Event, FailureKind};

use crate::support::{Bench, Held, PATIENCE, config, number, output};

/// An attempt is answered for before a task of the same runtime has had so many naps of [`NAP`]: a second on an idle machine, and on a busy one as
/// much longer as everything takes there. The promise, 100 ms, is measured by the suite's `offenders`, and held to by tests/soak.
const ANSWER_NAPS: u32 = 100;
const NAP: Duration = Duration::from_millis(10);

#[tokio::test(flavor = "multi_thread")]
async fn each_outcome_of_a_handler_arrives_as_it_was_meant() {
    let bench = Bench::new().await;
    assert_eq!(output(&bench.run("f", b"{\"a\":1}").await), b"{\"a\":1}");
    assert_eq!(output(&bench.run("f", b"").await), b"{}", "empty data arrives as an empty object");
    assert_eq!(bench.run("r", b"").await.event, Event::Retry { delay: Some(Duration::from_secs(5)) });
    assert_eq!(bench.run("l", b"").await.event, Event::Release { delay: None });
    let failure = |kind| Event::Failure { kind, code: "oops".into(), message: "it went wrong".into() };
    assert_eq!(bench.run("e", b"").await.event, failure(FailureKind::Retry));
    assert_eq!(bench.run("j", b"").await.event, failure(FailureKind::Reject));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outcome_that_the_contract_does_not_allow_is_malformed() {
    let bench = Bench::new().await;
    assert!(matches!(bench.run("R", b"").await.event, Event::Malformed { message } if message.contains("more than ten years")));
    let too_large = bench.run("o", b"").await.event;
    assert!(matches!(&too_large, Event::Malformed { message } if message.contains("at once")), "{too_large:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trap_is_named_with_its_stack() {
    let bench = Bench::new().await;
    let Event::Trap { message } = bench.run("t", b"").await.event else { panic!("no trap") };
    assert!(message.starts_with("the handler trapped: it reached an `unreachable` instruction"), "{message}");
    assert!(message.contains("\n  at "), "{message}");
    let Event::Trap { message } = bench.run("x", b"").await.event else { panic!("no trap") };
    assert!(message.starts_with("the handler's call stack overflowed"), "{message}");
    assert!(message.contains("recurse"), "{message}");
    assert!(message.len() <= 4_096);
    assert_eq!(output(&bench.run("f", b"{}").await), b"{}", "the host goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_allocates_without_end_is_out_of_memory_and_never_gets_more() {
    let mut bench = Bench::new().await;
    bench.limits.memory_bytes = 8 << 20;
    for kind in ["a", "A"] {
        let completion = bench.run(kind, b"").await;
        assert_eq!(completion.event, Event::OutOfMemory { limit_bytes: 8 << 20 }, "{kind}");
        assert!(completion.memory_bytes_peak <= 8 << 20);
        assert!(completion.memory_bytes_peak > 7 << 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_that_loops_is_stopped_at_its_time_limit() {
    let mut bench = Bench::new().await;
    let limit = Duration::from_millis(200);
    bench.limits.time = Some(limit);
    // `y` was refused memory before: it is stopped for its time all the same.
    for kind in ["w", "c", "g", "m", "y"] {
        let begun = Instant::now();
        let completion = answered_soon(kind, limit, bench.run(kind, b"")).await;
        let took = begun.elapsed();
        assert!(matches!(completion.event, Event::TimedOut { .. }), "{kind}: {:?}", completion.event);
        assert!(took >= limit, "{kind}: answered after {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_immediate_stop_is_answered_at_once_whatever_the_guest_does() {
    let bench = Arc::new(Bench::new().await);
    *bench.services.lease.lock().expect("no panic") = Held::Unknown;
    // Loops, waits in a loop, logs, fills memory, loops after memory was refused, and waits for a database that does not answer.
    for kind in ["w", "c", "g", "m", "y", "h"] {
        let control = Arc::new(Control::new());
        let mut attempt = tokio::spawn({
            let (bench, control) = (bench.clone(), control.clone());
            async move { bench.invoke(kind, b"", &control).await }
        });
        if kind == "h" {
            goes_on(&mut attempt, || control.turns() > 0 && control.silence().is_none()).await;
        } else {
            goes_on(&mut attempt, || computes(&control)).await;
        }
        // `c` sees the order by itself and releases; everything else is stopped.
        let completion = answered_after(Cancellation::Immediate, &control, attempt).await;
        assert!(
            completion.event == Event::Stopped || kind == "c" && completion.event == Event::Release { delay: None },
            "{kind}: {:?}",
            completion.event
        );
    }
    until(|| bench.engine.abandoned() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_cannot_be_interrupted_is_answered_for_and_counted_until_it_leaves() {
    let mut bench = Bench::with(laelaps::plugin::Config { memory_bytes_max: 2 << 30, instances_max: 2, ..config() }).await;
    bench.limits.memory_bytes = 2 << 30;
    let bench = Arc::new(bench);
    // One fill of 1 GiB of fresh memory takes half a second, without a single look at the clock: a thread that gives no sign of life. On a busy
    // machine it may be over before this test has had its turn; then there is another one.
    let patience = Instant::now() + PATIENCE;
    while !is_answered_for_while_it_fills(&bench).await {
        assert!(Instant::now() < patience, "no guest was counted that was answered for while it filled");
    }
    assert_eq!(bench.engine.lost(PATIENCE), 0, "and not lost for that");
    assert_eq!(output(&bench.run("f", b"{}").await), b"{}", "the other slot serves");
    until(|| bench.engine.abandoned() == 0).await;
}

/// Stop a fill in the middle: whether it was still under way, and counted, when it was answered for.
async fn is_answered_for_while_it_fills(bench: &Arc<Bench>) -> bool {
    let control = Arc::new(Control::new());
    let attempt = tokio::spawn({
        let (bench, control) = (bench.clone(), control.clone());
        async move { bench.invoke("M", b"", &control).await }
    });
    let fills = || control.turns() > 0 && control.silence() > Some(Duration::from_millis(60));
    until(|| fills() || attempt.is_finished()).await;
    control.cancel(Cancellation::Immediate);
    let stopped = attempt.await.expect("no panic").event == Event::Stopped;
    let abandoned = bench.engine.abandoned();
    assert!(abandoned <= 1, "{abandoned} were counted for one");
    stopped && abandoned == 1
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_needs_more_than_its_route_allows_from_the_start_is_out_of_memory() {
    let mut bench = Bench::new().await;
    bench.limits.memory_bytes = 64 << 10;
    assert_eq!(bench.run("f", b"{}").await.event, Event::OutOfMemory { limit_bytes: 64 << 10 });
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_pool_that_a_configuration_can_ask_for_is_made() {
    let bench = Bench::with(laelaps::plugin::Config { instances_max: 1_056, memory_bytes_max: 4 << 30, ..config() }).await;
    for completion in futures::future::join_all((0..500).map(|_| bench.run("f", b"{}"))).await {
        assert_eq!(output(&completion), b"{}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_graceful_order_only_asks() {
    let bench = Arc::new(Bench::new().await);
    let control = Arc::new(Control::new());
    control.cancel(Cancellation::Graceful);
    assert_eq!(
        bench.invoke("c", b"", &control).await.event,
        Event::Release { delay: None },
        "the handler asks and comes to an end"
    );
    assert_eq!(output(&bench.invoke("f", b"{}", &control).await), b"{}", "one that does not ask ends as it likes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_is_told_to_the_handler_and_stops_it() {
    let bench = Arc::new(Bench::new().await);
    *bench.services.lease.lock().expect("no panic") = Held::No;
    let completion = bench.run("h", b"").await;
    assert_eq!(number(&completion), 0, "the heartbeat answers false, and the handler may see it");
    let control = Arc::new(Control::new());
    let mut attempt = tokio::spawn({
        let (bench, control) = (bench.clone(), control.clone());
        async move { bench.invoke("w", b"", &control).await }
    });
    goes_on(&mut attempt, || computes(&control)).await;
    assert_eq!(answered_after(Cancellation::LeaseLost, &control, attempt).await.event, Event::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_an_attempt_stops_its_guest() {
    let bench = Bench::new().await;
    let control = Arc::new(Control::new());
    let dropped = tokio::time::timeout(Duration::from_millis(200), bench.invoke("w", b"", &control)).await;
    assert!(dropped.is_err(), "it loops for ever");
    until(|| bench.engine.abandoned() == 0).await;
    // All slots are free again: as many attempts as there are slots run at once.
    let all = (0..8).map(|_| bench.run("f", b"{}"));
    for completion in futures::future::join_all(all).await {
        assert_eq!(output(&completion), b"{}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_carries_progress_and_alive_time_to_the_host() {
    let bench = Bench::new().await;
    assert_eq!(number(&bench.run("h", b"").await), 1);
    let beats = bench.services.beats.lock().expect("no panic");
    let (Some(progress), Some(alive_time)) = &beats[0] else { panic!("{beats:?}") };
    assert_eq!((progress.done, progress.total, progress.note.as_str()), (1, Some(2), "it went wrong"));
    assert_eq!(*alive_time, Duration::from_secs(90));
}

#[tokio::test(flavor = "multi_thread")]
async fn data_is_updated_only_with_json_objects_and_under_the_lease() {
    let bench = Bench::new().await;
    assert_eq!(output(&bench.run("u", b"{\"a\":1}").await), b"");
    assert_eq!(*bench.services.updates.lock().expect("no panic"), [b"{\"a\":1}"]);
    assert_eq!(output(&bench.run("u", b"[1]").await), b"invalid-data");
    *bench.services.lease.lock().expect("no panic") = Held::No;
    assert_eq!(output(&bench.run("u", b"{}").await), b"lease-lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn follow_ups_come_with_an_outcome_and_are_dropped_with_a_trap() {
    let mut bench = Bench::new().await;
    let completion = bench.run("s", b"{\"n\":1}").await;
    let [task] = completion.follow_ups.as_slice() else { panic!("{:?}", completion.follow_ups) };
    assert_eq!((task.key.as_str(), task.task_type.as_str(), task.data.as_slice()), ("a-key", "oops", &b"{\"n\":1}"[..]));
    assert_eq!(task.max_running, Some(3));
    let trapped = bench.run("S", b"{}").await;
    assert!(matches!(trapped.event, Event::Trap { .. }));
    assert!(trapped.follow_ups.is_empty());
    assert_eq!(output(&bench.run("s", b"not json").await), b"invalid-data");
    let completion = bench.run("F", b"{}").await;
    assert_eq!((output(&completion), completion.follow_ups.len()), (&b"too-many"[..], 1_000));
    bench.limits.follow_up_bytes = 100;
    let completion = bench.run("F", b"{\"some\":\"data\"}").await;
    assert_eq!((output(&completion), completion.follow_ups.len()), (&b"too-large"[..], 6));
}

#[tokio::test(flavor = "multi_thread")]
async fn how_many_follow_ups_wait_is_asked_once_and_then_counted_on() {
    let bench = Bench::new().await;
    *bench.services.waiting.lock().expect("no panic") = (0, Some(9_997));
    let completion = bench.run("F", b"{}").await;
    assert_eq!((output(&completion), completion.follow_ups.len()), (&b"too-many-waiting"[..], 3));
    assert_eq!(bench.services.waiting.lock().expect("no panic").0, 1, "asked once");
    assert_eq!(bench.run("n", b"").await.follow_ups.len(), 0);
    assert_eq!(bench.services.waiting.lock().expect("no panic").0, 1, "not asked for an attempt that submits nothing");
    *bench.services.lease.lock().expect("no panic") = Held::Unknown;
    let completion = bench.run("s", b"{}").await;
    assert_eq!((output(&completion), completion.follow_ups.len()), (&b"unavailable"[..], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_answers_deadline_creation_and_settings() {
    let mut bench = Bench::new().await;
    assert_eq!(output(&bench.run("d", b"").await), b"", "no limit, no deadline");
    assert_eq!(number(&bench.run("b", b"").await), 1_700_000_000_000);
    assert_eq!(output(&bench.run("k", b"").await), b"blue");
    let rest = number(&bench.run("K", b"").await);
    assert_eq!(rest, 0x01_00_00_01, "one setting, no most attempts, debug lines not kept, info lines kept: {rest:#x}");
    bench.limits.time = Some(Duration::from_secs(10_000));
    let deadline = number(&bench.run("d", b"").await);
    assert!((1_700_005_000_000..=1_700_010_000_000).contains(&deadline), "{deadline}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_logs_neither_grow_nor_slow_the_host() {
    let mut bench = Bench::new().await;
    bench.limits = Limits { log_bytes: 4 << 10, ..Limits::default() };
    let bench = Arc::new(bench);
    let control = Arc::new(Control::new());
    let mut noisy = tokio::spawn({
        let (bench, control) = (bench.clone(), control.clone());
        async move { bench.invoke("g", b"", &control).await }
    });
    assert_eq!(output(&bench.run("f", b"{}").await), b"{}");
    goes_on(&mut noisy, || control.turns() >= 50).await;
    control.cancel(Cancellation::Immediate);
    let captured = noisy.await.expect("no panic").captured;
    assert!(captured.lines.iter().map(|line| line.text.len()).sum::<usize>() <= 4 << 10);
    assert!(captured.dropped_lines > 1_000, "{}", captured.dropped_lines);
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_below_the_level_are_not_kept() {
    let bench = Bench::new().await;
    let captured = bench.run("G", b"").await.captured;
    assert_eq!(captured.lines.len(), 1);
    assert_eq!(captured.lines[0].level, laelaps::plugin::Level::Error);
    assert_eq!(captured.dropped_lines, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fresh_instance_sees_nothing_of_the_ones_before_it() {
    let bench = Arc::new(Bench::new().await);
    for _ in 0..20 {
        let round = (0..8).map(|_| bench.run("i", b""));
        for completion in futures::future::join_all(round).await {
            assert_eq!(number(&completion), 0, "words of another task's memory");
        }
        assert_eq!(number(&bench.run("n", b"").await), 1, "and no global of theirs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_used_again_as_often_as_allowed_and_never_after_a_failure() {
    let mut bench = Bench::new().await;
    bench.max_requests = Some(3);
    let mut calls = Vec::new();
    for _ in 0..7 {
        calls.push(number(&bench.run("n", b"").await));
    }
    assert_eq!(calls, [1, 2, 3, 1, 2, 3, 1]);
    for bad in ["t", "e", "a"] {
        bench.run(bad, b"").await;
        assert_eq!(number(&bench.run("n", b"").await), 1, "after {bad}");
    }
    let control = Arc::new(Control::new());
    control.cancel(Cancellation::Immediate);
    assert_eq!(bench.invoke("n", b"", &control).await.event, Event::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_attempt_said_is_not_in_the_next_ones_capture() {
    let mut bench = Bench::new().await;
    bench.max_requests = Some(10);
    assert_eq!(bench.run("G", b"").await.captured.lines.len(), 1);
    assert_eq!(bench.run("n", b"").await.captured.lines.len(), 0);
    assert_eq!(bench.run("s", b"{}").await.follow_ups.len(), 1);
    assert_eq!(bench.run("n", b"").await.follow_ups.len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_attempts_than_slots_wait_for_their_turn() {
    let bench = Bench::with(laelaps::plugin::Config { instances_max: 2, ..config() }).await;
    for completion in futures::future::join_all((0..50).map(|_| bench.run("f", b"{}"))).await {
        assert_eq!(output(&completion), b"{}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn light_attempts_run_beside_offenders() {
    // How much slower they are is measured by the suite's `offenders`, at full size by tests/soak.
    let bench = Arc::new(Bench::new().await);
    let control = Arc::new(Control::new());
    let offenders: Vec<_> = ["w", "m", "g", "w"]
        .into_iter()
        .map(|kind| {
            let (bench, control) = (bench.clone(), control.clone());
            tokio::spawn(async move { bench.invoke(kind, b"", &control).await })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(output(&bench.run("f", b"{}").await), b"{}");
    }
    assert!(!offenders.iter().any(tokio::task::JoinHandle::is_finished), "the offenders were there all the time");
    control.cancel(Cancellation::Immediate);
    for offender in offenders {
        assert_eq!(offender.await.expect("no panic").event, Event::Stopped);
    }
}

/// An attempt is well under way, and does not end by itself.
async fn goes_on(attempt: &mut tokio::task::JoinHandle<Completion>, is_under_way: impl Fn() -> bool) {
    tokio::select! {
        biased;
        ended = attempt => panic!("it ended by itself: {ended:?}"),
        () = until(is_under_way) => {}
    }
}

/// The guest has computed so long that it was made to let others have a turn, again and again.
fn computes(control: &Control) -> bool {
    control.turns() >= 3 && control.silence().is_some()
}

/// Order the attempt to end, and hold its answer to the promised time.
async fn answered_after(order: Cancellation, control: &Control, attempt: tokio::task::JoinHandle<Completion>) -> Completion {
    control.cancel(order);
    answered_soon(&format!("{order:?}"), Duration::ZERO, attempt).await.expect("no panic")
}

/// An answer that must come [`ANSWER_NAPS`] after a time at the latest.
async fn answered_soon<T>(to_what: &str, after: Duration, answer: impl Future<Output = T>) -> T {
    let naps = tokio::spawn(async move {
        tokio::time::sleep(after).await;
        let mut naps = tokio::time::interval(NAP);
        naps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for _ in 0..=ANSWER_NAPS {
            naps.tick().await;
        }
    });
    tokio::select! {
        biased;
        answer = answer => answer,
        _ = naps => panic!("{to_what}: not answered for within {ANSWER_NAPS} naps of {NAP:?}"),
    }
}

/// Wait for something that has to come true.
async fn until(condition: impl Fn() -> bool) {
    let mut interval = tokio::time::interval(Duration::from_millis(5));
    let patience = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < patience, "not within {PATIENCE:?}");
        interval.tick().await;
    }
}
