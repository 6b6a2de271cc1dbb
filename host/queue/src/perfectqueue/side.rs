//! The table of ours beside PerfectQueue's: what that one has no columns for. It is only read and written by us, in the transaction of what it
//! tells about. Without it these facts go to the log.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::table::{Names, json, parts};
use crate::{Attempt, AttemptRecord, Descent, Lease, Policy, Progress, State, TaskId, Timestamp};

/// The event of an attempt that was lost, and what it is called once its host has come back.
pub(super) const LOST: &str = "lost";
const EXCUSED: &str = "excused";

/// What is known of a task beside its row.
#[derive(Clone, Debug, Default)]
pub(super) struct Side {
    /// The task's own: another one of the same key has another.
    pub(super) created_at: i64,
    /// What we last made of it: waiting for its time, or ended. None: nothing that the table does not show.
    pub(super) state: Option<State>,
    /// The row's time when we did.
    pub(super) timeout: Option<i64>,
    pub(super) user: Option<String>,
    pub(super) attempts: u32,
    pub(super) max_attempts: Option<u32>,
    pub(super) releases: u32,
    pub(super) lost: u32,
    pub(super) lost_alone: u32,
    pub(super) alone: bool,
    /// The token of the lease that was last counted as lost.
    pub(super) lost_owner: u64,
    /// When it was lost for the first time since an attempt ended otherwise, in milliseconds; None if it was not.
    pub(super) lost_at: Option<i64>,
    /// Of a follow-up.
    pub(super) descent: Option<Descent>,
    pub(super) ended_ms: Option<i64>,
    pub(super) plugin: Option<String>,
    pub(super) error_code: Option<String>,
    pub(super) error_message: Option<String>,
    pub(super) output: Option<Vec<u8>>,
    pub(super) progress: Option<Reported>,
    pub(super) records: Vec<Record>,
}

/// How far an attempt said it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Reported {
    pub(super) owner: u64,
    pub(super) progress: Progress,
}

/// A past attempt.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    attempt: u32,
    lease: i64,
    host: String,
    plugin: Option<String>,
    ended_at: i64,
    event: String,
    code: Option<String>,
    message: Option<String>,
    /// It ran alone.
    #[serde(default)]
    alone: bool,
}

impl Record {
    pub(super) fn new(attempt: u32, owner: u64, host: String, ended_at: i64, event: &str) -> Self {
        let (plugin, code, message) = (None, None, None);
        Self { attempt, lease: owner.cast_signed(), host, plugin, ended_at, event: event.to_owned(), code, message, alone: false }
    }

    /// The same of an attempt that ran alone, if it did.
    pub(super) fn alone(self, alone: bool) -> Self {
        Self { alone, ..self }
    }

    pub(super) fn with(self, plugin: Option<String>, code: Option<String>, message: Option<String>) -> Self {
        Self { plugin, code, message, ..self }
    }

    pub(super) fn told(self) -> AttemptRecord {
        AttemptRecord {
            attempt: self.attempt,
            lease: Lease(self.lease),
            host: self.host,
            plugin_digest: self.plugin,
            ended_at: Timestamp(self.ended_at),
            event: self.event,
            error_code: self.code,
            error_message: self.message,
        }
    }
}

impl Side {
    /// Of a task of which nothing was noted yet.
    pub(super) fn new(created_at: i64) -> Self {
        Self { created_at, ..Self::default() }
    }

    /// The facts about the next attempt, or the one that was lost at this time.
    pub(super) fn attempt(&self, now_ms: i64) -> Attempt {
        Attempt {
            attempt: self.attempts.saturating_add(1),
            max_attempts: self.max_attempts,
            releases: self.releases,
            lost: self.lost,
            lost_alone: self.lost_alone,
            alone: self.alone,
            lost_for: self.lost_at.map_or(Duration::ZERO, |lost_at| Timestamp(now_ms).since(Timestamp(lost_at))),
        }
    }

    /// What a settlement or a loss says of losses.
    pub(super) fn count_losses(&mut self, lost: u32, lost_alone: u32, now_ms: i64) {
        (self.lost, self.lost_alone) = (lost, lost_alone);
        self.lost_at = if lost == 0 { None } else { self.lost_at.or(Some(now_ms)) };
    }

    /// Take back that an attempt under one of these tokens was lost. False if none was counted as that.
    pub(super) fn excuse(&mut self, tokens: [u64; 2]) -> bool {
        let counted = |record: &&mut Record| record.event == LOST && tokens.contains(&record.lease.cast_unsigned());
        let Some(record) = self.records.iter_mut().rev().find(counted) else { return false };
        EXCUSED.clone_into(&mut record.event);
        let was_alone = record.alone;
        self.lost = self.lost.saturating_sub(1);
        self.lost_alone = self.lost_alone.saturating_sub(u32::from(was_alone)).min(self.lost);
        if self.lost == 0 {
            self.lost_at = None;
        }
        if self.lost < Policy::LOST_MAX && self.state.is_none_or(|state| state == State::Waiting) {
            self.alone = false;
        }
        true
    }

    /// Whether an attempt under this token is recorded as having ended so.
    pub(super) fn has_recorded(&self, token: u64, event: &str) -> bool {
        self.records.iter().any(|record| record.lease.cast_unsigned() == token && record.event == event)
    }

    /// Add an attempt's record; the oldest goes if there are too many.
    pub(super) fn record(&mut self, record: Record) {
        self.records.push(record);
        let surplus = self.records.len().saturating_sub(AttemptRecord::KEPT);
        self.records.drain(..surplus);
    }
}

const COLUMNS: &str =
    "s.id, s.created_at, s.state, s.timeout, s.user, s.attempts, s.max_attempts, s.releases, s.lost, s.lost_alone,
    s.alone, s.lost_owner, s.ended_ms, s.plugin, s.error_code, s.error_message, s.progress, s.records,
    s.root, s.depth, s.lost_at";

fn side(row: &MySqlRow) -> Result<(String, Side), sqlx::Error> {
    let state: Option<String> = row.try_get(2)?;
    let progress: Option<String> = row.try_get(16)?;
    let records: Option<String> = row.try_get(17)?;
    let root: Option<i64> = row.try_get(18)?;
    let depth: u32 = row.try_get(19)?;
    // Somebody who changed these by hand gets along without them.
    let side = Side {
        created_at: row.try_get(1)?,
        state: state.and_then(|word| crate::mysql::failure::state(&word).ok()),
        timeout: row.try_get(3)?,
        user: row.try_get(4)?,
        attempts: row.try_get(5)?,
        max_attempts: row.try_get(6)?,
        releases: row.try_get(7)?,
        lost: row.try_get(8)?,
        lost_alone: row.try_get(9)?,
        alone: row.try_get::<u8, _>(10)? != 0,
        lost_owner: row.try_get(11)?,
        lost_at: row.try_get(20)?,
        descent: root.map(|root| Descent { root: TaskId(root), depth }),
        ended_ms: row.try_get(12)?,
        plugin: row.try_get(13)?,
        error_code: row.try_get(14)?,
        error_message: row.try_get(15)?,
        output: None,
        progress: progress.and_then(|text| serde_json::from_str(&text).ok()),
        records: records.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default(),
    };
    Ok((row.try_get(0)?, side))
}

/// What is noted of these keys, by key. With `to_write` the rows are locked for the transaction.
pub(super) async fn load(
    keys: &[&str],
    to_write: bool,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<HashMap<String, Side>, sqlx::Error> {
    if keys.is_empty() || !names.has_side() {
        return Ok(HashMap::new());
    }
    let lock = if to_write { " FOR UPDATE" } else { "" };
    let sql = format!(
        "SELECT {COLUMNS} FROM (SELECT f.* FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f) AS f
        STRAIGHT_JOIN {{s}} AS s FORCE INDEX (PRIMARY) ON s.id = {{as_side_key}}{lock}"
    );
    let rows = sqlx::query(names.sql(&sql)).bind(json(keys)).fetch_all(connection).await?;
    rows.iter().map(side).collect()
}

/// Write what is noted of tasks, by key.
pub(super) async fn store(sides: &[(&str, Side)], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const STORE: &str = "INSERT INTO {s} (id, created_at, state, timeout, user, attempts, max_attempts, releases, lost, lost_alone, alone,
            lost_owner, ended_ms, plugin, error_code, error_message, progress, records, root, depth, lost_at, output)
        SELECT f.id, f.created_at, NULLIF(f.state, ''), NULLIF(f.timeout, -1), f.user, f.attempts, NULLIF(f.max_attempts, 0), f.releases,
            f.lost, f.lost_alone, f.alone, f.lost_owner, NULLIF(f.ended_ms, -1), NULLIF(f.plugin, ''), f.error_code, f.error_message,
            NULLIF(f.progress, ''), NULLIF(f.records, '[]'), f.root, f.depth, f.lost_at, IF(f.first = 0, NULL, SUBSTRING(?, f.first, f.bytes))
        FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', created_at BIGINT PATH '$[1]', state VARCHAR(9) CHARACTER SET utf8mb4 PATH '$[2]',
            timeout BIGINT PATH '$[3]', user VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[4]', attempts BIGINT PATH '$[5]', max_attempts BIGINT PATH '$[6]',
            releases BIGINT PATH '$[7]', lost BIGINT PATH '$[8]', lost_alone BIGINT PATH '$[9]', alone INT PATH '$[10]',
            lost_owner BIGINT UNSIGNED PATH '$[11]', ended_ms BIGINT PATH '$[12]', plugin VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[13]',
            error_code VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[14][0]', error_message TEXT CHARACTER SET utf8mb4 PATH '$[14][1]', progress LONGTEXT CHARACTER SET utf8mb4 PATH '$[15][0]',
            records LONGTEXT CHARACTER SET utf8mb4 PATH '$[15][1]', first BIGINT PATH '$[15][2]', bytes BIGINT PATH '$[15][3]', root BIGINT PATH '$[16][0]',
            depth BIGINT PATH '$[16][1]', lost_at BIGINT PATH '$[16][2]')) AS f
        ON DUPLICATE KEY UPDATE created_at = VALUES(created_at), state = VALUES(state), timeout = VALUES(timeout),
            user = VALUES(user), attempts = VALUES(attempts), max_attempts = VALUES(max_attempts), releases = VALUES(releases),
            lost = VALUES(lost), lost_alone = VALUES(lost_alone), alone = VALUES(alone), lost_owner = VALUES(lost_owner),
            ended_ms = VALUES(ended_ms), plugin = VALUES(plugin), error_code = VALUES(error_code),
            error_message = VALUES(error_message), progress = VALUES(progress), records = VALUES(records), root = VALUES(root), depth = VALUES(depth),
            lost_at = VALUES(lost_at), output = VALUES(output)";
    for part in parts(sides, |(_, side)| side.output.as_ref().map_or(0, Vec::len)) {
        // A blob that is not empty, whatever the outputs are.
        let mut outputs = vec![0_u8];
        let rows = rows(part, &mut outputs);
        sqlx::query(names.sql(STORE)).bind(outputs).bind(rows).execute(&mut *connection).await?;
    }
    Ok(())
}

/// As [`store`] binds them: what is noted, and all outputs one behind the other.
fn rows(sides: &[(&str, Side)], outputs: &mut Vec<u8>) -> String {
    json(sides.iter().map(|(key, side)| {
        let first = side.output.as_ref().map_or(0, |_| outputs.len() + 1);
        outputs.extend_from_slice(side.output.as_deref().unwrap_or_default());
        let bytes = side.output.as_ref().map_or(0, Vec::len);
        let progress = side.progress.as_ref().and_then(|reported| serde_json::to_string(reported).ok()).unwrap_or_default();
        serde_json::json!([
            key,
            side.created_at,
            side.state.map_or("", State::as_str),
            side.timeout.unwrap_or(-1),
            side.user,
            side.attempts,
            side.max_attempts.unwrap_or(0),
            side.releases,
            side.lost,
            side.lost_alone,
            u8::from(side.alone),
            side.lost_owner,
            side.ended_ms.unwrap_or(-1),
            side.plugin.as_deref().unwrap_or_default(),
            [&side.error_code, &side.error_message],
            (progress, json(&side.records), first, bytes),
            (side.descent.map(|descent| descent.root), side.descent.map_or(0, |descent| descent.depth), side.lost_at),
        ])
    }))
}

/// What a handler returned.
pub(super) async fn outputs(
    keys: &[&str],
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<HashMap<String, Vec<u8>>, sqlx::Error> {
    const OUTPUTS: &str =
        "SELECT s.id, s.output FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key} WHERE s.output IS NOT NULL";
    if keys.is_empty() || !names.has_side() {
        return Ok(HashMap::new());
    }
    let rows = sqlx::query(names.sql(OUTPUTS)).bind(json(keys)).fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}
