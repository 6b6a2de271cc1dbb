//! One attempt: routed to a version, run by it, and handed to the settler.

use std::sync::Arc;

use laelaps_queue::{Attempt, ClaimedTask, Event, Settlement};

use super::buffer::is_limited;
use super::{Held, Shared};
use crate::config::{Route, Routes};
use crate::leases::LeasedTask;
use crate::plugin::{self, Control, Invocation};
use crate::settler::Settled;
use crate::unstored::UntilStored;

/// One attempt, from its route to its settlement.
pub(super) async fn attempt(shared: &Shared, held: Held, route: Option<Arc<Route>>, version: Option<Arc<plugin::Version>>) {
    let Held { mut task, control, data: data_share, claimed_at } = held;
    let (Some(route), Some(version)) = (&route, version) else {
        let message = match &route {
            None => format!("no route takes the type {:?}", task.task_type),
            Some(route) => format!("plugin {:?} is not loaded", route.plugin),
        };
        crate::reports::unrouted(&task.task_type, &message);
        let policy = route.as_ref().map_or(&shared.config.queue.policy, |route| &route.policy);
        return settle(shared, &task, policy, Event::Unrouted { message }, None, Submitted::default(), control).await;
    };
    let digest = version.digest();
    if let Some(quarantine) = shared.versions.quarantine(digest) {
        let message = crate::reports::quarantined(&quarantine);
        let event = Event::Unrouted { message };
        return settle(shared, &task, &route.policy, event, None, Submitted::default(), control).await;
    }
    let Some(running) = shared.versions.begin(&route.plugin, digest, &control).await else {
        return settle(shared, &task, &route.policy, Event::Stopped, None, Submitted::default(), control).await;
    };
    let share = shared.unstored.share(task.descent.root);
    let unstored = UntilStored::new(Arc::clone(&share));
    let services = LeasedTask {
        leases: shared.leases.clone(),
        backend: Arc::clone(&shared.backend),
        updates: shared.updates.clone(),
        lease_ref: task.lease_ref,
        database_time: task.claimed_at,
        at: claimed_at,
        root: task.descent.root,
        leads_here: leads_to(&shared.routes, &route.plugin),
        share,
        _running: running,
    };
    // The data is the guest's alone: it may have megabytes, and what follows does not need it.
    let data = std::mem::take(&mut task.data);
    let completion = shared
        .engine
        .invoke(Invocation {
            version: Arc::clone(&version),
            // The handler is told what holds: the task's own limit, else its route's.
            task: ClaimedTask { data, max_attempts: task.max_attempts.or(route.policy.max_attempts), ..task.clone() },
            limits: route.limits.clone(),
            grants: route.grants.clone(),
            settings: Arc::clone(&route.settings),
            max_requests: shared.config.max_request_per_child,
            route: route.index,
            log_level: crate::reports::guest_level(),
            control: Arc::clone(&control),
            services: Arc::new(services),
        })
        .await;
    drop(data_share);
    shared.budget.note(completion.memory_bytes_peak);
    crate::reports::captured(&task, &version, &completion.captured);
    crate::reports::ended(&task, &version, &completion.event);
    let submitted = Submitted { follow_ups: completion.follow_ups, unstored: Some(unstored) };
    settle(shared, &task, &route.policy, completion.event, Some(digest.to_string()), submitted, control).await;
}

/// What an attempt has submitted.
#[derive(Default)]
pub(super) struct Submitted {
    follow_ups: Vec<laelaps_queue::NewTask>,
    unstored: Option<UntilStored>,
}

/// Whether a type's tasks are led to this plugin. A guest that is stuck keeps it for ever, so it holds nothing whose end the host waits for.
fn leads_to(routes: &Arc<Routes>, plugin: &str) -> Box<dyn Fn(&str) -> bool + Send + Sync> {
    let (routes, plugin) = (Arc::clone(routes), plugin.to_owned());
    Box::new(move |task_type| routes.route(task_type).is_some_and(|route| route.plugin == plugin))
}

/// Decide what follows, and hand it to the settler.
pub(super) async fn settle(
    shared: &Shared,
    task: &ClaimedTask,
    policy: &laelaps_queue::Policy,
    event: Event,
    plugin_digest: Option<String>,
    submitted: Submitted,
    control: Arc<Control>,
) {
    let Submitted { follow_ups, unstored } = submitted;
    let attempt = Attempt::of(task);
    let settlement = Settlement::of(task.lease_ref, event, attempt, policy, fastrand::f64(), plugin_digest, follow_ups);
    shared.leases.settling(task.lease_ref);
    let key = task.key.clone();
    let (policy, is_limited) = (policy.clone(), is_limited(task));
    shared.settler.settle(Settled { settlement, key, attempt, policy, control, unstored, is_limited }).await;
}
