//! Tasks that must run alone. They wait apart. To run one, a host first ends everything else that it has, which costs its throughput: so a host is
//! only told of a task that may run now, and each such task asks one host at a time.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::MySql;
use super::choose::Chosen;
use super::failure::Failure;
use super::mend::user_of;
use super::session::{Session, Waiting, now};
use crate::outcome::ms;
use crate::{HostId, Result};

/// Tasks looked at for one whose user's limit allows it.
const SUSPECTS_MAX: i64 = 100;
/// How long a task that must run alone waits for the host that ends its work for it, before another may do the same.
const RESERVED: Duration = Duration::from_secs(300);

pub(super) const SUSPECT: &str = "SELECT first.task, first.turn, t.user
    FROM (SELECT turn, task FROM laelaps_suspect ORDER BY turn, task LIMIT ?) AS first
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = first.task
    LEFT JOIN laelaps_account AS a ON a.user = t.user AND t.user <> ''
    WHERE t.max_running IS NULL OR COALESCE(a.running, 0) < GREATEST(t.max_running, 1)
    ORDER BY first.turn, first.task LIMIT 1";

/// The first task that has to run alone and whose user's limit allows it, also if another host ends its work for it: this one has nothing to end.
pub(super) async fn suspect(session: &mut Session<'_>) -> Result<Option<Chosen>, Failure> {
    let Some(row) = sqlx::query(SUSPECT).bind(SUSPECTS_MAX).fetch_optional(session.db()).await? else { return Ok(None) };
    Ok(Some(Chosen { task: row.try_get(0)?, turn: row.try_get(1)?, user: user_of(&row, 2)?, pick: None }))
}

/// The first one that may run now and is not reserved for another living host; one that is reserved for this host comes first. Always one row, of
/// nulls if there is none. A place that contradicts its task counts for nothing.
pub(super) const FREE: &str = concat!(
    "SELECT free.turn, free.task, free.host, free.until, COALESCE(free.host = ?, 0), ",
    now!(),
    " FROM (SELECT 1 AS n) AS one LEFT JOIN (
        SELECT first.turn, first.task, first.host, first.until
        FROM (SELECT turn, task, host, until FROM laelaps_suspect ORDER BY turn, task LIMIT ?) AS first
        STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY)
            ON t.id = first.task AND t.state = 'waiting' AND t.alone = 1 AND t.turn = first.turn
        LEFT JOIN laelaps_account AS a ON a.user = t.user AND t.user <> ''
        LEFT JOIN laelaps_host AS h ON h.id = first.host AND h.left_at = 0 AND h.ended_at = 0
        WHERE (t.max_running IS NULL OR COALESCE(a.running, 0) < GREATEST(t.max_running, 1))
            AND (h.id IS NULL OR first.host = ? OR first.until <= ",
    now!(),
    ")
        ORDER BY first.host = ? DESC, first.turn, first.task LIMIT 1) AS free ON 1 = 1"
);

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
macro_rules! free_for {
    ($host:expr) => {
        sqlx::query(FREE).bind($host.0).bind(SUSPECTS_MAX).bind($host.0).bind($host.0)
    };
}

impl MySql {
    /// Whether this host should end what it has, so as to run a task that must run alone and may run now.
    pub(super) async fn is_wanted_alone(&self, host: HostId) -> Result<bool> {
        let doing = "looking for tasks that must run alone";
        let row = self.read(doing, || free_for!(host)).await?;
        match free(&row).map_err(|error| self.runner.place.worded(error, doing))? {
            None => Ok(false),
            Some(free) if free.is_ours => Ok(true),
            Some(_) => {
                // What others' tasks have changed for its user counts before anything is ended for it.
                self.fold_changes().await?;
                let doing = "reserving a task that must run alone";
                self.runner
                    .run_here(Waiting::Long, doing, move |session| Box::pin(async move { reserve(session, host).await }))
                    .await
            }
        }
    }
}

/// Reserve such a task for a host, if there is one still.
async fn reserve(session: &mut Session<'_>, host: HostId) -> Result<bool, Failure> {
    const RESERVE: &str = "UPDATE laelaps_suspect SET host = ?, until = ? WHERE turn = ? AND task = ? AND host = ? AND until = ?";
    let row = free_for!(host).fetch_one(session.db()).await?;
    let Some(free) = free(&row)? else { return Ok(false) };
    if free.is_ours {
        return Ok(true);
    }
    let query = sqlx::query(RESERVE).bind(host.0).bind(free.now + ms(RESERVED)).bind(free.turn).bind(free.task);
    let reserved = query.bind(free.host).bind(free.until).execute(session.db()).await?.rows_affected();
    Ok(reserved == 1)
}
