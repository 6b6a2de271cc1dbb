//! Claimed tasks that have not begun: bounded by number and by what their data holds in memory.

use std::collections::VecDeque;

use super::Held;

/// With this much data in the buffer nothing is claimed beyond the free processors. One claim brings at most 64 MiB, so that a buffer comes to
/// no more than both together.
const BYTES_MAX: u64 = 32 << 20;

/// The tasks of a host that wait for a processor. Those of users with a limit stand first: each keeps back others of its user, on all hosts.
#[derive(Default)]
pub(super) struct Buffer {
    tasks: VecDeque<Box<Held>>,
    /// How many of the first have such a user.
    limited: usize,
    bytes: u64,
}

impl Buffer {
    pub(super) fn push(&mut self, held: Box<Held>) {
        self.bytes += held.task.data.len() as u64;
        if is_limited(&held.task) {
            self.tasks.insert(self.limited, held);
            self.limited += 1;
        } else {
            self.tasks.push_back(held);
        }
    }

    pub(super) fn pop(&mut self) -> Option<Box<Held>> {
        let held = self.tasks.pop_front()?;
        self.limited = self.limited.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(held.task.data.len() as u64);
        Some(held)
    }

    pub(super) fn take_all(&mut self) -> VecDeque<Box<Held>> {
        std::mem::take(self).tasks
    }

    pub(super) fn len(&self) -> usize {
        self.tasks.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Whether there is a task whose user has a limit.
    pub(super) fn has_limited(&self) -> bool {
        self.limited > 0
    }

    /// Whether its data is as much as the host holds ahead of need.
    pub(super) fn is_heavy(&self) -> bool {
        self.bytes >= BYTES_MAX
    }
}

/// Whether the task's user has a limit on tasks that run at once.
pub(super) fn is_limited(task: &laelaps_queue::ClaimedTask) -> bool {
    task.max_running.is_some() && task.user.as_ref().is_some_and(|user| !user.is_empty())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Instant;

    use laelaps_queue::{ClaimedTask, Compression, Descent, Lease, LeaseRef, TaskId, Timestamp};

    use super::*;
    use crate::plugin::Control;
    use crate::plugin::usage::{Purpose, Share};

    fn held(number: i64, max_running: Option<u32>, bytes: usize) -> Box<Held> {
        let task = ClaimedTask {
            lease_ref: LeaseRef { task: TaskId(number), lease: Lease(number) },
            key: number.to_string(),
            task_type: "t".to_owned(),
            data: vec![b' '; bytes],
            queue: "default".to_owned(),
            user: Some("ann".to_owned()),
            max_running,
            descent: Descent { root: TaskId(number), depth: 0 },
            compression: Compression::None,
            attempt: 1,
            max_attempts: None,
            lost: 0,
            lost_alone: 0,
            alone: false,
            releases: 0,
            created_at: Timestamp(0),
            claimed_at: Timestamp(0),
            until: Timestamp(0),
        };
        let data = Some(Share::new(Purpose::Data, 0));
        Box::new(Held { task, key: "k".into(), control: Arc::new(Control::new()), data, claimed_at: Instant::now(), place: None })
    }

    fn numbers(buffer: &mut Buffer) -> Vec<i64> {
        std::iter::from_fn(|| buffer.pop()).map(|held| held.task.lease_ref.task.0).collect()
    }

    #[test]
    fn tasks_of_users_with_a_limit_begin_first_in_their_order() {
        let mut buffer = Buffer::default();
        for (number, max_running) in [(1, None), (2, Some(1)), (3, None), (4, Some(2))] {
            buffer.push(held(number, max_running, 0));
        }
        assert!(buffer.has_limited());
        assert_eq!(buffer.pop().unwrap().task.lease_ref.task.0, 2);
        buffer.push(held(5, Some(1), 0));
        assert_eq!(numbers(&mut buffer), [4, 5, 1, 3]);
        assert!(buffer.is_empty() && !buffer.has_limited());
    }

    #[test]
    fn a_buffer_is_heavy_by_its_data_until_enough_has_begun() {
        let mut buffer = Buffer::default();
        for number in 0..3 {
            assert!(!buffer.is_heavy());
            buffer.push(held(number, None, 11 << 20));
        }
        assert!(buffer.is_heavy());
        buffer.pop();
        assert!(!buffer.is_heavy());
        assert_eq!(buffer.take_all().len(), 2);
        assert!(!buffer.is_heavy() && buffer.is_empty());
    }
}
