//! Tasks that enter behind the place where claims have come to.

use std::time::{Duration, Instant};

use laelaps_queue::HostId;

use crate::fixture::{Fixture, keys};

/// Tasks that are claimed before: as many as make a look from the head slow, while an old snapshot keeps what they left.
const BEFORE: usize = 8_000;
/// A look from the head comes within a second, or within so many times what the last one took, whichever is longer.
const SHARE: u32 = 20;

/// Claims, and the longest of them so far: no look from the head took longer.
struct Claims<'f> {
    fixture: &'f Fixture,
    host: HostId,
    longest: Duration,
}

impl Claims<'_> {
    async fn next(&mut self, limit: u32) -> Vec<String> {
        let begun = Instant::now();
        let claimed = self.fixture.claim(self.host, limit).await;
        self.longest = self.longest.max(begun.elapsed());
        keys(&claimed).into_iter().map(str::to_owned).collect()
    }
}

/// `enter` commits a producer's transaction in which the task `slow` was submitted before all others. The bound is held against what the claims of
/// this very run took, so that a busy machine lengthens both.
pub(crate) async fn what_enters_before_the_mark_is_claimed_within_the_bound(fixture: &Fixture, enter: impl AsyncFnOnce()) {
    let mut claims = Claims { fixture, host: fixture.host().await, longest: Duration::ZERO };
    fixture.submit_some("quick", BEFORE).await;
    for _ in 0..BEFORE / 500 {
        assert_eq!(claims.next(500).await.len(), 500);
    }
    // There is always something that need not be looked for from the head.
    fixture.submit_some("more", BEFORE / 2).await;
    assert_eq!(claims.next(1).await, ["more0"]);
    enter().await;
    let entered = Instant::now();
    loop {
        let (waited, bound) = (entered.elapsed(), Duration::from_secs(1).max(claims.longest * SHARE));
        if claims.next(1).await == ["slow"] {
            return;
        }
        assert!(waited < bound, "a claim that began after {waited:?}, beyond {bound:?}, did not find it");
    }
}
