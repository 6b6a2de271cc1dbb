//! When a processor is kept free for a task of a user with a limit.
//!
//! Such tasks are only claimed for processors that are free: one that waited in the buffer would keep back its user on all hosts. But while the
//! buffer has tasks no processor is ever free. So from time to time the next one that becomes free waits for a claim before it takes a task of
//! the buffer: at once again while such tasks are found, and five times a second while there are none. A turn costs a processor the time of a claim, about
//! two milliseconds. It does not find every such task at once: where users are alike, only every eighth task that is picked is of one who was
//! passed over for long.

use std::time::Duration;

use tokio::time::Instant;

const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(200);

pub(super) struct Turns {
    /// When a free processor was offered last.
    offered_at: Instant,
    /// So much later the next one is kept free.
    pause: Duration,
}

impl Default for Turns {
    fn default() -> Self {
        Self { offered_at: Instant::now(), pause: Duration::ZERO }
    }
}

impl Turns {
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.offered_at) >= self.pause
    }

    /// A claim that offered a free processor was answered, with such a task or without.
    pub(super) fn offered(&mut self, found: bool, now: Instant) {
        self.offered_at = now;
        self.pause = if found { Duration::ZERO } else { (self.pause * 2).clamp(PAUSE_FIRST, PAUSE_MAX) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_kept_free_often_while_there_is_work_for_it_and_rarely_else() {
        let (mut turns, begun) = (Turns::default(), Instant::now());
        let mut offers = 0;
        for millisecond in 0..60_000 {
            let now = begun + Duration::from_millis(millisecond);
            if turns.is_due(now) {
                turns.offered(false, now);
                offers += 1;
            }
        }
        assert!((300..320).contains(&offers), "{offers}");
        turns.offered(true, begun);
        assert!(turns.is_due(begun));
    }
}
