//! What this process claimed together and has not settled yet, so that the last settlement of a claim can take the claim's row away.
//!
//! Only a saving: a claim whose tasks end elsewhere keeps its row until somebody looks at it.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Lease;

/// Leases remembered at once; beyond that all is forgotten, and the rows go when they are looked at.
const LEASES_MAX: usize = 200_000;

#[derive(Debug, Default)]
pub(super) struct Held(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    claims: HashMap<Lease, i64>,
    unsettled: HashMap<i64, usize>,
    /// Nothing is left of them, but their rows stand.
    over: Vec<i64>,
}

/// Claims whose rows can go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Over {
    /// Now.
    pub(super) now: Vec<i64>,
    /// If all of the settlements are held.
    pub(super) then: Vec<i64>,
}

impl Held {
    /// These were claimed together.
    pub(super) fn claimed(&self, claim: i64, leases: impl ExactSizeIterator<Item = Lease>) {
        if leases.len() == 0 {
            return;
        }
        let mut state = self.lock();
        if state.claims.len() + leases.len() > LEASES_MAX {
            *state = State::default();
        }
        state.unsettled.insert(claim, leases.len());
        state.claims.extend(leases.map(|lease| (lease, claim)));
    }

    /// The claims of which nothing is left if these are settled.
    pub(super) fn settling(&self, leases: &HashSet<Lease>) -> Over {
        let mut state = self.lock();
        let mut settled: HashMap<i64, usize> = HashMap::new();
        for claim in leases.iter().filter_map(|lease| state.claims.get(lease)) {
            *settled.entry(*claim).or_default() += 1;
        }
        let then = settled.into_iter().filter(|(claim, count)| state.unsettled.get(claim) == Some(count));
        let then = then.map(|(claim, _)| claim).collect();
        Over { now: std::mem::take(&mut state.over), then }
    }

    /// These were settled under leases that held; `gone` went with them.
    pub(super) fn settled(&self, leases: impl Iterator<Item = Lease>, gone: &[i64]) {
        let mut state = self.lock();
        for lease in leases {
            let Some(claim) = state.claims.remove(&lease) else { continue };
            let Some(unsettled) = state.unsettled.get_mut(&claim) else { continue };
            *unsettled -= 1;
            if *unsettled == 0 {
                state.unsettled.remove(&claim);
                if !gone.contains(&claim) {
                    state.over.push(claim);
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leases(numbers: &[i64]) -> HashSet<Lease> {
        numbers.iter().map(|number| Lease(*number)).collect()
    }

    #[test]
    fn a_claim_is_over_with_its_last_settlement() {
        let held = Held::default();
        held.claimed(7, [Lease(1), Lease(2), Lease(3)].into_iter());
        assert_eq!(held.settling(&leases(&[1, 3, 9])), Over::default());
        held.settled([Lease(1), Lease(3)].into_iter(), &[]);
        assert_eq!(held.settling(&leases(&[2])), Over { now: vec![], then: vec![7] });
        held.settled([Lease(2)].into_iter(), &[7]);
        assert_eq!(held.settling(&leases(&[2])), Over::default());
    }

    #[test]
    fn a_claim_of_which_one_was_lost_is_left_to_who_looks_at_it() {
        let held = Held::default();
        held.claimed(7, [Lease(1), Lease(2)].into_iter());
        held.settled([Lease(1)].into_iter(), &[]);
        assert_eq!(held.settling(&leases(&[1])), Over::default());
    }

    #[test]
    fn what_two_settlements_ended_together_goes_with_the_next() {
        let held = Held::default();
        held.claimed(7, [Lease(1), Lease(2)].into_iter());
        assert_eq!((held.settling(&leases(&[1])), held.settling(&leases(&[2]))), (Over::default(), Over::default()));
        held.settled([Lease(1)].into_iter(), &[]);
        held.settled([Lease(2)].into_iter(), &[]);
        assert_eq!(held.settling(&leases(&[8])), Over { now: vec![7], then: vec![] });
    }
}
