//! The threads on which guests run: queues of guests that have something to do, and threads that take them in turn.
//!
//! A thread holds nothing but the guest that it runs at this moment. That is why they are not the workers of a tokio runtime, which keep
//! things to themselves that nobody can take from them: the guest that was woken last (tokio's LIFO slot), guests that gave up their turn
//! (`yield_now` hands them to the worker, which wakes them when it comes around), and at times the timers of everybody (the worker that
//! waits for them may be sent into a guest without anybody taking over). A worker that never comes back from a guest would strand them all,
//! whatever number of other workers there is. Here a thread that does not come back costs itself and its guest; who notices it calls a
//! replacement ([`Replacements`]), so that as many threads as before serve the others.
//!
//! As many threads as there are processors are woken for guests; a guest gives up its turn at every tick, so those behind it get theirs. More are woken
//! only if a whole tick brings nobody a turn ([`Relief`]): a thread that is woken for a guest that runs for twenty microseconds costs as much
//! as the guest.
//!
//! A guest that gave up its turn is *busy*: it wants the whole tick again. Guests that begin or were woken go before the busy ones, which have their
//! turns when nobody else waits, and at the latest after [`TURNS_BEFORE_BUSY`] others. Busy guests get as many threads as there are processors and no
//! more; those threads do not count when one is woken for somebody else. So a guest that needs a moment waits for no tick, however many compute.
//!
//! Timers belong to a small runtime of their own, whose one worker runs no guest. It wakes guests; they run here. File operations have threads
//! for each plugin (`grants`).

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};
use std::thread;

use tokio::runtime::{Builder, Runtime};

/// Files have threads of their own; nothing else that a guest may call blocks.
const BLOCKING_THREADS_MAX: usize = 1;

/// So many turns of others come before one of a busy guest, if there are so many.
const TURNS_BEFORE_BUSY: u32 = 8;

/// Ends the threads when dropped, once no guest is left: each goes on until it is done, so a guest that shall end has to be told before.
pub(super) struct Threads {
    shared: Arc<Shared>,
}

/// Wakes a thread more when those that are awake do not get on.
pub(super) struct Relief {
    shared: Arc<Shared>,
    /// Turns at the last look.
    turns: u64,
}

/// What a guest needs to have the thread replaced that it does not leave.
#[derive(Clone)]
pub(super) struct Replacements {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Told when a guest is ready, and when threads have to end.
    changed: Condvar,
    /// Timers. None only while it is dropped.
    services: Option<Runtime>,
}

struct State {
    /// Guests that have something to do, in the order in which they got it, but for the busy ones.
    ready: VecDeque<Arc<Task>>,
    /// Guests that gave up their turn, in that order.
    busy: VecDeque<Arc<Task>>,
    /// Threads that run one of those.
    running_busy: usize,
    /// Turns since the last one of a busy guest.
    turns_before_busy: u32,
    /// Busy guests that run beyond one for each eager thread, because a whole tick brought nobody a turn.
    relieved: usize,
    /// Threads there are, lost ones among them.
    threads: usize,
    /// Threads there should be: a stated number, and one for each that is lost.
    wanted: usize,
    /// Threads that wait for a guest and have not been told of one.
    idle: usize,
    /// Threads that were told of a guest and have not looked for it yet. They count as awake: else a burst of guests would wake one thread each.
    told: usize,
    /// Threads that are woken as soon as there is a guest for them, those with busy guests not counted; also the most that run busy ones. One more
    /// for each that is lost.
    eager: usize,
    /// Guests that were taken out of the queue.
    turns: u64,
    /// Guests that have not come to their end.
    alive: usize,
    /// Nobody brings guests any more.
    ended: bool,
}

/// A guest.
struct Task {
    shared: Arc<Shared>,
    place: AtomicU8,
    /// None once it has ended. Locked by the thread that runs it, which is one at a time.
    future: Mutex<Option<BoxedFuture>>,
}

type BoxedFuture = Pin<Box<dyn Future<Output = ()> + Send>>;

/// It waits to be woken.
const WAITING: u8 = 0;
/// It is in the queue.
const READY: u8 = 1;
/// A thread runs it.
const RUNNING: u8 = 2;
/// A thread runs it, and it was woken meanwhile.
const WOKEN: u8 = 3;
/// It has ended.
const DONE: u8 = 4;

impl Threads {
    /// Start so many threads, of which `eager` are woken as soon as there is a guest for them.
    pub(super) fn start(threads: usize, eager: usize) -> io::Result<Self> {
        let services = Builder::new_multi_thread()
            .thread_name("laelaps-timers")
            .worker_threads(1)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .enable_all()
            .build()?;
        let state = State {
            ready: VecDeque::new(),
            busy: VecDeque::new(),
            running_busy: 0,
            turns_before_busy: 0,
            relieved: 0,
            threads: 0,
            wanted: 0,
            idle: 0,
            told: 0,
            eager: eager.max(2),
            turns: 0,
            alive: 0,
            ended: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), services: Some(services) });
        // From here on, dropping it ends those that were started.
        let started = Self { shared };
        for _ in 0..threads {
            started.shared.start_one()?;
        }
        Ok(started)
    }

    /// Run a guest.
    pub(super) fn spawn(&self, guest: impl Future<Output = ()> + Send + 'static) {
        let future = Mutex::new(Some(Box::pin(guest) as BoxedFuture));
        let task = Arc::new(Task { shared: self.shared.clone(), place: AtomicU8::new(READY), future });
        self.shared.state().alive += 1;
        self.shared.push(task);
    }

    pub(super) fn relief(&self) -> Relief {
        Relief { shared: self.shared.clone(), turns: 0 }
    }

    pub(super) fn replacements(&self) -> Replacements {
        Replacements { shared: self.shared.clone() }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.shared.changed.notify_all();
    }
}

impl Relief {
    /// To be called at every tick.
    pub(super) fn look(&mut self) {
        let mut state = self.shared.state();
        let nobody_had_a_turn = state.turns == self.turns;
        self.turns = state.turns;
        let wake = nobody_had_a_turn && state.somebody_waits() && state.tell();
        state.relieved = if wake {
            state.relieved + 1
        } else if nobody_had_a_turn {
            state.relieved
        } else {
            0
        };
        drop(state);
        if wake {
            self.shared.changed.notify_one();
        }
    }
}

impl Replacements {
    /// A guest does not leave its thread: start another one.
    pub(super) fn call(&self) {
        self.shared.state().eager += 1;
        if let Err(error) = self.shared.start_one() {
            tracing::error!(%error, "cannot start a thread for the one that does not come back; this host has one less");
        }
    }

    /// It has left its thread, which is one too many now. Answers to a [`Replacements::call`].
    pub(super) fn release(&self) {
        // The thread that comes back is the next to look, and ends.
        let mut state = self.shared.state();
        state.wanted -= 1;
        state.eager -= 1;
    }
}

impl Shared {
    /// A panic while the lock was held cannot have left a half-changed state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Want one more thread, and start it.
    fn start_one(self: &Arc<Self>) -> io::Result<()> {
        let mut state = self.state();
        state.wanted += 1;
        if state.threads >= state.wanted {
            // One that came back has not ended yet, and now need not.
            return Ok(());
        }
        let shared = self.clone();
        thread::Builder::new().name("laelaps-guest".into()).spawn(move || shared.work())?;
        state.threads += 1;
        Ok(())
    }

    fn work(&self) {
        let services = self.services.as_ref().map(|services| services.handle().clone());
        let _context = services.as_ref().map(tokio::runtime::Handle::enter);
        while let Some((task, is_busy)) = self.next() {
            task.run();
            if is_busy {
                self.state().running_busy -= 1;
            }
        }
    }

    /// The next guest for the thread that asks, and whether it is a busy one; None if the thread has to end.
    fn next(&self) -> Option<(Arc<Task>, bool)> {
        let mut state = self.state();
        loop {
            if state.threads > state.wanted || state.ended && state.alive == 0 {
                state.threads -= 1;
                // It may have been the one that was told of a guest.
                let wake = state.somebody_waits() && state.tell();
                drop(state);
                if wake {
                    self.changed.notify_one();
                }
                return None;
            }
            if let Some(next) = state.take() {
                state.turns += 1;
                // This thread may have been the one that a guest counted on.
                let wake = next.1 && !state.ready.is_empty() && state.may_wake() && state.tell();
                drop(state);
                if wake {
                    self.changed.notify_one();
                }
                return Some(next);
            }
            state.idle += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.awake();
        }
    }

    /// A guest begins, or was woken.
    fn push(&self, task: Arc<Task>) {
        let mut state = self.state();
        state.ready.push_back(task);
        let wake = state.may_wake() && state.tell();
        drop(state);
        if wake {
            self.changed.notify_one();
        }
    }

    /// A guest gives up its turn. The thread that it leaves looks for the next at once, so none need be woken.
    fn push_busy(&self, task: Arc<Task>) {
        self.state().busy.push_back(task);
    }

    /// A guest has come to its end.
    fn ended_one(&self) {
        let mut state = self.state();
        state.alive -= 1;
        let last = state.ended && state.alive == 0;
        drop(state);
        if last {
            self.changed.notify_all();
        }
    }
}

impl State {
    fn somebody_waits(&self) -> bool {
        !self.ready.is_empty() || !self.busy.is_empty()
    }

    /// Whether a thread is to be woken for a guest that is not busy.
    fn may_wake(&self) -> bool {
        self.idle > 0 && self.threads - self.idle - self.running_busy < self.eager
    }

    /// Count one of the waiting threads as awake, if there is one. Whoever does has to notify it.
    fn tell(&mut self) -> bool {
        let can = self.idle > 0;
        if can {
            self.idle -= 1;
            self.told += 1;
        }
        can
    }

    /// A thread has woken: told of a guest, or by itself, which takes the word from the one that was told. That one then counts itself.
    fn awake(&mut self) {
        if self.told > 0 {
            self.told -= 1;
        } else {
            self.idle -= 1;
        }
    }

    /// The guest whose turn it is, and whether it is a busy one.
    fn take(&mut self) -> Option<(Arc<Task>, bool)> {
        let busy_may_run = self.running_busy < self.eager + self.relieved;
        let is_busys_turn = self.ready.is_empty() || self.turns_before_busy >= TURNS_BEFORE_BUSY;
        if busy_may_run
            && is_busys_turn
            && let Some(task) = self.busy.pop_front()
        {
            self.running_busy += 1;
            self.turns_before_busy = 0;
            return Some((task, true));
        }
        let task = self.ready.pop_front()?;
        self.turns_before_busy = self.turns_before_busy.saturating_add(1);
        Some((task, false))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(services) = self.services.take() {
            // Waiting here would block whatever thread happens to be the last, and a runtime's thread must not block.
            services.shutdown_background();
        }
    }
}

impl Task {
    fn run(self: Arc<Self>) {
        self.place.store(RUNNING, Ordering::SeqCst);
        if self.poll() {
            self.place.store(DONE, Ordering::SeqCst);
            return self.shared.ended_one();
        }
        if self.place.compare_exchange(RUNNING, WAITING, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            // It was woken while it ran, which is how a guest gives up its turn.
            self.place.store(READY, Ordering::SeqCst);
            self.shared.clone().push_busy(self);
        }
    }

    /// Let the guest run until it waits; answers whether it has ended, which a panic is too.
    fn poll(self: &Arc<Self>) -> bool {
        let waker = Waker::from(self.clone());
        let mut future = self.future.lock().unwrap_or_else(PoisonError::into_inner);
        let poll = |future: &mut BoxedFuture| future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending();
        let pending = catch_unwind(AssertUnwindSafe(|| future.as_mut().is_some_and(poll))).unwrap_or(false);
        if !pending {
            let ended = future.take();
            // A panic was told where it happened; the thread goes on.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(ended)));
        }
        !pending
    }
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        let next = |place| match place {
            WAITING => Some(READY),
            RUNNING => Some(WOKEN),
            _ => None,
        };
        if self.place.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next) == Ok(WAITING) {
            self.shared.clone().push(self);
        }
    }
}

#[cfg(test)]
mod tests;
