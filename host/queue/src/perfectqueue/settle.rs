//! Settlements: what `settlement.rs` decided, written under the lease, with what belongs to them in the same transaction.
//!
//! Finished, failed and cancelled tasks are finished rows to Ruby; which of the three it was stands in our table, or in the log. A row that a
//! settlement has finished carries the claim's token plus one, so that a settlement whose answer was lost on the way is recognised when it is
//! written again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::Shared;
use super::lease::{Held, Turns};
use super::run::{Operation, begin, begin_briefly, commit};
use super::side::{self, Record, Side};
use super::submit::Batch;
use super::table::{DELETE_OFFSET, EVENT_HORIZON, Names, WITHOUT_NUMBER, json, now, second_from};
use crate::mysql::failure::{Failure, number};
use crate::{Error, LeaseAnswer, LeaseRef, Result, Settlement, State, Verdict};

/// The server's number for a lock that was not had in time.
const LOCK_WAIT: u16 = 1205;

/// Tries of a group that are remembered.
const TRIES_MAX: usize = 100;

/// What becomes of the task.
#[derive(Debug)]
enum Outcome {
    /// It ended; its row is kept for so many seconds.
    Ended { state: State, kept: i64, output: Option<Vec<u8>> },
    /// It may be acquired after so many milliseconds.
    Waiting { delay_ms: i64 },
}

/// One settlement of a lease that this process holds.
#[derive(Debug)]
struct Entry {
    lease_ref: LeaseRef,
    held: Held,
    host: String,
    outcome: Outcome,
    verdict: Verdict,
    event: &'static str,
    error_code: Option<String>,
    error_message: Option<String>,
    plugin_digest: Option<Arc<str>>,
    follow_ups: Batch,
}

/// Settlements that are written together, in the order of their keys.
#[derive(Debug)]
pub(super) struct Group {
    entries: Vec<Entry>,
    /// It is not known what became of an earlier try.
    is_repeated: AtomicBool,
    _turns: Turns,
    /// When each try wrote, in milliseconds by the server's clock; no more than [`TRIES_MAX`].
    tries: Mutex<Vec<i64>>,
}

/// Whole seconds, rounded up.
pub(super) fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis().div_ceil(1_000)).unwrap_or(i64::MAX)
}

/// The `timeout` of a row that ended now and is kept for so many seconds. It stays below what is ever acquired.
pub(super) fn ended_timeout(now_seconds: i64, kept: i64) -> i64 {
    (now_seconds - DELETE_OFFSET).saturating_add(kept).min(EVENT_HORIZON)
}

impl Outcome {
    fn of(verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Finish { output, retention } => {
                Self::Ended { state: State::Finished, kept: seconds(*retention), output: output.clone() }
            }
            Verdict::Fail { retention, .. } => Self::Ended { state: State::Failed, kept: seconds(*retention), output: None },
            Verdict::Wait { delay, .. } => Self::Waiting { delay_ms: whole_ms(delay.unwrap_or_default()) },
            Verdict::Unserved { delay, .. } => Self::Waiting { delay_ms: whole_ms(*delay) },
        }
    }

    /// The row's time from now on.
    fn timeout(&self, now_ms: i64) -> i64 {
        match self {
            Self::Ended { kept, .. } => ended_timeout(now_ms / 1_000, *kept),
            Self::Waiting { delay_ms: 0 } => now_ms / 1_000,
            Self::Waiting { delay_ms } => second_from(now_ms.saturating_add(*delay_ms)),
        }
    }
}

fn whole_ms(delay: Duration) -> i64 {
    i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)
}

impl Shared {
    /// Write settlements. A second one of the same lease comes too late, as does one of a lease that this process does not hold.
    pub(super) async fn settle(self: &Arc<Self>, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        let turns = self.leases.turns(settlements.iter().map(|settlement| settlement.lease_ref)).await;
        let mut entries = Vec::with_capacity(settlements.len());
        let mut seen = HashSet::with_capacity(settlements.len());
        for settlement in settlements {
            let follow_ups = Batch::new(&settlement.follow_ups, self.config.side_table)?;
            let lease_ref = settlement.lease_ref;
            if let Some(held) = self.leases.get(lease_ref).filter(|_| seen.insert(lease_ref)) {
                entries.push(Entry {
                    lease_ref,
                    host: self.hosts.name(held.host),
                    held,
                    outcome: Outcome::of(settlement.verdict()),
                    verdict: settlement.verdict().clone(),
                    event: settlement.event,
                    error_code: settlement.error_code.clone(),
                    error_message: settlement.error_message.clone(),
                    plugin_digest: settlement.plugin_digest.clone(),
                    follow_ups,
                });
            }
        }
        if entries.is_empty() {
            return Ok(vec![LeaseAnswer::Lost; settlements.len()]);
        }
        // Rows are locked in the same order everywhere.
        entries.sort_unstable_by(|one, other| one.held.key.cmp(&other.held.key));
        let asked: Vec<LeaseRef> = entries.iter().map(|entry| entry.lease_ref).collect();
        let wakes = entries.iter().any(|entry| {
            // The end of a limited user's task is the turn of the next.
            entry.held.is_limited || matches!(entry.outcome, Outcome::Waiting { .. }) || !entry.follow_ups.is_empty()
        });
        let group = Group { entries, is_repeated: AtomicBool::new(false), _turns: turns, tries: Mutex::default() };
        let settled = self.perform(group).await;
        if settled.as_ref().is_err_and(|error| error.is_retryable() && !matches!(error, Error::Busy { .. })) {
            // Who tries again has to be told of what was written after all.
            asked.iter().for_each(|lease_ref| self.leases.doubt(*lease_ref));
        }
        let mut held = settled?;
        for lease_ref in asked {
            if held.contains(&lease_ref) { self.leases.forget(lease_ref) } else { self.leases.lose(lease_ref) }
        }
        if wakes {
            self.wake();
        }
        // Each lease is answered as held once.
        let answer = |settlement: &Settlement| {
            if held.remove(&settlement.lease_ref) { LeaseAnswer::Held } else { LeaseAnswer::Lost }
        };
        Ok(settlements.iter().map(answer).collect())
    }
}

/// The leases of a set: place, key, token, a value that `timeout` may have, and what is to be written.
macro_rules! fence {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]', owner BIGINT UNSIGNED PATH '$[2]',
            was BIGINT PATH '$[3]', value BIGINT PATH '$[4]')) AS f STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}"
    };
    // For statements that lock: MySQL refuses to beside a table function (3569), and locks beside a subquery.
    (lockable) => {
        "(SELECT f.* FROM JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]',
                owner BIGINT UNSIGNED PATH '$[2]', was BIGINT PATH '$[3]', value BIGINT PATH '$[4]')) AS f) AS f
            STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}"
    };
}
/// That the lease still holds.
macro_rules! holds {
    () => {
        "t.owner = f.owner AND t.timeout = f.was AND t.created_at IS NOT NULL AND t.timeout > UNIX_TIMESTAMP()"
    };
}
pub(super) use {fence, holds};

/// A set of leases with a value for each.
pub(super) fn fenced<'h>(leases: impl Iterator<Item = (&'h Held, i64)>) -> String {
    json(leases.enumerate().flat_map(|(place, (held, value))| {
        held.timeouts.iter().map(move |timeout| (place, &held.key, held.token, *timeout, value))
    }))
}

#[async_trait]
impl Operation for Group {
    type Answer = HashSet<LeaseRef>;
    const DOING: &'static str = "settling attempts";

    fn is_repeated(&self) {
        self.is_repeated.store(true, Ordering::Release);
    }

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        if !names.has_side() && self.entries.iter().all(Entry::only_finishes) {
            return self.finish_all(names, connection).await;
        }
        // A producer that keeps a transaction open may hold the key of a follow-up. The settlements that have none must not wait for it.
        let has_follow_ups = self.entries.iter().any(|entry| !entry.follow_ups.is_empty());
        if has_follow_ups {
            begin_briefly(connection).await?
        } else {
            begin(connection).await?
        }
        let written = self.write(names, connection).await;
        let held = match written {
            Err(Failure::Sql(error)) if has_follow_ups && number(&error) == Some(LOCK_WAIT) => {
                return Err(Failure::from(Error::Busy { doing: Self::DOING }));
            }
            written => written?,
        };
        commit(connection).await?;
        if !names.has_side() {
            self.entries.iter().filter(|entry| held.contains(&entry.lease_ref)).for_each(Entry::log);
        }
        Ok(held)
    }
}

impl Entry {
    /// Nothing but its row is to be written.
    fn only_finishes(&self) -> bool {
        matches!(self.outcome, Outcome::Ended { state: State::Finished, .. }) && self.follow_ups.is_empty()
    }

    /// Say what there is no other place for.
    fn log(&self) {
        let (task, code, message) = (&self.held.key, &self.error_code, &self.error_message);
        if let Outcome::Ended { state: State::Failed, .. } = self.outcome {
            tracing::error!(
                task,
                event = self.event,
                code,
                message,
                "a task has failed; PerfectQueue's table shows it as finished"
            );
        } else if code.is_some() {
            tracing::warn!(task, event = self.event, code, message, "an attempt failed; the task is tried again");
        }
    }
}

/// A task's row as it was when it was settled.
struct Settled {
    created_at: i64,
    user: Option<String>,
    /// By this very settlement, at an earlier try whose answer did not come through.
    before: bool,
}

impl Group {
    fn all(&self) -> HashSet<LeaseRef> {
        self.entries.iter().map(|entry| entry.lease_ref).collect()
    }

    fn at(&self, place: i32) -> Option<&Entry> {
        self.entries.get(usize::try_from(place).ok()?)
    }

    /// What nearly all groups are, without our own table: one statement, a transaction by itself.
    async fn finish_all(&self, names: &Names, connection: &mut MySqlConnection) -> Result<HashSet<LeaseRef>, Failure> {
        const FINISH: &str = concat!(
            "UPDATE ",
            fence!(),
            " SET t.created_at = NULL, t.resource = NULL, t.owner = f.owner + 1,
                t.timeout = LEAST(UNIX_TIMESTAMP() - 1000000000 + f.value, 1300000000) WHERE ",
            holds!()
        );
        const FINISHED: &str = concat!("SELECT f.place FROM ", fence!(), " WHERE t.owner = f.owner + 1 AND t.created_at IS NULL");
        let kept = |entry: &Entry| match entry.outcome {
            Outcome::Ended { kept, .. } => kept,
            Outcome::Waiting { .. } => 0,
        };
        let rows = fenced(self.entries.iter().map(|entry| (&entry.held, kept(entry))));
        let written = sqlx::query(names.sql(FINISH)).bind(&rows).execute(&mut *connection).await?.rows_affected();
        if written == self.entries.len() as u64 {
            return Ok(self.all());
        }
        let finished: Vec<i32> = sqlx::query_scalar(names.sql(FINISHED)).bind(&rows).fetch_all(connection).await?;
        Ok(finished.into_iter().filter_map(|place| self.at(place)).map(|entry| entry.lease_ref).collect())
    }

    async fn write(&self, names: &Names, connection: &mut MySqlConnection) -> Result<HashSet<LeaseRef>, Failure> {
        const WRITE: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', owner BIGINT UNSIGNED PATH '$[1]',
                timeout BIGINT PATH '$[2]', ended INT PATH '$[3]')) AS f STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
            SET t.timeout = f.timeout, t.owner = f.owner, t.created_at = IF(f.ended, NULL, t.created_at),
                t.resource = IF(f.ended, NULL, t.resource)";
        let now_ms = now(names, connection).await?;
        let mut settled = self.lock(names, connection).await?;
        if settled.len() < self.entries.len() {
            settled.extend(self.written_before(&settled, names, connection).await?);
        }
        self.remember(now_ms);
        let kept: Vec<(&Entry, &Settled)> =
            self.entries.iter().filter_map(|entry| Some((entry, settled.get(&entry.lease_ref)?))).collect();
        let now_written: Vec<(&Entry, &Settled)> = kept.iter().filter(|(_, settled)| !settled.before).copied().collect();
        let rows = json(now_written.iter().map(|(entry, _)| {
            let ended = matches!(entry.outcome, Outcome::Ended { .. });
            let owner = if ended { entry.held.token + 1 } else { 0 };
            (&entry.held.key, owner, entry.outcome.timeout(now_ms), u8::from(ended))
        }));
        if !now_written.is_empty() {
            sqlx::query(names.sql(WRITE)).bind(rows).execute(&mut *connection).await?;
            if names.has_side() {
                self.note(&now_written, now_ms, names, connection).await?;
            }
            for (entry, _) in now_written.iter().filter(|(entry, _)| !entry.follow_ups.is_empty()) {
                entry.follow_ups.store_new(names, connection).await?;
            }
        }
        Ok(kept.into_iter().map(|(entry, _)| entry.lease_ref).collect())
    }

    /// Lock the rows whose lease holds, or that this settlement has finished before.
    async fn lock(&self, names: &Names, connection: &mut MySqlConnection) -> Result<HashMap<LeaseRef, Settled>, Failure> {
        const LOCK: &str = concat!(
            "SELECT f.place, t.created_at, t.resource FROM ",
            fence!(lockable),
            " WHERE (",
            holds!(),
            ") OR (t.owner = f.owner + 1 AND t.created_at IS NULL) FOR UPDATE"
        );
        let rows = fenced(self.entries.iter().map(|entry| (&entry.held, 0)));
        let rows = sqlx::query(names.sql(LOCK)).bind(rows).fetch_all(connection).await?;
        let mut settled = HashMap::with_capacity(rows.len());
        for row in &rows {
            let created_at: Option<i64> = row.try_get(1)?;
            let Some(entry) = self.at(row.try_get(0)?) else { continue };
            let found =
                Settled { created_at: created_at.unwrap_or_default(), user: row.try_get(2)?, before: created_at.is_none() };
            settled.insert(entry.lease_ref, found);
        }
        Ok(settled)
    }

    fn remember(&self, now_ms: i64) {
        let mut tries = self.tries();
        if tries.len() < TRIES_MAX {
            tries.push(now_ms);
        }
    }

    fn tries(&self) -> MutexGuard<'_, Vec<i64>> {
        self.tries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of an earlier try that was committed although its answer was lost. What it has ended carries its mark, unless somebody has written to the row
    /// since; that a task waits again its row does not tell. Our table records the attempt. Without it nobody but that try can have written
    /// to the row while the lease lasts, except who hands it on; and afterwards the row tells as long as it is as that try wrote it.
    async fn written_before(
        &self,
        settled: &HashMap<LeaseRef, Settled>,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<HashMap<LeaseRef, Settled>, Failure> {
        const WRITTEN: &str = concat!(
            "SELECT f.place FROM ",
            fence!(),
            " WHERE t.created_at IS NOT NULL AND ((t.owner NOT IN (f.owner, f.owner & ?) AND f.was > UNIX_TIMESTAMP())
                OR (t.owner = 0 AND t.timeout = f.value)) FOR UPDATE"
        );
        let others: Vec<&Entry> = self.entries.iter().filter(|entry| !settled.contains_key(&entry.lease_ref)).collect();
        let before = |entry: &Entry| (entry.lease_ref, Settled { created_at: 0, user: None, before: true });
        if names.has_side() {
            let keys: Vec<&str> = others.iter().map(|entry| entry.held.key.as_str()).collect();
            let sides = side::load(&keys, true, names, connection).await?;
            let is_recorded =
                |entry: &&Entry| sides.get(&entry.held.key).is_some_and(|side| side.has_recorded(entry.held.token, entry.event));
            return Ok(others.into_iter().filter(is_recorded).map(before).collect());
        }
        let is_repeated = self.is_repeated.load(Ordering::Acquire);
        let doubtful = |entry: &&Entry| (is_repeated || entry.held.in_doubt) && matches!(entry.outcome, Outcome::Waiting { .. });
        let doubtful: Vec<&Entry> = others.into_iter().filter(doubtful).collect();
        if doubtful.is_empty() {
            return Ok(HashMap::new());
        }
        let tries = &self.tries().clone();
        let rows = json(doubtful.iter().enumerate().flat_map(|(place, entry)| {
            let Held { key, token, timeouts, .. } = &entry.held;
            let leased = timeouts.iter().map(move |timeout| (place, key, *token, *timeout, -1));
            leased.chain(tries.iter().map(move |now_ms| (place, key, *token, 0, entry.outcome.timeout(*now_ms))))
        }));
        let query = sqlx::query_scalar(names.sql(WRITTEN)).bind(rows).bind(WITHOUT_NUMBER);
        let written: Vec<i32> = query.fetch_all(connection).await?;
        let at = |place: i32| doubtful.get(usize::try_from(place).ok()?).copied();
        Ok(written.into_iter().filter_map(at).map(before).collect())
    }

    /// Note what the table has no room for.
    async fn note(
        &self,
        settled: &[(&Entry, &Settled)],
        now_ms: i64,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), Failure> {
        let keys: Vec<&str> = settled.iter().map(|(entry, _)| entry.held.key.as_str()).collect();
        let mut sides: BTreeMap<String, Side> = side::load(&keys, true, names, connection).await?.into_iter().collect();
        let noted = settled.iter().map(|(entry, settled)| {
            let known = sides.remove(&entry.held.key).filter(|side| side.created_at == settled.created_at);
            (entry.held.key.as_str(), entry.noted(known.unwrap_or_else(|| Side::new(settled.created_at)), settled, now_ms))
        });
        let noted: Vec<(&str, Side)> = noted.collect();
        side::store(&noted, names, connection).await?;
        Ok(())
    }
}

impl Entry {
    /// What is to be noted of the task from now on.
    fn noted(&self, mut side: Side, settled: &Settled, now_ms: i64) -> Side {
        let attempt = side.attempts.saturating_add(1);
        let record = Record::new(attempt, self.held.token, self.host.clone(), now_ms, self.event).with(
            self.plugin_digest.as_deref().map(str::to_owned),
            self.error_code.clone(),
            self.error_message.clone(),
        );
        side.record(record.alone(side.alone));
        let counted = match &self.verdict {
            Verdict::Finish { .. } => true,
            Verdict::Wait { counted, releases, lost, lost_alone, alone, .. } => {
                (side.releases, side.alone) = (*releases, *alone);
                side.count_losses(*lost, *lost_alone, now_ms);
                *counted
            }
            Verdict::Unserved { lost, lost_alone, alone, .. } => {
                (side.releases, side.alone) = (0, *alone);
                side.count_losses(*lost, *lost_alone, now_ms);
                false
            }
            Verdict::Fail { counted, lost, lost_alone, .. } => {
                side.count_losses(*lost, *lost_alone, now_ms);
                *counted
            }
        };
        if counted {
            side.attempts = attempt;
        }
        side.timeout = Some(self.outcome.timeout(now_ms));
        side.progress = None;
        if let Some(digest) = &self.plugin_digest {
            side.plugin = Some(digest.to_string());
        }
        if self.error_code.is_some() {
            (side.error_code, side.error_message) = (self.error_code.clone(), self.error_message.clone());
        }
        match &self.outcome {
            Outcome::Ended { state, output, .. } => {
                (side.state, side.ended_ms) = (Some(*state), Some(now_ms));
                side.user.clone_from(&settled.user);
                side.output.clone_from(output);
            }
            Outcome::Waiting { .. } => side.state = Some(State::Waiting),
        }
        side
    }
}
