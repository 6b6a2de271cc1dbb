#![doc = include_str!("../README.md")]
//!
//! # What is where
//!
//! - [`handler`] turns a function or an [`Application`] into the component's export.
//! - [`Context`] is everything a handler may ask of its host; [`Outcome`] and [`Error`] are everything it may answer.
//! - [`trace!`], [`debug!`], [`info!`], [`warn!`], [`error!`] write to the host's log.
//! - [`testing`] runs a handler natively, without a host.

mod application;
mod context;
mod decider;
mod error;
mod host;
pub mod log;
mod outcome;
mod submit;
mod task;
#[cfg(not(target_family = "wasm"))]
pub mod testing;

#[cfg(target_family = "wasm")]
mod guest;

pub use application::{Application, Handler, IntoOutcome};
pub use context::{Cancellation, Context, Progress};
pub use decider::{Decider, DefaultDecider, undefined_decision};
pub use error::{Error, FailureKind, OrFail};
pub use laelaps_plugin_macros::{decider, handler};
pub use outcome::Outcome;
pub use serde_json::{self, json};
pub use submit::Submit;
pub use task::Task;

/// What a handler returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the attributes expand to. Not for use by hand: it changes with them.
#[doc(hidden)]
pub mod __private {
    pub use crate::application::{answer, run, run_application};
    pub use crate::decider::read as read_options;
    #[cfg(target_family = "wasm")]
    pub use crate::guest::{Exports, bindings, export_plugin, serve};
}
