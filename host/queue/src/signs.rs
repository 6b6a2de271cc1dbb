//! Signs of life that hosts leave in the database, for a fleet that has nothing else to tell its dead by.
//!
//! Authority: the database keeps the signs, and says who was struck off; whoever watches decides who is dead, by a clock of its own. A sign is a
//! count and no time: it means that its host was alive since the count was last read, whatever the server's clock did meanwhile.

use std::time::Duration;

use crate::HostId;

/// A host's sign of life, as it stands in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sign {
    /// The host.
    pub host: HostId,
    /// The identity under which it registered, for [`crate::Worker::hand_on`].
    pub identity: Option<String>,
    /// Another number with each sign that it gives.
    pub count: i64,
    /// How long the host may go without giving another one, as it says itself.
    pub timeout: Duration,
}
