//! Submits of several callers, stored together: what waits while others are stored becomes one batch, as if one caller had submitted it. So
//! many callers share the price of a commit, and a lone one waits for nobody.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::session::Waiting as LockWait;
use super::submit::new_mark;
use super::{MySql, locked, submit};
use crate::batch::Batch;
use crate::{Error, Result, Submitted};

/// Transactions with submits at once.
const STORING_MAX: usize = 2;
/// The most tasks of a group, unless one batch alone has more.
const GROUP_TASKS_MAX: usize = 10_000;
/// The most data of a group, unless one batch alone has more.
const GROUP_BYTES_MAX: usize = 32 << 20;

/// Batches that wait.
#[derive(Debug, Default)]
pub(super) struct Together {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    batches: VecDeque<Asking>,
    storing: usize,
}

#[derive(Debug)]
struct Asking {
    batch: Batch,
    answer: oneshot::Sender<Answer>,
}

/// What becomes of a batch in a group.
#[derive(Debug)]
enum Answer {
    Stored(Vec<Submitted>),
    /// The group failed, for whatever reason: each has to be tried by itself.
    Alone(Batch),
}

impl Waiting {
    /// Take what goes into one transaction; those whose callers have gone are dropped.
    fn take(&mut self) -> Vec<Asking> {
        let (mut tasks, mut bytes) = (0, 0);
        let mut group = Vec::new();
        while let Some(asking) = self.batches.front() {
            let (more_tasks, more_bytes) = asking.batch.size();
            if !group.is_empty() && (tasks + more_tasks > GROUP_TASKS_MAX || bytes + more_bytes > GROUP_BYTES_MAX) {
                break;
            }
            (tasks, bytes) = (tasks + more_tasks, bytes + more_bytes);
            group.extend(self.batches.pop_front().filter(|asking| !asking.answer.is_closed()));
        }
        group
    }
}

impl MySql {
    /// Store a batch with those of others, durably when it returns.
    pub(super) async fn store_with_others(&self, batch: Batch) -> Result<Vec<Submitted>> {
        let (answer, answered) = oneshot::channel();
        {
            let mut waiting = locked(&self.submits.waiting);
            waiting.batches.push_back(Asking { batch, answer });
            if waiting.storing < STORING_MAX {
                waiting.storing += 1;
                let mysql = self.clone();
                tokio::spawn(async move { mysql.store_groups().await });
            }
        }
        match answered.await.map_err(|_| Error::Closed)? {
            Answer::Stored(answers) => Ok(answers),
            Answer::Alone(batch) => self.store(batch).await,
        }
    }

    /// Store group after group until nobody waits.
    async fn store_groups(&self) {
        loop {
            let group = {
                let mut waiting = locked(&self.submits.waiting);
                let group = waiting.take();
                if group.is_empty() {
                    waiting.storing -= 1;
                    return;
                }
                group
            };
            self.store_group(group).await;
        }
    }

    async fn store_group(&self, group: Vec<Asking>) {
        let (batches, answers): (Vec<Batch>, Vec<_>) = group.into_iter().map(|asking| (asking.batch, asking.answer)).unzip();
        let (batches, mark) = (Arc::new(batches), new_mark());
        let storing = Arc::clone(&batches);
        let stored = self
            .run_waiting(LockWait::OrBusy, "submitting tasks", move |session| {
                let batches = Arc::clone(&storing);
                Box::pin(async move { submit::submit(session, &batches, mark).await })
            })
            .await;
        match stored {
            // A caller that has gone away does not want to know; what it submitted is stored all the same.
            Ok(stored) => answers.into_iter().zip(stored).for_each(|(answer, stored)| drop(answer.send(Answer::Stored(stored)))),
            Err(error) => {
                tracing::debug!(%error, submits = answers.len(), "submits are tried one by one");
                let alone = batches.iter().cloned().map(Answer::Alone);
                answers.into_iter().zip(alone).for_each(|(answer, alone)| drop(answer.send(alone)));
            }
        }
    }
}
