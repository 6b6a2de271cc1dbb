//! Large backlogs, and many tasks that have ended, held against few: a time alone would say how busy the machine is.

use std::time::Duration;

use laelaps_queue::{Filter, State};

use crate::fill;
use crate::site::{Site, Turn, medians_of};

/// A tenth of what `tests/bench storage` shows.
const WAITING: usize = 500_000;
const WAITING_FEW: usize = 10_000;
const USERS: usize = 1_000;
const ENDED: usize = 500_000;
/// Enough for the removals.
const ENDED_FEW: usize = 12_000;
const REMOVED: u32 = 1_000;
const CLAIMS: usize = 51;
const LOOKS: usize = 11;
/// Five times what was promised: within 2 x at any size.
const TIMES_MAX: u32 = 10;
/// What takes no longer is quick whatever it takes with few: five times a claim in fair order as promised, and the bounds of the bench.
const CLAIM_MAX: Duration = Duration::from_millis(25);
const LOOK_MAX: Duration = Duration::from_millis(50);
const REMOVE_MAX: Duration = Duration::from_millis(200);

/// Holds the time with many against the time with few.
fn assert_alike(what: &str, (of_few, of_many): (Duration, Duration), quick: Duration) {
    let bound = (of_few * TIMES_MAX).max(quick);
    assert!(of_many <= bound, "{what}: {of_few:?} with few, {of_many:?} with many");
}

pub(crate) async fn a_claim_costs_the_same_at_any_backlog(turn: &Turn) {
    let (few, many) = (turn.site().await, turn.site().await);
    fill::waiting(&few.url, 0..WAITING_FEW, USERS).await;
    fill::waiting(&many.url, 0..WAITING, USERS).await;
    for ignore_users in [true, false] {
        let (of_few, of_many) = (few.claim_of(10, ignore_users).await, many.claim_of(10, ignore_users).await);
        let claims = medians_of(
            CLAIMS,
            async || assert_eq!(few.claim(&of_few).await.len(), 10),
            async || assert_eq!(many.claim(&of_many).await.len(), 10),
        );
        assert_alike(if ignore_users { "a plain claim" } else { "a fair claim" }, claims.await, CLAIM_MAX);
    }
}

pub(crate) async fn many_ended_tasks_slow_nothing_down(turn: &Turn) {
    let (few, many) = (turn.site().await, turn.site().await);
    for (site, ended) in [(&few, ENDED_FEW), (&many, ENDED)] {
        fill::finished(&site.url, ended).await;
        fill::waiting(&site.url, 0..1_000, 0).await;
    }
    for states in [vec![], vec![State::Finished], vec![State::Waiting], vec![State::Failed]] {
        let filter = Filter { states, limit: 100, ..Filter::default() };
        let list = async |site: &Site| drop(site.queue.list(&filter).await.unwrap());
        let lists = medians_of(LOOKS, async || list(&few).await, async || list(&many).await).await;
        assert_alike(&format!("a list of {:?} beside ended tasks", filter.states), lists, LOOK_MAX);
    }
    let stats = async |site: &Site| assert_eq!(site.queue.stats().await.unwrap().ready, 1_000);
    let looks = medians_of(LOOKS, async || stats(&few).await, async || stats(&many).await).await;
    assert_alike("stats beside ended tasks", looks, LOOK_MAX);
    let remove = async |site: &Site| assert!(site.queue.backend().clean_up(REMOVED).await.unwrap() > 0);
    let removals = medians_of(LOOKS, async || remove(&few).await, async || remove(&many).await).await;
    assert_alike("a removal of 1,000 ended tasks", removals, REMOVE_MAX);
}
