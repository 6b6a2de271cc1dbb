//! Mutated input to whatever reads a stranger's: modules, configurations, and what a guest hands over.
//!
//! Ten seconds each; `tests/soak mutation` takes ten minutes. A case that fails is named, and repeated with `LAELAPS_SEED` (CONTRIBUTING.md).

mod configuration;
mod modules;
mod values;

use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// Panics of this process so far, on whatever thread.
static PANICS: AtomicU32 = AtomicU32::new(0);

/// Counts panics from now on, which a runtime may catch, and a host's answer hide.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(panic);
        }));
    });
}

fn assert_no_panic() {
    assert_eq!(PANICS.load(Ordering::SeqCst), 0, "something panicked: it is printed above");
}

/// The most memory that this process ever had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// Fails if a reason is none, is too long, or does more to a terminal than stand there.
fn assert_reason(reason: &str) {
    let start: String = reason.chars().take(600).collect();
    assert!(!reason.trim().is_empty(), "no reason");
    assert!(reason.len() <= 4_096, "a reason of {} bytes: {start:?}", reason.len());
    let bad = reason.chars().find(|character| character.is_control() && *character != '\n');
    assert_eq!(bad, None, "{start:?}");
}
