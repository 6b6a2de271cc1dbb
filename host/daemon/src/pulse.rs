//! Whether this host is really well: its claim loop turns, its database answers, its processors live, its log takes lines.
//!
//! The watchdogs ask before every kick ([`Pulse::health`]), and must get an answer at once, so everything is looked at beforehand: the dispatcher
//! says that it turns, and a prober asks the database and the guests' threads again and again. A host that is frozen stops all of them together, and
//! is not taken for well when it wakes before the next look.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use laelaps_queue::Backend;
use laelaps_watchdog::fleet::Health;
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use crate::plugin;

/// Looks at the database and at the guests' threads in the time that either may be silent.
const LOOKS_PER_LIMIT: u32 = 5;
/// A claim may take this long (a statement that waits for a lock, a server that is started again) before it counts as stuck.
const CLAIM_MAX: Duration = Duration::from_secs(60);

/// The signs of life of this process. Shared by all who watch over it; the prober ends with the last of them.
pub(crate) struct Pulse {
    signs: Arc<Signs>,
    prober: JoinHandle<()>,
}

/// What is known, written by whoever lives.
struct Signs {
    /// How long any part may be silent.
    limit: Duration,
    start: Instant,
    /// A dispatcher is at work; before and after that its silence means nothing.
    claims: AtomicBool,
    /// Milliseconds since `start` at the claim loop's last turn.
    turned_ms: AtomicU64,
    /// Milliseconds since `start` when the claim under way was sent; 0 while there is none.
    claim_sent_ms: AtomicU64,
    /// Milliseconds since `start` when a guest's thread last took up work.
    guests_ms: AtomicU64,
    /// Guests' threads that do not come back, and how many there may be.
    stuck: Box<dyn Fn() -> Option<String> + Send + Sync>,
    database: Mutex<Database>,
}

/// What the last looks at the database showed.
struct Database {
    /// Since when it has answered throughout.
    reached_since: Option<Instant>,
    answered_at: Instant,
    /// What it said instead of the last answer; empty while an answer is waited for.
    problem: String,
}

impl Pulse {
    /// Start looking. `limit` is how long any part of the host may be silent.
    pub(crate) fn start(limit: Duration, backend: Arc<dyn Backend>, engine: Arc<plugin::Engine>) -> Self {
        let counted = Arc::clone(&engine);
        let stuck = move || {
            let lost = counted.lost(limit);
            (lost > crate::dispatch::STUCK_MAX).then(|| format!("{lost} threads are stuck in guests"))
        };
        let signs = Arc::new(Signs {
            limit,
            start: Instant::now(),
            claims: AtomicBool::new(false),
            turned_ms: AtomicU64::new(0),
            claim_sent_ms: AtomicU64::new(0),
            guests_ms: AtomicU64::new(0),
            stuck: Box::new(stuck),
            // It was opened a moment ago.
            database: Mutex::new(Database { reached_since: None, answered_at: Instant::now(), problem: String::new() }),
        });
        let prober = tokio::spawn(probe(Arc::clone(&signs), backend, engine));
        Self { signs, prober }
    }

    /// How long any part may be silent.
    pub(crate) fn limit(&self) -> Duration {
        self.signs.limit
    }

    /// A dispatcher begins to turn; it counts as turning until the answer is dropped.
    pub(crate) fn turning(&self) -> Turning {
        let signs = Arc::clone(&self.signs);
        signs.turned();
        signs.claim_sent_ms.store(0, Ordering::Relaxed);
        signs.claims.store(true, Ordering::Relaxed);
        Turning { signs }
    }

    /// How the host feels now.
    pub(crate) fn health(&self) -> Health {
        self.signs.problem().map_or(Health::Well, Health::Unwell)
    }

    /// Since when the database has answered throughout; none while it does not.
    pub(crate) fn database_reached_since(&self) -> Option<Instant> {
        let database = self.signs.database();
        if self.signs.database_problem(&database).is_some() { None } else { database.reached_since }
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.prober.abort();
    }
}

/// A claim loop that turns.
pub(crate) struct Turning {
    signs: Arc<Signs>,
}

impl Turning {
    /// Another turn. Answers whether it came so late that whoever watches over this host may have taken it for dead.
    pub(crate) fn turned(&self) -> bool {
        let late = self.signs.age(&self.signs.turned_ms) > self.signs.limit;
        self.signs.turned();
        late
    }

    /// A claim was sent.
    pub(crate) fn claim_sent(&self) {
        self.signs.claim_sent_ms.store(self.signs.now_ms().max(1), Ordering::Relaxed);
    }

    /// It was answered.
    pub(crate) fn claim_answered(&self) {
        self.signs.claim_sent_ms.store(0, Ordering::Relaxed);
    }

    /// How often the loop has to turn while nothing happens.
    pub(crate) fn interval(&self) -> Duration {
        self.signs.limit / LOOKS_PER_LIMIT
    }

    /// Whether the host may take on work.
    pub(crate) fn is_well(&self) -> bool {
        self.signs.problem().is_none()
    }
}

impl Drop for Turning {
    fn drop(&mut self) {
        self.signs.claims.store(false, Ordering::Relaxed);
    }
}

impl Signs {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn age(&self, sign: &AtomicU64) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(sign.load(Ordering::Relaxed)))
    }

    fn turned(&self) {
        self.turned_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn problem(&self) -> Option<String> {
        if let Some(stuck) = (self.stuck)() {
            return Some(stuck);
        }
        if let Some(silent) = crate::log::stuck_for().filter(|silent| *silent > self.limit) {
            return Some(format!("the log has not taken a line for {silent:?}"));
        }
        if let Some(problem) = self.database_problem(&self.database()) {
            return Some(problem);
        }
        let guests = self.age(&self.guests_ms);
        if guests > self.limit {
            return Some(format!("no guest's thread has taken up work for {guests:?}"));
        }
        if !self.claims.load(Ordering::Relaxed) {
            return None;
        }
        let turned = self.age(&self.turned_ms);
        if turned > self.limit {
            return Some(format!("the claim loop has not turned for {turned:?}"));
        }
        let claim_is_sent = self.claim_sent_ms.load(Ordering::Relaxed) > 0;
        let waited = self.age(&self.claim_sent_ms);
        (claim_is_sent && waited > CLAIM_MAX.max(self.limit)).then(|| format!("a claim was not answered for {waited:?}"))
    }

    fn database_problem(&self, database: &Database) -> Option<String> {
        let silent = database.answered_at.elapsed();
        let problem = if database.problem.is_empty() { "no answer yet" } else { &database.problem };
        (silent > self.limit).then(|| format!("the database has not answered for {silent:?}: {problem}"))
    }

    fn database(&self) -> std::sync::MutexGuard<'_, Database> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The database answered what was asked at `asked`, or did not.
    fn looked(&self, asked: Instant, answer: Result<(), String>) {
        let mut database = self.database();
        match answer {
            Ok(()) => {
                // A gap between two answers is time for which nothing is known: this process may have been frozen.
                let throughout = database.answered_at.elapsed() <= self.limit;
                if !throughout || database.reached_since.is_none() {
                    database.reached_since = Some(asked);
                }
                database.answered_at = Instant::now();
                database.problem.clear();
            }
            Err(problem) => {
                database.reached_since = None;
                database.problem = problem;
            }
        }
    }
}

/// Ask the database and the guests' threads for a sign of life, as long as somebody wants to know.
async fn probe(signs: Arc<Signs>, backend: Arc<dyn Backend>, engine: Arc<plugin::Engine>) {
    let mut looks = tokio::time::interval(signs.limit / LOOKS_PER_LIMIT);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let of_guests = Arc::clone(&signs);
        engine.take_up(async move { of_guests.guests_ms.store(of_guests.now_ms(), Ordering::Relaxed) });
        let asked = Instant::now();
        let answer = match tokio::time::timeout(signs.limit, backend.now()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(crate::log::chain(&error)),
            Err(_) => Err("no answer".to_owned()),
        };
        signs.looked(asked, answer);
    }
}
