//! Wake-up between processes: NOTIFY after tasks came in, LISTEN on a connection of its own. Only ever a hint; polling is the promise.
//!
//! A NOTIFY takes a lock of the whole server while its transaction commits, so there is never one per task: a process sends at most one in
//! [`RING_PAUSE`], in a transaction of its own, and what comes in meanwhile shares the next one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
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
    /// It was said that nothing will be heard.
    told: AtomicBool,
    hearing: Mutex<Option<JoinHandle<()>>>,
}

impl Listener {
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, told: AtomicBool::new(false), hearing: Mutex::default() }
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

/// Listen until the connection is lost.
async fn hear(options: &PgConnectOptions, shared: &Weak<Shared>) -> Result<(), sqlx::Error> {
    let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(CONNECT_PATIENCE).connect_lazy_with(options.clone());
    let mut listener = within(PgListener::connect_with(&pool)).await?;
    listener.eager_reconnect(false);
    within(listener.listen(CHANNEL)).await?;
    let Some(name) = shared.upgrade().map(|shared| shared.bell.name.clone()) else { return Ok(()) };
    loop {
        // Also at the beginning: what was said before was not heard.
        let Some(shared) = shared.upgrade() else { return Ok(()) };
        shared.marks.hint();
        shared.hint();
        drop(shared);
        loop {
            match tokio::time::timeout(SILENCE, listener.try_recv()).await {
                Ok(Ok(Some(notice))) if notice.payload() == name => {}
                Ok(Ok(Some(_))) => break,
                Ok(Ok(None) | Err(_)) => return Ok(()),
                Err(_) => {
                    let asked = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut listener);
                    if within(asked).await? {
                        return Ok(());
                    }
                }
            }
        }
    }
}
