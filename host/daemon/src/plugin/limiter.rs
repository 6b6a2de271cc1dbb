//! Bounds on the memory of one instance.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use wasmtime::ResourceLimiter;

use super::usage::{Purpose, Share};

/// Bounds the linear memories of all core instances of one component together.
pub(super) struct MemoryLimiter {
    limit_bytes: u64,
    current_bytes: u64,
    /// What the growth that was allowed last has added, in case it then fails.
    last_growth_bytes: u64,
    /// A growth was denied during this attempt: what fails afterwards most likely fails for it.
    denied: bool,
    /// Also read by whoever answers for a guest that does not leave.
    peak_bytes: Arc<AtomicU64>,
    /// Its share of what all guests of this process have.
    share: Share,
}

impl MemoryLimiter {
    pub(super) fn new(limit_bytes: u64) -> Self {
        let share = Share::new(Purpose::Guests, 0);
        Self { limit_bytes, current_bytes: 0, last_growth_bytes: 0, denied: false, peak_bytes: Arc::default(), share }
    }

    /// Start another attempt on the same memory.
    pub(super) fn begin(&mut self, limit_bytes: u64, peak_bytes: Arc<AtomicU64>) {
        self.limit_bytes = limit_bytes;
        self.denied = false;
        self.peak_bytes = peak_bytes;
        self.peak_bytes.store(self.current_bytes, Ordering::Relaxed);
    }

    /// Give back its share. Answers how large it was.
    pub(super) fn uncount(&mut self) -> u64 {
        self.share.set(0);
        self.current_bytes
    }

    pub(super) fn was_denied(&self) -> bool {
        self.denied
    }
}

impl ResourceLimiter for MemoryLimiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) && desired as u64 <= self.limit_bytes {
            // The module's own maximum, not ours. Wasmtime fails the growth by itself.
            self.last_growth_bytes = 0;
            return Ok(true);
        }
        let growth = desired.saturating_sub(current) as u64;
        let total = self.current_bytes.saturating_add(growth);
        if total > self.limit_bytes {
            self.denied = true;
            return Ok(false);
        }
        self.last_growth_bytes = growth;
        self.current_bytes = total;
        self.share.set(total);
        self.peak_bytes.fetch_max(total, Ordering::Relaxed);
        Ok(true)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.current_bytes -= self.last_growth_bytes;
        self.last_growth_bytes = 0;
        self.share.set(self.current_bytes);
        Ok(())
    }

    fn table_growing(&mut self, _current: usize, _desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        // The pool bounds each table's elements.
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(limit_bytes: u64) -> (MemoryLimiter, Arc<AtomicU64>) {
        let mut limiter = MemoryLimiter::new(limit_bytes);
        let peak = Arc::new(AtomicU64::new(0));
        limiter.begin(limit_bytes, peak.clone());
        (limiter, peak)
    }

    #[test]
    fn all_memories_together_stay_within_the_limit() {
        let (mut limiter, peak) = limiter(100);
        assert!(limiter.memory_growing(0, 60, None).expect("no trap"));
        assert!(!limiter.memory_growing(0, 50, None).expect("no trap"), "a second memory counts too");
        assert!(limiter.was_denied());
        assert!(limiter.memory_growing(0, 40, None).expect("no trap"));
        assert_eq!(peak.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn a_growth_that_fails_afterwards_is_given_back() {
        let (mut limiter, _) = limiter(100);
        assert!(limiter.memory_growing(0, 60, None).expect("no trap"));
        limiter.memory_grow_failed(wasmtime::Error::msg("no")).expect("no trap");
        assert!(limiter.memory_growing(0, 100, None).expect("no trap"));
    }

    #[test]
    fn a_modules_own_maximum_is_not_our_denial() {
        let (mut limiter, _) = limiter(100);
        assert!(limiter.memory_growing(0, 60, Some(50)).expect("no trap"));
        assert!(!limiter.was_denied());
    }

    #[test]
    fn the_next_attempt_starts_without_the_denial_of_the_last() {
        let (mut limiter, _) = limiter(100);
        assert!(limiter.memory_growing(0, 80, None).expect("no trap"));
        assert!(!limiter.memory_growing(80, 180, None).expect("no trap"));
        let peak = Arc::new(AtomicU64::new(0));
        limiter.begin(100, peak.clone());
        assert!(!limiter.was_denied());
        assert_eq!(peak.load(Ordering::Relaxed), 80, "the memory itself is still there");
    }
}
