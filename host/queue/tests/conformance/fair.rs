//! The order between users, through the database.

use std::collections::BTreeMap;

use laelaps_queue::{Claim, ClaimedTask, Event, NewTask, Settlement};

use crate::fixture::{Fixture, LONG, finish, keys, settled, task, task_of};
use crate::promises;

fn users(tasks: &[ClaimedTask]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for task in tasks {
        *counts.entry(task.user.clone().unwrap_or_default()).or_default() += 1;
    }
    counts
}

fn backlog(user: &str, max_running: Option<u32>, count: usize) -> Vec<NewTask> {
    (0..count).map(|number| task_of(user, &format!("{user}{number}"), max_running)).collect()
}

async fn settle_all(fixture: &Fixture, tasks: &[ClaimedTask], event: &Event) {
    let group: Vec<Settlement> = tasks.iter().map(|task| settled(task, event.clone())).collect();
    fixture.backend().settle(&group).await.unwrap();
}

promises! {
    async fn users_share_a_batch_in_proportion_to_their_max_running(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(40), 100)).await;
        fixture.submit(&backlog("b", Some(20), 100)).await;
        fixture.submit(&backlog("c", Some(10), 100)).await;
        let claimed = fixture.claim(host, 35).await;
        assert_eq!(users(&claimed), [("a".to_owned(), 20), ("b".to_owned(), 10), ("c".to_owned(), 5)].into());
    }

    async fn a_flood_does_not_shut_others_out(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("flood", None, 1_000)).await;
        fixture.submit(&backlog("late", None, 3)).await;
        let claimed = fixture.claim(host, 6).await;
        assert_eq!(users(&claimed), [("flood".to_owned(), 3), ("late".to_owned(), 3)].into());
    }

    async fn max_running_holds_within_a_batch_and_between_hosts(fixture: &Fixture) {
        let (one, two) = (fixture.host().await, fixture.host().await);
        fixture.submit(&backlog("a", Some(3), 20)).await;
        fixture.submit(&backlog("b", Some(2), 20)).await;
        let first = fixture.claim(one, 4).await;
        let second = fixture.claim(two, 50).await;
        assert_eq!((first.len(), second.len()), (4, 1));
        assert!(fixture.claim(one, 50).await.is_empty(), "buffered tasks count as running");
        settle_all(fixture, &first[..1], &finish()).await;
        let freed = fixture.claim(two, 50).await;
        assert_eq!(users(&freed), users(&first[..1]));
    }

    async fn hosts_that_claim_at_once_never_overshoot(fixture: &Fixture) {
        let mut hosts = Vec::new();
        for _ in 0..6 {
            hosts.push(fixture.host().await);
        }
        fixture.submit(&backlog("a", Some(5), 200)).await;
        fixture.submit(&backlog("b", Some(1), 200)).await;
        let claims = hosts.into_iter().map(|host| {
            let backend = std::sync::Arc::clone(fixture.backend());
            tokio::spawn(async move {
                let claim = Claim::new(host, 4, LONG);
                backend.claim(&claim).await.unwrap().tasks
            })
        });
        let mut all = Vec::new();
        for claim in claims.collect::<Vec<_>>() {
            all.append(&mut claim.await.unwrap());
        }
        assert_eq!(users(&all), [("a".to_owned(), 5), ("b".to_owned(), 1)].into());
    }

    async fn a_max_running_of_zero_starts_only_while_nothing_runs(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(0), 3)).await;
        let first = fixture.claim(host, 9).await;
        assert_eq!(keys(&first), ["a0"]);
        assert!(fixture.claim(host, 9).await.is_empty());
        settle_all(fixture, &first, &finish()).await;
        assert_eq!(keys(&fixture.claim(host, 9).await), ["a1"]);
    }

    async fn the_candidates_own_max_running_is_the_limit_through_the_database(fixture: &Fixture) {
        let host = fixture.host().await;
        let limits = [2, 2, 9, 9, 9, 1, 9];
        let tasks: Vec<NewTask> =
            limits.iter().enumerate().map(|(number, limit)| task_of("a", &number.to_string(), Some(*limit))).collect();
        fixture.submit(&tasks).await;
        let claimed = fixture.claim(host, 50).await;
        assert_eq!(keys(&claimed), ["0", "1", "2", "3", "4"], "the sixth waits until none of its user runs");
        settle_all(fixture, &claimed, &finish()).await;
        assert_eq!(keys(&fixture.claim(host, 50).await), ["5", "6"]);
    }

    async fn differing_limits_still_fill_the_batch(fixture: &Fixture) {
        let host = fixture.host().await;
        for user in ["a", "b", "c"] {
            let tasks: Vec<NewTask> =
                (0..30).map(|number| task_of(user, &format!("{user}{number}"), Some(1 + number * 5))).collect();
            fixture.submit(&tasks).await;
        }
        assert_eq!(fixture.claim(host, 60).await.len(), 60);
    }

    async fn tasks_without_user_are_not_held_back(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..50).map(|number| NewTask { max_running: Some(1), ..task(&number.to_string()) }).collect();
        fixture.submit(&tasks).await;
        assert_eq!(fixture.claim(host, 50).await.len(), 50);
    }

    async fn without_looking_at_users_tasks_come_by_age_alone(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..30)
            .map(|number| match number % 3 {
                0 => task(&number.to_string()),
                1 => task_of("a", &number.to_string(), Some(1)),
                _ => task_of("b", &number.to_string(), Some(0)),
            })
            .collect();
        fixture.submit(&tasks).await;
        let claim = Claim { ignore_users: true, ..Claim::new(host, 20, LONG) };
        let claimed = fixture.backend().claim(&claim).await.unwrap().tasks;
        let expected: Vec<String> = (0..20).map(|number| number.to_string()).collect();
        assert_eq!(keys(&claimed), expected);
    }

    async fn no_user_is_passed_over_for_longer_than_the_bound(fixture: &Fixture) {
        let host = fixture.host().await;
        // By weight alone, a user of so great a max_running would be picked for ever.
        fixture.submit(&backlog("great", Some(1_000_000), 400)).await;
        fixture.submit(&backlog("small", Some(1), 3)).await;
        fixture.submit(&[task("nobody's")]).await;
        let mut picks = Vec::new();
        while picks.len() < 300 {
            let claimed = fixture.claim(host, 7).await;
            picks.extend(claimed.iter().map(|task| task.user.clone().unwrap_or_default()));
            settle_all(fixture, &claimed, &finish()).await;
        }
        let bound = 100 + 8 * 3;
        let first = |user: &str| picks.iter().position(|pick| pick == user).unwrap();
        assert!(first("small") <= bound && first("") <= bound, "small at {}, nobody's at {}", first("small"), first(""));
        let second = picks.iter().skip(first("small") + 1).position(|pick| pick == "small").unwrap();
        assert!(second <= bound, "again after {second}");
    }

    async fn a_release_gives_the_users_place_back(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(1), 2)).await;
        let first = fixture.claim(host, 9).await;
        settle_all(fixture, &first, &Event::Stopped).await;
        assert_eq!(fixture.claim(host, 9).await.len(), 1);
    }

    async fn users_come_and_go_without_a_trace(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..500).map(|number| task_of(&format!("u{number}"), &number.to_string(), Some(1))).collect();
        fixture.submit(&tasks).await;
        let claimed = fixture.claim(host, 500).await;
        assert_eq!(claimed.len(), 500);
        settle_all(fixture, &claimed, &finish()).await;
        // The audit that follows every promise finds no idle account.
    }
}
