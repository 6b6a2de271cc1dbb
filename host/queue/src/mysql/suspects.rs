//! Tasks that must run alone. They wait apart. To run one, a host first ends everything else that it has, which costs its throughput: so a host is
//! only told of a task that may run now, and each such task asks one host at a time.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::mysql::{MySqlArguments, MySqlRow};
use sqlx::query::Query;

use super::MySql;
use super::choose::Chosen;
use super::failure::Failure;
use super::fronts::{ARMS, arms, hex, queues};
use super::mark::Asked;
use super::mend::{queue_of, user_of};
use super::rows::{count, json};
use super::session::{Session, Waiting, now};
use crate::outcome::ms;
use crate::{HostId, Result};

/// Tasks looked at for one whose user's limit allows it.
const SUSPECTS_MAX: i64 = 100;
/// How long a task that must run alone waits for the host that ends its work for it, before another may do the same.
const RESERVED: Duration = Duration::from_secs(300);

/// The first tasks that must run alone.
macro_rules! of_all {
    () => {
        "(SELECT turn, task, queue, host, until FROM laelaps_suspect ORDER BY turn, task LIMIT ?)"
    };
}

/// The first ones of some queues.
macro_rules! of_queues {
    () => {
        concat!(
            "(SELECT * FROM (",
            arms!("SELECT turn, task, queue, host, until FROM laelaps_suspect FORCE INDEX (in_queue) WHERE queue = ? ORDER BY turn, task LIMIT ?"),
            ") AS every_one ORDER BY turn, task LIMIT ?)"
        )
    };
}

macro_rules! suspect {
    ($($first:tt)+) => {
        concat!(
            "SELECT first.task, first.turn, t.user, first.queue FROM ",
            $($first)+,
            " AS first STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = first.task
            LEFT JOIN laelaps_account AS a ON a.queue = first.queue AND a.user = t.user AND t.user <> ''
            WHERE t.max_running IS NULL OR COALESCE(a.running, 0) < GREATEST(t.max_running, 1)
            ORDER BY first.turn, first.task LIMIT 1"
        )
    };
}

pub(super) const SUSPECT: &str = suspect!(of_all!());
pub(super) const SUSPECT_OF_QUEUES: &str = suspect!(of_queues!());

/// Of each queue the first task that must run alone.
const FIRST_OF_EACH: &str = concat!(
    "SELECT s.place, (SELECT r.turn FROM laelaps_suspect AS r FORCE INDEX (in_queue) WHERE r.queue = UNHEX(s.queue)
        ORDER BY r.turn LIMIT 1) AS turn FROM ",
    queues!(),
    " HAVING turn IS NOT NULL ORDER BY turn LIMIT ?"
);

/// The queues in which to look, of those that were asked for: as many as one statement takes, those whose first such task comes first. None: in all.
async fn where_to_look(session: &mut Session<'_>, asked: &Asked) -> Result<Option<Vec<String>>, Failure> {
    let Some(asked) = asked.as_deref().filter(|asked| asked.len() > ARMS) else { return Ok(asked.as_deref().map(<[_]>::to_vec)) };
    let names = json(asked.iter().map(|queue| hex(queue.as_bytes())));
    let first: Vec<(i64, i64)> = sqlx::query_as(FIRST_OF_EACH).bind(names).bind(count(ARMS)).fetch_all(session.db()).await?;
    let queue = |(place, _): (i64, i64)| usize::try_from(place - 1).ok().and_then(|place| asked.get(place)).cloned();
    Ok(Some(first.into_iter().filter_map(queue).collect()))
}

/// Bind what says which tasks are the first ones.
fn bind_first<'q>(
    query: Query<'q, sqlx::MySql, MySqlArguments>,
    queues: Option<&[String]>,
) -> Query<'q, sqlx::MySql, MySqlArguments> {
    let Some(queues) = queues else { return query.bind(SUSPECTS_MAX) };
    let arms = (0..ARMS).map(|arm| queues.get(arm));
    let query = arms.fold(query, |query, queue| match queue {
        Some(queue) => query.bind(queue.as_bytes().to_vec()).bind(SUSPECTS_MAX),
        None => query.bind(Vec::new()).bind(0),
    });
    query.bind(SUSPECTS_MAX)
}

/// The first task that has to run alone and whose user's limit allows it, also if another host ends its work for it: this one has nothing to end.
pub(super) async fn suspect(session: &mut Session<'_>, asked: &Asked) -> Result<Option<Chosen>, Failure> {
    let queues = where_to_look(session, asked).await?;
    let sql = if queues.is_some() { SUSPECT_OF_QUEUES } else { SUSPECT };
    let row = bind_first(sqlx::query(sql), queues.as_deref()).fetch_optional(session.db()).await?;
    let Some(row) = row else { return Ok(None) };
    let (task, turn) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Some(Chosen { task, turn, queue: queue_of(&row, 3)?, user: user_of(&row, 2)?, pick: None }))
}

/// The first one that may run now and is not reserved for another living host; one that is reserved for this host comes first. Always one row, of
/// nulls if there is none. A place that contradicts its task counts for nothing.
macro_rules! free {
    ($($first:tt)+) => {
        concat!(
            "SELECT free.turn, free.task, free.host, free.until, COALESCE(free.host = ?, 0), ",
            now!(),
            " FROM (SELECT 1 AS n) AS one LEFT JOIN (
                SELECT first.turn, first.task, first.host, first.until FROM ",
            $($first)+,
            " AS first STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY)
                    ON t.id = first.task AND t.state = 'waiting' AND t.alone = 1 AND t.turn = first.turn AND t.queue = first.queue
                LEFT JOIN laelaps_account AS a ON a.queue = t.queue AND a.user = t.user AND t.user <> ''
                LEFT JOIN laelaps_host AS h ON h.id = first.host AND h.left_at = 0 AND h.ended_at = 0
                WHERE (t.max_running IS NULL OR COALESCE(a.running, 0) < GREATEST(t.max_running, 1))
                    AND (h.id IS NULL OR first.host = ? OR first.until <= ",
            now!(),
            ")
                ORDER BY first.host = ? DESC, first.turn, first.task LIMIT 1) AS free ON 1 = 1"
        )
    };
}

pub(super) const FREE: &str = free!(of_all!());
pub(super) const FREE_OF_QUEUES: &str = free!(of_queues!());

/// A task that may run alone now.
struct Free {
    turn: i64,
    task: i64,
    /// The host for which it is, or was, reserved, and until when.
    host: i64,
    until: i64,
    /// It stays reserved for the host that asks.
    is_ours: bool,
    now: i64,
}

fn free(row: &MySqlRow) -> Result<Option<Free>, sqlx::Error> {
    let Some(turn) = row.try_get(0)? else { return Ok(None) };
    let (until, now): (i64, i64) = (row.try_get(3)?, row.try_get(5)?);
    let is_ours = row.try_get::<bool, _>(4)? && until >= now + ms(RESERVED) / 2;
    Ok(Some(Free { turn, task: row.try_get(1)?, host: row.try_get(2)?, until, is_ours, now }))
}

/// [`FREE`] for a host.
fn asking<'q>(host: HostId, queues: Option<&[String]>) -> Query<'q, sqlx::MySql, MySqlArguments> {
    let sql = if queues.is_some() { FREE_OF_QUEUES } else { FREE };
    bind_first(sqlx::query(sql).bind(host.0), queues).bind(host.0).bind(host.0)
}

async fn free_for(session: &mut Session<'_>, host: HostId, asked: &Asked) -> Result<Option<Free>, Failure> {
    let queues = where_to_look(session, asked).await?;
    let row = asking(host, queues.as_deref()).fetch_one(session.db()).await?;
    Ok(free(&row)?)
}

impl MySql {
    /// Whether this host should end what it has, so as to run a task of these queues that must run alone and may run now.
    pub(super) async fn is_wanted_alone(&self, host: HostId, asked: &Asked) -> Result<bool> {
        let doing = "looking for tasks that must run alone";
        let (seen, reserved) = (asked.clone(), asked.clone());
        let found = if asked.as_deref().is_some_and(|asked| asked.len() > ARMS) {
            self.runner
                .read_together(doing, move |session| {
                    let asked = seen.clone();
                    Box::pin(async move { free_for(session, host, &asked).await })
                })
                .await?
        } else {
            let row = self.read(doing, || asking(host, asked.as_deref())).await?;
            free(&row).map_err(|error| self.runner.place.worded(error, doing))?
        };
        match found {
            None => Ok(false),
            Some(free) if free.is_ours => Ok(true),
            Some(_) => {
                // What others' tasks have changed for its user counts before anything is ended for it.
                self.fold_changes().await?;
                let doing = "reserving a task that must run alone";
                self.runner
                    .run_here(Waiting::Long, doing, move |session| {
                        let asked = reserved.clone();
                        Box::pin(async move { reserve(session, host, &asked).await })
                    })
                    .await
            }
        }
    }
}

/// Reserve such a task for a host, if there is one still.
async fn reserve(session: &mut Session<'_>, host: HostId, asked: &Asked) -> Result<bool, Failure> {
    const RESERVE: &str = "UPDATE laelaps_suspect SET host = ?, until = ? WHERE turn = ? AND task = ? AND host = ? AND until = ?";
    let Some(free) = free_for(session, host, asked).await? else { return Ok(false) };
    if free.is_ours {
        return Ok(true);
    }
    let query = sqlx::query(RESERVE).bind(host.0).bind(free.now + ms(RESERVED)).bind(free.turn).bind(free.task);
    let reserved = query.bind(free.host).bind(free.until).execute(session.db()).await?.rows_affected();
    Ok(reserved == 1)
}
