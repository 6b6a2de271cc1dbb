//! Operations as transactions: each on a tokio task of its own and on one connection, tried again where that is safe.
//!
//! Authority: the server. An operation is begun, run and committed as a whole; whoever waits for it may go away, and it still ends as a whole.
//! What another transaction stood in the way of (deadlock, lock wait time-out) has changed nothing and is run again after a moment. The same
//! goes for a connection that was lost before the commit was sent. After that it is not known whether the commit took place: the operation is
//! run again and told so ([`Session::repeated`]), and finds out by looking, or does no harm the second time. No connection goes back to the
//! pool inside a transaction.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::mysql::{MySqlArguments, MySqlRow};
use sqlx::pool::PoolConnection;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, MySql, MySqlConnection, MySqlPool, Row as _};
use tokio::sync::Notify;

use super::connect::{Access, IDLE_TRANSACTION_SECONDS, LOCK_WAIT_SECONDS, Server};
use super::failure::{Failure, Place};
use super::locked;
use super::mark::Marks;
use super::rows::{json_in_chunks, parameter_bytes};
use crate::patience::Patience;
use crate::{Error, Result};

/// The longest pause after a conflict.
const CONFLICT_PAUSE_MAX: Duration = Duration::from_millis(200);
/// The longest pause before another try to reach the server.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often an operation asks for another server when one takes no writes, and the pause before it does.
const PRIMARIES_MAX: u32 = 2;
const PRIMARY_PAUSE: Duration = Duration::from_millis(50);
/// How long an operation waits for a row that another one keeps locked where others wait behind it, in seconds.
const SHORT_LOCK_WAIT_SECONDS: u32 = 1;
/// How long a connection may take to be closed or to take back what it did.
const GOODBYE: Duration = Duration::from_secs(5);

/// The server's clock at the beginning of a statement, in milliseconds, whatever the session's time zone is.
macro_rules! now {
    () => {
        "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(3)) DIV 1000"
    };
}
pub(super) use now;

/// The server's clock at the moment, in milliseconds: also after a statement has waited for a lock. For sessions of ours, which are in UTC.
macro_rules! moment {
    () => {
        "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(3)) DIV 1000"
    };
}
pub(super) use moment;

const BEGIN: &str = concat!("START TRANSACTION; SELECT ", now!());
/// For readers whose statements have to see the same moment.
const BEGIN_SNAPSHOT: &str = concat!(
    "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY; SELECT ",
    now!()
);
/// For who reads one moment after having waited for a lock, and writes.
const BEGIN_REPEATABLE: &str = concat!("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; START TRANSACTION; SELECT ", now!());

/// How an operation waits for what others have locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// As long as a session does.
    Long,
    /// For a second, since others wait behind it; then it is [`Error::Busy`].
    OrBusy,
    /// As long as a session does, and reads as of one moment after the first wait.
    AtOneMoment,
}

/// How a transaction begins and ends on a kind of server. On MySQL its session is held to answering within seconds; MariaDB's sessions are so
/// whenever they are in a transaction.
#[derive(Clone, Copy, Debug)]
struct Brackets {
    mariadb: bool,
}

impl Brackets {
    fn begin(self, waiting: Waiting) -> String {
        let mut settings = String::new();
        if !self.mariadb {
            settings.push_str(&format!("SET SESSION wait_timeout = {IDLE_TRANSACTION_SECONDS}; "));
        }
        if waiting == Waiting::OrBusy {
            settings.push_str(&format!("SET SESSION innodb_lock_wait_timeout = {SHORT_LOCK_WAIT_SECONDS}; "));
        }
        settings + if waiting == Waiting::AtOneMoment { BEGIN_REPEATABLE } else { BEGIN }
    }

    fn end(self, end: &str, waiting: Waiting) -> String {
        let mut end = end.to_owned();
        if waiting == Waiting::OrBusy {
            end.push_str(&format!("; SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}"));
        }
        if !self.mariadb {
            end.push_str("; SET SESSION wait_timeout = DEFAULT");
        }
        end
    }
}

/// The future of an operation.
pub(super) type Work<'s, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 's>>;

/// A task became ready, or several of which this is the first one's turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entered {
    pub(super) queue: String,
    /// It is of a user.
    pub(super) of_user: bool,
    pub(super) turn: i64,
}

/// The open transaction, as an operation sees it.
pub(super) struct Session<'c> {
    connection: &'c mut MySqlConnection,
    /// The time by the server's clock at the beginning of the transaction.
    pub(super) now: i64,
    /// Set by an operation after which a claim may find something.
    pub(super) wake: bool,
    /// Where tasks became ready.
    pub(super) entered: Vec<Entered>,
    /// An earlier try of this operation may have been committed.
    pub(super) repeated: bool,
    /// So many earlier tries ran into other transactions.
    pub(super) conflicts: u32,
    /// The most bytes of one parameter.
    pub(super) bytes_max: usize,
}

impl<'c> Session<'c> {
    /// A transaction that somebody else has begun and will end.
    pub(super) async fn joining(connection: &'c mut MySqlConnection) -> Result<Self, sqlx::Error> {
        const NOW: &str = concat!("SELECT ", now!(), ", CAST(@@max_allowed_packet AS UNSIGNED)");
        let (now, packet_bytes): (i64, u64) = sqlx::query_as(NOW).fetch_one(&mut *connection).await?;
        let bytes_max = parameter_bytes(usize::try_from(packet_bytes).unwrap_or(usize::MAX));
        Ok(Self { connection, now, wake: false, entered: Vec::new(), repeated: false, conflicts: 0, bytes_max })
    }

    /// A set as parameters that the server takes.
    pub(super) fn chunks<T: serde::Serialize>(&self, items: impl IntoIterator<Item = T>) -> Vec<String> {
        json_in_chunks(items, self.bytes_max)
    }

    /// Where statements run.
    pub(super) fn db(&mut self) -> &mut MySqlConnection {
        self.connection
    }
}

/// A connection inside a transaction. It must not go back to the pool like that.
struct Begun {
    connection: PoolConnection<MySql>,
    now: i64,
}

impl Begun {
    async fn begin(pool: &MySqlPool, begin: String) -> Result<Self, sqlx::Error> {
        let mut connection = pool.acquire().await?;
        let begun = sqlx::raw_sql(AssertSqlSafe(begin)).fetch_all(&mut *connection).await;
        let now = begun.and_then(|rows| rows.last().ok_or(sqlx::Error::RowNotFound)?.try_get::<i64, _>(0));
        match now {
            Ok(now) => Ok(Self { connection, now }),
            Err(error) => {
                drop(connection.detach());
                Err(error)
            }
        }
    }

    fn session(&mut self, repeated: bool, conflicts: u32, bytes_max: usize) -> Session<'_> {
        let (connection, now) = (&mut *self.connection, self.now);
        Session { connection, now, wake: false, entered: Vec::new(), repeated, conflicts, bytes_max }
    }

    async fn commit(mut self, commit: String) -> Result<(), Trouble> {
        match sqlx::raw_sql(AssertSqlSafe(commit)).execute(&mut *self.connection).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let failure = Failure::from(error);
                let known = !failure.is_disconnection();
                self.break_off();
                Err(if known { Trouble::Undone(failure) } else { Trouble::Unknown(failure) })
            }
        }
    }

    /// A connection that does not answer is given up, and the transaction with it.
    async fn roll_back(mut self, roll_back: String) {
        let rolled_back = sqlx::raw_sql(AssertSqlSafe(roll_back)).execute(&mut *self.connection);
        if !matches!(tokio::time::timeout(GOODBYE, rolled_back).await, Ok(Ok(_))) {
            self.break_off();
        }
    }

    /// Close the connection: the server takes back what is not committed.
    fn break_off(self) {
        drop(self.connection.detach());
    }
}

/// Why an operation did not come to its end.
enum Trouble {
    /// Nothing was changed.
    Undone(Failure),
    /// Whether it was committed is not known.
    Unknown(Failure),
}

/// What operations need.
#[derive(Clone, Debug)]
pub(super) struct Runner {
    pub(super) pool: MySqlPool,
    pub(super) place: Place,
    pub(super) wakeup: Arc<Notify>,
    /// Where this process came to.
    pub(super) marks: Arc<Mutex<Marks>>,
    /// How long to try again.
    pub(super) patience: Duration,
    /// How long a try may take.
    limit: Duration,
    access: Arc<Access>,
    brackets: Brackets,
    bytes_max: usize,
}

impl Runner {
    pub(super) fn new(access: Arc<Access>, server: &Server, patience: Duration, statement_timeout: Duration) -> Self {
        Self {
            pool: access.pool(server),
            place: access.place.clone(),
            wakeup: Arc::default(),
            marks: Arc::default(),
            patience,
            // An operation has several statements.
            limit: statement_timeout.saturating_mul(2),
            access,
            brackets: Brackets { mariadb: server.mariadb },
            bytes_max: parameter_bytes(server.packet_bytes),
        }
    }

    /// Wake the hosts of this process that wait for tasks, and the next one that would.
    pub(super) fn wake(&self) {
        self.wakeup.notify_waiters();
        self.wakeup.notify_one();
    }

    /// Close all connections; those that do not answer are given up.
    pub(super) async fn close(&self) {
        if tokio::time::timeout(GOODBYE, self.pool.close()).await.is_err() {
            tracing::debug!("some connections are given up");
        }
    }

    /// Run an operation in a transaction on a task of its own, and answer when it is durable. `doing` says what it does, for errors.
    ///
    /// # Errors
    /// The operation's own, or the transaction's. Nothing was changed, unless the server was lost during the commit and did not come back
    /// within the patience: then it is not known.
    pub(super) async fn run<T, F>(&self, waiting: Waiting, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T> + Send + Sync + 'static,
    {
        let runner = self.clone();
        let running = tokio::spawn(async move { runner.run_here(waiting, doing, operation).await });
        running.await.unwrap_or(Err(Error::Closed))
    }

    /// As [`Runner::run`], on the task of the caller, which must not be dropped before it ends.
    pub(super) async fn run_here<T, F>(&self, waiting: Waiting, doing: &'static str, operation: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T> + Send + Sync,
    {
        let mut patience = self.patience();
        let (mut conflicts, mut losses, mut primaries) = (0, 0, 0);
        let mut repeated = false;
        loop {
            let (failure, known) = match self.once(waiting, &operation, repeated, conflicts).await {
                Ok(done) => return Ok(done),
                Err(Trouble::Undone(failure)) => (failure, true),
                Err(Trouble::Unknown(failure)) => (failure, false),
            };
            let (pause, again) = if failure.is_lock_wait() && waiting == Waiting::OrBusy && known && !repeated {
                return Err(Error::Busy { doing });
            } else if failure.is_read_only() {
                // Where its name leads by now there may be another.
                self.access.forget_connections();
                primaries += 1;
                (PRIMARY_PAUSE, primaries <= PRIMARIES_MAX)
            } else if failure.is_conflict() {
                conflicts += 1;
                let pause = pause_after(conflicts, Duration::from_millis(2), CONFLICT_PAUSE_MAX);
                (pause, patience.outlasts_conflict(pause))
            } else if failure.is_disconnection() {
                losses += 1;
                repeated |= !known;
                // The pool may hold several connections of a server that was started again.
                let pause = pause_after(losses, Duration::from_millis(5), RECONNECT_PAUSE_MAX);
                (pause, patience.lasts(pause))
            } else {
                (Duration::ZERO, false)
            };
            if !again {
                return Err(failure.into_error(doing, &self.place));
            }
            tracing::debug!(doing, ?failure, pause_ms = pause.as_millis(), "trying again");
            tokio::time::sleep(pause).await;
        }
    }

    async fn once<T, F>(&self, waiting: Waiting, operation: &F, repeated: bool, conflicts: u32) -> Result<T, Trouble>
    where
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T>,
    {
        let begun = tokio::time::timeout(self.limit, Begun::begin(&self.pool, self.brackets.begin(waiting))).await;
        let mut begun = match begun {
            Ok(begun) => begun.map_err(|error| Trouble::Undone(error.into()))?,
            Err(_) => return Err(Trouble::Undone(silence(self.limit))),
        };
        let mut session = begun.session(repeated, conflicts, self.bytes_max);
        let done = tokio::time::timeout(self.limit, operation(&mut session)).await;
        let (wake, entered) = (session.wake, session.entered);
        match done.unwrap_or_else(|_| Err(silence(self.limit))) {
            Ok(done) => {
                let committed = tokio::time::timeout(self.limit, begun.commit(self.brackets.end("COMMIT", waiting))).await;
                if !entered.is_empty() || (wake && repeated) {
                    // It may stand behind the marks, also where nobody heard of the commit; and before whoever is woken looks. What an earlier try
                    // has committed may stand anywhere.
                    locked(&self.marks).hint(&entered);
                }
                match committed {
                    Ok(committed) => committed?,
                    Err(_) => return Err(Trouble::Unknown(silence(self.limit))),
                }
                if wake {
                    self.wake();
                }
                Ok(done)
            }
            Err(failure) if failure.is_disconnection() => {
                begun.break_off();
                Err(Trouble::Undone(failure))
            }
            Err(failure) => {
                begun.roll_back(self.brackets.end("ROLLBACK", waiting)).await;
                Err(Trouble::Undone(failure))
            }
        }
    }

    /// One row of a query, asked again if the connection was lost.
    pub(super) async fn read_row<'q>(
        &self,
        doing: &'static str,
        query: impl Fn() -> Query<'q, MySql, MySqlArguments>,
    ) -> Result<MySqlRow> {
        let mut patience = self.patience();
        let mut losses = 0;
        loop {
            let failure = match tokio::time::timeout(self.limit, query().fetch_one(&self.pool)).await {
                Ok(Ok(row)) => return Ok(row),
                Ok(Err(error)) => Failure::from(error),
                Err(_) => silence(self.limit),
            };
            losses += 1;
            let pause = pause_after(losses, Duration::from_millis(5), RECONNECT_PAUSE_MAX);
            if !failure.is_disconnection() || !patience.lasts(pause) {
                return Err(failure.into_error(doing, &self.place));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Patience of an operation that begins now.
    fn patience(&self) -> Patience {
        let mut patience = Patience::new(self.patience);
        patience.begin();
        patience
    }

    /// Run several reads that see the same moment.
    pub(super) async fn read_together<T, F>(&self, doing: &'static str, reads: F) -> Result<T>
    where
        T: Send + 'static,
        F: for<'s, 'c> Fn(&'s mut Session<'c>) -> Work<'s, T> + Send + Sync + 'static,
    {
        let runner = self.clone();
        let reading = tokio::spawn(async move {
            let mut patience = runner.patience();
            let mut losses = 0;
            loop {
                let read = async {
                    let beginning = Begun::begin(&runner.pool, BEGIN_SNAPSHOT.to_owned());
                    let Ok(begun) = tokio::time::timeout(runner.limit, beginning).await else {
                        return Err(silence(runner.limit));
                    };
                    let mut begun = begun?;
                    let mut session = begun.session(false, 0, runner.bytes_max);
                    match tokio::time::timeout(runner.limit, reads(&mut session)).await {
                        Ok(read) => {
                            begun.roll_back("ROLLBACK".to_owned()).await;
                            read
                        }
                        Err(_) => {
                            begun.break_off();
                            Err(silence(runner.limit))
                        }
                    }
                };
                losses += 1;
                let pause = pause_after(losses, Duration::from_millis(5), RECONNECT_PAUSE_MAX);
                match read.await {
                    Ok(read) => return Ok(read),
                    Err(failure) if failure.is_disconnection() && patience.lasts(pause) => tokio::time::sleep(pause).await,
                    Err(failure) => return Err(failure.into_error(doing, &runner.place)),
                }
            }
        });
        reading.await.unwrap_or(Err(Error::Closed))
    }
}

/// A pause that doubles up to its longest, drawn from its upper half, so that those who met do not meet again.
fn pause_after(times: u32, first: Duration, longest: Duration) -> Duration {
    let pause = first.saturating_mul(1 << times.min(16)).min(longest);
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

fn silence(limit: Duration) -> Failure {
    let words = format!("the server gave no answer within {} ms", limit.as_millis());
    Failure::from(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words)))
}
