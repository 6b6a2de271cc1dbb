//! A process that works, is killed and stopped, and writes down what it asked and heard. It is this test binary, started once more.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use laelaps_queue::{
    Accepts, Attempt, Backend, Backoff, Beat, Claim, ClaimedTask, Config, Connections, Error, Event, FailureKind,
    HostDescription, HostId, Kind, LeaseAnswer, NewTask, PerfectQueue, Policy, Queue, Settlement, Submitted, Tls,
};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use super::history::{Answer, Asked, End, Held, Recorder, Taken, history_of};
use crate::explorer::is_full;
use crate::fixture::{PATIENCE, patient};

/// Leases of a run: short, so that what is lost comes back while the run goes on.
pub(super) const ALIVE: Duration = Duration::from_millis(1_500);
/// Nothing is cleaned up, by whatever clock.
const RETENTION: Duration = Duration::from_secs(365 * 86_400);
/// Between two looks for lost tasks.
const RECLAIM_EVERY: Duration = Duration::from_millis(300);
/// A worker that found nothing to do rests.
const REST: Duration = Duration::from_millis(10);
/// Users, of whom each may have so many running.
const USERS: u64 = 8;
const MAX_RUNNING: u32 = 2;
/// One of so many tasks has a user. Their limits are what takes most of the time.
const OF_ALL: u64 = 2;
const OF_ALL_FULL: u64 = 8;
/// Where a worker finds what it is to do.
const ORDERS: &str = "LAELAPS_CHAOS_WORKER";

/// What a worker is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) url: String,
    /// Where it writes its history.
    pub(super) history: PathBuf,
    pub(super) name: String,
    pub(super) seed: u64,
    /// It also submits tasks of its own now and then.
    pub(super) submits: bool,
    /// What it has in its environment besides.
    pub(super) environment: Vec<(String, String)>,
}

impl Orders {
    /// Start a worker. It ends when its input does, or when it is dropped.
    pub(super) fn start(&self) -> Child {
        let mut command = Command::new(std::env::current_exe().expect("this program has a file"));
        // The thread that tests would run in is named after the test; the test's output is nobody's.
        command.args(["chaos::worker::works_until_its_input_ends", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(ORDERS, serde_json::to_string(self).expect("JSON")).envs(self.environment.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
        command.spawn().expect("this program can be started")
    }
}

/// How all processes of a run use the queue.
pub(super) fn config(url: &str) -> Config {
    let policy = Policy {
        backoff: Backoff::Fixed(Duration::ZERO),
        retry_wait: Duration::from_millis(50),
        suspicion: Duration::ZERO,
        retention: RETENTION,
        failed_retention: RETENTION,
        ..Policy::default()
    };
    let connections = Connections { tls: Some(Tls::Disabled), connect_timeout: Duration::from_secs(2), ..patient() };
    let (url, kind) = match url.split_once(TABLE) {
        Some((url, table)) => {
            (url, Kind::PerfectQueue(PerfectQueue { table: table.to_owned(), cleanup_interval: 20, side_table: true }))
        }
        None => (url, Kind::Native),
    };
    Config { kind, policy, connections, patience: PATIENCE, ..Config::new(url) }
}

/// What stands between a URL and the name of PerfectQueue's table.
const TABLE: &str = "#";

/// A database's URL, with the name of PerfectQueue's table if it has that: for [`config`].
pub(super) fn place_of(config: &Config) -> String {
    match &config.kind {
        Kind::Native => config.url.clone(),
        Kind::PerfectQueue(table) => format!("{}{TABLE}{}", config.url, table.table),
    }
}

/// Of these types every process serves all in most of its claims, and the first alone in some.
const TYPES: [&str; 2] = ["chaos", "rare"];

/// A task of some user, or of none.
pub(super) fn new_task(key: String, random: &mut fastrand::Rng) -> NewTask {
    let task_type = TYPES[usize::from(random.u32(..4) == 0)];
    let user = random.u64(..USERS * if is_full() { OF_ALL_FULL } else { OF_ALL });
    let user = (user < USERS).then(|| format!("u{user}"));
    NewTask { max_running: user.is_some().then_some(MAX_RUNNING), user, ..NewTask::new(key, task_type, r#"{"n":1}"#) }
}

/// Submit tasks, and write down what came of it.
pub(super) async fn submit(recorder: &Recorder, backend: &dyn Backend, tasks: &[NewTask]) -> Result<(), Error> {
    let asking = recorder.ask(Asked::Submit(tasks.iter().map(|task| task.key.clone()).collect()));
    let answer = backend.submit(tasks).await;
    asking.answered(match &answer {
        Ok(answers) => Answer::Submitted(answers.iter().map(|answer| *answer == Submitted::Created).collect()),
        Err(_) => Answer::Unknown,
    });
    answer.map(drop)
}

/// Claim, and write down what came of it.
pub(super) async fn claim_as(recorder: &Recorder, backend: &dyn Backend, claim: &Claim) -> Result<Vec<ClaimedTask>, Error> {
    let asking = recorder.ask(Asked::Claim(claim.host.0));
    let claimed = backend.claim(claim).await;
    asking.answered(match &claimed {
        Ok(claimed) => Answer::Claimed(claimed.tasks.iter().map(Taken::of).collect()),
        Err(_) => Answer::Unknown,
    });
    claimed.map(|claimed| claimed.tasks)
}

/// Settle, and write down what came of it.
pub(super) async fn settle(recorder: &Recorder, backend: &dyn Backend, group: &[Ending]) -> Result<Vec<LeaseAnswer>, Error> {
    if group.is_empty() {
        return Ok(Vec::new());
    }
    let policy = config("").policy;
    let mut asked = Vec::with_capacity(group.len());
    let mut settlements = Vec::with_capacity(group.len());
    for Ending { task, event, end, follow_ups } in group {
        asked.push((Held::of(task), *end, follow_ups.iter().map(|task| task.key.clone()).collect()));
        let facts = Attempt::of(task);
        settlements.push(Settlement::of(task.lease_ref, event.clone(), facts, &policy, 0.5, None, follow_ups.clone()));
    }
    let asking = recorder.ask(Asked::Settle(asked));
    let answers = backend.settle(&settlements).await;
    asking.answered(held(&answers));
    answers
}

/// What the parts of a worker share.
struct Worker {
    name: String,
    queue: Queue,
    recorder: Recorder,
    /// Tasks that are worked on beside the next claims.
    slow: AtomicUsize,
}

/// What a worker does about a task.
enum Plan {
    Settle(Event, End),
    /// Finish it, and then say that it failed. The same once more could be taken for a repetition, where an answer is lost on the way.
    Twice,
    /// Nothing: its lease runs out.
    Forget,
    /// Settle it when its lease has most likely ended.
    TooLate,
    /// Renew it, and change its data, before it is finished.
    Slowly,
}

impl Plan {
    fn draw(random: &mut fastrand::Rng) -> Self {
        match random.u32(..100) {
            0..3 => Self::Forget,
            3..5 => Self::TooLate,
            5..10 => Self::Slowly,
            10..13 => Self::Twice,
            13..17 => Self::Settle(Event::Release { delay: None }, End::Again),
            17..20 => Self::Settle(Event::Retry { delay: Some(Duration::from_millis(20)) }, End::Again),
            20..22 => Self::Settle(reject(), End::Reject),
            _ => Self::Settle(finish(), End::Finish),
        }
    }
}

fn finish() -> Event {
    Event::Finish { output: Some(b"done".to_vec()), retention: None }
}

fn reject() -> Event {
    Event::Failure { kind: FailureKind::Reject, code: "no".to_owned(), message: "never".to_owned() }
}

/// A task with what is to become of it.
pub(super) struct Ending {
    task: ClaimedTask,
    event: Event,
    end: End,
    follow_ups: Vec<NewTask>,
}

impl Ending {
    pub(super) fn finished(task: ClaimedTask) -> Self {
        Self { task, event: finish(), end: End::Finish, follow_ups: Vec::new() }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[expect(clippy::disallowed_methods, reason = "a worker's orders come by its environment")]
async fn works_until_its_input_ends() {
    // As one of the tests it has no orders, and nothing to do.
    let Ok(orders) = std::env::var(ORDERS) else { return };
    let orders: Orders = serde_json::from_str(&orders).expect("orders are JSON");
    let worker = Arc::new(Worker::new(&orders).await);
    let input = tokio::task::spawn_blocking(|| std::io::stdin().read(&mut [0]));
    let reclaiming = tokio::spawn(Arc::clone(&worker).reclaim());
    tokio::select! {
        () = Arc::clone(&worker).work(fastrand::Rng::with_seed(orders.seed), orders.submits) => {}
        _ = input => {}
    }
    reclaiming.abort();
    // From here on others may have what it still holds.
    worker.recorder.dies();
    worker.queue.close().await;
}

impl Worker {
    async fn new(orders: &Orders) -> Self {
        let queue = loop {
            match Queue::open(&config(&orders.url)).await {
                Ok(queue) => break queue,
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        };
        let recorder = Recorder::new(&history_of(&orders.history, &orders.name));
        Self { name: orders.name.clone(), queue, recorder, slow: AtomicUsize::new(0) }
    }

    fn backend(&self) -> &dyn Backend {
        self.queue.backend().as_ref()
    }

    async fn reclaim(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RECLAIM_EVERY).await;
            // Others try as well, and this one again.
            let _ = self.backend().reclaim(&config("").policy).await;
        }
    }

    async fn register(&self) -> HostId {
        let description =
            HostDescription { name: self.name.clone(), process_id: std::process::id(), identity: Some(self.name.clone()) };
        loop {
            match self.backend().register_host(&description).await {
                Ok(host) => return host,
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        }
    }

    async fn work(self: Arc<Self>, mut random: fastrand::Rng, submits: bool) {
        let mut host = self.register().await;
        for round in 0_u64.. {
            match self.claim(host, &mut random).await {
                Ok(tasks) if tasks.is_empty() => tokio::time::sleep(REST).await,
                Ok(tasks) => self.treat(tasks, &mut random).await,
                Err(Error::UnknownHost(_)) => host = self.register().await,
                Err(_) => tokio::time::sleep(REST).await,
            }
            if submits && random.u32(..20) == 0 {
                // A submit that failed may be repeated or not; nobody waits for these.
                let tasks = [new_task(format!("{}-{round}", self.name), &mut random)];
                let _ = submit(&self.recorder, self.backend(), &tasks).await;
            }
        }
    }

    async fn claim(&self, host: HostId, random: &mut fastrand::Rng) -> Result<Vec<ClaimedTask>, Error> {
        let limit = random.u32(1..40);
        let accepts = (random.u32(..4) == 0).then(|| Accepts::new(|task_type| task_type == TYPES[0]));
        let alone = self.slow.load(Ordering::SeqCst) == 0;
        let claim = Claim { alone, accepts, ..Claim::new(host, limit, ALIVE) };
        claim_as(&self.recorder, self.backend(), &claim).await
    }

    /// Do something about each of the tasks.
    async fn treat(self: &Arc<Self>, tasks: Vec<ClaimedTask>, random: &mut fastrand::Rng) {
        let mut group = Vec::new();
        let mut twice = Vec::new();
        for task in tasks {
            let follow_ups = self.follow_ups(&task, random);
            match Plan::draw(random) {
                Plan::Forget => {}
                Plan::Settle(event, end) => {
                    let follow_ups = if event.keeps_follow_ups() { follow_ups } else { Vec::new() };
                    group.push(Ending { task, event, end, follow_ups });
                }
                Plan::Twice => {
                    twice.push(Ending { task: task.clone(), event: reject(), end: End::Reject, follow_ups: Vec::new() });
                    group.push(Ending { follow_ups, ..Ending::finished(task) });
                }
                Plan::TooLate => self.beside(task, ALIVE.mul_f64(0.8 + random.f64() * 0.6), false),
                Plan::Slowly => self.beside(task, ALIVE.mul_f64(0.3), true),
            }
        }
        self.settle(&group).await;
        self.settle(&twice).await;
    }

    fn follow_ups(&self, task: &ClaimedTask, random: &mut fastrand::Rng) -> Vec<NewTask> {
        if random.u32(..16) > 0 || task.descent.depth > 2 {
            return Vec::new();
        }
        let descent = Some(task.descent.of_follow_up(None, task.claimed_at));
        // Two attempts of one task submit the same.
        vec![NewTask { descent, ..new_task(format!("{}+", task.key), random) }]
    }

    /// Settle, and again while it is not known whether that was done, as a host does. What was written the first time counts as held.
    async fn settle(&self, group: &[Ending]) {
        const TRIES: usize = 3;
        for _ in 0..TRIES {
            match settle(&self.recorder, self.backend(), group).await {
                Err(error) if error.is_retryable() => {}
                _ => return,
            }
        }
    }

    /// Work on a task while others are claimed.
    fn beside(self: &Arc<Self>, task: ClaimedTask, time: Duration, alive: bool) {
        let worker = Arc::clone(self);
        worker.slow.fetch_add(1, Ordering::SeqCst);
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            if alive {
                worker.renew(&task).await;
                let asking = worker.recorder.ask(Asked::Update(Held::of(&task)));
                let updated = worker.backend().update_data(task.lease_ref, br#"{"half":true}"#).await;
                asking.answered(held(&updated.map(|answer| vec![answer])));
            }
            worker.settle(&[Ending::finished(task)]).await;
            worker.slow.fetch_sub(1, Ordering::SeqCst);
        });
    }

    async fn renew(&self, task: &ClaimedTask) {
        let alive_ms = i64::try_from(ALIVE.as_millis()).expect("a short time");
        let asking = self.recorder.ask(Asked::Renew(vec![Held::of(task)], alive_ms));
        let beat = Beat { lease_ref: task.lease_ref, alive_time: ALIVE, progress: None };
        asking.answered(held(&self.backend().heartbeat(&[beat]).await));
    }
}

fn held(answers: &Result<Vec<LeaseAnswer>, Error>) -> Answer {
    match answers {
        Ok(answers) => Answer::Held(answers.iter().map(|answer| *answer == LeaseAnswer::Held).collect()),
        Err(_) => Answer::Unknown,
    }
}
