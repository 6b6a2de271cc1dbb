//! The path of a task: claim -> route -> execute -> settle.
//!
//! One [`Dispatcher`] owns what this host has claimed: a buffer of tasks not begun and the attempts that run. It claims at most what free
//! processors and `task_prefetch` can start, gives back what is not begun when it is told to end, and hands every end of an attempt to the
//! [`Settler`]. Nothing here waits for a guest: attempts run on the plugin engine's own threads.

mod alone;
mod attempt;
mod buffer;
mod queues;
mod stop;
mod turns;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{Accepts, Backend, Claim, Claimed, ClaimedTask, HostId, Kind, LeaseRef};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

use self::alone::Alone;
use self::attempt::attempt;
use self::buffer::{Buffer, is_limited};
use self::queues::{Ask, Place, Queues};
use self::turns::Turns;
use crate::budget::{Budget, Pause};
use crate::config::{Config, Routes};
use crate::fleet::Membership;
use crate::leases::Leases;
use crate::plugin::usage::{Purpose, Share};
use crate::plugin::{self, Control};
use crate::pulse::Turning;
use crate::settler::Settler;
use crate::signals::Manner;
use crate::strangers::Strangers;
use crate::unstored::Unstored;
use crate::updates::Updates;
use crate::versions::Versions;

/// A claim asks for this many tasks at most.
const CLAIM_MAX: u32 = 1_000;
/// While tasks are flowing, a claim waits this long for more processors to become free, so that it fetches several at once.
const CLAIM_GROUPING: Duration = Duration::from_millis(1);
/// Between two tries while the database does not answer.
const CLAIM_RETRY_MAX: Duration = Duration::from_secs(5);

/// What the host may ask of a running dispatcher.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Claim no more, give back what is not begun, end what runs, and end.
    End(Manner),
    /// End attempts whose plugin has another version in service by now.
    Replace(Manner),
}

/// Everything an attempt needs, shared by all of them.
pub(crate) struct Shared {
    /// The configuration in force.
    pub config: Config,
    /// Its routes.
    pub routes: Arc<Routes>,
    /// The queue.
    pub backend: Arc<dyn Backend>,
    /// Where components run.
    pub engine: Arc<plugin::Engine>,
    /// How much of the machine's memory all that may take.
    pub budget: Budget,
    /// Which versions serve.
    pub store: Arc<plugin::Store>,
    /// The leases of this host.
    pub leases: Leases,
    /// The way of outcomes to the database.
    pub settler: Settler,
    /// The way of new members of tasks' data to it.
    pub updates: Updates,
    /// The plugin versions that run here, and those that must not.
    pub versions: Versions,
    /// This host, as the database knows it.
    pub host: HostId,
    /// Told when tasks whose retention has ended are due to be removed.
    pub clean_up_due: Arc<Notify>,
    /// Notified when another task of a user with a limit may run.
    pub opened: Arc<Notify>,
    /// Follow-ups that are submitted and not stored yet.
    pub unstored: Unstored,
    /// Types that this host does not serve and was offered.
    pub strangers: Arc<Strangers>,
}

/// The claimed tasks of one host, and what happens to them.
pub(crate) struct Dispatcher {
    shared: Arc<Shared>,
    /// The types with a route to a plugin that serves. The same for all claims until plugins change: a queue may remember what was learnt with it.
    accepts: Accepts,
    /// Changes with the plugins that serve.
    plugins: watch::Receiver<u64>,
    /// Claimed, held, not begun.
    buffer: Buffer,
    attempts: JoinSet<()>,
    running: HashMap<tokio::task::Id, Running>,
    claiming: Option<JoinHandle<(Instant, laelaps_queue::Result<Claimed>)>>,
    /// Which queues the claims ask for.
    queues: Queues,
    /// What the claim under way asks for.
    asked: Option<Ask>,
    /// The claim under way offers so many free processors to users with a limit.
    offered: u32,
    turns: Turns,
    /// No claim before this moment.
    claim_not_before: tokio::time::Instant,
    claim_failures: u32,
    pause: Pause,
    /// Fruitful claims until the next removal of old tasks.
    claims_until_clean_up: u32,
    alone: Alone,
    ending: Option<Ending>,
    /// Threads lost at the last look.
    stuck: u32,
    /// When the threads were looked at last.
    looked_at: Instant,
    /// Since when every look has come in time. Before that, this process itself did not run, and its guests' silence says nothing about them.
    awake_since: Instant,
    /// The fleet under whose identity tasks are claimed; None without one.
    membership: Option<Membership>,
    /// Who watches over this loop; None if nobody does.
    turning: Option<Turning>,
    /// When a turn came so late that what is claimed may be others' by now, unless the fleet has confirmed it since.
    woke_at: Option<Instant>,
    /// Why it ends by itself, if it does.
    broken: Option<Broken>,
}

/// A claimed task whose lease this host renews.
struct Held {
    task: ClaimedTask,
    /// The task's key, for the log.
    key: Arc<str>,
    control: Arc<Control>,
    /// Its data, as a part of what this process holds. None once the guest is done with it.
    data: Option<Share>,
    /// When its claim was sent: its lease lasts at least `alive_time` from then on.
    claimed_at: Instant,
    /// Its place in its queue's share of the processors.
    place: Place,
}

/// An attempt under way.
struct Running {
    lease_ref: LeaseRef,
    key: Arc<str>,
    control: Arc<Control>,
    /// The version it runs on; None while it has no plugin.
    version: Option<Arc<plugin::Version>>,
    /// Its place in its queue's share of the processors, given back when it ends.
    place: Place,
}

struct Ending {
    manner: Manner,
    /// When a graceful end becomes an immediate one.
    deadline: Option<tokio::time::Instant>,
}

impl Dispatcher {
    /// A dispatcher that has claimed nothing yet.
    pub(crate) fn new(shared: Arc<Shared>, membership: Option<Membership>, turning: Option<Turning>) -> Self {
        // The first one after a random part, so that hosts which started together do not clean up together.
        let claims_until_clean_up = fastrand::u32(0..=shared.config.cleanup_interval);
        let mut plugins = shared.store.changes();
        plugins.mark_unchanged();
        Self {
            accepts: accepts(&shared),
            plugins,
            queues: Queues::new(&shared.config.queues),
            asked: None,
            shared,
            buffer: Buffer::default(),
            attempts: JoinSet::new(),
            running: HashMap::new(),
            claiming: None,
            offered: 0,
            turns: Turns::default(),
            claim_not_before: tokio::time::Instant::now(),
            claim_failures: 0,
            pause: Pause::default(),
            claims_until_clean_up,
            alone: Alone::default(),
            ending: None,
            stuck: 0,
            looked_at: Instant::now(),
            awake_since: Instant::now(),
            membership,
            turning,
            woke_at: None,
            broken: None,
        }
    }

    /// Work until told to end; returns once nothing is buffered or running and every outcome was handed to the settler.
    ///
    /// # Errors
    /// The host cannot go on as it is: too many threads are stuck in guests, or the database has struck it off.
    pub(crate) async fn run(mut self, mut orders: mpsc::Receiver<Order>) -> Result<(), Broken> {
        let mut looks = tokio::time::interval(self.shared.config.child_heartbeat_interval);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut turns = self.turning.as_ref().map(|turning| tokio::time::interval(turning.interval()));
        loop {
            if self.turning.as_ref().is_some_and(Turning::turned) {
                self.woke_at = Some(Instant::now());
            }
            self.look_at_membership();
            self.begin_buffered(u32::from(self.is_turn()));
            self.start_claiming();
            self.begin_buffered(self.offered);
            if self.ending.is_some() && self.is_idle() {
                return self.why_broken().map_or(Ok(()), Err);
            }
            let deadline = self.ending.as_ref().and_then(|ending| ending.deadline);
            let claim_at = if self.may_claim() { self.claim_at() } else { None };
            let may_claim = claim_at.is_some();
            tokio::select! {
                Some(ended) = self.attempts.join_next_with_id() => self.attempt_ended(ended),
                Some((sent, claimed)) = claim_result(&mut self.claiming) => self.claim_ended(sent, claimed),
                Some(order) = orders.recv() => self.obey(order),
                () = self.shared.backend.wakeup(), if may_claim => self.claim_now(),
                () = self.shared.opened.notified(), if may_claim => self.claim_now(),
                Ok(()) = self.plugins.changed(), if may_claim => {
                    self.accepts = accepts(&self.shared);
                    self.claim_now();
                }
                () = sleep_until_some(claim_at), if may_claim => {}
                () = sleep_until_some(deadline) => self.end(Manner::Immediate),
                _ = looks.tick(), if self.may_have_stuck() => self.look_for_stuck(),
                () = changed(&mut self.membership) => {}
                () = ticked(&mut turns) => {}
            }
        }
    }

    fn why_broken(&self) -> Option<Broken> {
        if self.stuck > STUCK_MAX { Some(Broken::TooManyStuck(self.stuck)) } else { self.broken }
    }

    /// What was claimed under an identity that is over is lost: its guests are stopped, and somebody else has or gets their tasks.
    fn look_at_membership(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let Some(broken) = self.membership.as_ref().and_then(Membership::over) else { return };
        let running = self.running.len();
        match broken {
            Broken::IdentityOver => tracing::warn!(running, "this host's ZooKeeper session is over: stopping what it runs"),
            _ => tracing::warn!(running, "this host was struck off: stopping what it runs"),
        }
        self.broken = Some(broken);
        self.end(Manner::Immediate);
    }

    /// Whether this host was frozen or stuck for so long that others may run by now what it has claimed: it begins nothing until its fleet says
    /// that it lives.
    fn may_be_dead(&self) -> bool {
        let unconfirmed = |woke_at| self.membership.as_ref().is_some_and(|membership| !membership.is_confirmed_since(woke_at));
        self.woke_at.is_some_and(unconfirmed)
    }

    /// Whether the fleet lets this host take on work: not while ZooKeeper does not answer, nor while the host is not well.
    fn fleet_allows(&self) -> bool {
        let allowed = self.membership.as_ref().is_none_or(Membership::may_claim);
        allowed && (self.membership.is_none() || self.turning.as_ref().is_none_or(Turning::is_well))
    }

    // ---- claim

    fn free(&self) -> u32 {
        let ahead = if self.buffer.is_heavy() { 0 } else { self.shared.config.task_prefetch };
        let capacity = self.shared.config.processors + ahead;
        let used = u32::try_from(self.running.len() + self.buffer.len()).unwrap_or(u32::MAX);
        let free = capacity.saturating_sub(used).min(CLAIM_MAX);
        if free == 0 { 0 } else { free.min(self.room()) }
    }

    /// How many tasks the budget of memory has room for. If nothing runs there is always room for one: what it needs may be more than the budget,
    /// but nothing else would ever make room for it.
    fn room(&self) -> u32 {
        let room = self.room_beside();
        if self.running.is_empty() && self.buffer.is_empty() { room.max(1) } else { room }
    }

    fn room_beside(&self) -> u32 {
        self.shared.budget.room(self.running.values().map(|running| running.control.memory_peak()), self.buffer.len())
    }

    /// What is only kept for later attempts goes before claiming stops for it.
    fn look_at_memory(&mut self) {
        let is_full = self.running.len() + self.buffer.len() >= self.shared.config.processors as usize;
        if is_full || self.ending.is_some() || self.claiming.is_some() {
            return;
        }
        if self.room_beside() == 0 {
            self.shared.engine.release_idle();
        }
        self.pause.note(&self.shared.budget, self.room(), self.running.is_empty());
    }

    fn is_idle(&self) -> bool {
        self.running.is_empty() && self.buffer.is_empty() && self.claiming.is_none()
    }

    fn may_claim(&self) -> bool {
        if self.ending.is_some() || self.claiming.is_some() || !self.fleet_allows() || self.waits_for_turn() {
            return false;
        }
        if self.alone.is_wanted() { self.is_idle() } else { !self.alone.is_now() && self.free() > 0 }
    }

    /// The moment of the next claim; None while the queues' shares leave nothing to ask for.
    fn claim_at(&self) -> Option<tokio::time::Instant> {
        let not_before = self.claim_not_before;
        if self.alone.is_wanted() { Some(not_before) } else { self.queues.next_at(not_before) }
    }

    /// Something may wait by now.
    fn claim_now(&mut self) {
        let now = tokio::time::Instant::now();
        self.claim_not_before = now;
        self.queues.wake(now);
    }

    /// Processors that run nothing.
    fn idle_processors(&self) -> u32 {
        self.shared.config.processors.saturating_sub(u32::try_from(self.running.len()).unwrap_or(u32::MAX))
    }

    /// Whether the next free processor is for a task of a user with a limit, although the buffer has others.
    fn is_turn(&self) -> bool {
        let has_only_others = !self.buffer.is_empty() && !self.buffer.has_limited();
        has_only_others && !self.shared.config.disable_resource_limit && self.turns.is_due(tokio::time::Instant::now())
    }

    /// The next claim waits for that processor. The buffer feeds the others meanwhile.
    fn waits_for_turn(&self) -> bool {
        self.idle_processors() == 0 && self.is_turn()
    }

    fn start_claiming(&mut self) {
        if self.is_idle() {
            self.alone.idle();
        }
        self.look_at_memory();
        let now = tokio::time::Instant::now();
        if !self.may_claim() || self.claim_at().is_none_or(|at| now < at) {
            return;
        }
        let alone = self.alone.is_wanted();
        let free = self.free();
        let asked = if alone { Some(self.queues.ask_alone()) } else { self.queues.ask(free, now) };
        let Some(asked) = asked else { return };
        let limit = asked.limit;
        if self.plugins.has_changed().unwrap_or(false) {
            self.plugins.mark_unchanged();
            self.accepts = accepts(&self.shared);
        }
        let ignore_users = self.shared.config.disable_resource_limit;
        self.offered = if ignore_users { 0 } else { limit.min(self.idle_processors()) };
        let claim = Claim {
            alone,
            ignore_users,
            accepts: Some(self.accepts.clone()),
            limited: (!ignore_users).then_some(self.offered),
            queues: asked.queues.clone(),
            ..Claim::new(self.shared.host, limit, self.shared.config.alive_time)
        };
        self.asked = Some(asked);
        if let Some(turning) = &self.turning {
            turning.claim_sent();
        }
        let backend = Arc::clone(&self.shared.backend);
        // In a task of its own, so that a claim is never dropped half-way with its tasks unknown to us.
        self.claiming = Some(tokio::spawn(async move { (Instant::now(), backend.claim(&claim).await) }));
    }

    fn claim_ended(&mut self, sent: Instant, claimed: laelaps_queue::Result<Claimed>) {
        if let Some(turning) = &self.turning {
            turning.claim_answered();
        }
        let offered = std::mem::take(&mut self.offered) > 0;
        let asked = self.asked.take();
        let now = tokio::time::Instant::now();
        let poll_interval = jittered(self.shared.config.poll_interval);
        let claimed = match claimed {
            Ok(claimed) => claimed,
            Err(laelaps_queue::Error::UnknownHost(_)) => {
                self.broken.get_or_insert(Broken::StruckOff);
                return self.end(Manner::Immediate);
            }
            Err(error) => {
                let wait = poll_interval.saturating_mul(1 << self.claim_failures.min(5)).min(CLAIM_RETRY_MAX.max(poll_interval));
                if self.claim_failures == 0 {
                    let hint = error.hint().unwrap_or_default();
                    tracing::error!(error = crate::log::chain(&error), hint, "cannot claim tasks; trying on");
                }
                self.claim_failures = self.claim_failures.saturating_add(1);
                self.claim_not_before = now + wait;
                return;
            }
        };
        if std::mem::take(&mut self.claim_failures) > 0 {
            tracing::info!("tasks can be claimed again");
        }
        let count = u32::try_from(claimed.tasks.len()).unwrap_or(u32::MAX);
        let found = count > 0;
        if found {
            crate::fault::reach("claimed");
        }
        self.alone.claimed(&claimed, now);
        if offered {
            self.turns.offered(claimed.tasks.iter().any(is_limited), now);
        }
        for task in claimed.tasks {
            let control = Arc::new(Control::new());
            let key = self.shared.leases.hold(&task, sent, self.shared.config.alive_time, Arc::clone(&control));
            let data = Some(Share::new(Purpose::Data, task.data.len() as u64));
            let place = self.queues.take(&task.queue);
            self.buffer.push(Box::new(Held { task, key, control, data, claimed_at: sent, place }));
        }
        // On PerfectQueue's table its claims count for themselves, as Ruby's do.
        if found && self.shared.config.queue.kind == Kind::Native {
            self.count_towards_clean_up();
        }
        let due = claimed.next_due_in.map_or(poll_interval, |due| due.min(poll_interval));
        if let Some(asked) = asked {
            self.queues.answered(&asked, count, now, CLAIM_GROUPING, due);
        }
        self.claim_not_before = if found || self.alone.is_wanted() { now + CLAIM_GROUPING } else { now };
        if self.ending.is_some() {
            self.give_back_buffered();
        }
    }

    fn count_towards_clean_up(&mut self) {
        if self.claims_until_clean_up == 0 {
            self.shared.clean_up_due.notify_one();
            self.claims_until_clean_up = self.shared.config.cleanup_interval;
        } else {
            self.claims_until_clean_up -= 1;
        }
    }

    // ---- route and execute

    /// Begin what waits, on all processors but so many: those a claim has offered, or is about to offer.
    fn begin_buffered(&mut self, kept: u32) {
        if self.may_be_dead() {
            return;
        }
        let kept = if self.buffer.has_limited() { 0 } else { kept };
        while self.idle_processors() > kept
            && let Some(held) = self.buffer.pop()
        {
            self.begin(held);
        }
    }

    fn begin(&mut self, held: Box<Held>) {
        let route = self.shared.routes.route(&held.task.task_type).cloned();
        let version = route.as_ref().and_then(|route| self.shared.store.current(&route.plugin));
        let running = Running {
            lease_ref: held.task.lease_ref,
            key: Arc::clone(&held.key),
            control: Arc::clone(&held.control),
            version: version.clone(),
            place: held.place,
        };
        let shared = Arc::clone(&self.shared);
        // Large, and moved several times on its way to a thread.
        let spawned = self.attempts.spawn(Box::pin(async move { attempt(&shared, held, route, version).await }));
        self.running.insert(spawned.id(), running);
    }

    fn attempt_ended(&mut self, ended: Result<(tokio::task::Id, ()), tokio::task::JoinError>) {
        let (id, defect) = match ended {
            Ok((id, ())) => (id, None),
            Err(error) => (error.id(), Some(error)),
        };
        let Some(running) = self.running.remove(&id) else { return };
        self.queues.give_back(running.place);
        if let Some(error) = defect {
            // A defect of ours, not of a guest. The lease runs out, and the task is tried again.
            tracing::error!(task = &*running.key, %error, "an attempt ended without an outcome; the task comes back when its lease ends");
            self.shared.leases.forget(running.lease_ref);
        }
    }
}

/// Threads that may be stuck in guests before the host ends.
pub(crate) const STUCK_MAX: u32 = 4;

/// Why a dispatcher ended without being told to.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum Broken {
    /// More than a host can do without.
    #[error("{0} threads are stuck in handlers and do not come back; {STUCK_MAX} can be done without")]
    TooManyStuck(u32),
    /// The database does not know this host any more, and has taken back what it had.
    #[error("this host was struck off, because it seemed dead to another one")]
    StruckOff,
    /// The session under which it claimed is over.
    #[error("this host's ZooKeeper session is over, and it has become somebody else")]
    IdentityOver,
}

/// The types with a route to a plugin that serves now.
fn accepts(shared: &Arc<Shared>) -> Accepts {
    let shared = Arc::clone(shared);
    Accepts::new(move |task_type| {
        let Some(route) = shared.routes.route(task_type) else {
            // On PerfectQueue's table most rows may be others' business.
            if matches!(shared.config.queue.kind, Kind::Native) {
                shared.strangers.met(task_type, || no_route(task_type));
            }
            return false;
        };
        let is_served = shared.store.current(&route.plugin).is_some();
        if !is_served {
            shared.strangers.met(task_type, || not_loaded(&route.plugin));
        }
        is_served
    })
}

fn no_route(task_type: &str) -> String {
    format!("no route takes the type {task_type:?}")
}

fn not_loaded(plugin: &str) -> String {
    format!("plugin {plugin:?} is not loaded")
}

/// Three quarters to five quarters of the interval's length, evenly, so that hosts which started together do not poll together.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.75 + fastrand::f64() * 0.5)
}

async fn claim_result(
    claiming: &mut Option<JoinHandle<(Instant, laelaps_queue::Result<Claimed>)>>,
) -> Option<(Instant, laelaps_queue::Result<Claimed>)> {
    let Some(handle) = claiming else { return std::future::pending().await };
    let ended = handle.await;
    *claiming = None;
    match ended {
        Ok(result) => Some(result),
        Err(error) => {
            tracing::error!(%error, "a claim ended without an answer");
            Some((Instant::now(), Err(laelaps_queue::Error::Closed)))
        }
    }
}

async fn changed(membership: &mut Option<Membership>) {
    match membership {
        Some(membership) => membership.changed().await,
        None => std::future::pending().await,
    }
}

async fn ticked(ticks: &mut Option<tokio::time::Interval>) {
    match ticks {
        Some(ticks) => drop(ticks.tick().await),
        None => std::future::pending().await,
    }
}

async fn sleep_until_some(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}
