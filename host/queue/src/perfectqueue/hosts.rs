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

use super::candidates::unlocked;
use super::lease::lease_ref;
use super::run::{Operation, begin, commit};
use super::settle::{fence, holds};
use super::table::{NUMBER_MAX, Names, TIME_MAX, WITHOUT_NUMBER, json, number_in};
use super::{Shared, deaths};
use crate::mysql::connect::text;
use crate::mysql::failure::{Failure, unknown_host};
use crate::{HostDescription, HostId, HostRecord, Lost, Reclaimed, Result, Timestamp};

/// The most tasks that are handed on in one statement and call.
const HANDED_ON_MAX: i64 = 1_000;
/// Looks for tasks of a host that renews its leases at this very moment, or that somebody has locked.
const LOOKS_MAX: u32 = 20;
/// Between two looks for tasks that somebody has locked: altogether longer than the server lets a transaction stand still.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
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
                let register = Register { identity: identity.clone(), description: description.clone() };
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
        let reclaimed = self.perform(HandOn { identities: identities.to_vec() }).await?;
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

/// How many rows each watched host runs; those that run none are left out.
async fn counts(names: &Names, connection: &mut MySqlConnection) -> Result<HashMap<i64, u64>, sqlx::Error> {
    const COUNTS: &str = concat!("SELECT CAST(h.id AS SIGNED), COUNT(*) FROM ", running!(), " GROUP BY h.id");
    let rows = sqlx::query(names.sql(COUNTS)).fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get::<i64, _>(1)?.unsigned_abs()))).collect()
}

/// Strike off those of these hosts that hold nothing, and have left or were not seen for long.
async fn strike_off(numbers: &[i64], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
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
        const REMOVE: &str = "DELETE FROM {h} WHERE id = ?";
        let gone: Vec<i64> = sqlx::query_scalar(names.sql(GONE)).bind(GONE_AFTER).fetch_all(&mut *connection).await?;
        strike_off(&gone, names, connection).await?;
        let now_ms = super::table::now(names, connection).await?;
        let HostDescription { name, process_id, .. } = &self.description;
        for _ in 0..NUMBERS_TRIED_MAX {
            let query = sqlx::query(names.sql(ENTER)).bind(&self.identity).bind(name).bind(process_id).bind(now_ms).bind(now_ms);
            let number = query.execute(&mut *connection).await?.last_insert_id();
            let in_range = u32::try_from(number).is_ok_and(|number| number <= NUMBER_MAX);
            if in_range && !sqlx::query_scalar(names.sql(CARRIED)).bind(number).fetch_one(&mut *connection).await? {
                return Ok(Some((HostId(number.cast_signed()), Timestamp(now_ms))));
            }
            sqlx::query(names.sql(REMOVE)).bind(number).execute(&mut *connection).await?;
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
struct List {
    /// Those of this process.
    own: Vec<HostId>,
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
            })
        };
        rows.iter().map(record).collect()
    }
}

/// Hand on what hosts run that are dead.
struct HandOn {
    identities: Vec<String>,
}

/// A row that a dead host runs.
struct Orphan {
    lost: Lost,
    timeout: i64,
}

#[async_trait]
impl Operation for HandOn {
    type Answer = Reclaimed;
    const DOING: &'static str = "handing on the tasks of dead hosts";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Reclaimed, Failure> {
        let (numbers, marked) = self.mark(names, connection).await?;
        if numbers.is_empty() {
            return Ok(Reclaimed::default());
        }
        let mut reclaimed = Reclaimed::default();
        if !marked.is_empty() {
            let records = List { own: Vec::new() }.run(names, connection).await?;
            reclaimed.dead_hosts = records.into_iter().filter(|record| marked.contains(&record.id.0)).collect();
        }
        for look in 0..LOOKS_MAX {
            let orphans = orphans(&numbers, names, connection).await?;
            let looked_at = orphans.len();
            let free = without_locked(orphans, names, connection).await?;
            let locked = looked_at - free.len();
            reclaimed.tasks = take_back(free, names, connection).await?;
            // What was renewed, settled or lost at this very moment is looked at once more.
            if looked_at == 0 || !reclaimed.tasks.is_empty() {
                break;
            }
            // Only what somebody has locked is left: a host that is frozen in a transaction, which the server ends.
            if locked > 0 {
                tracing::warn!(
                    tasks = locked,
                    look,
                    "tasks of a dead host are locked by another transaction; waiting for it to end"
                );
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        strike_off(&numbers, names, connection).await?;
        Ok(reclaimed)
    }
}

impl HandOn {
    /// From now on these hosts take nothing. Answers the numbers of all that have left by these identities, and of those that had not before.
    async fn mark(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(Vec<i64>, Vec<i64>), sqlx::Error> {
        const FIND: &str =
            "SELECT CAST(h.id AS SIGNED), h.left_at IS NULL FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f
            STRAIGHT_JOIN {h} AS h FORCE INDEX (by_identity) ON h.identity = {as_side_key} FOR UPDATE";
        const MARK: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS f STRAIGHT_JOIN {h} AS h FORCE INDEX (PRIMARY) ON h.id = f.id
            SET h.left_at = {now} WHERE h.left_at IS NULL";
        begin(connection).await?;
        let rows = sqlx::query(names.sql(FIND)).bind(json(&self.identities)).fetch_all(&mut *connection).await?;
        let (mut numbers, mut marked) = (Vec::with_capacity(rows.len()), Vec::new());
        for row in &rows {
            let number: i64 = row.try_get(0)?;
            numbers.push(number);
            if row.try_get(1)? {
                marked.push(number);
            }
        }
        if !marked.is_empty() {
            sqlx::query(names.sql(MARK)).bind(json(&marked)).execute(&mut *connection).await?;
            let dead: Vec<u32> = marked.iter().filter_map(|number| u32::try_from(*number).ok()).collect();
            let now_ms = super::table::now(names, connection).await?;
            deaths::enter(&dead, now_ms, names, connection).await?;
        }
        commit(connection).await?;
        Ok((numbers, marked))
    }
}

/// Rows that hosts run which have left.
async fn orphans(numbers: &[i64], names: &Names, connection: &mut MySqlConnection) -> Result<Vec<Orphan>, sqlx::Error> {
    const ORPHANS: &str = concat!(
        "SELECT t.id, {number}, t.owner, t.timeout FROM ",
        running!(),
        " AND h.left_at IS NOT NULL AND JSON_CONTAINS(?, CAST(h.id AS CHAR)) LIMIT ?"
    );
    let rows = sqlx::query(names.sql(ORPHANS)).bind(json(numbers)).bind(HANDED_ON_MAX).fetch_all(connection).await?;
    let orphan = |row: &MySqlRow| {
        let (key, token) = (row.try_get(0)?, row.try_get(2)?);
        let host = HostId(i64::from(number_in(token)));
        let lost = Lost { lease_ref: lease_ref(row.try_get(1)?, token), key, host, failed: false };
        Ok(Orphan { lost, timeout: row.try_get(3)? })
    };
    let mut orphans: Vec<Orphan> = rows.iter().map(orphan).collect::<Result<_, sqlx::Error>>()?;
    // Rows are locked in the same order everywhere.
    orphans.sort_unstable_by(|one, other| one.lost.key.cmp(&other.lost.key));
    Ok(orphans)
}

/// Those that nobody has locked at this moment.
async fn without_locked(
    orphans: Vec<Orphan>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<Vec<Orphan>, sqlx::Error> {
    let keys: Vec<&str> = orphans.iter().map(|orphan| orphan.lost.key.as_str()).collect();
    let mut free = unlocked(&keys, names, connection).await?.into_iter();
    Ok(orphans.into_iter().filter(|_| free.next() == Some(true)).collect())
}

/// Give rows free whose leases still hold. Answers those that were given free now.
async fn take_back(orphans: Vec<Orphan>, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<Lost>, sqlx::Error> {
    const TAKE_BACK: &str =
        concat!("UPDATE ", fence!(), " SET t.timeout = UNIX_TIMESTAMP(), t.owner = t.owner & ? WHERE ", holds!());
    const TAKEN_BACK: &str = concat!("SELECT f.place FROM ", fence!(), " WHERE t.owner = f.owner & ?");
    if orphans.is_empty() {
        return Ok(Vec::new());
    }
    let row = |(place, orphan): (usize, &Orphan)| (place, orphan.lost.key.clone(), orphan.lost.lease_ref.lease.0, orphan.timeout);
    let rows = json(orphans.iter().enumerate().map(row));
    let query = sqlx::query(names.sql(TAKE_BACK)).bind(&rows).bind(WITHOUT_NUMBER);
    let written = query.execute(&mut *connection).await?.rows_affected();
    let mut lost: Vec<Lost> = orphans.into_iter().map(|orphan| orphan.lost).collect();
    if written != lost.len() as u64 {
        let query = sqlx::query_scalar(names.sql(TAKEN_BACK)).bind(&rows).bind(WITHOUT_NUMBER);
        let taken: Vec<i32> = query.fetch_all(connection).await?;
        let mut place = 0..;
        lost.retain(|_| place.next().is_some_and(|place| taken.contains(&place)));
    }
    Ok(lost)
}
