//! WatchdogQueue's calls: a master that makes a queue and watches over its children, and children that take items and kick their timers.
//!
//! ```text
//! ROOT                   "watchdog"            made by the master, which refuses an existing one
//! ROOT/queue-NNNNNNNNNN  the item              taken by whoever deletes it
//! ROOT/sync              "sync"                the start barrier; the first child that makes a timer deletes it
//! ROOT/timer-NNNNNNNNNN  the process           ephemeral: gone with its child's session; its mtime is the last kick
//! ```
//!
//! The servers are the authority: an item belongs to the child whose delete succeeded, and a kick is as old as their clock says. A connection
//! that breaks under a call makes the call wait for the next one, and repeat what may be repeated; where it cannot be found out whether a
//! write was done, the answer is [`Error::Uncertain`].

use std::sync::Mutex;
use std::time::Duration;

use zookeeper_client::{CreateMode, Error as Zk, MultiWriteError};

use crate::age::ServerTime;
use crate::root::{BARRIER, FLEET_ROOT, HALF_FILLED_ROOT, ITEM_PREFIX, MARKERS_ROOT, QUEUE_ROOT};
use crate::session::plain;
use crate::{Error, Item, NewQueue, Node, Options, PERL_BYTES_MAX, Result, Root, Session, Timer, TimerAge, TimerCount, timer};

mod clear;
mod consume;

/// A master's or a child's view of one root. Calls may be made at the same time.
#[derive(Debug)]
pub struct WatchdogQueue {
    session: Session,
    root: Root,
    /// After how long without a kick a timer counts as expired.
    timer: Duration,
    /// Items that were seen and not yet tried, so that not every consume lists them all.
    seen: Mutex<Vec<String>>,
}

/// How long a child may go without a kick unless the master says otherwise.
const TIMER: Duration = Duration::from_secs(120);

impl WatchdogQueue {
    /// Connects, or joins a session again (see [`Options::rejoin`]). Looks at no root yet: [`WatchdogQueue::create_queue`] or
    /// [`WatchdogQueue::attach_queue`] comes next.
    ///
    /// # Errors
    /// As [`Root::new`] and [`Session::connect`].
    pub async fn new(options: &Options, root: &str) -> Result<WatchdogQueue> {
        let root = Root::new(root)?;
        Ok(WatchdogQueue::over(Session::connect(options).await?, root))
    }

    /// On a session that is there already.
    pub fn over(session: Session, root: Root) -> WatchdogQueue {
        WatchdogQueue { session, root, timer: TIMER, seen: Mutex::new(Vec::new()) }
    }

    /// The session below.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The root.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Master: makes the root, its items and its barrier, in one transaction up to about 1 MB. A larger queue takes several; until the last,
    /// the root says that it is being filled, and [`WatchdogQueue::attach_queue`] refuses it; if one fails, what was made is removed.
    /// `timer` is how long a child may go without a kick. Returns how many items are longer than a Perl peer reads.
    ///
    /// # Errors
    /// [`Error::RootExists`], [`Error::NoParent`], [`Error::Config`] for items that are too large or too many, [`Error::Uncertain`] if the
    /// connection broke under the first transaction and there is a root now, [`Error::Denied`], [`Error::SessionEnded`].
    pub async fn create_queue(&mut self, queue: &NewQueue, timer: Duration) -> Result<usize> {
        let cut = queue.check()?;
        if cut > 0 {
            tracing::warn!(root = %self.root, items = cut, "items longer than 1,023 bytes reach a Perl peer cut");
        }
        if queue.parents && self.root.parent() != "/" {
            self.make_parents().await?;
        }
        let requests = queue.requests(self.root.path().len() + ITEM_PREFIX.len() + 11 + self.access_bytes());
        for (step, range) in requests.iter().enumerate() {
            let step = Step { number: step, last: step + 1 == requests.len(), barrier: queue.sync_start };
            if let Err(error) = self.fill(step, &queue.items[range.clone()]).await {
                if step.number > 0 {
                    // Half a queue is worse than none. If this fails too, the root still says that it is half-filled.
                    let _ = clear::clear(&self.session, &self.root).await;
                }
                return Err(error);
            }
        }
        self.timer = timer;
        Ok(cut)
    }

    /// Master or child: uses a root that is there. `timer` is how long a child may go without a kick, for the master's calls.
    ///
    /// # Errors
    /// [`Error::NoRoot`]; [`Error::HalfFilled`] while its master is filling it in several steps; [`Error::FleetRoot`]; [`Error::SessionEnded`].
    pub async fn attach_queue(&mut self, timer: Duration) -> Result<()> {
        let node = self.look_at_root().await?;
        if node.data.starts_with(HALF_FILLED_ROOT) {
            return Err(Error::HalfFilled(self.root.path().to_owned()));
        }
        self.timer = timer;
        Ok(())
    }

    /// Child: waits until the root is there and filled, told by a watch, and attaches to it.
    ///
    /// # Errors
    /// [`Error::FleetRoot`], [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn wait_attach(&mut self, timer: Duration) -> Result<()> {
        loop {
            // The watch first: what happens between the two looks is told.
            let watched = self.session.repeat(|| self.session.client().check_and_watch_stat(self.root.path())).await;
            let (_, watcher) = watched.map_err(|source| Error::of("watching", self.root.path(), source))?;
            match self.attach_queue(timer).await {
                Err(Error::NoRoot(_) | Error::HalfFilled(_)) => drop(watcher.changed().await),
                attached => return attached,
            }
        }
    }

    /// Master: waits until the barrier is gone, told by a watch. True once it is (also if there never was one), false if `patience` runs out
    /// first.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn wait_sync(&self, patience: Duration) -> Result<bool> {
        let gone = self.wait_until_gone(self.root.child(BARRIER));
        tokio::time::timeout(patience, gone).await.unwrap_or(Ok(false))
    }

    /// Master: how many items nobody has taken yet.
    ///
    /// # Errors
    /// [`Error::NoRoot`], [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn queue_count(&self) -> Result<usize> {
        Ok(self.children().await?.iter().filter(|name| name.starts_with(ITEM_PREFIX)).count())
    }

    /// Master: how many timers there are, and how many of them were not kicked in time.
    ///
    /// # Errors
    /// As [`WatchdogQueue::get_timers`].
    pub async fn check_timers(&self) -> Result<TimerCount> {
        let timers = self.get_timers(false).await?;
        Ok(TimerCount { alive: timers.len(), expired: timers.iter().filter(|timer| timer.expired).count() })
    }

    /// Master: every timer, or only those not kicked in time, in the order in which they were made. To learn the servers' time it writes the
    /// root's data again.
    ///
    /// # Errors
    /// [`Error::NoRoot`], [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn get_timers(&self, expired_only: bool) -> Result<Vec<TimerAge>> {
        let now = self.server_time().await?;
        let nodes = timer::list(&self.session, &self.root).await.map_err(|error| self.no_root(error))?;
        let timers = nodes.into_iter().filter_map(|(name, node)| {
            let age = now.age_of(&node);
            let Node { data: process, czxid, owner, .. } = node;
            Some(TimerAge { name, process, age, expired: age > self.timer, session: owner?, czxid })
        });
        Ok(timers.filter(|timer| timer.expired || !expired_only).collect())
    }

    /// Master: deletes every child, then the root. Children learn of it by their next kick. Returns how many nodes were deleted.
    ///
    /// # Errors
    /// [`Error::NoRoot`]; [`Error::FleetRoot`], always: clearing a fleet's root would make living hosts look dead; [`Error::NotEmpty`] if a
    /// child has children of its own; [`Error::Denied`]; [`Error::SessionEnded`]. Some children may be gone then.
    pub async fn clear_timers(&self) -> Result<usize> {
        self.look_at_root().await?;
        clear::clear(&self.session, &self.root).await
    }

    /// Child: makes a timer and removes the barrier. `process` is what the master will see, a Perl one its first [`PERL_BYTES_MAX`] bytes.
    /// Two timers of one session with the same identifier must not be made at the same moment: after a broken connection they could not be
    /// told apart.
    ///
    /// # Errors
    /// [`Error::NoRoot`], [`Error::FleetRoot`], [`Error::SessionEnded`], [`Error::Denied`], [`Error::Config`] for an identifier longer than an
    /// item may be.
    pub async fn create_timer(&self, process: &[u8]) -> Result<Timer> {
        if process.len() > crate::ITEM_BYTES_MAX {
            let problem = format!("{} bytes, at most {} are allowed", process.len(), crate::ITEM_BYTES_MAX);
            return Err(Error::config("process identifier", &String::from_utf8_lossy(&process[..64]), problem));
        }
        if process.len() > PERL_BYTES_MAX {
            tracing::warn!(root = %self.root, bytes = process.len(), "a process identifier longer than 1,023 bytes reaches a Perl peer cut");
        }
        self.look_at_root().await?;
        let timer = Timer::create(&self.session, &self.root, process).await?;
        timer::remove_barrier(&self.session, &self.root).await?;
        Ok(timer)
    }

    /// A timer that is there, to be kicked for the child that made it, or ended. `name` is that of its node.
    ///
    /// # Errors
    /// [`Error::NoNode`], [`Error::SessionEnded`], [`Error::Denied`], [`Error::Config`] for a name that is none of a timer.
    pub async fn open_timer(&self, name: &str) -> Result<Timer> {
        if !name.starts_with(crate::root::TIMER_PREFIX) || name.contains('/') {
            return Err(Error::config("timer", name, "a timer is called timer- and ten digits"));
        }
        self.look_at_root().await?;
        Timer::open(&self.session, self.root.child(name)).await
    }

    /// Child: takes an item, any. It is the caller's if this returns it: nobody else gets it, and if the caller dies it is lost (see
    /// [`crate::mover`] for the way that bears a crash). None if nothing is left.
    ///
    /// # Errors
    /// [`Error::Uncertain`] with the item, if the connection broke under the delete and the item is gone: we or a peer took it.
    /// [`Error::NoRoot`], [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn consume(&self) -> Result<Option<Item>> {
        consume::consume(self).await
    }

    /// Child: waits until there is an item, told by a watch. False if the root is cleared instead. A peer may be quicker to take it.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn wait_for_items(&self) -> Result<bool> {
        loop {
            let listed = self.session.repeat(|| self.session.client().list_and_watch_children(self.root.path())).await;
            match listed {
                Ok((names, _)) if names.iter().any(|name| name.starts_with(ITEM_PREFIX)) => return Ok(true),
                Ok((_, watcher)) => drop(watcher.changed().await),
                Err(Zk::NoNode) => return Ok(false),
                Err(source) => return Err(Error::of("watching", self.root.path(), source)),
            }
        }
    }

    /// Child: waits until the barrier stands, told by a watch. A master that makes its queue step by step makes the barrier last, when children
    /// may have begun already.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn wait_for_barrier(&self) -> Result<()> {
        let path = self.root.child(BARRIER);
        loop {
            let looked = self.session.repeat(|| self.session.client().check_and_watch_stat(&path)).await;
            match looked.map_err(|source| Error::of("watching", &path, source))? {
                (Some(_), _) => return Ok(()),
                (None, watcher) => drop(watcher.changed().await),
            }
        }
    }

    /// Child: removes the barrier, if it stands. [`WatchdogQueue::create_timer`] does it too.
    ///
    /// # Errors
    /// [`Error::SessionEnded`], [`Error::Denied`].
    pub async fn remove_barrier(&self) -> Result<()> {
        timer::remove_barrier(&self.session, &self.root).await
    }

    /// Child: kicks its timer. The same as [`Timer::kick_dog`].
    ///
    /// # Errors
    /// As [`Timer::kick_dog`].
    pub async fn kick_dog(&self, timer: &Timer) -> Result<bool> {
        timer.kick_dog().await
    }

    /// Both: whether a node is there; any node, by its absolute path. The same as [`Session::check_exists`].
    ///
    /// # Errors
    /// As [`Session::check_exists`].
    pub async fn check_exists(&self, path: &str) -> Result<bool> {
        self.session.check_exists(path).await
    }

    /// Both: a node; any node, by its absolute path. The same as [`Session::fetch_node`].
    ///
    /// # Errors
    /// As [`Session::fetch_node`].
    pub async fn fetch_node(&self, path: &str) -> Result<Node> {
        self.session.fetch_node(path).await
    }

    /// An item to be taken, which a peer may take first.
    pub(crate) async fn next_item(&self) -> Result<Option<Item>> {
        consume::next(self).await
    }

    /// Forgets the items that were seen: they are of a root that is gone.
    pub(crate) fn forget_seen(&self) {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
    }

    async fn children(&self) -> Result<Vec<String>> {
        let children = self.session.repeat(|| self.session.client().list_children(self.root.path())).await;
        children.map_err(|source| self.no_root(Error::of("listing", self.root.path(), source)))
    }

    /// Every part of the above that begins at a root: it has to be there, and it has to be a queue's.
    pub(crate) async fn look_at_root(&self) -> Result<Node> {
        let node = self.session.fetch_node(self.root.path()).await.map_err(|error| self.no_root(error))?;
        match node.data.as_slice() {
            FLEET_ROOT => Err(Error::FleetRoot(self.root.path().to_owned())),
            MARKERS_ROOT => Err(Error::MarkersRoot(self.root.path().to_owned())),
            _ => Ok(node),
        }
    }

    /// A missing root is called so.
    fn no_root(&self, error: Error) -> Error {
        match error {
            Error::NoNode(path) if path == self.root.path() => Error::NoRoot(path),
            other => other,
        }
    }

    /// What the servers' clock says. The root keeps its data, whatever that is; a write that came between is not undone.
    async fn server_time(&self) -> Result<ServerTime> {
        loop {
            let node = self.look_at_root().await?;
            match plain(self.session.client().set_data(self.root.path(), &node.data, Some(node.version)).await) {
                Ok(stat) => return Ok(ServerTime { ms: stat.mtime }),
                Err(Zk::BadVersion | Zk::ConnectionLoss) => {}
                Err(source) => return Err(self.no_root(Error::of("reading the servers' clock at", self.root.path(), source))),
            }
        }
    }

    async fn wait_until_gone(&self, path: String) -> Result<bool> {
        loop {
            let looked = self.session.repeat(|| self.session.client().check_and_watch_stat(&path)).await;
            match looked.map_err(|source| Error::of("watching", &path, source))? {
                (None, _) => return Ok(true),
                // Any event, a lost session included, is a reason to look again.
                (Some(_), watcher) => drop(watcher.changed().await),
            }
        }
    }

    async fn make_parents(&self) -> Result<()> {
        let options = CreateMode::Persistent.with_acls(self.session.access());
        let made = self.session.repeat(|| self.session.client().mkdir(self.root.parent(), &options)).await;
        made.map_err(|source| Error::of("creating", self.root.parent(), source))
    }

    fn access_bytes(&self) -> usize {
        self.session.access().iter().map(|entry| entry.scheme().len() + entry.id().len() + 12).sum()
    }

    /// One transaction of a create_queue.
    async fn fill(&self, step: Step, items: &[Vec<u8>]) -> Result<()> {
        const DOING: &str = "creating";
        let root = self.root.path();
        loop {
            let source = match self.fill_once(step, items).await {
                Ok(()) => return Ok(()),
                Err(source) => source,
            };
            match source {
                MultiWriteError::OperationFailed { index: 0, source: Zk::NodeExists } if step.number == 0 => {
                    let half_filled = self.look_at_root().await.is_ok_and(|node| node.data.starts_with(HALF_FILLED_ROOT));
                    return Err(Error::RootExists { root: root.to_owned(), half_filled });
                }
                MultiWriteError::OperationFailed { index: 0, source: Zk::NoNode } if step.number == 0 => {
                    return Err(Error::NoParent { root: root.to_owned(), parent: self.root.parent().to_owned() });
                }
                MultiWriteError::RequestFailed { source: Zk::ConnectionLoss | Zk::Custom(_) } => {
                    match self.look_at_root().await {
                        Ok(node) if node.data == self.filled(step) && !(step.last && step.number == 0) => return Ok(()),
                        // The step before it: this one was not done.
                        Ok(node)
                            if step.number > 0
                                && node.data == self.filled(Step { number: step.number - 1, last: false, ..step }) => {}
                        Err(Error::NoRoot(_)) if step.number == 0 => {}
                        // A root made in one step does not tell who made it.
                        Ok(_) => return Err(Error::Uncertain { doing: DOING, path: root.to_owned(), item: None }),
                        Err(error) => return Err(error),
                    }
                }
                failed => return Err(self.no_root(Error::of(DOING, root, failed.into()))),
            }
        }
    }

    async fn fill_once(&self, step: Step, items: &[Vec<u8>]) -> std::result::Result<(), MultiWriteError> {
        let mut request = self.session.client().new_multi_writer();
        let options = CreateMode::Persistent.with_acls(self.session.access());
        let filled = self.filled(step);
        if step.number == 0 {
            request.add_create(self.root.path(), &filled, &options)?;
        }
        let options = CreateMode::PersistentSequential.with_acls(self.session.access());
        let prefix = self.root.child(ITEM_PREFIX);
        for item in items {
            request.add_create(&prefix, item, &options)?;
        }
        if step.number == 0 && step.barrier {
            request.add_create(
                &self.root.child(BARRIER),
                BARRIER.as_bytes(),
                &CreateMode::Persistent.with_acls(self.session.access()),
            )?;
        }
        if step.number > 0 {
            request.add_set_data(self.root.path(), &filled, None)?;
        }
        request.commit().await.map(drop)
    }

    /// What the root says after a step. Steps of one session are told apart by their number, those of two masters by their sessions.
    fn filled(&self, step: Step) -> Vec<u8> {
        if step.last {
            return QUEUE_ROOT.to_vec();
        }
        let mut data = HALF_FILLED_ROOT.to_vec();
        data.extend_from_slice(format!(" by {}: step {}", self.session.id(), step.number + 1).as_bytes());
        data
    }
}

/// One of the transactions that make a queue.
#[derive(Clone, Copy)]
struct Step {
    number: usize,
    last: bool,
    barrier: bool,
}
