//! Which queues have something ready, and where it begins: a probe of the index for each queue, so never for a claim of one queue, and seldom for
//! claims of many (see [`super::mark`]).

use std::sync::Arc;
use std::time::Instant;

use super::claim::count;
use super::failure::Failure;
use super::heads::{Place, Sort};
use super::mark::{self, Found, From};
use super::session::Session;

/// Queues of one look; the next one goes on behind them.
const QUEUES_MAX: usize = 1_000;
/// Looks of one claim, where all that is thought of its queues is older than what others took of them: enough for all queues that are remembered.
pub(super) const LOOKS_MAX: usize = mark::QUEUES_MAX / QUEUES_MAX + 1;

/// $1 the least name, $2 how many queues, $3 whether also the first task of a user is asked for. The first task without user is the first of its queue.
pub(super) const AROUND: &str = "WITH RECURSIVE first AS (
        (SELECT queue, user_name, turn, task FROM laelaps.ready WHERE queue >= $1 ORDER BY queue, user_name, turn, task LIMIT 1)
        UNION ALL
        SELECT next.* FROM first CROSS JOIN LATERAL (SELECT queue, user_name, turn, task FROM laelaps.ready WHERE ready.queue > first.queue
            ORDER BY ready.queue, ready.user_name, ready.turn, ready.task LIMIT 1) AS next)
    SELECT first.queue, CASE first.user_name WHEN '' THEN first.turn END, CASE first.user_name WHEN '' THEN first.task END, users.turn, users.task
    FROM (SELECT * FROM first LIMIT $2) AS first
        LEFT JOIN LATERAL (SELECT turn, task FROM laelaps.ready WHERE $3 AND ready.queue = first.queue AND ready.user_name <> ''
            ORDER BY ready.turn, ready.task LIMIT 1) AS users ON true
    ORDER BY first.queue";

/// $1 the queues, $2 as $3 of [`AROUND`].
pub(super) const AROUND_SOME: &str = "SELECT asked.queue, nobodys.turn, nobodys.task, users.turn, users.task
    FROM unnest($1::text[]) AS asked (queue)
        LEFT JOIN LATERAL (SELECT turn, task FROM laelaps.ready WHERE ready.queue = asked.queue AND ready.user_name = ''
            ORDER BY ready.turn, ready.task LIMIT 1) AS nobodys ON true
        LEFT JOIN LATERAL (SELECT turn, task FROM laelaps.ready WHERE $2 AND ready.queue = asked.queue AND ready.user_name <> ''
            ORDER BY ready.turn, ready.task LIMIT 1) AS users ON true";

/// Learn where the queues of a claim begin.
pub(super) async fn look(session: &mut Session, from: &mut From) -> Result<(), Failure> {
    type Row = (String, Option<i64>, Option<i64>, Option<i64>, Option<i64>);
    let found = |(queue, turn, task, of_user, its_task): Row| -> Found {
        let place = |turn: Option<i64>, task: Option<i64>| -> Option<Place> { turn.zip(task) };
        Found { queue, nobodys: place(turn, task), users: place(of_user, its_task) }
    };
    let started = Instant::now();
    let users = from.way.sorts().contains(&Sort::Users);
    let shared = Arc::clone(&session.shared);
    if let Some(queues) = &from.way.queues {
        let rows: Vec<Row> = sqlx::query_as(AROUND_SOME).bind(&**queues).bind(users).fetch_all(session.db()?).await?;
        shared.marks.found_of(from, rows.into_iter().map(found).collect());
    } else {
        let mut behind = shared.marks.around();
        loop {
            // The least text behind another one has the least character more.
            let first = behind.as_deref().map_or_else(String::new, |behind| format!("{behind}\u{1}"));
            let rows: Vec<Row> =
                sqlx::query_as(AROUND).bind(first).bind(count(QUEUES_MAX)).bind(users).fetch_all(session.db()?).await?;
            let last = rows.last().filter(|_| rows.len() == QUEUES_MAX).map(|(queue, ..)| queue.clone());
            let is_end = last.is_none();
            shared.marks.found(from, behind.as_deref(), last, rows.into_iter().map(found).collect());
            // Behind the last queue comes the first: a look that came to the end has looked at few, or at none.
            if !(is_end && behind.take().is_some()) {
                break;
            }
        }
    }
    from.looked_around = Some(started.elapsed());
    shared.marks.begin_anew(from);
    Ok(())
}
