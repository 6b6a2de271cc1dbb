//! Arbitrary values at the contract: a guest that calls what it is told with what it is told, and returns what it is told.

use std::time::Duration;

use laelaps::plugin::Limits;
use laelaps_queue::{Event, NewTask};
use laelaps_tests::{Dice, Mutation};

use super::{assert_no_panic, count_panics, peak_bytes};
use crate::guests;
use crate::support::{Bench, Held, config};

/// What the process may come to: eight guests of 16 MiB, a test's allocator, and what guests hand over.
const HOST_BYTES_MAX: u64 = 512 << 20;

fn limits() -> Limits {
    Limits {
        memory_bytes: 16 << 20,
        time: Some(Duration::from_millis(500)),
        follow_ups: 20,
        follow_up_bytes: 64 << 10,
        log_bytes: 16 << 10,
        ..Limits::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_guest_hands_over_its_attempt_ends_and_the_host_goes_on() {
    count_panics();
    let mut bench = Bench::of(config(), &guests::told()).await;
    bench.limits = limits();
    let mut events = std::collections::BTreeMap::<&str, u32>::new();
    let mut mutation = Mutation::begin("values");
    while let Some(mut dice) = mutation.next_case() {
        *bench.services.lease.lock().expect("no panic") = if dice.one_in(8) { Held::No } else { Held::Yes };
        // Bench::run has a patience of its own: an attempt that does not end fails there.
        let completion = bench.run("told", &script(&mut dice)).await;
        *events.entry(completion.event.name()).or_default() += 1;
        match &completion.event {
            Event::Malformed { message } | Event::Trap { message } => super::assert_reason(message),
            Event::Failure { code, message, .. } => assert!(code.len() <= 64 && message.len() <= 4_096),
            Event::Finish { output, .. } => assert!(output.as_ref().map_or(0, Vec::len) as u64 <= limits().output_bytes),
            _ => {}
        }
        assert!(completion.follow_ups.len() <= 20);
        for follow_up in &completion.follow_ups {
            assert!(NewTask::check(follow_up).is_ok(), "{follow_up:?}");
        }
        let log_bytes: usize = completion.captured.lines.iter().map(|line| line.text.len()).sum();
        assert!(log_bytes <= 16 << 10, "{log_bytes} bytes of log");
        assert!(completion.memory_bytes_peak <= 16 << 20);
        bench.services.beats.lock().expect("no panic").clear();
        bench.services.updates.lock().expect("no panic").clear();
        assert_no_panic();
        assert!(peak_bytes() < HOST_BYTES_MAX, "this process came to {} MiB", peak_bytes() >> 20);
    }
    println!("measured: how attempts with arbitrary values ended: {events:?}");
}

/// What the guest is told: which calls, with which values, and what to return.
fn script(dice: &mut Dice) -> Vec<u8> {
    let length_max = 1 << dice.below(12);
    let mut script = dice.bytes(length_max);
    if dice.one_in(2) {
        // Texts that the contract has a use for, where pointers may lead.
        for text in ["{\"a\":1}", "a-key", "\u{1b}[31m", "{\"type\":null}", "[[[[[[", "\u{0}", "colour"] {
            let at = dice.below(script.len() + 1);
            script.splice(at..at, text.bytes());
        }
    }
    script
}
