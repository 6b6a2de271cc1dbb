//! Operations on the server: each in a task of its own, so that one whose caller has gone is still wholly done or not done, and again after
//! what passes by itself.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::mysql::MySqlConnection;

use super::Shared;
use super::table::Names;
use crate::mysql::failure::Failure;
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
    /// Do it. An error leaves no transaction open, or no connection.
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
            match patience.after(failure) {
                Ok(pause) => tokio::time::sleep(pause).await,
                Err(failure) => return Err(failure.into_error(O::DOING, &self.access.place)),
            }
        }
    }

    async fn once<O: Operation>(&self, operation: &O) -> Result<O::Answer, Failure> {
        let mut connection = self.pool.acquire().await?;
        let names = self.names(&mut connection).await?;
        let done = operation.run(&names, &mut connection).await;
        if done.as_ref().is_err_and(Failure::is_disconnection) {
            connection.close_on_drop();
        }
        done
    }
}
