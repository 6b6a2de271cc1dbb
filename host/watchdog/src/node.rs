//! A look at any node over the connection that is there anyway.

use zookeeper_client::Stat;

use crate::session::check_path;
use crate::{Error, Result, Session, SessionId};

/// What a node holds, and its history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its data.
    pub data: Vec<u8>,
    /// The transaction that made it. No other node, nor a later one of the same path, has it.
    pub czxid: i64,
    /// When it was made, in milliseconds since 1970 by the servers' clock.
    pub created_ms: i64,
    /// When its data was last written, likewise.
    pub modified_ms: i64,
    /// How often its data was written since it was made.
    pub version: i32,
    /// The session it lives and ends with, if it is ephemeral.
    pub owner: Option<SessionId>,
    /// How many children it has.
    pub children: i32,
}

impl Node {
    pub(crate) fn from_parts(data: Vec<u8>, stat: &Stat) -> Node {
        Node {
            data,
            czxid: stat.czxid,
            created_ms: stat.ctime,
            modified_ms: stat.mtime,
            version: stat.version,
            owner: (stat.ephemeral_owner != 0).then_some(SessionId(stat.ephemeral_owner)),
            children: stat.num_children,
        }
    }
}

impl Session {
    /// Whether a node is there. The path is absolute, below the session's chroot.
    ///
    /// # Errors
    /// [`Error::Config`] for a path that cannot be; [`Error::SessionEnded`].
    pub async fn check_exists(&self, path: &str) -> Result<bool> {
        check_path(path)?;
        let stat = self.repeat(|| self.client().check_stat(path)).await;
        stat.map(|stat| stat.is_some()).map_err(|source| Error::of("looking for", path, source))
    }

    /// A node.
    ///
    /// # Errors
    /// [`Error::NoNode`] if it is not there; [`Error::Denied`]; as [`Session::check_exists`].
    pub async fn fetch_node(&self, path: &str) -> Result<Node> {
        check_path(path)?;
        let (data, stat) =
            self.repeat(|| self.client().get_data(path)).await.map_err(|source| Error::of("reading", path, source))?;
        Ok(Node::from_parts(data, &stat))
    }
}
