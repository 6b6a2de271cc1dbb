//! How a page of a list is found at a bounded cost, whatever else stands in the table.
//!
//! Pages are in the order of tasks' numbers, and no index leads from a state, a type or a user to them. So the tasks next in line are looked at
//! first, which fills a page wherever much is wanted. Where little is, it may stand in places of its own: those are read as far as they are short.
//! Beyond that so many tasks more are looked at, and a page may then be short, or empty, and say where the next one goes on.

use std::collections::BTreeSet;

use async_trait::async_trait;

/// Tasks next in line that are looked at first, unless the page takes more.
const NEAR: usize = 200;
/// Those that are looked at behind them.
const AHEAD: usize = 5_000;
/// Tasks that a place may have to be read.
pub(crate) const PLACE_MAX: usize = 5_000;
/// Tasks of places that are looked at together.
const TOGETHER: usize = 1_000;

/// How a database looks for tasks.
#[async_trait]
pub(crate) trait Look: Send {
    type Error;

    /// The next `most` tasks behind a number, by number, each with whether it is wanted.
    async fn ahead(&mut self, after: i64, most: usize) -> Result<Vec<(i64, bool)>, Self::Error>;

    /// Where everything stands that is wanted; None if it may stand anywhere.
    async fn places(&mut self, after: i64) -> Result<Option<Places>, Self::Error>;

    /// Those of some tasks that are wanted, by number.
    async fn wanted(&mut self, tasks: &[i64]) -> Result<Vec<i64>, Self::Error>;
}

/// Numbers of tasks, of each place one more than [`PLACE_MAX`] at most.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// In no order.
    pub(crate) unsorted: Vec<i64>,
    /// Places that are in the order of numbers, from behind the number that was asked for.
    pub(crate) sorted: Vec<Vec<i64>>,
}

/// What a page was looked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// The numbers of its tasks: one more than it takes, if there are more.
    pub(crate) tasks: Vec<i64>,
    /// How far was looked, if that is not the end and they are not more than the page takes.
    pub(crate) looked: Option<i64>,
}

/// Find the tasks of a page of at most `limit` behind a number.
pub(crate) async fn page<L: Look>(look: &mut L, after: i64, limit: usize) -> Result<Found, L::Error> {
    let wanted = limit + 1;
    let mut walk = Walk { at: after, tasks: Vec::new(), wanted };
    if walk.ahead(look, wanted.max(NEAR)).await? {
        return Ok(walk.found(None));
    }
    if let Some(places) = look.places(walk.at).await?
        && places.unsorted.len() <= PLACE_MAX
    {
        // Of a place that has more it is not known what stands behind.
        let cut = places.sorted.iter().filter(|place| place.len() > PLACE_MAX).filter_map(|place| place.last().copied()).min();
        let at = walk.at;
        let tasks = places.unsorted.into_iter().chain(places.sorted.into_iter().flatten());
        let tasks: BTreeSet<i64> = tasks.filter(|task| *task > at && cut.is_none_or(|cut| *task <= cut)).collect();
        for tasks in tasks.into_iter().collect::<Vec<_>>().chunks(TOGETHER) {
            walk.tasks.extend(look.wanted(tasks).await?);
            if walk.is_full() {
                break;
            }
        }
        return Ok(walk.found(cut));
    }
    let ended = walk.ahead(look, AHEAD).await?;
    let at = walk.at;
    Ok(walk.found((!ended).then_some(at)))
}

/// A way through tasks by their numbers.
struct Walk {
    at: i64,
    tasks: Vec<i64>,
    wanted: usize,
}

impl Walk {
    fn is_full(&self) -> bool {
        self.tasks.len() >= self.wanted
    }

    /// Look at so many more. Answers whether that is enough: the page is full, or there are no more.
    async fn ahead<L: Look>(&mut self, look: &mut L, most: usize) -> Result<bool, L::Error> {
        let seen = look.ahead(self.at, most).await?;
        self.at = seen.last().map_or(self.at, |(task, _)| *task);
        self.tasks.extend(seen.iter().filter(|(_, is_wanted)| *is_wanted).map(|(task, _)| *task));
        Ok(self.is_full() || seen.len() < most)
    }

    fn found(mut self, looked: Option<i64>) -> Found {
        let looked = looked.filter(|_| !self.is_full());
        self.tasks.truncate(self.wanted);
        Found { tasks: self.tasks, looked }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tasks 1 to `last`, of which every `every`th is wanted, or stands in places.
    struct Table {
        last: i64,
        every: i64,
        places: Option<(usize, usize)>,
        looked_at: usize,
    }

    #[async_trait]
    impl Look for Table {
        type Error = ();

        async fn ahead(&mut self, after: i64, most: usize) -> Result<Vec<(i64, bool)>, ()> {
            let seen: Vec<(i64, bool)> = (after + 1..=self.last).take(most).map(|task| (task, task % self.every == 0)).collect();
            self.looked_at += seen.len();
            Ok(seen)
        }

        async fn places(&mut self, after: i64) -> Result<Option<Places>, ()> {
            let Some((unsorted, sorted)) = self.places else { return Ok(None) };
            let all: Vec<i64> = (1..=self.last).filter(|task| task % self.every == 0).collect();
            let unsorted: Vec<i64> = all.iter().rev().copied().take(unsorted.min(PLACE_MAX + 1)).collect();
            let sorted = all.iter().copied().take(sorted).filter(|task| *task > after).take(PLACE_MAX + 1).collect();
            Ok(Some(Places { unsorted, sorted: vec![sorted] }))
        }

        async fn wanted(&mut self, tasks: &[i64]) -> Result<Vec<i64>, ()> {
            self.looked_at += tasks.len();
            Ok(tasks.iter().copied().filter(|task| task % self.every == 0).collect())
        }
    }

    /// All pages of a table: what was found, and the most that one looked at.
    async fn all_pages(mut table: Table, limit: usize) -> (usize, usize) {
        let (mut after, mut found, mut most) = (0, Vec::<i64>::new(), 0);
        loop {
            table.looked_at = 0;
            let mut page = page(&mut table, after, limit).await.unwrap();
            most = most.max(table.looked_at);
            let more = page.tasks.len() > limit;
            page.tasks.truncate(limit);
            found.extend(&page.tasks);
            let next = if more { page.tasks.last().copied() } else { page.looked };
            match next {
                Some(next) => after = next,
                None => break,
            }
        }
        assert!(found.is_sorted_by(|one, next| one < next));
        (found.len(), most)
    }

    #[tokio::test]
    async fn pages_leave_nothing_out_and_look_at_a_bounded_number() {
        let table = |last, every, places| Table { last, every, places, looked_at: 0 };
        assert_eq!(all_pages(table(0, 1, None), 10).await, (0, 0));
        assert_eq!(all_pages(table(100_000, 1, None), 1_000).await, (100_000, 1_001));
        assert_eq!(all_pages(table(100_000, 25_000, None), 10).await, (4, NEAR + AHEAD));
        // What stands in places is found there at once, if they are short.
        assert_eq!(all_pages(table(100_000, 25_000, Some((4, 4))), 10).await, (4, NEAR + 4));
        let (found, most) = all_pages(table(100_000, 3, Some((usize::MAX, 0))), 5_000).await;
        assert_eq!(found, 33_333);
        assert!(most <= 5_001 + AHEAD, "{most}");
        // Of a long place that is in order as much as was read.
        let (found, most) = all_pages(table(200_000, 2, Some((0, usize::MAX))), 30_000).await;
        assert_eq!(found, 100_000);
        assert!(most <= 30_001 + PLACE_MAX + 1, "{most}");
    }
}
