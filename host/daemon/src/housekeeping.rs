//! What a host does beside its own tasks for as long as it serves: taking back what was lost, removing what is old, telling what it serves.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{Backend, HostId, Policy, Worker};
use tokio::sync::Notify;

use crate::config::Config;
use crate::leases::Leases;
use crate::log::chain;
use crate::plugin;
use crate::versions::Versions;

/// Between two looks for dead hosts, ended leases, and plugin versions under quarantine.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Looks in a row that this host may leave to others, because it has not heard about its own leases.
const PASSED_OVER_MAX: u32 = 10;
/// Between two looks whether another program has moved the schema on: one small query.
const SCHEMA_INTERVAL: Duration = Duration::from_secs(10);
/// After what a host serves could not be noted.
const TELL_AGAIN: Duration = Duration::from_secs(10);
/// Tasks whose retention has ended are removed after `cleanup_interval` fruitful claims, and at the latest after this time.
const CLEAN_UP_INTERVAL: Duration = Duration::from_secs(60);
/// Tasks removed in one transaction.
const CLEAN_UP_BATCH: u32 = 1_000;

/// Take back the tasks of dead hosts and ended leases, and learn what is under quarantine.
pub(crate) async fn look_after(backend: Arc<dyn Worker>, policy: Policy, leases: Leases, versions: Versions) {
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut reclaim_fails, mut quarantine_fails) = (false, false);
    let mut passed_over = 0;
    loop {
        ticks.tick().await;
        // After a sleep its own leases come first: what it still holds is no loss.
        let waits = leases.is_behind() && passed_over < PASSED_OVER_MAX;
        passed_over = if waits { passed_over + 1 } else { 0 };
        if !waits {
            match backend.reclaim(&policy).await {
                Ok(reclaimed) => {
                    reclaim_fails = false;
                    crate::reports::reclaimed(&reclaimed);
                    if !reclaimed.tasks.is_empty() {
                        ticks.reset_immediately();
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut reclaim_fails, true) {
                        tracing::warn!(error = chain(&error), "cannot look for lost tasks; trying again");
                    }
                }
            }
        }
        match versions.look_for_quarantine().await {
            Ok(()) => quarantine_fails = false,
            Err(error) => {
                if !std::mem::replace(&mut quarantine_fails, true) {
                    tracing::warn!(error = chain(&error), "cannot ask which plugin versions are under quarantine; trying again");
                }
            }
        }
    }
}

/// Wait until another program has moved the schema on to one that this program must not work with; why.
pub(crate) async fn shut_out(backend: Arc<dyn Backend>) -> laelaps_queue::Error {
    let mut ticks = tokio::time::interval(SCHEMA_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut known = None;
    loop {
        ticks.tick().await;
        let status = match backend.schema_status().await {
            Ok(status) => status,
            Err(error) => {
                tracing::debug!(error = chain(&error), "cannot look at the schema; trying again");
                continue;
            }
        };
        // Tables that are missing or older are an accident, which claims tell of and somebody may yet mend.
        match status.fits() {
            Err(error @ (laelaps_queue::Error::SchemaTooNew { .. } | laelaps_queue::Error::OtherSchema { .. })) => return error,
            Ok(version) if known.replace(version).is_some_and(|known| known != version) => {
                tracing::info!(schema = version, "another program has moved the schema on; this host goes on working");
            }
            _ => {}
        }
    }
}

/// Remove tasks whose retention has ended.
pub(crate) async fn clean_up(backend: Arc<dyn Worker>, due: Arc<Notify>) {
    let mut ticks = tokio::time::interval(CLEAN_UP_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = due.notified() => {}
        }
        match backend.clean_up(CLEAN_UP_BATCH).await {
            // A batch may be smaller than asked for, if the tasks are large.
            Ok(1..) => ticks.reset_immediately(),
            Ok(0) => {}
            Err(error) => tracing::debug!(error = chain(&error), "cannot remove old tasks; trying again"),
        }
    }
}

/// Keep the host's row naming what it serves: its queues and routes, and the plugin versions.
pub(crate) async fn tell_what_is_served(backend: Arc<dyn Worker>, config: Config, store: Arc<plugin::Store>, host: HostId) {
    let mut changes = store.changes();
    loop {
        let digests: Vec<String> =
            store.list().iter().filter_map(|status| status.digest.map(|digest| digest.to_string())).collect();
        let serves = crate::serves::of(&config, &store);
        let told = async {
            backend.note_serves(host, &serves).await?;
            backend.note_plugins(host, &digests).await
        };
        let again = match told.await {
            Ok(()) => None,
            Err(error) => {
                tracing::debug!(error = chain(&error), "cannot note what this host serves; trying again");
                Some(TELL_AGAIN)
            }
        };
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = sleep_some(again) => {}
        }
    }
}

/// For ever without a length of time.
async fn sleep_some(length: Option<Duration>) {
    match length {
        Some(length) => tokio::time::sleep(length).await,
        None => std::future::pending().await,
    }
}
