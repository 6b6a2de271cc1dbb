//! What a verdict means for a task's row, whatever the database.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use crate::batch::Batch;
use crate::{LeaseRef, Result, Settlement, State, Verdict};

/// The longest retention or delay, in milliseconds: a thousand years.
const MS_MAX: i64 = 31_556_952_000_000;

/// Whole milliseconds, held to what a date can carry.
pub(crate) fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(MS_MAX).min(MS_MAX)
}

/// What becomes of the task's row. A delay from now, or a retention; None: it waits in its old place.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) state: State,
    pub(crate) event: &'static str,
    pub(crate) counted: bool,
    pub(crate) after_ms: Option<i64>,
    /// It waits where only hosts that serve its type look.
    pub(crate) unserved: bool,
    pub(crate) counters: Counters,
}

/// New values of a task's counters; None leaves one as it is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) releases: Option<u32>,
    pub(crate) lost: Option<u32>,
    pub(crate) lost_alone: Option<u32>,
    pub(crate) alone: Option<bool>,
}

impl Outcome {
    pub(crate) fn of(settlement: &Settlement) -> Self {
        let event = settlement.event;
        match settlement.verdict() {
            Verdict::Finish { retention, .. } => Self {
                state: State::Finished,
                event,
                counted: true,
                after_ms: Some(ms(*retention)),
                unserved: false,
                counters: Counters::default(),
            },
            Verdict::Wait { delay, counted, releases, lost, lost_alone, alone } => Self {
                state: State::Waiting,
                event,
                counted: *counted,
                after_ms: delay.map(ms),
                unserved: false,
                counters: Counters {
                    releases: Some(*releases),
                    lost: Some(*lost),
                    lost_alone: Some(*lost_alone),
                    alone: Some(*alone),
                },
            },
            Verdict::Unserved { lost, lost_alone, alone, .. } => Self {
                state: State::Waiting,
                event,
                counted: false,
                after_ms: None,
                unserved: true,
                counters: Counters { releases: Some(0), lost: Some(*lost), lost_alone: Some(*lost_alone), alone: Some(*alone) },
            },
            Verdict::Fail { retention, lost, lost_alone, counted } => Self {
                state: State::Failed,
                event,
                counted: *counted,
                after_ms: Some(ms(*retention)),
                unserved: false,
                counters: Counters { lost: Some(*lost), lost_alone: Some(*lost_alone), ..Counters::default() },
            },
        }
    }
}

/// One settlement, ready to be written.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) lease_ref: LeaseRef,
    pub(crate) row: Outcome,
    pub(crate) output: Option<Vec<u8>>,
    pub(crate) error_code: Option<String>,
    pub(crate) error_message: Option<String>,
    pub(crate) plugin_digest: Option<Arc<str>>,
    pub(crate) follow_ups: Batch,
}

/// The settlements to write, one for each lease: a second one of the same lease comes too late.
///
/// # Errors
/// [`crate::Error::InvalidTask`] for the first follow-up that breaks a bound.
pub(crate) fn entries(settlements: &[Settlement]) -> Result<Vec<Entry>> {
    let mut seen = HashSet::with_capacity(settlements.len());
    let first = settlements.iter().filter(|settlement| seen.insert(settlement.lease_ref));
    let entry = |settlement: &Settlement| {
        let row = Outcome::of(settlement);
        // That a host does not serve a type is nothing that happened to the task.
        let failure = (!row.unserved).then_some(settlement);
        Ok(Entry {
            lease_ref: settlement.lease_ref,
            row,
            output: match settlement.verdict() {
                Verdict::Finish { output, .. } => output.clone(),
                _ => None,
            },
            error_code: failure.and_then(|settlement| settlement.error_code.clone()),
            error_message: failure.and_then(|settlement| settlement.error_message.clone()),
            plugin_digest: settlement.plugin_digest.clone(),
            follow_ups: Batch::new(&settlement.follow_ups)?,
        })
    };
    first.map(entry).collect()
}
