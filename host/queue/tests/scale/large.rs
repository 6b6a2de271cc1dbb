//! Large backlogs, and many tasks that have ended.

use std::time::Duration;

use laelaps_queue::{Filter, State};

use crate::fill;
use crate::site::{Site, Turn, median_of};

/// A tenth of what `tests/bench storage` shows.
const WAITING: usize = 500_000;
const WAITING_FEW: usize = 10_000;
const USERS: usize = 1_000;
const ENDED: usize = 500_000;
const CLAIMS: usize = 51;
/// Five times what was promised: at any backlog within 2 x, fair order within 5 ms.
const TIMES_MAX: u32 = 10;
const CLAIM_MAX: Duration = Duration::from_millis(25);
/// Five times the bounds of the bench.
const LOOK_MAX: Duration = Duration::from_millis(250);
const REMOVE_MAX: Duration = Duration::from_secs(1);

pub(crate) async fn a_claim_costs_the_same_at_any_backlog(turn: &Turn) {
    let (few, many) = (turn.site().await, turn.site().await);
    fill::waiting(&few.url, 0..WAITING_FEW, USERS).await;
    fill::waiting(&many.url, 0..WAITING, USERS).await;
    for ignore_users in [true, false] {
        let of_few = claims(&few, ignore_users).await;
        let of_many = claims(&many, ignore_users).await;
        let order = if ignore_users { "plain" } else { "fair" };
        let bound = (of_few * TIMES_MAX).max(CLAIM_MAX);
        assert!(of_many <= bound, "{order}: {of_few:?} at {WAITING_FEW} waiting, {of_many:?} at {WAITING}");
    }
}

/// The median time of a claim of ten.
async fn claims(site: &Site, ignore_users: bool) -> Duration {
    let claim = site.claim_of(10, ignore_users).await;
    median_of(CLAIMS, async || assert_eq!(site.claim(&claim).await.len(), 10)).await
}

pub(crate) async fn many_ended_tasks_slow_nothing_down(turn: &Turn) {
    let site = turn.site().await;
    fill::finished(&site.url, ENDED).await;
    fill::waiting(&site.url, 0..1_000, 0).await;
    for states in [vec![], vec![State::Finished], vec![State::Waiting], vec![State::Failed]] {
        let filter = Filter { states, limit: 100, ..Filter::default() };
        let took = median_of(11, async || drop(site.queue.list(&filter).await.unwrap())).await;
        assert!(took <= LOOK_MAX, "a list of {:?} took {took:?} beside {ENDED} ended tasks", filter.states);
    }
    let took = median_of(11, async || assert_eq!(site.queue.stats().await.unwrap().ready, 1_000)).await;
    assert!(took <= LOOK_MAX, "stats took {took:?} beside {ENDED} ended tasks");
    let took = median_of(11, async || assert!(site.queue.backend().clean_up(1_000).await.unwrap() > 0)).await;
    assert!(took <= REMOVE_MAX, "a removal of 1,000 of {ENDED} ended tasks took {took:?}");
}
