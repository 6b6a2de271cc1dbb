//! Losses that are taken back. A host that was thought dead, or cut off, and comes back did not die of its tasks.
//!
//! What a claim has counted as lost stands in the task's records under its token, or, if a watchdog had handed it on, under the token without the host's
//! number. What was not counted yet, since nobody has claimed the row again, is marked as counted, so that no claim counts it later.

use std::collections::{BTreeSet, HashMap};

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::deaths;
use super::run::{Operation, begin, commit};
use super::side::{self, Side};
use super::table::{Names, WITHOUT_NUMBER, json, number_in};
use crate::Result;
use crate::earlier::Earlier;
use crate::mysql::connect::text;
use crate::mysql::failure::Failure;

/// Take back losses under these tokens, and the deaths of their hosts.
pub(super) struct Excuse {
    /// The host's own number; 0 if nobody watches it.
    pub(super) number: u32,
    /// Keys and tokens.
    pub(super) leases: Vec<(String, u64)>,
    /// How many an earlier try has taken back.
    pub(super) earlier: Earlier<u64>,
}

#[async_trait]
impl Operation for Excuse {
    type Answer = u64;
    const DOING: &'static str = "taking back losses";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<u64, Failure> {
        begin(connection).await?;
        // First, as by whoever else notes something: a note that is not there yet cannot be locked.
        let standing = self.lock_standing(names, connection).await?;
        let keys: Vec<&str> = self.leases.iter().map(|(key, _)| key.as_str()).collect();
        let mut sides = side::load(&keys, true, names, connection).await?;
        let mut changed = BTreeSet::new();
        let mut excused = 0;
        for (key, token) in &self.leases {
            let tokens = [*token, *token & WITHOUT_NUMBER];
            if sides.get_mut(key).is_some_and(|side| side.excuse(tokens)) {
                excused += 1;
                changed.insert(key.as_str());
            } else if let Some((created_at, owner)) = standing.get(key).filter(|(_, owner)| tokens.contains(owner)) {
                let side = sides.entry(key.clone()).or_default();
                if side.created_at != *created_at {
                    *side = Side::new(*created_at);
                }
                side.lost_owner = *owner;
                changed.insert(key.as_str());
            }
        }
        let noted: Vec<(&str, Side)> = changed.into_iter().filter_map(|key| sides.remove(key).map(|side| (key, side))).collect();
        side::store(&noted, names, connection).await?;
        let mut hosts: Vec<u32> = self.leases.iter().map(|(_, token)| number_in(*token)).chain([self.number]).collect();
        hosts.sort_unstable();
        hosts.dedup();
        deaths::take_back(&hosts, names, connection).await?;
        let excused = if excused == 0 { self.earlier.get().unwrap_or(0) } else { excused };
        self.earlier.note(excused);
        commit(connection).await?;
        Ok(excused)
    }
}

impl Excuse {
    /// Rows that may be acquired and still carry one of the tokens, locked: when they were made, and the token.
    async fn lock_standing(
        &self,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<HashMap<String, (i64, u64)>, Failure> {
        const STANDING: &str = "SELECT t.id, CAST(t.created_at AS SIGNED), CAST(t.owner AS UNSIGNED)
            FROM (SELECT f.* FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', owner BIGINT UNSIGNED PATH '$[1]')) AS f) AS f
            STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
            WHERE t.owner IN (f.owner, f.owner & ?) AND t.timeout <= UNIX_TIMESTAMP() AND t.created_at IS NOT NULL FOR UPDATE";
        let rows = sqlx::query(names.sql(STANDING)).bind(json(&self.leases)).bind(WITHOUT_NUMBER).fetch_all(connection).await?;
        rows.iter().map(|row| Ok((text(row, 0)?, (row.try_get(1)?, row.try_get(2)?)))).collect()
    }
}
