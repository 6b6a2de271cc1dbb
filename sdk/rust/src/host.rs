//! The host as a handler meets it: the imports of a component, or a double in a native test.

use std::time::Duration;

use crate::{Cancellation, Progress, Result};

/// The functions of the contract's `context` interface, in the SDK's words.
pub(crate) trait Host {
    fn heartbeat(&self, progress: Option<&Progress>, alive_time: Option<Duration>) -> bool;
    fn cancellation(&self) -> Option<Cancellation>;
    fn update_data(&self, members: &[u8]) -> Result<()>;
    fn submit(&self, request: SubmitRequest) -> Result<()>;
    fn deadline_ms(&self) -> Option<u64>;
    fn created_at_ms(&self) -> u64;
    fn max_attempts(&self) -> Option<u32>;
    fn queue(&self) -> String;
    fn setting(&self, name: &str) -> Option<String>;
    fn settings(&self) -> Vec<(String, String)>;
}

/// A follow-up task, whole.
#[derive(Clone, Debug)]
pub(crate) struct SubmitRequest {
    pub(crate) key: String,
    pub(crate) kind: String,
    pub(crate) data: Vec<u8>,
    pub(crate) run_at_ms: Option<u64>,
    pub(crate) user: Option<String>,
    pub(crate) max_running: Option<u32>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) priority: Option<i32>,
    pub(crate) queue: Option<String>,
    pub(crate) gzip: bool,
}

/// Whole milliseconds; what no `u64` holds is as good as for ever.
pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
