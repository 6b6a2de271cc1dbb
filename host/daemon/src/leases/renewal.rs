//! Renewals on their way to the database: all leases once an interval, and at once what handlers ask for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use laelaps_queue::{Beat, Error, LeaseAnswer, LeaseRef, Progress, Worker};
use tokio::sync::{Notify, mpsc, oneshot};

use super::{Held, REQUESTS_MAX, Table, lock};
use crate::excuses::Excuses;
use crate::plugin::Cancellation;

/// A failed renewal of all leases is tried again after this time, if the next one is not due before.
const RETRY: Duration = Duration::from_millis(500);
/// Times that one renewal meets locks of others: what stands behind more than that is renewed with the next one.
const BUSY_MAX: u32 = 16;

/// A renewal that a handler asked for.
pub(super) struct Request {
    pub(super) lease_ref: LeaseRef,
    pub(super) progress: Option<Progress>,
    pub(super) alive_time: Option<Duration>,
    pub(super) answer: oneshot::Sender<bool>,
}

pub(super) struct Renewer {
    pub(super) backend: Arc<dyn Worker>,
    pub(super) held: Arc<Mutex<Table>>,
    pub(super) incoming: mpsc::Receiver<Request>,
    pub(super) progressed: Arc<Notify>,
    pub(super) excuses: Excuses,
    pub(super) failing: bool,
}

impl Renewer {
    pub(super) async fn run(mut self, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let progress_due = self.lock().reported.front().map(|(due, _)| *due);
            let mut group = Vec::new();
            tokio::select! {
                _ = ticks.tick() => {
                    self.renew_all().await;
                    if self.failing {
                        ticks.reset_after(RETRY.min(interval));
                    }
                    continue;
                }
                request = self.incoming.recv() => {
                    let Some(first) = request else { return };
                    group.push(first);
                }
                () = self.progressed.notified() => continue,
                () = sleep_until_some(progress_due) => {}
            }
            // What else was asked for while the group before was written goes with it.
            while group.len() < REQUESTS_MAX
                && let Ok(next) = self.incoming.try_recv()
            {
                group.push(next);
            }
            self.renew_asked(group).await;
        }
    }

    /// The host's own renewal of everything it holds.
    async fn renew_all(&mut self) {
        let (settling, running): (Vec<_>, Vec<_>) = self
            .lock()
            .iter()
            .filter(|(_, held)| !held.lost)
            .map(|(lease_ref, held)| (held.settling, Beat { lease_ref: *lease_ref, alive_time: held.alive_time, progress: None }))
            .partition(|(settling, _)| *settling);
        let beats = |those: Vec<(bool, Beat)>| those.into_iter().map(|(_, beat)| beat).collect::<Vec<_>>();
        // What a settlement is just writing may be locked by it: nobody else waits for that.
        for beats in [beats(running), beats(settling)] {
            if !beats.is_empty() && !self.renew(beats).await {
                return;
            }
        }
    }

    /// Renewals that handlers asked for, and progress that they told and whose time has come.
    async fn renew_asked(&mut self, group: Vec<Request>) {
        let now = Instant::now();
        let mut beats: HashMap<LeaseRef, Beat> = HashMap::new();
        {
            let mut held = lock(&self.held);
            while let Some((_, lease_ref)) = held.reported.pop_front_if(|(due, _)| *due <= now) {
                let Some(known) = held.get_mut(&lease_ref) else { continue };
                // Progress is only shown of what runs.
                let Some(progress) = known.progress.take().filter(|_| !known.lost) else { continue };
                beats.insert(lease_ref, Beat { lease_ref, alive_time: known.alive_time, progress: Some(progress) });
            }
            // Of several reports of one task in a group the last one counts.
            for request in &group {
                let Some(known) = held.get_mut(&request.lease_ref) else { continue };
                let beat = beats.entry(request.lease_ref).or_insert_with(|| Beat {
                    lease_ref: request.lease_ref,
                    alive_time: known.alive_time,
                    progress: known.progress.take(),
                });
                beat.alive_time = beat.alive_time.max(request.alive_time.unwrap_or_default());
                if request.progress.is_some() {
                    beat.progress.clone_from(&request.progress);
                }
            }
        }
        if !beats.is_empty() {
            self.renew(beats.into_values().collect()).await;
        }
        let held = self.lock();
        for request in group {
            let holds = held
                .get(&request.lease_ref)
                .is_some_and(|held| !held.lost && held.control.state() != Some(Cancellation::LeaseLost));
            // A handler that was stopped in the meantime no longer waits for its answer.
            let _ = request.answer.send(holds);
        }
    }

    /// Renew these, in halves where others hold locks on some of them. Answers whether the database answered.
    async fn renew(&mut self, beats: Vec<Beat>) -> bool {
        let mut groups = vec![beats];
        let mut busy = 0;
        while let Some(mut beats) = groups.pop() {
            let sent = Instant::now();
            match self.backend.heartbeat(&beats).await {
                Ok(answers) => self.renewed(sent, &beats, &answers),
                Err(Error::Busy { .. }) if busy < BUSY_MAX => {
                    busy += 1;
                    if beats.len() > 1 {
                        let later = beats.split_off(beats.len() / 2);
                        groups.extend([later, beats]);
                    }
                }
                Err(error) => {
                    self.not_renewed(&error, beats.len());
                    return false;
                }
            }
        }
        true
    }

    fn renewed(&mut self, sent: Instant, beats: &[Beat], answers: &[LeaseAnswer]) {
        if std::mem::take(&mut self.failing) {
            tracing::info!("leases are renewed again");
        }
        let mut held = lock(&self.held);
        for (beat, answer) in beats.iter().zip(answers) {
            let Some(known) = held.get_mut(&beat.lease_ref) else { continue };
            match answer {
                LeaseAnswer::Held => known.ends = known.ends.max(sent + beat.alive_time),
                LeaseAnswer::Lost if known.lost => {}
                // Its settlement may just have been written, which nobody has told us yet; if not, that finds out, and excuses it.
                LeaseAnswer::Lost if known.settling => known.lost = true,
                LeaseAnswer::Lost => {
                    known.lost = true;
                    self.excuses.note(beat.lease_ref);
                    lose(known, "the database says so");
                }
            }
        }
    }

    fn not_renewed(&mut self, error: &Error, leases: usize) {
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(error = crate::log::chain(error), leases, "cannot renew leases; trying again");
        }
        let now = Instant::now();
        for known in lock(&self.held).values().filter(|known| known.ends <= now && !known.settling) {
            lose(known, "its time passed while the database did not answer");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.held)
    }
}

fn lose(held: &Held, why: &str) {
    if held.control.state() != Some(Cancellation::LeaseLost) {
        tracing::warn!(task = &*held.key, why, "lease lost; stopping the attempt");
        held.control.cancel(Cancellation::LeaseLost);
    }
}

async fn sleep_until_some(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
