//! Settlements: what `settlement.rs` decided, written under the lease.

use std::collections::{BTreeSet, HashMap, HashSet};

use sqlx::Row as _;

use super::accounts::{Changes, Owner, Waiting, json};
use super::aside;
use super::failure::{self, Failure};
use super::rows::Columns;
use super::submit::{end_descent, store_all};
use super::writer::Session;
use crate::batch::Batch;
use crate::outcome::{self, Counters, Entry};
use crate::{AttemptRecord, LeaseAnswer, LeaseRef, Result, Settlement, State, fair};

/// Ended tasks that share a row of `retention`.
const ENDED_TOGETHER: usize = 500;
/// Outputs of one statement, unless one alone is larger.
const OUTPUT_BYTES_MAX: usize = 32 << 20;
/// Settlements whose follow-ups keep their bounds.
pub(super) struct Group {
    asked: Vec<LeaseRef>,
    entries: Vec<Entry>,
    /// The lease counts even if its time is over: only for taking back what is lost.
    ended_too: bool,
}

/// What is needed of a task's row before it is settled: number, lease, type, user, most running of its user, when it could run,
/// attempts, host, whether it runs alone, root of a follow-up, priority, queue.
#[derive(serde::Deserialize)]
struct Settled(i64, i64, String, String, Option<i64>, i64, i64, Option<i64>, i64, Option<i64>, i64, String);

impl Group {
    /// Check the follow-ups.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] for the first one that breaks a bound.
    pub(super) fn new(settlements: &[Settlement]) -> Result<Self> {
        Self::with(settlements, false)
    }

    /// Settlements of attempts that were lost, whether or not their leases have run out.
    pub(super) fn of_lost(settlements: &[Settlement]) -> Result<Self> {
        Self::with(settlements, true)
    }

    fn with(settlements: &[Settlement], ended_too: bool) -> Result<Self> {
        let entries = outcome::entries(settlements)?;
        Ok(Self { asked: settlements.iter().map(|settlement| settlement.lease_ref).collect(), entries, ended_too })
    }

    /// Write those whose lease holds, with what belongs to them.
    pub(super) async fn write(self, session: &mut Session) -> Result<Vec<LeaseAnswer>, Failure> {
        let settled = held(session, &self.entries, self.ended_too).await?;
        let mut held: HashSet<LeaseRef> = settled.keys().copied().collect();
        let kept: Vec<Entry> = self.entries.into_iter().filter(|entry| held.contains(&entry.lease_ref)).collect();
        if kept.is_empty() {
            return Ok(vec![LeaseAnswer::Lost; self.asked.len()]);
        }
        let plugins = plugin_ids(session, kept.iter().filter_map(|entry| entry.plugin_digest.as_deref()).collect()).await?;
        update_tasks(session, &kept, &plugins, self.ended_too).await?;
        let mut changes = Changes::default();
        place(session, &kept, &settled, &mut changes).await?;
        write_beside(session, &kept, &settled, &plugins).await?;
        let follow_ups: Vec<Batch> = kept.into_iter().map(|entry| entry.follow_ups).filter(|batch| !batch.is_empty()).collect();
        if !follow_ups.is_empty() {
            store_all(follow_ups, session, &mut changes).await?;
        }
        changes.write(session).await?;
        // Each lease is answered as held once.
        let answer = |lease_ref: &LeaseRef| if held.remove(lease_ref) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(self.asked.iter().map(answer).collect())
    }
}

/// The numbers of plugin versions, entered where they are new.
async fn plugin_ids(session: &mut Session, digests: BTreeSet<&str>) -> Result<HashMap<String, i64>, Failure> {
    const FIND: &str = "SELECT digest, id FROM plugin_version WHERE digest IN (SELECT value FROM json_each(?1))";
    const ENTER: &str = "INSERT INTO plugin_version (digest) SELECT value FROM json_each(?1) WHERE true
        ON CONFLICT (digest) DO NOTHING RETURNING digest, id";
    if digests.is_empty() {
        return Ok(HashMap::new());
    }
    let found: Vec<(String, i64)> = sqlx::query_as(FIND).bind(json(&digests)).fetch_all(session.db()).await?;
    let mut ids: HashMap<String, i64> = found.into_iter().collect();
    if ids.len() < digests.len() {
        let entered: Vec<(String, i64)> = sqlx::query_as(ENTER).bind(json(&digests)).fetch_all(session.db()).await?;
        ids.extend(entered);
    }
    Ok(ids)
}

/// The fence. Leases are asked for as an object, task to lease, and answered in one text: rows and their columns have their price.
pub(super) const HELD: &str =
    "SELECT json_group_array(json_array(task.id, task.lease, task.type, task.user, task.max_running, task.run_at,
            task.attempts, task.host, task.alone, task.root, task.priority, task.queue))
        FROM json_each(?1) AS s CROSS JOIN task ON task.id = CAST(s.key AS INTEGER)
        WHERE task.lease = s.value AND task.state = 'running' AND (task.until > ?2 OR ?3)";

/// Those of the asked that hold their lease.
async fn held(session: &mut Session, entries: &[Entry], ended_too: bool) -> Result<HashMap<LeaseRef, Settled>, Failure> {
    let leases = by_task(entries.iter());
    let now = session.now;
    let query = sqlx::query(HELD).bind(leases.clone()).bind(now).bind(ended_too);
    let mut rows = query.fetch_one(session.db()).await?.try_get_unchecked::<Vec<u8>, _>(0)?;
    if std::str::from_utf8(&rows).is_err() {
        // Somebody has written what is no text into a running task's row.
        let unreadable = unreadable(session, leases.clone()).await?;
        aside::set_aside(session, &unreadable).await?;
        let query = sqlx::query(HELD).bind(leases).bind(now).bind(ended_too);
        rows = query.fetch_one(session.db()).await?.try_get_unchecked(0)?;
    }
    let rows: Vec<Settled> = serde_json::from_slice(&rows).map_err(|error| sqlx::Error::Decode(error.into()))?;
    let by_lease = |row: Settled| (LeaseRef { task: crate::TaskId(row.0), lease: crate::Lease(row.1) }, row);
    Ok(rows.into_iter().map(by_lease).collect())
}

/// Those of the asked, an object of task to lease, that have a type, a queue or a user that cannot be read.
async fn unreadable(session: &mut Session, leases: String) -> Result<Vec<i64>, Failure> {
    const NAMES: &str =
        "SELECT task.id, task.type, task.user, task.queue FROM json_each(?1) AS s CROSS JOIN task ON task.id = CAST(s.key AS INTEGER)
        WHERE task.lease = s.value AND task.state = 'running'";
    let mut unreadable = Vec::new();
    for row in sqlx::query(NAMES).bind(leases).fetch_all(session.db()).await? {
        let mut columns = Columns::of(&row);
        columns.text(1, "type");
        columns.text(2, "user");
        columns.queue(3);
        let task = columns.whole(0, "number");
        unreadable.extend(columns.problem().map(|_| task));
    }
    Ok(unreadable)
}

/// An object that names each task's lease.
fn by_task<'a>(entries: impl Iterator<Item = &'a Entry>) -> String {
    let pairs: Vec<String> = entries.map(|entry| format!("\"{}\":{}", entry.lease_ref.task.0, entry.lease_ref.lease.0)).collect();
    format!("{{{}}}", pairs.join(","))
}

/// What most of a group have in common, as a rule: finished, by one plugin version, kept equally long.
pub(super) const FINISH: &str = "UPDATE task SET state = 'finished', until = NULL, event = ?4, plugin = coalesce(?5, plugin),
            attempts = attempts + 1, finished_at = ?2, retained_until = ?2 + ?6
        FROM json_each(?1) AS s
        WHERE task.id = CAST(s.key AS INTEGER) AND task.lease = s.value AND task.state = 'running' AND (task.until > ?2 OR ?3)";

pub(super) const SETTLE: &str = "UPDATE task SET
            state = s.state, until = NULL, event = s.event, plugin = coalesce(s.plugin, task.plugin), attempts = attempts + s.counted,
            run_at = CASE s.state WHEN 'waiting' THEN coalesce(?2 + s.after_ms, task.run_at) ELSE run_at END,
            finished_at = CASE s.state WHEN 'waiting' THEN NULL ELSE ?2 END,
            retained_until = CASE s.state WHEN 'waiting' THEN NULL ELSE ?2 + s.after_ms END,
            releases = coalesce(s.releases, task.releases), lost = coalesce(s.lost, task.lost),
            lost_alone = coalesce(s.lost_alone, task.lost_alone), alone = coalesce(s.alone, task.alone),
            lost_at = CASE WHEN coalesce(s.lost, task.lost) > 0 THEN coalesce(task.lost_at, ?2) END
        FROM (SELECT value ->> 0 AS id, value ->> 1 AS lease, value ->> 2 AS state, value ->> 3 AS event, value ->> 4 AS counted,
                value ->> 5 AS after_ms, value ->> 6 AS plugin, value ->> 7 AS releases, value ->> 8 AS lost,
                value ->> 9 AS lost_alone, value ->> 10 AS alone
            FROM json_each(?1)) AS s
        WHERE task.id = s.id AND task.lease = s.lease AND task.state = 'running' AND (task.until > ?2 OR ?3)";

/// Move the tasks' rows on, where the lease is still theirs.
async fn update_tasks(
    session: &mut Session,
    kept: &[Entry],
    plugins: &HashMap<String, i64>,
    ended_too: bool,
) -> Result<(), Failure> {
    let now = session.now;
    let plugin = |entry: &Entry| entry.plugin_digest.as_deref().and_then(|digest| plugins.get(digest)).copied();
    let first = kept.iter().find(|entry| entry.row.state == State::Finished);
    let is_alike = |entry: &Entry| {
        entry.row.state == State::Finished
            && first.is_some_and(|first| entry.row.after_ms == first.row.after_ms && entry.plugin_digest == first.plugin_digest)
    };
    let (alike, others): (Vec<&Entry>, Vec<&Entry>) = kept.iter().partition(|entry| is_alike(entry));
    if let Some(first) = first {
        let query = sqlx::query(FINISH).bind(by_task(alike.into_iter())).bind(now).bind(ended_too);
        query.bind(first.row.event).bind(plugin(first)).bind(first.row.after_ms).execute(session.db()).await?;
    }
    if !others.is_empty() {
        let rows = json(others.into_iter().map(|entry| {
            let row = &entry.row;
            let Counters { releases, lost, lost_alone, alone } = row.counters;
            let alone = alone.map(u8::from);
            let LeaseRef { task, lease } = entry.lease_ref;
            let counted = u8::from(row.counted);
            (task, lease, row.state.as_str(), row.event, counted, row.after_ms, plugin(entry), releases, lost, lost_alone, alone)
        }));
        sqlx::query(SETTLE).bind(rows).bind(now).bind(ended_too).execute(session.db()).await?;
    }
    Ok(())
}

/// Queue what waits again, enter what ended into the order of removal, and note both.
async fn place(
    session: &mut Session,
    kept: &[Entry],
    settled: &HashMap<LeaseRef, Settled>,
    changes: &mut Changes,
) -> Result<(), Failure> {
    let now = session.now;
    let mut waiting = Vec::new();
    let mut ended = Vec::with_capacity(kept.len());
    let mut descendants = Vec::new();
    let mut apart = Vec::new();
    for entry in kept {
        let Some(Settled(task, _, task_type, user, max_running, run_at, .., root, priority, queue)) =
            settled.get(&entry.lease_ref)
        else {
            continue;
        };
        let owner = Owner { queue: queue.clone(), user: user.clone() };
        changes.stopped(&owner);
        // As the statement has written it: run_at of what waits, retained_until of what has ended.
        let moment = entry.row.after_ms.map_or(*run_at, |after_ms| now + after_ms);
        if entry.row.unserved {
            apart.push((queue.as_str(), task_type.as_str(), user.as_str(), fair::turn(*priority, *run_at), *task));
        } else if entry.row.state == State::Waiting {
            let alone = entry.row.counters.alone.unwrap_or_default();
            waiting.push(Waiting { task: *task, run_at: moment, priority: *priority, owner, max_running: *max_running, alone });
        } else {
            changes.ended(queue, task_type, entry.row.state);
            ended.push((moment, *task));
            descendants.extend(root.map(|_| *task));
        }
    }
    changes.enqueue(session, &waiting).await?;
    changes.put_apart(session, &apart).await?;
    end_descent(session, &descendants).await?;
    retain(session, ended).await
}

/// Enter ended tasks, each with the end of its retention, into the order of removal.
pub(super) async fn retain(session: &mut Session, mut ended: Vec<(i64, i64)>) -> Result<(), Failure> {
    const RETAIN: &str = "INSERT INTO retention (until, tasks) SELECT value ->> 0, value -> 1 FROM json_each(?1)";
    if ended.is_empty() {
        return Ok(());
    }
    ended.sort_unstable();
    let rows: Vec<(i64, Vec<i64>)> = ended
        .chunk_by(|one, next| one.0 == next.0)
        .flat_map(|alike| alike.chunks(ENDED_TOGETHER))
        .map(|chunk| (chunk[0].0, chunk.iter().map(|(_, task)| *task).collect()))
        .collect();
    sqlx::query(RETAIN).bind(json(rows)).execute(session.db()).await?;
    Ok(())
}

/// Write output, the last failure and the attempt's record.
async fn write_beside(
    session: &mut Session,
    kept: &[Entry],
    settled: &HashMap<LeaseRef, Settled>,
    plugins: &HashMap<String, i64>,
) -> Result<(), Failure> {
    const FAILURE: &str = "INSERT INTO failure (task, code, message)
        SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?1) WHERE true
        ON CONFLICT (task) DO UPDATE SET code = excluded.code, message = excluded.message";
    let mut outputs = Vec::new();
    let mut failures = Vec::new();
    let mut records = Vec::new();
    for entry in kept {
        let LeaseRef { task, lease } = entry.lease_ref;
        if let Some(output) = &entry.output {
            outputs.push((task.0, output.as_slice()));
        }
        if entry.error_code.is_some() || entry.error_message.is_some() {
            failures.push((task, &entry.error_code, &entry.error_message));
        }
        if entry.row.state != State::Finished
            && !entry.row.unserved
            && let Some(Settled(.., attempts, host, alone, _, _, _)) = settled.get(&entry.lease_ref)
        {
            let attempt = attempts.saturating_add(1);
            let plugin = entry.plugin_digest.as_deref().and_then(|digest| plugins.get(digest)).copied();
            let (code, message) = (entry.error_code.as_deref(), entry.error_message.as_deref());
            records.push((task.0, lease.0, attempt, *host, plugin, entry.row.event, code, message, *alone));
        }
    }
    write_outputs(session, &outputs).await?;
    if !failures.is_empty() {
        sqlx::query(FAILURE).bind(json(failures)).execute(session.db()).await?;
    }
    record_attempts(session, &records).await
}

/// Write outputs, by task: so many in one statement that its parameter stays far below what SQLite takes.
async fn write_outputs(session: &mut Session, mut outputs: &[(i64, &[u8])]) -> Result<(), Failure> {
    // If all outputs are empty, so is the parameter, and SQLite takes an empty one for NULL.
    const OUTPUT: &str = "INSERT INTO output (task, output)
        SELECT value ->> 0, coalesce(substr(?2, value ->> 1, value ->> 2), x'') FROM json_each(?1) WHERE true
        ON CONFLICT (task) DO UPDATE SET output = excluded.output";
    while !outputs.is_empty() {
        let mut sum = 0;
        let fitting = outputs.iter().take_while(|(_, output)| {
            sum += output.len();
            sum <= OUTPUT_BYTES_MAX
        });
        let (together, rest) = outputs.split_at(fitting.count().max(1));
        let mut bytes = Vec::with_capacity(together.iter().map(|(_, output)| output.len()).sum());
        let mut parts = Vec::with_capacity(together.len());
        for (task, output) in together {
            parts.push((task, bytes.len() + 1, output.len()));
            bytes.extend_from_slice(output);
        }
        sqlx::query(OUTPUT).bind(json(parts)).bind(bytes).execute(session.db()).await?;
        outputs = rest;
    }
    Ok(())
}

/// An attempt that is over: task, lease, number, host, plugin version, event, code and words of a failure, whether it ran alone.
pub(super) type Record<'a> = (i64, i64, i64, Option<i64>, Option<i64>, &'a str, Option<&'a str>, Option<&'a str>, i64);

pub(super) const TRIM_ATTEMPTS: &str = "DELETE FROM attempt WHERE task IN (SELECT value ->> 0 FROM json_each(?1))
        AND lease <= (SELECT newer.lease FROM attempt AS newer WHERE newer.task = attempt.task
            ORDER BY newer.lease DESC LIMIT 1 OFFSET ?2)";

/// Keep the records of attempts, of each task the newest few.
pub(super) async fn record_attempts(session: &mut Session, records: &[Record<'_>]) -> Result<(), Failure> {
    const RECORD: &str = "INSERT INTO attempt (task, lease, attempt, host, plugin, ended_at, event, code, message, alone)
        SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, ?2, value ->> 5, value ->> 6, value ->> 7, value ->> 8
        FROM json_each(?1) WHERE true ON CONFLICT (task, lease) DO NOTHING";
    if records.is_empty() {
        return Ok(());
    }
    let rows = json(records);
    let now = session.now;
    sqlx::query(RECORD).bind(rows.clone()).bind(now).execute(session.db()).await?;
    let kept = i64::try_from(AttemptRecord::KEPT).unwrap_or(i64::MAX);
    sqlx::query(TRIM_ATTEMPTS).bind(rows).bind(kept).execute(session.db()).await?;
    Ok(())
}

/// The fence of a running attempt, for writes of one task: whether its lease holds.
pub(super) async fn holds(session: &mut Session, lease_ref: LeaseRef) -> Result<bool, Failure> {
    const HOLDS: &str = "SELECT count(*) FROM task WHERE id = ?1 AND lease = ?2 AND state = 'running' AND until > ?3";
    let now = session.now;
    let LeaseRef { task, lease } = lease_ref;
    let found: i64 = sqlx::query_scalar(HOLDS).bind(task.0).bind(lease.0).bind(now).fetch_one(session.db()).await?;
    Ok(found == 1)
}

/// A state that came back from the database.
pub(super) fn state_of(word: &str) -> Result<State, Failure> {
    failure::state(word).map_err(Failure::from)
}
