//! The threads on which the file operations of one plugin run.
//!
//! Each plugin has threads of its own, so that a mount that hangs under one plugin leaves the others' files alone. A thread starts when an
//! operation finds no free one and ends after some idle time: a plugin that touches no file has none. An operation that does not come back
//! within the limit for silent threads is given up: another thread takes the place of its own, and the guest that waits for it can be stopped
//! at any time, because it only waits. Once [`REPLACED_MAX`] threads have been replaced and all of them hang, further operations fail at
//! once with an I/O error until one comes back.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

/// Threads of one plugin, not counting those that were given up.
const THREADS_MAX: usize = 16;
/// Threads that were given up and replaced, at most.
const REPLACED_MAX: usize = 16;
/// How long a thread waits for another operation before it ends.
const IDLE_TIME: Duration = Duration::from_secs(10);
const STACK_BYTES: usize = 512 << 10;

/// The threads of all plugins.
#[derive(Default)]
pub(in crate::plugin) struct Pools {
    pools: Mutex<HashMap<String, Arc<Pool>>>,
}

/// The threads of one plugin.
pub(super) struct Pool {
    plugin: String,
    state: Mutex<State>,
    /// Told of each operation that an idle thread may take.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// All threads, including those that were given up.
    threads: usize,
    idle: usize,
    busy: Vec<Busy>,
    /// Operations begun so far.
    begun: u64,
    given_up: usize,
    /// Every thread there may be hangs.
    hopeless: bool,
    /// Nobody needs the threads any more: they end as soon as they have nothing to do.
    ended: bool,
}

struct Job {
    run: Box<dyn FnOnce() + Send>,
    /// It is never thrown away: it closes a file.
    closes: bool,
}

/// An operation that a thread is in.
struct Busy {
    number: u64,
    since: Instant,
    given_up: bool,
}

/// What an operation returns, later. An error if it will never return: no thread could take it, or it panicked.
pub(super) struct Answer<T>(oneshot::Receiver<T>);

impl Pools {
    /// The threads of this plugin.
    pub(super) fn of(&self, plugin: &str) -> Arc<Pool> {
        let mut pools = self.pools();
        if let Some(pool) = pools.get(plugin) {
            return pool.clone();
        }
        // Plugins come and go; those without a thread and without an attempt need no place here.
        pools.retain(|_, pool| Arc::strong_count(pool) > 1);
        let pool = Arc::new(Pool { plugin: plugin.to_owned(), state: Mutex::default(), changed: Condvar::new() });
        pools.insert(plugin.to_owned(), pool.clone());
        pool
    }

    /// Give up every thread that has been in one operation for longer than `limit`, and replace it.
    pub(in crate::plugin) fn look(&self, limit: Duration) {
        let pools: Vec<_> = self.pools().values().cloned().collect();
        for pool in pools {
            pool.look(limit);
        }
    }

    /// A panic while the lock was held cannot have left a half-changed map.
    fn pools(&self) -> MutexGuard<'_, HashMap<String, Arc<Pool>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        for pool in self.pools().values() {
            pool.state().ended = true;
            pool.changed.notify_all();
        }
    }
}

impl Pool {
    /// Run an operation that may block. If the answer is dropped before a thread has taken the operation, it never runs.
    pub(super) fn run<T: Send + 'static>(self: &Arc<Self>, body: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
        let (answer, answered) = oneshot::channel();
        let run = move || {
            if !answer.is_closed() {
                let _ = answer.send(body());
            }
        };
        self.push(Job { run: Box::new(run), closes: false });
        Answer(answered)
    }

    /// Close a file, which may block: some file systems write back or ask a server first. Nobody waits for it.
    pub(super) fn close(self: &Arc<Self>, file: File) {
        self.push(Job { run: Box::new(move || drop(file)), closes: true });
    }

    fn push(self: &Arc<Self>, job: Job) {
        let mut state = self.state();
        if state.hopeless && !job.closes {
            // Outside the lock: what the operation holds may close files.
            drop(state);
            return drop(job);
        }
        state.jobs.push_back(job);
        if state.jobs.len() <= state.idle {
            drop(state);
            return self.changed.notify_one();
        }
        let refused = self.start(&mut state);
        drop(state);
        drop(refused);
    }

    /// Start a thread for the operations that wait, if there may be another one. Returns them if there is no thread at all to run them.
    fn start(self: &Arc<Self>, state: &mut State) -> VecDeque<Job> {
        if state.threads - state.given_up >= THREADS_MAX {
            return VecDeque::new();
        }
        let pool = self.clone();
        let started = thread::Builder::new().name("laelaps-files".into()).stack_size(STACK_BYTES).spawn(move || pool.work());
        match started {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads > state.given_up => {
                tracing::warn!(plugin = self.plugin, %error, "cannot start another thread for file operations");
            }
            Err(error) => {
                tracing::error!(plugin = self.plugin, %error, "cannot start a thread for file operations: they fail");
                return std::mem::take(&mut state.jobs);
            }
        }
        VecDeque::new()
    }

    fn work(&self) {
        let mut state = self.state();
        while state.threads - state.given_up <= THREADS_MAX {
            if let Some(job) = state.jobs.pop_front() {
                state.begun += 1;
                let number = state.begun;
                state.busy.push(Busy { number, since: Instant::now(), given_up: false });
                drop(state);
                // A panic is told where it happens; whoever waits sees an error.
                let _ = catch_unwind(AssertUnwindSafe(job.run));
                state = self.state();
                self.finished(&mut state, number);
                continue;
            }
            if state.ended {
                break;
            }
            state.idle += 1;
            let (woken, waited) = self.changed.wait_timeout(state, IDLE_TIME).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        // It may have been the one that was told of an operation.
        let told = !state.jobs.is_empty();
        drop(state);
        if told {
            self.changed.notify_one();
        }
    }

    fn finished(&self, state: &mut State, number: u64) {
        let Some(place) = state.busy.iter().position(|busy| busy.number == number) else { return };
        let busy = state.busy.swap_remove(place);
        state.hopeless = false;
        if busy.given_up {
            state.given_up -= 1;
            let (plugin, after) = (&self.plugin, busy.since.elapsed());
            tracing::info!(plugin, ?after, threads_lost = state.given_up, "a lost thread has come back from a file operation");
        }
    }

    fn look(self: &Arc<Self>, limit: Duration) {
        let mut state = self.state();
        let State { busy, given_up, .. } = &mut *state;
        let before = *given_up;
        let mut hanging = 0;
        for busy in busy.iter_mut().filter(|busy| busy.since.elapsed() > limit) {
            hanging += 1;
            if !busy.given_up && *given_up < REPLACED_MAX {
                busy.given_up = true;
                *given_up += 1;
            }
        }
        if state.given_up > before {
            tracing::error!(
                plugin = self.plugin,
                threads_lost = state.given_up,
                threads_lost_max = REPLACED_MAX,
                ?limit,
                "file operations do not come back: other threads take their place; look at the folders that the plugin is granted"
            );
        }
        let hopeless = hanging >= THREADS_MAX + REPLACED_MAX;
        if hopeless && !state.hopeless {
            tracing::error!(
                plugin = self.plugin,
                threads_lost = hanging,
                "all threads for this plugin's files hang: its file operations fail until one comes back"
            );
        }
        state.hopeless = hopeless;
        let mut refused = VecDeque::new();
        if hopeless {
            let (closes, others) = std::mem::take(&mut state.jobs).into_iter().partition(|job| job.closes);
            (state.jobs, refused) = (closes, others);
        }
        for _ in state.idle..state.jobs.len() {
            refused.append(&mut self.start(&mut state));
        }
        drop(state);
        drop(refused);
    }

    /// A panic while the lock was held cannot have left a half-changed state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Future for Answer<T> {
    type Output = io::Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map_err(|_| io::Error::other("no thread could run this file operation"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::sync_channel;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(120);

    fn eventually(what: &str, condition: impl Fn() -> bool) {
        let patience = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < patience, "{what} within {PATIENCE:?}");
            thread::yield_now();
        }
    }

    /// Operations that hang until what is returned is dropped. Each has begun.
    fn hang(pool: &Arc<Pool>, count: usize) -> Vec<std::sync::mpsc::SyncSender<()>> {
        (0..count)
            .map(|_| {
                let (release, released) = sync_channel::<()>(1);
                let (begun, begins) = sync_channel(1);
                let answer = pool.run(move || {
                    begun.send(()).expect("the test listens");
                    let _ = released.recv();
                });
                begins.recv_timeout(PATIENCE).expect("it begins");
                drop(answer);
                release
            })
            .collect()
    }

    async fn serves(pool: &Arc<Pool>) -> io::Result<u32> {
        tokio::time::timeout(PATIENCE, pool.run(|| 7)).await.expect("answered")
    }

    #[tokio::test]
    async fn a_hanging_mount_costs_one_plugin_its_threads_and_no_other() {
        let pools = Pools::default();
        let (hurt, well) = (pools.of("hurt"), pools.of("well"));
        let lost = || hurt.state().given_up;
        let mut held = hang(&hurt, THREADS_MAX);
        assert_eq!(serves(&well).await.expect("the other plugin's files serve"), 7);
        // Its own wait until somebody looks, and are served then by a thread that replaces a lost one.
        let waits = hurt.run(|| 8);
        pools.look(PATIENCE);
        assert_eq!(lost(), 0, "none has been silent for so long");
        pools.look(Duration::ZERO);
        assert_eq!(lost(), THREADS_MAX);
        assert_eq!(tokio::time::timeout(PATIENCE, waits).await.expect("answered").expect("served"), 8);

        held.extend(hang(&hurt, REPLACED_MAX));
        let waits = hurt.run(|| 9);
        pools.look(Duration::ZERO);
        assert_eq!(lost(), REPLACED_MAX, "no more are replaced");
        assert!(waits.await.is_err(), "what waits fails once nothing can run it");
        assert!(serves(&hurt).await.is_err(), "and so does what comes later");
        assert_eq!(serves(&well).await.expect("the other plugin's files serve"), 7);

        held.clear();
        eventually("all have come back", || lost() == 0);
        eventually("they serve again", || !hurt.state().hopeless && hurt.state().busy.is_empty());
        assert_eq!(serves(&hurt).await.expect("served"), 7);
        eventually("there are as many threads as before", || hurt.state().threads <= THREADS_MAX);
    }

    #[tokio::test]
    async fn an_operation_that_nobody_waits_for_is_not_begun() {
        let pools = Pools::default();
        let pool = pools.of("plugin");
        let held = hang(&pool, THREADS_MAX);
        let begun = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let answer = pool.run({
            let begun = begun.clone();
            move || begun.store(true, std::sync::atomic::Ordering::SeqCst)
        });
        drop(answer);
        drop(held);
        assert_eq!(serves(&pool).await.expect("served"), 7, "it was behind the other one");
        assert!(!begun.load(std::sync::atomic::Ordering::SeqCst));
    }

    #[tokio::test]
    async fn an_operation_that_panics_is_an_error_and_costs_no_thread() {
        let pool = Pools::default().of("plugin");
        assert!(pool.run(|| panic!("on purpose")).await.is_err());
        assert_eq!(serves(&pool).await.expect("served"), 7);
    }
}
