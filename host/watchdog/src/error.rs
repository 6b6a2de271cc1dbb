//! What can go wrong between us and ZooKeeper.

use std::time::Duration;

use crate::session::End;

/// The result of an operation on ZooKeeper.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation was not done. Nothing was changed unless the variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting, a root or an item cannot be used.
    #[error("{setting}: {found:?}: {problem}")]
    Config {
        /// The setting.
        setting: &'static str,
        /// The value, cut to 200 characters.
        found: String,
        /// What is wrong with it, with the bound where there is one.
        problem: String,
    },
    /// No server of the list let us in.
    #[error("no ZooKeeper server let us in within {waited:?}: {}", servers.join("; "))]
    Unreachable {
        /// How long it was tried.
        waited: Duration,
        /// What each server did, in the order of the list.
        servers: Vec<String>,
        /// The client's own words.
        #[source]
        source: zookeeper_client::Error,
    },
    /// The session is over; its ephemeral nodes are gone or will be.
    #[error("{doing}: the ZooKeeper session {end}")]
    SessionEnded {
        /// What was being done.
        doing: &'static str,
        /// How the session ended.
        end: End,
    },
    /// The connection broke before the answer came, and whether the write was done cannot be found out.
    #[error("{doing} {path}: the connection broke before the answer, and it is not known whether it was done")]
    Uncertain {
        /// What was being done.
        doing: &'static str,
        /// The node it was done to.
        path: String,
        /// The item that may have been taken, if it was a consume.
        item: Option<crate::Item>,
    },
    /// The root exists already.
    #[error("{root}: the root exists already{}", if *half_filled { ", left half-filled by a create_queue that did not finish" } else { "" })]
    RootExists {
        /// The root.
        root: String,
        /// Whether its items are not all there.
        half_filled: bool,
    },
    /// The root does not exist, or was cleared.
    #[error("{0}: no such root")]
    NoRoot(String),
    /// The parent of the root does not exist.
    #[error("{root}: its parent {parent} does not exist")]
    NoParent {
        /// The root.
        root: String,
        /// The missing parent.
        parent: String,
    },
    /// The root is still being filled by its master.
    #[error("{0}: its master is still filling it")]
    HalfFilled(String),
    /// The root is that of a fleet of hosts, and the operation would take it for a queue's.
    #[error("{0}: this root is that of a fleet of hosts, not of a queue")]
    FleetRoot(String),
    /// The root holds the markers of items that hosts are moving, and is no queue.
    #[error("{0}: hosts keep the markers of the items there that they move into their database")]
    MarkersRoot(String),
    /// The root is that of a queue, and a fleet of hosts must not share it.
    #[error("{root}: this root holds {found:?}, a fleet needs one of its own")]
    NotFleetRoot {
        /// The root.
        root: String,
        /// The data of its node, cut to 200 characters.
        found: String,
    },
    /// There is no such node.
    #[error("{0}: no such node")]
    NoNode(String),
    /// A child of the root has children of its own, which WatchdogQueue never makes.
    #[error("{0}: this node has children that are not a queue's, so it was left alone")]
    NotEmpty(String),
    /// The node's access list does not let us.
    #[error("{doing} {path}: not allowed by the node's access list")]
    Denied {
        /// What was being done.
        doing: &'static str,
        /// The node.
        path: String,
    },
    /// A node's quota is used up.
    #[error("{doing} {path}: the quota of this path is used up")]
    Quota {
        /// What was being done.
        doing: &'static str,
        /// The node.
        path: String,
    },
    /// Anything else ZooKeeper or its client answered.
    #[error("{doing} {path}")]
    ZooKeeper {
        /// What was being done.
        doing: &'static str,
        /// The node.
        path: String,
        /// The client's own words.
        #[source]
        source: zookeeper_client::Error,
    },
}

impl Error {
    /// Whether the same call may well succeed later, on this session or on a new one, without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Error::Unreachable { source, .. } | Error::ZooKeeper { source, .. } => is_passing(source),
            Error::SessionEnded { end, .. } => *end == End::Expired,
            Error::HalfFilled(_) => true,
            _ => false,
        }
    }

    /// The error without what changes from try to try, so that the same trouble can be told once.
    pub fn gist(&self) -> String {
        match self {
            Error::Unreachable { servers, .. } => servers.join("; "),
            error => error.to_string(),
        }
    }

    /// What to do about it, as a sentence for people.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Error::Unreachable { .. } => "check the server list, and that the servers answer `srvr` with a mode",
            Error::SessionEnded { end: End::Expired, .. } => {
                "its timers are gone; connect again, and make them anew. A longer session timeout bears longer silences"
            }
            Error::SessionEnded { end: End::AuthFailed, .. } => "check the scheme and the credentials",
            Error::Uncertain { .. } => "look at the node before you try again",
            Error::RootExists { half_filled: true, .. } => {
                "if no master is filling it now, clear it with clear-timers and create it again"
            }
            Error::RootExists { .. } => "attach to it, choose another root, or clear it with clear-timers",
            Error::NoRoot(_) => "its master makes it with create-queue; if it was there before, the master has cleared it",
            Error::NoParent { .. } => "create the parent, or ask for parents to be created",
            Error::HalfFilled(_) => "try again in a moment; if its master died, clear it with clear-timers",
            Error::FleetRoot(_) => "clearing it would make living hosts look dead; choose the root of a queue",
            Error::MarkersRoot(_) => "items would be lost if it were cleared; choose the root of a queue",
            Error::NotFleetRoot { .. } => "give the fleet a root that no WatchdogQueue uses",
            Error::NotEmpty(_) => "remove what is below it by hand if nobody needs it",
            Error::Denied { .. } => "give the credentials that made the node",
            Error::Quota { .. } => "raise the quota, or clear what is no longer needed",
            _ => return None,
        })
    }

    pub(crate) fn config(setting: &'static str, found: &str, problem: impl Into<String>) -> Error {
        Error::Config { setting, found: cut(found), problem: problem.into() }
    }

    /// What the client answered to an operation on `path`, in our words.
    pub(crate) fn of(doing: &'static str, path: &str, source: zookeeper_client::Error) -> Error {
        use zookeeper_client::Error as Zk;
        let path = path.to_owned();
        match source {
            Zk::NoNode => Error::NoNode(path),
            Zk::NoAuth | Zk::InvalidAcl => Error::Denied { doing, path },
            Zk::QuotaExceeded => Error::Quota { doing, path },
            Zk::SessionExpired | Zk::SessionMoved => Error::SessionEnded { doing, end: End::Expired },
            Zk::AuthFailed => Error::SessionEnded { doing, end: End::AuthFailed },
            Zk::ClientClosed => Error::SessionEnded { doing, end: End::Closed },
            source => Error::ZooKeeper { doing, path, source },
        }
    }
}

/// Whether the client's error may pass by itself.
fn is_passing(source: &zookeeper_client::Error) -> bool {
    use zookeeper_client::Error as Zk;
    matches!(source, Zk::ConnectionLoss | Zk::Timeout | Zk::NoHosts | Zk::Throttled | Zk::SessionExpired | Zk::NotReadOnly)
}

/// The first 200 characters, for a message.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}
