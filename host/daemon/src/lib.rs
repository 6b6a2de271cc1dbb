//! The Laelaps worker host: tasks from a database, handlers as WebAssembly components, replaced without a restart.
//!
//! ARCHITECTURE.md at the root of the repository draws the whole; [`dispatch`] is the path of a task.

mod audit;
mod budget;
pub mod cli;
pub mod config;
mod dispatch;
mod excuses;
mod fault;
pub mod fleet;
pub mod host;
mod housekeeping;
pub mod intake;
mod leases;
mod log;
pub mod plugin;
mod pulse;
mod reports;
mod serves;
mod service;
mod settler;
mod signals;
mod start;
mod strangers;
#[cfg(test)]
mod trial;
mod unstored;
mod updates;
mod versions;
