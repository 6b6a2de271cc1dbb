//! Leases that ran out. Nobody is told when a worker dies: its row may simply be acquired again, by Ruby too. A row that may be acquired and
//! still has one of our tokens was lost, and is counted when it is met, once for each token. That needs our own table. What a watchdog has handed on
//! (see [`super::hosts`]) is such a row too: its token is left there without the number of the host.

use std::collections::{BTreeMap, HashMap, HashSet};

use sqlx::mysql::MySqlConnection;

use super::candidates::Ready;
use super::settle::{ended_timeout, seconds};
use super::side::{self, Record, Side};
use super::table::{Names, is_token, json, now};
use crate::mysql::failure::Failure;
use crate::{Event, LeaseRef, Policy, Settlement, State, Verdict};

/// Rows whose last lease ran out and was not counted yet.
pub(super) struct LostLeases<'r> {
    rows: Vec<&'r Ready>,
}

impl<'r> LostLeases<'r> {
    pub(super) fn among(chosen: &'r [Ready], sides: &HashMap<String, Side>) -> Self {
        let counted = |ready: &Ready| sides.get(ready.key()).is_some_and(|side| side.lost_owner == ready.owner);
        Self { rows: chosen.iter().filter(|ready| is_token(ready.owner) && !counted(ready)).collect() }
    }

    /// Count them. Answers the keys of those that were lost so often that they have failed.
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
        let now_ms = now(names, connection).await?;
        let mut noted = BTreeMap::new();
        let mut failed = Vec::new();
        for ready in self.rows {
            let Some(mut side) = sides.remove(ready.key()) else { continue };
            let kept = count(&mut side, ready, policy, now_ms);
            if let Some(kept) = kept {
                failed.push((ready.key(), ready.owner, ready.place.0, ended_timeout(now_ms / 1_000, kept)));
            }
            noted.insert(ready.key(), side);
        }
        write(&failed, names, connection).await?;
        let rows: Vec<(&str, Side)> = noted.iter().map(|(key, side)| (*key, side.clone())).collect();
        side::store(&rows, names, connection).await?;
        sides.extend(noted.into_iter().map(|(key, side)| (key.to_owned(), side)));
        Ok(failed.into_iter().map(|(key, ..)| key.to_owned()).collect())
    }
}

/// Count one loss. Answers for how many seconds the row is kept, if it has failed by it.
fn count(side: &mut Side, ready: &Ready, policy: &Policy, now_ms: i64) -> Option<i64> {
    let lease_ref = LeaseRef { task: crate::TaskId(ready.number), lease: crate::Lease(ready.owner.cast_signed()) };
    // Nothing waits after a loss, so no random number is needed.
    let settlement = Settlement::of(lease_ref, Event::Lost, side.attempt(), policy, 0.0, None, Vec::new());
    let record = Record::new(
        side.attempts.saturating_add(1),
        ready.owner,
        "a host that is gone, or whose lease ran out".to_owned(),
        now_ms,
        "lost",
    );
    side.record(record.with(None, settlement.error_code.clone(), settlement.error_message.clone()));
    side.lost_owner = ready.owner;
    side.progress = None;
    (side.error_code, side.error_message) = (settlement.error_code.clone(), settlement.error_message.clone());
    match *settlement.verdict() {
        Verdict::Fail { retention, lost, lost_alone, .. } => {
            (side.lost, side.lost_alone) = (lost, lost_alone);
            let kept = seconds(retention);
            (side.state, side.ended_ms) = (Some(State::Failed), Some(now_ms));
            side.timeout = Some(ended_timeout(now_ms / 1_000, kept));
            side.user.clone_from(&ready.user);
            tracing::error!(
                task = ready.key(),
                lost,
                "a task was lost so often that it has failed; it may be what ends its hosts"
            );
            Some(kept)
        }
        Verdict::Wait { lost, lost_alone, alone, .. } => {
            (side.lost, side.lost_alone, side.alone) = (lost, lost_alone, alone);
            tracing::warn!(task = ready.key(), lost, "a task was lost with its host or lease; it is tried again");
            None
        }
        Verdict::Finish { .. } => None,
    }
}

/// End the rows of those that have failed.
async fn write(failed: &[(&str, u64, i64, i64)], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const FAIL: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) PATH '$[0]', owner BIGINT UNSIGNED PATH '$[1]',
            was BIGINT PATH '$[2]', timeout BIGINT PATH '$[3]')) AS f STRAIGHT_JOIN {t} AS t ON t.id = {as_key}
        SET t.created_at = NULL, t.resource = NULL, t.timeout = f.timeout, t.owner = 0
        WHERE t.owner = f.owner AND t.timeout = f.was AND t.created_at IS NOT NULL";
    if failed.is_empty() {
        return Ok(());
    }
    sqlx::query(names.sql(FAIL)).bind(json(failed)).execute(connection).await.map(drop)
}
