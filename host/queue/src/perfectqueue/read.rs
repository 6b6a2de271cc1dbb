//! What readers see. The table knows waiting, running and finished; what else there is to know stands in our own table, as long as nobody has
//! written to the row since.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::operate::Which;
use super::order::Place;
use super::run::Operation;
use super::side::{self, Side};
use super::table::{DELETE_OFFSET, EVENT_HORIZON, Names, SET_ASIDE, TIME_MAX};
use super::{blob, broken};
use crate::mysql::connect::text;
use crate::mysql::failure::Failure;
use crate::{AttemptRecord, Error, Filter, NewTask, Page, State, Stats, Task, TaskId, Timestamp};

/// The most tasks of a page.
const PAGE_MAX: u32 = 10_000;
/// The most data and output of a page, unless one task alone has more.
const PAGE_BYTES_MAX: usize = 64 << 20;
/// Rows that a list reads at once.
const SLICE: i64 = 500;
/// The oldest tasks, waiting or running, among which types are counted.
const TYPES_LOOK: i64 = 10_000;
/// Ends of pages that this process remembers.
const PAGES_MAX: usize = 1_000;

/// A row of PerfectQueue's table.
#[derive(Debug)]
pub(super) struct Found {
    /// With U+FFFD where it cannot be read.
    pub(super) key: String,
    pub(super) timeout: i64,
    pub(super) created_at: Option<i64>,
    pub(super) user: Option<String>,
    max_running: Option<u32>,
    pub(super) owner: u64,
    pub(super) number: i64,
    stored: Option<Vec<u8>>,
    pub(super) now_ms: i64,
    /// What of key and user cannot be read.
    unreadable: Option<String>,
    /// How long its data is, as it is stored.
    length: i64,
}

macro_rules! columns {
    ($data:literal) => {
        concat!(
            "t.id, CAST(t.timeout AS SIGNED), CAST(t.created_at AS SIGNED), t.resource, CAST(t.max_running AS SIGNED),
            CAST(COALESCE(t.owner, 0) AS UNSIGNED), {number}, ",
            $data,
            ", {now}, CAST(COALESCE(LENGTH(t.data), 0) AS SIGNED)"
        )
    };
}

impl Found {
    fn of(row: &MySqlRow) -> Result<Self, sqlx::Error> {
        let (key, user): (Vec<u8>, Option<Vec<u8>>) = (row.try_get(0)?, row.try_get(3)?);
        let ((key, bad_key), (user, bad_user)) = (readable(key), user.map(readable).unzip());
        let unreadable = match (bad_key, bad_user.flatten()) {
            (Some(error), _) => Some(format!("the key is not text: {error}")),
            (None, Some(error)) => Some(format!("the user is not text: {error}")),
            (None, None) => None,
        };
        Ok(Self {
            key,
            timeout: row.try_get(1)?,
            created_at: row.try_get(2)?,
            user,
            unreadable,
            length: row.try_get(9)?,
            max_running: row.try_get::<Option<i64>, _>(4)?.and_then(|most| u32::try_from(most).ok()),
            owner: row.try_get(5)?,
            number: row.try_get(6)?,
            stored: row.try_get(7)?,
            now_ms: row.try_get(8)?,
        })
    }

    /// What is noted of this very task.
    pub(super) fn own(&self, side: Option<Side>) -> Option<Side> {
        side.filter(|side| match self.created_at {
            Some(created_at) => side.created_at == created_at,
            // Ended by us, and as we left it.
            None => side.timeout == Some(self.timeout),
        })
    }

    /// Where it stands, with what is noted of it. What Ruby shows as running may also be waiting for its time: the table does not tell, and
    /// it counts as running unless we know better.
    pub(super) fn state(&self, side: Option<&Side>) -> State {
        let noted = side.filter(|side| side.timeout == Some(self.timeout)).and_then(|side| side.state);
        if self.created_at.is_none() {
            return noted.filter(|state| state.is_terminal()).unwrap_or(State::Finished);
        }
        if self.is_set_aside() {
            return State::Failed;
        }
        let is_waiting = self.timeout <= self.now_ms / 1_000 || (self.owner == 0 && noted == Some(State::Waiting));
        if is_waiting { State::Waiting } else { State::Running }
    }

    pub(super) fn is_set_aside(&self) -> bool {
        self.owner == SET_ASIDE && self.timeout == TIME_MAX && self.created_at.is_some()
    }

    /// Whether nobody may acquire it until it is released.
    pub(super) fn is_held(&self) -> bool {
        self.timeout == EVENT_HORIZON && self.created_at.is_some()
    }

    /// As it is shown, with its data.
    fn told(mut self, side: Option<Side>) -> Task {
        let side = self.own(side);
        let state = self.state(side.as_ref());
        let set_aside = self.is_set_aside();
        let side = side.unwrap_or_default();
        let stored = self.stored.take().unwrap_or_default();
        let read = blob::length_fits(self.length).and_then(|()| blob::read(&self.key, stored.clone()));
        let (task_type, plain, damage) = match read {
            Ok(read) => (read.task_type, read.data, None),
            Err(problem) => (self.key.split('.').next().unwrap_or_default().to_owned(), stored, Some(problem)),
        };
        let unreadable = self.unreadable.take().or_else(|| damage.map(|problem| format!("the stored data: {problem}")));
        let unreadable = unreadable.or_else(|| side.error_message.clone().filter(|_| set_aside));
        let created_at = Timestamp(self.created_at.unwrap_or(side.created_at).saturating_mul(1_000));
        let time = if self.is_held() { NewTask::HELD_AT } else { Timestamp(self.timeout.saturating_mul(1_000)) };
        let running = state == State::Running;
        let progress = side.progress.filter(|reported| running && reported.owner == self.owner).map(|reported| reported.progress);
        Task {
            id: TaskId(self.number),
            key: self.key,
            task_type,
            state,
            queue: NewTask::DEFAULT_QUEUE.to_owned(),
            user: self.user.or(side.user).filter(|user| !user.is_empty()),
            priority: 0,
            max_running: self.max_running,
            attempts: side.attempts,
            max_attempts: side.max_attempts,
            lost: side.lost,
            created_at,
            run_at: if state == State::Waiting { time } else { created_at },
            until: running.then_some(time),
            host: None,
            progress,
            finished_at: side.ended_ms.filter(|_| state.is_terminal()).map(Timestamp),
            retained_until: self
                .created_at
                .is_none()
                .then(|| Timestamp(self.timeout.saturating_add(DELETE_OFFSET).saturating_mul(1_000))),
            plugin_digest: side.plugin,
            error_code: side.error_code.or_else(|| set_aside.then(|| broken::CODE.to_owned())),
            error_message: side.error_message,
            unreadable,
            data: Some(plain),
            output: None,
        }
    }
}

/// A column of text, with U+FFFD for what is none, and what is wrong with it.
fn readable(bytes: Vec<u8>) -> (String, Option<std::str::Utf8Error>) {
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => (String::from_utf8_lossy(error.as_bytes()).into_owned(), Some(error.utf8_error())),
    }
}

/// Where the row of a number stands in the order of times. Reads the table until it is found.
async fn place_of(number: TaskId, names: &Names, connection: &mut MySqlConnection) -> Result<Option<i64>, sqlx::Error> {
    const FIND: &str = "SELECT CAST(t.timeout AS SIGNED) FROM {t} AS t WHERE {number} = ? LIMIT 1";
    sqlx::query_scalar(names.sql(FIND)).bind(number.0).fetch_optional(connection).await
}

/// The row of a task, locked for the transaction.
pub(super) async fn lock(
    which: &Which,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(Found, Option<Side>), Failure> {
    const LOCK: &str = concat!("SELECT ", columns!("NULL"), " FROM {t} AS t WHERE t.id = ? FOR UPDATE");
    const LOCK_NUMBER: &str =
        concat!("SELECT ", columns!("NULL"), " FROM {t} AS t {index} WHERE t.timeout = ? AND {number} = ? FOR UPDATE");
    let row = match which {
        Which::Key(key) => sqlx::query(names.sql(LOCK)).bind(key).fetch_optional(&mut *connection).await?,
        Which::Number(number) => match place_of(*number, names, connection).await? {
            Some(timeout) => {
                let query = sqlx::query(names.sql(LOCK_NUMBER)).bind(timeout).bind(number.0);
                // It was there a moment ago, at this time.
                Some(query.fetch_optional(&mut *connection).await?.ok_or(Failure::Overtaken)?)
            }
            None => None,
        },
    };
    let found = Found::of(&row.ok_or_else(|| which.unknown())?)?;
    let side = side::load(&[&found.key], true, names, connection).await?.remove(&found.key);
    let own = found.own(side);
    Ok((found, own))
}

/// One task with data and output.
pub(super) struct Get {
    pub(super) which: Which,
}

#[async_trait]
impl Operation for Get {
    type Answer = Option<Task>;
    const DOING: &'static str = "reading a task";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        const GET: &str =
            concat!("SELECT ", columns!("IF(LENGTH(t.data) > 16842752, NULL, t.data)"), " FROM {t} AS t WHERE t.id = ?");
        const GET_NUMBER: &str = concat!(
            "SELECT ",
            columns!("IF(LENGTH(t.data) > 16842752, NULL, t.data)"),
            " FROM {t} AS t WHERE {number} = ? LIMIT 1"
        );
        let query = match &self.which {
            Which::Key(key) => sqlx::query(names.sql(GET)).bind(key),
            Which::Number(number) => sqlx::query(names.sql(GET_NUMBER)).bind(number.0),
        };
        let Some(row) = query.fetch_optional(&mut *connection).await? else { return Ok(None) };
        let found = Found::of(&row)?;
        let key = found.key.clone();
        let side = found.own(side::load(&[&key], false, names, connection).await?.remove(&key));
        let is_noted = side.is_some();
        let mut task = found.told(side);
        // What an earlier task of its key returned is not its own.
        if task.state == State::Finished && is_noted {
            task.output = side::outputs(&[&key], names, connection).await?.remove(&key);
        }
        Ok(Some(task))
    }
}

/// Past attempts.
pub(super) struct Attempts {
    pub(super) key: String,
}

#[async_trait]
impl Operation for Attempts {
    type Answer = Vec<AttemptRecord>;
    const DOING: &'static str = "reading attempts";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        const GET: &str = concat!("SELECT ", columns!("NULL"), " FROM {t} AS t WHERE t.id = ?");
        let row = sqlx::query(names.sql(GET)).bind(&self.key).fetch_optional(&mut *connection).await?;
        let Some(found) = row.map(|row| Found::of(&row)).transpose()? else { return Ok(Vec::new()) };
        let side = side::load(&[&found.key], false, names, connection).await?.remove(&found.key);
        let records = found.own(side).map(|side| side.records).unwrap_or_default();
        Ok(records.into_iter().map(side::Record::told).collect())
    }
}

/// Where pages ended that this process has shown: rows have no numbers that could be looked up.
#[derive(Debug, Default)]
pub(super) struct Pages {
    ends: Mutex<HashMap<TaskId, Place>>,
}

impl Pages {
    fn remember(&self, task: TaskId, place: Place) {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        if ends.len() >= PAGES_MAX {
            ends.clear();
        }
        ends.insert(task, place);
    }

    fn find(&self, task: TaskId) -> Option<Place> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).get(&task).cloned()
    }
}

/// A page of tasks, in PerfectQueue's order, by time.
pub(super) struct List {
    pub(super) filter: Filter,
    pub(super) pages: std::sync::Arc<Pages>,
}

/// A page that is being filled.
#[derive(Default)]
struct Filling {
    tasks: Vec<Task>,
    last: Option<(TaskId, Place)>,
    bytes: usize,
    /// There is more behind.
    full: bool,
}

#[async_trait]
impl Operation for List {
    type Answer = Page;
    const DOING: &'static str = "listing tasks";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Page, Failure> {
        const LIST: &str = concat!(
            "SELECT ",
            columns!("IF(LENGTH(t.data) > 65536, NULL, t.data)"),
            " FROM {t} AS t WHERE t.timeout >= ? AND (t.timeout > ? OR t.id > ?) AND t.id LIKE ?
                AND (? IS NULL OR t.resource = ?) AND (? OR t.created_at IS NULL) AND (? OR t.created_at IS NOT NULL)
            ORDER BY t.timeout, t.id LIMIT ?"
        );
        let filter = &self.filter;
        let asks = |state: State| filter.states.is_empty() || filter.states.contains(&state);
        let live = asks(State::Waiting) || asks(State::Running) || asks(State::Failed);
        let ended = asks(State::Finished) || asks(State::Failed) || asks(State::Cancelled);
        let prefix = like(filter.key_prefix.as_deref().unwrap_or_default());
        let mut from = self.start(names, connection).await?;
        let mut page = Filling::default();
        while !page.full {
            let query = sqlx::query(names.sql(LIST)).bind(from.0).bind(from.0).bind(&from.1).bind(&prefix);
            let query = query.bind(&filter.user).bind(&filter.user).bind(live).bind(ended).bind(SLICE);
            let rows = query.fetch_all(&mut *connection).await?;
            let rows: Vec<Found> = rows.iter().map(Found::of).collect::<Result<_, _>>()?;
            let Some(last) = rows.last() else { break };
            from = (last.timeout, last.key.clone());
            let more = i64::try_from(rows.len()).is_ok_and(|rows| rows == SLICE);
            self.fill(&mut page, rows, names, connection).await?;
            if !more {
                break;
            }
        }
        let next = page.last.filter(|_| page.full).map(|(task, place)| {
            self.pages.remember(task, place);
            task
        });
        Ok(Page { tasks: page.tasks, next })
    }
}

impl List {
    /// The place behind which the page begins.
    async fn start(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Place, Failure> {
        const FIND: &str = "SELECT CAST(t.timeout AS SIGNED), t.id FROM {t} AS t WHERE {number} = ? LIMIT 1";
        let Some(after) = self.filter.after else { return Ok((i64::MIN, String::new())) };
        if let Some(place) = self.pages.find(after) {
            return Ok(place);
        }
        let found = sqlx::query(names.sql(FIND)).bind(after.0).fetch_optional(connection).await?;
        let found = found.map(|row| Ok::<Place, sqlx::Error>((row.try_get(0)?, text(&row, 1)?))).transpose()?;
        Ok(found.ok_or_else(|| Error::NotSupported {
            what: "listing on from a task that is gone",
            why: "PerfectQueue's table does not number its rows; list from the beginning".to_owned(),
        })?)
    }

    async fn fill(
        &self,
        page: &mut Filling,
        rows: Vec<Found>,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), Failure> {
        let keys: Vec<&str> = rows.iter().map(|row| row.key.as_str()).collect();
        let mut sides = side::load(&keys, false, names, connection).await?;
        let mut outputs = if self.filter.with_data { side::outputs(&keys, names, connection).await? } else { HashMap::new() };
        let limit = usize::try_from(self.filter.limit.clamp(1, PAGE_MAX)).unwrap_or(1);
        for mut row in rows {
            let (key, place) = (row.key.clone(), (row.timeout, row.key.clone()));
            if row.stored.is_none() {
                row.stored = large(&key, names, connection).await?;
            }
            let side = row.own(sides.remove(&key));
            let is_noted = side.is_some();
            let mut task = row.told(side);
            if !self.wants(&task) {
                continue;
            }
            if self.filter.with_data {
                task.output = outputs.remove(&key).filter(|_| task.state == State::Finished && is_noted);
            } else {
                task.data = None;
            }
            page.bytes += task.data.as_ref().map_or(0, Vec::len) + task.output.as_ref().map_or(0, Vec::len);
            if page.tasks.len() == limit || (!page.tasks.is_empty() && page.bytes > PAGE_BYTES_MAX) {
                page.full = true;
                return Ok(());
            }
            page.last = Some((task.id, place));
            page.tasks.push(task);
        }
        Ok(())
    }

    fn wants(&self, task: &Task) -> bool {
        let Filter { states, task_type, key_prefix, .. } = &self.filter;
        (states.is_empty() || states.contains(&task.state))
            && task_type.as_ref().is_none_or(|task_type| *task_type == task.task_type)
            && key_prefix.as_ref().is_none_or(|prefix| task.key.starts_with(prefix.as_str()))
    }
}

/// Data that is not read along with others'.
async fn large(key: &str, names: &Names, connection: &mut MySqlConnection) -> Result<Option<Vec<u8>>, sqlx::Error> {
    const LARGE: &str = "SELECT data FROM {t} WHERE id = ? AND LENGTH(data) <= 16842752";
    sqlx::query_scalar(names.sql(LARGE)).bind(key).fetch_optional(connection).await
}

/// A pattern of everything that begins so.
pub(super) fn like(prefix: &str) -> String {
    let mut pattern = String::with_capacity(prefix.len() + 1);
    for character in prefix.chars() {
        if matches!(character, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern.push('%');
    pattern
}

/// What the queue holds.
pub(super) struct Count;

#[async_trait]
impl Operation for Count {
    type Answer = Stats;
    const DOING: &'static str = "counting tasks";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Stats, Failure> {
        // By the index on times alone: what has ended stands below the event horizon. Held rows stand on it, with those that are retained for ever.
        const COUNTS: &str = "SELECT
            (SELECT COUNT(*) FROM {t} AS t {index} WHERE t.timeout > 1300000000 AND t.timeout <= UNIX_TIMESTAMP()),
            (SELECT COUNT(*) FROM {t} AS t {index} WHERE t.timeout > UNIX_TIMESTAMP() AND t.timeout < 2147483647),
            (SELECT COUNT(*) FROM {t} AS t {index} WHERE t.timeout <= 1300000000),
            (SELECT COUNT(*) FROM {t} AS t {index} WHERE t.timeout = 2147483647 AND t.owner = ?),
            (SELECT CAST(MIN(t.timeout) AS SIGNED) FROM {t} AS t {index} WHERE t.timeout > 1300000000 AND t.timeout <= UNIX_TIMESTAMP()), {now},
            (SELECT COUNT(*) FROM {t} AS t {index} WHERE t.timeout = 1300000000 AND t.created_at IS NOT NULL)";
        const NOTED: &str = "SELECT s.state, COUNT(*) FROM {s} AS s STRAIGHT_JOIN {t} AS t
                ON t.id = {side_key} AND t.timeout = s.timeout
            WHERE s.state IN ('failed', 'cancelled') OR (s.state = 'waiting' AND s.timeout > UNIX_TIMESTAMP() AND t.owner = 0)
            GROUP BY s.state";
        let row = sqlx::query(names.sql(COUNTS)).bind(SET_ASIDE).fetch_one(&mut *connection).await?;
        let number = |place: usize| row.try_get::<i64, _>(place).map(i64::unsigned_abs);
        let mut noted: HashMap<String, u64> = HashMap::new();
        if names.has_side() {
            for row in sqlx::query(names.sql(NOTED)).fetch_all(&mut *connection).await? {
                noted.insert(row.try_get(0)?, row.try_get::<i64, _>(1)?.unsigned_abs());
            }
        }
        let of = |state: State| noted.get(state.as_str()).copied().unwrap_or(0);
        let (oldest, held): (Option<i64>, u64) = (row.try_get(4)?, number(6)?);
        let now = Timestamp(row.try_get(5)?);
        Ok(Stats {
            ready: number(0)?,
            scheduled: of(State::Waiting) + held,
            running: number(1)?.saturating_sub(of(State::Waiting)),
            finished: number(2)?.saturating_sub(of(State::Failed) + of(State::Cancelled) + held),
            failed: of(State::Failed) + number(3)?,
            cancelled: of(State::Cancelled),
            oldest_ready_ms: oldest
                .map(|oldest| u64::try_from(now.since(Timestamp(oldest.saturating_mul(1_000))).as_millis()).unwrap_or(u64::MAX)),
            queues: Vec::new(),
            types: types(names, connection).await?,
        })
    }
}

/// The types of the oldest tasks, most first, and of held ones if there is room left. Types stand inside the data, so that not all can be looked at; data
/// above 64 KiB is passed over.
async fn types(names: &Names, connection: &mut MySqlConnection) -> Result<Vec<(String, u64)>, sqlx::Error> {
    const OLDEST: &str = "SELECT t.id, t.data FROM {t} AS t {index} WHERE t.timeout BETWEEN ? AND ? AND t.created_at IS NOT NULL
            AND LENGTH(t.data) <= 65536
        ORDER BY t.timeout LIMIT ?";
    let mut counted: HashMap<String, u64> = HashMap::new();
    let mut left = TYPES_LOOK;
    for (first, last) in [(EVENT_HORIZON + 1, TIME_MAX), (EVENT_HORIZON, EVENT_HORIZON)] {
        let query = sqlx::query(names.sql(OLDEST)).bind(first).bind(last).bind(left);
        let rows = query.fetch_all(&mut *connection).await?;
        left -= i64::try_from(rows.len()).unwrap_or(left);
        for row in rows {
            let (key, stored): (String, Vec<u8>) = (text(&row, 0)?, row.try_get(1)?);
            if let Ok(read) = blob::read(&key, stored) {
                *counted.entry(read.task_type).or_default() += 1;
            }
        }
    }
    let mut types: Vec<(String, u64)> = counted.into_iter().collect();
    types.sort_unstable_by(|one, other| other.1.cmp(&one.1).then_with(|| one.0.cmp(&other.0)));
    types.truncate(100);
    Ok(types)
}
