//! Follow-ups that attempts of this host have submitted and that the database does not have yet, counted by their root: attempts that run at
//! the same moment, or whose settlements wait to be written, would not see each other's otherwise.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use laelaps_queue::TaskId;

/// The counts of a host. Cheap to clone. It has an entry for each root with such a follow-up, at most one for each attempt that is not settled.
#[derive(Clone, Default)]
pub(crate) struct Unstored(Arc<Mutex<HashMap<TaskId, u32>>>);

impl Unstored {
    /// The part of an attempt whose task comes from this root.
    pub(crate) fn share(&self, root: TaskId) -> Arc<Share> {
        Arc::new(Share { unstored: self.clone(), root, own: AtomicU32::new(0) })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one attempt has submitted.
pub(crate) struct Share {
    unstored: Unstored,
    root: TaskId,
    own: AtomicU32,
}

impl Share {
    /// Count one more, unless attempts of this host have `most` of the root already.
    pub(crate) fn count(&self, most: u32) -> bool {
        let mut counts = self.unstored.lock();
        let counted = counts.get(&self.root).copied().unwrap_or(0);
        if counted >= most {
            return false;
        }
        counts.insert(self.root, counted.saturating_add(1));
        self.own.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn release(&self) {
        // Most attempts submit nothing, and all of the host share the lock. Who counts at this moment releases when it is dropped.
        if self.own.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut counts = self.unstored.lock();
        let own = self.own.swap(0, Ordering::Relaxed);
        if let Some(counted) = counts.get_mut(&self.root) {
            *counted = counted.saturating_sub(own);
            if *counted == 0 {
                counts.remove(&self.root);
            }
        }
    }
}

/// What a guest counts after its attempt was answered for goes with the guest.
impl Drop for Share {
    fn drop(&mut self) {
        self.release();
    }
}

/// Goes with the settlement, once it is written or given up: then the database counts what there is to count.
pub(crate) struct UntilStored(Arc<Share>);

impl UntilStored {
    pub(crate) fn new(share: Arc<Share>) -> Self {
        Self(share)
    }
}

impl Drop for UntilStored {
    fn drop(&mut self) {
        self.0.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_of_one_root_share_its_room_until_their_settlements_are_stored() {
        let unstored = Unstored::default();
        let (one, two, other) = (unstored.share(TaskId(1)), unstored.share(TaskId(1)), unstored.share(TaskId(2)));
        assert!(one.count(3) && two.count(3) && one.count(3));
        assert!(!one.count(3) && !two.count(3), "three are all");
        assert!(other.count(1), "another root has room of its own");
        let until = UntilStored::new(Arc::clone(&one));
        drop(until);
        assert!(two.count(2) && !two.count(2), "the first one's are stored, and counted by the database");
        // Somebody keeps the share, as an instance that waits for its next attempt does.
        assert!(one.count(3));
        drop((one, two));
        assert_eq!(unstored.lock().len(), 1, "only the other root's");
        drop(other);
        assert!(unstored.lock().is_empty());
    }

    #[test]
    fn nothing_is_counted_where_there_is_no_room() {
        let unstored = Unstored::default();
        assert!(!unstored.share(TaskId(1)).count(0));
        assert!(unstored.lock().is_empty());
    }
}
