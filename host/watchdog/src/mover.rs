//! Moving items from a shared root into a database so that none is lost and none comes twice, whoever is killed when.
//!
//! Authority: the delete of an item's node decides who has it; the database decides what becomes of the task. Neither can see into the other,
//! so an item goes through four steps, and every state in between says by itself what has to follow:
//!
//! ```text
//!   1  the task is held in the database: it exists, nobody may claim it, no retention removes it
//!   2  one transaction: the item is deleted, and a marker of ours is made under a root of our own
//!   3  the task is released: from now on it is a task like any other
//!   4  the marker is deleted
//!
//!   held,  item there             step 2 was not reached: go on with it
//!   held,  no item, a marker      go on with step 3
//!   held,  no item, no marker     a peer has the item: drop the held task
//!   a marker, and not held        step 3 was done, the task may even be finished and forgotten: go on with step 4
//! ```
//!
//! The key of a task is made of the root's path, the transaction that made the root, and the item's number: a root that is cleared and made
//! anew counts from 0 again, and its items are other items. So that step 2 cannot hit an item of the new root, it also checks that a guard, an
//! ephemeral node of ours below the root, is still there; it vanishes with the root. Peers do not look at it. Several hosts may move from one
//! root into one database, with one root for their markers; any of them may finish what another began.

use zookeeper_client::{CreateMode, Error as Zk, MultiWriteError};

use crate::root::{ITEM_PREFIX, MARKERS_ROOT};
use crate::session::plain;
use crate::{Error, Item, Result, Root, Session, WatchdogQueue};

/// Bytes of a queue root's path at most, so that keys stay short.
const ROOT_BYTES_MAX: usize = 200;
/// How our guards are called: this, the session and the transaction that made the root.
const GUARD_PREFIX: &str = "laelaps-";

/// The database, as far as a mover needs it. Every call may come again after it was done.
pub trait Store: Send + Sync {
    /// Makes a task that nobody may claim and no retention removes, unless the key is known already, in whatever state.
    fn hold(&self, key: &str, item: &[u8]) -> impl Future<Output = std::result::Result<(), StoreError>> + Send;

    /// Makes a held task claimable. Nothing if it is not held (any more), or not there: then it was released before.
    fn release(&self, key: &str) -> impl Future<Output = std::result::Result<(), StoreError>> + Send;

    /// Removes a task that is still held. Nothing if it is not held, or not there.
    fn drop_held(&self, key: &str) -> impl Future<Output = std::result::Result<(), StoreError>> + Send;

    /// The keys of held tasks that begin with this.
    fn held(&self, prefix: &str) -> impl Future<Output = std::result::Result<Vec<String>, StoreError>> + Send;
}

/// Why the database did not do its part.
pub type StoreError = Box<dyn std::error::Error + Send + Sync>;

/// Why an item was not moved. What was begun is finished by [`Mover::recover`].
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// ZooKeeper's side.
    #[error(transparent)]
    ZooKeeper(#[from] Error),
    /// The database's side.
    #[error("{doing} {key}")]
    Store {
        /// What was being done.
        doing: &'static str,
        /// The key of the task.
        key: String,
        /// The database's words.
        #[source]
        source: StoreError,
    },
}

/// Moves items from one root.
#[derive(Debug)]
pub struct Mover<S> {
    queue: WatchdogQueue,
    markers: Root,
    store: S,
    /// None until the first item is wanted: what others left is finished also where the root is gone.
    guard: Option<Guard>,
}

/// An ephemeral node of ours below the root.
#[derive(Clone, Debug)]
struct Guard {
    path: String,
    root_czxid: i64,
}

/// What became of an item that we wanted.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    /// It is ours.
    Ours,
    /// It is there, and we have not taken it.
    Not,
    /// A peer has it.
    Theirs,
    /// The root is another one.
    RootChanged,
}

impl<S: Store> Mover<S> {
    /// Prepares to move from the queue's root. `markers` is our own root, made if it is not there; all hosts that share the database use the same.
    /// Finishes what earlier movers left, also if the queue's root is gone by now.
    ///
    /// # Errors
    /// [`Error::Config`] if the queue's root is longer than 200 bytes; [`Error::FleetRoot`], [`Error::Denied`], [`Error::SessionEnded`]; the
    /// database's.
    pub async fn open(queue: WatchdogQueue, markers: Root, store: S) -> std::result::Result<Mover<S>, MoveError> {
        let root = queue.root().path();
        if root.len() > ROOT_BYTES_MAX {
            let problem = format!("{} bytes, at most {ROOT_BYTES_MAX} are allowed where items become tasks", root.len());
            return Err(Error::config("root", root, problem).into());
        }
        make_markers(queue.session(), &markers).await?;
        let mover = Mover { queue, markers, store, guard: None };
        mover.recover().await?;
        Ok(mover)
    }

    /// The queue below.
    pub fn queue(&self) -> &WatchdogQueue {
        &self.queue
    }

    /// What the keys of the tasks begin with that were items of the root which is there now.
    ///
    /// # Errors
    /// [`Error::NoRoot`], [`Error::FleetRoot`], [`Error::Denied`], [`Error::SessionEnded`].
    pub async fn task_prefix(&self) -> Result<String> {
        let czxid = self.queue.look_at_root().await?.czxid;
        Ok(format!("{}{czxid:x}/", self.key_prefix()))
    }

    /// Moves an item, any. The key of its task, which can be claimed now; none if no items are left.
    ///
    /// # Errors
    /// [`Error::NoRoot`] once the root is cleared; [`Error::SessionEnded`]; the database's. What was begun is finished by the next
    /// [`Mover::recover`], of this host or of another one.
    pub async fn move_one(&mut self) -> std::result::Result<Option<String>, MoveError> {
        loop {
            // Before the item is read: its data must be of the root that the guard stands for.
            let Guard { path: guard, root_czxid } = match &self.guard {
                Some(guard) => guard.clone(),
                None => self.guard.insert(Guard::place(&self.queue).await?).clone(),
            };
            let Some(item) = self.queue.next_item().await? else { return Ok(None) };
            let key = self.key(root_czxid, &item.name);
            self.store.hold(&key, &item.data).await.map_err(in_store("holding", &key))?;
            loop {
                match self.take(&guard, &key, &item).await? {
                    Taken::Ours => {
                        self.finish(&key).await?;
                        return Ok(Some(key));
                    }
                    Taken::Not => {}
                    Taken::Theirs => break self.drop_held(&key).await?,
                    Taken::RootChanged => {
                        self.guard = None;
                        self.queue.forget_seen();
                        match self.look_at(&key).await? {
                            // Another host of ours was quicker than whoever cleared the root.
                            Taken::Ours => {
                                self.finish(&key).await?;
                                return Ok(Some(key));
                            }
                            // Our item went with its root.
                            Taken::Theirs => break self.drop_held(&key).await?,
                            // Only the guard is gone: somebody is just clearing the root. What becomes of the item is seen by `recover`, if not here.
                            Taken::Not | Taken::RootChanged => break,
                        }
                    }
                }
            }
        }
    }

    /// Finishes what was begun and not finished, by this host or another one. Worth calling after an error, and now and then. Returns how
    /// many tasks it released or dropped.
    ///
    /// # Errors
    /// As [`Mover::move_one`].
    pub async fn recover(&self) -> std::result::Result<usize, MoveError> {
        let mut finished = 0;
        let prefix = self.key_prefix();
        for name in self.marker_names().await? {
            let key = unescape(&name);
            if self.read_key(&key).is_some() {
                self.finish(&key).await?;
                finished += 1;
            }
        }
        // After the markers, and each looked at again: a held task alone may be one that another host is just moving.
        for key in self.store.held(&prefix).await.map_err(in_store("listing", &prefix))? {
            if self.read_key(&key).is_none() {
                continue;
            }
            match self.look_at(&key).await? {
                Taken::Ours => self.finish(&key).await?,
                Taken::Theirs => self.drop_held(&key).await?,
                Taken::Not | Taken::RootChanged => continue,
            }
            finished += 1;
        }
        Ok(finished)
    }

    /// Steps 3 and 4.
    async fn finish(&self, key: &str) -> std::result::Result<(), MoveError> {
        self.store.release(key).await.map_err(in_store("releasing", key))?;
        let (session, marker) = (self.queue.session(), self.marker(key));
        match session.repeat(|| session.client().delete(&marker, None)).await {
            // Another host may have finished it as well.
            Ok(()) | Err(Zk::NoNode) => Ok(()),
            Err(source) => Err(Error::of("deleting the marker", &marker, source).into()),
        }
    }

    async fn drop_held(&self, key: &str) -> std::result::Result<(), MoveError> {
        self.store.drop_held(key).await.map_err(in_store("dropping", key))
    }

    /// Step 2.
    async fn take(&self, guard: &str, key: &str, item: &Item) -> Result<Taken> {
        let client = self.queue.session().client();
        let options = CreateMode::Persistent.with_acls(self.queue.session().access());
        let (path, marker) = (self.queue.root().child(&item.name), self.marker(key));
        let wrong = |source| Error::of("taking", &path, source);
        let mut request = client.new_multi_writer();
        request.add_check_version(guard, -1).map_err(wrong)?;
        request.add_delete(&path, None).map_err(wrong)?;
        request.add_create(&marker, key.as_bytes(), &options).map_err(wrong)?;
        match request.commit().await {
            Ok(_) => Ok(Taken::Ours),
            Err(MultiWriteError::OperationFailed { index: 0, source: Zk::NoNode }) => Ok(Taken::RootChanged),
            // What the server refused it has seen in order: who took the item has left the marker, or has finished, or is a stranger.
            Err(MultiWriteError::OperationFailed { index: 1, source: Zk::NoNode }) => self.look_at(key).await,
            Err(MultiWriteError::RequestFailed { source }) => match plain::<()>(Err(source)) {
                Err(Zk::ConnectionLoss) => self.look_at(key).await,
                Err(source) => Err(wrong(source)),
                Ok(()) => Ok(Taken::Not),
            },
            Err(MultiWriteError::OperationFailed { source, .. }) => Err(wrong(source)),
        }
    }

    /// What became of the item of a held task. The item first: once it is gone nobody can make its marker any more.
    async fn look_at(&self, key: &str) -> Result<Taken> {
        let session = self.queue.session();
        let root = self.queue.root();
        // The server at hand may be behind the one that we or another host asked before.
        let synced = session.repeat(|| session.client().sync(root.path())).await;
        synced.map_err(|source| Error::of("catching up with", root.path(), source))?;
        let item_is_there = match self.read_key(key) {
            Some((czxid, name)) if self.root_now().await? == Some(czxid) => {
                // The root once more: the item seen was one of that root if the root is the same after.
                session.check_exists(&root.child(name)).await? && self.root_now().await? == Some(czxid)
            }
            // The root that the item was in is gone, and never comes back.
            _ => false,
        };
        if item_is_there {
            return Ok(Taken::Not);
        }
        Ok(if session.check_exists(&self.marker(key)).await? { Taken::Ours } else { Taken::Theirs })
    }

    async fn marker_names(&self) -> Result<Vec<String>> {
        let session = self.queue.session();
        let listed = session.repeat(|| session.client().list_children(self.markers.path())).await;
        listed.map_err(|source| Error::of("listing", self.markers.path(), source))
    }

    fn key_prefix(&self) -> String {
        format!("{}@", self.queue.root())
    }

    /// The key of an item's task, such as `/jobs@2f/queue-0000000001`.
    fn key(&self, root_czxid: i64, name: &str) -> String {
        format!("{}{root_czxid:x}/{name}", self.key_prefix())
    }

    /// The transaction that made the root, and the name of the item; none if the key is not of our root.
    fn read_key<'k>(&self, key: &'k str) -> Option<(i64, &'k str)> {
        let (czxid, name) = key.strip_prefix(&self.key_prefix())?.split_once('/')?;
        let czxid = i64::from_str_radix(czxid, 16).ok()?;
        name.starts_with(ITEM_PREFIX).then_some((czxid, name))
    }

    /// The transaction that made the root that is there now.
    async fn root_now(&self) -> Result<Option<i64>> {
        match self.queue.look_at_root().await {
            Ok(node) => Ok(Some(node.czxid)),
            Err(Error::NoRoot(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn marker(&self, key: &str) -> String {
        self.markers.child(&escape(key))
    }
}

impl Guard {
    async fn place(queue: &WatchdogQueue) -> Result<Guard> {
        let session: &Session = queue.session();
        loop {
            let before = queue.look_at_root().await?.czxid;
            let path = queue.root().child(&format!("{GUARD_PREFIX}{}-{before:x}", session.id()));
            let options = CreateMode::Ephemeral.with_acls(session.access());
            match session.repeat(|| session.client().create(&path, b"", &options)).await {
                Ok(_) | Err(Zk::NodeExists) => {}
                Err(Zk::NoNode) => return Err(Error::NoRoot(queue.root().path().to_owned())),
                Err(source) => return Err(Error::of("creating", &path, source)),
            }
            // Only the same transaction before and after says below which root it stands.
            if queue.look_at_root().await?.czxid == before {
                return Ok(Guard { path, root_czxid: before });
            }
            // It stands below another root than it says; it would go with our session anyway.
            let _ = session.client().delete(&path, None).await;
        }
    }
}

fn in_store<'a>(doing: &'static str, key: &'a str) -> impl FnOnce(StoreError) -> MoveError + 'a {
    move |source| MoveError::Store { doing, key: key.to_owned(), source }
}

/// A key as the name of a node, which has no slash.
fn escape(key: &str) -> String {
    key.replace('%', "%25").replace('/', "%2F")
}

fn unescape(name: &str) -> String {
    name.replace("%2F", "/").replace("%25", "%")
}

/// Makes the root of the markers if it is not there, with what is above it. It says from its first moment what it is, so that no master takes it
/// for a queue's and clears it.
async fn make_markers(session: &Session, markers: &Root) -> Result<()> {
    let options = CreateMode::Persistent.with_acls(session.access());
    loop {
        match session.repeat(|| session.client().create(markers.path(), MARKERS_ROOT, &options)).await {
            Ok(_) => return Ok(()),
            Err(Zk::NodeExists) => match session.fetch_node(markers.path()).await {
                Ok(node) if node.data == MARKERS_ROOT => return Ok(()),
                Ok(_) => match session.repeat(|| session.client().set_data(markers.path(), MARKERS_ROOT, None)).await {
                    Ok(_) => return Ok(()),
                    Err(Zk::NoNode) => {}
                    Err(source) => return Err(Error::of("writing", markers.path(), source)),
                },
                // Cleared between our two looks.
                Err(Error::NoNode(_)) => {}
                Err(error) => return Err(error),
            },
            Err(Zk::NoNode) if markers.parent() != "/" => {
                let made = session.repeat(|| session.client().mkdir(markers.parent(), &options)).await;
                made.map_err(|source| Error::of("creating", markers.parent(), source))?;
            }
            Err(Zk::NoNode) => return Err(Error::NoParent { root: markers.path().to_owned(), parent: "the chroot".to_owned() }),
            Err(source) => return Err(Error::of("creating", markers.path(), source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_back_from_the_name_of_its_marker() {
        for key in ["/jobs@2f/queue-0000000001", "/a%2F/b%25@1/queue-1", "/%@0/x"] {
            let name = escape(key);
            assert!(!name.contains('/'));
            assert_eq!(unescape(&name), key);
        }
    }
}
