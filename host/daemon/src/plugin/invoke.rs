//! One attempt, from its slot to its completion.
//!
//! Two sides: the guest's side runs on a guest's thread and answers through a channel; the caller's side waits for that answer, the orders
//! of [`Control`] and the time limit. When the attempt has to stop, the guest's side is told, and gets a moment to leave: a waiting guest is
//! dropped at once, a computing one is interrupted at its next tick. If it does not make it (one huge `memory.fill` cannot be interrupted),
//! the caller's side answers alone; the guest is abandoned: counted, its thread replaced, and its slot kept until it has left.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use laelaps_queue::{ClaimedTask, Event, LeaseAnswer, NewTask, Progress, Timestamp};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::abi::latest::exports::laelaps::worker::handler::Task;
use super::capture::Capture;
use super::engine::Shared;
use super::follow_ups::Parent;
use super::instance::{Instance, Order};
use super::reuse::Key;
use super::ticker::Guarded;
use super::{Captured, Control, Engine, Grants, Level, Limits, Version};

/// How long a guest that has to stop may take to leave before it is answered for.
const LEAVE_GRACE: Duration = Duration::from_millis(50);
/// How long a handler whose lease is lost may take to notice it by itself.
const LEASE_LOST_GRACE: Duration = Duration::from_millis(30);

/// What the host does for an attempt while it runs. Called on the runtime that called [`Engine::invoke`], and not on a guest's thread unless it says so.
#[async_trait]
pub trait Services: Send + Sync {
    /// Say whether the lease still holds, as far as the host knows without asking anybody, and take progress to be noted soon. None if it has to
    /// be asked by [`Services::heartbeat`]. Called on a guest's thread, and has to answer at once.
    fn note_progress(&self, progress: Option<Progress>) -> Option<bool> {
        let _ = progress;
        None
    }

    /// Note progress, renew the lease (to now + `alive_time` at least, if given), and say whether it still holds.
    async fn heartbeat(&self, progress: Option<Progress>, alive_time: Option<Duration>) -> bool;

    /// Merge the members of a JSON object into the task's data, durably. Refuses what is no JSON object: nobody has looked at it before.
    async fn update_data(&self, members: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error>;

    /// The database's clock, as near as the host knows it.
    async fn now(&self) -> Timestamp;

    /// How many follow-ups that come from the same task as this attempt's have not ended, other than its own; at most `limit`. None if the
    /// queue does not keep it.
    async fn relatives(&self, limit: u32) -> Result<Option<u32>, laelaps_queue::Error>;

    /// Count one more follow-up of this attempt, unless attempts of the same root have `most` already that the queue has not counted yet. Called on
    /// a guest's thread, and has to answer at once.
    fn count_follow_up(&self, most: u32) -> bool;

    /// Whether the host's routes lead tasks of this type to the plugin of this attempt. Called on a guest's thread, and has to answer at once.
    fn leads_here(&self, task_type: &str) -> bool;

    /// Whether the queue takes such a follow-up task. Called on a guest's thread, and has to answer at once.
    fn check(&self, task: &NewTask) -> Result<(), laelaps_queue::Error> {
        task.check()
    }
}

/// One attempt to be run.
pub struct Invocation {
    /// The version that runs it; kept until the end.
    pub version: Arc<Version>,
    /// The task.
    pub task: ClaimedTask,
    /// What it may use.
    pub limits: Limits,
    /// What it may reach.
    pub grants: Grants,
    /// What `context.setting` answers, sorted by name.
    pub settings: Arc<[(String, String)]>,
    /// Attempts that one instance may serve. None or 1: a fresh instance. A failed, trapped or stopped instance is never used again.
    pub max_requests: Option<u32>,
    /// The route's number: instances are only reused for the same route, version and grants.
    pub route: usize,
    /// Lines below this level are not kept.
    pub log_level: Level,
    /// The reins. One for each attempt.
    pub control: Arc<Control>,
    /// The host's services.
    pub services: Arc<dyn Services>,
}

/// How an attempt ended.
#[derive(Debug)]
pub struct Completion {
    /// What happened.
    pub event: Event,
    /// The tasks it submitted; empty unless it finished, asked for another attempt or released the task.
    pub follow_ups: Vec<NewTask>,
    /// What it wrote.
    pub captured: Captured,
    /// The most linear memory it had, in bytes.
    pub memory_bytes_peak: u64,
}

impl Engine {
    /// Run one attempt to its end. Never panics. It answers within 100 ms of an immediate stop, a lost lease or the time limit, even if the
    /// guest's thread takes longer to leave. Dropping the future stops the attempt. Has to be called on a tokio runtime with a timer.
    pub async fn invoke(self: &Arc<Self>, invocation: Invocation) -> Completion {
        let control = invocation.control.clone();
        let slot = tokio::select! {
            biased;
            () = control.until(Control::must_stop) => return Completion::never_begun(),
            slot = self.shared.slots.clone().acquire_owned() => slot,
        };
        match slot {
            Ok(slot) => {
                let time = invocation.limits.time;
                // A limit beyond what the clock can tell is none.
                let stops_at = time.and_then(|time| Instant::now().checked_add(time));
                self.start(invocation, slot, stops_at).completion(stops_at).await
            }
            // Slots are never closed; if they were, nothing could begin.
            Err(_) => Completion::never_begun(),
        }
    }

    fn start(&self, invocation: Invocation, slot: OwnedSemaphorePermit, stops_at: Option<Instant>) -> Running {
        let control = invocation.control.clone();
        let time = invocation.limits.time;
        let key = Key { route: invocation.route, order: invocation.version.order() };
        let requests_max = invocation.max_requests.unwrap_or(1);
        let reused = if requests_max > 1 { self.shared.idle().take(key, &invocation.grants) } else { None };
        let capture = reused.as_ref().map_or_else(Capture::default, Instance::capture);
        let peak_bytes = Arc::clone(&control.memory_peak);
        let leaving = Arc::new(Leaving::new(self.shared.clone(), control.clone()));
        let (answer, answered) = oneshot::channel();
        let version = invocation.version.clone();
        let mut invocation = invocation;
        let parent = Parent::of(&invocation.task, version.plugin.clone());
        let task = guest_task(&mut invocation.task);
        let mut order = Order::new(invocation, &self.shared.folders, parent, stops_at, capture.clone(), peak_bytes.clone());
        order.attempt.data_bytes = task.data.len();
        let guest = GuestSide {
            wasmtime: self.wasmtime.clone(),
            order,
            reused,
            task,
            version,
            key,
            requests_max,
            control: control.clone(),
            leaving: LeaveOnDrop(leaving.clone()),
            slot,
        };
        self.spawn(Guarded::new(guest.run(answer), self.presence.clone(), control.clone()));
        Running { answered, leaving, capture, peak_bytes, control, time }
    }
}

/// The task in the contract's words. What the guest does not need stays.
fn guest_task(task: &mut ClaimedTask) -> Task {
    let data = std::mem::take(&mut task.data);
    Task {
        key: std::mem::take(&mut task.key),
        kind: std::mem::take(&mut task.task_type),
        data: if data.is_empty() { b"{}".to_vec() } else { data },
        user: task.user.take(),
        attempt: task.attempt,
    }
}

/// What runs on a guest's thread.
struct GuestSide {
    wasmtime: wasmtime::Engine,
    order: Order,
    reused: Option<Instance>,
    task: Task,
    version: Arc<Version>,
    key: Key,
    requests_max: u32,
    control: Arc<Control>,
    leaving: LeaveOnDrop,
    /// Held until the instance is gone.
    slot: OwnedSemaphorePermit,
}

impl GuestSide {
    async fn run(self, answer: oneshot::Sender<Completion>) {
        let Self { wasmtime, order, reused, task, version, key, requests_max, control, leaving, slot } = self;
        let (capture, peak_bytes) = (order.capture.clone(), order.peak_bytes.clone());
        let time = order.attempt.limits.time;
        crate::fault::block_thread(&task.kind);
        let mut instance = None;
        let (event, follow_ups) = tokio::select! {
            biased;
            () = control.until(Control::is_halted) => (Event::Stopped, Vec::new()),
            answer = attempt(&wasmtime, order, reused, &task, &mut instance) => answer,
        };
        let event = match event {
            // Whatever failed after the stop failed because of it; what was returned in spite of it still counts.
            Event::Stopped | Event::Trap { .. } | Event::OutOfMemory { .. } if control.is_timed_out() => {
                Event::TimedOut { limit: time.unwrap_or_default() }
            }
            Event::Trap { .. } | Event::OutOfMemory { .. } if control.is_halted() => Event::Stopped,
            event => event,
        };
        let completion =
            Completion { follow_ups, captured: capture.take(), memory_bytes_peak: peak_bytes.load(Ordering::Relaxed), event };
        let served_well = matches!(completion.event, Event::Finish { .. } | Event::Retry { .. } | Event::Release { .. });
        if let Some(mut instance) = instance.take_if(|instance| served_well && instance.served() < requests_max) {
            instance.rest();
            leaving.0.keep(key, &version, instance);
        }
        leaving.0.leave();
        // The answer first: giving an instance's memory back takes about as long as a light task.
        let _ = answer.send(completion);
        drop(instance);
        drop(slot);
    }
}

async fn attempt(
    wasmtime: &wasmtime::Engine,
    order: Order,
    reused: Option<Instance>,
    task: &Task,
    place: &mut Option<Instance>,
) -> (Event, Vec<NewTask>) {
    let instance = match reused {
        Some(mut instance) => {
            instance.begin(order);
            instance
        }
        None => match Instance::fresh(wasmtime, order).await {
            Ok(instance) => instance,
            Err(failure) => return (failure.0, Vec::new()),
        },
    };
    // It lives outside this future, so that it is still there when the call was dropped or has been answered.
    let answer = place.insert(instance).handle(task).await;
    (answer.event, answer.follow_ups)
}

/// The caller's side of an attempt that has begun. Dropping it stops the attempt.
struct Running {
    answered: oneshot::Receiver<Completion>,
    leaving: Arc<Leaving>,
    capture: Capture,
    peak_bytes: Arc<AtomicU64>,
    control: Arc<Control>,
    time: Option<Duration>,
}

impl Running {
    async fn completion(mut self, stops_at: Option<Instant>) -> Completion {
        let stop = async {
            match stops_at {
                Some(moment) => tokio::time::sleep_until(moment.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            answer = &mut self.answered => return Self::received(answer),
            () = self.control.until(Control::must_stop) => {}
            () = stop => self.control.time_out(),
        }
        if !self.control.is_halted() {
            if let Ok(answer) = tokio::time::timeout(LEASE_LOST_GRACE, &mut self.answered).await {
                return Self::received(answer);
            }
            self.control.halt();
        }
        if let Ok(answer) = tokio::time::timeout(LEAVE_GRACE, &mut self.answered).await {
            return Self::received(answer);
        }
        let event =
            if self.control.is_timed_out() { Event::TimedOut { limit: self.time.unwrap_or_default() } } else { Event::Stopped };
        // Dropping `self` abandons the guest.
        Completion {
            event,
            follow_ups: Vec::new(),
            captured: self.capture.take(),
            memory_bytes_peak: self.peak_bytes.load(Ordering::Relaxed),
        }
    }

    fn received(answer: Result<Completion, oneshot::error::RecvError>) -> Completion {
        answer.unwrap_or_else(|_| Completion {
            event: Event::Trap { message: "the host failed while it ran the handler; its log says where".into() },
            ..Completion::never_begun()
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.leaving.abandon() {
            self.control.halt();
        }
    }
}

impl Completion {
    fn never_begun() -> Self {
        Self { event: Event::Stopped, follow_ups: Vec::new(), captured: Captured::default(), memory_bytes_peak: 0 }
    }
}

/// Whether a guest has left, or was answered for before.
struct Leaving {
    state: AtomicU8,
    shared: Arc<Shared>,
    control: Arc<Control>,
}

const PRESENT: u8 = 0;
const ABANDONED: u8 = 1;
const LEFT: u8 = 2;

impl Leaving {
    fn new(shared: Arc<Shared>, control: Arc<Control>) -> Self {
        Self { state: AtomicU8::new(PRESENT), shared, control }
    }

    /// The guest has answered or is gone.
    fn leave(&self) {
        if self.state.swap(LEFT, Ordering::SeqCst) == ABANDONED {
            self.shared.returned(&self.control);
        }
    }

    /// Nobody waits for the guest any more. Answers whether it is still there.
    fn abandon(&self) -> bool {
        if self.state.load(Ordering::SeqCst) != PRESENT {
            return false;
        }
        // Counted before that can be seen, so that whoever leaves finds itself among the abandoned.
        self.shared.abandon(&self.control);
        let present = self.state.compare_exchange(PRESENT, ABANDONED, Ordering::SeqCst, Ordering::SeqCst).is_ok();
        if !present {
            self.shared.returned(&self.control);
        }
        present
    }

    /// Keep an instance for the next attempt, unless its version was replaced meanwhile.
    fn keep(&self, key: Key, version: &Version, instance: Instance) {
        let displaced = {
            let mut idle = self.shared.idle();
            // Under the lock, because whoever retires the version takes its instances out under the same lock afterwards.
            if version.is_retired() { Some(instance) } else { idle.put(key, instance) }
        };
        drop(displaced);
    }
}

/// Also when the guest's future is dropped, or panics.
struct LeaveOnDrop(Arc<Leaving>);

impl Drop for LeaveOnDrop {
    fn drop(&mut self) {
        self.0.leave();
    }
}
