//! The lock that all workers of the table share.

use std::time::{Duration, Instant};

use laelaps_queue::{Claim, HostId};
use laelaps_test_databases::{LONG as PATIENCE_MAX, PATIENCE, eventually};

use crate::fixture::{Site, asking, keys, task};
use crate::ruby::Ruby;

/// How long a claim waits for the lock (src/perfectqueue/claim.rs).
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How often a test looks at such a claim if the machine is so busy that it waits no longer when the test gets to it.
const TRIES: usize = 20;

/// Wait until a session waits for the lock.
pub(crate) async fn somebody_waits(ruby: &mut Ruby) {
    let waiting = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND info LIKE 'SELECT GET_LOCK%'";
    eventually(PATIENCE, "a session waits for the lock", async || {
        if ruby.number(waiting).await > 0 { Ok(()) } else { Err("none waits".to_owned()) }
    })
    .await;
}

async fn is_free(ruby: &mut Ruby) {
    eventually(PATIENCE, "the lock is given back", async || {
        if ruby.number("SELECT IS_FREE_LOCK('{lock}')").await == 1 { Ok(()) } else { Err("it is held".to_owned()) }
    })
    .await;
}

#[tokio::test]
async fn a_claim_waits_for_whoever_acquires() {
    for _ in 0..TRIES {
        let site = Site::new().await;
        let (host, mut ruby, mut watcher) = (site.host().await, site.ruby().await, site.ruby().await);
        site.submit(&[task("a")]).await;
        assert!(ruby.lock().await);
        let begun = Instant::now();
        let backend = std::sync::Arc::clone(site.backend());
        let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
        somebody_waits(&mut watcher).await;
        let waits = !claiming.is_finished();
        ruby.unlock().await;
        let claimed = claiming.await.unwrap().unwrap().tasks;
        is_free(&mut watcher).await;
        if begun.elapsed() < LOCK_WAIT || !claimed.is_empty() {
            assert!(waits);
            assert_eq!(keys(&claimed), ["a"]);
            return;
        }
    }
    panic!("each of {TRIES} claims had waited for {LOCK_WAIT:?} before the lock was given back");
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
    eventually(
        PATIENCE,
        "the pause ends",
        async || {
            if site.claim(host, 1).await.is_empty() { Err("no task".to_owned()) } else { Ok(()) }
        },
    )
    .await;
}

/// Whether a claim was cancelled while it waited for the lock, which somebody holds. If the machine is busy, its wait may be over before.
async fn a_waiting_claim_is_cancelled(site: &Site, host: HostId, watcher: &mut Ruby) -> bool {
    let backend = std::sync::Arc::clone(site.backend());
    let begun = Instant::now();
    let claiming = tokio::spawn(async move { backend.claim(&asking(host, 1)).await });
    somebody_waits(watcher).await;
    claiming.abort();
    match claiming.await {
        Err(ended) => {
            assert!(ended.is_cancelled(), "{ended}");
            true
        }
        Ok(claimed) => {
            assert!(begun.elapsed() >= LOCK_WAIT && claimed.unwrap().tasks.is_empty());
            false
        }
    }
}

#[tokio::test]
async fn a_claim_that_is_cancelled_while_it_waits_does_not_stall_the_fleet() {
    let mut tries = 0..TRIES;
    let (site, host, mut ruby, mut watcher) = loop {
        tries.next().expect("a claim is cancelled while it waits");
        let site = Site::new().await;
        let (host, mut ruby, mut watcher) = (site.host().await, site.ruby().await, site.ruby().await);
        site.submit(&[task("a"), task("b")]).await;
        assert!(ruby.lock().await);
        if a_waiting_claim_is_cancelled(&site, host, &mut watcher).await {
            break (site, host, ruby, watcher);
        }
    };
    let other = site.another().await;
    let second = other.host().await;
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
    let mut killed = 0;
    // Again if a busy machine never met a claim that held the lock.
    for round in 0..TRIES {
        site.submit(&(0..200).map(|n| task(&format!("a{round}-{n:03}"))).collect::<Vec<_>>()).await;
        let backend = std::sync::Arc::clone(site.backend());
        let claiming = tokio::spawn(tokio::time::timeout(PATIENCE_MAX, async move {
            let mut claimed = 0;
            while claimed < 200 {
                claimed += backend.claim(&asking(host, 5)).await.unwrap().tasks.len();
            }
            claimed
        }));
        while !claiming.is_finished() {
            let holder = ruby.number("SELECT COALESCE(IS_USED_LOCK('{lock}'), 0)").await;
            if holder > 0 && killed < 20 {
                // It may be gone by now.
                ruby.run_or_not(&format!("KILL {holder}")).await;
                killed += 1;
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(claiming.await.unwrap(), Ok(200), "what a broken claim took is handed back");
        is_free(&mut ruby).await;
        if killed > 0 {
            return;
        }
    }
    panic!("no connection was killed that held the lock");
}
