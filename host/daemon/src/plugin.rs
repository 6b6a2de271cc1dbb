//! Plugins: components that handle tasks. Everything that touches wasmtime lives below this module.
//!
//! Authority: a file in the plugin folder is a wish; a [`Version`] that was read whole, compiled, linked and tried is what serves. An attempt
//! holds the `Arc` of the version it was routed to until it is settled, so a replaced version lives as long as its last attempt.
//!
//! ```text
//!   NAME.wasm --settled, read, digest--> compile (child process) --> link --> self-test --> serving
//!                                           |                        |           |
//!                                           +------------------------+-----------+--> refused: whatever serves goes on serving
//! ```
//!
//! On failure: a file that is not admitted changes nothing but the log and [`Store::list`]; a guest that traps, loops or eats memory costs its
//! own attempt; a guest's thread that cannot be interrupted at once is answered for, counted ([`Engine::abandoned`]), replaced, and leaves when
//! it can, or never ([`Engine::lost`]).

mod abi;
mod capture;
mod compile;
mod control;
mod engine;
mod error;
mod fit;
mod follow_ups;
mod grants;
mod guest;
mod inspect;
mod instance;
mod invoke;
mod journal;
mod limiter;
mod outcome;
mod reason;
mod reuse;
pub(crate) mod scan;
mod scratch;
mod store;
mod submission;
mod threads;
mod ticker;
mod update;
pub(crate) mod usage;
mod version;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use capture::{Captured, Level, Line, Stream};
pub use compile::{COMPILE_ARGUMENT, compile_child_main};
pub use control::{Cancellation, Control};
pub use engine::Engine;
pub use error::Error;
pub use follow_ups::{FollowUps, Keys, Queues, Types, Users};
pub(crate) use grants::nested;
pub use inspect::{Inspection, Item};
pub use invoke::{Completion, Invocation, Services};
pub use store::{Admissions, Admitted, PluginStatus, Refused, Rescan, Store};
pub use version::{Digest, Version};

/// Where plugins come from.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The watched folder: `NAME.wasm` is plugin `NAME`.
    pub folder: PathBuf,
    /// Compiled code, private to this user. None: a temporary folder that ends with the process.
    pub cache_folder: Option<PathBuf>,
    /// How often the folder is looked at even if the system reports no change.
    pub poll_interval: Duration,
    /// The largest memory limit of all routes, which sizes the pool.
    pub memory_bytes_max: u64,
    /// Instances that may live at once: processors and a stated number of abandoned ones.
    pub instances_max: u32,
    /// The program that compiles, called with [`COMPILE_ARGUMENT`] first. None: this very program (its `main` calls [`compile_child_main`]).
    pub compiler: Option<PathBuf>,
    /// What compiling one module may use.
    pub compile_limits: CompileLimits,
}

/// What compiling one module may use: the one step of admission that has no bound of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileLimits {
    /// Memory of the compiling process. Default 4 GiB.
    pub memory_bytes: u64,
    /// Processor time of all its threads, and, four times that, time by the clock. Whole seconds. Default 300 s.
    pub time: Duration,
}

impl Default for CompileLimits {
    fn default() -> Self {
        Self { memory_bytes: 4 << 30, time: Duration::from_secs(300) }
    }
}

impl Default for Config {
    /// The defaults of the configuration file: folder `plugins`, a look every 5 s, 64 MiB, 16 instances.
    fn default() -> Self {
        Self {
            folder: PathBuf::from("plugins"),
            cache_folder: None,
            poll_interval: Duration::from_secs(5),
            memory_bytes_max: Limits::default().memory_bytes,
            instances_max: 16,
            compiler: None,
            compile_limits: CompileLimits::default(),
        }
    }
}

/// What one attempt may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Linear memory of all its instances together. Default 64 MiB, at most 4 GiB.
    pub memory_bytes: u64,
    /// From its start to its stop. None: no limit.
    pub time: Option<Duration>,
    /// Output bytes of `finish`. Default 1 MiB.
    pub output_bytes: u64,
    /// Bytes of log lines, standard output and standard error that are kept together. Default 64 KiB.
    pub log_bytes: u64,
    /// Open handles (files, streams, pollables). Default 128.
    pub handles: u32,
    /// Follow-up tasks. Default 1,000.
    pub follow_ups: u32,
    /// Data bytes of all follow-up tasks together. Default 16 MiB.
    pub follow_up_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_bytes: 64 << 20,
            time: None,
            output_bytes: 1 << 20,
            log_bytes: 64 << 10,
            handles: 128,
            follow_ups: 1_000,
            follow_up_bytes: 16 << 20,
        }
    }
}

/// What one attempt may reach. By default nothing but follow-up tasks of its own kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Grants {
    /// Folders.
    pub folders: Arc<[FolderGrant]>,
    /// Environment variables with their values.
    pub environment: Vec<(String, String)>,
    /// Follow-up tasks.
    pub follow_ups: FollowUps,
}

/// A folder that a handler may open.
#[derive(Clone, Debug, PartialEq)]
pub struct FolderGrant {
    /// The folder on this machine.
    pub host: PathBuf,
    /// The name under which the handler sees it.
    pub guest: String,
    /// Whether it may also write there.
    pub writable: bool,
    /// Bytes that handlers may add to it, counted over all of them since the process began. None: no limit. Default 1 GiB.
    pub bytes_max: Option<u64>,
    /// Files, folders and links that handlers may make in it, counted in the same way. None: no limit. Default 10,000.
    pub files_max: Option<u64>,
}

impl FolderGrant {
    /// A folder to be read only.
    #[must_use]
    pub fn read_only(host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        Self { host: host.into(), guest: guest.into(), writable: false, bytes_max: Some(1 << 30), files_max: Some(10_000) }
    }

    /// A folder to be written to as well, within the default limits.
    #[must_use]
    pub fn writable(host: impl Into<PathBuf>, guest: impl Into<String>) -> Self {
        Self { writable: true, ..Self::read_only(host, guest) }
    }
}
