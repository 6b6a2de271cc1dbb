//! Tasks by number: what names a task whose key nobody can write.

use std::time::Duration;

use laelaps_queue::{Error, State, TaskId};

use crate::fixture::{Fixture, LONG, finish, settled, task};
use crate::promises;

const NOWHERE: TaskId = TaskId(987_654_321);

promises! {
    async fn a_task_is_found_by_its_number(fixture: &Fixture) {
        fixture.submit(&[task("a"), task("b")]).await;
        let by_key = fixture.get("b").await;
        let by_id = fixture.backend().get_by_id(by_key.id).await.unwrap().unwrap();
        assert_eq!((by_id.key.as_str(), by_id.state, by_id.unreadable), ("b", State::Waiting, None));
        assert_eq!((by_id.data, by_id.task_type), (by_key.data, by_key.task_type));
        assert!(fixture.backend().get_by_id(NOWHERE).await.unwrap().is_none());
    }

    async fn a_task_is_cancelled_by_its_number_whether_it_waits_or_runs(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("waits"), task("runs")]).await;
        let waits = fixture.get("waits").await.id;
        fixture.backend().cancel_by_id(waits, LONG).await.unwrap();
        assert_eq!(fixture.state("waits").await, State::Cancelled);
        let claimed = fixture.claim(host, 9).await.remove(0);
        fixture.backend().cancel_by_id(claimed.lease_ref.task, LONG).await.unwrap();
        assert_eq!(fixture.state("runs").await, State::Cancelled);
        let stale = fixture.backend().settle(&[settled(&claimed, finish())]).await.unwrap();
        assert_eq!(stale, [laelaps_queue::LeaseAnswer::Lost]);
        let again = fixture.backend().cancel_by_id(waits, LONG).await.unwrap_err();
        assert!(matches!(again, Error::AlreadyEnded { ref key, state: State::Cancelled } if key == "waits"), "{again:?}");
    }

    async fn a_task_is_retried_by_its_number(fixture: &Fixture) {
        let host = fixture.host().await;
        fixture.submit(&[task("a")]).await;
        let id = fixture.get("a").await.id;
        fixture.queue.cancel("a").await.unwrap();
        fixture.backend().retry_by_id(id).await.unwrap();
        assert_eq!(fixture.state("a").await, State::Waiting);
        let claimed = fixture.claim(host, 9).await;
        assert_eq!(claimed.len(), 1);
        let running = fixture.backend().retry_by_id(id).await.unwrap_err();
        assert!(matches!(running, Error::WrongState { state: State::Running, .. }), "{running:?}");
    }

    async fn a_number_that_no_task_has_is_told_so(fixture: &Fixture) {
        let errors = [
            fixture.backend().cancel_by_id(NOWHERE, Duration::ZERO).await.unwrap_err(),
            fixture.backend().retry_by_id(NOWHERE).await.unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, Error::NoSuchId(NOWHERE)), "{error:?}");
            assert!(error.is_about_the_request() && !error.is_retryable() && error.hint().is_some());
        }
    }
}
