//! Signs of life in the database, where hosts are told from dead ones by nothing else.

use std::time::Duration;

use laelaps_queue::{Claim, Error, HostId, LeaseAnswer, Sign, State};

use crate::fixture::{Database, Fixture, LONG, finish, keys, settled};
use crate::promises;

const TIMEOUT: Duration = Duration::from_secs(10);

/// Whether this database keeps signs. On SQLite a lock beside the file tells who lives.
async fn are_kept(fixture: &Fixture, host: HostId) -> bool {
    let given = fixture.backend().give_sign(host, TIMEOUT).await;
    if matches!(fixture.database, Database::Sqlite) {
        assert!(matches!(given, Err(Error::NotSupported { .. })), "{given:?}");
        assert_eq!(fixture.backend().signs().await.unwrap(), []);
        return false;
    }
    given.unwrap();
    true
}

async fn signs(fixture: &Fixture) -> Vec<Sign> {
    fixture.backend().signs().await.unwrap()
}

async fn is_struck_off(fixture: &Fixture, host: HostId) -> bool {
    let claim = Claim::new(host, 1, LONG);
    let (given, claimed) = (fixture.backend().give_sign(host, TIMEOUT).await, fixture.backend().claim(&claim).await);
    let unknown = |error: &Error| matches!(error, Error::UnknownHost(unknown) if *unknown == host);
    let (gives_none, claims_none) = (given.as_ref().is_err_and(unknown), claimed.as_ref().is_err_and(unknown));
    assert_eq!(gives_none, claims_none, "{given:?}, {claimed:?}");
    gives_none
}

promises! {
    async fn each_sign_of_life_is_another_one_and_none_outlives_its_host(fixture: &Fixture) {
        let (one, other, mute) = (fixture.host_as("one").await, fixture.host_as("other").await, fixture.host_as("mute").await);
        if !are_kept(fixture, one).await {
            return;
        }
        fixture.backend().give_sign(other, 2 * TIMEOUT).await.unwrap();
        let before = signs(fixture).await;
        let told = |sign: &Sign| (sign.host, sign.identity.clone().unwrap(), sign.timeout);
        let expected = [(one, "one".to_owned(), TIMEOUT), (other, "other".to_owned(), 2 * TIMEOUT)];
        assert_eq!(before.iter().map(told).collect::<Vec<_>>(), expected, "{mute:?} gives none");
        fixture.backend().give_sign(one, TIMEOUT).await.unwrap();
        // The host reads its configuration again.
        fixture.backend().give_sign(other, TIMEOUT).await.unwrap();
        let after = signs(fixture).await;
        assert!(before.iter().zip(&after).all(|(before, after)| before.count != after.count), "{before:?}, {after:?}");
        assert_eq!(after[1].timeout, TIMEOUT);
        // In good order, by hand of a watchdog, and with what it holds.
        fixture.submit_some("a", 1).await;
        assert_eq!(fixture.claim(one, 1).await.len(), 1);
        fixture.backend().unregister_host(one).await.unwrap();
        fixture.backend().hand_on(&["other".to_owned()], &fixture.config.policy).await.unwrap();
        assert_eq!(signs(fixture).await, []);
        assert!(is_struck_off(fixture, one).await && is_struck_off(fixture, other).await);
        assert_eq!(signs(fixture).await, [], "a late sign does not bring it back");
    }

    async fn only_hosts_without_another_sign_are_marked_dead_and_lose_what_they_hold(fixture: &Fixture) {
        let (silent, lively) = (fixture.host_as("silent").await, fixture.host_as("lively").await);
        if !are_kept(fixture, silent).await {
            return;
        }
        fixture.backend().give_sign(lively, TIMEOUT).await.unwrap();
        fixture.submit_some("a", 4).await;
        let (of_silent, of_lively) = (fixture.claim(silent, 2).await, fixture.claim(lively, 2).await);
        let seen = signs(fixture).await;
        fixture.backend().give_sign(lively, TIMEOUT).await.unwrap();
        assert_eq!(fixture.backend().mark_dead(&seen).await.unwrap(), [silent]);
        assert_eq!(signs(fixture).await.iter().map(|sign| sign.host).collect::<Vec<_>>(), [lively]);
        // Another one that saw the same is told the same.
        assert_eq!(fixture.backend().mark_dead(&seen).await.unwrap(), [silent]);
        assert!(is_struck_off(fixture, silent).await && !is_struck_off(fixture, lively).await);
        // Whoever marked it may die before it hands on anything: any host takes it back, long before the leases end.
        let reclaimed = fixture.backend().reclaim(&fixture.config.policy).await.unwrap();
        let mut lost: Vec<&str> = reclaimed.tasks.iter().map(|lost| lost.key.as_str()).collect();
        lost.sort_unstable();
        assert_eq!(lost, keys(&of_silent));
        let outcomes = [settled(&of_silent[0], finish()), settled(&of_lively[0], finish())];
        let answers = fixture.backend().settle(&outcomes).await.unwrap();
        assert_eq!(answers, [LeaseAnswer::Lost, LeaseAnswer::Held]);
        assert_eq!(fixture.state(&of_silent[0].key).await, State::Waiting);
    }
}
