//! The threads on which guests run: one queue of guests that have something to do, and threads that take them in turn.
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
    /// Guests that have something to do, in the order in which they got it.
    ready: VecDeque<Arc<Task>>,
    /// Threads there are, lost ones among them.
    threads: usize,
    /// Threads there should be: a stated number, and one for each that is lost.
    wanted: usize,
    /// Threads that wait for a guest.
    idle: usize,
    /// Threads that are woken as soon as there is a guest for them. One more for each that is lost.
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
            threads: 0,
            wanted: 0,
            idle: 0,
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
        let state = self.shared.state();
        let nobody_had_a_turn = state.turns == self.turns;
        self.turns = state.turns;
        let wake = nobody_had_a_turn && !state.ready.is_empty() && state.idle > 0;
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
        while let Some(task) = self.next() {
            task.run();
        }
    }

    /// The next guest for the thread that asks; None if it has to end.
    fn next(&self) -> Option<Arc<Task>> {
        let mut state = self.state();
        loop {
            if state.threads > state.wanted || state.ended && state.alive == 0 {
                state.threads -= 1;
                // It may have been the one that was told of a guest.
                let told = !state.ready.is_empty();
                drop(state);
                if told {
                    self.changed.notify_one();
                }
                return None;
            }
            if let Some(task) = state.ready.pop_front() {
                state.turns += 1;
                return Some(task);
            }
            state.idle += 1;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn push(&self, task: Arc<Task>) {
        let mut state = self.state();
        state.ready.push_back(task);
        let wake = state.idle > 0 && state.threads - state.idle < state.eager;
        drop(state);
        if wake {
            self.changed.notify_one();
        }
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
            // Behind the others: this is also how a guest gives up its turn.
            self.place.store(READY, Ordering::SeqCst);
            self.shared.clone().push(self);
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
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::time::{Duration, Instant};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(120);

    fn eventually(what: &str, condition: impl Fn() -> bool) {
        let patience = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < patience, "{what} within {PATIENCE:?}");
            thread::yield_now();
        }
    }

    /// A guest that keeps its thread until the answer is used, and says so first.
    fn block(threads: &Threads) -> SyncSender<()> {
        let (release, released) = sync_channel::<()>(1);
        let (begun, begins): (_, Receiver<()>) = sync_channel(1);
        threads.spawn(async move {
            begun.send(()).expect("the test listens");
            let _ = released.recv();
        });
        begins.recv_timeout(PATIENCE).expect("it gets a thread");
        release
    }

    /// Whether another guest gets a thread.
    fn serves(threads: &Threads) -> Receiver<()> {
        let (served, serves) = sync_channel(1);
        threads.spawn(async move { served.send(()).expect("the test listens") });
        serves
    }

    #[test]
    fn a_lost_thread_is_replaced_and_ends_when_it_comes_back() {
        let threads = Threads::start(1, 1).expect("threads");
        let replacements = threads.replacements();
        for _ in 0..2 {
            let releases: Vec<_> = (0..4)
                .map(|_| {
                    let release = block(&threads);
                    let waits = serves(&threads);
                    assert!(waits.try_recv().is_err(), "there is no other thread");
                    replacements.call();
                    waits.recv_timeout(PATIENCE).expect("the replacement serves");
                    release
                })
                .collect();
            assert_eq!(threads.shared.state().threads, 5);
            for release in releases {
                replacements.release();
                release.send(()).expect("it waits");
            }
            eventually("one thread is left", || threads.shared.state().threads == 1);
            serves(&threads).recv_timeout(PATIENCE).expect("it serves");
        }
    }

    #[test]
    fn a_stuck_thread_holds_no_other_guest() {
        let threads = Threads::start(2, 2).expect("threads");
        // Some give up their turn all the time, some wait for timers: each was on either thread before.
        let rounds: Arc<[AtomicU32; 8]> = Arc::default();
        let over = Arc::new(AtomicBool::new(false));
        for guest in 0..rounds.len() {
            let (rounds, over) = (rounds.clone(), over.clone());
            threads.spawn(async move {
                while !over.load(Ordering::SeqCst) {
                    rounds[guest].fetch_add(1, Ordering::SeqCst);
                    if guest % 2 == 0 {
                        tokio::task::yield_now().await;
                    } else {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                }
            });
        }
        for _ in 0..20 {
            let release = block(&threads);
            for (guest, before) in rounds.iter().map(|rounds| rounds.load(Ordering::SeqCst)).enumerate() {
                eventually(&format!("guest {guest} goes on"), || rounds[guest].load(Ordering::SeqCst) > before + 2);
            }
            release.send(()).expect("it waits");
        }
        over.store(true, Ordering::SeqCst);
        eventually("they end", || threads.shared.state().alive == 0);
    }

    #[test]
    fn a_thread_more_is_woken_when_those_that_are_awake_do_not_get_on() {
        let threads = Threads::start(4, 2).expect("threads");
        let mut relief = threads.relief();
        eventually("all wait", || threads.shared.state().idle == 4);
        let releases = [block(&threads), block(&threads)];
        eventually("no other one is awake", || threads.shared.state().idle == 2);
        let waits = serves(&threads);
        relief.look();
        assert!(waits.try_recv().is_err(), "somebody had a turn since the look before");
        relief.look();
        waits.recv_timeout(PATIENCE).expect("another thread serves");
        for release in releases {
            release.send(()).expect("it waits");
        }
    }

    #[test]
    fn a_guest_that_panics_ends_alone() {
        let threads = Threads::start(1, 1).expect("threads");
        threads.spawn(async { panic!("on purpose") });
        serves(&threads).recv_timeout(PATIENCE).expect("its thread goes on");
        eventually("it is gone", || threads.shared.state().alive == 0);
    }

    #[test]
    fn threads_end_when_their_owner_is_gone_and_their_guests_have_ended() {
        let threads = Threads::start(3, 3).expect("threads");
        let shared = threads.shared.clone();
        let release = block(&threads);
        drop(threads);
        assert_eq!(shared.state().threads, 3, "a guest is left");
        release.send(()).expect("it waits");
        eventually("no thread is left", || shared.state().threads == 0);
    }
}
