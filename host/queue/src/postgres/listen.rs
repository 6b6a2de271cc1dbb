//! Wake-up between processes: NOTIFY after tasks came in, LISTEN on a connection of its own. Only ever a hint; polling is the promise.
//!
//! A NOTIFY takes a lock of the whole server while its transaction commits, so there is never one per task: a process sends at most one in
//! [`RING_PAUSE`], in a transaction of its own, and what comes in meanwhile shares the next one.
//!
//! A producer that speaks SQL has only its own transaction. It sends a notice only if somebody waits for one (`laelaps.wake`): a process that found
//! too little to do stands in `laelaps.waiting` by its listening connection. A producer that has stored a task and then sees nobody there may
//! commit at any later time; so a process that has just entered looks again until all transactions that were under way by then have ended, or a while
//! has passed. While everybody has more than enough to do the table is empty, and producers commit side by side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::connections::Connections;
use super::session::Shared;

/// The channel that hosts listen to.
pub(super) const CHANNEL: &str = "laelaps";
/// Between two notices of one process.
const RING_PAUSE: Duration = Duration::from_millis(20);
/// Before the first try to hear again after the connection was lost, and the longest.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// After so long without a word the server is asked whether it is there, and is still one that takes writes.
const SILENCE: Duration = Duration::from_secs(60);
/// How long one try to connect, or one answer, may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// A host that had more than enough to do for so long lets producers off sending notices.
const BUSY: Duration = Duration::from_millis(200);
/// Between looks for what was stored by transactions that were under way when this process began to wait, and how long they are waited for. What
/// is committed later is found by polling.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
const LOOK_PAUSE_MAX: Duration = Duration::from_secs(1);
const LOOKS: Duration = Duration::from_secs(30);
/// What an operator is told where a pooler stands in between.
const DEAF: &str = "this program does not LISTEN through a pooler: one in transaction mode hands notices to other clients, whom they surprise. New \
    tasks are found by polling alone; connect hosts directly, or say `listen: false`";

/// Tells other processes.
#[derive(Debug)]
pub(super) struct Bell {
    /// Names this process, which need not be told by itself.
    name: String,
    /// A notice is on its way.
    rings: AtomicBool,
    rang_at: Mutex<Option<Instant>>,
}

impl Bell {
    pub(super) fn new() -> Self {
        Self { name: format!("{:x}", fastrand::u64(..)), rings: AtomicBool::new(false), rang_at: Mutex::default() }
    }

    /// Send a notice soon, if none is on its way.
    pub(super) fn ring(&self, shared: &Arc<Shared>) {
        if self.rings.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(pass) = shared.pass_at_once() else {
            self.rings.store(false, Ordering::Release);
            return;
        };
        let shared = Arc::clone(shared);
        tokio::spawn(async move {
            let bell = &shared.bell;
            let rang_at = *bell.rang_at.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(rest) = rang_at.and_then(|rang_at| RING_PAUSE.checked_sub(rang_at.elapsed())) {
                tokio::time::sleep(rest).await;
            }
            *bell.rang_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
            // From here on tasks that come in ask for another notice.
            bell.rings.store(false, Ordering::Release);
            let sent = shared.repeat("waking hosts", |session| {
                Box::pin(async move {
                    let name = session.shared.bell.name.clone();
                    sqlx::query("SELECT pg_notify($1, $2)").bind(CHANNEL).bind(name).execute(session.db()?).await?;
                    Ok(())
                })
            });
            if let Err(error) = sent.await {
                tracing::debug!(%error, "other hosts find the tasks when they poll");
            }
            drop(pass);
        });
    }
}

/// Hears other processes.
#[derive(Debug)]
pub(super) struct Listener {
    wanted: bool,
    /// The last claim got all that it asked for.
    is_busy: AtomicBool,
    /// Told when that changes.
    changed: Arc<Notify>,
    /// It was said that nothing will be heard.
    told: AtomicBool,
    hearing: Mutex<Option<JoinHandle<()>>>,
}

impl Listener {
    pub(super) fn new(wanted: bool) -> Self {
        Self {
            wanted,
            is_busy: AtomicBool::new(false),
            changed: Arc::new(Notify::new()),
            told: AtomicBool::new(false),
            hearing: Mutex::default(),
        }
    }

    /// A claim got so many tasks of those that it asked for.
    pub(super) fn claimed(&self, found: usize, asked: u32) {
        let is_busy = found as u64 >= u64::from(asked);
        if self.is_busy.swap(is_busy, Ordering::Relaxed) != is_busy {
            self.changed.notify_one();
        }
    }

    /// Begin to listen, if that is wanted and not done already. Through a pooler it is said once that this cannot be done.
    pub(super) fn start(&self, shared: &Arc<Shared>) {
        if !self.wanted {
            return;
        }
        if let Some(warning) = self.deafness(&shared.connections) {
            if !self.told.swap(true, Ordering::AcqRel) {
                tracing::warn!(place = shared.connections.place(), "{warning}");
            }
            return;
        }
        let mut hearing = self.hearing.lock().unwrap_or_else(PoisonError::into_inner);
        hearing.get_or_insert_with(|| tokio::spawn(listen(shared.connections.options().clone(), Arc::downgrade(shared))));
    }

    /// Why nothing is heard although it is wanted.
    pub(super) fn deafness(&self, connections: &Connections) -> Option<&'static str> {
        (self.wanted && connections.pooler().is_some()).then_some(DEAF)
    }

    pub(super) fn stop(&self) {
        if let Some(hearing) = self.hearing.lock().unwrap_or_else(PoisonError::into_inner).take() {
            hearing.abort();
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn listen(options: PgConnectOptions, shared: Weak<Shared>) {
    let mut pause = RETRY_PAUSE;
    while shared.strong_count() > 0 {
        let heard = hear(&options, &shared).await;
        match heard {
            Ok(()) => pause = RETRY_PAUSE,
            Err(error) => tracing::debug!(%error, "cannot listen for new tasks; they are found by polling"),
        }
        tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

async fn within<T>(answer: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    tokio::time::timeout(CONNECT_PATIENCE, answer).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
}

/// Whether a listening connection stands among those that wait for notices.
struct Waiting {
    is_in: bool,
    busy_since: Option<Instant>,
    /// Producers that did not see it there may still commit.
    unseen: Option<Unseen>,
}

struct Unseen {
    /// All transactions with smaller numbers are older than the entry.
    until: String,
    entered_at: Instant,
    next_look: Instant,
    pause: Duration,
}

impl Waiting {
    /// Enter or leave, as what was claimed last says. Answers whether tasks should be looked for.
    async fn adapt(&mut self, listener: &mut PgListener, is_busy: bool) -> Result<bool, sqlx::Error> {
        self.busy_since = is_busy.then(|| self.busy_since.unwrap_or_else(Instant::now));
        match (self.is_in, self.busy_since) {
            (false, None) => {
                self.enter(listener).await?;
                Ok(true)
            }
            (true, Some(since)) if since.elapsed() >= BUSY => {
                self.leave(listener).await?;
                Ok(false)
            }
            _ => self.look(listener).await,
        }
    }

    async fn enter(&mut self, listener: &mut PgListener) -> Result<(), sqlx::Error> {
        // Those that are gone have left nothing but this.
        const ENTER: &str = "WITH gone AS (DELETE FROM laelaps.waiting WHERE pid NOT IN (SELECT pid FROM pg_stat_activity))
            INSERT INTO laelaps.waiting (pid) VALUES (pg_backend_pid()) ON CONFLICT (pid) DO NOTHING";
        // By a snapshot that is younger than the entry.
        const UNTIL: &str = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text";
        within(sqlx::query(ENTER).execute(&mut *listener)).await?;
        let until = within(sqlx::query_scalar(UNTIL).fetch_one(listener)).await?;
        let now = Instant::now();
        self.is_in = true;
        self.unseen = Some(Unseen { until, entered_at: now, next_look: now + LOOK_PAUSE, pause: LOOK_PAUSE });
        Ok(())
    }

    async fn leave(&mut self, listener: &mut PgListener) -> Result<(), sqlx::Error> {
        const LEAVE: &str = "DELETE FROM laelaps.waiting WHERE pid = pg_backend_pid()";
        within(sqlx::query(LEAVE).execute(listener)).await?;
        (self.is_in, self.unseen) = (false, None);
        Ok(())
    }

    async fn look(&mut self, listener: &mut PgListener) -> Result<bool, sqlx::Error> {
        const ARE_OVER: &str = "SELECT pg_snapshot_xmin(pg_current_snapshot()) >= $1::xid8";
        let Some(unseen) = self.unseen.as_mut().filter(|unseen| unseen.next_look <= Instant::now()) else { return Ok(false) };
        let are_over: bool = within(sqlx::query_scalar(ARE_OVER).bind(&unseen.until).fetch_one(listener)).await?;
        if are_over || unseen.entered_at.elapsed() >= LOOKS {
            self.unseen = None;
        } else {
            unseen.pause = (unseen.pause * 2).min(LOOK_PAUSE_MAX);
            unseen.next_look = Instant::now() + unseen.pause;
        }
        Ok(true)
    }

    /// When there is something to do without a word from anybody.
    fn next(&self) -> Option<Instant> {
        let leaves = self.busy_since.filter(|_| self.is_in).map(|since| since + BUSY);
        let looks = self.unseen.as_ref().map(|unseen| unseen.next_look);
        leaves.into_iter().chain(looks).min()
    }
}

/// Listen until the connection is lost.
async fn hear(options: &PgConnectOptions, shared: &Weak<Shared>) -> Result<(), sqlx::Error> {
    // So that an operator sees what this connection is for.
    let name = format!("{} listener", options.get_application_name().unwrap_or("laelaps"));
    let options = options.clone().application_name(&name);
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_PATIENCE).connect_lazy_with(options);
    let mut listener = within(PgListener::connect_with(&pool)).await?;
    listener.eager_reconnect(false);
    within(listener.listen(CHANNEL)).await?;
    let Some((changed, name)) = shared.upgrade().map(|shared| (Arc::clone(&shared.listener.changed), shared.bell.name.clone()))
    else {
        return Ok(());
    };
    let mut waiting = Waiting { is_in: false, busy_since: None, unseen: None };
    let mut heard_at = Instant::now();
    // Also at the beginning: what was said before was not heard.
    let mut looks = true;
    loop {
        let Some(strong) = shared.upgrade() else { return Ok(()) };
        let is_busy = strong.listener.is_busy.load(Ordering::Relaxed);
        looks |= waiting.adapt(&mut listener, is_busy).await?;
        if std::mem::take(&mut looks) {
            strong.marks.hint();
            strong.hint();
        }
        // Who waits here does not keep the queue open.
        drop(strong);
        let silent_until = heard_at + SILENCE;
        let until = waiting.next().map_or(silent_until, |next| next.min(silent_until));
        tokio::select! {
            heard = listener.try_recv() => match heard {
                Ok(Some(notice)) => {
                    heard_at = Instant::now();
                    looks = notice.payload() != name;
                }
                Ok(None) | Err(_) => return Ok(()),
            },
            () = changed.notified() => {}
            () = tokio::time::sleep_until(until.into()) => {}
        }
        if heard_at.elapsed() >= SILENCE {
            heard_at = Instant::now();
            let asked = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut listener);
            if within(asked).await? {
                return Ok(());
            }
        }
    }
}
