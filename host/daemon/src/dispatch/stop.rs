//! How attempts and buffered tasks come to an end before their time: the host ends, their plugin is replaced, or their thread does not come back.

use std::sync::Arc;
use std::time::Instant;

use laelaps_queue::Event;

use super::attempt::{Submitted, settle};
use super::{Broken, Dispatcher, Ending, Order, Running, STUCK_MAX};
use crate::plugin::Cancellation;
use crate::signals::Manner;

impl Dispatcher {
    /// Do as the host asks.
    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::End(manner) => self.end(manner),
            Order::Replace(manner) => self.replace(manner),
        }
    }

    pub(super) fn end(&mut self, manner: Manner) {
        if self.ending.as_ref().is_some_and(|ending| ending.manner >= manner) {
            return;
        }
        let limit = self.shared.config.child_graceful_kill_limit;
        let deadline = if manner == Manner::Graceful { limit.map(|limit| tokio::time::Instant::now() + limit) } else { None };
        self.ending = Some(Ending { manner, deadline });
        self.give_back_buffered();
        for running in self.running.values() {
            running.control.cancel(cancellation(manner));
        }
    }

    pub(super) fn give_back_buffered(&mut self) {
        for held in self.buffer.take_all() {
            let (key, control) = (Arc::clone(&held.key), Arc::clone(&held.control));
            let running = Running { lease_ref: held.task.lease_ref, key, control, version: None, place: held.place };
            let policy = &self.shared.config.queue.policy;
            let settled = settle(&self.shared, &held, policy, Event::Stopped, None, Submitted::default());
            self.running.insert(self.attempts.spawn(settled).id(), running);
        }
    }

    fn replace(&mut self, manner: Manner) {
        if self.ending.is_some() {
            return;
        }
        for running in self.running.values() {
            let Some(version) = &running.version else { continue };
            let (plugin, digest) = (version.plugin(), version.digest());
            let serving = self.shared.store.current(plugin).map(|version| version.digest());
            if serving.is_some_and(|serving| serving != digest) {
                tracing::info!(task = &*running.key, plugin, from = %digest.short(), ?manner, "ending an attempt on a replaced version");
                running.control.cancel(cancellation(manner));
                if let (Manner::Graceful, Some(limit)) = (manner, self.shared.config.child_graceful_kill_limit) {
                    let control = Arc::clone(&running.control);
                    tokio::spawn(async move {
                        tokio::time::sleep(limit).await;
                        control.cancel(Cancellation::Immediate);
                    });
                }
            }
        }
    }

    /// Whether there is a thread that may be stuck, or one that was at the last look: its return has to be told, even if nothing runs by then.
    pub(super) fn may_have_stuck(&self) -> bool {
        !self.running.is_empty() || self.shared.engine.abandoned() > 0 || self.stuck > 0
    }

    /// A guest whose thread shows no sign of life is given up: its task goes back, its slot serves others, its thread is counted and replaced.
    pub(super) fn look_for_stuck(&mut self) {
        let limit = self.shared.config.child_heartbeat_limit;
        let now = Instant::now();
        // A look this late means that the process was stopped, or its machine busy with others: its guests could not give a sign of life either.
        if now - self.looked_at > self.shared.config.child_heartbeat_interval + limit / 2 {
            self.awake_since = now;
        }
        self.looked_at = now;
        if now - self.awake_since <= limit {
            return;
        }
        let lost = self.shared.engine.lost(limit);
        let mut given_up = 0;
        for running in self.running.values() {
            let Some(silence) = running.control.silence().filter(|silence| *silence > limit) else { continue };
            if running.control.state() < Some(Cancellation::Immediate) {
                given_up += 1;
                tracing::error!(
                    task = &*running.key,
                    plugin = running.version.as_ref().map(|version| version.plugin()),
                    ?silence,
                    ?limit,
                    threads_lost = lost + given_up,
                    threads_lost_max = STUCK_MAX,
                    "a thread shows no sign of life in a handler: the task is released, and another thread takes its place"
                );
                running.control.cancel(Cancellation::Immediate);
            }
        }
        if lost > self.stuck {
            tracing::error!(threads_lost = lost, threads_lost_max = STUCK_MAX, "threads do not come back from handlers");
        } else if lost < self.stuck {
            tracing::info!(threads_lost = lost, threads_lost_max = STUCK_MAX, "lost threads have come back from handlers");
        }
        self.stuck = lost;
        if lost > STUCK_MAX && self.ending.is_none() {
            tracing::error!(
                threads_lost = lost,
                threads_lost_max = STUCK_MAX,
                "too many threads are stuck in handlers: this host drains, and ends"
            );
            // Also if one of them comes back meanwhile: nobody has told this host to end, so it does not end well.
            self.broken.get_or_insert(Broken::TooManyStuck(lost));
            self.end(Manner::Graceful);
        }
    }
}

fn cancellation(manner: Manner) -> Cancellation {
    match manner {
        Manner::Graceful => Cancellation::Graceful,
        Manner::Immediate => Cancellation::Immediate,
    }
}
