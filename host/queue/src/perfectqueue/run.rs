//! Operations on the server: each in a task of its own, so that one whose caller has gone is still wholly done or not done, and again after
//! what passes by itself.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::AssertSqlSafe;
use sqlx::mysql::MySqlConnection;

use super::Shared;
use super::table::Names;
use crate::mysql::failure::{Failure, number};
use crate::{Error, Result, patience};

/// The first pause before another try.
const PAUSE_FIRST: Duration = Duration::from_millis(10);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What is done on a connection, from its beginning each time.
#[async_trait]
pub(super) trait Operation: Send + Sync + 'static {
    /// What it answers.
    type Answer: Send + 'static;
    /// What it does, for errors.
    const DOING: &'static str;
    /// The next try follows one of which it is not known whether it was done.
    fn is_repeated(&self) {}
    /// Do it. It may leave a transaction open with an error, not without one.
    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure>;
}

/// Whether and when to try again.
pub(super) struct Patience {
    patience: patience::Patience,
    pause: Duration,
}

impl Patience {
    /// Of an operation that begins now.
    pub(super) fn new(length: Duration) -> Self {
        let mut patience = patience::Patience::new(length);
        patience.begin();
        Self { patience, pause: PAUSE_FIRST }
    }

    /// The pause before the next try, or the failure if there is none.
    pub(super) fn after(&mut self, failure: Failure) -> Result<Duration, Failure> {
        let pause = self.pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        let again = if failure.is_conflict() {
            self.patience.outlasts_conflict(pause)
        } else {
            is_connection_trouble(&failure) && self.patience.lasts(pause)
        };
        if !again {
            return Err(failure);
        }
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Ok(pause)
    }
}

/// The connection broke, or there was none.
fn is_connection_trouble(failure: &Failure) -> bool {
    match failure {
        Failure::Queue(error) => matches!(**error, Error::Connect { .. }) && error.is_retryable(),
        failure => failure.is_disconnection(),
    }
}

impl Shared {
    /// Do an operation on a connection of the pool, to its end even if the caller is dropped.
    pub(super) async fn perform<O: Operation>(self: &Arc<Self>, operation: O) -> Result<O::Answer> {
        let shared = Arc::clone(self);
        let done = tokio::spawn(async move { shared.with_patience(&operation).await });
        done.await.map_err(|_| Error::Closed)?
    }

    async fn with_patience<O: Operation>(&self, operation: &O) -> Result<O::Answer> {
        let mut patience = Patience::new(self.patience);
        loop {
            let failure = match self.once(operation).await {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            if failure.is_disconnection() {
                operation.is_repeated();
            }
            match patience.after(failure) {
                Ok(pause) => tokio::time::sleep(pause).await,
                Err(failure) => return Err(failure.into_error(O::DOING, &self.access.place)),
            }
        }
    }

    async fn once<O: Operation>(&self, operation: &O) -> Result<O::Answer, Failure> {
        // Bounded by itself.
        let mut connection = self.pool.acquire().await?;
        let running = async {
            let names = self.names(&mut connection).await?;
            operation.run(&names, &mut connection).await
        };
        let done = tokio::time::timeout(self.limit, running).await.unwrap_or_else(|_| Err(silence(self.limit)));
        if let Err(failure) = &done
            && (is_of_no_use(failure) || !rolls_back(&mut connection).await)
        {
            // Not given back: closing it says goodbye, and a server that is silent would keep that waiting.
            drop(connection.detach());
        }
        done
    }
}

/// How long a transaction may be left alone before the server ends its session, in seconds: so long a host that is frozen or cut off can hold up
/// others.
const IDLE_SECONDS: u32 = 5;
/// How long a transaction waits for what others have locked, if it is not brief: as all sessions are set up.
const LOCK_WAIT_SECONDS: u32 = 10;
/// How long a rollback may take before its connection is given up.
const ROLLBACK_MAX: Duration = Duration::from_secs(2);

/// Begin a transaction.
pub(super) async fn begin(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    let sql = format!("SET SESSION wait_timeout = {IDLE_SECONDS}; START TRANSACTION");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// Begin one that waits no longer than a second for what others have locked.
pub(super) async fn begin_briefly(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    let sql = format!("SET SESSION wait_timeout = {IDLE_SECONDS}, innodb_lock_wait_timeout = 1; START TRANSACTION");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// End it. What is not known to be committed is rolled back, or its connection closed.
pub(super) async fn commit(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    end("COMMIT", connection).await
}

pub(super) async fn roll_back(connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    end("ROLLBACK", connection).await
}

async fn end(how: &'static str, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    let sql = format!("{how}; SET SESSION wait_timeout = DEFAULT, innodb_lock_wait_timeout = {LOCK_WAIT_SECONDS}");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

async fn rolls_back(connection: &mut MySqlConnection) -> bool {
    tokio::time::timeout(ROLLBACK_MAX, roll_back(connection)).await.is_ok_and(|done| done.is_ok())
}

/// The connection is broken, or leads to a server that is not the one to write to any more.
fn is_of_no_use(failure: &Failure) -> bool {
    failure.is_disconnection() || matches!(failure, Failure::Sql(error) if matches!(number(error), Some(1290 | 1792 | 1836)))
}

/// The server gave no answer in time.
pub(super) fn silence(limit: Duration) -> Failure {
    let words = format!("the server gave no answer within {} ms", limit.as_millis());
    Failure::from(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, words)))
}
