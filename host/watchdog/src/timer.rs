//! Timers: an ephemeral node per child, whose `mtime` is the child's last sign of life.

use std::borrow::Cow;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use futures::future::join_all;
use zookeeper_client::{CreateMode, Error as Zk};

use crate::age::ServerTime;
use crate::root::{BARRIER, TIMER_PREFIX};
use crate::session::plain;
use crate::{Error, Node, Result, Root, Session, SessionId};

/// A timer of ours, or one that we kick for its owner. It lives as long as the session that made it, whatever becomes of this handle.
#[derive(Debug)]
pub struct Timer {
    session: Session,
    path: String,
    process: Vec<u8>,
    czxid: i64,
    /// The version that our next write expects, so that we never write to a stranger's timer of the same name in a root made anew.
    version: AtomicI32,
}

/// A timer as its master sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimerAge {
    /// The name of its node, `timer-` and ten digits.
    pub name: String,
    /// What the child calls itself. Two children may have chosen the same.
    pub process: Vec<u8>,
    /// The time since its last kick, by the servers' clock.
    pub age: Duration,
    /// Whether that is longer than the queue's timer.
    pub expired: bool,
    /// The session that made it.
    pub session: SessionId,
    /// The transaction that made it.
    pub czxid: i64,
}

impl TimerAge {
    /// What the child calls itself, as text.
    pub fn process_name(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.process)
    }
}

/// What `check_timers` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerCount {
    /// All timers that are there, expired ones included, as WatchdogQueue counts.
    pub alive: usize,
    /// Those that were not kicked in time.
    pub expired: usize,
}

impl Timer {
    /// Makes a timer below `root`, and nothing else.
    pub(crate) async fn create(session: &Session, root: &Root, process: &[u8]) -> Result<Timer> {
        const DOING: &str = "creating a timer below";
        let prefix = root.child(TIMER_PREFIX);
        let options = CreateMode::EphemeralSequential.with_acls(session.access());
        let looked = session.repeat(|| session.client().check_stat(root.path())).await;
        let Some(before) = looked.map_err(|source| Error::of(DOING, root.path(), source))? else {
            return Err(Error::NoRoot(root.path().to_owned()));
        };
        loop {
            let (path, czxid, version) = match plain(session.client().create(&prefix, process, &options).await) {
                Ok((stat, sequence)) => (format!("{prefix}{sequence}"), stat.czxid, stat.version),
                Err(Zk::NoNode) => return Err(Error::NoRoot(root.path().to_owned())),
                // It may have been made all the same.
                Err(Zk::ConnectionLoss) => match find_own(session, root, process, before.pzxid).await? {
                    Some((name, node)) => (root.child(&name), node.czxid, node.version),
                    None => continue,
                },
                Err(source) => return Err(Error::of(DOING, root.path(), source)),
            };
            return Ok(Timer {
                session: session.clone(),
                path,
                process: process.to_vec(),
                czxid,
                version: AtomicI32::new(version),
            });
        }
    }

    /// A timer that is there, to be kicked for its owner.
    pub(crate) async fn open(session: &Session, path: String) -> Result<Timer> {
        let node = session.fetch_node(&path).await?;
        Ok(Timer { session: session.clone(), path, process: node.data, czxid: node.czxid, version: AtomicI32::new(node.version) })
    }

    /// The path of its node.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The name of its node.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// The transaction that made it. With the session's number it names this timer among all that ever were.
    pub fn czxid(&self) -> i64 {
        self.czxid
    }

    /// Says that the child is alive. False if the timer is gone: the master has cleared it, or its session has ended. While disconnected this
    /// waits until the session is connected again or over.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn kick_dog(&self) -> Result<bool> {
        Ok(self.kick().await?.is_some())
    }

    /// As [`Timer::kick_dog`]; what the servers' clock said at the kick.
    pub(crate) async fn kick(&self) -> Result<Option<ServerTime>> {
        loop {
            let expected = self.version.load(Ordering::Relaxed);
            match plain(self.session.client().set_data(&self.path, &self.process, Some(expected)).await) {
                Ok(stat) => {
                    self.version.store(stat.version, Ordering::Relaxed);
                    return Ok((stat.czxid == self.czxid).then_some(ServerTime { ms: stat.mtime }));
                }
                // Another kick came between, such as one of ours whose answer was lost, or this is no longer our timer.
                Err(Zk::BadVersion | Zk::ConnectionLoss) => {
                    if !self.look_again().await? {
                        return Ok(None);
                    }
                }
                Err(Zk::NoNode) => return Ok(None),
                Err(source) => return Err(Error::of("kicking", &self.path, source)),
            }
        }
    }

    /// Ends it. Done as well if it is gone already.
    ///
    /// # Errors
    /// [`Error::SessionEnded`] (then it is gone or will be), [`Error::Denied`].
    pub async fn end(self) -> Result<()> {
        self.delete().await
    }

    /// As [`Timer::end`], while others hold it, too.
    pub(crate) async fn delete(&self) -> Result<()> {
        loop {
            let expected = self.version.load(Ordering::Relaxed);
            match plain(self.session.client().delete(&self.path, Some(expected)).await) {
                Ok(()) | Err(Zk::NoNode) => return Ok(()),
                Err(Zk::BadVersion | Zk::ConnectionLoss) => {
                    if !self.look_again().await? {
                        return Ok(());
                    }
                }
                Err(source) => return Err(Error::of("ending", &self.path, source)),
            }
        }
    }

    /// Learns the timer's version. False if the timer is gone.
    async fn look_again(&self) -> Result<bool> {
        let stat = self.session.repeat(|| self.session.client().check_stat(&self.path)).await;
        match stat.map_err(|source| Error::of("looking for", &self.path, source))? {
            Some(stat) if stat.czxid == self.czxid => {
                self.version.store(stat.version, Ordering::Relaxed);
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// Removes the start barrier, if it is there.
pub(crate) async fn remove_barrier(session: &Session, root: &Root) -> Result<()> {
    let path = root.child(BARRIER);
    match session.repeat(|| session.client().delete(&path, None)).await {
        Ok(()) | Err(Zk::NoNode) => Ok(()),
        Err(source) => Err(Error::of("removing the barrier", &path, source)),
    }
}

/// The timers below `root`, lowest first. [`Error::NoNode`] if there is no root.
pub(crate) async fn list(session: &Session, root: &Root) -> Result<Vec<(String, Node)>> {
    let children = session.repeat(|| session.client().list_children(root.path())).await;
    read(session, root, children.map_err(|source| Error::of("listing", root.path(), source))?).await
}

/// The timers among `children`, lowest first; those that have vanished since are left out. All reads are under way at once, on one connection.
pub(crate) async fn read(session: &Session, root: &Root, mut children: Vec<String>) -> Result<Vec<(String, Node)>> {
    children.retain(|name| name.starts_with(TIMER_PREFIX));
    children.sort_unstable_by_key(|name| sequence(name));
    let nodes = join_all(children.iter().map(|name| {
        let path = root.child(name);
        async move { session.fetch_node(&path).await }
    }))
    .await;
    let mut timers = Vec::with_capacity(children.len());
    for (name, node) in children.into_iter().zip(nodes) {
        match node {
            Ok(node) => timers.push((name, node)),
            Err(Error::NoNode(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(timers)
}

/// The number at the end of a name, for the order of creation; names that have none come last.
pub(crate) fn sequence(name: &str) -> i64 {
    name.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(i64::MAX)
}

/// The timer that this session made with this process identifier after the transaction `since`.
async fn find_own(session: &Session, root: &Root, process: &[u8], since: i64) -> Result<Option<(String, Node)>> {
    let timers = list(session, root).await?;
    Ok(timers.into_iter().find(|(_, node)| node.owner == Some(session.id()) && node.data == process && node.czxid > since))
}
