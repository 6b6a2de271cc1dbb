//! One instance of a component: made, called, and perhaps called again.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use laelaps_queue::{Event, NewTask, Timestamp};
use tokio::runtime::Handle;
use wasmtime::component::ResourceTable;
use wasmtime::{Store, UpdateDeadline};

use super::abi::{PluginPre, latest};
use super::capture::Capture;
use super::follow_ups::{FollowUps, Parent};
use super::grants::{self, Files, Folders};
use super::guest::{Attempt, Guest};
use super::limiter::MemoryLimiter;
use super::outcome;
use super::{Control, Grants, Invocation, Level, Limits, Version};

/// Handles that an instance has before its handler opens any: standard streams and what a language's runtime opens by itself.
const HANDLES_SPARE: usize = 16;
/// What a trap's message repeats of standard error.
const STDERR_END_BYTES: usize = 1_024;

/// Everything an instance needs to serve one attempt.
pub(super) struct Order {
    pub(super) pre: PluginPre,
    pub(super) grants: Grants,
    /// Where granted folders are opened, and for which plugin. None: no folder is granted.
    pub(super) folders: Option<(Arc<Folders>, Arc<Version>)>,
    pub(super) control: Arc<Control>,
    pub(super) capture: Capture,
    pub(super) peak_bytes: Arc<AtomicU64>,
    pub(super) attempt: Attempt,
}

impl Order {
    pub(super) fn new(
        invocation: Invocation,
        folders: &Arc<Folders>,
        parent: Parent,
        stops_at: Option<Instant>,
        capture: Capture,
        peak_bytes: Arc<AtomicU64>,
    ) -> Self {
        let Invocation { version, task, limits, grants, settings, log_level, control, services, .. } = invocation;
        let follow_up_grant = grants.follow_ups.clone();
        Self {
            pre: version.pre.clone(),
            folders: (!grants.folders.is_empty()).then(|| (folders.clone(), version)),
            grants,
            control: control.clone(),
            capture,
            peak_bytes,
            attempt: Attempt {
                control,
                services,
                host: Handle::current(),
                limits,
                settings,
                log_level,
                created_at: task.created_at,
                max_attempts: task.max_attempts,
                queue: task.queue,
                stops_at,
                deadline: None,
                data_bytes: 0,
                parent: Some(parent),
                follow_up_grant,
                relatives: None,
                follow_ups: Vec::new(),
                follow_up_bytes: 0,
            },
        }
    }

    /// To start a component without a task. Its start may do nothing but compute and write.
    pub(super) fn self_test(pre: PluginPre, limits: Limits, time: Duration) -> Self {
        let control = Arc::new(Control::new());
        Self {
            pre,
            grants: Grants::default(),
            folders: None,
            control: control.clone(),
            capture: Capture::default(),
            peak_bytes: Arc::default(),
            attempt: Attempt {
                control,
                services: Arc::new(NoServices),
                host: Handle::current(),
                limits,
                settings: Arc::new([]),
                log_level: Level::Warn,
                created_at: Timestamp(0),
                max_attempts: None,
                queue: NewTask::DEFAULT_QUEUE.to_owned(),
                stops_at: Some(Instant::now() + time),
                deadline: None,
                data_bytes: 0,
                parent: None,
                follow_up_grant: FollowUps::default(),
                relatives: None,
                follow_ups: Vec::new(),
                follow_up_bytes: 0,
            },
        }
    }
}

/// For a start without a task: there is no lease, and nothing to be stored.
struct NoServices;

#[async_trait::async_trait]
impl super::Services for NoServices {
    async fn heartbeat(&self, _: Option<laelaps_queue::Progress>, _: Option<Duration>) -> bool {
        false
    }

    async fn update_data(&self, _: Vec<u8>) -> Result<laelaps_queue::LeaseAnswer, laelaps_queue::Error> {
        Ok(laelaps_queue::LeaseAnswer::Lost)
    }

    async fn now(&self) -> Timestamp {
        Timestamp(0)
    }

    async fn relatives(&self, _: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        Ok(None)
    }

    fn count_follow_up(&self, _: u32) -> bool {
        false
    }

    fn leads_here(&self, _: &str) -> bool {
        false
    }
}

/// A component that lives.
pub(super) struct Instance {
    store: Store<Guest>,
    plugin: latest::Plugin,
    grants: Grants,
    served: u32,
}

/// What an instance answered to an attempt.
pub(super) struct Answer {
    pub(super) event: Event,
    pub(super) follow_ups: Vec<NewTask>,
}

/// Why an instance could not be made: the event of the attempt that needed it. Shown as the reason in words.
pub(super) struct StartFailure(pub(super) Event);

impl fmt::Display for StartFailure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Event::OutOfMemory { limit_bytes } => {
                write!(formatter, "it needs more than {limit_bytes} bytes of memory, the largest limit of all routes")
            }
            Event::Trap { message } | Event::Malformed { message } => formatter.write_str(message),
            other => write!(formatter, "{other:?}"),
        }
    }
}

impl Instance {
    /// A fresh instance, for this attempt first.
    pub(super) async fn fresh(engine: &wasmtime::Engine, order: Order) -> Result<Self, StartFailure> {
        let Order { pre, grants, folders, capture, peak_bytes, attempt, .. } = order;
        capture.begin(attempt.limits.log_bytes);
        let world = grants::world(&grants, &capture);
        let files = match folders {
            Some((folders, version)) => {
                let opened = folders.open(version.plugin(), &grants.folders).await;
                opened.map_err(|error| StartFailure(Event::Trap { message: error.to_string() }))?
            }
            None => Files::default(),
        };
        let limits = attempt.limits.clone();
        let mut memory = MemoryLimiter::new(limits.memory_bytes);
        memory.begin(limits.memory_bytes, peak_bytes);
        let guest = Guest { wasi: world, files, table: ResourceTable::new(), memory, capture, attempt };
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.memory);
        store.set_epoch_deadline(1);
        store.epoch_deadline_callback(|context| {
            let control = &context.data().attempt.control;
            // The caller's side watches the time as well, but must not be needed for it: the host may be busy.
            if context.data().attempt.stops_at.is_some_and(|moment| Instant::now() >= moment) {
                control.time_out();
            }
            if control.is_halted() {
                return Ok(UpdateDeadline::Interrupt);
            }
            control.beat();
            Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now())))
        });
        apply_limits(&mut store, &limits, grants.folders.len());
        match pre.instantiate_async(&mut store).await {
            Ok(plugin) => Ok(Self { store, plugin, grants, served: 0 }),
            Err(error) => Err(StartFailure(failed(&store, &error))),
        }
    }

    /// Give the instance another attempt to serve.
    pub(super) fn begin(&mut self, order: Order) {
        let Order { peak_bytes, attempt, .. } = order;
        apply_limits(&mut self.store, &attempt.limits, self.grants.folders.len());
        let guest = self.store.data_mut();
        guest.capture.begin(attempt.limits.log_bytes);
        guest.memory.begin(attempt.limits.memory_bytes, peak_bytes);
        guest.attempt = attempt;
    }

    /// It waits for its next attempt, and holds nothing of the last one's.
    pub(super) fn rest(&mut self) {
        self.store.data_mut().attempt.services = Arc::new(NoServices);
    }

    pub(super) fn capture(&self) -> Capture {
        self.store.data().capture.clone()
    }

    /// It is about to be dropped: count its linear memory no more. Answers how many bytes it has.
    pub(super) fn uncount_memory(&mut self) -> u64 {
        self.store.data_mut().memory.uncount()
    }

    pub(super) fn grants(&self) -> &Grants {
        &self.grants
    }

    /// Attempts that it has served.
    pub(super) fn served(&self) -> u32 {
        self.served
    }

    /// Let the handler handle the task of its attempt. Dropping the future ends the call, and the instance is of no use any more.
    pub(super) async fn handle(&mut self, task: &latest::exports::laelaps::worker::handler::Task) -> Answer {
        let result = self.plugin.laelaps_worker_handler().call_handle(&mut self.store, task).await;
        self.served += 1;
        let denied = self.store.data().memory.was_denied();
        let attempt = &mut self.store.data_mut().attempt;
        let event = match result {
            Ok(Err(failure)) if denied && matches!(failure.kind, latest::laelaps::worker::types::FailureKind::Retry) => {
                Event::OutOfMemory { limit_bytes: attempt.limits.memory_bytes }
            }
            Ok(result) => outcome::returned(result, &attempt.limits),
            Err(error) => failed(&self.store, &error),
        };
        let follow_ups = match event {
            Event::Finish { .. } | Event::Retry { .. } | Event::Release { .. } => {
                std::mem::take(&mut self.store.data_mut().attempt.follow_ups)
            }
            _ => Vec::new(),
        };
        Answer { event, follow_ups }
    }
}

fn failed(store: &Store<Guest>, error: &wasmtime::Error) -> Event {
    let guest = store.data();
    let limits = &guest.attempt.limits;
    if guest.memory.was_denied() {
        return Event::OutOfMemory { limit_bytes: limits.memory_bytes };
    }
    outcome::trapped(error, &guest.capture.stderr_end(STDERR_END_BYTES), limits, hostcall_bytes(limits))
}

fn apply_limits(store: &mut Store<Guest>, limits: &Limits, folders: usize) {
    let handles = limits.handles as usize + folders + HANDLES_SPARE;
    store.set_hostcall_fuel(hostcall_bytes(limits));
    store.set_max_component_handles(handles);
    store.data_mut().table.set_max_capacity(handles);
}

/// What a handler may hand to the host in one call: the largest thing that is allowed at all, and something for what goes with it.
fn hostcall_bytes(limits: &Limits) -> usize {
    let largest = limits.output_bytes.max(NewTask::DATA_BYTES_MAX as u64);
    usize::try_from(largest.saturating_add(1 << 20)).unwrap_or(usize::MAX)
}
