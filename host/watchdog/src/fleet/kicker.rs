//! The kicks: regular while the host is well, and never otherwise. Nothing that takes long happens here, so that a slow database or a slow
//! look at other hosts does not make this one seem stuck.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval_at};

use super::{Health, Host, interval};
use crate::age::ServerTime;
use crate::{Result, Timer};

/// Our latest kick.
#[derive(Clone, Copy, Debug)]
pub(super) struct Beat {
    /// What the servers' clock said at it.
    pub(super) server_time: ServerTime,
    /// When it was answered, by ours.
    pub(super) at: Instant,
    /// Since when we have kicked without a gap. What others missed before that may have been missed because of what stopped us, too.
    pub(super) since: Instant,
    /// Whether there was a gap before that, in which another host may have begun to stand in for us.
    pub(super) after_gap: bool,
}

impl Beat {
    /// Whether we may judge others by it, and act. We give up acting one interval before others count us as stuck.
    pub(super) fn is_fresh(&self, timer: Duration) -> bool {
        self.at.elapsed() < timer - interval(timer)
    }
}

/// Kicks whatever timer is current until the session ends. One that is gone is the watcher's to make again.
pub(super) async fn kick<H: Host>(
    host: Arc<H>,
    limit: Duration,
    mut timer: watch::Receiver<Arc<Timer>>,
    beats: watch::Sender<Option<Beat>>,
) -> Result<()> {
    let every = interval(limit);
    let mut ticks = interval_at(tokio::time::Instant::now(), every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut was_well = true;
    loop {
        ticks.tick().await;
        match host.health() {
            Health::Unwell(reason) => {
                if was_well {
                    tracing::warn!(%reason, "this host is not well: it stops kicking its timer, and will count as stuck after {limit:?}");
                }
                was_well = false;
                continue;
            }
            Health::Well if !was_well => tracing::info!("this host is well again: it kicks its timer"),
            Health::Well => {}
        }
        was_well = true;
        let current = timer.borrow_and_update().clone();
        let Some(server_time) = current.kick().await? else { continue };
        beats.send_modify(|last| {
            let at = Instant::now();
            *last = Some(match *last {
                None => Beat { server_time, at, since: at, after_gap: false },
                Some(last) if at.duration_since(last.at) <= 2 * every => Beat { server_time, at, ..last },
                Some(_) => Beat { server_time, at, since: at, after_gap: true },
            });
        });
    }
}
