//! The acting host's comparison: who owns something in the database, and who of them is alive.
//!
//! The order is what makes it safe. Owners are asked for first, timers looked at after that, on a server that has caught up: a timer is made
//! before its host owns anything, and an identity never comes again, so an owner without a timer then is dead for good.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::watcher::View;
use super::{Dead, Death, Host, HostError, Identity, interval, member::Member};
use crate::{Error, Node, Result, timer};

/// What is known of the comparison between two looks.
#[derive(Debug, Default)]
pub(super) struct Reconciler {
    /// Compared since the last change.
    done: bool,
    /// A comparison that could not be done waits for the next look.
    waiting: bool,
    /// Who was late at the last look.
    late: BTreeSet<Identity>,
    /// The trouble last told.
    told: String,
}

impl Reconciler {
    /// A timer came or went.
    pub(super) fn something_changed(&mut self) {
        self.done = false;
        self.waiting = false;
    }

    /// Whether a comparison should be done as soon as the change is confirmed.
    pub(super) fn is_due(&self) -> bool {
        !self.done && !self.waiting
    }

    /// A look at every timer's age; compares if somebody has become late, if a comparison could not be done before, or if `anyway`.
    pub(super) async fn look<H: Host>(&mut self, view: &View<'_, H>, anyway: bool) -> Result<()> {
        let late = match members(view).await {
            Ok(members) => members.into_values().filter(|found| found.late.is_some()).map(|found| found.identity).collect(),
            Err(Error::NoRoot(_)) => BTreeSet::new(),
            Err(error) => return Err(error),
        };
        let newly_late = !late.is_subset(&self.late);
        self.late = late;
        if newly_late || anyway || !self.done { self.compare(view).await } else { Ok(()) }
    }

    /// Hands on what the dead had. Trouble with the database is told, and waits for the next look; only ZooKeeper's is an error.
    pub(super) async fn compare<H: Host>(&mut self, view: &View<'_, H>) -> Result<()> {
        let outcome = compare(view).await;
        self.done = matches!(outcome, Ok(true));
        self.waiting = !self.done;
        match outcome {
            Ok(_) => {
                self.told.clear();
                Ok(())
            }
            Err(Trouble::ZooKeeper(error)) => Err(error),
            Err(Trouble::Database(error)) => {
                let text = error.to_string();
                if self.told != text {
                    tracing::warn!(error = %text, "what dead hosts had cannot be handed on now; trying again");
                }
                self.told = text;
                Ok(())
            }
        }
    }
}

enum Trouble {
    ZooKeeper(Error),
    Database(HostError),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        Trouble::ZooKeeper(error)
    }
}

impl From<HostError> for Trouble {
    fn from(error: HostError) -> Trouble {
        Trouble::Database(error)
    }
}

/// True if everything that a dead host had is handed on; false if it cannot be said yet who is dead.
async fn compare<H: Host>(view: &View<'_, H>) -> std::result::Result<bool, Trouble> {
    let fresh = view.beats.borrow().is_some_and(|beat| beat.is_fresh(view.options.timer));
    let grace = view.session.timeout() + interval(view.options.timer);
    if !fresh || view.cleared.is_some_and(|cleared| cleared.elapsed() < grace) {
        return Ok(false);
    }
    let mut owners = view.host.owners().await?;
    owners.retain(|owner| *owner != view.identity);
    if owners.is_empty() {
        return Ok(true);
    }
    let root = view.options.root.path();
    let synced = view.session.repeat(|| view.session.client().sync(root)).await;
    synced.map_err(|source| Error::of("catching up with", root, source))?;
    let members = match members(view).await {
        Ok(members) => members,
        // Cleared at this moment; our own watch will tell.
        Err(Error::NoRoot(_)) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let Some(root) = view.our_root().await?.filter(|_| members.contains_key(&view.identity)) else { return Ok(false) };
    let mut dead: Vec<Dead> = owners.into_iter().filter_map(|identity| death(identity, &members)).collect();
    // Who was there before the root was made had a timer under another one, which somebody has cleared: if his session lives, he makes it again.
    let made_ago = view.beats.borrow().map_or(Duration::ZERO, |beat| beat.server_time.since_made(&root));
    let all = dead.len();
    dead.retain(|dead| dead.death != Death::Vanished || dead.identity.czxid > root.czxid || made_ago >= grace);
    let done = dead.len() == all;
    if dead.is_empty() {
        return Ok(done);
    }
    for Dead { identity, death } in &dead {
        tracing::warn!(%identity, ?death, "a host is dead: what it had is handed on");
    }
    view.host.hand_on(&dead).await?;
    Ok(done)
}

fn death(identity: Identity, members: &BTreeMap<Identity, Found>) -> Option<Dead> {
    let death = match members.get(&identity) {
        None => Death::Vanished,
        Some(found) => Death::Unkicked(found.late?),
    };
    Some(Dead { identity, death })
}

/// A timer as the acting host judges it.
struct Found {
    identity: Identity,
    late: Option<Duration>,
}

/// Every host with a timer. If a host has two, which happens while it makes one again, the better one counts.
async fn members<H: Host>(view: &View<'_, H>) -> Result<BTreeMap<Identity, Found>> {
    let root = &view.options.root;
    let listed = timer::list(view.session, root).await.map_err(|error| match error {
        Error::NoNode(path) => Error::NoRoot(path),
        error => error,
    })?;
    let mut members: BTreeMap<Identity, Found> = BTreeMap::new();
    for (name, node) in &listed {
        let Some(found) = find(view, name, node) else { continue };
        let better = members.get(&found.identity).is_none_or(|before| before.late.is_some());
        if better {
            members.insert(found.identity, found);
        }
    }
    Ok(members)
}

fn find<H: Host>(view: &View<'_, H>, name: &str, node: &Node) -> Option<Found> {
    let now = (*view.beats.borrow())?.server_time;
    let Member { identity, .. } = Member::of(name.to_owned(), node, now)?;
    Some(Found { identity, late: view.late(node) })
}
