//! Hosts, and what the watchdog does with them. A host without identity is known to its own process only. One with an identity has a row in a table of
//! ours, if the operator allows such tables, and the number of that row stands in the tokens of its claims: so the rows it runs are found when it dies.
//!
//! Authority: `left_at` of the host's row. A claim writes that row in the same statement in which it takes tasks, and takes none if the host has left; so once a host is
//! marked as left, whatever it took is there to be found, and nothing comes after. Then what it runs is handed on: its time becomes now, and its token
//! loses the host's number. Whatever the host still writes about it is refused, since neither value is as it wrote it; the next claim of ours meets
//! a token in a row that may be acquired and counts the loss (see [`super::lost`]); and no second look takes the row from whoever has it by then, a worker
//! in Ruby perhaps, whose fair acquire leaves the token there.
//!
//! `until` is the end of the latest lease that a host has written, or is about to write. A row with its token and a later time was acquired by
//! Ruby after the lease had run out. An earlier time does not tell: a row of a host that was dropped by it or written to by Ruby, while the host went on
//! renewing others, is handed on as well, and runs twice at worst.
//!
//! A host that has left is struck off when it holds nothing, and one that is not seen for [`GONE_AFTER`]. The server never counts a number twice, and one
//! that running rows still carry (somebody has emptied the table of hosts) is passed over. When all [`NUMBER_MAX`] are used up, after years, hosts go on without being
//! watched and say so, until somebody empties the table while no host runs.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::Shared;
use super::hand_on::HandOn;
use super::run::{Operation, begin, commit, roll_back};
use super::table::{NUMBER_MAX, Names, TIME_MAX, json, number_in};
use crate::earlier::Earlier;
use crate::mysql::connect::text;
use crate::mysql::failure::{Failure, unknown_host};
use crate::{HostDescription, HostId, HostRecord, Reclaimed, Result, Timestamp};

/// How much later than its leases a host's `until` is, in seconds, so that few renewals write it.
const AHEAD: i64 = 10;
/// Between two notes of a host that it is still there.
const SEEN_AGAIN: Duration = Duration::from_secs(3600);
/// A host that was not seen for so long, in milliseconds, and holds nothing is struck off: a week.
const GONE_AFTER: i64 = 7 * 24 * 3_600_000;
/// Tries to find a number that no running row carries.
const NUMBERS_TRIED_MAX: u32 = 1_000;

/// The number of a host that is watched, 0 of any other.
pub(super) fn number(host: HostId) -> u32 {
    u32::try_from(host.0).ok().filter(|number| *number <= NUMBER_MAX).unwrap_or_default()
}

/// The hosts of this process.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    known: Mutex<HashMap<HostId, Known>>,
    unwatched_told: AtomicBool,
}

#[derive(Debug)]
struct Known {
    description: HostDescription,
    started_at: Timestamp,
    /// `until` of its row is not earlier.
    until: i64,
    /// When the row was told last that the host is there.
    seen: Instant,
}

impl Hosts {
    fn lock(&self) -> MutexGuard<'_, HashMap<HostId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, host: HostId, description: &HostDescription, started_at: Timestamp) {
        let known = Known { description: description.clone(), started_at, until: 0, seen: Instant::now() };
        self.lock().insert(host, known);
    }

    pub(super) fn knows(&self, host: HostId) -> bool {
        self.lock().contains_key(&host)
    }

    /// The host in words.
    pub(super) fn name(&self, host: HostId) -> String {
        self.lock().get(&host).map_or_else(
            || format!("host {}", host.0),
            |known| format!("{}, process {}", known.description.name, known.description.process_id),
        )
    }

    fn is_due_to_be_seen(&self, host: HostId) -> bool {
        self.lock().get(&host).is_some_and(|known| known.seen.elapsed() >= SEEN_AGAIN)
    }

    fn seen(&self, host: HostId) {
        if let Some(known) = self.lock().get_mut(&host) {
            known.seen = Instant::now();
        }
    }

    fn until(&self, host: HostId) -> i64 {
        self.lock().get(&host).map_or(0, |known| known.until)
    }

    /// The row of a host has this `until` now.
    pub(super) fn covered(&self, host: HostId, until: i64) {
        if let Some(known) = self.lock().get_mut(&host) {
            known.until = known.until.max(until);
        }
    }

    /// A watched host that is not, for once in the log.
    fn tell_unwatched(&self, why: &'static str) {
        if !self.unwatched_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                why,
                "no watchdog can hand on the tasks of this host; should it die, they come back when their leases end"
            );
        }
    }

    /// Those of this process that have no row.
    fn unwatched(&self, running: impl Fn(HostId) -> u64) -> Vec<HostRecord> {
        let known = self.lock();
        let record = |(id, known): (&HostId, &Known)| HostRecord {
            id: *id,
            name: known.description.name.clone(),
            process_id: known.description.process_id,
            started_at: known.started_at,
            running: running(*id),
            alive: Some(true),
            identity: None,
            serves: None,
        };
        known.iter().filter(|(id, _)| number(**id) == 0).map(record).collect()
    }

    /// Refuse a host that has left. What a host takes is refused again where it is taken: this is for those that take nothing.
    pub(super) async fn check(&self, host: HostId, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const THERE: &str = "SELECT COUNT(*) FROM {h} WHERE id = ? AND left_at IS NULL";
        const SEEN: &str = "UPDATE {h} SET seen_at = {now} WHERE id = ? AND left_at IS NULL";
        let number = number(host);
        if number == 0 {
            return Ok(());
        }
        let is_there = if self.is_due_to_be_seen(host) {
            sqlx::query(names.sql(SEEN)).bind(number).execute(connection).await?.rows_affected() > 0
        } else {
            sqlx::query_scalar::<_, i64>(names.sql(THERE)).bind(number).fetch_one(connection).await? > 0
        };
        if !is_there {
            return Err(unknown_host(host));
        }
        self.seen(host);
        Ok(())
    }

    /// Leases are about to be renewed, each a token and a time: the rows of their hosts have to say it before.
    pub(super) async fn cover(
        &self,
        leases: impl Iterator<Item = (u64, i64)>,
        names: &Names,
        connection: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        const COVER: &str = "UPDATE {h} SET until = GREATEST(until, ?) WHERE id = ?";
        let mut latest: HashMap<u32, i64> = HashMap::new();
        for (token, timeout) in leases {
            let latest = latest.entry(number_in(token)).or_default();
            *latest = timeout.max(*latest);
        }
        for (number, timeout) in latest {
            let host = HostId(i64::from(number));
            if number > 0 && timeout > self.until(host) {
                let until = (timeout + AHEAD).min(TIME_MAX - 1);
                sqlx::query(names.sql(COVER)).bind(until).bind(number).execute(&mut *connection).await?;
                self.covered(host, until);
            }
        }
        Ok(())
    }
}

impl Shared {
    /// Enter a host; one with an identity so that others can find what it runs.
    pub(super) async fn register(self: &Arc<Self>, description: &HostDescription) -> Result<HostId> {
        let registered = match &description.identity {
            Some(_) if !self.config.side_table => {
                self.hosts.tell_unwatched("PerfectQueue's table does not tell whose task a row is; `side_table` keeps it");
                None
            }
            Some(identity) => {
                let (identity, description) = (identity.clone(), description.clone());
                let register = Register { identity, description, earlier: Earlier::default() };
                let registered = self.perform(register).await?;
                if registered.is_none() {
                    self.hosts.tell_unwatched("the numbers of hosts are used up; empty the table of hosts while no host runs");
                }
                registered
            }
            None => None,
        };
        let (host, started_at) = match registered {
            Some(registered) => registered,
            None => (HostId(fastrand::i64(i64::from(NUMBER_MAX) + 1..i64::MAX)), self.now().await?),
        };
        self.hosts.enter(host, description, started_at);
        Ok(host)
    }

    /// Strike a host off. One that still holds tasks has left, and is struck off when it holds none.
    pub(super) async fn unregister(self: &Arc<Self>, host: HostId) -> Result<()> {
        self.hosts.lock().remove(&host);
        match number(host) {
            0 => Ok(()),
            number => self.perform(Leave { number }).await,
        }
    }

    /// The hosts of this process, and all that are watched.
    pub(super) async fn host_records(self: &Arc<Self>) -> Result<Vec<HostRecord>> {
        let mut records = self.hosts.unwatched(|host| self.leases.of(host));
        if self.config.side_table {
            let own = self.hosts.lock().keys().copied().collect();
            records.extend(self.perform(List { own }).await?);
        }
        records.sort_unstable_by_key(|record| record.started_at);
        Ok(records)
    }

    /// Hand on what the hosts of these identities run. Without our tables there are none.
    pub(super) async fn hand_on(self: &Arc<Self>, identities: &[String]) -> Result<Reclaimed> {
        if !self.config.side_table || identities.is_empty() {
            return Ok(Reclaimed::default());
        }
        let reclaimed = self.perform(HandOn { identities: identities.to_vec(), earlier: Earlier::default() }).await?;
        if !reclaimed.tasks.is_empty() {
            self.wake();
        }
        Ok(reclaimed)
    }
}

/// The rows that watched hosts run: those with their numbers whose time is within their leases.
macro_rules! running {
    () => {
        "{t} AS t {index} STRAIGHT_JOIN {h} AS h FORCE INDEX (PRIMARY) ON h.id = {host}
        WHERE t.timeout > UNIX_TIMESTAMP() AND t.timeout <= (SELECT MAX(u.until) FROM {h} AS u) AND t.timeout <= h.until
            AND t.owner >> 62 = 1 AND t.created_at IS NOT NULL"
    };
}
pub(super) use running;

/// How many rows each watched host runs; those that run none are left out.
async fn counts(names: &Names, connection: &mut MySqlConnection) -> Result<HashMap<i64, u64>, sqlx::Error> {
    const COUNTS: &str = concat!("SELECT CAST(h.id AS SIGNED), COUNT(*) FROM ", running!(), " GROUP BY h.id");
    let rows = sqlx::query(names.sql(COUNTS)).fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?.unsigned_abs()))).collect()
}

/// Strike off those of these hosts that hold nothing, and have left or were not seen for long.
pub(super) async fn strike_off(numbers: &[i64], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const STRIKE_OFF: &str =
        "DELETE h FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS f STRAIGHT_JOIN {h} AS h FORCE INDEX (PRIMARY) ON h.id = f.id
        WHERE h.left_at IS NOT NULL OR h.seen_at < {now} - ?";
    if numbers.is_empty() {
        return Ok(());
    }
    let holding = counts(names, connection).await?;
    let idle = json(numbers.iter().filter(|number| !holding.contains_key(*number)));
    sqlx::query(names.sql(STRIKE_OFF)).bind(idle).bind(GONE_AFTER).execute(connection).await.map(drop)
}

/// Enter a host that is to be watched. None: there is no number left.
struct Register {
    identity: String,
    description: HostDescription,
    /// The number by which an earlier try has entered it, and when.
    earlier: Earlier<(HostId, Timestamp)>,
}

#[async_trait]
impl Operation for Register {
    type Answer = Option<(HostId, Timestamp)>;
    const DOING: &'static str = "registering a host";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        const GONE: &str = "SELECT CAST(id AS SIGNED) FROM {h} WHERE left_at IS NOT NULL OR seen_at < {now} - ?";
        const ENTER: &str = "INSERT INTO {h} (identity, name, process_id, started_at, seen_at) VALUES (?, LEFT(?, 255), ?, ?, ?)";
        const CARRIED: &str =
            "SELECT EXISTS (SELECT 1 FROM {t} AS t {index} WHERE t.timeout > UNIX_TIMESTAMP() AND t.owner >> 62 = 1
            AND {host} = ? AND t.created_at IS NOT NULL)";
        const ENTERED: &str = "SELECT EXISTS (SELECT 1 FROM {h} WHERE id = ? AND started_at = ?)";
        if let Some((host, started_at)) = self.earlier.get() {
            let query = sqlx::query_scalar(names.sql(ENTERED)).bind(number(host)).bind(started_at.0);
            if query.fetch_one(&mut *connection).await? {
                return Ok(Some((host, started_at)));
            }
        }
        let gone: Vec<i64> = sqlx::query_scalar(names.sql(GONE)).bind(GONE_AFTER).fetch_all(&mut *connection).await?;
        strike_off(&gone, names, connection).await?;
        let now_ms = super::table::now(names, connection).await?;
        let HostDescription { name, process_id, .. } = &self.description;
        for _ in 0..NUMBERS_TRIED_MAX {
            begin(connection).await?;
            let query = sqlx::query(names.sql(ENTER)).bind(&self.identity).bind(name).bind(process_id).bind(now_ms).bind(now_ms);
            let number = query.execute(&mut *connection).await?.last_insert_id();
            let in_range = u32::try_from(number).is_ok_and(|number| number <= NUMBER_MAX);
            if in_range && !sqlx::query_scalar(names.sql(CARRIED)).bind(number).fetch_one(&mut *connection).await? {
                let entered = (HostId(number.cast_signed()), Timestamp(now_ms));
                self.earlier.note(entered);
                commit(connection).await?;
                return Ok(Some(entered));
            }
            // The server never counts a number twice.
            roll_back(connection).await?;
            if !in_range {
                break;
            }
        }
        Ok(None)
    }
}

/// A watched host leaves of its own accord.
struct Leave {
    number: u32,
}

#[async_trait]
impl Operation for Leave {
    type Answer = ();
    const DOING: &'static str = "striking off a host";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const LEAVE: &str = "UPDATE {h} SET left_at = COALESCE(left_at, {now}), plugins = NULL WHERE id = ?";
        sqlx::query(names.sql(LEAVE)).bind(self.number).execute(&mut *connection).await?;
        strike_off(&[i64::from(self.number)], names, connection).await?;
        Ok(())
    }
}

/// All hosts that are watched.
pub(super) struct List {
    /// Those of this process.
    pub(super) own: Vec<HostId>,
}

#[async_trait]
impl Operation for List {
    type Answer = Vec<HostRecord>;
    const DOING: &'static str = "listing hosts";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        const HOSTS: &str =
            "SELECT CAST(id AS SIGNED), name, process_id, started_at, identity, left_at IS NOT NULL FROM {h} ORDER BY id";
        let rows = sqlx::query(names.sql(HOSTS)).fetch_all(&mut *connection).await?;
        let running = counts(names, connection).await?;
        let record = |row: &MySqlRow| {
            let id = HostId(row.try_get(0)?);
            let alive = match row.try_get(5)? {
                true => Some(false),
                false => self.own.contains(&id).then_some(true),
            };
            Ok(HostRecord {
                id,
                name: text(row, 1)?,
                process_id: row.try_get(2)?,
                started_at: Timestamp(row.try_get(3)?),
                running: running.get(&id.0).copied().unwrap_or(0),
                alive,
                identity: Some(text(row, 4)?),
                serves: None,
            })
        };
        rows.iter().map(record).collect()
    }
}
