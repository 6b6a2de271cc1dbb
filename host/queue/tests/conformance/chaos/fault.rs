//! What goes wrong in a run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use laelaps_test_databases::gate::Gate;
use laelaps_test_databases::{Going, Replication};
use tokio::process::{Child, Command};

use super::history::{Answer, Asked, Recorder, history_of};
use super::place::{Place, through};
use super::worker::{Orders, new_task, submit};
use super::{Database, FAULT_MAX, FAULTS_MIN, LOST};
use crate::explorer::is_full;

/// Workers at once.
const WORKERS: usize = 3;
/// So many seconds a clock steps.
const STEP_SECONDS: i64 = 3_600;
/// What was leased while a fault lasted ends within so many.
const LEASES_SECONDS: i64 = 10;

/// A worker that can be killed.
pub(super) struct Worker {
    child: Child,
    orders: Orders,
}

impl Worker {
    pub(super) fn start(orders: Orders) -> Self {
        Self { child: orders.start(), orders }
    }

    /// Let it end by itself.
    pub(super) async fn stop(&mut self) {
        drop(self.child.stdin.take());
        let status = self.child.wait().await.expect("a child ends");
        assert!(status.success(), "worker {} ended with {status}", self.orders.name);
    }

    async fn kill(&mut self) {
        let history = history_of(&self.orders.history, &self.orders.name);
        Recorder::beside(&history).dies();
        self.child.kill().await.expect("a child can be killed");
    }

    async fn signal(&self, signal: &str) {
        let process = self.child.id().expect("it runs").to_string();
        let sent = Command::new("kill").args([signal, &process]).status().await.expect("kill is there");
        assert!(sent.success(), "kill {signal} {process}");
    }
}

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Kill,
    /// Kill it, and have it taken for dead at once, as a watchdog does.
    HandOn,
    Stop,
    /// Its connections go silent.
    Cut,
    /// The answers to its commits do not arrive.
    Swallow,
    Restart,
    /// A producer holds what workers want to write.
    Hold,
    /// Somebody writes nonsense into tasks' data.
    Damage,
    /// Somebody makes rows that cannot be read.
    Spoil,
    /// The queue's clock jumps ahead, back, and ahead again.
    Clock,
    /// The primary dies, and its replica takes its place.
    Promote,
    /// Its replica takes its place while it still serves those who have found it before.
    Split,
    /// The two swap their places.
    Swap,
    /// As [`Fault::Promote`], but the replica has not got what came last.
    Lose,
}

/// Workers, what stands between them and the database, and what went wrong so far.
pub(super) struct Faults {
    histories: PathBuf,
    random: fastrand::Rng,
    workers: Vec<Worker>,
    gates: Vec<Gate>,
    started: usize,
    /// How often something went wrong, and how long it took until that was over.
    done: BTreeMap<Fault, (usize, Duration)>,
    /// All that can go wrong here.
    kinds: Vec<Fault>,
    /// Those of the current round.
    next: Vec<Fault>,
    recorder: Recorder,
    /// How far ahead the queue's clock is.
    ahead_seconds: i64,
}

impl Faults {
    pub(super) async fn begin(place: &Place, replication: Replication, histories: &Path, random: fastrand::Rng) -> Self {
        let histories = histories.to_path_buf();
        let recorder = Recorder::new(&history_of(&histories, "faults"));
        let mut faults = Self {
            histories,
            random,
            workers: Vec::new(),
            gates: Vec::new(),
            started: 0,
            done: BTreeMap::new(),
            kinds: Vec::new(),
            next: Vec::new(),
            recorder,
            ahead_seconds: 0,
        };
        for number in 0..WORKERS {
            faults.gates.extend(place.gate().await);
            let worker = faults.start(place, number);
            faults.workers.push(worker);
        }
        faults.kinds = faults.kinds(place, replication).await;
        faults
    }

    async fn kinds(&self, place: &Place, replication: Replication) -> Vec<Fault> {
        if replication == Replication::Asynchronous {
            return vec![Fault::Kill, Fault::Cut, Fault::Lose];
        }
        let mut kinds = vec![Fault::Kill, Fault::HandOn, Fault::Stop, Fault::Hold, Fault::Damage];
        kinds.extend(place.has_clock().then_some(Fault::Clock));
        if !self.gates.is_empty() {
            kinds.extend([Fault::Cut, Fault::Swallow, Fault::Restart, Fault::Promote]);
            // These take many seconds on MariaDB.
            kinds.extend(is_full().then_some([Fault::Split, Fault::Swap]).into_iter().flatten());
        }
        kinds.extend(place.has_unreadable_rows().await.then_some(Fault::Spoil));
        kinds
    }

    /// How many faults there are in a run, at the least: each comes once, and the last of all only once.
    pub(super) fn fewest(&self) -> usize {
        if self.kinds.contains(&Fault::Lose) { self.kinds.len() } else { self.kinds.len().max(FAULTS_MIN) }
    }

    /// A new worker behind this gate.
    fn start(&mut self, place: &Place, number: usize) -> Worker {
        self.started += 1;
        let url = match self.gates.get(number) {
            Some(gate) => through(&place.url, gate),
            None => place.url.clone(),
        };
        let orders = Orders {
            url,
            history: self.histories.clone(),
            name: format!("w{}", self.started),
            seed: self.random.u64(..),
            submits: true,
            environment: place.environment(),
        };
        Worker::start(orders)
    }

    /// Each comes once before one comes again.
    fn draw(&mut self) -> Fault {
        if self.next.is_empty() {
            self.next.clone_from(&self.kinds);
            self.random.shuffle(&mut self.next);
        }
        self.next.pop().expect("there are some")
    }

    /// Let something go wrong, and be well again.
    pub(super) async fn one(&mut self, place: &mut Place, submitted: usize) {
        let fault = self.draw();
        let begun = Instant::now();
        self.happen(fault, place, submitted).await;
        let (times, time) = self.done.entry(fault).or_default();
        *times += 1;
        *time += begun.elapsed();
    }

    async fn happen(&mut self, fault: Fault, place: &mut Place, submitted: usize) {
        let number = self.random.usize(..WORKERS);
        let time = FAULT_MAX.mul_f64(self.random.f64());
        match fault {
            Fault::Kill | Fault::HandOn => {
                self.workers[number].kill().await;
                if fault == Fault::HandOn {
                    let identity = self.workers[number].orders.name.clone();
                    let policy = super::config("").policy;
                    // The leases of what is not handed on run out.
                    let _ = place.backend().hand_on(&[identity], &policy).await;
                }
                self.workers[number] = self.start(place, number);
            }
            Fault::Stop => {
                self.workers[number].signal("-STOP").await;
                tokio::time::sleep(time).await;
                self.workers[number].signal("-CONT").await;
            }
            Fault::Cut => {
                self.gates[number].cut();
                tokio::time::sleep(time).await;
                self.gates[number].mend();
            }
            Fault::Swallow => {
                // PostgreSQL's claims are statements of their own.
                let words = ["COMMIT", "WITH"][usize::from(matches!(place.database, Database::Postgres) && self.random.bool())];
                self.gates[number].swallow(Some(words));
                tokio::time::sleep(time / 4).await;
                self.gates[number].swallow(None);
            }
            Fault::Restart => {
                let forgetting = self.forgets(place).then(|| self.recorder.ask(Asked::Forget));
                place.restart().await;
                forgetting.into_iter().for_each(|forgetting| forgetting.answered(Answer::Done));
            }
            Fault::Hold => {
                let keys: Vec<String> = (0..20).map(|_| format!("k{}+", self.random.u32(..1_000))).collect();
                place.hold(&keys, time).await;
            }
            Fault::Damage => {
                // Most have ended by now; all the same the key is noted before.
                let keys: Vec<String> = (0..20).map(|number| format!("k{}", submitted.saturating_sub(number))).collect();
                place.damage(&keys, &self.histories).await;
            }
            Fault::Spoil => {
                let keys: Vec<String> = (0..4).map(|number| format!("k{}", submitted.saturating_sub(number))).collect();
                place.spoil(&keys, &self.histories).await;
            }
            Fault::Clock => self.step(place, time).await,
            Fault::Promote => self.promote(place, Going::Dies, Duration::ZERO).await,
            Fault::Split => self.promote(place, Going::Lingers, time).await,
            Fault::Swap => self.promote(place, Going::Leaves, Duration::ZERO).await,
            Fault::Lose => self.lose(place, time).await,
        }
    }

    /// Let the clock jump ahead and back. What was leased in the meantime lasts for an hour more then, so that hour passes at once.
    async fn step(&mut self, place: &Place, time: Duration) {
        place.set_clock(self.ahead_seconds + STEP_SECONDS, &self.recorder);
        tokio::time::sleep(time / 2).await;
        place.set_clock(self.ahead_seconds, &self.recorder);
        tokio::time::sleep(time / 2).await;
        self.ahead_seconds += STEP_SECONDS + LEASES_SECONDS;
        place.set_clock(self.ahead_seconds, &self.recorder);
    }

    /// Let the replica take the primary's place, and make a new one.
    async fn promote(&self, place: &mut Place, going: Going, time: Duration) {
        let forgetting = self.forgets(place).then(|| self.recorder.ask(Asked::Forget));
        place.promote(going, &self.gates).await;
        tokio::time::sleep(time).await;
        forgetting.into_iter().for_each(|forgetting| forgetting.answered(Answer::Done));
        place.rejoin().await;
    }

    /// Whether claims and renewals are answered before they are on the disk, and on a replica's.
    fn forgets(&self, place: &Place) -> bool {
        matches!(place.database, Database::Postgres)
    }

    /// Let the replica take the primary's place without what came last. Which side is right then nobody can say, so there is no new one.
    async fn lose(&mut self, place: &mut Place, time: Duration) {
        let losing = self.recorder.ask(Asked::Lose);
        place.fall_behind().await;
        let tasks = [new_task(LOST.to_owned(), &mut self.random)];
        submit(&self.recorder, place.backend(), &tasks).await.expect("the primary still serves");
        tokio::time::sleep(time).await;
        place.promote(Going::Dies, &self.gates).await;
        losing.answered(Answer::Done);
    }

    /// No more faults, and no more workers.
    pub(super) async fn end(&mut self) {
        for worker in &mut self.workers {
            worker.stop().await;
        }
    }

    /// What went wrong, in words.
    pub(super) fn told(&self) -> String {
        let swallowed: usize = self.gates.iter().map(Gate::swallowed).sum();
        let faults = self.done.iter().map(|(fault, (times, time))| format!("{times} {fault:?} in {:.1} s, ", time.as_secs_f64()));
        format!("{}{swallowed} answers swallowed", faults.collect::<String>())
    }
}
