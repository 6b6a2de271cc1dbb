//! A host that was thought dead is there again: what its losses did to its tasks is taken back.

use std::collections::BTreeMap;

use sqlx::Row as _;

use super::MySql;
use super::accounts::Changes;
use super::failure::Failure;
use super::mend::{Spot, place_anew};
use super::rows::{ids, json, lockable, priority_in_range};
use super::session::Session;
use super::settle::leases;
use crate::earlier::Earlier;
use crate::{HostId, LeaseRef, Policy, Result};

/// What is taken back from one task.
#[derive(Default)]
struct Excused {
    lost: u32,
    lost_alone: u32,
}

impl MySql {
    pub(super) async fn excuse_host(&self, host: HostId, leases: &[LeaseRef]) -> Result<u64> {
        let mut leases: Vec<(i64, i64)> = leases.iter().map(|lease_ref| (lease_ref.task.0, lease_ref.lease.0)).collect();
        leases.sort_unstable();
        leases.dedup();
        let earlier = Earlier::default();
        self.run("excusing a host", move |session| {
            let (leases, earlier) = (leases.clone(), earlier.clone());
            Box::pin(async move {
                let excused = excuse(session, host, &leases).await?;
                // What an earlier try has excused that was committed after all is excused by this one.
                let excused = if excused == 0 { earlier.get().unwrap_or(0) } else { excused };
                earlier.note(excused);
                Ok(excused)
            })
        })
        .await
    }
}

pub(super) const TASKS: &str = concat!(
    "SELECT t.id, t.state = 'waiting', t.run_at, t.lost, t.lost_alone, t.alone, t.lost_at, t.turn FROM ",
    lockable!(ids!()),
    " STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.id FOR UPDATE"
);

pub(super) const LOST: &str = concat!(
    "SELECT a.task, a.alone, a.event = 'lost', a.ended_at FROM ",
    lockable!(leases!()),
    " STRAIGHT_JOIN laelaps_attempt AS a FORCE INDEX (PRIMARY) ON a.task = s.task AND a.lease = s.lease
    WHERE a.host = ? AND a.event IN ('lost', 'excused') FOR UPDATE"
);

pub(super) const EXCUSE: &str = concat!(
    "UPDATE ",
    leases!(),
    " STRAIGHT_JOIN laelaps_attempt AS a FORCE INDEX (PRIMARY) ON a.task = s.task AND a.lease = s.lease
    SET a.event = 'excused' WHERE a.host = ? AND a.event = 'lost'"
);

pub(super) const CLEAR: &str = concat!(
    "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (task BIGINT PATH '$[0]', lost BIGINT PATH '$[1]',
        lost_alone BIGINT PATH '$[2]', alone INT PATH '$[3]', run_at BIGINT PATH '$[4]')) AS s
    STRAIGHT_JOIN laelaps_task AS t FORCE INDEX (PRIMARY) ON t.id = s.task
    SET t.lost = s.lost, t.lost_alone = s.lost_alone, t.alone = s.alone, t.run_at = s.run_at, t.lost_at = IF(s.lost = 0, 0, t.lost_at), ",
    priority_in_range!()
);

async fn excuse(session: &mut Session<'_>, host: HostId, leases: &[(i64, i64)]) -> Result<u64, Failure> {
    const INNOCENT: [&str; 2] =
        ["DELETE FROM laelaps_plugin_death WHERE host = ?", "UPDATE laelaps_host SET died_at = 0 WHERE id = ? AND died_at <> 0"];
    for sql in INNOCENT {
        sqlx::query(sql).bind(host.0).execute(session.db()).await?;
    }
    let mut tasks: Vec<i64> = leases.iter().map(|(task, _)| *task).collect();
    tasks.dedup();
    let tasks = sqlx::query(TASKS).bind(json(tasks)).fetch_all(session.db()).await?;
    let mut excused: BTreeMap<i64, Excused> = BTreeMap::new();
    let mut lost_at = BTreeMap::new();
    for row in &tasks {
        lost_at.insert(row.try_get::<i64, _>(0)?, row.try_get::<i64, _>(6)?);
    }
    let mut count = 0;
    for row in sqlx::query(LOST).bind(json(leases)).bind(host.0).fetch_all(session.db()).await? {
        let is_lost: bool = row.try_get(2)?;
        if is_lost {
            count += 1;
            let task = row.try_get(0)?;
            let of_task = excused.entry(task).or_default();
            // Nothing is left of a loss before the first one that counts: an attempt ended otherwise in between.
            if lost_at.get(&task).is_some_and(|since| *since > 0 && row.try_get(3).is_ok_and(|ended: i64| ended >= *since)) {
                of_task.lost += 1;
                of_task.lost_alone += u32::from(row.try_get::<bool, _>(1)?);
            }
        }
    }
    let now = session.now;
    let mut cleared = Vec::with_capacity(tasks.len());
    let mut moved = Vec::new();
    for row in &tasks {
        let task: i64 = row.try_get(0)?;
        let Some(Excused { lost, lost_alone }) = excused.get(&task) else { continue };
        let (waits, run_at): (bool, i64) = (row.try_get(1)?, row.try_get(2)?);
        let lost = row.try_get::<u32, _>(3)?.saturating_sub(*lost);
        let lost_alone = row.try_get::<u32, _>(4)?.saturating_sub(*lost_alone);
        let alone: bool = row.try_get(5)?;
        // What runs has its losses with it, and its host writes them.
        let in_company_again = waits && alone && lost < Policy::LOST_MAX;
        let run_at_now = if in_company_again {
            moved.extend([Spot::anywhere(run_at, task), Spot::anywhere(row.try_get(7)?, task)]);
            run_at.min(now)
        } else {
            run_at
        };
        cleared.push((task, lost, lost_alone, u8::from(alone && !in_company_again), run_at_now));
    }
    if !cleared.is_empty() {
        sqlx::query(EXCUSE).bind(json(leases)).bind(host.0).execute(session.db()).await?;
        sqlx::query(CLEAR).bind(json(cleared)).execute(session.db()).await?;
        let mut changes = Changes::default();
        place_anew(session, &moved, &mut changes).await?;
        changes.write(session).await?;
    }
    Ok(count)
}
