//! Submits of several callers, stored together: what waits for the writer becomes one batch, as if one caller had submitted it.
//!
//! A caller's batch is either in the group that waits, or its group's job has begun. A job that is dropped unrun takes its group along, so
//! that nobody waits for an answer that cannot come.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::oneshot;

use super::failure::{Alike, Failure};
use super::submit::store_together;
use super::writer::{Job, Session, Writer};
use crate::batch::Batch;
use crate::{Error, Result, Submitted};

/// What is being done, for errors.
const DOING: &str = "submitting tasks";
/// The most tasks of a group, unless one batch alone has more.
const GROUP_TASKS_MAX: usize = 10_000;
/// The most data of a group, unless one batch alone has more.
const GROUP_BYTES_MAX: usize = 32 << 20;

/// Batches that wait for the writer. Each group has its job on the way to it.
#[derive(Debug, Default)]
pub(super) struct Together {
    groups: Mutex<VecDeque<Waiting>>,
}

/// A group that waits, and what it has to store by now.
#[derive(Debug)]
struct Waiting {
    asking: Vec<Asking>,
    tasks: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Asking {
    batch: Batch,
    answer: oneshot::Sender<Result<Vec<Submitted>, Failure>>,
}

impl Together {
    /// Store a batch, durably when it returns.
    pub(super) async fn submit(self: &Arc<Self>, batch: Batch, writer: &Writer, path: &Arc<PathBuf>) -> Result<Vec<Submitted>> {
        let (answer, answered) = oneshot::channel();
        let job = || {
            let begun = self.join(Asking { batch, answer });
            begun.then(|| {
                let group = Group { together: Arc::clone(self), path: Arc::clone(path), stage: Stage::Waiting };
                Box::new(group) as Box<dyn Job>
            })
        };
        writer.send(job).await?;
        let outcome = answered.await.map_err(|_| Error::Closed)?;
        outcome.map_err(|failure| failure.into_error(DOING, path))
    }

    /// Add to the last group, or begin a new one. Answers whether it was begun.
    fn join(&self, asking: Asking) -> bool {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let (tasks, bytes) = asking.batch.size();
        let has_room = |group: &Waiting| group.tasks + tasks <= GROUP_TASKS_MAX && group.bytes + bytes <= GROUP_BYTES_MAX;
        if let Some(group) = groups.back_mut().filter(|group| has_room(group)) {
            group.asking.push(asking);
            group.tasks += tasks;
            group.bytes += bytes;
            return false;
        }
        groups.push_back(Waiting { asking: vec![asking], tasks, bytes });
        true
    }

    fn take(&self) -> Vec<Asking> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner).pop_front().map_or_else(Vec::new, |group| group.asking)
    }
}

/// The job of one group.
struct Group {
    together: Arc<Together>,
    path: Arc<PathBuf>,
    stage: Stage,
}

enum Stage {
    Waiting,
    Ran(Vec<oneshot::Sender<Result<Vec<Submitted>, Failure>>>, Result<Vec<Vec<Submitted>>, Failure>),
    Answered,
}

impl Job for Group {
    fn is_abandoned(&self) -> bool {
        false
    }

    fn run<'s>(&'s mut self, session: &'s mut Session) -> Pin<Box<dyn Future<Output = bool> + Send + 's>> {
        Box::pin(async move {
            let asking = self.together.take().into_iter().filter(|asking| !asking.answer.is_closed());
            let (batches, answers): (Vec<Batch>, Vec<_>) = asking.map(|asking| (asking.batch, asking.answer)).unzip();
            let outcome = store_together(batches, session).await;
            let kept = outcome.is_ok();
            self.stage = Stage::Ran(answers, outcome);
            kept
        })
    }

    fn answer(mut self: Box<Self>) -> Option<Box<dyn Job>> {
        match std::mem::replace(&mut self.stage, Stage::Answered) {
            Stage::Ran(answers, Ok(outcomes)) => {
                for (answer, outcome) in answers.into_iter().zip(outcomes) {
                    // A caller that has gone away does not want to know; what it submitted is stored all the same.
                    let _ = answer.send(Ok(outcome));
                }
            }
            Stage::Ran(answers, Err(failure)) => tell(answers, failure, &self.path),
            Stage::Waiting | Stage::Answered => {}
        }
        None
    }

    fn fail(mut self: Box<Self>, failure: Failure) {
        match std::mem::replace(&mut self.stage, Stage::Answered) {
            Stage::Ran(answers, Err(own)) => tell(answers, own, &self.path),
            Stage::Ran(answers, Ok(_)) => tell(answers, failure, &self.path),
            Stage::Waiting => {
                let answers = self.together.take().into_iter().map(|asking| asking.answer).collect();
                tell(answers, failure, &self.path);
            }
            Stage::Answered => {}
        }
    }

    fn doing(&self) -> &'static str {
        DOING
    }
}

fn tell(answers: Vec<oneshot::Sender<Result<Vec<Submitted>, Failure>>>, failure: Failure, path: &Path) {
    let alike = Alike::of(failure, DOING, path);
    for answer in answers {
        let _ = answer.send(Err(alike.failure()));
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Stage::Waiting = self.stage {
            drop(self.together.take());
        }
    }
}
