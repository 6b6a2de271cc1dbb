//! Users with a limit: how many of their tasks a claim hands out at most, and that the end of one lets the next begin at once.

use std::time::Duration;

use laelaps_queue::{Claim, ClaimedTask, Event, HostId, NewTask};

use crate::fixture::{Fixture, LONG, PATIENCE, finish, keys, settled, task, task_of};
use crate::promises;

async fn claim_limited(fixture: &Fixture, host: HostId, limit: u32, limited: Option<u32>) -> Vec<ClaimedTask> {
    let claim = Claim { limited, ..Claim::new(host, limit, LONG) };
    fixture.backend().claim(&claim).await.unwrap().tasks
}

fn of_limited(tasks: &[ClaimedTask]) -> usize {
    tasks.iter().filter(|task| task.user.is_some() && task.max_running.is_some()).count()
}

fn backlog(user: &str, max_running: Option<u32>, count: usize) -> Vec<NewTask> {
    (0..count).map(|number| task_of(user, &format!("{user}{number}"), max_running)).collect()
}

/// Use up the hints that earlier operations have left.
async fn deaf_to_the_past(fixture: &Fixture) {
    while tokio::time::timeout(Duration::from_millis(1), fixture.queue.wakeup()).await.is_ok() {}
}

promises! {
    async fn a_claim_takes_no_more_tasks_of_limited_users_than_it_says(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(20), 20)).await;
        fixture.submit(&backlog("b", Some(20), 20)).await;
        fixture.submit(&backlog("free", None, 10)).await;
        fixture.submit_some("nobody", 10).await;
        let claimed = claim_limited(fixture, host, 12, Some(3)).await;
        assert_eq!((claimed.len(), of_limited(&claimed)), (12, 3), "{:?}", keys(&claimed));
        let rest = claim_limited(fixture, host, 50, Some(0)).await;
        assert_eq!((rest.len(), of_limited(&rest)), (11, 0), "{:?}", keys(&rest));
        let limited = claim_limited(fixture, host, 50, None).await;
        assert_eq!((limited.len(), of_limited(&limited)), (37, 37));
    }

    async fn what_is_left_out_of_a_claim_holds_back_nobody_else(fixture: &Fixture) {
        let (one, two) = (fixture.host().await, fixture.host().await);
        // More limited users than a claim looks at, all before those without a limit.
        let mut tasks: Vec<NewTask> = Vec::new();
        for user in 0..40 {
            tasks.extend(backlog(&format!("u{user}-"), Some(5), 2));
        }
        fixture.submit(&tasks).await;
        fixture.submit(&backlog("free", None, 5)).await;
        let first = claim_limited(fixture, one, 10, Some(2)).await;
        assert_eq!((first.len(), of_limited(&first)), (7, 2), "{:?}", keys(&first));
        let second = claim_limited(fixture, two, 100, Some(100)).await;
        assert_eq!(second.len(), 78);
    }

    async fn tasks_of_limited_users_come_in_the_fair_order_still(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(4), 8)).await;
        fixture.submit(&backlog("b", Some(2), 8)).await;
        let claimed = claim_limited(fixture, host, 10, Some(3)).await;
        assert_eq!(keys(&claimed), ["a0", "a1", "b0"]);
    }

    async fn a_task_without_user_has_no_limit_whatever_it_says(fixture: &Fixture) {
        let host = fixture.host().await;
        let tasks: Vec<NewTask> = (0..6).map(|number| NewTask { max_running: Some(1), ..task(&number.to_string()) }).collect();
        fixture.submit(&tasks).await;
        fixture.submit(&backlog("a", Some(1), 1)).await;
        assert_eq!(claim_limited(fixture, host, 50, Some(0)).await.len(), 6);
    }

    async fn the_end_of_a_limited_users_task_wakes_the_claim(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(1), 4)).await;
        for (round, event) in [finish(), Event::Retry { delay: Some(LONG) }, finish()].into_iter().enumerate() {
            let claimed = claim_limited(fixture, host, 9, Some(9)).await;
            assert_eq!(keys(&claimed), [format!("a{round}")]);
            deaf_to_the_past(fixture).await;
            fixture.backend().settle(&[settled(&claimed[0], event)]).await.unwrap();
            let woken = tokio::time::timeout(PATIENCE, fixture.queue.wakeup()).await;
            assert!(woken.is_ok(), "the claim is not told that {} has ended", claimed[0].key);
        }
    }

    async fn a_limited_users_task_that_is_cancelled_while_it_runs_wakes_the_claim(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&backlog("a", Some(1), 2)).await;
        assert_eq!(claim_limited(fixture, host, 9, None).await.len(), 1);
        deaf_to_the_past(fixture).await;
        fixture.queue.cancel("a0").await.unwrap();
        assert!(tokio::time::timeout(PATIENCE, fixture.queue.wakeup()).await.is_ok());
        assert_eq!(keys(&claim_limited(fixture, host, 9, None).await), ["a1"]);
    }
}
