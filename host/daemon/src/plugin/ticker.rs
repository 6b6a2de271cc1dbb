//! The epoch ticker: makes guests look up from their work every few milliseconds, and rests while no guest is on a thread.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::control::Control;

/// The time between two looks of a busy guest at its flags.
pub(super) const TICK: Duration = Duration::from_millis(10);
/// Ticks without any guest before the ticker rests: waking it costs a system call, which a busy host should not pay for every task.
const IDLE_TICKS: u32 = 20;

/// Ends the ticker when dropped, once no guest is on a thread any more.
pub(super) struct Ticker {
    shared: Arc<Shared>,
    thread: thread::Thread,
}

/// What guests' futures need of the ticker.
#[derive(Clone)]
pub(super) struct Presence {
    shared: Arc<Shared>,
    thread: thread::Thread,
}

#[derive(Default)]
struct Shared {
    /// Guests that are on a thread at this moment.
    on_thread: AtomicUsize,
    resting: AtomicBool,
    ended: AtomicBool,
}

impl Ticker {
    /// Start the thread.
    /// `also` is done at every tick.
    pub(super) fn start(engine: wasmtime::Engine, also: impl FnMut() + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let handle: JoinHandle<()> = thread::Builder::new().name("laelaps-ticker".into()).spawn({
            let shared = shared.clone();
            move || shared.tick(&engine, also)
        })?;
        Ok(Self { shared, thread: handle.thread().clone() })
    }

    pub(super) fn presence(&self) -> Presence {
        Presence { shared: self.shared.clone(), thread: self.thread.clone() }
    }

    #[cfg(test)]
    fn is_resting(&self) -> bool {
        self.shared.resting.load(Ordering::SeqCst)
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

impl Shared {
    fn tick(&self, engine: &wasmtime::Engine, mut also: impl FnMut()) {
        let mut idle_ticks = 0;
        loop {
            if self.on_thread.load(Ordering::SeqCst) > 0 {
                engine.increment_epoch();
                also();
                idle_ticks = 0;
            } else if self.ended.load(Ordering::SeqCst) {
                return;
            } else {
                idle_ticks += 1;
            }
            if idle_ticks < IDLE_TICKS {
                thread::park_timeout(TICK);
                continue;
            }
            // Say so first, look again, then rest: whoever enters in between either is seen here or sees `resting`.
            self.resting.store(true, Ordering::SeqCst);
            if self.on_thread.load(Ordering::SeqCst) == 0 && !self.ended.load(Ordering::SeqCst) {
                thread::park();
            }
            self.resting.store(false, Ordering::SeqCst);
            idle_ticks = 0;
        }
    }
}

impl Presence {
    fn enter(&self) {
        self.shared.on_thread.fetch_add(1, Ordering::SeqCst);
        if self.shared.resting.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    fn leave(&self) {
        self.shared.on_thread.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The future of a guest: tells the ticker when it is on a thread, and its [`Control`] when it waits in the host.
pub(super) struct Guarded<F> {
    future: Pin<Box<F>>,
    presence: Presence,
    control: Arc<Control>,
}

impl<F> Guarded<F> {
    pub(super) fn new(future: F, presence: Presence, control: Arc<Control>) -> Self {
        Self { future: Box::pin(future), presence, control }
    }
}

impl<F: Future> Future for Guarded<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        this.control.enter_thread();
        this.presence.enter();
        // A panic below must not leave the ticker running for ever, nor the guest on a thread that goes on without it.
        let presence = LeaveOnDrop(&this.presence, &this.control);
        let poll = this.future.as_mut().poll(context);
        drop(presence);
        poll
    }
}

struct LeaveOnDrop<'a>(&'a Presence, &'a Control);

impl Drop for LeaveOnDrop<'_> {
    fn drop(&mut self) {
        self.0.leave();
        self.1.leave_thread();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(120);

    fn eventually(what: &str, condition: impl Fn() -> bool) {
        let patience = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < patience, "{what} within {PATIENCE:?}");
            thread::yield_now();
        }
    }

    #[test]
    fn the_ticker_rests_while_no_guest_is_on_a_thread_and_wakes_for_one() {
        let engine = wasmtime::Engine::default();
        let ticker = Ticker::start(engine, || {}).expect("thread");
        eventually("rest", || ticker.is_resting());
        let presence = ticker.presence();
        presence.enter();
        eventually("wake", || !ticker.is_resting());
        presence.leave();
        eventually("rest again", || ticker.is_resting());
    }
}
