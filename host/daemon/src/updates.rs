//! New members of running tasks' data on their way to the database. What several attempts ask for while one transaction is written goes into the
//! next together; an attempt is answered when its own update is durable.

use std::sync::Arc;

use laelaps_queue::{Error, LeaseAnswer, LeaseRef, Result, Update, Worker};
use tokio::sync::{mpsc, oneshot};

/// Updates that wait for their transaction; an attempt beyond that waits with its update in hand.
const WAITING_MAX: usize = 1_024;
/// Updates of one transaction.
const GROUP_MAX: usize = 64;
/// What the members of one transaction have together, unless one update alone has more. The data that they are merged into may have as much again.
const GROUP_BYTES_MAX: usize = 4 << 20;

/// The way to the database. Clones share it.
#[derive(Clone)]
pub(crate) struct Updates(mpsc::Sender<Asked>);

struct Asked {
    update: Update,
    answer: oneshot::Sender<Result<LeaseAnswer>>,
}

impl Updates {
    /// Start writing. It ends once every clone is gone.
    pub(crate) fn start(backend: Arc<dyn Worker>) -> Self {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        tokio::spawn(write_all(backend, receiver));
        Self(sender)
    }

    /// As [`Worker::update_data`].
    pub(crate) async fn update(&self, lease_ref: LeaseRef, members: Vec<u8>) -> Result<LeaseAnswer> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { update: Update { lease_ref, members }, answer };
        self.0.send(asked).await.map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }
}

async fn write_all(backend: Arc<dyn Worker>, mut receiver: mpsc::Receiver<Asked>) {
    let mut left_over: Option<Asked> = None;
    loop {
        let first = match left_over.take() {
            Some(first) => first,
            None => match receiver.recv().await {
                Some(first) => first,
                None => return,
            },
        };
        let mut bytes = first.update.members.len();
        let mut group = vec![first];
        while group.len() < GROUP_MAX
            && let Ok(next) = receiver.try_recv()
        {
            bytes = bytes.saturating_add(next.update.members.len());
            if bytes > GROUP_BYTES_MAX {
                left_over = Some(next);
                break;
            }
            group.push(next);
        }
        // Whoever was stopped meanwhile does not want it any more.
        group.retain(|asked| !asked.answer.is_closed());
        write(backend.as_ref(), group).await;
    }
}

async fn write(backend: &dyn Worker, group: Vec<Asked>) {
    let (updates, answers): (Vec<Update>, Vec<_>) = group.into_iter().map(|asked| (asked.update, asked.answer)).unzip();
    // One alone may go a shorter way, and if one of several cannot be made now, the others are not to blame.
    let written = if updates.len() > 1 { backend.update_many(&updates).await.ok() } else { None };
    if let Some(written) = written {
        for (answer, written) in answers.into_iter().zip(written) {
            // A handler that was stopped meanwhile no longer waits.
            let _ = answer.send(written);
        }
        return;
    }
    for (answer, update) in answers.into_iter().zip(updates) {
        let _ = answer.send(backend.update_data(update.lease_ref, &update.members).await);
    }
}
