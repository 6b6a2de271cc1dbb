//! One configuration in service: from the host's registration to its last settlement.
//!
//! Signals arrive here and become orders to the dispatcher. A restart builds the next configuration's parts while this one goes on working,
//! and ends this one only when they stand: a configuration that cannot be loaded or built leaves the old one in force.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use laelaps_queue::{Backend, HostDescription, HostId};
use laelaps_watchdog::fleet::{Identity, Standing};
use sd_notify::NotifyState;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;

use crate::audit;
use crate::budget::Budget;
use crate::config::{Config, Routes};
use crate::dispatch::{Broken, Dispatcher, Order, Shared};
use crate::excuses::Excuses;
use crate::fleet::database::{self, Signs};
use crate::fleet::{Membership, Presence};
use crate::host::{self, Options, Parts};
use crate::housekeeping::{clean_up, look_after, shut_out, tell_what_is_served};
use crate::leases::Leases;
use crate::log::{Log, chain};
use crate::settler::Settler;
use crate::signals::{Manner, Signals, Verb};
use crate::start::{self, START_INTERVAL, Waiting};
use crate::strangers::{Strangers, tell_what_nobody_serves};
use crate::unstored::Unstored;
use crate::updates::Updates;
use crate::versions::Versions;

/// How long an order waits for a dispatcher that has others to read first.
const ORDER_PATIENCE: Duration = Duration::from_secs(1);
/// How long an immediate end waits for a database that does not take the last settlements. What is not written then comes back by itself:
/// the host's life ends with its process.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
/// What patience is made of: a stretch for which this process did not run counts as one of them.
const NAP: Duration = Duration::from_millis(100);

/// Why a service ended.
pub(crate) enum Next {
    /// The process shall end.
    End,
    /// Go on as before, registered anew.
    Again,
    /// Go on with these.
    Restart(Box<(Config, Parts)>),
}

/// Serve under one configuration until told to end.
///
/// # Errors
/// The database refuses the registration of a host that starts (`is_first`) for good, or too many threads are stuck in guests. Whatever passes is
/// waited for; a host that has served before waits whatever it is.
pub(crate) async fn serve(
    config: &Config,
    parts: &Parts,
    options: &Options,
    log: &Log,
    signals: &mut Signals,
    is_first: bool,
) -> anyhow::Result<Next> {
    let backend = &parts.backend;
    let (orders, received) = mpsc::channel(16);
    let mut service =
        Service { config, parts, options, log, orders, ending: None, next: Next::End, rebuilding: None, shut_out: None };
    let presence = join(config, parts)?;
    let identity = match &presence {
        Some(presence) => service.until_present(presence.standing(), signals).await,
        None => None,
    };
    if service.ending.is_some() {
        leave(presence).await;
        return Ok(service.next);
    }
    // Only a defect ends the wait otherwise. Going on without an identity would leave the tasks to their leases, silently.
    anyhow::ensure!(presence.is_none() || identity.is_some(), "this host's part in its fleet broke down");
    let description = describe(config, identity);
    let Some(host) = service.registered(&description, is_first, signals).await? else {
        leave(presence).await;
        return Ok(service.next);
    };
    let excuses = Excuses::default();
    let leases = Leases::start(backend.clone(), config.task_heartbeat_interval, excuses.clone());
    let opened = Arc::new(Notify::new());
    let (settler, writer) = Settler::start(backend.clone(), leases.clone(), Arc::clone(&opened));
    let versions = Versions::new(backend.clone(), host);
    if let Err(error) = versions.look_for_quarantine().await {
        tracing::warn!(error = chain(&error), "cannot ask which plugin versions are under quarantine; trying again");
    }
    let clean_up_due = Arc::new(Notify::new());
    let strangers = Arc::<Strangers>::default();
    let shared = Arc::new(Shared {
        config: config.clone(),
        routes: Arc::new(Routes::new(config.routes.clone())),
        backend: Arc::clone(backend),
        engine: Arc::clone(&parts.engine),
        budget: Budget::new(config),
        store: Arc::clone(&parts.store),
        leases: leases.clone(),
        settler,
        updates: Updates::start(backend.clone()),
        versions: versions.clone(),
        host,
        clean_up_due: Arc::clone(&clean_up_due),
        opened,
        unstored: Unstored::default(),
        strangers: Arc::clone(&strangers),
    });
    let policy = &config.queue.policy;
    let housekeeping = [
        tokio::spawn(look_after(backend.clone(), policy.clone(), leases, versions.clone())),
        tokio::spawn(clean_up(backend.clone(), Arc::clone(&clean_up_due))),
        tokio::spawn(tell_what_is_served(backend.clone(), config.clone(), Arc::clone(&parts.store), host)),
        tokio::spawn(excuses.clone().run(backend.clone(), host, policy.clone())),
        tokio::spawn(versions.clone().shrink()),
        tokio::spawn(tell_what_nobody_serves(backend.clone(), strangers)),
    ];
    parts.store.note_admissions(Some(Box::new(versions.clone())));
    let signs = give_signs(config, parts, host);
    let in_zookeeper = presence.as_ref().zip(identity).map(|(presence, identity)| Membership::new(identity, presence.standing()));
    let membership = in_zookeeper.or_else(|| signs.as_ref().map(Signs::membership));
    let turning = parts.pulse.as_ref().map(|pulse| pulse.turning());
    let dispatcher = tokio::spawn(Dispatcher::new(shared, membership, turning).run(received));
    ready(config, parts);

    let ended = service.until_drained(dispatcher, signals).await;
    let flushed = service.until_written(writer, signals).await;
    for task in housekeeping {
        task.abort();
    }
    parts.store.note_admissions(None);
    excuses.settle(backend.as_ref(), host, policy, FLUSH_PATIENCE).await;
    drop(signs);
    if flushed && let Err(error) = backend.unregister_host(host).await {
        tracing::warn!(error = chain(&error), "cannot strike this host off; the next host does it");
    }
    leave(presence).await;
    if let Some(error) = service.shut_out {
        return Err(error).with_context(|| format!("cannot work on the database {} any more", config.queue.place()));
    }
    if let Err(error) = ended {
        if !matches!(error.downcast_ref(), Some(Broken::StruckOff | Broken::IdentityOver)) {
            return Err(error);
        }
        if service.ending.is_none() {
            tracing::warn!("{error}; its tasks were taken back; registering again");
            return Ok(Next::Again);
        }
    }
    Ok(service.next)
}

/// The fleet of the configuration, if it has one.
fn join(config: &Config, parts: &Parts) -> anyhow::Result<Option<Presence>> {
    let (Some(fleet), Some(pulse)) = (&config.watchdog, &parts.pulse) else { return Ok(None) };
    let description = crate::fleet::description(config);
    let (backend, policy) = (Arc::clone(&parts.backend), config.queue.policy.clone());
    Presence::join(fleet, description, backend, policy, Arc::clone(pulse)).map(Some)
}

/// Who this host is to the database, and to whoever hands on what it had.
fn describe(config: &Config, identity: Option<Identity>) -> HostDescription {
    let identity = identity.map(|identity| identity.to_string()).or_else(|| config.host_timeout.map(|_| database::identity()));
    HostDescription { name: config.host_name.clone(), process_id: std::process::id(), identity }
}

/// The fleet in the database, if that is the configuration's.
fn give_signs(config: &Config, parts: &Parts, host: HostId) -> Option<Signs> {
    let (timeout, pulse) = config.host_timeout.zip(parts.pulse.as_ref())?;
    Some(Signs::start(parts.backend.clone(), config.queue.policy.clone(), Arc::clone(pulse), host, timeout))
}

async fn leave(presence: Option<Presence>) {
    if let Some(presence) = presence {
        presence.leave().await;
    }
}

fn ready(config: &Config, parts: &Parts) {
    let plugins = parts.store.list().len();
    tracing::info!(
        environment = config.environment,
        processors = config.processors,
        queues = config.queues.in_short(),
        routes = config.routes.len(),
        plugins,
        memory_total = config.memory_total.map_or_else(|| "unlimited".to_owned(), |bytes| bytes.to_string()),
        version = env!("CARGO_PKG_VERSION"),
        "ready"
    );
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status("claiming tasks")]);
}

type Building = JoinHandle<anyhow::Result<(Config, Parts)>>;

struct Service<'a> {
    config: &'a Config,
    parts: &'a Parts,
    options: &'a Options,
    log: &'a Log,
    orders: mpsc::Sender<Order>,
    /// How it was told to end, if it was.
    ending: Option<Manner>,
    next: Next,
    /// Why this program must not work on the database any more.
    shut_out: Option<laelaps_queue::Error>,
    /// The next configuration's parts, while they are built, and how to end once they stand.
    rebuilding: Option<(Manner, Building)>,
}

impl Service<'_> {
    /// Wait until this host is in its fleet; the identity to claim under. None if it was told to end before.
    async fn until_present(&mut self, mut standing: watch::Receiver<Standing>, signals: &mut Signals) -> Option<Identity> {
        let mut ticks = tokio::time::interval(START_INTERVAL);
        loop {
            if let Some(identity) = standing.borrow_and_update().may_claim() {
                return Some(identity);
            }
            if self.ending.is_some() {
                return None;
            }
            tokio::select! {
                changed = standing.changed() => if changed.is_err() {
                    return None;
                },
                _ = ticks.tick() => start::still_starting("waiting for ZooKeeper"),
                verb = signals.next() => self.obey(verb).await,
                (manner, built) = rebuilt(&mut self.rebuilding) => self.restart(manner, built).await,
            }
        }
    }

    /// The number under which the database knows this host from now on. None if it was told to end before.
    async fn registered(
        &mut self,
        description: &HostDescription,
        is_first: bool,
        signals: &mut Signals,
    ) -> anyhow::Result<Option<HostId>> {
        let registering = registering(Arc::clone(&self.parts.backend), description, is_first);
        tokio::pin!(registering);
        let mut ticks = tokio::time::interval(START_INTERVAL);
        loop {
            tokio::select! {
                registered = &mut registering => return registered.map(Some),
                _ = ticks.tick(), if is_first => start::still_starting("waiting for the database"),
                verb = signals.next() => self.obey(verb).await,
                (manner, built) = rebuilt(&mut self.rebuilding) => self.restart(manner, built).await,
            }
            if self.ending.is_some() {
                // A registration that is just being written is taken, and struck off again in good order.
                let registered = tokio::time::timeout(ORDER_PATIENCE, registering).await;
                return Ok(registered.ok().and_then(Result::ok));
            }
        }
    }

    /// Pass signals on until the dispatcher has ended.
    async fn until_drained(
        &mut self,
        mut dispatcher: JoinHandle<Result<(), Broken>>,
        signals: &mut Signals,
    ) -> anyhow::Result<()> {
        let schema = shut_out(Arc::clone(&self.parts.backend));
        tokio::pin!(schema);
        loop {
            tokio::select! {
                error = &mut schema, if self.shut_out.is_none() => self.leave_to_others(error).await,
                ended = &mut dispatcher => return Ok(ended.context("the dispatcher broke down")??),
                verb = signals.next() => self.obey(verb).await,
                (manner, built) = rebuilt(&mut self.rebuilding) => self.restart(manner, built).await,
            }
        }
    }

    /// Wait until every settlement is written; answers whether all were.
    async fn until_written(&mut self, mut writer: JoinHandle<()>, signals: &mut Signals) -> bool {
        loop {
            let patience =
                if self.ending == Some(Manner::Immediate) { FLUSH_PATIENCE } else { self.config.alive_time + FLUSH_PATIENCE };
            tokio::select! {
                _ = &mut writer => return true,
                () = awake_for(patience) => {
                    tracing::error!("the database does not take the last settlements; their tasks are run again");
                    return false;
                }
                verb = signals.next() => self.obey(verb).await,
            }
        }
    }

    async fn obey(&mut self, verb: Verb) {
        match verb {
            Verb::Shutdown(manner) => {
                tracing::info!(?manner, "shutting down");
                self.end_process(manner).await;
            }
            Verb::Restart(manner) => self.rebuild(manner).await,
            Verb::Replace(manner) => self.replace(manner),
            Verb::ReopenLogs => host::reopen_logs(self.log),
        }
    }

    /// Another program has moved the schema on past this one: claim nothing more, let what runs end, and end the process.
    async fn leave_to_others(&mut self, error: laelaps_queue::Error) {
        let hint = error.hint().unwrap_or_default();
        tracing::error!(error = chain(&error), hint, "this host claims nothing more and ends once its attempts have");
        self.shut_out = Some(error);
        self.end_process(Manner::Graceful).await;
    }

    async fn end_process(&mut self, manner: Manner) {
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        self.next = Next::End;
        if let Some(intake) = &self.parts.intake {
            intake.drain();
        }
        if let Some((_, building)) = self.rebuilding.take() {
            building.abort();
        }
        self.end(manner).await;
    }

    async fn end(&mut self, manner: Manner) {
        self.ending = self.ending.max(Some(manner));
        // The dispatcher may have ended already. One that has not begun yet reads its orders when it does.
        let _ = tokio::time::timeout(ORDER_PATIENCE, self.orders.send(Order::End(manner))).await;
    }

    /// Start building the next configuration's parts beside those in service.
    async fn rebuild(&mut self, manner: Manner) {
        if self.ending.is_some() {
            match (&self.next, manner) {
                (Next::Restart(_), Manner::Immediate) => self.end(manner).await,
                _ => tracing::info!("already ending; the restart is not needed"),
            }
            return;
        }
        if let Some((planned, _)) = &mut self.rebuilding {
            *planned = manner.max(*planned);
            return;
        }
        tracing::info!(?manner, "restarting: reading the configuration");
        let (source, old) = (self.options.source.clone(), self.parts.clone());
        let building = tokio::spawn(async move {
            let config = tokio::task::spawn_blocking(move || Config::load(&source)).await??;
            audit::prepare(&config);
            let parts = Parts::build(&config, Some(&old)).await?;
            Ok((config, parts))
        });
        self.rebuilding = Some((manner, building));
    }

    async fn restart(&mut self, manner: Manner, built: anyhow::Result<(Config, Parts)>) {
        match built {
            Ok(next) => {
                self.next = Next::Restart(Box::new(next));
                self.end(manner).await;
            }
            Err(error) => host::refuse(&error, self.config),
        }
    }

    /// Look at the plugin folder now, then end attempts on replaced versions. Nothing changed: nothing happens.
    fn replace(&self, manner: Manner) {
        if self.ending.is_some() {
            return;
        }
        let (store, orders) = (Arc::clone(&self.parts.store), self.orders.clone());
        tokio::spawn(async move {
            store.rescan().await;
            let _ = orders.send(Order::Replace(manner)).await;
        });
    }
}

/// Resolves after this long by the process's own time: while it is stopped, or its machine busy with others, what it waits for gets no further.
async fn awake_for(patience: Duration) {
    let mut naps = tokio::time::interval(NAP);
    naps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for _ in 0..=patience.as_millis() / NAP.as_millis() {
        naps.tick().await;
    }
}

/// Register a host, however long the database takes. One that starts does not wait for what somebody has to mend.
async fn registering(backend: Arc<dyn Backend>, description: &HostDescription, is_first: bool) -> anyhow::Result<HostId> {
    let mut waiting = Waiting::new();
    loop {
        let error = match backend.register_host(description).await {
            Ok(host) => return Ok(host),
            Err(error) => error,
        };
        if is_first && !error.passes() {
            return Err(error).context("cannot register this host with the database");
        }
        if waiting.failed(Instant::now()) {
            let hint = error.hint().unwrap_or_default();
            tracing::error!(error = chain(&error), hint, "cannot register this host with the database; trying again");
        }
        waiting.pause().await;
    }
}

async fn rebuilt(rebuilding: &mut Option<(Manner, Building)>) -> (Manner, anyhow::Result<(Config, Parts)>) {
    let Some((_, building)) = rebuilding else { return std::future::pending().await };
    let built = building.await;
    let manner = rebuilding.take().map_or(Manner::Graceful, |(manner, _)| manner);
    (manner, built.unwrap_or_else(|error| Err(anyhow::Error::from(error).context("building the next configuration broke down"))))
}
