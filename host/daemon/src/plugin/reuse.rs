//! Instances that wait to serve another attempt (`max_request_per_child`).

use std::collections::VecDeque;

use super::Grants;
use super::instance::Instance;

/// Instances that served well and may serve again, the one used last at the back. Bounded: the one unused for longest makes room.
pub(super) struct Idle {
    instances: VecDeque<(Key, Instance)>,
    instances_max: usize,
}

/// Who may use an instance again: the same route with the same version. That the grants are the same is checked beside it, because a
/// route's number can mean another route once the configuration was read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) route: usize,
    /// The version's order number.
    pub(super) order: u64,
}

impl Idle {
    pub(super) fn new(instances_max: usize) -> Self {
        Self { instances: VecDeque::new(), instances_max }
    }

    /// An instance that fits, the one used last.
    pub(super) fn take(&mut self, key: Key, grants: &Grants) -> Option<Instance> {
        let place = self.instances.iter().rposition(|(known, instance)| *known == key && instance.grants() == grants)?;
        self.instances.remove(place).map(|(_, instance)| instance)
    }

    /// Keep an instance. Answers the one that had to make room, to be dropped outside the lock.
    pub(super) fn put(&mut self, key: Key, instance: Instance) -> Option<Instance> {
        self.instances.push_back((key, instance));
        if self.instances.len() <= self.instances_max { None } else { self.instances.pop_front().map(|(_, instance)| instance) }
    }

    /// Take out all of them.
    pub(super) fn take_all(&mut self) -> Vec<Instance> {
        std::mem::take(&mut self.instances).into_iter().map(|(_, instance)| instance).collect()
    }

    /// Take out all instances of a version.
    pub(super) fn remove(&mut self, order: u64) -> Vec<Instance> {
        let (gone, kept): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.instances).into_iter().partition(|(key, _)| key.order == order);
        self.instances = kept;
        gone.into_iter().map(|(_, instance)| instance).collect()
    }
}
