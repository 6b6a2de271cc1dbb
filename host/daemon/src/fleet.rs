//! This host in its fleet: present before its first claim, and the one that hands on what dead hosts had, if it is the acting one. [`database`] is
//! the fleet of those who have no ZooKeeper.
//!
//! Authority: ZooKeeper says who is alive (see [`laelaps_watchdog::fleet`]); the database says who owns what, and takes from the dead, fenced.
//! A service registers with the database under the identity that it has in the fleet, and ends when that identity does: what it claimed is
//! lost then, and the next service registers under a new one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use laelaps_queue::{Policy, Worker};
use laelaps_watchdog::fleet::{self, Dead, Fleet, Health, HostError, Identity, Standing};
use laelaps_watchdog::{Access, Digest, Root};
use serde_json::{Map, Value};
use tokio::sync::watch;

use crate::dispatch::Broken;
use crate::pulse::Pulse;

pub(crate) mod database;

/// How ZooKeeper is reached.
#[derive(Clone, Debug, PartialEq)]
pub struct ZooKeeper {
    /// HOST:PORT separated by commas, with a chroot behind the last one if wanted.
    pub servers: String,
    /// How long the servers keep a session without a sign of life: 100 ms to 1 h; they have bounds of their own.
    pub session_timeout: Duration,
    /// Credentials of the scheme `digest`.
    pub digest: Option<Digest>,
    /// Who may use the nodes that are made.
    pub access: Access,
}

impl ZooKeeper {
    /// As the watchdog crate wants it.
    #[must_use]
    pub fn options(&self) -> laelaps_watchdog::Options {
        laelaps_watchdog::Options {
            session_timeout: self.session_timeout,
            digest: self.digest.iter().cloned().collect(),
            access: self.access.clone(),
            ..laelaps_watchdog::Options::new(&self.servers)
        }
    }
}

/// The fleet that a host is in.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where it meets.
    pub zookeeper: ZooKeeper,
    /// The fleet's own root: one for each database.
    pub root: Root,
    /// How long a host may go without a kick: 500 ms to 1 h.
    pub timer: Duration,
}

/// Our place in the fleet. Dropping it leaves the timer to the session's timeout; [`Presence::leave`] ends it.
pub(crate) struct Presence {
    fleet: Fleet,
}

impl Presence {
    /// Join, and keep joining while ZooKeeper is down. `description` is what others see of this host.
    pub(crate) fn join(
        config: &Config,
        description: Map<String, Value>,
        backend: Arc<dyn Worker>,
        policy: Policy,
        pulse: Arc<Pulse>,
    ) -> anyhow::Result<Self> {
        let options =
            fleet::Options { session: config.zookeeper.options(), root: config.root.clone(), timer: config.timer, description };
        let fleet = Fleet::join(options, Arc::new(Side { backend, policy, pulse })).context("cannot join the fleet")?;
        Ok(Self { fleet })
    }

    /// Every change of our standing.
    pub(crate) fn standing(&self) -> watch::Receiver<Standing> {
        self.fleet.standing()
    }

    /// End our timer, and with it our place.
    pub(crate) async fn leave(self) {
        self.fleet.leave().await;
    }
}

/// A dispatcher's side of the fleet: under whom it claims, and whether it may.
pub(crate) struct Membership {
    place: Place,
}

enum Place {
    /// Under an identity of ours in ZooKeeper.
    ZooKeeper { identity: Identity, standing: watch::Receiver<Standing> },
    /// As a host that gives signs in the database, until it is struck off.
    Database { struck_off: watch::Receiver<bool>, given: watch::Receiver<Option<Instant>> },
}

impl Membership {
    pub(crate) fn new(identity: Identity, standing: watch::Receiver<Standing>) -> Self {
        Self { place: Place::ZooKeeper { identity, standing } }
    }

    fn in_database(struck_off: watch::Receiver<bool>, given: watch::Receiver<Option<Instant>>) -> Self {
        Self { place: Place::Database { struck_off, given } }
    }

    /// Whether we know by a sign that was taken since this moment that what we had claimed before is still ours. In ZooKeeper the end of our
    /// session tells.
    pub(crate) fn is_confirmed_since(&self, moment: Instant) -> bool {
        match &self.place {
            Place::ZooKeeper { .. } => true,
            Place::Database { given, .. } => given.borrow().is_some_and(|given| given >= moment),
        }
    }

    /// Whether new work may be claimed: not while no server of ZooKeeper answers.
    pub(crate) fn may_claim(&self) -> bool {
        match &self.place {
            Place::ZooKeeper { identity, standing } => standing.borrow().may_claim() == Some(*identity),
            Place::Database { struck_off, .. } => !*struck_off.borrow(),
        }
    }

    /// Why all that we claimed is lost, if it is.
    pub(crate) fn over(&self) -> Option<Broken> {
        match &self.place {
            Place::ZooKeeper { identity, standing } => {
                (standing.borrow().identity() != Some(*identity)).then_some(Broken::IdentityOver)
            }
            Place::Database { struck_off, .. } => struck_off.borrow().then_some(Broken::StruckOff),
        }
    }

    /// Wait for the next change of our standing. Cancel-safe.
    pub(crate) async fn changed(&mut self) {
        let changed = match &mut self.place {
            Place::ZooKeeper { standing, .. } => standing.changed().await,
            Place::Database { struck_off, .. } => struck_off.changed().await,
        };
        if changed.is_err() {
            // The fleet is gone with its service, or has said its last; nothing will change any more.
            std::future::pending().await
        }
    }
}

/// What the fleet asks of this host.
struct Side {
    backend: Arc<dyn Worker>,
    policy: Policy,
    pulse: Arc<Pulse>,
}

impl fleet::Host for Side {
    fn health(&self) -> Health {
        self.pulse.health()
    }

    fn database_reached_since(&self) -> Option<Instant> {
        self.pulse.database_reached_since()
    }

    async fn owners(&self) -> Result<Vec<Identity>, HostError> {
        let hosts = self.backend.hosts().await?;
        // What another program wrote there is nobody of ours.
        Ok(hosts.iter().filter_map(|host| host.identity.as_deref()?.parse().ok()).collect())
    }

    async fn hand_on(&self, dead: &[Dead]) -> Result<(), HostError> {
        let identities: Vec<String> = dead.iter().map(|dead| dead.identity.to_string()).collect();
        crate::fault::reach("hand-on");
        Ok(hand_on(self.backend.as_ref(), &self.policy, &identities).await?)
    }
}

/// Hand on all that hosts had which are dead.
async fn hand_on(backend: &dyn Worker, policy: &Policy, identities: &[String]) -> laelaps_queue::Result<()> {
    let mut count = 0;
    loop {
        let reclaimed = backend.hand_on(identities, policy).await?;
        count += reclaimed.tasks.len();
        crate::reports::reclaimed(&reclaimed);
        if reclaimed.tasks.is_empty() {
            break;
        }
    }
    tracing::warn!(hosts = identities.join(", "), tasks = count, "the tasks of dead hosts are handed on");
    Ok(())
}

/// What the other hosts see of this one.
pub(crate) fn description(config: &crate::config::Config) -> Map<String, Value> {
    let mut description = Map::new();
    let mut say = |name: &str, value: Value| drop(description.insert(name.to_owned(), value));
    say("name", config.host_name.as_str().into());
    say("process", std::process::id().into());
    say("version", env!("CARGO_PKG_VERSION").into());
    say("environment", config.environment.as_str().into());
    say("queue", config.queue.place().into());
    say("processors", config.processors.into());
    description
}
