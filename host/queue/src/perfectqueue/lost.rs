//! Leases that ran out. Nobody is told when a worker dies: its row may simply be acquired again, by Ruby too. A row that may be acquired and
//! still has one of our tokens was lost, and is counted when it is met, once for each token. That needs our own table. What a watchdog has handed on
//! (see [`super::hosts`]) is such a row too: its token is left there without the number of the host.

use std::collections::{HashMap, HashSet};

use sqlx::mysql::MySqlConnection;

use super::candidates::{Ready, marked};
use super::deaths;
use super::settle::{ended_timeout, fence, seconds};
use super::side::{self, LOST, Record, Side};
use super::table::{Names, is_token, json, now, number_in, second_from};
use crate::mysql::failure::Failure;
use crate::{Event, LeaseRef, Policy, Settlement, State, Verdict};

/// Rows whose last lease ran out and was not counted yet.
pub(super) struct LostLeases<'r> {
    rows: Vec<&'r Ready>,
}

impl<'r> LostLeases<'r> {
    pub(super) fn among(chosen: &'r [Ready], sides: &HashMap<String, Side>) -> Self {
        let counted = |ready: &Ready| sides.get(ready.key()).is_some_and(|side| side.lost_owner == ready.owner);
        let mut rows: Vec<&Ready> = chosen.iter().filter(|ready| is_token(ready.owner) && !counted(ready)).collect();
        // Rows are locked in the same order everywhere.
        rows.sort_unstable_by_key(|ready| ready.key());
        Self { rows }
    }

    /// Count them. Answers the keys of those that must not run now: lost so often that they have failed, that they wait for a while, or not as they
    /// were read any more.
    pub(super) async fn note(
        self,
        sides: &mut HashMap<String, Side>,
        policy: &Policy,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<HashSet<String>, Failure> {
        if self.rows.is_empty() {
            return Ok(HashSet::new());
        }
        // What was read before may have changed: somebody cancels the task, or its host takes the loss back. A connection on which this fails is closed.
        sqlx::raw_sql("START TRANSACTION").execute(&mut *connection).await?;
        let now_ms = now(names, connection).await?;
        let standing = self.lock(names, connection).await?;
        let keys: Vec<&str> = self.rows.iter().map(|ready| ready.key()).collect();
        let mut known = side::load(&keys, true, names, connection).await?;
        let (mut noted, mut put_off, mut hosts, mut left) = (Vec::new(), Vec::new(), Vec::new(), HashSet::new());
        for (ready, stands) in self.rows.iter().zip(standing) {
            if !stands {
                left.insert(ready.key().to_owned());
                continue;
            }
            let side = known.remove(ready.key()).filter(|side| side.created_at == ready.created_at);
            let mut side = side.unwrap_or_else(|| Side::new(ready.created_at));
            if side.lost_owner != ready.owner {
                if let Some((timeout, ended)) = count(&mut side, ready, policy, now_ms) {
                    put_off.push((ready.key(), ready.owner, ready.place.0, timeout, u8::from(ended)));
                    left.insert(ready.key().to_owned());
                }
                hosts.push(number_in(ready.owner));
                noted.push((ready.key(), side.clone()));
            }
            sides.insert(ready.key().to_owned(), side);
        }
        write(&put_off, names, connection).await?;
        side::store(&noted, names, connection).await?;
        hosts.retain(|number| *number > 0);
        deaths::enter(&hosts, now_ms, names, connection).await?;
        sqlx::raw_sql("COMMIT").execute(&mut *connection).await?;
        Ok(left)
    }

    /// Lock those that are as they were read. Answers which these are.
    async fn lock(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, sqlx::Error> {
        const LOCK: &str = concat!(
            "SELECT f.place FROM ",
            fence!(lockable),
            " WHERE t.owner = f.owner AND t.timeout = f.was AND t.created_at IS NOT NULL FOR UPDATE"
        );
        let rows = json(self.rows.iter().enumerate().map(|(place, ready)| (place, ready.key(), ready.owner, ready.place.0)));
        let places: Vec<i32> = sqlx::query_scalar(names.sql(LOCK)).bind(rows).fetch_all(connection).await?;
        Ok(marked(self.rows.len(), &places))
    }
}

/// Count one loss. Answers the time that the row gets if it is not to run now, and whether it has failed.
fn count(side: &mut Side, ready: &Ready, policy: &Policy, now_ms: i64) -> Option<(i64, bool)> {
    let lease_ref = LeaseRef { task: crate::TaskId(ready.number), lease: crate::Lease(ready.owner.cast_signed()) };
    // What waits after a loss waits for an exact time, so no random number is needed.
    let settlement = Settlement::of(lease_ref, Event::Lost, side.attempt(now_ms), policy, 0.0, None, Vec::new());
    let record = Record::new(
        side.attempts.saturating_add(1),
        ready.owner,
        "a host that is gone, or whose lease ran out".to_owned(),
        now_ms,
        LOST,
    );
    let record = record.with(None, settlement.error_code.clone(), settlement.error_message.clone()).alone(side.alone);
    side.record(record);
    side.lost_owner = ready.owner;
    side.progress = None;
    (side.error_code, side.error_message) = (settlement.error_code.clone(), settlement.error_message.clone());
    match *settlement.verdict() {
        Verdict::Fail { retention, lost, lost_alone, .. } => {
            side.count_losses(lost, lost_alone, now_ms);
            let timeout = ended_timeout(now_ms / 1_000, seconds(retention));
            (side.state, side.ended_ms, side.timeout) = (Some(State::Failed), Some(now_ms), Some(timeout));
            side.user.clone_from(&ready.user);
            tracing::error!(
                task = ready.key(),
                lost,
                "a task was lost so often that it has failed; it may be what ends its hosts"
            );
            Some((timeout, true))
        }
        Verdict::Wait { delay, lost, lost_alone, alone, .. } => {
            side.count_losses(lost, lost_alone, now_ms);
            side.alone = alone;
            let wait = delay.filter(|delay| !delay.is_zero());
            tracing::warn!(
                task = ready.key(),
                lost,
                wait_seconds = wait.map_or(0, |wait| wait.as_secs()),
                "a task was lost with its host or lease; it is tried again"
            );
            let delay_ms = i64::try_from(wait?.as_millis()).unwrap_or(i64::MAX);
            let timeout = second_from(now_ms.saturating_add(delay_ms));
            (side.state, side.timeout) = (Some(State::Waiting), Some(timeout));
            Some((timeout, false))
        }
        Verdict::Finish { .. } | Verdict::Unserved { .. } => None,
    }
}

/// Put off the rows of those that must not run now: key, token, time, the new time, whether it has failed.
async fn write(
    put_off: &[(&str, u64, i64, i64, u8)],
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), sqlx::Error> {
    const PUT_OFF: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', owner BIGINT UNSIGNED PATH '$[1]',
            was BIGINT PATH '$[2]', timeout BIGINT PATH '$[3]', ended INT PATH '$[4]')) AS f
            STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
        SET t.created_at = IF(f.ended, NULL, t.created_at), t.resource = IF(f.ended, NULL, t.resource), t.timeout = f.timeout, t.owner = 0
        WHERE t.owner = f.owner AND t.timeout = f.was AND t.created_at IS NOT NULL";
    if put_off.is_empty() {
        return Ok(());
    }
    sqlx::query(names.sql(PUT_OFF)).bind(json(put_off)).execute(connection).await.map(drop)
}
