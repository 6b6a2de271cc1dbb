//! What contradicts itself in PerfectQueue's table, and between it and ours beside it, as of one moment.
//!
//! The table is Ruby's as well, and whatever Ruby writes is right: only what neither its programs nor ours can leave behind is told. So a note of ours whose
//! task is gone is none, since Ruby's clean-up does not know of it; nor is a lease that runs longer than its host said, since
//! Ruby may have the task by then.

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::blob;
use super::candidates::large;
use super::order::Place;
use super::run::{Operation, commit};
use super::table::{EVENT_HORIZON, Names, SET_ASIDE};
use crate::Result;
use crate::mysql::connect::text;
use crate::mysql::failure::Failure;

/// The most findings.
const FINDINGS_MAX: usize = 1_000;
/// Rows with compressed data that are read at once, none of them with more than 64 KiB.
const SLICE: i64 = 200;

/// A snapshot of all tables, until [`commit`].
const BEGIN: &str = "SET SESSION wait_timeout = 5; SET TRANSACTION ISOLATION LEVEL REPEATABLE READ;
    START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";

/// A rule of PerfectQueue's table, in words, and the numbers of the rows that break it, with LIMIT at its end. The owner of rows that are set aside is
/// 7809634745002783488.
const RULES: [(&str, &str); 7] = [
    (
        "the time of a task that has ended is not after the event horizon",
        "SELECT {number} FROM {t} AS t {index} WHERE t.timeout > 1300000000 AND t.created_at IS NULL LIMIT ?",
    ),
    (
        "a task that has not ended can be acquired some day, or is held",
        "SELECT {number} FROM {t} AS t {index} WHERE t.timeout < 1300000000 AND t.created_at IS NOT NULL LIMIT ?",
    ),
    (
        "a task that has ended takes up no user's room",
        "SELECT {number} FROM {t} AS t WHERE t.created_at IS NULL AND t.resource IS NOT NULL LIMIT ?",
    ),
    // A day, since Ruby's clocks are those of its machines.
    (
        "a task was made before now",
        "SELECT {number} FROM {t} AS t WHERE t.created_at > UNIX_TIMESTAMP() + 86400 OR t.created_at < 0 LIMIT ?",
    ),
    (
        "an owner is a connection, or a claim of ours",
        "SELECT {number} FROM {t} AS t WHERE CAST(t.owner AS UNSIGNED) >> 62 > 1 LIMIT ?",
    ),
    (
        "a settlement's mark stands on a task that has ended",
        "SELECT {number} FROM {t} AS t WHERE t.created_at IS NOT NULL AND CAST(t.owner AS UNSIGNED) >> 62 = 1 AND CAST(t.owner AS UNSIGNED) & 1 = 1 LIMIT ?",
    ),
    (
        "what is set aside has the last of all times, and no user",
        "SELECT {number} FROM {t} AS t WHERE t.created_at IS NOT NULL AND t.owner = 7809634745002783488
            AND (t.timeout <> 2147483647 OR t.resource IS NOT NULL) LIMIT ?",
    ),
];

/// Rules of our table of tasks, and between it and PerfectQueue's.
const BESIDE: [(&str, &str); 8] = [
    (
        "a task that has not ended is not noted as ended",
        "SELECT {number} FROM {s} AS s STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {side_key} AND t.created_at = s.created_at
            WHERE s.state IN ('finished', 'failed', 'cancelled') LIMIT ?",
    ),
    (
        "a task that has ended as we left it is noted as ended",
        "SELECT {number} FROM {s} AS s STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {side_key} AND t.timeout = s.timeout
            WHERE t.created_at IS NULL AND t.timeout < 1300000000 AND (s.state IS NULL OR s.state = 'waiting') LIMIT ?",
    ),
    (
        "a task that waits for its time has no owner",
        "SELECT {number} FROM {s} AS s STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {side_key} AND t.created_at = s.created_at
            AND t.timeout = s.timeout WHERE s.state = 'waiting' AND t.timeout > UNIX_TIMESTAMP() AND t.owner <> 0 LIMIT ?",
    ),
    (
        "a task that has not ended has attempts left",
        "SELECT {number} FROM {s} AS s STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {side_key} AND t.created_at = s.created_at
            WHERE s.attempts >= s.max_attempts LIMIT ?",
    ),
    (
        "a noted state is one of ours, with the time when it was written",
        "SELECT {side_number} FROM {s} AS s WHERE s.state NOT IN ('waiting', 'finished', 'failed', 'cancelled')
            OR (s.state IS NOT NULL AND s.timeout IS NULL) LIMIT ?",
    ),
    (
        "an end is noted with its moment, and nothing else is",
        "SELECT {side_number} FROM {s} AS s WHERE (COALESCE(s.state, '') IN ('finished', 'failed', 'cancelled')) <> (s.ended_ms IS NOT NULL) LIMIT ?",
    ),
    (
        "losses are noted with the lease that was lost, and since when",
        "SELECT {side_number} FROM {s} AS s WHERE s.lost_alone > s.lost OR (s.lost = 0 AND s.lost_at IS NOT NULL)
            OR (s.lost_owner <> 0 AND s.lost_owner >> 62 <> 1) OR (s.root IS NULL AND s.depth > 0) LIMIT ?",
    ),
    (
        "records and progress are JSON",
        "SELECT {side_number} FROM {s} AS s WHERE COALESCE(JSON_VALID(s.records), 1) = 0 OR COALESCE(JSON_VALID(s.progress), 1) = 0 LIMIT ?",
    ),
];

/// Compare every row with every other.
pub(super) struct Audit;

#[async_trait]
impl Operation for Audit {
    type Answer = Vec<String>;
    const DOING: &'static str = "comparing the tables";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<String>, Failure> {
        sqlx::raw_sql(BEGIN).execute(&mut *connection).await?;
        let mut findings = Vec::new();
        let beside = if names.has_side() { &BESIDE[..] } else { &[] };
        for (rule, sql) in RULES.iter().chain(beside) {
            let query = sqlx::query_scalar(names.sql(sql)).bind(room(&findings));
            let broken: Vec<i64> = query.fetch_all(&mut *connection).await?;
            findings.extend(broken.into_iter().map(|number| format!("{rule}: task {number}")));
        }
        names_are_text(&mut findings, names, connection).await?;
        data_can_be_read(&mut findings, names, connection).await?;
        commit(connection).await?;
        Ok(findings)
    }
}

/// How many more findings are told.
fn room(findings: &[String]) -> i64 {
    i64::try_from(FINDINGS_MAX.saturating_sub(findings.len())).unwrap_or_default()
}

/// Keys and users that are not text. Only columns of bytes can have such.
async fn names_are_text(findings: &mut Vec<String>, names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const UNREADABLE: &str = "SELECT {number} FROM {t} AS t WHERE t.created_at IS NOT NULL AND t.owner <> ? AND
        (CHARSET(t.id) = 'binary' AND NOT COALESCE(CAST(CONVERT(t.id USING utf8mb4) AS BINARY) = CAST(t.id AS BINARY), 0)
            OR CHARSET(t.resource) = 'binary' AND NOT COALESCE(CAST(CONVERT(t.resource USING utf8mb4) AS BINARY) = CAST(t.resource AS BINARY), t.resource IS NULL))
        LIMIT ?";
    let query = sqlx::query_scalar(names.sql(UNREADABLE)).bind(SET_ASIDE).bind(room(findings));
    let broken: Vec<i64> = query.fetch_all(connection).await?;
    findings.extend(broken.into_iter().map(|number| format!("keys and users are text in UTF-8: task {number}")));
    Ok(())
}

/// Read all compressed data of tasks that have not ended, as a claim would: what is not compressed can always be read.
async fn data_can_be_read(
    findings: &mut Vec<String>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), sqlx::Error> {
    const COMPRESSED: &str = "SELECT CAST(t.timeout AS SIGNED), t.id, {number}, CAST(LENGTH(t.data) AS SIGNED), IF(LENGTH(t.data) > 65536, NULL, t.data)
        FROM {t} AS t {index}
        WHERE t.timeout >= ? AND (t.timeout > ? OR t.id > ?) AND t.created_at IS NOT NULL AND t.owner <> ?
            AND (LEFT(t.data, 2) = x'1f8b' OR LENGTH(t.data) > 16842752)
        ORDER BY t.timeout, t.id LIMIT ?";
    let mut from: Place = (EVENT_HORIZON, String::new());
    while room(findings) > 0 {
        let query = sqlx::query(names.sql(COMPRESSED)).bind(from.0).bind(from.0).bind(&from.1).bind(SET_ASIDE).bind(SLICE);
        let rows = query.fetch_all(&mut *connection).await?;
        for row in &rows {
            from = (row.try_get(0)?, text(row, 1)?);
            if let Err(problem) = read(row, &from, names, connection).await? {
                findings.push(format!("compressed data can be read: task {}, {problem}", row.try_get::<i64, _>(2)?));
            }
        }
        if i64::try_from(rows.len()).is_ok_and(|rows| rows < SLICE) {
            break;
        }
    }
    findings.truncate(FINDINGS_MAX);
    Ok(())
}

async fn read(
    row: &MySqlRow,
    place: &Place,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<Result<(), String>, sqlx::Error> {
    if let Err(problem) = blob::length_fits(row.try_get(3)?) {
        return Ok(Err(problem));
    }
    let stored = match row.try_get::<Option<Vec<u8>>, _>(4)? {
        Some(stored) => Some(stored),
        None => large(place, names, connection).await?,
    };
    // A key that is not text leads nowhere, and is told as that.
    Ok(stored.map_or(Ok(()), |stored| blob::read(&place.1, stored).map(drop)))
}
