//! Types that this host was offered and does not serve. Other hosts may; if none does, the log says so.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use laelaps_queue::Backend;
use tokio::sync::Notify;

use crate::log::chain;
use crate::{reports, serves};

/// What was found out of a type is found out again after this, as long as its tasks are met.
const TELL_INTERVAL: Duration = Duration::from_secs(60);
/// Between two questions to the database.
const PAUSE: Duration = Duration::from_secs(1);
/// Types that are remembered; beyond it the memory starts anew.
const TYPES_MAX: usize = 1_000;

/// Types that were met, each with why this host does not serve it.
#[derive(Debug, Default)]
pub(crate) struct Strangers {
    met: Mutex<Met>,
    some: Notify,
}

#[derive(Debug, Default)]
struct Met {
    /// Yet to be told.
    new: HashMap<String, String>,
    told: HashMap<String, Instant>,
}

impl Strangers {
    /// A task of this type was met.
    pub(crate) fn met(&self, task_type: &str, reason: impl FnOnce() -> String) {
        let mut met = self.lock();
        let is_told = met.told.get(task_type).is_some_and(|told| told.elapsed() < TELL_INTERVAL);
        if !is_told && !met.new.contains_key(task_type) && met.new.len() < TYPES_MAX {
            met.new.insert(task_type.to_owned(), reason());
            self.some.notify_one();
        }
    }

    fn yet_to_tell(&self) -> HashMap<String, String> {
        self.lock().new.clone()
    }

    fn told(&self, types: HashMap<String, String>) {
        let mut met = self.lock();
        if met.told.len() + types.len() > TYPES_MAX {
            met.told.clear();
        }
        let now = Instant::now();
        for task_type in types.into_keys() {
            met.new.remove(&task_type);
            met.told.insert(task_type, now);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Met> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Say of which of these types tasks wait that no live host serves. Where nobody knows who serves a type, which is so on PerfectQueue's table, those
/// tasks are other workers'.
pub(crate) async fn tell_what_nobody_serves(backend: Arc<dyn Backend>, strangers: Arc<Strangers>) {
    loop {
        let types = strangers.yet_to_tell();
        if types.is_empty() {
            strangers.some.notified().await;
            continue;
        }
        match tell(&*backend, &types).await {
            Ok(()) => strangers.told(types),
            Err(error) => {
                tracing::debug!(
                    error = chain(&error),
                    "cannot find out who serves the types that this host does not; trying again"
                );
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn tell(backend: &dyn Backend, types: &HashMap<String, String>) -> laelaps_queue::Result<()> {
    let Some(waiting) = backend.types().await? else {
        types.iter().for_each(|(task_type, reason)| reports::left_to_others(task_type, reason));
        return Ok(());
    };
    let hosts = backend.hosts().await?;
    let waiting = waiting.into_iter().filter(|queued| types.contains_key(&queued.task_type)).collect();
    for queued in serves::unserved(&hosts, waiting) {
        reports::served_by_nobody(&queued, types.get(&queued.task_type).map_or("", String::as_str));
    }
    Ok(())
}
