//! The one writer: all writes of this process go through one connection, grouped into transactions.
//!
//! Authority: SQLite lets one connection write at a time, so a queue of our own is cheaper than fighting over its lock. What waits while a
//! commit is flushed to the disk goes into the next transaction together, each operation in a savepoint of its own: one that fails takes back
//! its own changes only. Nobody is answered before the commit. An operation whose caller has gone runs wholly, or, if it was not begun yet,
//! not at all. If the transaction as a whole fails, every operation of it is told so, and none has changed anything.
//!
//! Claims and renewals need not outlast a power loss: it ends every host on the file too, and without them their tasks wait as before. So a
//! group of nothing else is written to the log without waiting for the disk ([`Flush::Later`]). The log is flushed from its beginning to its
//! end, so whatever is durable later has everything before it: no state comes back that never was.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection, FromRow as _, Row as _};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use super::checkpoint::{Checkpoints, Log};
use super::failure::{self, Failure};
use super::neighbours::Seen;
use crate::{Error, Result};

/// Operations that wait for the writer; a caller beyond that waits with its operation in hand.
const WAITING_MAX: usize = 1_024;
/// Operations of one transaction.
const GROUP_MAX: usize = 128;
/// The longest pause between two tries to get the lock of a database that another program keeps locked.
const LOCK_PAUSE_MAX: Duration = Duration::from_millis(200);

/// The database's clock.
pub(super) const NOW: &str = "SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";

/// See how long the write-ahead log is, without work for it. Take the database's lock, then the time, and see whether others have written.
macro_rules! begin {
    () => {
        "; PRAGMA wal_checkpoint(NOOP); BEGIN IMMEDIATE; SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER); PRAGMA data_version"
    };
}

/// Begin what waits for the disk when it commits.
const BEGIN: &str = concat!("PRAGMA synchronous = FULL", begin!());
/// Begin what does not.
const BEGIN_LATER: &str = concat!("PRAGMA synchronous = NORMAL", begin!());

/// When what an operation writes has to be on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// Before it is answered.
    First,
    /// With the next transaction that waits for the disk, or after a few seconds, when the system writes it. Other processes see it at once.
    Later,
}

impl Flush {
    fn begin(self) -> &'static str {
        match self {
            Self::First => BEGIN,
            Self::Later => BEGIN_LATER,
        }
    }
}

/// Changes when another connection has committed.
const VERSION: &str = "PRAGMA data_version";

/// The future of an operation.
pub(super) type Work<'s, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 's>>;

/// What makes of an answer that nobody heard an operation that undoes it.
pub(super) type GiveBack<T> = fn(T) -> Option<Box<dyn Job>>;

/// The open transaction, as an operation sees it.
pub(super) struct Session {
    connection: SqliteConnection,
    /// The time by the database's clock, taken after the transaction had the database's lock.
    pub(super) now: i64,
    /// Set by an operation after which a claim may find something.
    pub(super) wake: bool,
    /// Tells whether others have committed since; None: not asked yet.
    version: Option<i64>,
}

impl Session {
    pub(super) fn new(connection: SqliteConnection) -> Self {
        Self { connection, now: 0, wake: false, version: None }
    }

    /// Remember the version. Answers whether it is another than before.
    fn has_changed(&mut self, version: i64) -> bool {
        self.version.replace(version).is_some_and(|before| before != version)
    }

    /// Where statements run.
    pub(super) fn db(&mut self) -> &mut SqliteConnection {
        &mut self.connection
    }

    async fn statement(&mut self, sql: &'static str) -> Result<(), sqlx::Error> {
        sqlx::query(sql).execute(&mut self.connection).await.map(drop)
    }
}

/// How a writer reaches its database.
#[derive(Clone, Debug)]
pub(super) struct Access {
    pub(super) options: SqliteConnectOptions,
    pub(super) path: Arc<PathBuf>,
    pub(super) patience: Duration,
    pub(super) wakeup: Arc<Notify>,
    pub(super) file: Arc<Original>,
    pub(super) seen: Arc<Seen>,
}

/// The file as it was opened. Somebody may delete or replace it meanwhile: then this process has one that nobody else finds.
#[derive(Debug)]
pub(super) struct Original {
    path: PathBuf,
    /// Device and number of the file.
    identity: Option<(u64, u64)>,
    is_gone: AtomicBool,
}

impl Original {
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: Self::identity(path).ok(), is_gone: AtomicBool::new(false) }
    }

    fn identity(path: &Path) -> std::io::Result<(u64, u64)> {
        std::fs::metadata(path).map(|file| (file.dev(), file.ino()))
    }

    /// Whether it was found deleted or replaced. It stays so.
    pub(super) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::SeqCst)
    }

    /// Look whether it is still there. Said once.
    ///
    /// # Errors
    /// [`Error::File`] if it is not.
    pub(super) fn check(&self) -> Result<()> {
        const GONE: &str = "was deleted or replaced while it was open; what is written to the old file would be lost";
        let gone = match Self::identity(&self.path) {
            Ok(now) => self.identity.is_some_and(|opened| opened != now),
            Err(error) => error.kind() == std::io::ErrorKind::NotFound,
        };
        if !gone && !self.is_gone() {
            return Ok(());
        }
        if !self.is_gone.swap(true, Ordering::SeqCst) {
            tracing::error!(path = %self.path.display(), "the database {GONE}: this process writes nothing more, and has to be started again");
        }
        Err(Error::File { path: self.path.clone(), problem: GONE.to_owned(), source: None })
    }
}

/// The way to the writer.
#[derive(Debug)]
pub(super) struct Writer {
    jobs: mpsc::Sender<Message>,
    actor: tokio::sync::Mutex<Option<JoinHandle<()>>>,
    path: Arc<PathBuf>,
}

/// A caller that waits for an answer. If it goes away just as the answer has come, the answer is undone from here.
struct Receiving<T> {
    answered: oneshot::Receiver<Result<T, Failure>>,
    jobs: mpsc::Sender<Message>,
    give_back: GiveBack<T>,
}

impl<T> Drop for Receiving<T> {
    fn drop(&mut self) {
        self.answered.close();
        if let Ok(Ok(unheard)) = self.answered.try_recv()
            && let Some(job) = (self.give_back)(unheard)
        {
            // If there is no room, the leases end by themselves.
            let _ = self.jobs.try_send(Message::Job(job));
        }
    }
}

enum Message {
    Job(Box<dyn Job>),
    /// See whether others have written, and say when that is done.
    Look(oneshot::Sender<()>),
    Close,
}

/// Who asks the writer to see whether others have written.
#[derive(Clone, Debug)]
pub(super) struct Looker(mpsc::Sender<Message>);

impl Looker {
    /// Have it looked.
    ///
    /// # Errors
    /// [`Error::Closed`] if the writer has ended.
    pub(super) async fn look(&self) -> Result<()> {
        let (done, looked) = oneshot::channel();
        self.0.send(Message::Look(done)).await.map_err(|_| Error::Closed)?;
        looked.await.map_err(|_| Error::Closed)
    }
}

impl Writer {
    /// Start the writer on a connection that works.
    pub(super) fn start(connection: SqliteConnection, access: Access) -> Self {
        let (jobs, receiver) = mpsc::channel(WAITING_MAX);
        let path = Arc::clone(&access.path);
        let checkpoints = Checkpoints::start(&access.options, Arc::clone(&access.file));
        let actor = Actor { session: Some(Session::new(connection)), access, checkpoints };
        Self { jobs, actor: tokio::sync::Mutex::new(Some(tokio::spawn(actor.run(receiver)))), path }
    }

    /// Run an operation in a transaction, and answer when it is durable. `doing` says what it does, for errors.
    ///
    /// # Errors
    /// The operation's own, or the transaction's; in both cases nothing was changed.
    pub(super) async fn run<T, F>(&self, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s> FnOnce(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        self.run_with(Flush::First, doing, operation).await
    }

    /// As [`Writer::run`]; the answer waits for the disk only if `flush` says so.
    ///
    /// # Errors
    /// As [`Writer::run`].
    pub(super) async fn run_with<T, F>(&self, flush: Flush, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s> FnOnce(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job = Asked { operation: Some(operation), outcome: None, answer: Some(answer), doing, give_back: None, flush };
        self.jobs.send(Message::Job(Box::new(job))).await.map_err(|_| Error::Closed)?;
        let outcome = answered.await.map_err(|_| Error::Closed)?;
        outcome.map_err(|failure| failure.into_error(doing, &self.path))
    }

    /// As [`Writer::run_with`], for an operation whose answer must reach somebody: if the caller has gone by then, `give_back` makes of the
    /// answer an operation that undoes it, which runs at once.
    ///
    /// # Errors
    /// As [`Writer::run`].
    pub(super) async fn run_or_give_back<T, F>(
        &self,
        flush: Flush,
        doing: &'static str,
        operation: F,
        give_back: GiveBack<T>,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s> FnOnce(&'s mut Session) -> Work<'s, T> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job =
            Asked { operation: Some(operation), outcome: None, answer: Some(answer), doing, give_back: Some(give_back), flush };
        let mut receiving = Receiving { answered, jobs: self.jobs.clone(), give_back };
        self.jobs.send(Message::Job(Box::new(job))).await.map_err(|_| Error::Closed)?;
        let outcome = (&mut receiving.answered).await.map_err(|_| Error::Closed)?;
        outcome.map_err(|failure| failure.into_error(doing, &self.path))
    }

    /// Wait for room, then decide what to send, if anything, without waiting in between.
    ///
    /// # Errors
    /// [`Error::Closed`] if the writer has ended.
    pub(super) async fn send(&self, job: impl FnOnce() -> Option<Box<dyn Job>>) -> Result<()> {
        let room = self.jobs.reserve().await.map_err(|_| Error::Closed)?;
        if let Some(job) = job() {
            room.send(Message::Job(job));
        }
        Ok(())
    }

    pub(super) fn looker(&self) -> Looker {
        Looker(self.jobs.clone())
    }

    /// Finish what is waiting, then end.
    pub(super) async fn close(&self) {
        // A writer that has ended already takes no message.
        let _ = self.jobs.send(Message::Close).await;
        if let Some(actor) = self.actor.lock().await.take()
            && let Err(error) = actor.await
        {
            tracing::error!(path = %self.path.display(), %error, "the writer of the database broke down");
        }
    }
}

/// An operation and its caller, whatever it answers.
pub(super) trait Job: Send {
    /// Whether nobody waits for it any more.
    fn is_abandoned(&self) -> bool;
    /// Run it. Answers whether it wants its changes kept.
    fn run<'s>(&'s mut self, session: &'s mut Session) -> Pin<Box<dyn Future<Output = bool> + Send + 's>>;
    /// Its transaction is durable (or it has failed by itself): answer. What it returns undoes what nobody was there to hear of.
    fn answer(self: Box<Self>) -> Option<Box<dyn Job>>;
    /// Its transaction failed: say so.
    fn fail(self: Box<Self>, failure: Failure);
    fn doing(&self) -> &'static str;
    /// When what it writes has to be on the disk.
    fn flush(&self) -> Flush {
        Flush::First
    }
}

struct Asked<T, F> {
    operation: Option<F>,
    outcome: Option<Result<T, Failure>>,
    answer: Option<oneshot::Sender<Result<T, Failure>>>,
    doing: &'static str,
    give_back: Option<GiveBack<T>>,
    flush: Flush,
}

/// A job that nobody waits for.
pub(super) fn unasked<F>(doing: &'static str, operation: F) -> Box<dyn Job>
where
    F: for<'s> FnOnce(&'s mut Session) -> Work<'s, ()> + Send + 'static,
{
    Box::new(Asked { operation: Some(operation), outcome: None, answer: None, doing, give_back: None, flush: Flush::First })
}

impl<T, F> Job for Asked<T, F>
where
    T: Send + 'static,
    F: for<'s> FnOnce(&'s mut Session) -> Work<'s, T> + Send + 'static,
{
    fn is_abandoned(&self) -> bool {
        // One that nobody asked for undoes something: it has to run.
        self.answer.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    fn run<'s>(&'s mut self, session: &'s mut Session) -> Pin<Box<dyn Future<Output = bool> + Send + 's>> {
        Box::pin(async move {
            let Some(operation) = self.operation.take() else { return false };
            let outcome = operation(session).await;
            let kept = outcome.is_ok();
            self.outcome = Some(outcome);
            kept
        })
    }

    fn answer(self: Box<Self>) -> Option<Box<dyn Job>> {
        let (answer, outcome) = (self.answer?, self.outcome?);
        // A caller that has gone away does not want to know.
        match answer.send(outcome) {
            Err(Ok(unheard)) => self.give_back.and_then(|give_back| give_back(unheard)),
            Err(Err(_)) | Ok(()) => None,
        }
    }

    fn fail(self: Box<Self>, failure: Failure) {
        // An operation that failed by itself knows better what went wrong.
        let outcome = match self.outcome {
            Some(Err(own)) => Err(own),
            _ => Err(failure),
        };
        if let Some(answer) = self.answer {
            let _ = answer.send(outcome);
        }
    }

    fn doing(&self) -> &'static str {
        self.doing
    }

    fn flush(&self) -> Flush {
        self.flush
    }
}

struct Actor {
    /// None after a connection was found unusable.
    session: Option<Session>,
    access: Access,
    checkpoints: Checkpoints,
}

impl Actor {
    async fn run(mut self, mut receiver: mpsc::Receiver<Message>) {
        let mut messages = Vec::with_capacity(GROUP_MAX);
        let mut looking: Vec<oneshot::Sender<()>> = Vec::new();
        let mut open = true;
        while open && receiver.recv_many(&mut messages, GROUP_MAX).await > 0 {
            let mut group: Vec<Box<dyn Job>> = Vec::with_capacity(messages.len());
            for message in messages.drain(..) {
                match message {
                    Message::Job(job) if open && !job.is_abandoned() => group.push(job),
                    Message::Job(_) => {}
                    Message::Look(done) => looking.push(done),
                    Message::Close => open = false,
                }
            }
            if !group.is_empty() {
                self.commit(group).await;
            } else if !looking.is_empty() {
                self.look().await;
            }
            for done in looking.drain(..) {
                // Who has gone does not want to know.
                let _ = done.send(());
            }
        }
        self.checkpoints.close().await;
        if let Some(session) = self.session.take()
            && let Err(error) = session.connection.close().await
        {
            tracing::debug!(path = %self.access.path.display(), %error, "closing the database");
        }
    }

    /// Run a group in one transaction, and answer each when it is durable. What undoes unheard answers follows at once.
    async fn commit(&mut self, group: Vec<Box<dyn Job>>) {
        let mut group = group;
        while !group.is_empty() {
            let doing = group.first().map_or("writing", |job| job.doing());
            match self.transaction(&mut group).await {
                Ok(wake) => {
                    group = group.into_iter().filter_map(|job| job.answer()).collect();
                    if wake {
                        self.access.wakeup.notify_waiters();
                        self.access.wakeup.notify_one();
                    }
                    if let Some(session) = &mut self.session {
                        self.checkpoints.committed(session.db()).await;
                    }
                }
                Err(failure) => {
                    let alike = failure::Alike::of(failure, doing, &self.access.path);
                    for job in group.drain(..) {
                        job.fail(alike.failure());
                    }
                }
            }
        }
    }

    /// Begin, run all, commit. Answers whether to wake claimers.
    async fn transaction(&mut self, group: &mut [Box<dyn Job>]) -> Result<bool, Failure> {
        let flush = if group.iter().all(|job| job.flush() == Flush::Later) { Flush::Later } else { Flush::First };
        self.begin(flush).await?;
        let Some(session) = self.session.as_mut() else { return Err(Failure::from(Error::Closed)) };
        let done = Self::run_all(session, group).await;
        let ended = match done {
            Ok(true) => session.statement("COMMIT").await,
            Ok(false) => session.statement("ROLLBACK").await,
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            // After errors such as a full disk the transaction may have ended by itself. If even this fails, the connection goes.
            if session.statement("ROLLBACK").await.is_err_and(|error| !failure::says_no_transaction(&error)) {
                self.session = None;
            }
            return Err(Failure::from(error));
        }
        Ok(session.wake)
    }

    /// Run each operation, in a savepoint if there are several. Answers whether anything is to be kept.
    async fn run_all(session: &mut Session, group: &mut [Box<dyn Job>]) -> Result<bool, sqlx::Error> {
        session.wake = false;
        if let [only] = group {
            return Ok(only.run(session).await);
        }
        let mut kept = false;
        for job in group {
            session.statement("SAVEPOINT operation").await?;
            let wake = session.wake;
            if job.run(session).await {
                kept = true;
            } else {
                session.wake = wake;
                session.statement("ROLLBACK TO operation").await?;
            }
            session.statement("RELEASE operation").await?;
        }
        Ok(kept)
    }

    /// See whether others have written. What cannot be seen now is seen when the next transaction begins.
    async fn look(&mut self) {
        if let Some(session) = self.session.as_mut()
            && let Ok(version) = sqlx::query_scalar(VERSION).fetch_one(&mut session.connection).await
        {
            self.access.seen.looked(session.has_changed(version));
        }
    }

    /// Get the database's lock, with patience, and take the time.
    async fn begin(&mut self, flush: Flush) -> Result<(), Failure> {
        self.access.file.check()?;
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            match self.try_begin(flush).await {
                Err(error) if failure::is_busy(&error) => {
                    let waited = started.elapsed();
                    if waited >= self.access.patience {
                        return Err(Failure::from(Error::Locked { path: self.access.path.to_path_buf(), waited }));
                    }
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LOCK_PAUSE_MAX);
                }
                begun => return Ok(begun?),
            }
        }
    }

    async fn try_begin(&mut self, flush: Flush) -> Result<(), sqlx::Error> {
        let session = match &mut self.session {
            Some(session) => session,
            none => none.insert(Session::new(self.access.options.connect().await?)),
        };
        let rows = sqlx::query(flush.begin()).fetch_all(&mut session.connection).await?;
        let [log, now, version] = rows.as_slice() else { return Err(sqlx::Error::RowNotFound) };
        self.checkpoints.seen(Log::from_row(log)?);
        session.now = now.try_get(0)?;
        self.access.seen.looked(session.has_changed(version.try_get(0)?));
        Ok(())
    }
}
