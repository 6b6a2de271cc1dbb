//! The lock that all workers of the table share.

use std::time::{Duration, Instant};

use laelaps_queue::Claim;

use crate::fixture::{Site, asking, keys, task};
use crate::ruby::Ruby;

/// Wait until somebody waits for the lock.
pub(crate) async fn somebody_waits(ruby: &mut Ruby) {
    let waiting = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE 'SELECT GET_LOCK%'";
    let started = Instant::now();
    while ruby.number(waiting).await == 0 {
        assert!(started.elapsed() < Duration::from_secs(30), "nobody waits for the lock");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn is_free(ruby: &mut Ruby) {
    let started = Instant::now();
    while ruby.number("SELECT IS_FREE_LOCK('{lock}')").await != 1 {
        assert!(started.elapsed() < Duration::from_secs(30), "the lock is not given back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_claim_waits_for_whoever_acquires() {
    let site = Site::new().await;
    let (host, mut ruby, mut watcher) = (site.host().await, site.ruby().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    assert!(ruby.lock().await);
    let backend = std::sync::Arc::clone(site.backend());
    let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
    somebody_waits(&mut watcher).await;
    assert!(!claiming.is_finished());
    ruby.unlock().await;
    assert_eq!(keys(&claiming.await.unwrap().unwrap().tasks), ["a"]);
    is_free(&mut watcher).await;
}

#[tokio::test]
async fn a_lock_that_is_kept_for_long_ends_the_claim_without_tasks() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&[task("a")]).await;
    assert!(ruby.lock().await);
    assert!(site.claim(host, 1).await.is_empty(), "after the ten seconds that PerfectQueue waits");
    assert!(site.claim(host, 1).await.is_empty(), "and at once while it pauses");
    ruby.unlock().await;
    let started = Instant::now();
    while site.claim(host, 1).await.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(30), "the pause ends");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_claim_that_is_cancelled_while_it_waits_does_not_stall_the_fleet() {
    let site = Site::new().await;
    let other = site.another().await;
    let (host, second, mut ruby, mut watcher) = (site.host().await, other.host().await, site.ruby().await, site.ruby().await);
    site.submit(&[task("a"), task("b")]).await;
    assert!(ruby.lock().await);
    let backend = std::sync::Arc::clone(site.backend());
    let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
    somebody_waits(&mut watcher).await;
    claiming.abort();
    assert!(claiming.await.unwrap_err().is_cancelled());
    ruby.unlock().await;
    // The connection that waited is closed: whatever it got of the lock is free, for Ruby and for us.
    is_free(&mut watcher).await;
    assert_eq!(ruby.acquire_fair(300, 1).await, ["a"]);
    assert_eq!(keys(&other.claim(second, 9).await), ["b"]);
    assert!(site.claim(host, 9).await.is_empty());
}

#[tokio::test]
async fn claims_that_are_cancelled_anywhere_leave_the_lock_free() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&(0..50).map(|n| task(&format!("a{n:02}"))).collect::<Vec<_>>()).await;
    for ignore_users in [true, false] {
        for patience in 0..40 {
            let claim = Claim { ignore_users, ..asking(host, 1) };
            // Whether it answers in time is open.
            let _ = tokio::time::timeout(Duration::from_micros(patience * 150), site.backend().claim(&claim)).await;
        }
        is_free(&mut ruby).await;
    }
}

#[tokio::test]
async fn a_connection_that_is_killed_with_the_lock_frees_it() {
    let site = Site::new().await;
    let (host, mut ruby) = (site.host().await, site.ruby().await);
    site.submit(&(0..200).map(|n| task(&format!("a{n:03}"))).collect::<Vec<_>>()).await;
    let backend = std::sync::Arc::clone(site.backend());
    let claiming = tokio::spawn(async move {
        let mut claimed = 0;
        while claimed < 200 {
            claimed += backend.claim(&asking(host, 5)).await.unwrap().tasks.len();
        }
        claimed
    });
    let mut killed = 0;
    while !claiming.is_finished() {
        let holder = ruby.number("SELECT COALESCE(IS_USED_LOCK('{lock}'), 0)").await;
        if holder > 0 && killed < 20 {
            // It may be gone by now.
            ruby.run_or_not(&format!("KILL {holder}")).await;
            killed += 1;
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(claiming.await.unwrap(), 200, "what a broken claim took is handed back");
    assert!(killed > 0);
    is_free(&mut ruby).await;
}
