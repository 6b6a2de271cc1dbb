//! What an attempt and the rest of the host tell each other while it runs.
//!
//! Authority: the dispatcher orders ([`Control::cancel`]), the attempt obeys. Orders only grow: none < graceful < immediate < lease lost.
//! A graceful order is no more than an answer to `is-cancelled`; the other two end the attempt, whatever the guest does.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// Why an attempt should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cancellation {
    /// The handler is asked to come to an end by itself.
    Graceful,
    /// The attempt is stopped now.
    Immediate,
    /// The task belongs to somebody else. The handler gets a few tens of milliseconds to see that, then it is stopped.
    LeaseLost,
}

/// The reins of one attempt, shared by whoever runs it and whoever watches it. Used for one attempt only.
#[derive(Debug, Default)]
pub struct Control {
    /// The highest order so far: 0 none, else 1 + the place of the [`Cancellation`].
    ordered: AtomicU8,
    /// The time limit has passed.
    timed_out: AtomicBool,
    /// The guest has to leave: the one flag that the epoch callback reads.
    halt: AtomicBool,
    /// Milliseconds since the first use of the process's monotonic clock, at the thread's last sign of life; of no meaning before the first.
    beat_ms: AtomicU64,
    /// The guest is on a thread at this moment.
    on_thread: AtomicBool,
    /// How often the guest has got its thread.
    turns: AtomicU64,
    /// The most linear memory that the guest has had in this attempt, in bytes.
    pub(super) memory_peak: Arc<AtomicU64>,
    /// Somebody set `ordered`, `timed_out` or `halt`.
    changed: Notify,
}

impl Control {
    /// The reins of an attempt that nobody has asked to end.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Order the attempt to end. An order that is not above the last one changes nothing.
    pub fn cancel(&self, cancellation: Cancellation) {
        let order = match cancellation {
            Cancellation::Graceful => 1,
            Cancellation::Immediate => 2,
            Cancellation::LeaseLost => 3,
        };
        self.ordered.fetch_max(order, Ordering::SeqCst);
        if cancellation == Cancellation::Immediate {
            self.halt.store(true, Ordering::SeqCst);
        }
        self.changed.notify_waiters();
    }

    /// The highest order so far.
    #[must_use]
    pub fn state(&self) -> Option<Cancellation> {
        match self.ordered.load(Ordering::SeqCst) {
            0 => None,
            1 => Some(Cancellation::Graceful),
            2 => Some(Cancellation::Immediate),
            _ => Some(Cancellation::LeaseLost),
        }
    }

    /// The most linear memory that the guest has had in this attempt so far, in bytes.
    #[must_use]
    pub fn memory_peak(&self) -> u64 {
        self.memory_peak.load(Ordering::Relaxed)
    }

    /// How long ago the thread that the guest is on gave its last sign of life. None while it is on no thread: it has not begun, waits in the
    /// host (it sleeps, or waits for a file or the database), or for its turn. Then it may be silent for as long as it likes.
    #[must_use]
    pub fn silence(&self) -> Option<Duration> {
        // Asked first: the beat that is read then is that of its last entry, or a later one.
        self.on_thread
            .load(Ordering::SeqCst)
            .then(|| Duration::from_millis(monotonic_ms().saturating_sub(self.beat_ms.load(Ordering::SeqCst))))
    }

    /// How often the guest has got a thread so far: for its beginning, after a call that waited in the host, and after each turn that it
    /// had to give to others.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.turns.load(Ordering::Acquire)
    }

    /// The guest's thread shows that it lives: the guest begins, is interrupted by the ticker, or leaves.
    pub(super) fn beat(&self) {
        self.beat_ms.store(monotonic_ms(), Ordering::SeqCst);
    }

    pub(super) fn enter_thread(&self) {
        self.beat();
        self.on_thread.store(true, Ordering::SeqCst);
        // After the beat: whoever sees the turn sees no older beat.
        self.turns.fetch_add(1, Ordering::Release);
    }

    pub(super) fn leave_thread(&self) {
        self.on_thread.store(false, Ordering::SeqCst);
    }

    /// Make the guest leave at its next epoch check or host call.
    pub(super) fn halt(&self) {
        self.halt.store(true, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Halts when the answer is dropped.
    pub(super) fn halt_on_drop(self: std::sync::Arc<Self>) -> impl Drop {
        struct HaltOnDrop(std::sync::Arc<Control>);
        impl Drop for HaltOnDrop {
            fn drop(&mut self) {
                self.0.halt();
            }
        }
        HaltOnDrop(self)
    }

    pub(super) fn time_out(&self) {
        self.timed_out.store(true, Ordering::SeqCst);
        self.halt();
    }

    pub(super) fn is_halted(&self) -> bool {
        self.halt.load(Ordering::SeqCst)
    }

    pub(super) fn is_timed_out(&self) -> bool {
        self.timed_out.load(Ordering::SeqCst)
    }

    /// Whether the attempt has been ordered to stop, which a graceful order is not.
    pub(super) fn must_stop(&self) -> bool {
        self.state() > Some(Cancellation::Graceful)
    }

    /// Resolves once `condition` holds of this control. It is asked again after each change.
    pub(crate) async fn until(&self, condition: impl Fn(&Self) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if condition(self) {
                return;
            }
            changed.await;
        }
    }
}

/// Milliseconds on the process's monotonic clock.
fn monotonic_ms() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_only_grow() {
        let control = Control::new();
        assert_eq!(control.state(), None);
        control.cancel(Cancellation::LeaseLost);
        control.cancel(Cancellation::Graceful);
        assert_eq!(control.state(), Some(Cancellation::LeaseLost));
        assert!(control.must_stop());
    }

    #[test]
    fn a_graceful_order_stops_nothing() {
        let control = Control::new();
        control.cancel(Cancellation::Graceful);
        assert!(!control.must_stop());
        assert!(!control.is_halted());
    }

    #[tokio::test]
    async fn a_waiter_sees_an_order_given_before_and_after_it_began_to_wait() {
        let control = std::sync::Arc::new(Control::new());
        let waiter = tokio::spawn({
            let control = control.clone();
            async move { control.until(Control::is_halted).await }
        });
        tokio::task::yield_now().await;
        control.cancel(Cancellation::Immediate);
        let patience = Duration::from_secs(120);
        tokio::time::timeout(patience, waiter).await.expect("woken").expect("no panic");
        tokio::time::timeout(patience, control.until(Control::is_halted)).await.expect("at once");
    }
}
