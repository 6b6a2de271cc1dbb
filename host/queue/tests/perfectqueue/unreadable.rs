//! Rows that Ruby or others have left in a state that nobody can read: each is set aside, and stops no other.

use laelaps_queue::{Claim, Error, Filter, State, TaskId};
use std::time::Duration;

use crate::fixture::{Site, asking, keys, table, task};

/// What somebody may do to a row, and what is said of it.
const DAMAGE: [(&str, &str); 3] = [
    ("UPDATE {t} SET data = CONCAT(x'1f8b', REPEAT('x', 100)) WHERE id = 'bad'", "corrupt gzip"),
    ("UPDATE {t} SET data = CONCAT(x'1f8b', REPEAT('x', 70000)) WHERE id = 'bad'", "corrupt gzip"),
    ("ALTER TABLE {t} MODIFY resource VARBINARY(255); UPDATE {t} SET resource = x'6d2dfc' WHERE id = 'bad'", "not text"),
];

async fn number(site: &Site) -> TaskId {
    let page = site.queue.list(&Filter { states: vec![State::Failed], ..Filter::default() }).await.unwrap();
    assert_eq!(page.tasks.len(), 1);
    assert_eq!(page.tasks[0].key, "bad");
    page.tasks[0].id
}

#[tokio::test]
async fn an_unreadable_row_is_set_aside_and_removable_by_its_number() {
    for (damage, problem) in DAMAGE {
        for (side_table, ignore_users) in [(true, false), (false, true)] {
            let site = Site::with(table(side_table)).await;
            let (host, mut ruby) = (site.host().await, site.ruby().await);
            site.submit(&[task("bad"), task("good")]).await;
            ruby.run_raw(damage).await;
            let site = site.another().await;
            let second = site.host().await;
            assert!(host != second);
            let claim = Claim { ignore_users, ..asking(second, 9) };
            assert_eq!(keys(&site.backend().claim(&claim).await.unwrap().tasks), ["good"]);
            let stats = site.queue.stats().await.unwrap();
            assert_eq!((stats.ready, stats.failed), (0, 1), "{problem}");
            let id = number(&site).await;
            let shown = site.backend().get_by_id(id).await.unwrap().unwrap();
            assert_eq!((shown.id, shown.key.as_str(), shown.state), (id, "bad", State::Failed));
            if side_table || problem != "not text" {
                assert!(shown.unreadable.as_deref().is_some_and(|told| told.contains(problem)), "{:?}", shown.unreadable);
            }
            assert!(shown.error_code.is_some());
            site.backend().cancel_by_id(id, Duration::from_secs(60)).await.unwrap();
            assert!(!site.queue.exists("bad").await.unwrap(), "it is removed at once");
            assert!(matches!(site.backend().cancel_by_id(id, Duration::ZERO).await, Err(Error::NoSuchId(gone)) if gone == id));
            assert!(matches!(site.backend().retry_by_id(id).await, Err(Error::NoSuchId(_))));
            assert!(site.backend().get_by_id(id).await.unwrap().is_none());
        }
    }
}

#[tokio::test]
async fn a_key_that_is_not_text_is_set_aside_like_any_other() {
    for ignore_users in [true, false] {
        let site = Site::new().await;
        let mut ruby = site.ruby().await;
        site.submit(&[task("good")]).await;
        ruby.run_raw(
            "ALTER TABLE {t} MODIFY id VARBINARY(255) NOT NULL;
            INSERT INTO {t} (id, timeout, data, created_at) VALUES (x'6d2dfc', UNIX_TIMESTAMP() - 5, '{}', UNIX_TIMESTAMP())",
        )
        .await;
        let site = site.another().await;
        let host = site.host().await;
        let claim = Claim { ignore_users, ..asking(host, 9) };
        assert_eq!(keys(&site.backend().claim(&claim).await.unwrap().tasks), ["good"]);
        let page = site.queue.list(&Filter { states: vec![State::Failed], ..Filter::default() }).await.unwrap();
        assert_eq!(page.tasks[0].key, "m-\u{fffd}");
        assert!(page.tasks[0].unreadable.as_deref().is_some_and(|told| told.starts_with("the key is not text")));
        site.backend().cancel_by_id(page.tasks[0].id, Duration::ZERO).await.unwrap();
        assert_eq!(ruby.number("SELECT COUNT(*) FROM {t}").await, 1);
    }
}

#[tokio::test]
async fn numbers_beyond_all_range_stop_nothing() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    ruby.run_raw(
        "ALTER TABLE {t} MODIFY timeout BIGINT NOT NULL, MODIFY created_at BIGINT, MODIFY max_running BIGINT, MODIFY owner BIGINT UNSIGNED;
        INSERT INTO {t} (id, timeout, data, created_at, resource, max_running, owner) VALUES
            ('far', 9223372036854775807, '{}', 9223372036854775807, 'u', 9223372036854775807, NULL),
            ('past', -9223372036854775808, '{}', -9223372036854775808, 'u', -9223372036854775808, 18446744073709551615),
            ('ended', 9223372036854775807, '{}', NULL, NULL, NULL, 0),
            ('large', UNIX_TIMESTAMP(), '{}', 9223372036854775807, 'v', 9223372036854775807, 18446744073709551615),
            ('none', UNIX_TIMESTAMP(), '{}', -5, 'w', -5, NULL)",
    )
    .await;
    let site = site.another().await;
    let host = site.host().await;
    site.submit(&[task("good")]).await;
    // Before a claim: one of them removes, as Ruby does, what should have been removed long ago.
    assert_eq!(site.queue.list(&Filter { limit: 100, ..Filter::default() }).await.unwrap().tasks.len(), 6);
    for key in ["far", "past", "ended", "large"] {
        let id = site.get(key).await.id;
        assert_eq!(site.backend().get_by_id(id).await.unwrap().unwrap().key, key);
    }
    let mut claimed = site.claim(host, 9).await;
    claimed.sort_by(|one, other| one.key.cmp(&other.key));
    assert_eq!(keys(&claimed), ["good", "large", "none"]);
    for task in &claimed {
        site.settle(task, laelaps_queue::Event::Retry { delay: None }).await;
    }
    site.queue.stats().await.unwrap();
    assert!(site.queue.list(&Filter { limit: 100, ..Filter::default() }).await.unwrap().tasks.len() >= 5);
}

#[tokio::test]
async fn a_readable_task_is_cancelled_and_retried_by_its_number_too() {
    let site = Site::new().await;
    let host = site.host().await;
    site.submit(&[task("a"), task("b")]).await;
    let id = site.get("a").await.id;
    site.backend().cancel_by_id(id, Duration::from_secs(60)).await.unwrap();
    assert_eq!(site.state("a").await, State::Cancelled);
    assert!(matches!(site.backend().cancel_by_id(id, Duration::ZERO).await, Err(Error::AlreadyEnded { .. })));
    site.backend().retry_by_id(id).await.unwrap();
    assert_eq!(site.claim(host, 9).await.len(), 2);
}
