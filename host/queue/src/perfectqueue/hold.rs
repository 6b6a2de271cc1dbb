//! Tasks that are held: stored, and not to be acquired until somebody releases them.
//!
//! The time of a held row is the event horizon itself, 1,300,000,000. Nobody acquires it, since Ruby's workers and ours take rows only with a later time;
//! its user has nothing running by it, since its time has passed; and Ruby shows it as waiting. A row is removed when its time is 1,000,000,000
//! seconds ago, which for the event horizon is in November 2042, while the table's times end in January 2038: no clean-up gets to it. What Ruby submits
//! with this very `run_at` (in March 2011), and would never run, is held as well. A row that has ended and is kept for ever has the same time, but no
//! `created_at`.

use async_trait::async_trait;
use sqlx::mysql::MySqlConnection;

use super::operate;
use super::read::like;
use super::run::{Operation, begin, commit, roll_back};
use super::table::{Names, SET_ASIDE};
use crate::earlier::Earlier;
use crate::mysql::failure::Failure;
use crate::{Result, TaskId};

/// The most keys of an answer.
const KEYS_MAX: i64 = 10_000;

/// Let a held task have its turn.
pub(super) struct Release {
    pub(super) key: String,
    /// Whether an earlier try has released it.
    pub(super) earlier: Earlier<bool>,
}

#[async_trait]
impl Operation for Release {
    type Answer = bool;
    const DOING: &'static str = "releasing a held task";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        const RELEASE: &str =
            "UPDATE {t} SET timeout = UNIX_TIMESTAMP() WHERE id = ? AND timeout = 1300000000 AND created_at IS NOT NULL";
        begin(connection).await?;
        let released = sqlx::query(names.sql(RELEASE)).bind(&self.key).execute(&mut *connection).await?.rows_affected() > 0;
        let released = released || self.earlier.get().unwrap_or(false);
        self.earlier.note(released);
        commit(connection).await?;
        Ok(released)
    }
}

/// Remove a held task, with what is noted of it.
pub(super) struct Remove {
    pub(super) key: String,
    /// Whether an earlier try has removed it.
    pub(super) earlier: Earlier<bool>,
}

#[async_trait]
impl Operation for Remove {
    type Answer = bool;
    const DOING: &'static str = "removing a held task";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        const FIND: &str = "SELECT id FROM {t} WHERE id = ? AND timeout = 1300000000 AND created_at IS NOT NULL FOR UPDATE";
        const REMOVE: &str = "DELETE FROM {t} WHERE id = ?";
        begin(connection).await?;
        // As the table spells it, since our own table is not blind to case.
        let key: Option<String> = sqlx::query_scalar(names.sql(FIND)).bind(&self.key).fetch_optional(&mut *connection).await?;
        let Some(key) = key else {
            roll_back(connection).await?;
            return Ok(self.earlier.get().unwrap_or(false));
        };
        sqlx::query(names.sql(REMOVE)).bind(&key).execute(&mut *connection).await?;
        operate::forget(&[key], names, connection).await?;
        self.earlier.note(true);
        commit(connection).await?;
        Ok(true)
    }
}

/// The keys of held tasks.
pub(super) struct Keys {
    pub(super) prefix: String,
}

#[async_trait]
impl Operation for Keys {
    type Answer = Vec<String>;
    const DOING: &'static str = "looking for held tasks";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<String>, Failure> {
        // Keys stand behind the times in the index, so that the pattern finds those of one time; it may be blind to case, the comparison of bytes is not.
        const KEYS: &str = "SELECT t.id FROM {t} AS t {index}
            WHERE t.timeout = 1300000000 AND t.id LIKE {as_pattern} AND t.created_at IS NOT NULL
                AND LEFT(CAST(CONVERT(t.id USING utf8mb4) AS BINARY), ?) = CAST(? AS BINARY)
            ORDER BY CAST(CONVERT(t.id USING utf8mb4) AS BINARY) LIMIT ?";
        let bytes = i64::try_from(self.prefix.len()).unwrap_or(i64::MAX);
        let query = sqlx::query_scalar(names.sql(KEYS)).bind(like(&self.prefix)).bind(bytes).bind(&self.prefix);
        Ok(query.bind(KEYS_MAX).fetch_all(connection).await?)
    }
}

/// Whether a task is waiting, held or running whose key begins so, as the table compares keys.
pub(super) struct HasUnsettled {
    pub(super) prefix: String,
}

#[async_trait]
impl Operation for HasUnsettled {
    type Answer = bool;
    const DOING: &'static str = "looking for tasks that have not ended";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        // What is set aside has failed.
        const ANY: &str = "SELECT EXISTS (SELECT 1 FROM {t} AS t FORCE INDEX (PRIMARY) WHERE t.id LIKE {as_pattern}
            AND t.created_at IS NOT NULL AND (t.timeout < 2147483647 OR t.owner <> ?))";
        let query = sqlx::query_scalar(names.sql(ANY)).bind(like(&self.prefix)).bind(SET_ASIDE);
        Ok(query.fetch_one(connection).await?)
    }
}

/// How many follow-ups of a root have not ended, other than one task.
pub(super) struct Relatives {
    pub(super) root: TaskId,
    pub(super) task: TaskId,
    pub(super) limit: u32,
}

#[async_trait]
impl Operation for Relatives {
    type Answer = u32;
    const DOING: &'static str = "counting follow-ups";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<u32, Failure> {
        // Those that we saw end are not looked at; those that Ruby has ended are until a clean-up finds them.
        const RELATIVES: &str = "SELECT COUNT(*) FROM (
            SELECT 1 FROM (SELECT id, created_at FROM {s} WHERE root = ? AND (state IS NULL OR state = 'waiting')) AS s
            STRAIGHT_JOIN {t} AS t ON t.id = {side_key} AND t.created_at = s.created_at
            WHERE {number} <> ? LIMIT ?) AS first";
        let query = sqlx::query_scalar(names.sql(RELATIVES)).bind(self.root.0).bind(self.task.0).bind(self.limit);
        let counted: i64 = query.fetch_one(connection).await?;
        Ok(u32::try_from(counted).unwrap_or(self.limit))
    }
}
