//! Tasks that have to run alone. They wait apart; a host that could take one is told, and comes back when it runs nothing any more.
//!
//! Draining a host costs, so only one is told of each: it is reserved for that host, for a while. A host that runs nothing takes what it finds,
//! reserved or not.

use std::collections::HashMap;

use super::accounts;
use super::between::{Taking, take_tasks};
use super::claim::{Asked, Got};
use super::failure::Failure;
use super::mend;
use super::session::Session;
use crate::HostId;

/// Tasks looked at for one whose user's limit allows it.
const SUSPECTS_MAX: i64 = 100;
/// How long a task is reserved for a host that drains for it.
const RESERVED_MS: i64 = 300_000;

pub(super) const SUSPECTS: &str = "SELECT suspect.task, suspect.place, task.user_name, task.max_running
    FROM (SELECT turn, task, ctid::text AS place FROM laelaps.suspect ORDER BY turn, task LIMIT $1 FOR UPDATE SKIP LOCKED) AS suspect
    CROSS JOIN LATERAL (SELECT user_name, max_running FROM laelaps.task WHERE task.id = suspect.task OFFSET 0) AS task
    ORDER BY suspect.turn, suspect.task";

/// Take the first one whose user's limit allows it.
pub(super) async fn take(session: &mut Session, asked: &Asked) -> Result<Got, Failure> {
    const RUNNING: &str = "SELECT user_name, running FROM laelaps.account WHERE user_name = ANY($1)";
    session.begin().await?;
    let rows: Vec<(i64, String, String, Option<i64>)> =
        sqlx::query_as(SUSPECTS).bind(SUSPECTS_MAX).fetch_all(session.db()?).await?;
    let users: Vec<String> = rows.iter().map(|(_, _, user, _)| user.clone()).collect();
    accounts::lock(session, users.clone()).await?;
    let running: Vec<(String, i64)> = sqlx::query_as(RUNNING).bind(&users).fetch_all(session.db()?).await?;
    let running: HashMap<String, i64> = running.into_iter().collect();
    let may_run = |(_, _, user, limit): &&(i64, String, String, Option<i64>)| {
        let running = running.get(user).copied().unwrap_or(0);
        user.is_empty() || limit.is_none_or(|limit| running < limit.max(1))
    };
    let mut got = Got::default();
    if let Some((task, place, user, _)) = rows.iter().find(may_run) {
        let users: Vec<String> = Some(user.clone()).into_iter().filter(|user| !user.is_empty()).collect();
        let places = [place.as_str()];
        let taking = Taking { ready: &[], suspect: &places, users: &users, picked: &HashMap::new(), picks: 0, alone: true };
        got = take_tasks(session, asked, vec![(*task, user.as_str())], &taking).await?;
    }
    accounts::look_again(session, &users).await?;
    session.commit().await?;
    Ok(got)
}

/// $1 host, $2 how many to look at, $3 for how long. Answers whether there is one, and the numbers of places of tasks that do not wait there.
pub(super) const RESERVE: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    first AS MATERIALIZED (
        SELECT turn, task, ctid AS place, reserved_by, reserved_until FROM laelaps.suspect ORDER BY turn, task LIMIT $2),
    known AS MATERIALIZED (
        SELECT first.*, waits.user_name, waits.max_running, waits.id IS NOT NULL AS waits FROM first LEFT JOIN LATERAL (
            SELECT id, user_name, max_running FROM laelaps.task
            WHERE task.id = first.task AND state = 'waiting' AND alone AND task.turn = first.turn OFFSET 0) AS waits ON true),
    free AS MATERIALIZED (
        SELECT * FROM known, clock WHERE waits AND (reserved_by IS NULL OR reserved_by = $1 OR reserved_until <= now
                OR NOT EXISTS (SELECT FROM laelaps.host WHERE host.id = reserved_by AND left_at IS NULL AND ended_at IS NULL))
            AND (user_name = '' OR max_running IS NULL OR greatest(max_running, 1)
                > coalesce((SELECT running FROM laelaps.account WHERE account.user_name = known.user_name), 0))
        ORDER BY (reserved_by = $1) DESC NULLS LAST, turn, task LIMIT 1),
    reserved AS (
        UPDATE laelaps.suspect SET reserved_by = $1, reserved_until = (SELECT now FROM clock) + $3 WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM laelaps.suspect WHERE (turn, task) = (SELECT turn, task FROM free) FOR UPDATE SKIP LOCKED))
        RETURNING task)
    SELECT EXISTS (SELECT FROM reserved), ARRAY(SELECT task FROM known WHERE NOT waits), ARRAY(SELECT place::text FROM known WHERE NOT waits)";

/// Reserve one that may run now for a host; false if there is none, or all are reserved for others. What does not wait there is cleared away.
pub(super) async fn reserve(session: &mut Session, host: HostId) -> Result<bool, Failure> {
    let query = sqlx::query_as(RESERVE).bind(host.0).bind(SUSPECTS_MAX).bind(RESERVED_MS);
    let (reserved, strangers, places): (bool, Vec<i64>, Vec<String>) = query.fetch_one(session.db()?).await?;
    if !strangers.is_empty() {
        mend::strangers_in_suspect(session, &strangers, &places).await?;
    }
    Ok(reserved)
}
