//! What users get over thousands of picks, read from the order of claims.

use std::ops::RangeInclusive;

use laelaps_queue::{ClaimedTask, HostId, NewTask, Settlement};

use crate::fixture::{Fixture, finish, settled, task_of};
use crate::promises;

/// Users who always have more to do, and slots that are filled again in every round.
struct Rush<'f> {
    fixture: &'f Fixture,
    host: HostId,
    /// The `max_running` of each user.
    limits: Vec<u32>,
    slots: usize,
    /// For how many rounds a task runs.
    lasts: RangeInclusive<u32>,
    random: fastrand::Rng,
    submitted: usize,
    /// What runs, and for how many rounds more.
    running: Vec<(u32, ClaimedTask)>,
    /// The users, in the order in which their tasks were claimed.
    picks: Vec<usize>,
    /// The slots that each user had, summed over the rounds.
    held: Vec<usize>,
}

impl<'f> Rush<'f> {
    async fn begin(fixture: &'f Fixture, limits: Vec<u32>, slots: usize, lasts: RangeInclusive<u32>) -> Self {
        let host = fixture.host().await;
        let held = vec![0; limits.len()];
        let random = fastrand::Rng::with_seed(7);
        Self { fixture, host, limits, slots, lasts, random, submitted: 0, running: Vec::new(), picks: Vec::new(), held }
    }

    async fn submit(&mut self, users: impl Iterator<Item = usize>) {
        let tasks: Vec<NewTask> = users
            .map(|user| {
                self.submitted += 1;
                task_of(&user.to_string(), &self.submitted.to_string(), Some(self.limits[user]))
            })
            .collect();
        self.fixture.submit(&tasks).await;
    }

    async fn backlog(&mut self, of_each: usize) {
        let users = self.limits.len();
        self.submit((0..users * of_each).map(|number| number % users)).await;
    }

    /// Fill the slots, and finish what has run for long enough; its user has another task to do.
    async fn round(&mut self) {
        let free = u32::try_from(self.slots - self.running.len()).unwrap();
        // A claim is for one task at least.
        let claimed = if free == 0 { Vec::new() } else { self.fixture.claim(self.host, free).await };
        for task in claimed {
            self.picks.push(user(&task));
            self.running.push((self.random.u32(self.lasts.clone()), task));
        }
        assert_eq!(self.running.len(), self.slots, "no slot stays free while there is work");
        for (_, task) in &self.running {
            self.held[user(task)] += 1;
        }
        let (over, on): (Vec<_>, Vec<_>) = std::mem::take(&mut self.running).into_iter().partition(|(rounds, _)| *rounds <= 1);
        self.running = on.into_iter().map(|(rounds, task)| (rounds - 1, task)).collect();
        let group: Vec<Settlement> = over.iter().map(|(_, task)| settled(task, finish())).collect();
        self.fixture.backend().settle(&group).await.unwrap();
        self.submit(over.iter().map(|(_, task)| user(task))).await;
    }

    /// What a user would have of this many if it could be divided at will.
    fn due(&self, user: usize, of: usize) -> f64 {
        f64::from(self.limits[user]) * of as f64 / f64::from(self.limits.iter().sum::<u32>())
    }
}

fn user(task: &ClaimedTask) -> usize {
    task.user.as_ref().unwrap().parse().unwrap()
}

promises! {
    async fn users_who_always_have_work_share_in_proportion_to_their_max_running(fixture: &Fixture) {
        // Four slots for each user, on the average; of 48 these are due 2 to 6 each.
        let limits = [20, 60, 30, 50, 40, 50, 20, 40, 50, 30, 40, 50].to_vec();
        let mut rush = Rush::begin(fixture, limits, 48, 3..=5).await;
        rush.backlog(20).await;
        while rush.picks.len() < 3_000 {
            rush.round().await;
        }
        for user in 0..rush.limits.len() {
            let picks = rush.picks.iter().filter(|pick| **pick == user).count() as f64;
            let due = rush.due(user, rush.picks.len());
            assert!((picks / due - 1.0).abs() <= 0.1, "{} was picked {picks} times, {due} were due", rush.limits[user]);
        }
    }

    async fn a_share_that_is_no_whole_number_of_slots_is_rounded_by_less_than_one(fixture: &Fixture) {
        let limits = [20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42].to_vec();
        let mut rush = Rush::begin(fixture, limits, 48, 3..=5).await;
        rush.backlog(20).await;
        let rounds = 60;
        for _ in 0..rounds {
            rush.round().await;
        }
        for user in 0..rush.limits.len() {
            let (held, due) = (rush.held[user] as f64 / f64::from(rounds), rush.due(user, rush.slots));
            assert!((held - due).abs() < 1.0, "{} had {held} slots, {due} were due", rush.limits[user]);
        }
    }

    async fn with_more_users_than_slots_everybody_is_served_within_the_bound(fixture: &Fixture) {
        const USERS: usize = 200;
        let limits = (0..USERS).map(|user| u32::try_from(user % 8).unwrap() + 1).collect();
        let mut rush = Rush::begin(fixture, limits, 8, 1..=1).await;
        rush.backlog(8).await;
        let bound = 100 + 8 * USERS;
        while rush.picks.len() < 2 * bound {
            rush.round().await;
        }
        for user in 0..USERS {
            let mut last = 0;
            for (pick, _) in rush.picks.iter().enumerate().filter(|(_, picked)| **picked == user) {
                assert!(pick - last <= bound, "{user} was passed over from pick {last} to {pick}");
                last = pick;
            }
            assert!(rush.picks.len() - last <= bound, "{user} was picked last at {last}");
        }
    }
}
