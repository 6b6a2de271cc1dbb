//! The rows that a claim has chosen, put under its lease.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use sqlx::mysql::MySqlConnection;

use super::Shared;
use super::candidates::Ready;
use super::hosts;
use super::keep::until;
use super::lease::{Held, lease_ref};
use super::run::Operation;
use super::settle::fence;
use super::side::Side;
use super::table::{Names, json, token};
use crate::mysql::failure::Failure;
use crate::{Attempt, Claim, ClaimedTask, Descent, TaskId, Timestamp};

/// Put the chosen rows under a lease.
pub(super) async fn take(
    mut chosen: Vec<Ready>,
    mut sides: HashMap<String, Side>,
    claim: &Claim,
    now_ms: i64,
    names: &Names,
    connection: &mut MySqlConnection,
    shared: &Arc<Shared>,
) -> Result<Vec<ClaimedTask>, sqlx::Error> {
    const TAKE: &str = concat!(
        "UPDATE ",
        fence!(),
        " SET t.timeout = f.value, t.owner = f.owner WHERE t.timeout = f.was AND t.created_at IS NOT NULL"
    );
    // A host that is watched takes nothing once it has left, and its row says how long it may run what it takes.
    const TAKE_WATCHED: &str = concat!(
        "UPDATE {h} AS h FORCE INDEX (PRIMARY) STRAIGHT_JOIN ",
        fence!(),
        " SET t.timeout = f.value, t.owner = f.owner, h.until = GREATEST(h.until, f.value)
        WHERE h.id = ? AND h.left_at IS NULL AND t.timeout = f.was AND t.created_at IS NOT NULL"
    );
    const TAKEN: &str = concat!("SELECT f.place FROM ", fence!(), " WHERE t.owner = f.owner AND t.timeout = f.value");
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    let number = hosts::number(claim.host);
    let (token, timeout) = (token(number), until(now_ms, claim.alive_time));
    // Rows are written in the same order everywhere; tasks are handed out in the order of choice.
    let mut in_order: Vec<(usize, &Ready)> = chosen.iter().enumerate().collect();
    in_order.sort_unstable_by_key(|(_, ready)| ready.key());
    let rows = json(in_order.into_iter().map(|(place, ready)| (place, ready.key(), token, ready.place.0, timeout)));
    let mut unheard = Unheard::new(shared, token, timeout);
    let (take, others) = if number == 0 { (sqlx::query(names.sql(TAKE)), 0) } else { (sqlx::query(names.sql(TAKE_WATCHED)), 1) };
    let take = take.bind(&rows);
    let take = if number == 0 { take } else { take.bind(number) };
    let written = take.execute(&mut *connection).await?.rows_affected();
    // The host's own row counts too.
    if written != chosen.len() as u64 + others {
        let taken: Vec<i32> = sqlx::query_scalar(names.sql(TAKEN)).bind(&rows).fetch_all(connection).await?;
        let taken = |place: usize| i32::try_from(place).is_ok_and(|place| taken.contains(&place));
        let mut place = 0..;
        chosen.retain(|_| place.next().is_some_and(taken));
    }
    unheard.is_heard();
    shared.hosts.covered(claim.host, timeout);
    let tasks: Vec<ClaimedTask> = chosen
        .into_iter()
        .map(|ready| {
            let side = sides.remove(ready.key()).unwrap_or_default();
            claimed(ready, &side, token, now_ms, timeout)
        })
        .collect();
    let leases = tasks.iter().map(|task| {
        let is_limited = task.user.is_some() && task.max_running.is_some();
        let held = Held::new(task.key.clone(), token, timeout, claim.alive_time, claim.host);
        (task.lease_ref, held.limited(is_limited))
    });
    shared.leases.enter(leases);
    Ok(tasks)
}

fn claimed(ready: Ready, side: &Side, token: u64, now_ms: i64, timeout: i64) -> ClaimedTask {
    let Attempt { attempt, max_attempts, releases, lost, lost_alone, alone, .. } = side.attempt(now_ms);
    let max_running = ready.max_running.map(|most| u32::try_from(most).unwrap_or(if most < 0 { 0 } else { u32::MAX }));
    ClaimedTask {
        lease_ref: lease_ref(ready.number, token),
        key: ready.place.1,
        task_type: ready.read.task_type,
        queue: crate::NewTask::DEFAULT_QUEUE.to_owned(),
        data: ready.read.data,
        user: ready.user.filter(|user| !user.is_empty()),
        max_running,
        descent: side.descent.unwrap_or(Descent { root: TaskId(ready.number), depth: 0 }),
        compression: ready.read.compression,
        attempt,
        max_attempts,
        lost,
        alone,
        releases,
        lost_alone,
        created_at: Timestamp(ready.created_at.saturating_mul(1_000)),
        claimed_at: Timestamp(now_ms),
        until: Timestamp(timeout.saturating_mul(1_000)),
    }
}

/// A claim that was sent and not answered: dropped like this, it is undone as soon as the server can be reached, so that its rows do not
/// wait for the end of a lease that nobody knows of.
struct Unheard {
    undo: Option<(Arc<Shared>, Undo)>,
}

impl Unheard {
    fn new(shared: &Arc<Shared>, token: u64, timeout: i64) -> Self {
        Self { undo: Some((Arc::clone(shared), Undo { token, timeout })) }
    }

    fn is_heard(&mut self) {
        self.undo = None;
    }
}

impl Drop for Unheard {
    fn drop(&mut self) {
        if let Some((shared, undo)) = self.undo.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(async move {
                if let Err(error) = shared.perform(undo).await {
                    tracing::warn!(%error, "what a broken claim may have taken comes back when its lease ends");
                }
            });
        }
    }
}

struct Undo {
    token: u64,
    timeout: i64,
}

#[async_trait]
impl Operation for Undo {
    type Answer = ();
    const DOING: &'static str = "handing back what a broken claim took";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const UNDO: &str = "UPDATE {t} SET timeout = UNIX_TIMESTAMP(), owner = 0
            WHERE timeout = ? AND owner = ? AND created_at IS NOT NULL";
        sqlx::query(names.sql(UNDO)).bind(self.timeout).bind(self.token).execute(connection).await?;
        Ok(())
    }
}
