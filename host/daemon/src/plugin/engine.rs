//! The runtime: compiled code, the pool of instances, the guests' own threads and the epoch ticker.
//!
//! Slots: an attempt takes one before it touches the pool and gives it back when its instance is gone, so the pool can never be exhausted.
//! Guests run on threads of their own, several for each core: a guest that cannot be interrupted for a while shares the core with the
//! others by the operating system's rules, and the host's own threads never wait behind one. A guest that was answered for and is still on
//! its thread is abandoned: another thread takes the place of its own until it leaves, so that the others have as many as before. The pool
//! bounds the replacements, since an abandoned guest keeps its slot.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use wasmtime::component::{Component, Linker};
use wasmtime::{Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails};

use super::abi::{PluginPre, latest};
use super::compile::{Compiler, Failure};
use super::grants::{self, Folders};
use super::guest::Guest;
use super::instance::{Instance, Order};
use super::reuse::Idle;
use super::threads::{Replacements, Threads};
use super::ticker::{Presence, Ticker};
use super::{Config, Control, Error, Limits, fit, outcome};

/// What one component may consist of, which multiplies into the size of the pool.
const CORE_INSTANCES_PER_COMPONENT: u32 = 64;
const MEMORIES_PER_COMPONENT: u32 = 4;
const TABLES_PER_COMPONENT: u32 = 32;
const TABLE_ELEMENTS: usize = 30_000;
const INSTANCE_BYTES: usize = 4 << 20;
/// Memory of a slot that is cleaned in place instead of being given back to the system: the largest single lever on throughput.
const KEEP_RESIDENT_BYTES: usize = 256 << 10;
/// Address space for each memory: with all that 32 bits can reach reserved, compiled code needs no bounds checks.
const MEMORY_RESERVATION_BYTES: u64 = 4 << 30;
/// Guests' stack within the fibre's, whose rest is for host calls.
const WASM_STACK_BYTES: usize = 1 << 20;
const FIBRE_STACK_BYTES: usize = 2 << 20;
/// Guests' threads: twice the cores, at least four; more if so many instances may live, up to this number.
const THREADS_MAX: usize = 32;
/// How long the self-test of a new version may take.
const SELF_TEST_TIME: Duration = Duration::from_secs(10);

/// The WebAssembly runtime of this process.
pub struct Engine {
    pub(super) wasmtime: wasmtime::Engine,
    linker: Linker<Guest>,
    pub(super) compiler: Compiler,
    pub(super) shared: Arc<Shared>,
    pub(super) presence: Presence,
    memory_bytes_max: u64,
    next_order: AtomicU64,
    guests: Threads,
    /// Dropped last: guests that have not left yet still need their ticks.
    _ticker: Ticker,
}

/// What an attempt on a guest's thread may still need after the engine's last user is gone.
pub(super) struct Shared {
    pub(super) slots: Arc<Semaphore>,
    pub(super) idle: Mutex<Idle>,
    /// Guests that were answered for, but have not left their thread yet.
    abandoned: Mutex<Vec<Arc<Control>>>,
    replacements: Replacements,
    pub(super) folders: Arc<Folders>,
}

impl Engine {
    /// Reserve the pool and start the guests' threads.
    ///
    /// # Errors
    /// [`Error::Runtime`] if the pool cannot be reserved, [`Error::Cache`] if the folder for compiled code is not safe to use.
    pub fn new(config: &Config) -> Result<Arc<Self>, Error> {
        let runtime_error =
            |reason: String| Error::Runtime { instances: config.instances_max, memory_bytes: config.memory_bytes_max, reason };
        let mut settings = code_settings();
        settings.allocation_strategy(InstanceAllocationStrategy::Pooling(pool(config)));
        let wasmtime = wasmtime::Engine::new(&settings).map_err(|error| runtime_error(format!("{error:#}")))?;
        let linker = linker(&wasmtime).map_err(|error| runtime_error(format!("{error:#}")))?;
        let compiler = Compiler::new(&wasmtime, config)?;
        let guests = Threads::start(threads(config.instances_max), cores()).map_err(|error| runtime_error(error.to_string()))?;
        let mut relief = guests.relief();
        let ticker = Ticker::start(wasmtime.clone(), move || relief.look()).map_err(|error| runtime_error(error.to_string()))?;
        Ok(Arc::new(Self {
            presence: ticker.presence(),
            shared: Arc::new(Shared {
                slots: Arc::new(Semaphore::new(config.instances_max as usize)),
                idle: Mutex::new(Idle::new(config.instances_max as usize)),
                abandoned: Mutex::default(),
                replacements: guests.replacements(),
                folders: Arc::default(),
            }),
            memory_bytes_max: config.memory_bytes_max,
            next_order: AtomicU64::new(1),
            guests,
            _ticker: ticker,
            wasmtime,
            linker,
            compiler,
        }))
    }

    /// Guests that were answered for, but have not left their thread yet.
    #[must_use]
    pub fn abandoned(&self) -> u32 {
        count(self.shared.abandoned().iter())
    }

    /// Those of them whose thread has shown no sign of life for longer than `limit`: most others are about to leave. Threads that are in one
    /// file operation for so long are given up and replaced on this occasion; they cost nobody but their plugin, and do not count here.
    #[must_use]
    pub fn lost(&self, limit: Duration) -> u32 {
        self.shared.folders.pools.look(limit);
        count(self.shared.abandoned().iter().filter(|control| control.silence() > Some(limit)))
    }

    pub(super) fn next_order(&self) -> u64 {
        self.next_order.fetch_add(1, Ordering::Relaxed)
    }

    /// Let go of instances of a version that wait to be used again.
    pub(super) fn forget(&self, order: u64) {
        let forgotten = self.shared.idle().remove(order);
        // Their memory is given back outside the lock.
        drop(forgotten);
    }

    /// Let go of all instances that wait to be used again, on a guest's thread. Answers how many bytes of linear memory they had.
    pub fn release_idle(&self) -> u64 {
        let mut idle = self.shared.idle().take_all();
        // They are as good as gone, and whoever asks next wants to know what there will be.
        let bytes = idle.iter_mut().map(Instance::uncount_memory).sum();
        if !idle.is_empty() {
            self.spawn(async move { drop(idle) });
        }
        bytes
    }

    /// Have one of the guests' threads take this up, which shows that they live. It must not block.
    pub fn take_up(&self, sign: impl Future<Output = ()> + Send + 'static) {
        self.spawn(sign);
    }

    /// Run a guest's future on the guests' threads.
    pub(super) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.guests.spawn(future);
    }

    /// Link a component against each version of the contract, newest first. The compiling child has linked it before.
    ///
    /// # Errors
    /// What the linker says.
    pub(super) fn link(&self, component: &Component) -> Result<PluginPre, String> {
        let linked = self.linker.instantiate_pre(component).and_then(PluginPre::new);
        linked.map_err(|error| format!("it does not fit {}: {error:#}", fit::contract()))
    }

    /// Instantiate a new version once, without calling its handler.
    pub(super) async fn self_test(self: &Arc<Self>, pre: &PluginPre) -> Result<(), Failure> {
        let limits = Limits { memory_bytes: self.memory_bytes_max, ..Limits::default() };
        let order = Order::self_test(pre.clone(), limits, SELF_TEST_TIME);
        let control = order.control.clone();
        let slot = tokio::time::timeout(SELF_TEST_TIME, self.shared.slots.clone().acquire_owned()).await;
        let Ok(Ok(slot)) = slot else {
            return Err(Failure::Unable(
                "it could not be tried: all instances are in use, some by guests that do not leave".into(),
            ));
        };
        let (answer, answered) = tokio::sync::oneshot::channel();
        let wasmtime = self.wasmtime.clone();
        let test = async move {
            let _ = answer.send(Instance::fresh(&wasmtime, order).await.map(drop));
            drop(slot);
        };
        self.spawn(super::ticker::Guarded::new(test, self.presence.clone(), control.clone()));
        // Also when whoever asked goes away, and also for a start that waits instead of computing.
        let _halt = control.clone().halt_on_drop();
        match tokio::time::timeout(SELF_TEST_TIME, answered).await {
            Ok(Ok(Ok(()))) => Ok(()),
            // Perhaps the machine was only too busy.
            _ if control.is_timed_out() => Err(slow_start()),
            Ok(Ok(Err(failure))) => Err(Failure::Refused(format!("it cannot be started: {failure}"))),
            Ok(Err(_)) => Err(Failure::Unable("the host failed while it started the module; its log says where".into())),
            Err(_) => Err(slow_start()),
        }
    }
}

fn slow_start() -> Failure {
    Failure::Unable(format!("it does not start within {} s", SELF_TEST_TIME.as_secs()))
}

fn count(controls: impl Iterator) -> u32 {
    u32::try_from(controls.count()).unwrap_or(u32::MAX)
}

impl Shared {
    /// Nobody waits for this guest any more, which has not left its thread.
    pub(super) fn abandon(&self, control: &Arc<Control>) {
        self.abandoned().push(control.clone());
        self.replacements.call();
    }

    /// It has left it.
    pub(super) fn returned(&self, control: &Arc<Control>) {
        self.abandoned().retain(|abandoned| !Arc::ptr_eq(abandoned, control));
        self.replacements.release();
    }

    /// A panic while the lock was held cannot have left a half-changed list.
    fn abandoned(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Control>>> {
        self.abandoned.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// A panic while the lock was held cannot have left a half-changed list.
    pub(super) fn idle(&self) -> std::sync::MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What decides over the code that is generated: the same in the host and in the compiling child.
pub(super) fn code_settings() -> wasmtime::Config {
    let mut settings = wasmtime::Config::new();
    settings
        .wasm_component_model(true)
        .concurrency_support(false)
        .epoch_interruption(true)
        .memory_reservation(MEMORY_RESERVATION_BYTES)
        .memory_init_cow(true)
        .max_wasm_stack(WASM_STACK_BYTES)
        .async_stack_size(FIBRE_STACK_BYTES)
        // Frames come from the name section. A module's DWARF is as hostile as the module and would be read on a guest's thread.
        .wasm_backtrace_details(WasmBacktraceDetails::Disable)
        .wasm_backtrace_max_frames(NonZeroUsize::new(outcome::FRAMES_MAX + 1))
        .wasm_gc(false)
        .wasm_function_references(false)
        .wasm_exceptions(false)
        .gc_support(false)
        .wasm_threads(false)
        .shared_memory(false);
    settings
}

fn pool(config: &Config) -> PoolingAllocationConfig {
    // As many again may wait to be used again (`max_request_per_child`), holding no slot.
    let instances = config.instances_max.saturating_mul(2);
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances)
        .total_core_instances(instances.saturating_mul(CORE_INSTANCES_PER_COMPONENT))
        .total_memories(instances.saturating_mul(MEMORIES_PER_COMPONENT))
        .total_tables(instances.saturating_mul(TABLES_PER_COMPONENT))
        .total_stacks(instances)
        .max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT)
        .max_memories_per_component(MEMORIES_PER_COMPONENT)
        .max_tables_per_component(TABLES_PER_COMPONENT)
        .max_memories_per_module(MEMORIES_PER_COMPONENT)
        .max_tables_per_module(TABLES_PER_COMPONENT)
        .max_component_instance_size(INSTANCE_BYTES)
        .max_core_instance_size(INSTANCE_BYTES)
        .table_elements(TABLE_ELEMENTS)
        .max_memory_size(usize::try_from(config.memory_bytes_max.min(MEMORY_RESERVATION_BYTES)).unwrap_or(usize::MAX))
        .linear_memory_keep_resident(KEEP_RESIDENT_BYTES)
        .table_keep_resident(64 << 10)
        .pagemap_scan(Enabled::Auto);
    pool
}

/// Everything that a component may import.
pub(super) fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    grants::link(&mut linker)?;
    latest::Plugin::add_to_linker::<_, wasmtime::component::HasSelf<Guest>>(&mut linker, |guest| guest)?;
    super::update::add_to_linker(&mut linker)?;
    Ok(linker)
}

/// How many threads guests have, not counting the replacements.
fn threads(instances_max: u32) -> usize {
    (2 * cores()).max(4).max((instances_max as usize).min(THREADS_MAX))
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
