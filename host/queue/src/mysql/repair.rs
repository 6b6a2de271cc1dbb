//! Accounts, and places that no claim meets, put right from the tasks and leases, now and then. Nothing of ours makes them wrong; hands, and faults of earlier versions, do, and a
//! user whose account counts too much would never run again.

use std::time::{Duration, Instant};

use sqlx::Row as _;

use super::accounts::Changes;
use super::due::{Standing as _, move_over};
use super::failure::Failure;
use super::mend::{Spot, is_no_queue, mend};
use super::session::{Session, Waiting};
use super::unserved::Apart;
use super::{MySql, locked};
use crate::Result;
use crate::unserved::Kind;

/// Between two looks of a process. It costs as much as users and running tasks are many, and holds nobody up.
const INTERVAL: Duration = Duration::from_secs(60);
/// Users put right in one go.
const USERS_MAX: i64 = 1_000;
/// Places apart that one look compares with their tasks.
const APART_MAX: i64 = 10_000;

/// What accounts and their changes count, less what runs under the leases of claims.
const DRIFT: &str = concat!(
    "SELECT queue, user, CAST(SUM(running) AS SIGNED) FROM (
        SELECT queue, user, running FROM laelaps_account WHERE running <> 0
        UNION ALL SELECT queue, user, running FROM laelaps_account_change WHERE running <> 0
        UNION ALL SELECT IF(",
    is_no_queue!(),
    ", '', t.queue), t.user, -1 FROM laelaps_claim AS c
            STRAIGHT_JOIN JSON_TABLE(IF(JSON_VALID(c.tasks), c.tasks, '[]'), '$[*]' COLUMNS (id BIGINT PATH '$')) AS s
            STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id
            WHERE t.state = 'running' AND t.lease DIV 1048576 = c.id AND t.user <> '') AS parts
    GROUP BY queue, user HAVING SUM(running) <> 0 LIMIT ?"
);

/// Users with ready tasks whose accounts do not say so, and are not about to.
const UNKNOWN: &str = "SELECT r.queue, r.user, 0 FROM (SELECT DISTINCT queue, user FROM laelaps_ready_of_user) AS r
    LEFT JOIN laelaps_account AS a ON a.queue = r.queue AND a.user = r.user WHERE a.head_task IS NULL
    AND NOT EXISTS (SELECT 1 FROM laelaps_account_change AS c WHERE c.queue = r.queue AND c.user = r.user) LIMIT ?";

/// Places of tasks that have to run alone, which only a host that runs nothing else looks at, and not if there is no such task.
const NO_SUSPECTS: &str = concat!(
    "SELECT r.turn, r.task FROM laelaps_suspect AS r LEFT JOIN laelaps_task AS t
    ON t.id = r.task AND t.state = 'waiting' AND t.turn = r.turn AND t.alone AND r.queue = IF(",
    is_no_queue!(),
    ", '', t.queue) WHERE t.id IS NULL LIMIT ?"
);

/// What waits apart behind a kind, in order.
macro_rules! apart {
    ($columns:literal) => {
        concat!(
            "SELECT ",
            $columns,
            " FROM laelaps_unserved FORCE INDEX (PRIMARY) WHERE (queue = ? AND type > ?) OR queue > ?
            ORDER BY queue, type, user, turn, task LIMIT "
        )
    };
}

/// Places apart that a host which serves their tasks would not look at.
const NOT_OF_KIND: &str = concat!(
    "SELECT r.queue, r.type, r.user, r.turn, r.task FROM (",
    apart!("queue, type, user, turn, task"),
    "?) AS r LEFT JOIN laelaps_task AS t ON t.id = r.task AND t.state = 'waiting' AND t.type = r.type AND r.queue = IF(",
    is_no_queue!(),
    ", '', t.queue) WHERE t.id IS NULL LIMIT ?"
);

/// The kind at which a look at so many places ends.
const LAST_KIND: &str = concat!(apart!("queue, type"), "1 OFFSET ?");

/// Queues and users, each with how much its account counts too much, and places.
#[derive(Default)]
struct Wrong {
    users: Vec<(Vec<u8>, Vec<u8>, i64)>,
    places: Vec<Spot>,
    apart: Vec<Apart>,
    /// Behind which kind to look at places apart the next time: of every kind the first ones at least are seen.
    next: Kind,
}

/// What was compared, and when.
#[derive(Debug, Default)]
pub(super) struct Repaired {
    at: Option<Instant>,
    /// Behind which kind places apart are looked at next.
    behind: Kind,
}

impl MySql {
    /// Compare accounts with tasks, unless that was done lately, and correct them.
    pub(super) async fn repair_accounts(&self) -> Result<()> {
        let behind = {
            let mut last = locked(&self.repaired);
            if last.at.is_some_and(|at| at.elapsed() < INTERVAL) {
                return Ok(());
            }
            last.at = Some(Instant::now());
            last.behind.clone()
        };
        let (doing, from) = ("comparing accounts with tasks", behind.clone());
        let looking = self.runner.read_together(doing, move |session| {
            let from = from.clone();
            Box::pin(async move { wrong(session, &from).await })
        });
        let seen = looking.await?;
        locked(&self.repaired).behind = seen.next;
        if seen.users.is_empty() && seen.places.is_empty() && seen.apart.is_empty() {
            return Ok(());
        }
        let corrected = self.run_waiting(Waiting::AtOneMoment, "correcting accounts", move |session| {
            let behind = behind.clone();
            Box::pin(async move { correct(session, &behind).await })
        });
        corrected.await
    }
}

async fn wrong(session: &mut Session<'_>, behind: &Kind) -> Result<Wrong, Failure> {
    let mut wrong = Wrong::default();
    for sql in [DRIFT, UNKNOWN] {
        for row in sqlx::query(sql).bind(USERS_MAX).fetch_all(session.db()).await? {
            wrong.users.push((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?));
        }
    }
    let places: Vec<(i64, i64)> = sqlx::query_as(NO_SUSPECTS).bind(USERS_MAX).fetch_all(session.db()).await?;
    wrong.places = places.into_iter().map(|(at, task)| Spot::anywhere(at, task)).collect();
    let Kind { queue, task_type } = behind;
    let query = sqlx::query(NOT_OF_KIND).bind(queue).bind(task_type).bind(queue).bind(APART_MAX).bind(USERS_MAX);
    for row in query.fetch_all(session.db()).await? {
        wrong.apart.push(Apart::read(&row)?);
    }
    let query = sqlx::query_as(LAST_KIND).bind(queue).bind(task_type).bind(queue).bind(APART_MAX - 1);
    let last: Option<(Vec<u8>, Vec<u8>)> = query.fetch_optional(session.db()).await?;
    wrong.next = last.map(|(queue, task_type)| Kind { queue, task_type }).unwrap_or_default();
    Ok(wrong)
}

/// One after the other: the next one sees what the last one has corrected.
async fn correct(session: &mut Session<'_>, behind: &Kind) -> Result<(), Failure> {
    const HOLD: &str = "SELECT pick FROM laelaps_counter WHERE id = 1 FOR UPDATE";
    const CHANGE: &str = "INSERT INTO laelaps_account_change (queue, user, running) VALUES (?, ?, ?)";
    sqlx::query(HOLD).fetch_one(session.db()).await?;
    let Wrong { users, places, apart, .. } = wrong(session, behind).await?;
    let mut changes = Changes::default();
    mend(session, &places, &mut changes).await?;
    changes.write(session).await?;
    move_over(session, apart).await?;
    for (queue, user, drift) in users {
        let (in_queue, of_user) = (String::from_utf8_lossy(&queue), String::from_utf8_lossy(&user));
        tracing::error!(queue = %in_queue, user = %of_user, drift, "a user's account counted wrongly; it is corrected");
        sqlx::query(CHANGE).bind(queue).bind(user).bind(-drift).execute(session.db()).await?;
    }
    session.wake = true;
    Ok(())
}
