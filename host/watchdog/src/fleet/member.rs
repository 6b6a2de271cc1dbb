//! A host's timer, as others see it.

use std::time::Duration;

use serde_json::{Map, Value};

use super::{Identity, Options};
use crate::age::ServerTime;
use crate::root::FLEET_ROOT;
use crate::{Error, Node, Result, Root, Session, timer};

/// Under this key a timer that was made again carries the identity it was first made with.
const IDENTITY_KEY: &str = "identity";
/// Under this key a timer says how many milliseconds its host may go without a kick.
const TIMER_KEY: &str = "timer_ms";

/// A host of a fleet.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// Who it is.
    pub identity: Identity,
    /// The name of its timer, `timer-` and ten digits. The lowest that is kicked in time acts.
    pub name: String,
    /// What it says of itself.
    pub description: Map<String, Value>,
    /// The time since its last kick, by the servers' clock.
    pub age: Duration,
    /// How long it may go without a kick, as it says itself.
    pub timer: Option<Duration>,
}

impl Member {
    /// Whether it was not kicked in time. The acting host judges more mildly, see [`super::Host::database_reached_since`].
    pub fn is_late(&self) -> bool {
        self.timer.is_some_and(|timer| self.age > timer)
    }

    /// A timer below a fleet's root; none for a node that is no host's.
    pub(super) fn of(name: String, node: &Node, now: ServerTime) -> Option<Member> {
        let mut description: Map<String, Value> = serde_json::from_slice(&node.data).unwrap_or_default();
        let first = description.remove(IDENTITY_KEY).and_then(|text| text.as_str()?.parse::<Identity>().ok());
        let timer = description.remove(TIMER_KEY).and_then(|ms| ms.as_u64()).map(Duration::from_millis);
        let session = node.owner?;
        // Only a timer of the same session can carry an identity on.
        let carried = first.filter(|first| first.session == session);
        let identity = carried.unwrap_or(Identity { session, czxid: node.czxid });
        Some(Member { identity, name, description, age: now.age_of(node), timer })
    }
}

/// The data of a timer. `again` is the identity of the timer that it replaces.
pub(super) fn timer_data(options: &Options, again: Option<Identity>) -> Vec<u8> {
    let mut description = options.description.clone();
    description.remove(IDENTITY_KEY);
    let timer_ms = u64::try_from(options.timer.as_millis()).unwrap_or(u64::MAX);
    description.insert(TIMER_KEY.to_owned(), timer_ms.into());
    if let Some(identity) = again {
        description.insert(IDENTITY_KEY.to_owned(), identity.to_string().into());
    }
    Value::Object(description).to_string().into_bytes()
}

/// Every host of a fleet, lowest timer first. Changes nothing but the root's `mtime`, to learn the servers' time.
///
/// # Errors
/// [`Error::NoRoot`], [`Error::NotFleetRoot`], [`Error::SessionEnded`], [`Error::Denied`].
pub async fn members(session: &Session, root: &Root) -> Result<Vec<Member>> {
    look_at_root(session, root).await?;
    let written = session.repeat(|| session.client().set_data(root.path(), FLEET_ROOT, None)).await;
    let now = ServerTime { ms: written.map_err(|source| Error::of("reading the servers' clock at", root.path(), source))?.mtime };
    let timers = timer::list(session, root).await?;
    Ok(timers.into_iter().filter_map(|(name, node)| Member::of(name, &node, now)).collect())
}

/// The fleet's root, which has to be one.
pub(super) async fn look_at_root(session: &Session, root: &Root) -> Result<Node> {
    match session.fetch_node(root.path()).await {
        Ok(node) if node.data == FLEET_ROOT => Ok(node),
        Ok(node) => {
            let found = crate::error::cut(&String::from_utf8_lossy(&node.data));
            Err(Error::NotFleetRoot { root: root.path().to_owned(), found })
        }
        Err(Error::NoNode(path)) => Err(Error::NoRoot(path)),
        Err(error) => Err(error),
    }
}
