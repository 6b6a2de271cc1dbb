//! Handing on what dead hosts run: see [`super::hosts`] for what makes that safe.

use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::candidates::unlocked;
use super::deaths;
use super::hosts::{List, running, strike_off};
use super::lease::lease_ref;
use super::run::{Operation, begin, commit};
use super::settle::{fence, holds};
use super::table::{Names, WITHOUT_NUMBER, json, number_in};
use crate::earlier::Earlier;
use crate::mysql::failure::Failure;
use crate::{HostId, HostRecord, Lost, Reclaimed};

/// The most tasks that are handed on in one statement and call.
const HANDED_ON_MAX: i64 = 1_000;
/// Looks for tasks of a host that renews its leases at this very moment, or that somebody has locked.
const LOOKS_MAX: u32 = 20;
/// Between two looks for tasks that somebody has locked: altogether longer than the server lets a transaction stand still.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Hand on what hosts run that are dead.
pub(super) struct HandOn {
    pub(super) identities: Vec<String>,
    /// What an earlier try was about to hand on, of hosts that it found dead.
    pub(super) earlier: Earlier<Handed>,
}

/// What is handed on, and the hosts that were found dead.
#[derive(Clone, Default)]
pub(super) struct Handed {
    orphans: Vec<Orphan>,
    dead_hosts: Vec<HostRecord>,
}

/// A row that a dead host runs.
#[derive(Clone)]
struct Orphan {
    lost: Lost,
    timeout: i64,
}

#[async_trait]
impl Operation for HandOn {
    type Answer = Reclaimed;
    const DOING: &'static str = "handing on the tasks of dead hosts";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Reclaimed, Failure> {
        let earlier = self.earlier.get().unwrap_or_default();
        let (numbers, marked) = self.mark(names, connection).await?;
        // Those that an earlier try has marked had not left before it; by now they may be struck off.
        let mut reclaimed = Reclaimed { tasks: taken_before(earlier.orphans, names, connection).await?, dead_hosts: marked };
        if reclaimed.dead_hosts.is_empty() {
            reclaimed.dead_hosts = earlier.dead_hosts;
        }
        if numbers.is_empty() {
            return Ok(reclaimed);
        }
        for look in 0..LOOKS_MAX {
            if !reclaimed.tasks.is_empty() {
                break;
            }
            let orphans = orphans(&numbers, names, connection).await?;
            let looked_at = orphans.len();
            let free = without_locked(orphans, names, connection).await?;
            let locked = looked_at - free.len();
            self.earlier.note(Handed { orphans: free.clone(), dead_hosts: reclaimed.dead_hosts.clone() });
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
    /// From now on these hosts take nothing. Answers the numbers of all that have left by these identities, and those that had not before.
    async fn mark(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(Vec<i64>, Vec<HostRecord>), Failure> {
        const FIND: &str =
            "SELECT CAST(h.id AS SIGNED), h.left_at IS NULL FROM (SELECT f.* FROM JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS f) AS f
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
        let mut dead_hosts = Vec::new();
        if !marked.is_empty() {
            let records = List { own: Vec::new() }.run(names, connection).await?;
            dead_hosts.extend(records.into_iter().filter(|record| marked.contains(&record.id.0)));
            self.earlier.note(Handed { orphans: Vec::new(), dead_hosts: dead_hosts.clone() });
        }
        commit(connection).await?;
        Ok((numbers, dead_hosts))
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

/// Those that an earlier try has given free: their rows have neither the token of their hosts any more, nor were they settled under it.
async fn taken_before(orphans: Vec<Orphan>, names: &Names, connection: &mut MySqlConnection) -> Result<Vec<Lost>, sqlx::Error> {
    const TAKEN: &str =
        concat!("SELECT f.place FROM ", fence!(), " WHERE t.owner NOT IN (f.owner, f.owner + 1, 0) AND t.created_at IS NOT NULL");
    if orphans.is_empty() {
        return Ok(Vec::new());
    }
    let row = |(place, orphan): (usize, &Orphan)| (place, orphan.lost.key.clone(), orphan.lost.lease_ref.lease.0, orphan.timeout);
    let rows = json(orphans.iter().enumerate().map(row));
    let taken: Vec<i32> = sqlx::query_scalar(names.sql(TAKEN)).bind(rows).fetch_all(connection).await?;
    let mut lost: Vec<Lost> = orphans.into_iter().map(|orphan| orphan.lost).collect();
    let mut place = 0..;
    lost.retain(|_| place.next().is_some_and(|place| taken.contains(&place)));
    Ok(lost)
}
