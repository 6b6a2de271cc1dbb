//! This host as a child of a WatchdogQueue: items become tasks of its queue, and the master sees one child more.
//!
//! Authority: ZooKeeper decides who has an item, the database what becomes of its task; [`laelaps_watchdog::mover`] keeps the two together
//! through every crash. The child shows itself by a timer, as children of the Perl module do:
//!
//! ```text
//!   the root is there            -> a timer is made, which removes the start barrier, also one that the master makes later
//!   items are left               -> they are moved, and the timer is kicked while this host is well
//!   none is left, tasks are not  -> the timer is kicked on
//!   every task of the root ended -> the timer is ended: a master that waits for its children sees this one gone
//!   the master clears the root   -> what was moved is a task all the same; the next root is waited for
//! ```
//!
//! "Every task of the root" means those that any host moved into this database, whoever settles them, so that a host which died does not make the
//! master think that all is done. An intake lives as long as its configuration does, across restarts of the service.

use std::sync::Arc;
use std::time::{Duration, Instant};

use laelaps_queue::{NewTask, Producer};
use laelaps_watchdog::fleet::Health;
use laelaps_watchdog::mover::{MoveError, Mover, Store, StoreError};
use laelaps_watchdog::{Error, Root, Session, Timer, WatchdogQueue};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, sleep};

use crate::fault;
use crate::fleet::ZooKeeper;
use crate::pulse::Pulse;

/// The shortest and the longest pause before the next try.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// Between two looks whether the tasks have ended; longer where a look takes long.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A look may take this share of the time.
const LOOK_SHARE: u32 = 20;
/// Between two looks for what other hosts began to move and did not finish.
const RECOVER_INTERVAL: Duration = Duration::from_secs(5);

/// Which items become which tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Where the queue is.
    pub zookeeper: ZooKeeper,
    /// Its root.
    pub root: Root,
    /// Our own root for the markers of moved items: one for each database, shared by all hosts on it.
    pub markers: Root,
    /// Between two kicks of the timer: 100 ms to 1 h. A fifth of the master's timer is a good choice.
    pub kick_interval: Duration,
    /// What the master sees of this child.
    pub process: String,
    /// The type of the tasks.
    pub task_type: String,
    /// Their user.
    pub user: Option<String>,
    /// An item that is a JSON object is the task's data as it is; else, and otherwise, it stands under `item`.
    pub json: bool,
}

/// A running intake. Dropping it stops it; [`Intake::close`] ends its timer, too.
pub(crate) struct Intake {
    config: Config,
    phase: watch::Sender<Phase>,
    life: tokio::sync::Mutex<JoinHandle<()>>,
    abort: tokio::task::AbortHandle,
}

/// What is wanted of an intake. It only goes forward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Items are moved.
    Open,
    /// No item is moved any more; the timer stands until what was moved has ended.
    Draining,
    /// Over.
    Closed,
}

impl Intake {
    /// Begin, and go on through every trouble with ZooKeeper and the database.
    pub(crate) fn start(config: Config, backend: Arc<dyn Producer>, pulse: Arc<Pulse>) -> Self {
        let (phase, told) = watch::channel(Phase::Open);
        let worker = Worker { config: config.clone(), backend, pulse, phase: told };
        let life = tokio::spawn(worker.live());
        Self { config, phase, abort: life.abort_handle(), life: tokio::sync::Mutex::new(life) }
    }

    /// What it was started with.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Move no more items: this host is about to end.
    pub(crate) fn drain(&self) {
        self.phase.send_modify(|phase| *phase = (*phase).max(Phase::Draining));
    }

    /// End the timer and the session. Bounded by the session's timeout, after which they end by themselves.
    pub(crate) async fn close(&self) {
        self.phase.send_replace(Phase::Closed);
        let mut life = self.life.lock().await;
        // It ends by itself; a panic in it was reported when it happened.
        let _ = tokio::time::timeout(self.config.zookeeper.session_timeout, &mut *life).await;
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        self.abort.abort();
    }
}

struct Worker {
    config: Config,
    backend: Arc<dyn Producer>,
    pulse: Arc<Pulse>,
    phase: watch::Receiver<Phase>,
}

/// How the service of one root ended.
enum Served {
    /// Every item is taken, and every task has ended.
    Done,
    /// The root, or our timer, is gone.
    Cleared,
    /// The intake is over.
    Left,
}

impl Worker {
    async fn live(self) {
        let mut phase = self.phase.clone();
        let mut told = String::new();
        let mut pause = PAUSE.0;
        loop {
            let (lasted, error) = self.one_session().await;
            if *phase.borrow() == Phase::Closed {
                return;
            }
            // Long sessions are not trouble.
            pause = if lasted > PAUSE.1 { PAUSE.0 } else { (pause * 2).min(PAUSE.1) };
            let gist = gist(&error);
            if gist != told {
                tracing::warn!(root = %self.config.root, error = crate::log::chain(&error), "items cannot be taken now; trying again");
                told = gist;
            }
            tokio::select! {
                () = reaches(&mut phase, Phase::Closed) => return,
                () = sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
            }
        }
    }

    /// Work under one session until it ends, or the intake does. Also answers how long the session lasted.
    async fn one_session(&self) -> (Duration, MoveError) {
        let options = self.config.zookeeper.options();
        let mut phase = self.phase.clone();
        let connected = tokio::select! {
            connected = Session::connect(&options) => connected,
            error = self.wait_for_close(&mut phase) => return (Duration::ZERO, error),
        };
        let session = match connected {
            Ok(session) => session,
            Err(error) => return (Duration::ZERO, error.into()),
        };
        let begun = Instant::now();
        let error = self.serve_roots(&session).await;
        // Our timer with it, if it is there; whoever comes next makes another one.
        session.close().await;
        (begun.elapsed(), error)
    }

    async fn serve_roots(&self, session: &Session) -> MoveError {
        let Config { root, markers, .. } = &self.config;
        let mut child = WatchdogQueue::over(session.clone(), root.clone());
        let queue = WatchdogQueue::over(session.clone(), root.clone());
        // What was begun is finished first, also if the root is gone meanwhile.
        let mut mover = match Mover::open(queue, markers.clone(), self.store()).await {
            Ok(mover) => mover,
            Err(error) => return error,
        };
        let mut phase = self.phase.clone();
        loop {
            let attached = tokio::select! {
                // Nothing of it is ours, so nothing is left to be shown.
                () = reaches(&mut phase, Phase::Draining) => return self.wait_for_close(&mut phase).await,
                attached = child.wait_attach(self.timer()) => attached,
            };
            let served = match attached {
                Ok(()) => self.serve_root(&child, &mut mover).await,
                Err(error) => return error.into(),
            };
            match served {
                Ok(Served::Done) => tracing::info!(%root, "every item is taken, and every task of them has ended"),
                Ok(Served::Left) => {}
                Ok(Served::Cleared) => {
                    tracing::info!(%root, "the master has cleared the queue; what was taken goes on");
                    // The next root may be there, and have lost items to us already.
                    continue;
                }
                Err(error) => return error,
            }
            // Also a barrier without items: its master waits for a child that removes it.
            let more = tokio::select! {
                () = reaches(&mut phase, Phase::Draining) => return self.wait_for_close(&mut phase).await,
                items = child.wait_for_items() => items.map(drop),
                barrier = child.wait_for_barrier() => barrier,
            };
            if let Err(error) = more {
                return error.into();
            }
        }
    }

    async fn wait_for_close(&self, phase: &mut watch::Receiver<Phase>) -> MoveError {
        reaches(phase, Phase::Closed).await;
        // Whoever closes does not look at it.
        Error::NoRoot(self.config.root.path().to_owned()).into()
    }

    /// One root, from our timer's beginning to its end.
    async fn serve_root(&self, child: &WatchdogQueue, mover: &mut Mover<Tasks>) -> Result<Served, MoveError> {
        let timer = match child.create_timer(self.config.process.as_bytes()).await {
            Ok(timer) => timer,
            Err(Error::NoRoot(_)) => return Ok(Served::Cleared),
            Err(error) => return Err(error.into()),
        };
        let root = &self.config.root;
        tracing::info!(%root, timer = timer.name(), markers = %self.config.markers, "this host is a child of the queue: taking items");
        let prefix = match mover.task_prefix().await {
            Ok(prefix) => prefix,
            Err(Error::NoRoot(_)) => return Ok(Served::Cleared),
            Err(error) => return Err(error.into()),
        };
        let mut phase = self.phase.clone();
        let served = tokio::select! {
            biased;
            () = reaches(&mut phase, Phase::Closed) => {
                if self.backend.has_unsettled(&prefix).await.unwrap_or(true) {
                    tracing::warn!(%root, "this host leaves the queue before all tasks of its items have ended: its master may take them for done");
                }
                Ok(Served::Left)
            }
            kicked = self.kick(&timer) => kicked,
            error = keep_barrier_down(child) => Err(error.into()),
            worked = self.work_through_outages(child, mover, &prefix) => worked,
        };
        match served {
            Ok(Served::Cleared) => {
                // A move may have been broken off in the middle.
                mover.recover().await?;
                Ok(Served::Cleared)
            }
            Ok(served @ (Served::Done | Served::Left)) => {
                timer.end().await?;
                Ok(served)
            }
            Err(error) => Err(error),
        }
    }

    /// Kick the timer while this host is well, until it is gone.
    async fn kick(&self, timer: &Timer) -> Result<Served, MoveError> {
        let mut ticks = tokio::time::interval(self.config.kick_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_well = true;
        loop {
            ticks.tick().await;
            match self.pulse.health() {
                Health::Well => {
                    was_well = true;
                    if !timer.kick_dog().await? {
                        return Ok(Served::Cleared);
                    }
                }
                Health::Unwell(reason) => {
                    if std::mem::take(&mut was_well) {
                        tracing::warn!(root = %self.config.root, reason, "this host is not well: it does not kick its timer in the queue");
                    }
                }
            }
        }
    }

    /// Work, and wait where the database makes trouble: the timer stays, unkicked if the trouble lasts, since what was taken has not ended.
    async fn work_through_outages(
        &self,
        child: &WatchdogQueue,
        mover: &mut Mover<Tasks>,
        prefix: &str,
    ) -> Result<Served, MoveError> {
        let mut told = String::new();
        let mut broken_off = false;
        loop {
            let worked =
                if broken_off { mover.recover().await.map(|_| None) } else { self.work(child, mover, prefix).await.map(Some) };
            match worked {
                Ok(Some(served)) => return Ok(served),
                Ok(None) => broken_off = false,
                Err(error @ MoveError::Store { .. }) => {
                    broken_off = true;
                    let gist = gist(&error);
                    if gist != told {
                        tracing::warn!(root = %self.config.root, error = crate::log::chain(&error), "items cannot be moved now; trying again");
                        told = gist;
                    }
                    sleep(LOOK_INTERVAL).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Move items until none is left and every task of the root has ended.
    async fn work(&self, child: &WatchdogQueue, mover: &mut Mover<Tasks>, prefix: &str) -> Result<Served, MoveError> {
        let mut phase = self.phase.clone();
        let mut moved: u64 = 0;
        let mut recovered = Instant::now();
        loop {
            let is_open = *phase.borrow_and_update() == Phase::Open;
            if is_open {
                match mover.move_one().await {
                    Ok(Some(_)) => {
                        fault::reach("intake-moved");
                        moved += 1;
                        continue;
                    }
                    Ok(None) => {}
                    Err(MoveError::ZooKeeper(Error::NoRoot(_))) => return Ok(Served::Cleared),
                    Err(error) => return Err(error),
                }
            }
            if std::mem::take(&mut moved) > 0 {
                tracing::info!(root = %self.config.root, "no item is left to be taken; waiting for their tasks");
            }
            if recovered.elapsed() > RECOVER_INTERVAL {
                mover.recover().await?;
                recovered = Instant::now();
            }
            let asked = Instant::now();
            let unsettled = self.backend.has_unsettled(prefix).await;
            let unsettled = unsettled.map_err(|source| in_database("looking for tasks of", prefix, source))?;
            if !unsettled && (!is_open || child.queue_count().await? == 0) {
                // The root may be another one by now, with tasks of its own.
                return match mover.task_prefix().await {
                    Ok(now) if now == prefix => Ok(Served::Done),
                    Ok(_) | Err(Error::NoRoot(_)) => Ok(Served::Cleared),
                    Err(error) => Err(error.into()),
                };
            }
            let pause = LOOK_INTERVAL.max(asked.elapsed() * LOOK_SHARE);
            tokio::select! {
                () = sleep(pause) => {}
                items = child.wait_for_items(), if is_open => if !items? { return Ok(Served::Cleared) },
            }
        }
    }

    fn store(&self) -> Tasks {
        Tasks { config: self.config.clone(), backend: Arc::clone(&self.backend) }
    }

    fn timer(&self) -> Duration {
        self.config.kick_interval * 5
    }
}

/// A master that makes its queue step by step may make the barrier after our timer, which would have removed it.
async fn keep_barrier_down(child: &WatchdogQueue) -> Error {
    loop {
        if let Err(error) = child.wait_for_barrier().await {
            return error;
        }
        if let Err(error) = child.remove_barrier().await {
            return error;
        }
    }
}

/// The error without what changes from try to try, so that the same trouble is told once.
fn gist(error: &MoveError) -> String {
    match error {
        MoveError::ZooKeeper(error) => error.gist(),
        error @ MoveError::Store { .. } => crate::log::chain(error),
    }
}

fn in_database(doing: &'static str, key: &str, source: laelaps_queue::Error) -> MoveError {
    MoveError::Store { doing, key: key.to_owned(), source: source.into() }
}

/// Wait until the phase is at least this one, also if nobody is left who could say so: then it is over.
async fn reaches(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}

/// The database, as a mover needs it.
struct Tasks {
    config: Config,
    backend: Arc<dyn Producer>,
}

impl Store for Tasks {
    async fn hold(&self, key: &str, item: &[u8]) -> Result<(), StoreError> {
        let data = data(item, self.config.json);
        let task = NewTask { user: self.config.user.clone(), ..NewTask::new(key, &self.config.task_type, data).on_hold() };
        // Known already, in whatever state: another host of ours is moving it, or has.
        self.backend.submit(&[task]).await?;
        fault::reach("intake-held");
        Ok(())
    }

    async fn release(&self, key: &str) -> Result<(), StoreError> {
        fault::reach("intake-taken");
        self.backend.release_held(key).await?;
        fault::reach("intake-released");
        Ok(())
    }

    async fn drop_held(&self, key: &str) -> Result<(), StoreError> {
        self.backend.drop_held(key).await?;
        Ok(())
    }

    async fn held(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        Ok(self.backend.held(prefix).await?)
    }
}

/// An item as the data of a task: `{"item": TEXT}`, or `{"item_hex": HEXADECIMAL}` if it is no text.
fn data(item: &[u8], json: bool) -> Vec<u8> {
    if json && serde_json::from_slice::<Map<String, Value>>(item).is_ok() {
        return item.to_vec();
    }
    let mut members = Map::new();
    insert_bytes(&mut members, "item", item);
    Value::Object(members).to_string().into_bytes()
}

/// Bytes of a node as a member of a JSON object: `NAME` if they are text, else `NAME_hex`.
pub(crate) fn insert_bytes(members: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => members.insert(name.to_owned(), text.into()),
        Err(_) => {
            members.insert(format!("{name}_hex"), bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into())
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_item_becomes_the_data_of_its_task() {
        let as_text = |item: &[u8], json| String::from_utf8(data(item, json)).unwrap();
        assert_eq!(as_text(b"a \"b\"", false), r#"{"item":"a \"b\""}"#);
        assert_eq!(as_text(br#"{"a": 1}"#, false), r#"{"item":"{\"a\": 1}"}"#);
        assert_eq!(as_text(br#"{"a": 1}"#, true), r#"{"a": 1}"#);
        assert_eq!(as_text(b"[1]", true), r#"{"item":"[1]"}"#);
        assert_eq!(as_text(b"", true), r#"{"item":""}"#);
        assert_eq!(as_text(b"\xff\x00", true), r#"{"item_hex":"ff00"}"#);
    }
}
