//! One attempt: routed to a version, run by it, and handed to the settler.

use std::sync::Arc;

use laelaps_queue::{Attempt, ClaimedTask, Event, Settlement};

use super::buffer::is_limited;
use super::{Held, Shared, no_route, not_loaded};
use crate::config::Route;
use crate::leases::LeasedTask;
use crate::plugin::{self, Invocation};
use crate::settler::Settled;
use crate::unstored::UntilStored;

/// One attempt, from its route to its settlement.
pub(super) async fn attempt(
    shared: &Shared,
    mut held: Box<Held>,
    route: Option<Arc<Route>>,
    version: Option<Arc<plugin::Version>>,
) {
    let (Some(route), Some(version)) = (&route, version) else {
        let message = route.as_ref().map_or_else(|| no_route(&held.task.task_type), |route| not_loaded(&route.plugin));
        shared.strangers.met(&held.task.task_type, || message.clone());
        let policy = route.as_ref().map_or(&shared.config.queue.policy, |route| &route.policy);
        return settle(shared, &held, policy, Event::Unrouted { message }, None, Submitted::default()).await;
    };
    let digest = version.digest();
    if let Some(quarantine) = shared.versions.quarantine(digest) {
        let event = Event::Quarantined { message: crate::reports::quarantined(&quarantine) };
        return settle(shared, &held, &route.policy, event, None, Submitted::default()).await;
    }
    let Some(running) = shared.versions.begin(version.plugin_shared(), digest, &held.control).await else {
        return settle(shared, &held, &route.policy, Event::Stopped, None, Submitted::default()).await;
    };
    let share = shared.unstored.share(held.task.descent.root);
    let unstored = UntilStored::new(Arc::clone(&share));
    let services = LeasedTask {
        leases: shared.leases.clone(),
        backend: Arc::clone(&shared.backend),
        updates: shared.updates.clone(),
        lease_ref: held.task.lease_ref,
        database_time: held.task.claimed_at,
        at: held.claimed_at,
        root: held.task.descent.root,
        routes: Arc::clone(&shared.routes),
        plugin: version.plugin_shared(),
        share,
        _running: running,
    };
    // The data is the guest's alone: it may have megabytes, and what follows does not need it.
    let data = std::mem::take(&mut held.task.data);
    let invocation = Invocation {
        version: Arc::clone(&version),
        // The handler is told what holds: the task's own limit, else its route's.
        task: ClaimedTask { data, max_attempts: held.task.max_attempts.or(route.policy.max_attempts), ..held.task.clone() },
        limits: route.limits.clone(),
        grants: route.grants.clone(),
        settings: Arc::clone(&route.settings),
        max_requests: shared.config.max_request_per_child,
        route: route.index,
        log_level: crate::reports::guest_level(),
        control: Arc::clone(&held.control),
        services: Arc::new(services),
    };
    let completion = shared.engine.invoke(invocation).await;
    held.data = None;
    shared.budget.note(completion.memory_bytes_peak);
    crate::reports::captured(&held.task, &version, &completion.captured);
    crate::reports::ended(&held.task, &version, &completion.event);
    let submitted = Submitted { follow_ups: completion.follow_ups, unstored: Some(unstored) };
    settle(shared, &held, &route.policy, completion.event, Some(Arc::clone(version.digest_text())), submitted).await;
}

/// What an attempt has submitted.
#[derive(Default)]
pub(super) struct Submitted {
    follow_ups: Vec<laelaps_queue::NewTask>,
    unstored: Option<UntilStored>,
}

/// Decide what follows, and hand it to the settler.
pub(super) fn settle(
    shared: &Shared,
    held: &Held,
    policy: &laelaps_queue::Policy,
    event: Event,
    plugin_digest: Option<Arc<str>>,
    submitted: Submitted,
) -> impl Future<Output = ()> + Send + use<> {
    let Submitted { follow_ups, unstored } = submitted;
    let (task, attempt) = (&held.task, Attempt::of(&held.task));
    let settlement = Settlement::of(task.lease_ref, event, attempt, policy, fastrand::f64(), plugin_digest, follow_ups);
    shared.leases.settling(task.lease_ref);
    let (key, control) = (Arc::clone(&held.key), Arc::clone(&held.control));
    let (policy, is_limited) = (policy.clone(), is_limited(task));
    shared.settler.settle(Settled { settlement, key, attempt, policy, control, unstored, is_limited })
}
