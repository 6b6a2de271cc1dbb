//! What a running attempt writes: renewals, progress, data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::lease::{Held, Turns, apart};
use super::run::{Operation, begin, commit};
use super::settle::{fence, fenced, holds};
use super::side::{self, Reported, Side};
use super::table::{Names, json, now, parts, second_from};
use super::{Shared, blob};
use crate::mysql::failure::Failure;
use crate::{Beat, Error, LeaseAnswer, LeaseRef, Progress, Result, data};

/// The most bytes of a progress note; a longer one is cut.
const NOTE_BYTES_MAX: usize = 1_024;

/// When a lease ends that is asked for now.
pub(super) fn until(now_ms: i64, alive_time: Duration) -> i64 {
    let alive_ms = i64::try_from(alive_time.as_millis()).unwrap_or(i64::MAX);
    second_from(now_ms.saturating_add(alive_ms).saturating_add(apart(alive_time) * 1_000))
}

/// Renewals, one for each lease, in the order of their keys.
struct Beats {
    shared: Arc<Shared>,
    _turns: Turns,
    leases: Vec<(LeaseRef, Duration, Option<Progress>)>,
}

impl Shared {
    /// Renew leases. Of several beats of one lease the longest counts, with the last progress.
    pub(super) async fn renew(self: &Arc<Self>, beats: &[Beat]) -> Result<Vec<LeaseAnswer>> {
        let mut asked: HashMap<LeaseRef, (Duration, Option<Progress>)> = HashMap::with_capacity(beats.len());
        for beat in beats {
            let (alive_time, progress) = asked.entry(beat.lease_ref).or_default();
            *alive_time = beat.alive_time.max(*alive_time);
            if beat.progress.is_some() {
                progress.clone_from(&beat.progress);
            }
        }
        let turns = self.leases.turns(asked.keys().copied()).await;
        let leases = asked.into_iter().map(|(lease_ref, (alive_time, progress))| (lease_ref, alive_time, progress)).collect();
        let held = self.perform(Beats { shared: Arc::clone(self), _turns: turns, leases }).await?;
        let answer = |beat: &Beat| if held.contains(&beat.lease_ref) { LeaseAnswer::Held } else { LeaseAnswer::Lost };
        Ok(beats.iter().map(answer).collect())
    }

    /// Merge members into the data of running tasks, each by itself. Renews their leases, as Ruby's does. Answers in order; a refusal concerns its own update
    /// alone.
    pub(super) async fn update(self: &Arc<Self>, updates: &[crate::Update]) -> Result<Vec<Result<LeaseAnswer>>> {
        let turns = self.leases.turns(updates.iter().map(|update| update.lease_ref)).await;
        let updates: Vec<crate::Update> = updates.to_vec();
        self.perform(Updates { shared: Arc::clone(self), _turns: turns, updates: updates.into() }).await
    }
}

/// A renewal that is on its way.
struct Renewal<'b> {
    lease_ref: LeaseRef,
    held: Held,
    timeout: i64,
    alive_time: Duration,
    progress: Option<&'b Progress>,
}

#[async_trait]
impl Operation for Beats {
    type Answer = HashSet<LeaseRef>;
    const DOING: &'static str = "renewing leases";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        let now_ms = now(names, connection).await?;
        let mut renewals: Vec<Renewal<'_>> = Vec::with_capacity(self.leases.len());
        for (lease_ref, alive_time, progress) in &self.leases {
            let Some(held) = self.shared.leases.get(*lease_ref) else { continue };
            // Never shorter than it is.
            let last = held.timeouts.iter().copied().max().unwrap_or_default();
            let timeout = until(now_ms, *alive_time).max(last);
            let (lease_ref, alive_time, progress) = (*lease_ref, *alive_time, progress.as_ref());
            renewals.push(Renewal { lease_ref, held, timeout, alive_time, progress });
        }
        if renewals.is_empty() {
            return Ok(HashSet::new());
        }
        renewals.sort_unstable_by(|one, other| one.held.key.cmp(&other.held.key));
        let leases = &self.shared.leases;
        for renewal in &renewals {
            leases.writing(renewal.lease_ref, renewal.timeout, renewal.alive_time);
        }
        // Read again, with what is about to be written among what counts.
        for renewal in &mut renewals {
            renewal.held = leases.get(renewal.lease_ref).unwrap_or_else(|| renewal.held.clone());
        }
        let latest = renewals.iter().map(|renewal| (renewal.held.token, renewal.timeout));
        self.shared.hosts.cover(latest, names, connection).await?;
        let held = renew(&renewals, names, connection).await?;
        for renewal in &renewals {
            if held.contains(&renewal.lease_ref) {
                leases.written(renewal.lease_ref, renewal.timeout);
            } else {
                // Whoever wrote to the row has it. That its values come back to what they were does not bring the lease back.
                leases.lose(renewal.lease_ref);
            }
        }
        Ok(held)
    }
}

async fn renew(renewals: &[Renewal<'_>], names: &Names, connection: &mut MySqlConnection) -> Result<HashSet<LeaseRef>, Failure> {
    const RENEW: &str = concat!("UPDATE ", fence!(), " SET t.timeout = f.value WHERE ", holds!());
    const RENEWED: &str = concat!(
        "SELECT f.place FROM ",
        fence!(),
        " WHERE t.owner = f.owner AND t.timeout = f.value AND t.created_at IS NOT NULL AND t.timeout > UNIX_TIMESTAMP()"
    );
    let rows = fenced(renewals.iter().map(|renewal| (&renewal.held, renewal.timeout)));
    let written = sqlx::query(names.sql(RENEW)).bind(&rows).execute(&mut *connection).await?.rows_affected();
    let held: HashSet<LeaseRef> = if written == renewals.len() as u64 {
        renewals.iter().map(|renewal| renewal.lease_ref).collect()
    } else {
        let places: Vec<i32> = sqlx::query_scalar(names.sql(RENEWED)).bind(&rows).fetch_all(&mut *connection).await?;
        let at = |place: i32| renewals.get(usize::try_from(place).ok()?).map(|renewal| renewal.lease_ref);
        places.into_iter().filter_map(at).collect()
    };
    if names.has_side() {
        report(renewals.iter().filter(|renewal| held.contains(&renewal.lease_ref)), names, connection).await?;
    }
    Ok(held)
}

/// Note what tasks say of themselves.
async fn report<'b>(
    renewals: impl Iterator<Item = &'b Renewal<'b>>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), Failure> {
    // Locked, as by whoever else notes something: a note that is not there yet cannot be.
    const CREATED: &str = concat!(
        "SELECT f.place, CAST(t.created_at AS SIGNED) FROM ",
        fence!(lockable),
        " WHERE t.owner = f.owner AND t.created_at IS NOT NULL FOR UPDATE"
    );
    let reported: Vec<(&Held, &Progress)> = renewals.filter_map(|renewal| Some((&renewal.held, renewal.progress?))).collect();
    if reported.is_empty() {
        return Ok(());
    }
    begin(connection).await?;
    let rows = fenced(reported.iter().map(|(held, _)| (*held, 0)));
    let rows = sqlx::query(names.sql(CREATED)).bind(rows).fetch_all(&mut *connection).await?;
    let mut created = HashMap::with_capacity(rows.len());
    for row in &rows {
        created.insert(usize::try_from(row.try_get::<i32, _>(0)?).unwrap_or_default(), row.try_get::<i64, _>(1)?);
    }
    let keys: Vec<&str> = reported.iter().map(|(held, _)| held.key.as_str()).collect();
    let mut sides = side::load(&keys, true, names, connection).await?;
    let mut noted = Vec::with_capacity(reported.len());
    for (place, (held, progress)) in reported.iter().enumerate() {
        let Some(created_at) = created.get(&place).copied() else { continue };
        let known = sides.remove(&held.key).filter(|side| side.created_at == created_at);
        let mut side = known.unwrap_or_else(|| Side::new(created_at));
        let mut progress = (*progress).clone();
        progress.note.truncate(progress.note.floor_char_boundary(NOTE_BYTES_MAX));
        side.progress = Some(Reported { owner: held.token, progress });
        noted.push((held.key.as_str(), side));
    }
    side::store(&noted, names, connection).await?;
    commit(connection).await?;
    Ok(())
}

/// New members of tasks' data.
struct Updates {
    shared: Arc<Shared>,
    _turns: Turns,
    updates: Arc<[crate::Update]>,
}

/// A row that is updated, once or more.
struct Updated {
    lease_ref: LeaseRef,
    key: String,
    stored: Vec<u8>,
    timeout: i64,
    changed: bool,
}

#[async_trait]
impl Operation for Updates {
    type Answer = Vec<Result<LeaseAnswer>>;
    const DOING: &'static str = "updating the data of tasks";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        let leases = &self.shared.leases;
        let now_ms = now(names, connection).await?;
        let mut asked: HashMap<LeaseRef, (Held, i64)> = HashMap::with_capacity(self.updates.len());
        for lease_ref in self.updates.iter().map(|update| update.lease_ref) {
            let Some(held) = leases.get(lease_ref) else { continue };
            let last = held.timeouts.iter().copied().max().unwrap_or_default();
            let timeout = until(now_ms, held.alive_time).max(last);
            asked.insert(lease_ref, (held, timeout));
        }
        if asked.is_empty() {
            return Ok(self.updates.iter().map(|_| Ok(LeaseAnswer::Lost)).collect());
        }
        let latest = asked.values().map(|(held, timeout)| (held.token, *timeout));
        self.shared.hosts.cover(latest, names, connection).await?;
        for (lease_ref, (held, timeout)) in &mut asked {
            leases.writing(*lease_ref, *timeout, held.alive_time);
            // Read again, with what is about to be written among what counts.
            *held = leases.get(*lease_ref).unwrap_or_else(|| held.clone());
        }
        begin(connection).await?;
        let rows = lock(&asked, names, connection).await?;
        let updates = Arc::clone(&self.updates);
        let merging = tokio::task::spawn_blocking(move || merge_all(&updates, rows));
        let (rows, answers) = merging.await.map_err(|_| Failure::from(Error::Closed))?;
        let changed: Vec<&Updated> = rows.iter().filter(|row| row.changed).collect();
        write(&changed, names, connection).await?;
        commit(connection).await?;
        let locked: HashSet<LeaseRef> = rows.iter().map(|row| row.lease_ref).collect();
        for row in &changed {
            leases.written(row.lease_ref, row.timeout);
        }
        for lease_ref in asked.into_keys().filter(|lease_ref| !locked.contains(lease_ref)) {
            leases.lose(lease_ref);
        }
        Ok(answers)
    }
}

/// Lock the rows whose leases hold, in the order of their keys.
async fn lock(
    asked: &HashMap<LeaseRef, (Held, i64)>,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<Vec<Updated>, Failure> {
    const LOCK: &str = concat!("SELECT f.place, t.id, t.data FROM ", fence!(lockable), " WHERE ", holds!(), " FOR UPDATE");
    let mut leases: Vec<(&LeaseRef, &(Held, i64))> = asked.iter().collect();
    leases.sort_unstable_by(|one, other| one.1.0.key.cmp(&other.1.0.key));
    let rows = fenced(leases.iter().map(|(_, (held, _))| (held, 0)));
    let rows = sqlx::query(names.sql(LOCK)).bind(rows).fetch_all(connection).await?;
    let mut locked = Vec::with_capacity(rows.len());
    for row in &rows {
        let place = usize::try_from(row.try_get::<i32, _>(0)?).unwrap_or(usize::MAX);
        let Some((lease_ref, (_, timeout))) = leases.get(place) else { continue };
        let (key, stored) = (row.try_get(1)?, row.try_get(2)?);
        locked.push(Updated { lease_ref: **lease_ref, key, stored, timeout: *timeout, changed: false });
    }
    Ok(locked)
}

/// Merge each update into its row, one after the other.
fn merge_all(updates: &[crate::Update], mut rows: Vec<Updated>) -> (Vec<Updated>, Vec<Result<LeaseAnswer>>) {
    let places: HashMap<LeaseRef, usize> = rows.iter().enumerate().map(|(place, row)| (row.lease_ref, place)).collect();
    let mut merge = |update: &crate::Update| {
        let Some(row) = places.get(&update.lease_ref).and_then(|place| rows.get_mut(*place)) else {
            return Ok(LeaseAnswer::Lost);
        };
        row.stored = merged(&row.key, row.stored.clone(), &update.members)?;
        row.changed = true;
        Ok(LeaseAnswer::Held)
    };
    let answers = updates.iter().map(&mut merge).collect();
    (rows, answers)
}

/// Write rows back.
async fn write(rows: &[&Updated], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const WRITE: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[0]', timeout BIGINT PATH '$[1]',
            first BIGINT PATH '$[2]', bytes BIGINT PATH '$[3]')) AS f STRAIGHT_JOIN {t} AS t FORCE INDEX (PRIMARY) ON t.id = {as_key}
        SET t.data = SUBSTRING(?, f.first, f.bytes), t.timeout = f.timeout";
    for part in parts(rows, |row| row.stored.len()) {
        let mut bytes = Vec::new();
        let rows = json(part.iter().map(|row| {
            let first = bytes.len() + 1;
            bytes.extend_from_slice(&row.stored);
            (&row.key, row.timeout, first, row.stored.len())
        }));
        sqlx::query(names.sql(WRITE)).bind(rows).bind(bytes).execute(&mut *connection).await?;
    }
    Ok(())
}

/// The merged data as it is stored: compressed as it was, and with its type, which no update changes.
fn merged(key: &str, stored: Vec<u8>, members: &[u8]) -> Result<Vec<u8>> {
    let invalid = |problem: String| Error::InvalidTask { key: key.to_owned(), problem };
    let read = blob::read(key, stored).map_err(|problem| invalid(format!("the stored data is unreadable: {problem}")))?;
    let taken = data::take_member(members, "type").map_err(|problem| invalid(format!("the update is {problem}")))?;
    let members = taken.as_ref().map_or(members, |(_, rest)| rest);
    let merged = data::merge(&read.data, members).map_err(invalid)?;
    drop(read.data);
    blob::write(&read.task_type, &merged, read.compression).map_err(invalid)
}
