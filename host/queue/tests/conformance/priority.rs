//! What runs first: the priority within a user, and never at the cost of other users for long.

use std::time::Duration;

use laelaps_queue::{Claim, Error, Event, NewTask, Timestamp};

use crate::fixture::{Fixture, LONG, finish, keys, settled, task, task_of};
use crate::promises;

fn of(priority: i32, task: NewTask) -> NewTask {
    NewTask { priority, ..task }
}

promises! {
    async fn the_smaller_priority_runs_first_and_of_one_the_older(fixture: &Fixture) {
        let host = fixture.host().await;
        for (key, priority) in [("usual", 0), ("last", 100), ("urgent", -100), ("soon", -1), ("later", 1), ("urgent too", -100)] {
            fixture.submit(&[of(priority, task(key))]).await;
            fixture.submit(&[of(priority, task_of("u", &format!("u {key}"), None))]).await;
        }
        let order = ["urgent", "urgent too", "soon", "usual", "later", "last"];
        let claimed = fixture.claim(host, 12).await;
        let (of_u, others): (Vec<&str>, Vec<&str>) = keys(&claimed).into_iter().partition(|key| key.starts_with("u "));
        assert_eq!(others, order);
        assert_eq!(of_u, order.map(|key| format!("u {key}")));
        assert_eq!(fixture.get("soon").await.priority, -1);
    }

    async fn what_enters_before_others_is_claimed_before_them(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&(0..50).map(|number| task(&format!("{number:02}"))).collect::<Vec<_>>()).await;
        assert_eq!(keys(&fixture.claim(host, 2).await), ["00", "01"]);
        fixture.submit(&[of(-5, task("urgent")), of(5, task("idle"))]).await;
        assert_eq!(keys(&fixture.claim(host, 2).await), ["urgent", "02"]);
        // Given back, it keeps its place; tried again, it stands where its priority says.
        fixture.submit(&[of(-6, task("given back"))]).await;
        let given_back = fixture.claim(host, 1).await;
        fixture.backend().settle(&[settled(&given_back[0], Event::Stopped)]).await.unwrap();
        fixture.submit(&[of(-6, task("behind"))]).await;
        assert_eq!(keys(&fixture.claim(host, 1).await), ["given back"]);
        let behind = fixture.claim(host, 1).await;
        fixture.backend().settle(&[settled(&behind[0], Event::Retry { delay: Some(Duration::ZERO) })]).await.unwrap();
        assert_eq!(keys(&fixture.claim(host, 2).await), ["behind", "03"]);
    }

    async fn it_is_kept_while_a_task_waits_for_its_time_or_gets_a_new_life(fixture: &Fixture) {
        let host = fixture.host().await;
        let soon = Timestamp(fixture.backend().now().await.unwrap().0 + 50);
        fixture.submit(&[task("usual"), NewTask { run_at: Some(soon), ..of(-3, task("scheduled")) }]).await;
        fixture.submit(&[of(-2, task("held")).on_hold(), of(-1, task("cancelled"))]).await;
        fixture.queue.cancel("cancelled").await.unwrap();
        fixture.queue.retry("cancelled").await.unwrap();
        assert!(fixture.queue.release_held("held").await.unwrap());
        fixture.passes(soon).await;
        assert_eq!(keys(&fixture.claim(host, 4).await), ["scheduled", "held", "cancelled", "usual"]);
    }

    async fn without_regard_to_users_it_decides_between_all(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a"), task_of("u", "b", None), of(-7, task_of("v", "c", Some(1))), of(7, task("d"))]).await;
        fixture.submit(&[of(-8, task_of("v", "e", Some(1)))]).await;
        let claim = Claim { ignore_users: true, ..Claim::new(host, 9, LONG) };
        let claimed = fixture.backend().claim(&claim).await.unwrap().tasks;
        assert_eq!(keys(&claimed), ["e", "c", "a", "b", "d"]);
    }

    async fn a_user_with_urgent_work_does_not_shut_others_out(fixture: &Fixture) {
        let host = fixture.host().await;
        let urgent = |number| of(-100, task_of("urgent", &format!("urgent {number:03}"), None));
        fixture.submit(&(0..300).map(urgent).collect::<Vec<_>>()).await;
        fixture.submit(&(0..10).map(|number| of(100, task_of("patient", &format!("patient {number}"), None))).collect::<Vec<_>>()).await;
        let mut passes = 0;
        for _ in 0..200 {
            let claimed = fixture.claim(host, 1).await;
            if claimed[0].user.as_deref() == Some("patient") {
                break;
            }
            passes += 1;
            fixture.backend().settle(&[settled(&claimed[0], finish())]).await.unwrap();
        }
        assert!(passes <= 64 + 8 * 2, "passed over {passes} times");
    }

    async fn the_longest_wait_is_told_whatever_its_priority(fixture: &Fixture) {
        fixture.submit(&[of(100, task("old")), of(100, task_of("u", "old too", None))]).await;
        let submitted = fixture.get("old").await.run_at;
        fixture.passes(Timestamp(submitted.0 + 30)).await;
        fixture.submit(&[of(-100, task("new")), of(-100, task_of("u", "new too", None))]).await;
        let before = fixture.backend().now().await.unwrap();
        let oldest = fixture.queue.stats().await.unwrap().oldest_ready_ms.unwrap();
        assert!(oldest >= u64::try_from(before.0 - submitted.0).unwrap(), "{oldest}");
    }

    async fn out_of_its_bounds_it_is_refused(fixture: &Fixture) {
        for (priority, key) in [(-101, "below"), (101, "above"), (i32::MIN, "least"), (i32::MAX, "most")] {
            let refused = fixture.backend().submit(&[of(priority, task(key))]).await.unwrap_err();
            let Error::InvalidTask { problem, .. } = refused else { panic!("{refused:?}") };
            assert_eq!(problem, format!("priority is {priority}; -100 to 100 are allowed"));
            assert!(!fixture.queue.exists(key).await.unwrap());
        }
    }
}
