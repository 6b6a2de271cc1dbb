//! Settlements: what `settlement.rs` decided, written under the lease.
//!
//! A group is one statement, which is its own transaction; with follow-up tasks it is a transaction of two. Where all have finished alike and
//! nothing came out of them, as most do, the statement is a short one.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Arc, PoisonError};

use super::failure::Failure;
use super::heads::Places;
use super::held::Over;
use super::session::{Session, Shared};
use super::submit::store;
use crate::batch::Row;
use crate::outcome::{self, Counters, Entry};
use crate::{Lease, LeaseAnswer, LeaseRef, Result, Settlement, State, TaskId};

/// The most outputs and failures of one statement, unless one alone has more: far below the 1 GiB that the server takes at once.
const ROUND_BYTES_MAX: usize = 32 << 20;

/// Settlements whose follow-ups keep their bounds.
#[derive(Clone)]
pub(super) struct Group(Arc<Inner>);

struct Inner {
    asked: Vec<LeaseRef>,
    entries: Vec<Entry>,
    /// The lease counts even if its time is over: only for taking back what is lost.
    ended_too: bool,
}

/// What was written.
#[derive(Default)]
struct Written {
    held: HashSet<Lease>,
    /// Something waits again, or is new.
    wakes: bool,
    /// Where the first of what is ready again stands.
    places: Places,
}

impl Group {
    /// Check the follow-ups.
    ///
    /// # Errors
    /// [`crate::Error::InvalidTask`] for the first one that breaks a bound.
    pub(super) fn new(settlements: &[Settlement]) -> Result<Self> {
        Self::with(settlements, false)
    }

    /// Settlements of attempts that were lost, whether or not their leases have run out.
    pub(super) fn of_lost(settlements: &[Settlement]) -> Result<Self> {
        Self::with(settlements, true)
    }

    fn with(settlements: &[Settlement], ended_too: bool) -> Result<Self> {
        let entries = outcome::entries(settlements)?;
        let asked = settlements.iter().map(|settlement| settlement.lease_ref).collect();
        Ok(Self(Arc::new(Inner { asked, entries, ended_too })))
    }

    /// Write those whose lease holds, with what belongs to them.
    pub(super) async fn write(self, shared: &Arc<Shared>, doing: &'static str) -> Result<Vec<LeaseAnswer>> {
        let pass = shared.pass().await?;
        let (group, shared) = (self, Arc::clone(shared));
        let written = tokio::spawn(async move {
            let answers = group.write_within(&shared, doing).await;
            drop(pass);
            answers
        });
        written.await.unwrap_or(Err(crate::Error::Closed))
    }

    /// As [`Group::write`], for who holds a pass.
    pub(super) async fn write_within(self, shared: &Arc<Shared>, doing: &'static str) -> Result<Vec<LeaseAnswer>> {
        let group = self.clone();
        // If an earlier call ended without an answer from the server, it may have been done.
        let unsure: HashSet<LeaseRef> = shared.take_unsure(self.0.asked.iter().copied()).into_iter().collect();
        let again = !unsure.is_empty();
        let outcome = shared.repeat(doing, move |session| {
            let group = group.clone();
            session.again |= again;
            Box::pin(async move { group.write_alone(session).await })
        });
        let outcome = outcome.await;
        // Of what was busy nothing was done.
        let unknown = |error: &crate::Error| error.is_retryable() && !matches!(error, crate::Error::Busy { .. });
        if outcome.as_ref().is_err_and(|error| again || unknown(error)) {
            shared.note_unsure(self.0.asked.iter().copied());
        }
        outcome
    }

    async fn write_alone(&self, session: &mut Session) -> Result<Vec<LeaseAnswer>, Failure> {
        let with_others_keys = self.0.entries.iter().any(|entry| !entry.follow_ups.is_empty());
        let several = with_others_keys || rounds(&self.0.entries).len() > 1;
        // Entered before anything is locked, and remembered.
        plugin_ids(session, self.digests()).await?;
        if with_others_keys {
            // A producer whose transaction is open may hold the key of a follow-up for as long as it likes.
            session.begin_briefly().await?;
        } else if several {
            session.begin().await?;
        }
        let answers = match self.write_in(session).await {
            Err(failure) if with_others_keys && failure.is_lock_timeout() => {
                return Err(Failure::from(crate::Error::Busy { doing: "settling attempts with follow-up tasks" }));
            }
            answers => answers?,
        };
        if several {
            session.commit().await?;
        }
        Ok(answers)
    }

    fn digests(&self) -> BTreeSet<&str> {
        self.0.entries.iter().filter_map(|entry| entry.plugin_digest.as_deref()).collect()
    }

    /// Write, in the session's transaction if there is one.
    pub(super) async fn write_in(&self, session: &mut Session) -> Result<Vec<LeaseAnswer>, Failure> {
        let entries = &self.0.entries;
        let leases: HashSet<Lease> = entries.iter().map(|entry| entry.lease_ref.lease).collect();
        let mut over = session.shared.held.settling(&leases);
        let plugins = plugin_ids(session, self.digests()).await?;
        let mut written = Written::default();
        let rounds = rounds(entries);
        if rounds.len() > 1 {
            // No statement of several sees whether all are held.
            over.then.clear();
        }
        for round in rounds {
            written.add(match alike(&round).filter(|_| !self.0.ended_too) {
                Some(first) => finish(session, &round, first, &plugins, &over).await?,
                None => settle(session, &round, &plugins, &over, self.0.ended_too).await?,
            });
        }
        let follow_ups: Vec<Row> = entries
            .iter()
            .filter(|entry| written.held.contains(&entry.lease_ref.lease))
            .flat_map(|entry| entry.follow_ups.rows.iter().cloned())
            .collect();
        let mut stored = Places::default();
        if !follow_ups.is_empty() {
            let created = store(session.db()?, &follow_ups).await?;
            written.wakes |= !created.keys.is_empty();
            stored = created.firsts;
            session.counts(1);
        }
        let gone = if written.held.len() == entries.len() { over.then } else { Vec::new() };
        session.counts(1);
        let (leases, places, wakes) = (written.held.clone(), std::mem::take(&mut written.places), written.wakes);
        session.afterwards(move |shared| {
            shared.held.settled(leases.into_iter(), &gone);
            for (queue, place) in places.iter() {
                shared.marks.lower(queue, place);
            }
            for (queue, place) in stored.iter() {
                shared.marks.stored(queue, place);
            }
            if wakes {
                shared.wake();
            }
        });
        if session.again && written.held.len() < entries.len() {
            let rest = entries.iter().filter(|entry| !written.held.contains(&entry.lease_ref.lease));
            let before = written_before(session, rest).await?;
            written.held.extend(before);
        }
        // Each lease is answered as held once.
        let mut held = written.held;
        let answer = |lease_ref: &LeaseRef| if held.remove(&lease_ref.lease) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(self.0.asked.iter().map(answer).collect())
    }
}

impl Written {
    fn add(&mut self, other: Self) {
        self.held.extend(other.held);
        self.wakes |= other.wakes;
        self.places.extend(other.places);
    }
}

/// The entries in the order of their tasks, each task once a round: mostly one round, since of a task's leases only one can hold. A round is one
/// statement, so outputs and failures of one keep a bound.
fn rounds(entries: &[Entry]) -> Vec<Vec<&Entry>> {
    let mut rest: Vec<&Entry> = entries.iter().collect();
    rest.sort_unstable_by_key(|entry| (entry.lease_ref.task, entry.lease_ref.lease));
    let mut rounds = Vec::with_capacity(1);
    while !rest.is_empty() {
        let mut last = None;
        let mut bytes = 0_usize;
        let (round, later) = rest.into_iter().partition(|entry| {
            let is_first = bytes == 0;
            bytes = bytes.saturating_add(size(entry));
            last.replace(entry.lease_ref.task) != Some(entry.lease_ref.task) && (is_first || bytes <= ROUND_BYTES_MAX)
        });
        rounds.push(round);
        rest = later;
    }
    rounds
}

/// What an entry adds to a statement, follow-ups aside.
fn size(entry: &Entry) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    64 + entry.output.as_ref().map_or(0, Vec::len) + text(&entry.error_code) + text(&entry.error_message)
}

/// The first entry, if all have finished alike and leave nothing to be written beside the task.
fn alike<'e>(entries: &[&'e Entry]) -> Option<&'e Entry> {
    let first = *entries.first()?;
    let is_alike = |entry: &&Entry| {
        entry.row.state == State::Finished
            && entry.output.is_none()
            && entry.row.event == first.row.event
            && entry.row.after_ms == first.row.after_ms
            && entry.plugin_digest == first.plugin_digest
    };
    entries.iter().all(is_alike).then_some(first)
}

/// $1 tasks in ascending order, by which `width_bucket` finds a task's place in the other arrays; $2 their leases, $3 event, $4 plugin version, $5 retention, $6 claims that are over if all are held, $7 claims that are over.
pub(super) const FINISH: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    done AS (
        UPDATE laelaps.task SET state = 'finished', until = NULL, event = $3, plugin = coalesce($4, plugin),
            attempts = least(attempts::int8 + 1, 2147483647), finished_at = (SELECT now FROM clock), retained_until = (SELECT now FROM clock) + $5
        WHERE id = ANY($1::int8[]) AND lease = ($2::int8[])[width_bucket(id, $1::int8[])] AND state = 'running'
            AND until > (SELECT now FROM clock)
        RETURNING id, lease, type, queue, user_name, root),
    kept AS (
        INSERT INTO laelaps.retention (until, tasks)
        SELECT (SELECT now FROM clock) + $5, array_agg(id) FROM done HAVING count(*) > 0),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, stopped)
        SELECT user_name, queue, count(*) FROM done WHERE user_name <> '' GROUP BY queue, user_name RETURNING queue, user_name),
    counted AS (INSERT INTO laelaps.tally (type, queue, live, finished) SELECT type, queue, -count(*), count(*) FROM done GROUP BY type, queue),
    ended AS (DELETE FROM laelaps.descendant WHERE task = ANY(ARRAY(SELECT id FROM done WHERE root IS NOT NULL))),
    over AS (
        DELETE FROM laelaps.claim WHERE id = ANY(ARRAY(SELECT id FROM laelaps.claim WHERE id = ANY($7::int8[]
            || CASE WHEN (SELECT count(*) FROM done) = cardinality($1::int8[]) THEN $6::int8[] ELSE '{}' END) FOR UPDATE SKIP LOCKED)))
    SELECT array_agg(lease), EXISTS (SELECT FROM changed CROSS JOIN LATERAL (SELECT FROM laelaps.account WHERE account.queue = changed.queue
        AND account.user_name = changed.user_name AND head_task IS NOT NULL AND NOT open OFFSET 0) AS closed) FROM done";

async fn finish(
    session: &mut Session,
    entries: &[&Entry],
    first: &Entry,
    plugins: &HashMap<String, i32>,
    over: &Over,
) -> Result<Written, Failure> {
    let (held, opens): (Option<Vec<i64>>, bool) = sqlx::query_as(FINISH)
        .bind(entries.iter().map(|entry| entry.lease_ref.task.0).collect::<Vec<i64>>())
        .bind(entries.iter().map(|entry| entry.lease_ref.lease.0).collect::<Vec<i64>>())
        .bind(first.row.event)
        .bind(plugin(first, plugins))
        .bind(first.row.after_ms)
        .bind(&over.then)
        .bind(&over.now)
        .fetch_one(session.db()?)
        .await?;
    Ok(Written { held: held.into_iter().flatten().map(Lease).collect(), wakes: opens, places: Places::default() })
}

/// $1 tasks in ascending order; for each in its place: $2 lease, $3 state (1 waiting, 2 finished, 3 failed, 4 waiting apart for a host that serves
/// its type, of which no attempt is recorded: nothing has happened to it), $5 event (a place in $4), $6 whether
/// it counts, $7 delay or retention, $8 plugin version, $9 to $12 counters, $13 and $14 failure, $15 output. $16 they are lost: leases that have
/// ended count too, and losses are as given; else they only ever get fewer, since one may have been excused meanwhile. $17 and $18 as $6 and $7 of [`FINISH`].
pub(super) const SETTLE: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    done AS (
        UPDATE laelaps.task SET
            state = (ARRAY['waiting', 'finished', 'failed', 'waiting']::laelaps.state[])[($3::int4[])[width_bucket(id, $1::int8[])]],
            until = NULL, event = ($4::text[])[($5::int4[])[width_bucket(id, $1::int8[])]],
            plugin = coalesce(($8::int4[])[width_bucket(id, $1::int8[])], plugin),
            attempts = least(attempts::int8 + ($6::int4[])[width_bucket(id, $1::int8[])], 2147483647),
            run_at = CASE WHEN ($3::int4[])[width_bucket(id, $1::int8[])] = 1
                THEN coalesce((SELECT now FROM clock) + ($7::int8[])[width_bucket(id, $1::int8[])], run_at) ELSE run_at END,
            finished_at = CASE WHEN ($3::int4[])[width_bucket(id, $1::int8[])] IN (2, 3) THEN (SELECT now FROM clock) END,
            retained_until = CASE WHEN ($3::int4[])[width_bucket(id, $1::int8[])] IN (2, 3)
                THEN (SELECT now FROM clock) + ($7::int8[])[width_bucket(id, $1::int8[])] END,
            releases = coalesce(($9::int4[])[width_bucket(id, $1::int8[])], releases),
            lost = CASE WHEN $16 THEN ($10::int4[])[width_bucket(id, $1::int8[])]
                ELSE nullif(least(($10::int4[])[width_bucket(id, $1::int8[])], coalesce(lost, 0)), 0) END,
            lost_alone = CASE WHEN $16 THEN ($11::int4[])[width_bucket(id, $1::int8[])]
                ELSE nullif(least(($11::int4[])[width_bucket(id, $1::int8[])], coalesce(lost_alone, 0)), 0) END,
            lost_at = CASE WHEN $16 THEN coalesce(lost_at, (SELECT now FROM clock))
                WHEN least(($10::int4[])[width_bucket(id, $1::int8[])], coalesce(lost, 0)) > 0 THEN lost_at END,
            alone = coalesce(($12::bool[])[width_bucket(id, $1::int8[])], alone)
        WHERE id = ANY($1::int8[]) AND lease = ($2::int8[])[width_bucket(id, $1::int8[])] AND state = 'running'
            AND (until > (SELECT now FROM clock) OR $16)
        RETURNING id, lease, state, type, queue, user_name, run_at, turn, bytes, max_running, alone, host, retained_until, event, root,
            width_bucket(id, $1::int8[]) AS place, (SELECT now FROM clock) AS now,
            least(attempts::int8 - ($6::int4[])[width_bucket(id, $1::int8[])] + 1, 2147483647)::int4 AS attempt,
            ($3::int4[])[width_bucket(id, $1::int8[])] = 4 AS is_unserved, ($3::int4[])[width_bucket(id, $1::int8[])] = 1 AND NOT alone
                AND run_at <= (SELECT now FROM clock) AS is_ready),
    ready AS (
        INSERT INTO laelaps.ready (turn, task, bytes, max_running, user_name, queue)
        SELECT turn, id, bytes, max_running, user_name, queue FROM done WHERE is_ready ON CONFLICT DO NOTHING),
    suspect AS (
        INSERT INTO laelaps.suspect (turn, task, queue) SELECT turn, id, queue FROM done
        WHERE state = 'waiting' AND alone AND NOT is_unserved AND run_at <= now ON CONFLICT DO NOTHING),
    unserved AS (
        INSERT INTO laelaps.unserved (turn, task, queue, type, user_name) SELECT turn, id, queue, type, user_name FROM done
        WHERE is_unserved AND run_at <= now ON CONFLICT DO NOTHING),
    later AS (
        INSERT INTO laelaps.scheduled (run_at, task) SELECT run_at, id FROM done WHERE state = 'waiting' AND run_at > now
        ON CONFLICT DO NOTHING),
    changed AS (
        INSERT INTO laelaps.account_change (user_name, queue, stopped, turn, task, max_running)
        SELECT user_name, queue, count(*), min(turn) FILTER (WHERE is_ready), (array_agg(id ORDER BY turn, id) FILTER (WHERE is_ready))[1],
            (array_agg(max_running ORDER BY turn, id) FILTER (WHERE is_ready))[1]
        FROM done WHERE user_name <> '' GROUP BY queue, user_name RETURNING queue, user_name),
    counted AS (
        INSERT INTO laelaps.tally (type, queue, live, scheduled, finished, failed)
        SELECT type, queue, -count(*) FILTER (WHERE state <> 'waiting'), count(*) FILTER (WHERE state = 'waiting' AND run_at > now),
            count(*) FILTER (WHERE state = 'finished'), count(*) FILTER (WHERE state = 'failed')
        FROM done GROUP BY type, queue),
    kept AS (
        INSERT INTO laelaps.retention (until, tasks)
        SELECT retained_until, array_agg(id) FROM done WHERE state <> 'waiting' GROUP BY retained_until),
    ended AS (
        DELETE FROM laelaps.descendant WHERE task = ANY(ARRAY(SELECT id FROM done WHERE state <> 'waiting' AND root IS NOT NULL))),
    outputs AS (
        INSERT INTO laelaps.output (task, output)
        SELECT id, ($15::bytea[])[place] FROM done WHERE ($15::bytea[])[place] IS NOT NULL
        ON CONFLICT (task) DO UPDATE SET output = excluded.output),
    failures AS (
        INSERT INTO laelaps.failure (task, code, message)
        SELECT id, ($13::text[])[place], ($14::text[])[place] FROM done
        WHERE ($13::text[])[place] IS NOT NULL OR ($14::text[])[place] IS NOT NULL
        ON CONFLICT (task) DO UPDATE SET code = excluded.code, message = excluded.message),
    attempts AS (
        INSERT INTO laelaps.attempt (task, lease, attempt, host, plugin, ended_at, event, code, message)
        SELECT id, lease, attempt, host, ($8::int4[])[place], now, event, ($13::text[])[place], ($14::text[])[place]
        FROM done WHERE state <> 'finished' AND NOT is_unserved ON CONFLICT DO NOTHING),
    trimmed AS (
        DELETE FROM laelaps.attempt WHERE task = ANY(ARRAY(SELECT id FROM done WHERE state <> 'finished' AND NOT is_unserved))
        AND lease <= (SELECT newer.lease FROM laelaps.attempt AS newer WHERE newer.task = attempt.task
            ORDER BY newer.lease DESC OFFSET 19 LIMIT 1)),
    over AS (
        DELETE FROM laelaps.claim WHERE id = ANY(ARRAY(SELECT id FROM laelaps.claim WHERE id = ANY($18::int8[]
            || CASE WHEN (SELECT count(*) FROM done) = cardinality($1::int8[]) THEN $17::int8[] ELSE '{}' END) FOR UPDATE SKIP LOCKED)))
    SELECT array_agg(lease), coalesce(bool_or(state = 'waiting'), false) OR EXISTS (SELECT FROM changed CROSS JOIN LATERAL (
            SELECT FROM laelaps.account WHERE account.queue = changed.queue AND account.user_name = changed.user_name
            AND head_task IS NOT NULL AND NOT open OFFSET 0) AS closed),
        array_agg(queue ORDER BY id) FILTER (WHERE is_ready), array_agg(turn ORDER BY id) FILTER (WHERE is_ready),
        array_agg(id ORDER BY id) FILTER (WHERE is_ready)
    FROM done";

async fn settle(
    session: &mut Session,
    entries: &[&Entry],
    plugins: &HashMap<String, i32>,
    over: &Over,
    ended_too: bool,
) -> Result<Written, Failure> {
    type Answer = (Option<Vec<i64>>, bool, Option<Vec<String>>, Option<Vec<i64>>, Option<Vec<i64>>);
    let counter = |of: fn(&Counters) -> Option<u32>| {
        let number = |entry: &&Entry| of(&entry.row.counters).map(|number| i32::try_from(number).unwrap_or(i32::MAX));
        entries.iter().map(number).collect::<Vec<Option<i32>>>()
    };
    let text = |of: fn(&Entry) -> Option<&String>| {
        entries.iter().map(|entry| of(entry).map(|text| clean(text))).collect::<Vec<Option<String>>>()
    };
    let events: Vec<&str> = entries.iter().map(|entry| entry.row.event).collect::<BTreeSet<&str>>().into_iter().collect();
    let event = |entry: &&Entry| events.iter().position(|event| *event == entry.row.event).map(|place| whole(place + 1));
    let state = |entry: &&Entry| match entry.row.state {
        State::Finished => 2,
        State::Failed => 3,
        _ if entry.row.unserved => 4,
        _ => 1,
    };
    let (held, waits, queues, turns, tasks): Answer = sqlx::query_as(SETTLE)
        .bind(entries.iter().map(|entry| entry.lease_ref.task.0).collect::<Vec<i64>>())
        .bind(entries.iter().map(|entry| entry.lease_ref.lease.0).collect::<Vec<i64>>())
        .bind(entries.iter().map(state).collect::<Vec<i32>>())
        .bind(&events)
        .bind(entries.iter().map(event).collect::<Vec<Option<i32>>>())
        .bind(entries.iter().map(|entry| i32::from(entry.row.counted)).collect::<Vec<i32>>())
        .bind(entries.iter().map(|entry| entry.row.after_ms).collect::<Vec<Option<i64>>>())
        .bind(entries.iter().map(|entry| plugin(entry, plugins)).collect::<Vec<Option<i32>>>())
        .bind(counter(|counters| counters.releases))
        .bind(counter(|counters| counters.lost))
        .bind(counter(|counters| counters.lost_alone))
        .bind(entries.iter().map(|entry| entry.row.counters.alone).collect::<Vec<Option<bool>>>())
        .bind(text(|entry| entry.error_code.as_ref()))
        .bind(text(|entry| entry.error_message.as_ref()))
        .bind(entries.iter().map(|entry| entry.output.as_deref()).collect::<Vec<Option<&[u8]>>>())
        .bind(ended_too)
        .bind(&over.then)
        .bind(&over.now)
        .fetch_one(session.db()?)
        .await?;
    let mut places = Places::default();
    for (queue, place) in queues.into_iter().flatten().zip(turns.into_iter().flatten().zip(tasks.into_iter().flatten())) {
        places.add(&queue, place);
    }
    Ok(Written { held: held.into_iter().flatten().map(Lease).collect(), wakes: waits, places })
}

/// A small number as the database counts.
fn whole(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn plugin(entry: &Entry, plugins: &HashMap<String, i32>) -> Option<i32> {
    entry.plugin_digest.as_deref().and_then(|digest| plugins.get(digest)).copied()
}

/// Text as PostgreSQL can hold it: all but the character zero.
pub(super) fn clean(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}

/// Those of the settlements that were written by an earlier try, whose answer was lost. What went apart left no record: the task's row tells it until it
/// is claimed again.
async fn written_before(session: &mut Session, entries: impl Iterator<Item = &Entry>) -> Result<Vec<Lease>, Failure> {
    const WRITTEN: &str = "SELECT asked.lease
        FROM unnest($1::int8[], $2::int8[], $3::text[]) AS asked (task, lease, event)
        CROSS JOIN LATERAL (
            SELECT FROM laelaps.task WHERE task.id = asked.task AND task.lease = asked.lease AND task.state <> 'running'
                AND task.event = asked.event
            UNION ALL
            SELECT FROM laelaps.attempt WHERE attempt.task = asked.task AND attempt.lease = asked.lease AND attempt.event = asked.event
            LIMIT 1) AS written";
    let mut asked: (Vec<i64>, Vec<i64>, Vec<&str>) = Default::default();
    for entry in entries {
        let LeaseRef { task: TaskId(task), lease: Lease(lease) } = entry.lease_ref;
        asked.0.push(task);
        asked.1.push(lease);
        asked.2.push(entry.row.event);
    }
    let (tasks, leases, events) = asked;
    let written: Vec<i64> = sqlx::query_scalar(WRITTEN).bind(tasks).bind(leases).bind(events).fetch_all(session.db()?).await?;
    Ok(written.into_iter().map(Lease).collect())
}

/// The numbers of plugin versions, entered where they are new.
pub(super) async fn plugin_ids(session: &mut Session, digests: BTreeSet<&str>) -> Result<HashMap<String, i32>, Failure> {
    const FIND: &str = "SELECT digest, id FROM laelaps.plugin_version WHERE digest = ANY($1)";
    const ENTER: &str = "INSERT INTO laelaps.plugin_version (digest) SELECT digest FROM unnest($1::text[]) AS asked (digest)
        WHERE NOT EXISTS (SELECT FROM laelaps.plugin_version WHERE plugin_version.digest = asked.digest) ORDER BY digest
        ON CONFLICT (digest) DO NOTHING";
    let shared = Arc::clone(&session.shared);
    let known = |ids: &HashMap<String, i32>| -> HashMap<String, i32> {
        digests.iter().filter_map(|digest| ids.get_key_value(*digest)).map(|(digest, id)| (digest.clone(), *id)).collect()
    };
    let ids = known(&shared.plugins.read().unwrap_or_else(PoisonError::into_inner));
    if ids.len() == digests.len() {
        return Ok(ids);
    }
    let asked: Vec<String> = digests.iter().map(|digest| clean(digest)).collect();
    sqlx::query(ENTER).bind(&asked).execute(session.db()?).await?;
    let found: Vec<(String, i32)> = sqlx::query_as(FIND).bind(&asked).fetch_all(session.db()?).await?;
    // Entered in a transaction that is still open they might not be there in the end.
    if !session.is_in_transaction() {
        shared.plugins.write().unwrap_or_else(PoisonError::into_inner).extend(found.iter().cloned());
    }
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Attempt, Event, Policy};
    use std::time::Duration;

    #[test]
    fn a_statement_holds_only_so_much_output_unless_one_alone_has_more() {
        let attempt = Attempt {
            attempt: 1,
            max_attempts: None,
            releases: 0,
            lost: 0,
            lost_alone: 0,
            alone: false,
            lost_for: Duration::ZERO,
        };
        let settled = |(task, bytes): (i64, usize)| {
            let event = Event::Finish { output: Some(vec![0; bytes]), retention: None };
            let lease_ref = LeaseRef { task: TaskId(task), lease: Lease(task) };
            Settlement::of(lease_ref, event, attempt, &Policy::default(), 0.0, None, Vec::new())
        };
        let sizes = [ROUND_BYTES_MAX + 1, ROUND_BYTES_MAX / 2, 10, ROUND_BYTES_MAX / 2, 10];
        let group: Vec<Settlement> = (1..).zip(sizes).map(settled).collect();
        let entries = outcome::entries(&group).expect("there are no follow-ups");
        let rounds: Vec<Vec<i64>> =
            rounds(&entries).iter().map(|round| round.iter().map(|entry| entry.lease_ref.task.0).collect()).collect();
        assert_eq!(rounds, [vec![1], vec![2, 3], vec![4, 5]]);
    }
}
