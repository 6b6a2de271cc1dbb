//! How long ago something was written, by the servers' clock.
//!
//! A node's `mtime` is the leader's clock at the write. The local clock may be minutes off, so it is never compared with it: what the servers'
//! clock says now is the `mtime` of a node that they have just written for us.

use std::time::Duration;

use crate::Node;

/// What the servers' clock said at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ServerTime {
    /// Milliseconds since 1970.
    pub(crate) ms: i64,
}

impl ServerTime {
    /// How long before this moment the node was made, likewise.
    pub(crate) fn since_made(self, node: &Node) -> Duration {
        Duration::from_millis(u64::try_from(self.ms.saturating_sub(node.created_ms)).unwrap_or(0))
    }

    /// How long before this moment the node was last written. What was written since then is of age zero.
    pub(crate) fn age_of(self, node: &Node) -> Duration {
        Duration::from_millis(u64::try_from(self.ms.saturating_sub(node.modified_ms)).unwrap_or(0))
    }
}
