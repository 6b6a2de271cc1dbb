//! Our place among the timers: behind a predecessor that we look at, or in front, acting.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at, sleep};
use zookeeper_client::Error as Zk;

use super::kicker::Beat;
use super::life::make_root;
use super::member::{look_at_root, timer_data};
use super::reconcile::Reconciler;
use super::{Host, Identity, Options, interval};
use crate::root::TIMER_PREFIX;
use crate::timer::sequence;
use crate::{Error, Node, Result, Session, Timer};

/// How long a timer that vanished may take to come back before its host counts as dead: somebody may have deleted it while its session
/// lives, and its host makes it again as soon as it hears of that.
const CONFIRMATION: Duration = Duration::from_millis(300);
/// Every so many looks the acting host compares with the database even if no timer came or went.
const LOOKS_PER_COMPARISON: u32 = 10;

/// What a host goes by when it judges others.
pub(super) struct View<'a, H> {
    pub(super) session: &'a Session,
    pub(super) options: &'a Options,
    pub(super) host: &'a H,
    pub(super) identity: Identity,
    pub(super) beats: watch::Receiver<Option<Beat>>,
    /// The transaction that made the root under which we made our timer.
    root_czxid: i64,
    /// When we last saw that the root had been cleared.
    pub(super) cleared: Option<Instant>,
}

impl<H: Host> View<'_, H> {
    /// Whether we kick in time, and have for a while if there was a gap: who was stuck gives whoever stood in for it the time to step back.
    fn is_fit(&self) -> bool {
        let timer = self.options.timer;
        let settled = |beat: &Beat| !beat.after_gap || beat.since.elapsed() >= 2 * interval(timer);
        self.beats.borrow().is_some_and(|beat| beat.is_fresh(timer) && settled(&beat))
    }

    /// How late a timer is, if it counts as late: the time for which it was not kicked while we kicked and reached the database throughout.
    pub(super) fn late(&self, node: &Node) -> Option<Duration> {
        let beat = (*self.beats.borrow())?;
        let reached = self.host.database_reached_since()?.elapsed();
        let late = beat.server_time.age_of(node);
        (late.min(reached).min(beat.since.elapsed()) > self.options.timer).then_some(late)
    }

    /// The root, if it is the one below which we made our timer.
    pub(super) async fn our_root(&self) -> Result<Option<Node>> {
        match look_at_root(self.session, &self.options.root).await {
            Ok(node) => Ok(Some(node).filter(|node| node.czxid == self.root_czxid)),
            Err(Error::NoRoot(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A future that ends when the node is gone; none if it is gone already. It is a watch for children that an ephemeral node never has:
    /// unlike others it is not spent by every kick.
    async fn gone(&self, path: &str) -> Result<Option<BoxFuture<'static, ()>>> {
        match self.session.repeat(|| self.session.client().list_and_watch_children(path)).await {
            Ok((_, watcher)) => Ok(Some(Box::pin(async move { drop(watcher.changed().await) }))),
            Err(Zk::NoNode) => Ok(None),
            Err(source) => Err(Error::of("watching", path, source)),
        }
    }
}

/// Looks at the fleet for one session.
pub(super) struct Watcher<'a, H> {
    view: View<'a, H>,
    timers: watch::Sender<Arc<Timer>>,
    acting: watch::Sender<bool>,
    /// The timers that were there before ours, lowest first; those that are gone drop out when we look at them.
    lower: Vec<String>,
    /// Tells when our own timer is gone.
    own: Option<BoxFuture<'static, ()>>,
    /// Tells when the timer of this name is gone.
    predecessor: Option<(String, BoxFuture<'static, ()>)>,
}

/// What the place is.
enum Place {
    /// Another one acts, or nobody may.
    Behind,
    /// We act.
    Front,
}

impl<'a, H: Host> Watcher<'a, H> {
    pub(super) fn new(
        session: &'a Session,
        options: &'a Options,
        host: &'a H,
        identity: Identity,
        beats: watch::Receiver<Option<Beat>>,
        timers: watch::Sender<Arc<Timer>>,
        acting: watch::Sender<bool>,
    ) -> Watcher<'a, H> {
        let view = View { session, options, host, identity, beats, root_czxid: 0, cleared: None };
        Watcher { view, timers, acting, lower: Vec::new(), own: None, predecessor: None }
    }

    /// Watches until the session ends.
    pub(super) async fn watch(&mut self) -> Result<()> {
        self.take_place().await?;
        loop {
            match self.place().await? {
                Place::Behind => self.wait_behind().await?,
                Place::Front => {
                    tracing::info!(identity = %self.view.identity, "this host acts for its fleet: it hands on what dead hosts had");
                    self.acting.send_replace(true);
                    let done = self.act().await;
                    self.acting.send_replace(false);
                    done?;
                    tracing::info!(identity = %self.view.identity, "this host no longer acts for its fleet");
                }
            }
        }
    }

    /// Learns which timers are before ours, and watches ours.
    async fn take_place(&mut self) -> Result<()> {
        loop {
            let (root, own) = (&self.view.options.root, self.timers.borrow().clone());
            let listed = self.view.session.repeat(|| self.view.session.client().get_children(root.path())).await;
            let (mut names, root_stat) = match listed {
                Ok(listed) => listed,
                Err(Zk::NoNode) => {
                    self.make_timer_again().await?;
                    continue;
                }
                Err(source) => return Err(Error::of("listing", root.path(), source)),
            };
            self.view.root_czxid = root_stat.czxid;
            names.retain(|name| name.starts_with(TIMER_PREFIX) && sequence(name) < sequence(own.name()));
            names.sort_unstable_by_key(|name| sequence(name));
            self.lower = names;
            self.own = self.view.gone(own.path()).await?;
            if self.own.is_some() {
                return Ok(());
            }
            self.make_timer_again().await?;
        }
    }

    /// The session lives, the timer does not: somebody has cleared the root, or deleted our timer.
    async fn make_timer_again(&mut self) -> Result<()> {
        let root = &self.view.options.root;
        tracing::warn!(identity = %self.view.identity, %root, "somebody deleted this host's timer: it makes it again");
        self.view.cleared = Some(Instant::now());
        self.predecessor = None;
        let data = timer_data(self.view.options, Some(self.view.identity));
        loop {
            make_root(self.view.session, root).await?;
            match Timer::create(self.view.session, root, &data).await {
                Ok(timer) => {
                    self.timers.send_replace(Arc::new(timer));
                    return Ok(());
                }
                // Whoever clears it is not done yet.
                Err(Error::NoRoot(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Looks at the nearest timer before ours; further ones only if it is late.
    async fn place(&mut self) -> Result<Place> {
        if !self.view.is_fit() {
            return Ok(Place::Behind);
        }
        for at in (0..self.lower.len()).rev() {
            let name = self.lower[at].clone();
            let path = self.view.options.root.child(&name);
            if self.predecessor.as_ref().is_none_or(|(watched, _)| *watched != name) {
                match self.view.gone(&path).await? {
                    Some(gone) => self.predecessor = Some((name, gone)),
                    None => {
                        self.lower.remove(at);
                        continue;
                    }
                }
            }
            match self.view.session.fetch_node(&path).await {
                Ok(node) if self.view.late(&node).is_none() => return Ok(Place::Behind),
                Ok(_) => {}
                Err(Error::NoNode(_)) => drop(self.lower.remove(at)),
                Err(error) => return Err(error),
            }
        }
        Ok(Place::Front)
    }

    async fn wait_behind(&mut self) -> Result<()> {
        let is_fit = self.view.is_fit();
        let own_gone = tokio::select! {
            () = told(&mut self.own) => true,
            () = told_of(&mut self.predecessor) => false,
            // Who comes here before its first kick, or after a gap, may be fit by the next one.
            () = kicked(&mut self.view.beats), if !is_fit => false,
            () = sleep(interval(self.view.options.timer)) => false,
        };
        if own_gone {
            self.make_timer_again().await?;
            self.take_place().await?;
        }
        Ok(())
    }

    /// Acts until another one should.
    async fn act(&mut self) -> Result<()> {
        let every = interval(self.view.options.timer);
        let mut looks = interval_at(tokio::time::Instant::now() + every, every);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut reconciler = Reconciler::default();
        // The one who acted before us may have lost its timer to somebody's hand just now.
        let mut confirmed = tokio::time::Instant::now() + CONFIRMATION;
        let Some(mut changes) = self.view.gone(self.view.options.root.path()).await? else { return Ok(()) };
        let mut look: u32 = 0;
        loop {
            tokio::select! {
                () = told(&mut self.own) => {
                    self.make_timer_again().await?;
                    return self.take_place().await;
                }
                () = &mut changes => {
                    // The new watch first: what changes while we compare is told again.
                    // A root that is gone took our own timer with it; that is told by `own`.
                    changes = self.view.gone(self.view.options.root.path()).await?.unwrap_or_else(|| Box::pin(std::future::pending()));
                    reconciler.something_changed();
                    confirmed = tokio::time::Instant::now() + CONFIRMATION;
                }
                () = tokio::time::sleep_until(confirmed), if reconciler.is_due() => reconciler.compare(&self.view).await?,
                _ = looks.tick() => {
                    if !matches!(self.place().await?, Place::Front) {
                        return Ok(());
                    }
                    look = look.wrapping_add(1);
                    reconciler.look(&self.view, look.is_multiple_of(LOOKS_PER_COMPARISON)).await?;
                }
            }
        }
    }
}

/// Ends with the next kick.
async fn kicked(beats: &mut watch::Receiver<Option<Beat>>) {
    if beats.changed().await.is_err() {
        // The session is about to end.
        std::future::pending().await
    }
}

/// Ends when the watched node is gone, once; never if nothing is watched.
async fn told(watched: &mut Option<BoxFuture<'static, ()>>) {
    match watched {
        Some(gone) => {
            gone.await;
            *watched = None;
        }
        None => std::future::pending().await,
    }
}

async fn told_of(watched: &mut Option<(String, BoxFuture<'static, ()>)>) {
    match watched {
        Some((_, gone)) => {
            gone.await;
            *watched = None;
        }
        None => std::future::pending().await,
    }
}
