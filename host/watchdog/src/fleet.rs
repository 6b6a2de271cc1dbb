//! A fleet of hosts that notices its dead and hands on what they had.
//!
//! Authority: ZooKeeper says who is alive, and nothing else; what a dead host had is taken from it by the database alone, fenced, through
//! [`Host::hand_on`]. The layout is WatchdogQueue's, under a root of the fleet's own:
//!
//! ```text
//! ROOT                   "laelaps fleet"
//! ROOT/timer-NNNNNNNNNN  the host's description, a JSON object; ephemeral; its mtime is the last kick
//! ```
//!
//! A host under one session has one [`Identity`]: the session's number and the transaction that made its first timer. It kicks its timer only
//! while it is well. The *acting* host is the one with the lowest timer among those kicked in time; every other host looks at its predecessor
//! only, so that the load grows with the number of hosts and not with its square. The acting host compares the identities that own
//! something in the database with the timers:
//!
//! ```text
//!   no timer   -> dead (the session ended), unless the root was cleared a moment ago
//!   late timer -> dead (stuck), if it was late for time during which we ourselves kicked and reached the database throughout
//!   else       -> alive
//! ```
//!
//! On failure: while disconnected a host claims nothing new ([`Standing::Alone`]); when its session is over it is nobody ([`Standing::Away`])
//! until it has a new session, a new timer and so a new identity. If the root is cleared, a host whose session lives makes its timer again
//! under its old identity, and the acting host waits for that as long as a session may be silent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::{Error, Result, Root};

mod identity;
mod kicker;
mod life;
mod member;
mod reconcile;
mod watcher;

pub use identity::Identity;
pub use member::{Member, members};

/// Bytes of a description at most.
const DESCRIPTION_BYTES_MAX: usize = 64 * 1_024;
/// A host kicks this often per timer.
const KICKS_PER_TIMER: u32 = 5;

/// What a fleet is told about itself.
#[derive(Clone, Debug)]
pub struct Options {
    /// How to reach ZooKeeper. A killed host is noticed after the session timeout, rounded up to the servers' next tick.
    pub session: crate::Options,
    /// The fleet's own root; made if it is not there, parents included.
    pub root: Root,
    /// How long a host may go without a kick until it counts as stuck, 500 ms to 1 h. It kicks five times as often.
    pub timer: Duration,
    /// Who this host is, for people: host name, process, version. At most 64 KiB as JSON.
    pub description: Map<String, Value>,
}

/// What a fleet needs of the host it runs in. None of it is called while the host has no timer.
pub trait Host: Send + Sync + 'static {
    /// Whether the host is really well: its claim loop turns, its database answers, its processors live. Asked before every kick; must not
    /// block.
    fn health(&self) -> Health;

    /// Since when the database has answered throughout; none while it does not. Must not block.
    fn database_reached_since(&self) -> Option<Instant>;

    /// Every identity that owns something in the database, ours included if it does. Only asked of the acting host.
    fn owners(&self) -> impl Future<Output = std::result::Result<Vec<Identity>, HostError>> + Send;

    /// Takes what these owned from them, fenced, in one statement: only what was theirs when [`Host::owners`] answered. It may be asked for the
    /// same again.
    fn hand_on(&self, dead: &[Dead]) -> impl Future<Output = std::result::Result<(), HostError>> + Send;
}

/// Why the host could not do its part; the fleet says so and tries again.
pub type HostError = Box<dyn std::error::Error + Send + Sync>;

/// How a host feels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// It kicks its timer.
    Well,
    /// It does not, for this reason.
    Unwell(String),
}

/// An owner that is not alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dead {
    /// Who.
    pub identity: Identity,
    /// How we know.
    pub death: Death,
}

/// How we know that an owner is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// Its timer is gone: its session ended.
    Vanished,
    /// Its timer is there, and was not kicked for so long.
    Unkicked(Duration),
}

/// Where this host stands in its fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// No session, or no timer yet. Nothing may be claimed; what runs under an earlier identity is lost and should be stopped.
    Away {
        /// Why, for people.
        reason: String,
    },
    /// No server answers; the session may live or not. Nothing may be claimed, what runs may run on.
    Alone {
        /// Who we are as long as the session lives.
        identity: Identity,
    },
    /// All is well.
    Present {
        /// Under whom to claim.
        identity: Identity,
        /// Whether we are the one that hands on what the dead had.
        acting: bool,
    },
}

impl Standing {
    /// The identity to claim under; none if nothing may be claimed now.
    pub fn may_claim(&self) -> Option<Identity> {
        match self {
            Standing::Present { identity, .. } => Some(*identity),
            _ => None,
        }
    }

    /// The identity whose work may still be ours; none if all of it is lost.
    pub fn identity(&self) -> Option<Identity> {
        match self {
            Standing::Away { .. } => None,
            Standing::Alone { identity } | Standing::Present { identity, .. } => Some(*identity),
        }
    }

    /// Whether we are the acting host.
    pub fn is_acting(&self) -> bool {
        matches!(self, Standing::Present { acting: true, .. })
    }
}

/// Our place in a fleet. Dropping it leaves the timer to the session's timeout; [`Fleet::leave`] ends it at once.
#[derive(Debug)]
pub struct Fleet {
    standing: watch::Receiver<Standing>,
    leave: watch::Sender<bool>,
    life: JoinHandle<()>,
}

impl Fleet {
    /// Joins, and keeps joining: if ZooKeeper is down, or goes down, this waits for it for ever, saying so. Returns at once;
    /// [`Fleet::standing`] tells when the host is present. Has to be called within a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Config`] for options that cannot be.
    pub fn join<H: Host>(options: Options, host: Arc<H>) -> Result<Fleet> {
        check(&options)?;
        let (standing_sender, standing) = watch::channel(Standing::Away { reason: "not connected to ZooKeeper yet".to_owned() });
        let (leave, leaving) = watch::channel(false);
        let life = tokio::spawn(life::live(options, host, standing_sender, leaving));
        Ok(Fleet { standing, leave, life })
    }

    /// A receiver of every change of standing.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.clone()
    }

    /// Ends the timer and the session. Returns when the servers have confirmed it, at the latest after the session timeout.
    pub async fn leave(mut self) {
        self.leave.send_replace(true);
        // It ends by itself; a panic in it was reported when it happened.
        let _ = (&mut self.life).await;
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.life.abort();
    }
}

/// How often a host kicks, and looks at others.
fn interval(timer: Duration) -> Duration {
    timer / KICKS_PER_TIMER
}

fn check(options: &Options) -> Result<()> {
    let allowed = Duration::from_millis(500)..=Duration::from_secs(3_600);
    if !allowed.contains(&options.timer) {
        return Err(Error::config("timer", &format!("{:?}", options.timer), "500 ms to 1 h are allowed"));
    }
    let bytes = serde_json::to_string(&options.description).map_or(usize::MAX, |text| text.len());
    if bytes > DESCRIPTION_BYTES_MAX {
        return Err(Error::config(
            "description",
            "",
            format!("{bytes} bytes as JSON, at most {DESCRIPTION_BYTES_MAX} are allowed"),
        ));
    }
    options.session.check()
}
