//! Hosts of a fleet, each on a runtime of its own so that it can be killed without a word, around a database that the test can take away.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{PATIENCE, eventually};
use laelaps_watchdog::fleet::{Dead, Fleet, Health, Host, HostError, Identity, Options, Standing};
use laelaps_watchdog::{Options as SessionOptions, Root};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

/// The granted session timeout of every host.
pub(super) const SESSION: Duration = Duration::from_secs(2);
/// How long a host may go without a kick, where the test is about that.
pub(super) const TIMER: Duration = Duration::from_secs(2);
/// The same where it is not.
pub(super) const LONG_TIMER: Duration = Duration::from_secs(20);

/// What the hosts share: who owns something, and who was taken from.
#[derive(Debug, Default)]
pub(super) struct Database {
    owners: Mutex<BTreeSet<Identity>>,
    handed_on: Mutex<Vec<(Dead, Instant)>>,
    /// Who did what only the acting host does, in order; who did it again and again stands there once.
    actors: Mutex<Vec<String>>,
    /// Since when it answers.
    answers: Mutex<Option<Instant>>,
}

impl Database {
    pub(super) fn new() -> Arc<Database> {
        Arc::new(Database { answers: Mutex::new(Some(Instant::now())), ..Database::default() })
    }

    /// Everything is refused from now on.
    pub(super) fn stop(&self) {
        *self.answers.lock().expect("no holder panics") = None;
    }

    pub(super) fn start(&self) {
        *self.answers.lock().expect("no holder panics") = Some(Instant::now());
    }

    pub(super) fn own(&self, identity: Identity) {
        self.owners.lock().expect("no holder panics").insert(identity);
    }

    /// Everything that was ever handed on.
    pub(super) fn handed_on(&self) -> Vec<(Dead, Instant)> {
        self.handed_on.lock().expect("no holder panics").clone()
    }

    /// The hosts that acted, in order: who acted again after another one stands there again.
    pub(super) fn actors(&self) -> Vec<String> {
        self.actors.lock().expect("no holder panics").clone()
    }

    fn acts(&self, name: &str) {
        let mut actors = self.actors.lock().expect("no holder panics");
        if actors.last().is_none_or(|last| last != name) {
            actors.push(name.to_owned());
        }
    }

    /// Waits until what `identity` had is handed on.
    pub(super) async fn hands_on(&self, identity: Identity) -> (Dead, Instant) {
        eventually(PATIENCE, "what a dead host had is handed on", async || {
            let found = self.handed_on().into_iter().find(|(dead, _)| dead.identity == identity);
            found.ok_or_else(|| format!("only {:?}", self.handed_on()))
        })
        .await
    }
}

/// The host's side of the fleet.
#[derive(Debug)]
struct Side {
    name: String,
    database: Arc<Database>,
    well: AtomicBool,
}

impl Host for Side {
    fn health(&self) -> Health {
        if !self.well.load(Ordering::Relaxed) {
            return Health::Unwell("the test says so".to_owned());
        }
        match self.database_reached_since() {
            Some(_) => Health::Well,
            None => Health::Unwell("the database does not answer".to_owned()),
        }
    }

    fn database_reached_since(&self) -> Option<Instant> {
        *self.database.answers.lock().expect("no holder panics")
    }

    async fn owners(&self) -> Result<Vec<Identity>, HostError> {
        self.database.acts(&self.name);
        self.database_reached_since().ok_or("the database does not answer")?;
        Ok(self.database.owners.lock().expect("no holder panics").iter().copied().collect())
    }

    async fn hand_on(&self, dead: &[Dead]) -> Result<(), HostError> {
        self.database.acts(&self.name);
        self.database_reached_since().ok_or("the database does not answer")?;
        for dead in dead {
            self.database.owners.lock().expect("no holder panics").remove(&dead.identity);
            self.database.handed_on.lock().expect("no holder panics").push((dead.clone(), Instant::now()));
        }
        Ok(())
    }
}

/// One host.
pub(super) struct Sailor {
    runtime: Option<Runtime>,
    side: Arc<Side>,
    fleet: Option<Fleet>,
    pub(super) standing: watch::Receiver<Standing>,
}

impl Sailor {
    pub(super) fn board(session: SessionOptions, root: &str, name: &str, timer: Duration, database: &Arc<Database>) -> Sailor {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let side = Arc::new(Side { name: name.to_owned(), database: database.clone(), well: AtomicBool::new(true) });
        let options = Options {
            session: SessionOptions { session_timeout: SESSION, ..session },
            root: Root::new(root).expect("a root"),
            timer,
            description: [("host".to_owned(), name.into())].into_iter().collect(),
        };
        let fleet = runtime.block_on_in_place(|| Fleet::join(options, side.clone()).expect("options that can be"));
        Sailor { standing: fleet.standing(), fleet: Some(fleet), side, runtime: Some(runtime) }
    }

    /// Waits until it is in its fleet; under whom it claims then. Its identity owns something from now on.
    pub(super) async fn is_present(&mut self) -> Identity {
        let standing = self.comes_to("the host is present", |standing| standing.may_claim().is_some()).await;
        let identity = standing.may_claim().expect("present");
        self.side.database.own(identity);
        identity
    }

    /// Waits for a standing.
    pub(super) async fn comes_to(&mut self, promise: &str, is: impl FnMut(&Standing) -> bool) -> Standing {
        super::place::soon(promise, self.standing.wait_for(is)).await.expect("the host lives").clone()
    }

    pub(super) fn is_acting(&self) -> bool {
        self.standing.borrow().is_acting()
    }

    /// Stuck or not: its session lives all the same.
    pub(super) fn set_well(&self, well: bool) {
        self.side.well.store(well, Ordering::Relaxed);
    }

    pub(super) async fn leave(mut self) {
        self.fleet.take().expect("in a fleet").leave().await;
    }
}

/// As `kill -9`: its sockets close, and it says nothing.
impl Drop for Sailor {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

trait InPlace {
    /// Runs something that needs a runtime around it, but does not wait.
    fn block_on_in_place<T>(&self, act: impl FnOnce() -> T) -> T;
}

impl InPlace for Runtime {
    fn block_on_in_place<T>(&self, act: impl FnOnce() -> T) -> T {
        let _inside = self.enter();
        act()
    }
}

/// Waits until exactly one of them acts; its number.
pub(super) async fn one_acts(crew: &[Sailor]) -> usize {
    eventually(PATIENCE, "exactly one host acts", async || {
        let acting: Vec<_> = crew.iter().enumerate().filter(|(_, sailor)| sailor.is_acting()).map(|(number, _)| number).collect();
        if let [one] = acting[..] { Ok(one) } else { Err(format!("{acting:?} act")) }
    })
    .await
}
