//! The claims of this process whose tasks are under way. The row of a claim is there so that its tasks are looked at when their leases can have
//! ended; one whose tasks are all settled here need not be looked at, and goes with the next look for lost tasks.

use std::collections::HashMap;

use super::claim::LEASES_OF_CLAIM;
use crate::{ClaimedTask, Lease};

/// Claims of which is kept how many of their tasks are not settled yet; the rows of others go when they are looked at.
const KEPT_MAX: usize = 100_000;

/// Claims, each with how many of its tasks are not settled.
#[derive(Debug, Default)]
pub(super) struct Claims {
    open: HashMap<i64, usize>,
    over: Vec<i64>,
}

impl Claims {
    /// Tasks were claimed, in one claim.
    pub(super) fn taken(&mut self, tasks: &[ClaimedTask]) {
        if let Some(first) = tasks.first()
            && self.open.len() < KEPT_MAX
        {
            self.open.insert(first.lease_ref.lease.0 / LEASES_OF_CLAIM, tasks.len());
        }
    }

    /// Attempts were settled under leases that held.
    pub(super) fn settled(&mut self, leases: impl Iterator<Item = Lease>) {
        for lease in leases {
            let claim = lease.0 / LEASES_OF_CLAIM;
            let Some(left) = self.open.get_mut(&claim) else { continue };
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.open.remove(&claim);
                if self.over.len() < KEPT_MAX {
                    self.over.push(claim);
                }
            }
        }
    }

    /// Those that are over and whose rows can go.
    pub(super) fn take_over(&mut self) -> Vec<i64> {
        std::mem::take(&mut self.over)
    }
}
