//! What became of an attempt in which nothing went wrong.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, OrFail, Result};

/// What became of the attempt, when nothing went wrong.
///
/// A handler that just finishes may return its result instead, anything that serialises.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The work is done. The task never runs again.
    Finish {
        /// A result for whoever asks for it later, usually JSON. The route bounds its size, 1 MiB unless it says otherwise.
        output: Option<Vec<u8>>,
        /// How long the finished task is kept, and its key with it. None: the queue's `retention_time`.
        retention: Option<Duration>,
    },
    /// Not yet: run again after this delay, or after the queue's back-off. Counts towards the task's most attempts.
    Retry(Option<Duration>),
    /// Hand the task back, for any host, now or after this delay. Does not count as an attempt.
    Release(Option<Duration>),
}

impl Outcome {
    /// Done, without a result.
    pub fn done() -> Self {
        Self::Finish { output: None, retention: None }
    }

    /// Done, with `output` as JSON.
    ///
    /// # Panics
    /// If `output` has no JSON form (a map whose keys are not text). [`Outcome::try_finish`] returns that as an error.
    pub fn finish(output: impl Serialize) -> Self {
        match Self::try_finish(output) {
            Ok(outcome) => outcome,
            Err(error) => panic!("{}", error.message()),
        }
    }

    /// Done, with `output` as JSON.
    ///
    /// # Errors
    /// Code `bad-output`, rejecting, if `output` has no JSON form (a map whose keys are not text).
    pub fn try_finish(output: impl Serialize) -> Result<Self> {
        let output = serde_json::to_vec(&output).or_reject("bad-output")?;
        Ok(Self::finish_with_bytes(output))
    }

    /// Done, with these bytes, which need not be JSON.
    pub fn finish_with_bytes(output: impl Into<Vec<u8>>) -> Self {
        Self::Finish { output: Some(output.into()), retention: None }
    }

    /// Keep the finished task, and its key, for this long instead of the queue's `retention_time`. Nothing for another outcome.
    #[must_use]
    pub fn keep_for(self, retention: Duration) -> Self {
        match self {
            Self::Finish { output, .. } => Self::Finish { output, retention: Some(retention) },
            other => other,
        }
    }

    /// Not yet: run again after the queue's back-off.
    pub fn retry() -> Self {
        Self::Retry(None)
    }

    /// Not yet: run again after this delay.
    pub fn retry_after(delay: Duration) -> Self {
        Self::Retry(Some(delay))
    }

    /// Hand the task back, for any host, now.
    pub fn release() -> Self {
        Self::Release(None)
    }

    /// Hand the task back, for any host, after this delay.
    pub fn release_after(delay: Duration) -> Self {
        Self::Release(Some(delay))
    }

    /// The output of a finish, read as JSON; for tests of handlers.
    ///
    /// # Errors
    /// If this is no finish with an output of that shape.
    pub fn output<T: DeserializeOwned>(&self) -> Result<T> {
        match self {
            Self::Finish { output: Some(output), .. } => serde_json::from_slice(output).or_reject("bad-output"),
            other => Err(Error::reject("no-output", format_args!("{other:?} has no output"))),
        }
    }
}
