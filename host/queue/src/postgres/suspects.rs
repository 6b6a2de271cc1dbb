//! Tasks that have to run alone. They wait apart; a host that could take one is told, and comes back when it runs nothing any more.
//!
//! Draining a host costs, so only one is told of each: it is reserved for that host, for a while. A host that runs nothing takes what it finds,
//! reserved or not.

use std::collections::HashMap;

use super::accounts::{self, Owner};
use super::asked::Asked;
use super::between::{Named, Taking, take_tasks};
use super::failure::Failure;
use super::got::Got;
use super::mend;
use super::session::Session;

/// Tasks looked at for one whose user's limit allows it.
const SUSPECTS_MAX: i64 = 100;
/// How long a task is reserved for a host that drains for it.
const RESERVED_MS: i64 = 300_000;

/// The first suspects of all queues, or of some.
macro_rules! first {
    ($queues:literal, $most:literal) => {
        concat!(
            "SELECT * FROM ((SELECT turn, task, queue, ctid AS place, reserved_by, reserved_until FROM laelaps.suspect WHERE ",
            $queues,
            "::text[] IS NULL AND octet_length(queue) >= 0 ORDER BY turn, task LIMIT ",
            $most,
            ") UNION ALL (SELECT one.* FROM unnest(",
            $queues,
            ") AS asked (queue) CROSS JOIN LATERAL (
                SELECT turn, task, queue, ctid AS place, reserved_by, reserved_until FROM laelaps.suspect WHERE suspect.queue = asked.queue
                ORDER BY turn, task LIMIT ",
            $most,
            ") AS one)) AS either ORDER BY turn, task LIMIT ",
            $most
        )
    };
}

/// $1 how many to look at, $2 of which queues, NULL for all.
pub(super) const SUSPECTS: &str = concat!(
    "SELECT suspect.task, suspect.place, task.queue, task.user_name, task.max_running
    FROM (",
    first!("$2", "$1"),
    ") AS first CROSS JOIN LATERAL (SELECT turn, task, ctid::text AS place FROM laelaps.suspect
        WHERE suspect.queue = first.queue AND suspect.turn = first.turn AND suspect.task = first.task FOR UPDATE SKIP LOCKED) AS suspect
    CROSS JOIN LATERAL (SELECT queue, user_name, max_running FROM laelaps.task
        WHERE task.id = suspect.task AND ($2 IS NULL OR task.queue = ANY($2)) OFFSET 0) AS task
    ORDER BY suspect.turn, suspect.task"
);

/// Take the first one whose user's limit allows it.
pub(super) async fn take(session: &mut Session, asked: &Asked) -> Result<Got, Failure> {
    const RUNNING: &str =
        "SELECT account.queue, account.user_name, account.running FROM unnest($1::text[], $2::text[]) AS asked (queue, user_name)
        CROSS JOIN LATERAL (SELECT * FROM laelaps.account
            WHERE account.queue = asked.queue AND account.user_name = asked.user_name OFFSET 0) AS account";
    session.begin().await?;
    let query = sqlx::query_as(SUSPECTS).bind(SUSPECTS_MAX).bind(asked.queues().as_deref());
    let rows: Vec<(i64, String, String, String, Option<i64>)> = query.fetch_all(session.db()?).await?;
    let suspects: Vec<(i64, String, Owner, Option<i64>)> =
        rows.into_iter().map(|(task, place, queue, user, limit)| (task, place, Owner { queue, user }, limit)).collect();
    let owners: Vec<Owner> = suspects.iter().map(|(_, _, owner, _)| owner.clone()).collect();
    accounts::lock(session, owners.clone()).await?;
    let (queues, users) = accounts::columns(&owners);
    let running: Vec<(String, String, i64)> = sqlx::query_as(RUNNING).bind(queues).bind(users).fetch_all(session.db()?).await?;
    let running: HashMap<Owner, i64> =
        running.into_iter().map(|(queue, user, running)| (Owner { queue, user }, running)).collect();
    let may_run = |(_, _, owner, limit): &&(i64, String, Owner, Option<i64>)| {
        let running = running.get(owner).copied().unwrap_or(0);
        owner.is_nobody() || limit.is_none_or(|limit| running < limit.max(1))
    };
    let mut got = Got::default();
    if let Some((task, place, owner, _)) = suspects.iter().find(may_run) {
        let places = [place.as_str()];
        let taking = Taking { ready: &[], suspect: &places, picks: 0, alone: true };
        got = take_tasks(session, asked, vec![Named { task: *task, owner, pick: None }], &taking).await?;
    }
    accounts::look_again(session, &owners).await?;
    session.commit().await?;
    Ok(got)
}

/// $1 host, $2 how many to look at, $3 for how long, $4 of which queues, NULL for all. Answers whether there is one, and the numbers of places of tasks that do not wait there.
pub(super) const RESERVE: &str = concat!(
    "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    first AS MATERIALIZED (
        ",
    first!("$4", "$2"),
    "),
    known AS MATERIALIZED (
        SELECT first.*, waits.user_name, waits.max_running, waits.id IS NOT NULL AS waits FROM first LEFT JOIN LATERAL (
            SELECT id, user_name, max_running FROM laelaps.task
            WHERE task.id = first.task AND state = 'waiting' AND alone AND task.turn = first.turn AND task.queue = first.queue OFFSET 0) AS waits ON true),
    free AS MATERIALIZED (
        SELECT * FROM known, clock WHERE waits AND (reserved_by IS NULL OR reserved_by = $1 OR reserved_until <= now
                OR NOT EXISTS (SELECT FROM laelaps.host WHERE host.id = reserved_by AND left_at IS NULL AND ended_at IS NULL))
            AND (user_name = '' OR max_running IS NULL OR greatest(max_running, 1)
                > coalesce((SELECT running FROM laelaps.account WHERE account.queue = known.queue
                    AND account.user_name = known.user_name), 0))
        ORDER BY (reserved_by = $1) DESC NULLS LAST, turn, task LIMIT 1),
    reserved AS (
        UPDATE laelaps.suspect SET reserved_by = $1, reserved_until = (SELECT now FROM clock) + $3 WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM laelaps.suspect WHERE (queue, turn, task) = (SELECT queue, turn, task FROM free) FOR UPDATE SKIP LOCKED))
        RETURNING task)
    SELECT EXISTS (SELECT FROM reserved), ARRAY(SELECT task FROM known WHERE NOT waits),
        ARRAY(SELECT place::text FROM known WHERE NOT waits)"
);

/// Reserve one that may run now for a host; false if there is none, or all are reserved for others. What does not wait there is cleared away.
pub(super) async fn reserve(session: &mut Session, asked: &Asked) -> Result<bool, Failure> {
    let query =
        sqlx::query_as(RESERVE).bind(asked.claim.host.0).bind(SUSPECTS_MAX).bind(RESERVED_MS).bind(asked.queues().as_deref());
    let (reserved, strangers, places): (bool, Vec<i64>, Vec<String>) = query.fetch_one(session.db()?).await?;
    if !strangers.is_empty() {
        mend::strangers_in_suspect(session, &strangers, &places).await?;
    }
    Ok(reserved)
}
