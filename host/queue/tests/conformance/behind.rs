//! Tasks that enter behind the place where claims have come to.

use std::time::{Duration, Instant};

use crate::fixture::{Fixture, keys};

/// Tasks that are claimed before: as many as make a look from the head slow, while an old snapshot keeps what they left.
const BEFORE: usize = 8_000;
/// A look from the head comes within a second or within twenty times what it takes, whichever is longer; a machine that runs other tests may
/// take this many times as long.
const BUSY: u32 = 5;

/// `enter` commits a producer's transaction in which the task `slow` was submitted before all others.
pub(crate) async fn what_enters_before_the_mark_is_claimed_within_the_bound(fixture: &Fixture, enter: impl AsyncFnOnce()) {
    let host = fixture.host().await;
    fixture.submit_some("quick", BEFORE).await;
    for _ in 0..BEFORE / 500 {
        assert_eq!(fixture.claim(host, 500).await.len(), 500);
    }
    // There is always something that need not be looked for from the head.
    fixture.submit_some("more", BEFORE / 2).await;
    // Who comes new to it begins at the head.
    let (fresh, begun) = (fixture.beside().await, Instant::now());
    assert_eq!(fresh.claim(host, 1).await.len(), 1);
    let look = begun.elapsed();
    enter().await;
    let (entered, bound) = (Instant::now(), Duration::from_secs(1).max(20 * look) * BUSY);
    let mut claims = 0;
    while !keys(&fixture.claim(host, 1).await).contains(&"slow") {
        claims += 1;
        assert!(entered.elapsed() < bound, "not claimed within {bound:?}, after {claims} claims");
    }
}
