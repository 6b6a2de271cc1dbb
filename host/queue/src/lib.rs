//! Tasks in a database, claimed under fenced leases.
//!
//! This crate is the queue under the Laelaps worker host and can be used alone, by a producer or by a worker written in Rust. It knows
//! neither WebAssembly nor ZooKeeper.
//!
//! Authority: the database decides who owns a task, and its clock is the only clock. A task is in exactly one state:
//!
//! ```text
//!             submit                claim                  finish
//!   (nothing) ------> waiting <----------------> running ----------> finished
//!                        |    retry, release,       |     fail
//!                        |    lost with its host    +----------> failed
//!                        |                          |     cancel
//!                        +--------------------------+----------> cancelled
//! ```
//!
//! Every write about an attempt names the attempt's lease. A lease ends at its `until`, or when the task is taken, cancelled or
//! finished by force, whichever is first; from then on every such write changes nothing and answers [`LeaseAnswer::Lost`].

mod backend;
mod batch;
mod claim;
mod config;
mod data;
mod earlier;
mod error;
mod fair;
mod listing;
mod mysql;
mod outcome;
mod patience;
mod perfectqueue;
mod postgres;
mod queue;
mod retry;
mod schema;
mod serves;
mod settlement;
mod signs;
mod sqlite;
mod task;
mod unserved;

pub use backend::{
    Backend, Beat, HostDescription, HostRecord, LeaseAnswer, Lost, Migration, Operator, PlannedStep, PluginVersion, Producer,
    Quarantine, Reclaimed, Schema, SchemaStatus, Transaction, Update, Worker,
};
pub use claim::{Accepts, Claim, Claimed};
pub use config::{Config, Connections, Database, Kind, PerfectQueue, Tls};
pub use error::{Error, Result};
pub use queue::{AcquiredTask, PollOptions, Queue};
pub use retry::Backoff;
#[doc(hidden)]
pub use schema::SchemaStep;
pub use serves::{QueuedType, ServedRoute, ServedTypes, Serves};
pub use settlement::{Attempt, Event, FailureKind, Policy, Settlement, Verdict, decide};
pub use signs::Sign;
pub use task::{
    AttemptRecord, ClaimedTask, Compression, Descent, Filter, HostId, Lease, LeaseRef, NewTask, Page, Progress, State, Stats,
    Submitted, Task, TaskId, Timestamp, check_queue,
};
