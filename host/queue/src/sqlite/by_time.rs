//! Which tasks a claim takes that does not look at users: the first by their turns, whosever they are.

use sqlx::Row as _;

use super::accounts::Owner;
use super::aside;
use super::choose::{Chosen, Nobodys, Queues, heads, nobodys};
use super::claim::count;
use super::failure::Failure;
use super::writer::Session;
use crate::fair::Candidate;

/// The first and the last queue in which users have ready tasks.
pub(super) const ENDS_OF_USERS: &str =
    "SELECT CAST((SELECT queue FROM ready INDEXED BY ready_in_turn WHERE user <> '' ORDER BY queue LIMIT 1) AS BLOB),
        CAST((SELECT queue FROM ready INDEXED BY ready_in_turn WHERE user <> '' ORDER BY queue DESC LIMIT 1) AS BLOB)";

pub(super) const FIRST_OF_USERS: &str =
    "SELECT turn, task, CAST(queue AS BLOB), CAST(user AS BLOB) FROM ready INDEXED BY ready_in_turn
        WHERE queue = ?2 AND user <> '' ORDER BY turn, task LIMIT ?1";

/// The first tasks of users in some queues: the first of each queue, and from there on in the order of the turns as in [`super::choose::NOBODYS_OF_SEVERAL`].
macro_rules! first_of_users {
    ($queues:literal) => {
        concat!(
            "WITH RECURSIVE queues (queue) AS (",
            $queues,
            "),
        head (queue, turn, task) AS MATERIALIZED (
            SELECT * FROM (SELECT queue,
                    (SELECT turn FROM ready INDEXED BY ready_in_turn WHERE ready.queue = queues.queue AND user <> ''
                        ORDER BY turn, task LIMIT 1) AS turn,
                    (SELECT task FROM ready INDEXED BY ready_in_turn WHERE ready.queue = queues.queue AND user <> ''
                        ORDER BY turn, task LIMIT 1) AS task
                FROM queues WHERE queue IS NOT NULL) WHERE task IS NOT NULL ORDER BY turn, task LIMIT ?1),
        walk (queue, turn, task) AS (
            SELECT queue, turn, task FROM head
            UNION ALL
            SELECT next.queue, next.turn, next.task
            FROM walk CROSS JOIN ready AS next INDEXED BY ready_in_turn ON next.queue = walk.queue AND next.user <> ''
                AND (next.turn, next.task) = (SELECT later.turn, later.task FROM ready AS later INDEXED BY ready_in_turn
                    WHERE later.queue = walk.queue AND later.user <> '' AND (later.turn, later.task) > (+walk.turn, +walk.task)
                    ORDER BY later.turn, later.task LIMIT 1)
            ORDER BY 2, 3)
        SELECT first.turn, first.task, CAST(first.queue AS BLOB), CAST(place.user AS BLOB)
        FROM (SELECT queue, turn, task FROM walk LIMIT ?1) AS first
            CROSS JOIN ready AS place INDEXED BY ready_in_turn
            ON place.queue = first.queue AND place.turn = first.turn AND place.task = first.task AND place.user <> ''"
        )
    };
}

pub(super) const FIRST_OF_USERS_OF_ALL: &str = first_of_users!(
    "SELECT * FROM (SELECT queue FROM ready INDEXED BY ready_in_turn WHERE user <> '' ORDER BY queue LIMIT 1)
            UNION ALL
            SELECT (SELECT queue FROM ready INDEXED BY ready_in_turn WHERE user <> '' AND queue > queues.queue ORDER BY queue LIMIT 1)
            FROM queues WHERE queue IS NOT NULL"
);

pub(super) const FIRST_OF_USERS_OF_QUEUES: &str = first_of_users!("SELECT value FROM json_each(?2)");

/// The first ready tasks, whosever they are.
pub(super) async fn first(
    session: &mut Session,
    queues: Option<&Queues>,
    limit: usize,
) -> Result<Result<Vec<Chosen>, Vec<aside::Account>>, Failure> {
    let heads = match heads(session, queues, limit).await? {
        Ok(heads) => heads,
        Err(nameless) => return Ok(Err(nameless)),
    };
    let mut chosen: Vec<Chosen> = nobodys(session, &heads, limit)
        .await?
        .into_iter()
        .map(|Nobodys { queue, candidate: Candidate { turn, task, .. } }| Chosen {
            task,
            turn,
            owner: Owner { queue, user: String::new() },
            pick: None,
        })
        .collect();
    // Most have one queue, where nothing has to be merged.
    let only = match queues {
        None => {
            let ends: (Option<Vec<u8>>, Option<Vec<u8>>) = sqlx::query_as(ENDS_OF_USERS).fetch_one(session.db()).await?;
            match ends {
                (Some(first), Some(last)) if first == last => String::from_utf8(first).ok(),
                (None, None) => Some(String::new()),
                _ => None,
            }
        }
        Some(queues) => queues.only.clone(),
    };
    let query = match (only, queues) {
        (Some(only), _) => sqlx::query(FIRST_OF_USERS).bind(count(limit)).bind(only),
        (None, None) => sqlx::query(FIRST_OF_USERS_OF_ALL).bind(count(limit)),
        (None, Some(queues)) => sqlx::query(FIRST_OF_USERS_OF_QUEUES).bind(count(limit)).bind(queues.json.clone()),
    };
    let mut nameless = Vec::new();
    for row in &query.fetch_all(session.db()).await? {
        let (turn, task) = (row.try_get(0)?, row.try_get(1)?);
        match (String::from_utf8(row.try_get(2)?), String::from_utf8(row.try_get(3)?)) {
            (Ok(queue), Ok(user)) => chosen.push(Chosen { task, turn, owner: Owner { queue, user }, pick: None }),
            _ => nameless.push((row.try_get(2)?, row.try_get(3)?)),
        }
    }
    chosen.sort_unstable_by_key(|chosen| (chosen.turn, chosen.task));
    chosen.truncate(limit);
    nameless.sort_unstable();
    nameless.dedup();
    Ok(if nameless.is_empty() { Ok(chosen) } else { Err(nameless) })
}
