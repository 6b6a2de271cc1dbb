//! What an earlier try has taken back, whose answer was lost.

use std::collections::HashSet;

use super::failure::Failure;
use super::rows::{ids, json};
use super::session::Session;
use super::settle::leases;
use crate::Reclaimed;

/// What of an earlier try was done, if it was committed: its tasks' attempts are recorded as lost, its hosts are struck off.
pub(super) async fn done_before(session: &mut Session<'_>, earlier: Reclaimed) -> Result<Option<Reclaimed>, Failure> {
    const LOST: &str = concat!(
        "SELECT s.task, s.lease FROM ",
        leases!(),
        " STRAIGHT_JOIN laelaps_attempt AS a FORCE INDEX (PRIMARY) ON a.task = s.task AND a.lease = s.lease
        WHERE a.event IN ('lost', 'overdue', 'excused')"
    );
    const GONE: &str = concat!(
        "SELECT h.id FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id WHERE h.ended_at <> 0"
    );
    let Reclaimed { mut tasks, mut dead_hosts } = earlier;
    let leases = json(tasks.iter().map(|lost| (lost.lease_ref.task, lost.lease_ref.lease)));
    let lost: HashSet<(i64, i64)> = sqlx::query_as(LOST).bind(leases).fetch_all(session.db()).await?.into_iter().collect();
    tasks.retain(|task| lost.contains(&(task.lease_ref.task.0, task.lease_ref.lease.0)));
    let hosts = json(dead_hosts.iter().map(|host| host.id.0));
    let gone: HashSet<i64> = sqlx::query_scalar(GONE).bind(hosts).fetch_all(session.db()).await?.into_iter().collect();
    dead_hosts.retain(|host| gone.contains(&host.id.0));
    Ok(Some(Reclaimed { tasks, dead_hosts }).filter(|done| !done.tasks.is_empty() || !done.dead_hosts.is_empty()))
}
