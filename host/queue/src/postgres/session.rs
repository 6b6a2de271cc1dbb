//! How operations run: each on a task of its own, on one connection, again if that helps.
//!
//! Dropping a caller's future does not stop its operation, so that no connection is left inside a transaction. Deadlocks and serialisation
//! failures changed nothing and are tried again. When a connection is lost, what was sent last may have been done: every operation is written
//! so that doing it once more is right, and knows by [`Session::again`] that it may have been done before.

use std::collections::{HashMap, HashSet};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use sqlx::AssertSqlSafe;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot};

use super::accounts::Owner;
use super::connections::{Connections, IDLE_IN_TRANSACTION_MAX, Open};
use super::failure::Failure;
use super::held::Held;
use super::listen::{Bell, Listener};
use super::mark::{Ended, Marks};
use super::pooled::{Db, Pooler};
use super::{accounts, tally};
use crate::outcome::ms;
use crate::patience::Patience;
use crate::schema::Steps;
use crate::unserved::Watch;
use crate::{Error, HostId, LeaseRef, Result};

/// Operations at once, those that wait for a connection included.
const OPERATIONS_MAX: u32 = 100_000;
/// How long a transaction waits for what producers may hold.
const BRIEF: Duration = Duration::from_millis(500);
/// Counts appended by this process after which they are put together in the background.
const COUNTS_MAX: usize = 2_000;
/// The longest pause before another try.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Settlements of which it is not known whether they were written; beyond that the oldest knowledge goes, and they are answered as lost.
const UNSURE_MAX: usize = 100_000;

/// The future of an operation.
pub(super) type Work<'s, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 's>>;

/// What undoes an operation whose answer nobody took.
pub(super) type GiveBack<T> = fn(Arc<Shared>, T) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// An answer on its way to the caller. Dropped on the way, it is undone.
pub(super) struct Answer<T: Send + 'static> {
    undo: Option<Undo<T>>,
}

struct Undo<T> {
    value: T,
    shared: Arc<Shared>,
    give_back: GiveBack<T>,
}

impl<T: Send + 'static> Answer<T> {
    pub(super) fn value_mut(&mut self) -> Option<&mut T> {
        self.undo.as_mut().map(|undo| &mut undo.value)
    }

    /// The caller has it.
    pub(super) fn take(mut self) -> Option<T> {
        self.undo.take().map(|undo| undo.value)
    }
}

impl<T: Send + 'static> Drop for Answer<T> {
    fn drop(&mut self) {
        // Without a runtime, or once the queue is closed, the program is at its end: its hosts leave, or their leases end.
        if let Some(Undo { value, shared, give_back }) = self.undo.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
            && let Some(pass) = shared.pass_at_once()
        {
            runtime.spawn(async move {
                give_back(shared, value).await;
                drop(pass);
            });
        }
    }
}

/// What follows an operation that is done.
type Afterwards = Box<dyn FnOnce(&Arc<Shared>) + Send>;

/// What the operations of one open queue share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connections: Connections,
    pub(super) steps: Steps,
    pub(super) patience: Duration,
    /// Told when a claim may find something.
    pub(super) wakeup: Notify,
    pub(super) bell: Bell,
    pub(super) listener: Listener,
    pub(super) marks: Marks,
    /// When claims looked at what waits apart.
    pub(super) unserved: Watch,
    pub(super) held: Held,
    /// The numbers of plugin versions, which never change.
    pub(super) plugins: RwLock<HashMap<String, i32>>,
    /// The pick between users at which this process last picked a task without user; 0: never.
    pub(super) nobody_picked: AtomicI64,
    /// Changes of accounts are being entered.
    enters: AtomicBool,
    /// Counts appended since they were put together last, and whether that is going on.
    counts: AtomicUsize,
    puts_together: AtomicBool,
    /// The user up to which accounts were compared last.
    mended: Mutex<Owner>,
    /// Where claims whose leases have ended are looked for.
    pub(super) ended: Ended,
    unsure: Mutex<HashSet<LeaseRef>>,
    hosts: Mutex<HashSet<HostId>>,
    gate: Arc<Semaphore>,
}

/// An operation's connection.
pub(super) struct Session {
    connection: Option<Open>,
    /// An earlier try may have been done in full.
    pub(super) again: bool,
    /// When the operation was tried first.
    pub(super) began: Instant,
    begun: bool,
    afterwards: Vec<Afterwards>,
    pub(super) shared: Arc<Shared>,
}

/// How often and for how long an operation is tried.
struct Tries {
    patience: Patience,
    /// The most that one try takes.
    limit: Duration,
    /// An earlier try may have been done in full.
    again: bool,
    began: Option<Instant>,
}

impl Tries {
    fn new(patience: Duration, limit: Duration) -> Self {
        Self { patience: Patience::new(patience), limit, again: false, began: None }
    }
}

impl Session {
    /// Where statements run.
    ///
    /// # Errors
    /// Never within an operation.
    pub(super) fn db(&mut self) -> Result<Db<'_>, sqlx::Error> {
        let open = self.connection.as_mut().ok_or(sqlx::Error::WorkerCrashed)?;
        Ok(Db::new(&mut open.connection, self.shared.connections.pooler(), !self.begun))
    }

    /// Do this once the operation is done and durable.
    pub(super) fn afterwards(&mut self, then: impl FnOnce(&Arc<Shared>) + Send + 'static) {
        self.afterwards.push(Box::new(then));
    }

    /// Whether an operation's transaction is open.
    pub(super) fn is_in_transaction(&self) -> bool {
        self.begun
    }

    /// The moment, by the server's clock, at which the operation was tried first, or a little earlier: what came about before is not its own.
    pub(super) async fn began_at(&mut self) -> Result<i64, Failure> {
        const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
        let now: i64 = sqlx::query_scalar(NOW).fetch_one(self.db()?).await?;
        // Looked at after the answer, so that its way only makes it longer.
        Ok(now.saturating_sub(ms(self.began.elapsed())).saturating_sub(1))
    }

    /// So many rows of counts were appended.
    pub(super) fn counts(&mut self, rows: usize) {
        self.afterwards(move |shared| shared.counted(rows));
    }

    /// Begin a transaction, for an operation of several statements. The server ends it if this program stops in the middle of it.
    pub(super) async fn begin(&mut self) -> Result<(), Failure> {
        self.begin_with(String::new()).await
    }

    /// As [`Session::begin`]. It waits for no lock for long: [`Failure::is_lock_timeout`].
    pub(super) async fn begin_briefly(&mut self) -> Result<(), Failure> {
        self.begin_with(format!("; SET LOCAL lock_timeout = {}", BRIEF.as_millis())).await
    }

    async fn begin_with(&mut self, settings: String) -> Result<(), Failure> {
        self.begun = true;
        let idle = IDLE_IN_TRANSACTION_MAX.as_millis();
        let begin = self.shared.connections.pooler().map_or_else(|| "BEGIN".to_owned(), Pooler::begin);
        let sql = format!("{begin}; SET LOCAL idle_in_transaction_session_timeout = {idle}{settings}");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self.db()?).await?;
        Ok(())
    }

    /// Begin a transaction that reads one state of the database.
    pub(super) async fn begin_reading(&mut self) -> Result<(), Failure> {
        self.begun = true;
        let settings = self.shared.connections.pooler().map(|pooler| pooler.settings().to_owned()).unwrap_or_default();
        let sql = format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY{settings}");
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(self.db()?).await?;
        Ok(())
    }

    pub(super) async fn commit(&mut self) -> Result<(), Failure> {
        sqlx::raw_sql("COMMIT").execute(self.db()?).await?;
        self.begun = false;
        Ok(())
    }

    pub(super) async fn roll_back(&mut self) -> Result<(), Failure> {
        if self.begun {
            sqlx::raw_sql("ROLLBACK").execute(self.db()?).await?;
            self.begun = false;
        }
        Ok(())
    }
}

impl Shared {
    pub(super) fn new(connections: Connections, steps: Steps, patience: Duration, listen: bool) -> Arc<Self> {
        let listener = Listener::new(listen);
        Arc::new(Self {
            connections,
            steps,
            patience,
            wakeup: Notify::new(),
            bell: Bell::new(),
            listener,
            marks: Marks::default(),
            unserved: Watch::default(),
            held: Held::default(),
            plugins: RwLock::default(),
            nobody_picked: AtomicI64::new(0),
            enters: AtomicBool::new(false),
            counts: AtomicUsize::new(0),
            puts_together: AtomicBool::new(false),
            mended: Mutex::default(),
            ended: Ended::default(),
            unsure: Mutex::default(),
            hosts: Mutex::default(),
            gate: Arc::new(Semaphore::new(OPERATIONS_MAX as usize)),
        })
    }

    /// Run an operation to its end, and answer. `doing` says what it does, for errors.
    ///
    /// # Errors
    /// The operation's own. After [`Shared::patience`] also that the server cannot be reached; what was done is then not known.
    pub(super) async fn run<T, F>(self: &Arc<Self>, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        let pass = self.pass().await?;
        let shared = Arc::clone(self);
        let work = tokio::spawn(async move {
            let outcome = shared.repeat(doing, operation).await;
            drop(pass);
            outcome
        });
        work.await.unwrap_or(Err(Error::Closed))
    }

    /// As [`Shared::run`], for an operation that may take so long each time.
    pub(super) async fn run_long<T, F>(self: &Arc<Self>, doing: &'static str, limit: Duration, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        let pass = self.pass().await?;
        let shared = Arc::clone(self);
        let work = tokio::spawn(async move {
            let outcome = shared.repeat_within(doing, limit, operation).await;
            drop(pass);
            outcome
        });
        work.await.unwrap_or(Err(Error::Closed))
    }

    /// As [`Shared::run`], for an operation whose answer must reach somebody: unless the caller takes it, `give_back` undoes it.
    pub(super) async fn run_or_give_back<T, F>(
        self: &Arc<Self>,
        doing: &'static str,
        operation: F,
        give_back: GiveBack<T>,
    ) -> Result<Answer<T>>
    where
        T: Send + 'static,
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        let pass = self.pass().await?;
        let shared = Arc::clone(self);
        let (answer, answered) = oneshot::channel();
        tokio::spawn(async move {
            let outcome = if answer.is_closed() { Err(Error::Closed) } else { shared.repeat(doing, operation).await };
            // An answer that nobody receives any more is dropped here or in the channel.
            let _ = answer.send(outcome.map(|value| Answer { undo: Some(Undo { value, shared, give_back }) }));
            drop(pass);
        });
        answered.await.unwrap_or(Err(Error::Closed))
    }

    /// Run an operation without asking for a pass: for one that holds one.
    pub(super) async fn repeat<T, F>(self: &Arc<Self>, doing: &'static str, operation: F) -> Result<T>
    where
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T>,
    {
        self.repeat_within(doing, self.connections.silence_max(), operation).await
    }

    async fn repeat_within<T, F>(self: &Arc<Self>, doing: &'static str, limit: Duration, mut operation: F) -> Result<T>
    where
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T>,
    {
        let mut tries = Tries::new(self.patience, limit);
        let mut pause = Duration::from_millis(4);
        loop {
            let failure = match self.attempt(&mut operation, &mut tries).await {
                Ok(outcome) => return Ok(outcome),
                Err(failure) => failure,
            };
            let may_pass = (failure.is_lost() && tries.patience.lasts(pause))
                || (failure.is_contention() && tries.patience.outlasts_conflict(pause));
            if !may_pass {
                return Err(failure.into_error(doing, self.connections.place()));
            }
            tracing::debug!(doing, ?failure, "trying again");
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Run an operation once, whatever comes of it.
    pub(super) async fn try_once<T, F>(self: &Arc<Self>, mut operation: F) -> Result<T, Failure>
    where
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T>,
    {
        self.attempt(&mut operation, &mut Tries::new(Duration::ZERO, self.connections.silence_max())).await
    }

    async fn attempt<T, F>(self: &Arc<Self>, operation: &mut F, tries: &mut Tries) -> Result<T, Failure>
    where
        F: for<'s> FnMut(&'s mut Session) -> Work<'s, T>,
    {
        let turn = self.connections.turn().await?;
        tries.patience.begin();
        let began = *tries.began.get_or_insert_with(Instant::now);
        let mut taken = turn.take().await?;
        let (again, shared) = (tries.again, Arc::clone(self));
        let mut session = Session { connection: None, again, began, begun: false, afterwards: Vec::new(), shared };
        std::mem::swap(&mut session.connection, &mut taken.connection);
        let limit = tries.limit;
        let outcome = tokio::time::timeout(limit, operation(&mut session)).await.unwrap_or_else(|_| Err(Failure::silence(limit)));
        if outcome.as_ref().is_err_and(Failure::is_lost) {
            tries.again = true;
            self.connections.drop_all();
            return outcome;
        }
        // An operation that failed may have left its transaction open.
        let rolled_back = tokio::time::timeout(self.connections.connect_timeout(), session.roll_back()).await;
        if matches!(rolled_back, Ok(Ok(()))) {
            std::mem::swap(&mut session.connection, &mut taken.connection);
            taken.give_back();
        }
        if outcome.is_ok() {
            for then in session.afterwards {
                then(self);
            }
        }
        outcome
    }

    /// Leave to run an operation, held until it has ended.
    pub(super) async fn pass(&self) -> Result<OwnedSemaphorePermit> {
        Arc::clone(&self.gate).acquire_owned().await.map_err(|_| Error::Closed)
    }

    /// As [`Shared::pass`], if there is one at once.
    pub(super) fn pass_at_once(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.gate).try_acquire_owned().ok()
    }

    /// Wait for what is under way; nothing new begins from now on. Answers whether this call was the one that closed.
    pub(super) async fn end(&self) -> bool {
        let Ok(all) = self.gate.acquire_many(OPERATIONS_MAX).await else { return false };
        self.gate.close();
        all.forget();
        true
    }

    /// A claim of this process may find something.
    pub(super) fn hint(&self) {
        self.wakeup.notify_waiters();
        self.wakeup.notify_one();
    }

    /// Tasks were stored or came back: tell claimers here and elsewhere.
    pub(super) fn wake(self: &Arc<Self>) {
        self.hint();
        self.bell.ring(self);
    }

    /// The user up to which accounts were compared with the tasks.
    pub(super) fn mended_up_to(&self) -> Owner {
        self.mended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Compare accounts from here on next.
    pub(super) fn mend_from(&self, owner: Owner) {
        *self.mended.lock().unwrap_or_else(PoisonError::into_inner) = owner;
    }

    /// So many rows of counts were appended: put them together in the background once they are many, so that they stay few at any speed.
    fn counted(self: &Arc<Self>, rows: usize) {
        if self.counts.fetch_add(rows, Ordering::AcqRel) + rows < COUNTS_MAX || self.puts_together.swap(true, Ordering::AcqRel) {
            return;
        }
        self.counts.store(0, Ordering::Release);
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            if let Some(pass) = shared.pass_at_once() {
                let together = shared.repeat("putting counts together", |session| Box::pin(tally::put_together(session)));
                if let Err(error) = together.await {
                    tracing::debug!(%error, "counts are put together later");
                }
                drop(pass);
            }
            shared.puts_together.store(false, Ordering::Release);
        });
    }

    /// Enter changes of accounts in the background until none is left, if that is not going on already: after a submit for so many users that
    /// claims would have to do it one after the other.
    pub(super) fn enter_changes(self: &Arc<Self>) {
        if self.enters.swap(true, Ordering::AcqRel) {
            return;
        }
        let shared = Arc::clone(self);
        tokio::spawn(async move {
            while let Some(pass) = shared.pass_at_once() {
                let entered = shared.repeat("entering changes of accounts", |session| Box::pin(accounts::enter_many(session)));
                let entered = entered.await;
                drop(pass);
                if !matches!(entered, Ok(true)) {
                    break;
                }
            }
            shared.enters.store(false, Ordering::Release);
        });
    }

    /// The hosts that registered through this queue and are not known to have gone.
    pub(super) fn hosts(&self) -> MutexGuard<'_, HashSet<HostId>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remember settlements that may have been written although nobody knows.
    pub(super) fn note_unsure(&self, leases: impl Iterator<Item = LeaseRef>) {
        let mut unsure = self.unsure.lock().unwrap_or_else(PoisonError::into_inner);
        unsure.extend(leases);
        if unsure.len() > UNSURE_MAX {
            unsure.clear();
        }
    }

    /// Those of the leases whose settlement may have been written before; they are known from now on.
    pub(super) fn take_unsure(&self, leases: impl Iterator<Item = LeaseRef>) -> Vec<LeaseRef> {
        let mut unsure = self.unsure.lock().unwrap_or_else(PoisonError::into_inner);
        if unsure.is_empty() {
            return Vec::new();
        }
        leases.filter(|lease_ref| unsure.remove(lease_ref)).collect()
    }
}
