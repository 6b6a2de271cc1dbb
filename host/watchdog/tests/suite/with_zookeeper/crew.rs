//! Hosts of a fleet, each on a runtime of its own so that it can be killed without a word, around a database that the test can take away.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use laelaps_test_zookeeper::{LONG, eventually};
use laelaps_watchdog::fleet::{self, Dead, Fleet, Health, Host, HostError, Identity, Member, Options, Standing};
use laelaps_watchdog::{Options as SessionOptions, Root, Session};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use super::place::Place;

/// The session timeout of a host that is killed, where the test is about that. On a busy machine such a session may end before the kill.
pub(super) const SHORT_SESSION: Duration = Duration::from_secs(2);
/// How long a host may go without a kick, where the test is about that; longer than a busy machine keeps one host waiting and not the others.
pub(super) const TIMER: Duration = Duration::from_secs(10);
/// The same where it is not. Hosts look at each other every twelve minutes then: what they notice in a test, they were told.
pub(super) const LONG_TIMER: Duration = Duration::from_secs(3_600);
/// The root of the fleet that an [`Outsider`] looks at.
pub(super) const FLEET: &str = "/fleet";

/// What the hosts share: who owns something, and who was taken from.
#[derive(Debug, Default)]
pub(super) struct Database {
    owners: Mutex<BTreeSet<Identity>>,
    handed_on: Mutex<Vec<(Dead, Instant)>>,
    /// Who did what only the acting host does, in order; who did it again and again stands there once.
    actors: Mutex<Vec<String>>,
    /// Who asked for the owners, and when.
    asked: Mutex<Vec<(String, Instant)>>,
    /// Who is to wait for the answer, and who does.
    held: watch::Sender<BTreeSet<String>>,
    waiting: Mutex<BTreeSet<String>>,
    /// How often hosts were asked how they feel, which is once for each kick.
    kicks: AtomicUsize,
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

    /// Lets these hosts wait when they ask for the owners, until they are [answered](Database::answer).
    pub(super) fn hold(&self, names: &[&str]) {
        self.held.send_modify(|held| held.extend(names.iter().map(|name| (*name).to_owned())));
    }

    pub(super) fn answer(&self, names: &[&str]) {
        self.waiting.lock().expect("no holder panics").retain(|name| !names.contains(&name.as_str()));
        self.held.send_modify(|held| held.retain(|name| !names.contains(&name.as_str())));
    }

    /// How often a host has asked for the owners.
    pub(super) fn asked_by(&self, name: &str) -> usize {
        self.asked.lock().expect("no holder panics").iter().filter(|(who, _)| who == name).count()
    }

    /// Waits until a host asks for the owners once more than `before`; when it did.
    pub(super) async fn is_asked_by(&self, name: &str, before: usize) -> Instant {
        eventually(LONG, "a host asks for the owners", async || {
            let asked = self.asked.lock().expect("no holder panics");
            let times = asked.iter().filter(|(who, _)| who == name).map(|(_, when)| *when).nth(before);
            times.ok_or_else(|| format!("{name}, more than {before} times: {asked:?}"))
        })
        .await
    }

    /// Waits until this host, which is held, waits for the owners.
    pub(super) async fn holds(&self, name: &str) {
        eventually(LONG, "a host waits for the owners", async || {
            let waiting = self.waiting.lock().expect("no holder panics");
            if waiting.contains(name) { Ok(()) } else { Err(format!("{waiting:?}")) }
        })
        .await
    }

    pub(super) fn kick_count(&self) -> usize {
        self.kicks.load(Ordering::Relaxed)
    }

    /// What was taken from hosts that live. Whoever lost its session is another one by now.
    pub(super) fn robbed(&self, crew: &[Sailor]) -> Vec<Dead> {
        let living: BTreeSet<Identity> = crew.iter().filter_map(|sailor| sailor.standing.borrow().identity()).collect();
        self.handed_on().into_iter().map(|(dead, _)| dead).filter(|dead| living.contains(&dead.identity)).collect()
    }

    /// Waits until what `identity` had is handed on.
    pub(super) async fn hands_on(&self, identity: Identity) -> (Dead, Instant) {
        eventually(LONG, "what a dead host had is handed on", async || {
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
        self.database.kicks.fetch_add(1, Ordering::Relaxed);
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
        self.database.asked.lock().expect("no holder panics").push((self.name.clone(), Instant::now()));
        let mut held = self.database.held.subscribe();
        while held.borrow_and_update().contains(&self.name) {
            self.database.waiting.lock().expect("no holder panics").insert(self.name.clone());
            held.changed().await?;
        }
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
    /// Joins the fleet at `root`, with the session timeout that `session` asks for.
    pub(super) fn board(session: SessionOptions, root: &str, name: &str, timer: Duration, database: &Arc<Database>) -> Sailor {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let side = Arc::new(Side { name: name.to_owned(), database: database.clone(), well: AtomicBool::new(true) });
        let options = Options {
            session,
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

    /// Dies without a word, as when it is dropped, and is gone when this returns.
    pub(super) async fn die(mut self) {
        let runtime = self.runtime.take().expect("it lives");
        tokio::task::spawn_blocking(move || runtime.shutdown_timeout(LONG)).await.expect("it dies");
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

/// Looks at the fleet from outside, and does to its nodes what its hosts do not.
pub(super) struct Outsider<'a> {
    place: &'a Place,
    session: Session,
    /// Without the chroot, and without our crate's scruples.
    tool: zookeeper_client::Client,
}

impl Outsider<'_> {
    pub(super) async fn at(place: &Place) -> Outsider<'_> {
        let session = Session::connect(&place.options()).await.expect("the servers let us in");
        let tool = zookeeper_client::Client::connector().with_session_timeout(super::place::LONG_SESSION);
        Outsider { place, session, tool: tool.connect(place.servers()).await.expect("the servers let us in") }
    }

    /// The hosts with a timer, lowest first.
    pub(super) async fn members(&self) -> laelaps_watchdog::Result<Vec<Member>> {
        fleet::members(&self.session, &Root::new(FLEET).expect("a root")).await
    }

    /// Waits until there are so many.
    pub(super) async fn members_are(&self, count: usize) -> Vec<Member> {
        eventually(LONG, "every host has a timer", async || match self.members().await {
            Ok(members) if members.len() == count => Ok(members),
            other => Err(format!("{other:?}")),
        })
        .await
    }

    /// Deletes the timer of a host: by hand if that lives, and as the servers do it when its session times out if it is dead.
    pub(super) async fn delete_timer(&self, identity: Identity) {
        let members = self.members().await.expect("a fleet");
        let member = members.into_iter().find(|member| member.identity == identity).expect("it has a timer");
        self.tool.delete(&self.place.absolute(&format!("{FLEET}/{}", member.name)), None).await.expect("it is deleted");
    }

    /// Makes the acting host compare, and holds it where it asks for the owners.
    pub(super) async fn hold_comparison(&self, database: &Database, acting: &str) {
        database.hold(&[acting]);
        let options = zookeeper_client::CreateMode::PersistentSequential.with_acls(zookeeper_client::Acls::anyone_all());
        self.tool.create(&self.place.absolute(&format!("{FLEET}/change-")), b"", &options).await.expect("a change");
        database.holds(acting).await;
    }

    /// Clears the root as a foreign tool does it, one node after the other.
    pub(super) async fn clear(&self) {
        let root = self.place.absolute(FLEET);
        loop {
            for child in self.tool.list_children(&root).await.unwrap_or_default() {
                let _ = self.tool.delete(&format!("{root}/{child}"), None).await;
            }
            if !matches!(self.tool.delete(&root, None).await, Err(zookeeper_client::Error::NotEmpty)) {
                break;
            }
        }
    }
}

/// Waits until exactly one of them acts; its number.
pub(super) async fn one_acts(crew: &[Sailor]) -> usize {
    eventually(LONG, "exactly one host acts", async || {
        let acting: Vec<_> = crew.iter().enumerate().filter(|(_, sailor)| sailor.is_acting()).map(|(number, _)| number).collect();
        if let [one] = acting[..] { Ok(one) } else { Err(format!("{acting:?} act")) }
    })
    .await
}
