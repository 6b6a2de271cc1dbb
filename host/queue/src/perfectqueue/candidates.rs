//! Rows that a claim may take: read, taken apart, and weighed.

use std::collections::HashMap;

use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::order::{Pick, Place, User};
use super::settle::fence;
use super::table::{Names, json};
use super::walk::{Ages, Users};
use super::{blob, broken};
use crate::Accepts;
use crate::mysql::connect::text;

/// Rows that one claim looks at, if it finds ones it cannot take: those of types without a route, and those that others have taken since they
/// were met. The next claim goes on behind them.
pub(super) const LOOKED_AT_MAX: usize = 2_000;
/// The most data of one claim, unless one task alone has more.
const CLAIMED_BYTES_MAX: usize = 64 << 20;
/// Rows that are read at least where some were left for others.
const LOOK_AHEAD: usize = 200;

/// A row that may be acquired.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) place: Place,
    pub(super) number: i64,
    pub(super) created_at: i64,
    pub(super) user: Option<String>,
    pub(super) owner: u64,
    pub(super) read: blob::Read,
    account: User,
    pub(super) max_running: Option<i64>,
}

impl Ready {
    pub(super) fn key(&self) -> &str {
        &self.place.1
    }

    /// It waits on, to be read again by itself.
    pub(super) fn into_pick(self) -> Pick {
        Pick { place: self.place, user: self.account, max_running: self.max_running }
    }
}

/// A row whose data nobody can read.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) place: Place,
    pub(super) number: i64,
    pub(super) created_at: i64,
    pub(super) user: Option<String>,
    pub(super) owner: u64,
    /// The short name of the problem.
    pub(super) code: &'static str,
    pub(super) problem: String,
}

/// What came of looking at a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weighed {
    Chosen,
    /// Its type is for others.
    Left,
    Broken,
    /// It does not fit into this claim any more.
    Full,
}

/// What a claim is about to take.
#[derive(Debug)]
pub(super) struct Choice<'c> {
    limit: usize,
    /// Of these, the most of users with a limit.
    limited: usize,
    accepts: Option<&'c Accepts>,
    pub(super) chosen: Vec<Ready>,
    pub(super) broken: Vec<Broken>,
    bytes: usize,
    full: bool,
    looked_at: usize,
    /// The database's time when the last rows were read, in milliseconds.
    pub(super) now_ms: i64,
    /// It ended at one of its bounds: there may be more right behind.
    pub(super) cut_short: bool,
}

macro_rules! columns {
    () => {
        "t.id, CAST(t.timeout AS SIGNED), CAST(t.created_at AS SIGNED), t.resource, CAST(COALESCE(t.owner, 0) AS UNSIGNED), {number},
            CAST(COALESCE(LENGTH(t.data), 0) AS SIGNED), IF(LENGTH(t.data) > 65536, NULL, COALESCE(t.data, '')), {now},
            WEIGHT_STRING(RTRIM(t.resource)), CAST(t.max_running AS SIGNED)"
    };
}

impl<'c> Choice<'c> {
    pub(super) fn new(limit: usize, limited: Option<u32>, accepts: Option<&'c Accepts>) -> Self {
        let limited = limited.map_or(limit, |limited| usize::try_from(limited).unwrap_or(usize::MAX).min(limit));
        let (chosen, broken) = (Vec::with_capacity(limit), Vec::new());
        Self { limit, limited, accepts, chosen, broken, bytes: 0, full: false, looked_at: 0, now_ms: 0, cut_short: false }
    }

    fn missing(&self) -> usize {
        if self.full { 0 } else { self.limit - self.chosen.len() }
    }

    /// Weigh a row that was read.
    async fn weigh(&mut self, row: &MySqlRow, names: &Names, connection: &mut MySqlConnection) -> Result<Weighed, sqlx::Error> {
        self.looked_at += 1;
        self.now_ms = row.try_get(8)?;
        let place: Place = (row.try_get(1)?, text(row, 0)?);
        let (length, number): (i64, i64) = (row.try_get(6)?, row.try_get(5)?);
        let bytes = usize::try_from(length).unwrap_or(usize::MAX);
        if !self.chosen.is_empty() && self.bytes.saturating_add(bytes) > CLAIMED_BYTES_MAX {
            self.full = true;
            return Ok(Weighed::Full);
        }
        let (created_at, owner) = (row.try_get(2)?, row.try_get(4)?);
        let user = row.try_get::<Option<Vec<u8>>, _>(3)?.map(String::from_utf8).transpose();
        let is_text = std::str::from_utf8(row.try_get(0)?).is_ok();
        let (user, read) = match user {
            Ok(user) if is_text => (user, self.read(row, &place, length, names, connection).await?),
            user => (user.ok().flatten(), Err((broken::UNREADABLE, "its key or user is not text".to_owned()))),
        };
        let read = match read {
            Ok(read) => read,
            Err((code, problem)) => {
                self.broken.push(Broken { place, number, created_at, user, owner, code, problem });
                return Ok(Weighed::Broken);
            }
        };
        if self.accepts.is_some_and(|accepts| !accepts.accepts(&read.task_type)) {
            return Ok(Weighed::Left);
        }
        self.bytes = self.bytes.saturating_add(read.data.len());
        let (account, max_running) = (row.try_get(9)?, row.try_get(10)?);
        self.chosen.push(Ready { place, number, created_at, user, owner, read, account, max_running });
        Ok(Weighed::Chosen)
    }

    /// Type and data of a row, or the name of what is wrong with it, and in words.
    async fn read(
        &self,
        row: &MySqlRow,
        place: &Place,
        length: i64,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<Result<blob::Read, (&'static str, String)>, sqlx::Error> {
        let damaged = |problem: String| (broken::CODE, format!("the stored data cannot be used: {problem}"));
        if let Err(problem) = blob::length_fits(length) {
            return Ok(Err(damaged(problem)));
        }
        let stored = match row.try_get::<Option<Vec<u8>>, _>(7)? {
            Some(stored) => Some(stored),
            None => large(place, names, connection).await?,
        };
        // If the row has changed since, it is neither taken nor set aside.
        let Some(stored) = stored else { return Ok(Err(damaged("it cannot be read by its key".to_owned()))) };
        Ok(blob::read(&place.1, stored).map_err(damaged))
    }

    /// The oldest rows.
    pub(super) async fn by_age(
        &mut self,
        ages: &mut Ages,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        const OLDEST: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM {t} AS t {index}
            WHERE t.timeout > 1300000000 AND t.timeout >= ? AND (t.timeout > ? OR t.id > ?) AND t.timeout <= UNIX_TIMESTAMP()
                AND t.created_at IS NOT NULL
            ORDER BY t.timeout, t.id LIMIT ?"
        );
        let mut from = ages.start(self.accepts);
        while self.missing() > 0 {
            if self.looked_at >= LOOKED_AT_MAX.max(self.limit) {
                self.cut_short = true;
                break;
            }
            let wanted = if ages.passed > 0 { self.missing().max(LOOK_AHEAD) } else { self.missing() };
            let query = sqlx::query(names.sql(OLDEST)).bind(from.0).bind(from.0).bind(&from.1);
            let rows = query.bind(i64::try_from(wanted).unwrap_or(i64::MAX)).fetch_all(&mut *connection).await?;
            for row in &rows {
                if self.missing() == 0 {
                    break;
                }
                match self.weigh(row, names, connection).await? {
                    Weighed::Full => break,
                    Weighed::Left => ages.passed += 1,
                    Weighed::Chosen | Weighed::Broken => {}
                }
                from = (row.try_get(1)?, text(row, 0)?);
                ages.pass(from.clone(), self.now_ms / 1_000);
            }
            if rows.len() < wanted {
                ages.reach_end();
                break;
            }
        }
        Ok(())
    }

    /// Rows that the walk has met and whose keys cannot be read.
    pub(super) async fn unreadable(
        &mut self,
        users: &mut Users,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        const OF_TIME: &str = concat!(
            "SELECT ",
            columns!(),
            " FROM {t} AS t {index} WHERE t.timeout = ? AND t.timeout <= UNIX_TIMESTAMP() AND t.created_at IS NOT NULL LIMIT ?"
        );
        let limit = i64::try_from(LOOKED_AT_MAX).unwrap_or(i64::MAX);
        while let Some(time) = users.unreadable.pop_first() {
            let rows = sqlx::query(names.sql(OF_TIME)).bind(time).bind(limit).fetch_all(&mut *connection).await?;
            for row in &rows {
                if std::str::from_utf8(row.try_get(0)?).is_err() {
                    self.weigh(row, names, connection).await?;
                }
            }
        }
        Ok(())
    }

    /// The first rows in the fair order.
    pub(super) async fn between_users(
        &mut self,
        users: &mut Users,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        let mut running = if users.waiting.has_users() { running(names, connection).await? } else { HashMap::new() };
        while self.missing() > 0 {
            if self.looked_at >= LOOKED_AT_MAX.max(self.limit) {
                self.cut_short = true;
                break;
            }
            let picks = users.waiting.pick(&mut running.clone(), self.missing(), self.limited);
            if picks.is_empty() {
                break;
            }
            let mut rows = read(&picks, names, connection).await?;
            self.looked_at += picks.len() - rows.len();
            for (place, pick) in picks.into_iter().enumerate() {
                if self.full {
                    break;
                }
                let weighed = match rows.remove(&place) {
                    Some(row) => Some(self.weigh(&row, names, connection).await?),
                    None => None,
                };
                match weighed {
                    // It stays first.
                    Some(Weighed::Full) => break,
                    Some(Weighed::Chosen) => {
                        if let Some(user) = &pick.user {
                            *running.entry(user.clone()).or_default() += 1;
                            self.limited -= usize::from(pick.max_running.is_some());
                        }
                    }
                    Some(Weighed::Left) => users.leave(&pick.place),
                    // Taken by others, or set aside.
                    Some(Weighed::Broken) | None => {}
                }
                users.waiting.remove(&pick);
            }
        }
        Ok(())
    }

    /// Leave out rows that somebody has locked at this moment. They are met again.
    pub(super) async fn leave_locked(&mut self, names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        let keys: Vec<&str> = self.chosen.iter().map(Ready::key).collect();
        let mut free = unlocked(&keys, names, connection).await?.into_iter();
        self.chosen.retain(|_| free.next() == Some(true));
        let keys: Vec<&str> = self.broken.iter().map(|broken| broken.place.1.as_str()).collect();
        let mut free = unlocked(&keys, names, connection).await?.into_iter();
        self.broken.retain(|_| free.next() == Some(true));
        Ok(())
    }

    /// One row that has to run alone, if its user may run another.
    pub(super) async fn one_of(
        &mut self,
        suspects: &[Pick],
        ignore_users: bool,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<Vec<Pick>, sqlx::Error> {
        let running = if ignore_users { HashMap::new() } else { running(names, connection).await? };
        let mut rows = read(suspects, names, connection).await?;
        let mut left = Vec::new();
        for (place, suspect) in suspects.iter().enumerate() {
            let Some(row) = rows.remove(&place) else { continue };
            if !suspect.is_open(&running)
                || !self.chosen.is_empty()
                || self.weigh(&row, names, connection).await? != Weighed::Chosen
            {
                left.push(suspect.clone());
            }
        }
        Ok(left)
    }
}

/// Those of the picked rows that are as they were when they were met, by their place among the picks.
async fn read(picks: &[Pick], names: &Names, connection: &mut MySqlConnection) -> Result<HashMap<usize, MySqlRow>, sqlx::Error> {
    const READ: &str = concat!(
        "SELECT ",
        columns!(),
        ", f.place FROM ",
        fence!(),
        " WHERE t.timeout = f.was AND t.timeout <= UNIX_TIMESTAMP() AND t.created_at IS NOT NULL"
    );
    let rows = json(picks.iter().enumerate().map(|(place, pick)| (place, &pick.place.1, 0, pick.place.0)));
    let rows = sqlx::query(names.sql(READ)).bind(rows).fetch_all(connection).await?;
    let place = |row: &MySqlRow| row.try_get::<i32, _>(11).map(|place| usize::try_from(place).unwrap_or_default());
    rows.into_iter().map(|row| Ok((place(&row)?, row))).collect()
}

/// Which of the picked rows are as they were when they were met.
pub(super) async fn standing(picks: &[Pick], names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, sqlx::Error> {
    const STANDING: &str = concat!(
        "SELECT f.place FROM ",
        fence!(),
        " WHERE t.timeout = f.was AND t.timeout <= UNIX_TIMESTAMP() AND t.created_at IS NOT NULL"
    );
    let rows = json(picks.iter().enumerate().map(|(place, pick)| (place, &pick.place.1, 0, pick.place.0)));
    let places: Vec<i32> = sqlx::query_scalar(names.sql(STANDING)).bind(rows).fetch_all(connection).await?;
    Ok(marked(picks.len(), &places))
}

/// A mark for each place of a set that was answered.
pub(super) fn marked(length: usize, places: &[i32]) -> Vec<bool> {
    let mut marked = vec![false; length];
    for place in places {
        if let Some(mark) = usize::try_from(*place).ok().and_then(|place| marked.get_mut(place)) {
            *mark = true;
        }
    }
    marked
}

/// Which rows of a set of keys nobody else has locked at the moment, in the table and in ours beside it. Locks nothing that lasts.
pub(super) async fn unlocked(keys: &[&str], names: &Names, connection: &mut MySqlConnection) -> Result<Vec<bool>, sqlx::Error> {
    const FREE: &str = concat!("SELECT f.place FROM ", fence!(lockable), " FOR UPDATE SKIP LOCKED");
    const NOTED: &str =
        "SELECT f.place FROM JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]')) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key}";
    const NOTED_FREE: &str =
        "SELECT f.place FROM (SELECT f.* FROM JSON_TABLE(?, '$[*]' COLUMNS (place INT PATH '$[0]', id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]')) AS f) AS f
        STRAIGHT_JOIN {s} AS s FORCE INDEX (PRIMARY) ON s.id = {as_side_key} FOR UPDATE SKIP LOCKED";
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let rows = json(keys.iter().enumerate());
    let free: Vec<i32> = sqlx::query_scalar(names.sql(FREE)).bind(&rows).fetch_all(&mut *connection).await?;
    let mut free = marked(keys.len(), &free);
    if names.has_side() {
        let noted: Vec<i32> = sqlx::query_scalar(names.sql(NOTED)).bind(&rows).fetch_all(&mut *connection).await?;
        let noted_free: Vec<i32> = sqlx::query_scalar(names.sql(NOTED_FREE)).bind(&rows).fetch_all(connection).await?;
        let (noted, noted_free) = (marked(keys.len(), &noted), marked(keys.len(), &noted_free));
        for (place, free) in free.iter_mut().enumerate() {
            *free &= !noted[place] || noted_free[place];
        }
    }
    Ok(free)
}

/// How many rows each user has running, as PerfectQueue counts: whatever may not be acquired yet, scheduled rows included.
pub(super) async fn running(names: &Names, connection: &mut MySqlConnection) -> Result<HashMap<Vec<u8>, i64>, sqlx::Error> {
    const RUNNING: &str = "SELECT WEIGHT_STRING(RTRIM(t.resource)), COUNT(*) FROM {t} AS t {index}
        WHERE t.timeout > UNIX_TIMESTAMP() AND t.created_at IS NOT NULL AND t.resource IS NOT NULL GROUP BY t.resource";
    let mut running: HashMap<Vec<u8>, i64> = HashMap::new();
    for row in sqlx::query(names.sql(RUNNING)).fetch_all(connection).await? {
        *running.entry(row.try_get(0)?).or_default() += row.try_get::<i64, _>(1)?;
    }
    Ok(running)
}

/// Data that is not read along with others'. None if the row has changed since.
pub(super) async fn large(
    place: &Place,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<Option<Vec<u8>>, sqlx::Error> {
    const LARGE: &str = "SELECT data FROM {t} WHERE id = ? AND timeout = ?";
    sqlx::query_scalar(names.sql(LARGE)).bind(&place.1).bind(place.0).fetch_optional(connection).await
}
