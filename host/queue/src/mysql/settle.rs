//! Settlements: what `settlement.rs` decided, written under the lease.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use sqlx::Row as _;

use super::accounts::{Changes, Owner, Waiting};
use super::connect::text;
use super::failure::Failure;
use super::mend::{queue_of, user_of};
use super::rows::{Parts, json, lockable, names, parts, priority_in_range};
use super::session::{Session, Waiting as LockWait, moment};
use super::submit::{end_descent, new_mark, store_rows, wait_for_keys};
use super::{MySql, locked};
use crate::batch::Row;
use crate::outcome::{self, Counters, Entry, Outcome};
use crate::{AttemptRecord, Error, Lease, LeaseAnswer, LeaseRef, Result, Settlement, State, TaskId};

/// Ended tasks that share a row of `retention`.
const ENDED_TOGETHER: usize = 500;
/// Settlements whose outcome is not known, to be remembered until they are tried again.
const IN_DOUBT_MAX: usize = 10_000;

/// Settlements whose follow-ups keep their bounds.
pub(super) struct Group {
    asked: Vec<LeaseRef>,
    entries: Vec<Entry>,
    /// The numbers of the plugin versions that are named.
    plugins: HashMap<String, i64>,
    /// For the rows of follow-ups.
    mark: i64,
    /// The lease counts even if its time is over: only for taking back what is lost.
    ended_too: bool,
}

/// What is needed of a task's row before it is settled.
struct Settled {
    task_type: String,
    queue: String,
    user: String,
    max_running: Option<u32>,
    run_at: i64,
    priority: i64,
    attempts: u32,
    host: i64,
    is_follow_up: bool,
    alone: bool,
}

impl Group {
    /// Check the follow-ups.
    ///
    /// # Errors
    /// [`crate::Error::InvalidTask`] for the first one that breaks a bound.
    pub(super) fn new(settlements: &[Settlement], plugins: HashMap<String, i64>, ended_too: bool) -> Result<Self> {
        let asked = settlements.iter().map(|settlement| settlement.lease_ref).collect();
        Ok(Self { asked, entries: outcome::entries(settlements)?, plugins, mark: new_mark(), ended_too })
    }

    fn has_follow_ups(&self) -> bool {
        self.entries.iter().any(|entry| !entry.follow_ups.is_empty())
    }

    fn plugin(&self, entry: &Entry) -> Option<i64> {
        entry.plugin_digest.as_deref().and_then(|digest| self.plugins.get(digest)).copied()
    }

    /// Write those whose lease holds, with what belongs to them. `in_doubt` names leases that may have been settled by an earlier try.
    pub(super) async fn write(
        &self,
        session: &mut Session<'_>,
        in_doubt: &HashSet<LeaseRef>,
    ) -> Result<Vec<LeaseAnswer>, Failure> {
        let settled = held(session, &self.entries, self.ended_too).await?;
        let mut held: HashSet<LeaseRef> = settled.keys().copied().collect();
        let kept: Vec<&Entry> = self.entries.iter().filter(|entry| held.contains(&entry.lease_ref)).collect();
        if !kept.is_empty() {
            self.update_tasks(session, &kept).await?;
            let mut changes = Changes::default();
            place(session, &kept, &settled, &mut changes).await?;
            self.write_beside(session, &kept, &settled).await?;
            let follow_ups: Vec<Row> = kept.iter().flat_map(|entry| entry.follow_ups.rows.iter().cloned()).collect();
            if !follow_ups.is_empty() {
                // Whoever waits for a key in the midst of storing keeps all others from storing.
                wait_for_keys(session, &follow_ups).await?;
                store_rows(session, &follow_ups, self.mark, &mut changes).await?;
            }
            changes.write(session).await?;
        }
        let doubtful =
            |entry: &&Entry| !held.contains(&entry.lease_ref) && (session.repeated || in_doubt.contains(&entry.lease_ref));
        let doubtful: Vec<&Entry> = self.entries.iter().filter(doubtful).collect();
        if !doubtful.is_empty() {
            held.extend(settled_before(session, &doubtful).await?);
        }
        // Each lease is answered as held once.
        let answer = |lease_ref: &LeaseRef| if held.remove(lease_ref) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(self.asked.iter().map(answer).collect())
    }

    /// Move the tasks' rows on. The fence holds them.
    async fn update_tasks(&self, session: &mut Session<'_>, kept: &[&Entry]) -> Result<(), Failure> {
        let now = session.now;
        let first = kept.iter().find(|entry| entry.row.state == State::Finished);
        let is_alike = |entry: &&Entry| {
            entry.row.state == State::Finished
                && first
                    .is_some_and(|first| entry.row.after_ms == first.row.after_ms && entry.plugin_digest == first.plugin_digest)
        };
        let (alike, others): (Vec<&Entry>, Vec<&Entry>) = kept.iter().copied().partition(is_alike);
        if let Some(first) = first {
            let leases = json(alike.iter().map(|entry| (entry.lease_ref.task, entry.lease_ref.lease)));
            let until = now + first.row.after_ms.unwrap_or_default();
            let query = sqlx::query(FINISH).bind(leases).bind(first.row.event).bind(self.plugin(first)).bind(now).bind(until);
            query.execute(session.db()).await?;
        }
        if !others.is_empty() {
            for rows in session.chunks(others.into_iter().map(|entry| row(entry, self.plugin(entry), now))) {
                sqlx::query(SETTLE).bind(rows).execute(session.db()).await?;
            }
        }
        Ok(())
    }

    /// Write output, the last failure and the attempt's record.
    async fn write_beside(
        &self,
        session: &mut Session<'_>,
        kept: &[&Entry],
        settled: &HashMap<LeaseRef, Settled>,
    ) -> Result<(), Failure> {
        const OUTPUT: &str = concat!(
            "INSERT INTO laelaps_output (task, part, output) SELECT s.task, s.part, SUBSTRING(?, s.start, s.length) FROM ",
            parts!(),
            " ON DUPLICATE KEY UPDATE output = VALUES(output)"
        );
        const FAILURE: &str = "INSERT INTO laelaps_failure (task, code, message)
            SELECT s.task, s.code, s.message FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]',
                code VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]', message VARCHAR(4096) CHARACTER SET utf8mb4 PATH '$[2]')) AS s
            ON DUPLICATE KEY UPDATE code = VALUES(code), message = VALUES(message)";
        let mut outputs = Parts::new(session.bytes_max);
        let mut failures = Vec::new();
        let mut records = Vec::new();
        for entry in kept {
            let LeaseRef { task, lease } = entry.lease_ref;
            if let Some(output) = &entry.output {
                outputs.push(task.0, output.len(), output);
            }
            if entry.error_code.is_some() || entry.error_message.is_some() {
                failures.push((task, &entry.error_code, &entry.error_message));
            }
            // That a host does not serve a type is no attempt.
            if entry.row.state != State::Finished
                && !entry.row.unserved
                && let Some(found) = settled.get(&entry.lease_ref)
            {
                records.push(Record {
                    task: task.0,
                    lease: lease.0,
                    attempt: found.attempts.saturating_add(1),
                    host: found.host,
                    plugin: self.plugin(entry).unwrap_or(0),
                    event: entry.row.event,
                    alone: found.alone,
                    code: entry.error_code.as_deref(),
                    message: entry.error_message.as_deref(),
                });
            }
        }
        for (bytes, rows) in outputs.into_statements() {
            sqlx::query(OUTPUT).bind(bytes).bind(rows).execute(session.db()).await?;
        }
        for failures in session.chunks(failures) {
            sqlx::query(FAILURE).bind(failures).execute(session.db()).await?;
        }
        record_attempts(session, &records).await
    }
}

impl MySql {
    pub(super) async fn settle_group(&self, settlements: &[Settlement]) -> Result<Vec<LeaseAnswer>> {
        let plugins = self.plugins_of(settlements).await?;
        let group = Arc::new(Group::new(settlements, plugins, false)?);
        let leases: HashSet<LeaseRef> = group.asked.iter().copied().collect();
        let in_doubt: Arc<HashSet<LeaseRef>> = {
            let known = locked(&self.in_doubt);
            Arc::new(leases.iter().copied().filter(|lease_ref| known.contains(lease_ref)).collect())
        };
        // A producer may hold the key of a follow-up; the others are not to wait for it.
        let waiting = if group.has_follow_ups() { LockWait::OrBusy } else { LockWait::Long };
        let settled = self
            .run_waiting(waiting, "settling attempts", move |session| {
                let (group, in_doubt) = (Arc::clone(&group), Arc::clone(&in_doubt));
                Box::pin(async move { group.write(session, &in_doubt).await })
            })
            .await;
        if let Ok(answers) = &settled {
            let held = settlements.iter().zip(answers).filter(|(_, answer)| **answer == LeaseAnswer::Held);
            locked(&self.claims).settled(held.map(|(settlement, _)| settlement.lease_ref.lease));
        }
        let mut known = locked(&self.in_doubt);
        match &settled {
            _ if settled.is_ok() && known.is_empty() => {}
            // Whether the last try was committed may not be known; who tries again has to be told.
            Err(error) if error.is_retryable() && !matches!(error, Error::Busy { .. }) => {
                if known.len() + leases.len() > IN_DOUBT_MAX {
                    known.clear();
                }
                known.extend(leases);
            }
            _ => known.retain(|lease_ref| !leases.contains(lease_ref)),
        }
        settled
    }

    /// The numbers of the plugin versions that the settlements name, entered where they are new.
    pub(super) async fn plugins_of(&self, settlements: &[Settlement]) -> Result<HashMap<String, i64>> {
        let digests: BTreeSet<&str> = settlements.iter().filter_map(|settlement| settlement.plugin_digest.as_deref()).collect();
        self.plugin_ids(digests).await
    }

    /// The numbers of plugin versions, entered where they are new. They are never removed, so that they can be remembered.
    pub(super) async fn plugin_ids(&self, digests: BTreeSet<&str>) -> Result<HashMap<String, i64>> {
        const FIND: &str = concat!(
            "SELECT v.digest, v.id FROM ",
            names!(),
            " STRAIGHT_JOIN laelaps_plugin_version AS v FORCE INDEX (by_digest) ON v.digest = s.name"
        );
        const ENTER: &str = concat!("INSERT IGNORE INTO laelaps_plugin_version (digest) SELECT s.name FROM ", names!());
        let unknown: Vec<String> = {
            let known = locked(&self.plugins);
            digests.iter().filter(|digest| !known.contains_key(**digest)).map(|digest| (*digest).to_owned()).collect()
        };
        if !unknown.is_empty() {
            let unknown = json(unknown);
            let found: Vec<(Vec<u8>, i64)> = self
                .run("entering plugin versions", move |session| {
                    let unknown = unknown.clone();
                    Box::pin(async move {
                        sqlx::query(ENTER).bind(unknown.clone()).execute(session.db()).await?;
                        Ok(sqlx::query_as(FIND).bind(unknown).fetch_all(session.db()).await?)
                    })
                })
                .await?;
            let found = found.into_iter().map(|(digest, id)| (String::from_utf8_lossy(&digest).into_owned(), id));
            locked(&self.plugins).extend(found);
        }
        let known = locked(&self.plugins);
        Ok(digests.into_iter().filter_map(|digest| Some((digest.to_owned(), *known.get(digest)?))).collect())
    }
}

/// The rows of a set of leases.
macro_rules! leases {
    () => {
        "JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]')) AS s"
    };
}
pub(super) use leases;

/// The fence: the rows are held until the transaction ends.
pub(super) const HELD: &str = concat!(
    "SELECT t.id, t.lease, t.type, t.user, t.max_running, t.run_at, t.attempts, t.host, t.root IS NOT NULL,
        t.alone, t.priority, t.queue FROM ",
    lockable!(leases!()),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    WHERE t.lease = s.lease AND t.state = 'running' AND (t.until > ",
    moment!(),
    " OR ?) FOR UPDATE"
);

/// Those of the asked that hold their lease.
async fn held(session: &mut Session<'_>, entries: &[Entry], ended_too: bool) -> Result<HashMap<LeaseRef, Settled>, Failure> {
    let mut leases: Vec<(i64, i64)> = entries.iter().map(|entry| (entry.lease_ref.task.0, entry.lease_ref.lease.0)).collect();
    // Rows are held in one order, so that two who meet wait instead of standing in each other's way.
    leases.sort_unstable();
    let mut settled = HashMap::with_capacity(leases.len());
    for row in sqlx::query(HELD).bind(json(leases)).bind(ended_too).fetch_all(session.db()).await? {
        let lease_ref = LeaseRef { task: TaskId(row.try_get(0)?), lease: Lease(row.try_get(1)?) };
        let found = Settled {
            task_type: text(&row, 2)?,
            queue: queue_of(&row, 11)?,
            user: user_of(&row, 3)?,
            max_running: row.try_get(4)?,
            run_at: row.try_get(5)?,
            attempts: row.try_get(6)?,
            host: row.try_get(7)?,
            is_follow_up: row.try_get(8)?,
            alone: row.try_get(9)?,
            priority: row.try_get(10)?,
        };
        settled.insert(lease_ref, found);
    }
    Ok(settled)
}

/// Those that an earlier try has settled in this very way after all.
async fn settled_before(session: &mut Session<'_>, entries: &[&Entry]) -> Result<Vec<LeaseRef>, Failure> {
    const BEFORE: &str = "SELECT s.task, s.lease FROM JSON_TABLE(?, '$[*]' COLUMNS (
            task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]', event VARCHAR(32) CHARACTER SET utf8mb4 PATH '$[2]')) AS s
        STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
        LEFT JOIN laelaps_attempt AS a ON a.task = s.task AND a.lease = s.lease
        WHERE (t.lease = s.lease AND t.state <> 'running' AND t.event = s.event) OR a.event = s.event";
    let rows = json(entries.iter().map(|entry| (entry.lease_ref.task, entry.lease_ref.lease, entry.row.event)));
    let found: Vec<(i64, i64)> = sqlx::query_as(BEFORE).bind(rows).fetch_all(session.db()).await?;
    Ok(found.into_iter().map(|(task, lease)| LeaseRef { task: TaskId(task), lease: Lease(lease) }).collect())
}

/// What most of a group have in common, as a rule: finished, by one plugin version, kept equally long.
pub(super) const FINISH: &str = concat!(
    "UPDATE ",
    leases!(),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    SET t.state = 'finished', t.until = 0, t.event = ?, t.plugin = COALESCE(?, t.plugin),
        t.attempts = LEAST(t.attempts + 1, 4294967295),
        t.finished_at = ?, t.retained_until = ?, ",
    priority_in_range!(),
    " WHERE t.lease = s.lease AND t.state = 'running'"
);

pub(super) const SETTLE: &str = concat!(
    "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (
        task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]', state VARCHAR(10) CHARACTER SET utf8mb4 PATH '$[2]',
        event VARCHAR(32) CHARACTER SET utf8mb4 PATH '$[3]', counted INT PATH '$[4]', run_at BIGINT PATH '$[5]',
        finished_at BIGINT PATH '$[6]', retained_until BIGINT PATH '$[7]', plugin BIGINT PATH '$[8]', releases BIGINT PATH '$[9]',
        lost BIGINT PATH '$[10]', lost_alone BIGINT PATH '$[11]', alone INT PATH '$[12]', now BIGINT PATH '$[13]')) AS s
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    SET t.state = s.state, t.until = 0, t.event = s.event, t.plugin = COALESCE(s.plugin, t.plugin),
        t.attempts = LEAST(t.attempts + s.counted, 4294967295), t.run_at = COALESCE(s.run_at, t.run_at), t.finished_at = s.finished_at,
        t.retained_until = s.retained_until, t.releases = COALESCE(s.releases, t.releases), t.lost = COALESCE(s.lost, t.lost),
        t.lost_alone = COALESCE(s.lost_alone, t.lost_alone), t.alone = COALESCE(s.alone, t.alone),
        t.lost_at = CASE WHEN s.lost IS NULL THEN t.lost_at WHEN s.lost = 0 THEN 0 WHEN t.lost_at <> 0 THEN t.lost_at ELSE s.now END, ",
    priority_in_range!(),
    " WHERE t.lease = s.lease AND t.state = 'running'"
);

/// A task's row as it will be; what [`SETTLE`] unfolds.
fn row(entry: &Entry, plugin: Option<i64>, now: i64) -> serde_json::Value {
    let Outcome { state, event, counted, after_ms, counters, .. } = &entry.row;
    let Counters { releases, lost, lost_alone, alone } = counters;
    let after = after_ms.map(|after_ms| now + after_ms);
    let waits = *state == State::Waiting;
    let (run_at, finished_at, retained_until) = if waits { (after, 0, 0) } else { (None, now, after.unwrap_or(now)) };
    let LeaseRef { task, lease } = entry.lease_ref;
    let (counted, alone) = (u8::from(*counted), alone.map(u8::from));
    serde_json::json!([
        task,
        lease,
        state.as_str(),
        event,
        counted,
        run_at,
        finished_at,
        retained_until,
        plugin,
        releases,
        lost,
        lost_alone,
        alone,
        now
    ])
}

/// Queue what waits again, enter what ended into the order of removal, and note both.
async fn place(
    session: &mut Session<'_>,
    kept: &[&Entry],
    settled: &HashMap<LeaseRef, Settled>,
    changes: &mut Changes,
) -> Result<(), Failure> {
    let now = session.now;
    let mut waiting = Vec::new();
    let mut apart: Vec<(i64, &str, &str)> = Vec::new();
    let mut ended = Vec::with_capacity(kept.len());
    let mut failed = Vec::new();
    let mut descendants = Vec::new();
    for entry in kept {
        let Some(found) = settled.get(&entry.lease_ref) else { continue };
        let task = entry.lease_ref.task.0;
        changes.stopped(&Owner::of_task(&found.queue, &found.user), found.max_running);
        // As the statement has written it: run_at of what waits, retained_until of what has ended.
        let moment = entry.row.after_ms.map_or(found.run_at, |after_ms| now + after_ms);
        if entry.row.unserved {
            apart.push((task, &found.queue, &found.user));
        } else if entry.row.state == State::Waiting {
            let alone = entry.row.counters.alone.unwrap_or_default();
            let Settled { priority, max_running, .. } = *found;
            let (queue, user) = (found.queue.clone(), found.user.clone());
            waiting.push(Waiting { task, queue, run_at: moment, priority, user, max_running, alone });
        } else {
            changes.ended(&found.queue, &found.task_type, entry.row.state);
            ended.push((moment, task));
            if found.is_follow_up {
                descendants.push(task);
            }
            if entry.row.state == State::Failed {
                failed.push(task);
            }
        }
    }
    changes.enqueue(session, &waiting).await?;
    changes.put_apart(session, &apart).await?;
    set_aside(session, &failed, State::Failed).await?;
    end_descent(session, &descendants).await?;
    retain(session, ended).await
}

/// Note tasks that ended otherwise than finished.
pub(super) async fn set_aside(session: &mut Session<'_>, tasks: &[i64], state: State) -> Result<(), Failure> {
    const ASIDE: &str = "INSERT INTO laelaps_set_aside (task, state)
        SELECT s.task, ? FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$')) AS s ON DUPLICATE KEY UPDATE state = VALUES(state)";
    if !tasks.is_empty() {
        sqlx::query(ASIDE).bind(state.as_str()).bind(json(tasks)).execute(session.db()).await?;
    }
    Ok(())
}

/// Enter ended tasks, each with the end of its retention, into the order of removal.
pub(super) async fn retain(session: &mut Session<'_>, mut ended: Vec<(i64, i64)>) -> Result<(), Failure> {
    const RETAIN: &str =
        "INSERT INTO laelaps_retention (until, tasks) SELECT s.until, s.tasks FROM JSON_TABLE(?, '$[*]' COLUMNS (
        until BIGINT PATH '$[0]', tasks VARCHAR(16000) CHARACTER SET utf8mb4 PATH '$[1]')) AS s";
    if ended.is_empty() {
        return Ok(());
    }
    ended.sort_unstable();
    let rows: Vec<(i64, String)> = ended
        .chunk_by(|one, next| one.0 == next.0)
        .flat_map(|alike| alike.chunks(ENDED_TOGETHER))
        .map(|chunk| (chunk[0].0, json(chunk.iter().map(|(_, task)| *task))))
        .collect();
    for rows in session.chunks(rows) {
        sqlx::query(RETAIN).bind(rows).execute(session.db()).await?;
    }
    Ok(())
}

/// An attempt that is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    pub(super) task: i64,
    pub(super) lease: i64,
    pub(super) attempt: u32,
    pub(super) host: i64,
    pub(super) plugin: i64,
    pub(super) event: &'a str,
    pub(super) alone: bool,
    pub(super) code: Option<&'a str>,
    pub(super) message: Option<&'a str>,
}

/// Keep the records of attempts, of each task the newest few.
pub(super) async fn record_attempts(session: &mut Session<'_>, records: &[Record<'_>]) -> Result<(), Failure> {
    const RECORD: &str = "INSERT INTO laelaps_attempt (task, lease, attempt, host, plugin, ended_at, event, alone, code, message)
        SELECT s.task, s.lease, s.attempt, s.host, s.plugin, ?, s.event, s.alone, s.code, s.message FROM JSON_TABLE(?, '$[*]' COLUMNS (
            task BIGINT PATH '$[0]', lease BIGINT PATH '$[1]', attempt BIGINT PATH '$[2]', host BIGINT PATH '$[3]',
            plugin BIGINT PATH '$[4]', event VARCHAR(32) CHARACTER SET utf8mb4 PATH '$[5]',
            code VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[6]', message VARCHAR(4096) CHARACTER SET utf8mb4 PATH '$[7]',
            alone INT PATH '$[8]')) AS s";
    /// Neither server lets a DELETE look at its own table in a subquery.
    const SURPLUS: &str = "SELECT s.task, (SELECT a.lease FROM laelaps_attempt AS a WHERE a.task = s.task
            ORDER BY a.lease DESC LIMIT 1 OFFSET 20) AS lease
        FROM JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]')) AS s HAVING lease IS NOT NULL";
    const TRIM: &str = concat!(
        "DELETE a FROM ",
        leases!(),
        " STRAIGHT_JOIN laelaps_attempt AS a FORCE INDEX (PRIMARY) ON a.task = s.task AND a.lease <= s.lease"
    );
    const { assert!(AttemptRecord::KEPT == 20) };
    if records.is_empty() {
        return Ok(());
    }
    let now = session.now;
    let rows = session.chunks(records.iter().map(|record| {
        let Record { task, lease, attempt, host, plugin, event, alone, code, message } = *record;
        (task, lease, attempt, host, plugin, event, code, message, u8::from(alone))
    }));
    for rows in rows {
        sqlx::query(RECORD).bind(now).bind(rows).execute(session.db()).await?;
    }
    let tasks = json(records.iter().map(|record| (record.task,)));
    let surplus: Vec<(i64, i64)> = sqlx::query_as(SURPLUS).bind(tasks).fetch_all(session.db()).await?;
    if !surplus.is_empty() {
        sqlx::query(TRIM).bind(json(surplus)).execute(session.db()).await?;
    }
    Ok(())
}

/// The fence of a running attempt, for writes of one task: whether its lease holds, and from now on the row is held.
pub(super) async fn holds(session: &mut Session<'_>, lease_ref: LeaseRef) -> Result<bool, Failure> {
    const HOLDS: &str = concat!(
        "SELECT id FROM laelaps_task WHERE id = ? AND lease = ? AND state = 'running' AND until > ",
        moment!(),
        " FOR UPDATE"
    );
    let LeaseRef { task, lease } = lease_ref;
    let found: Option<i64> = sqlx::query_scalar(HOLDS).bind(task.0).bind(lease.0).fetch_optional(session.db()).await?;
    Ok(found.is_some())
}
