//! Two processes at one row, in an order that the test decides: the statements of one wait at a gate.

use std::time::Duration;

use laelaps_queue::{Beat, Claim, ClaimedTask, Config, Connections, Event, LeaseAnswer, Progress, Queue, State, Tls};
use laelaps_test_databases::gate::{Gate, Protocol};
use laelaps_test_databases::{PATIENCE, eventually};

use crate::fixture::{LONG, Site, asking, finish, table, task};

/// The same table as another process opens it, through a gate.
async fn gated(site: &Site) -> (Gate, Site) {
    let (before, name) = site.config.url.rsplit_once('/').unwrap();
    let (before, port) = before.rsplit_once(':').unwrap();
    let gate = Gate::before(port.parse().unwrap(), Protocol::MySql).await;
    let connections = Connections { tls: Some(Tls::Disabled), ..site.config.connections.clone() };
    let url = format!("{before}:{}/{name}", gate.port());
    let config = Config { url, connections, ..site.config.clone() };
    let queue = Queue::open(&config).await.unwrap();
    (gate, Site { config, queue })
}

/// Let statements go until one that contains these words was answered and the next one waits.
async fn let_go_through(gate: &Gate, words: &str) {
    let next_waits = || {
        eventually(PATIENCE, "a statement waits at the gate", async || {
            if gate.is_waited_at() && gate.in_flight().is_empty() { Ok(()) } else { Err(format!("{:?}", gate.in_flight())) }
        })
    };
    loop {
        next_waits().await;
        if gate.let_one_go().is_some_and(|statement| statement.contains(words)) {
            return next_waits().await;
        }
    }
}

/// Claim through a gate, and do something else after the statement with these words.
async fn while_claiming(site: &Site, words: &str, meanwhile: impl AsyncFnOnce()) -> Vec<ClaimedTask> {
    let (gate, other) = gated(site).await;
    let claim = Claim { limit: 9, ..asking(other.host().await, 9) };
    gate.shut();
    let backend = std::sync::Arc::clone(other.backend());
    let claiming = tokio::spawn(async move { backend.claim(&claim).await.unwrap().tasks });
    let_go_through(&gate, words).await;
    meanwhile().await;
    gate.open();
    claiming.await.unwrap()
}

/// Cancel task `a` while a process stands at its gate after the statement with these words; open the gate once that is done, or has to wait for it.
async fn cancelled_after(site: &Site, gate: &Gate, words: &str) {
    let_go_through(gate, words).await;
    let queue = site.queue.clone();
    let cancelling = tokio::spawn(async move { queue.cancel("a").await });
    let mut ruby = site.ruby().await;
    let waiting = format!(
        "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT' AND trx_query LIKE '%{}%'",
        site.table()
    );
    eventually(PATIENCE, "it is cancelled, or waits", async || {
        if cancelling.is_finished() || ruby.number(&waiting).await > 0 { Ok(()) } else { Err("neither".to_owned()) }
    })
    .await;
    gate.open();
    cancelling.await.unwrap().unwrap();
}

/// Task `a`, whose lease has ended.
async fn lost(site: &Site) -> (laelaps_queue::HostId, ClaimedTask) {
    let host = site.host().await;
    site.submit(&[task("a")]).await;
    let lost = site.claim_for(host, 1, Duration::from_millis(100)).await.remove(0);
    site.passes(lost.until).await;
    (host, lost)
}

const NOTES_ARE_READ: &str = "SELECT s.id, s.created_at";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_cancelled_while_its_loss_is_counted_stays_cancelled() {
    let site = Site::new().await;
    lost(&site).await;
    let claimed = while_claiming(&site, NOTES_ARE_READ, async || site.queue.cancel("a").await.unwrap()).await;
    assert!(claimed.is_empty());
    assert_eq!(site.state("a").await, State::Cancelled);
    assert_eq!(site.backend().audit().await.unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loss_that_is_taken_back_while_it_is_counted_does_not_count() {
    let site = Site::new().await;
    let (host, stale) = lost(&site).await;
    let excuse = async || assert_eq!(site.backend().excuse(host, &[stale.lease_ref]).await.unwrap(), 0);
    let claimed = while_claiming(&site, NOTES_ARE_READ, excuse).await;
    assert_eq!((claimed.len(), claimed[0].lost), (1, 0));
    assert_eq!(site.get("a").await.lost, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreadable_task_that_is_cancelled_before_it_is_set_aside_is_only_cancelled() {
    let site = Site::new().await;
    let mut ruby = site.ruby().await;
    site.submit(&[task("a")]).await;
    ruby.run("UPDATE {t} SET data = CONCAT(x'1f8b', 'oops')").await;
    let rows_are_read = "SELECT t.id, CAST(t.timeout AS SIGNED), CAST(t.created_at AS SIGNED)";
    let claimed = while_claiming(&site, rows_are_read, async || site.queue.cancel("a").await.unwrap()).await;
    assert!(claimed.is_empty());
    let cancelled = site.get("a").await;
    assert_eq!((cancelled.state, cancelled.error_code), (State::Cancelled, None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_cancelled_while_it_reports_its_progress_stays_cancelled() {
    let site = Site::new().await;
    let (gate, other) = gated(&site).await;
    site.submit(&[task("a")]).await;
    let claimed = other.claim(other.host().await, 1).await.remove(0);
    gate.shut();
    let progress = Some(Progress { done: 1, total: None, note: String::new() });
    let beat = Beat { lease_ref: claimed.lease_ref, alive_time: LONG, progress };
    let backend = std::sync::Arc::clone(other.backend());
    let reporting = tokio::spawn(async move { backend.heartbeat(&[beat]).await.unwrap() });
    cancelled_after(&site, &gate, NOTES_ARE_READ).await;
    reporting.await.unwrap();
    assert_eq!(site.state("a").await, State::Cancelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_is_cancelled_while_its_host_takes_a_loss_back_stays_cancelled() {
    let site = Site::new().await;
    let (gate, other) = gated(&site).await;
    let (host, stale) = lost(&other).await;
    gate.shut();
    let backend = std::sync::Arc::clone(other.backend());
    let excusing = tokio::spawn(async move { backend.excuse(host, &[stale.lease_ref]).await.unwrap() });
    cancelled_after(&site, &gate, "SELECT t.id, CAST(t.created_at AS SIGNED), CAST(t.owner AS UNSIGNED)").await;
    excusing.await.unwrap();
    assert_eq!(site.state("a").await, State::Cancelled);
}

/// The connection ends after the server has committed and before it says so; the queue tries again by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_settlement_whose_answer_is_lost_counts_as_held() {
    for side_table in [true, false] {
        let site = Site::with(table(side_table)).await;
        let (gate, other) = gated(&site).await;
        let host = other.host().await;
        for event in [finish(), Event::Retry { delay: None }, Event::Release { delay: Some(LONG) }, Event::Stopped] {
            site.submit(&[task("a")]).await;
            let claimed = other.claim(host, 1).await.remove(0);
            let swallowed = gate.swallowed();
            let words = if side_table || event != finish() { "COMMIT" } else { "UPDATE" };
            gate.swallow(Some(words));
            let backend = std::sync::Arc::clone(other.backend());
            let settlement = crate::fixture::settled(&claimed, event.clone());
            let settling = tokio::spawn(async move { backend.settle(&[settlement]).await.unwrap() });
            eventually(PATIENCE, "an answer is lost", async || {
                if gate.swallowed() > swallowed { Ok(()) } else { Err("none yet".to_owned()) }
            })
            .await;
            gate.swallow(None);
            assert_eq!(settling.await.unwrap(), [LeaseAnswer::Held], "{event:?}, side table: {side_table}");
            assert!(site.get("a").await.attempts <= 1, "it is counted once");
            let forget = if side_table { "DELETE FROM {t}; DELETE FROM {s}" } else { "DELETE FROM {t}" };
            site.ruby().await.run_raw(forget).await;
        }
    }
}
