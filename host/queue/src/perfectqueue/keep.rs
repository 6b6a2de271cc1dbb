//! What a running attempt writes: renewals, progress, data.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::mysql::MySqlConnection;
use sqlx::{Connection as _, Row as _};

use super::lease::{Held, Turns, apart};
use super::run::Operation;
use super::settle::{fence, fenced, holds};
use super::side::{self, Reported, Side};
use super::table::{Names, json, now, second_from};
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

    /// Merge members into the data of a running task. Renews its lease, as Ruby's does.
    pub(super) async fn update(self: &Arc<Self>, lease_ref: LeaseRef, members: &[u8]) -> Result<LeaseAnswer> {
        let turns = self.leases.turns([lease_ref].into_iter()).await;
        if self.leases.get(lease_ref).is_none() {
            return Ok(LeaseAnswer::Lost);
        }
        self.perform(Update { shared: Arc::clone(self), _turns: turns, lease_ref, members: members.into() }).await
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
                leases.forget(renewal.lease_ref);
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
    const CREATED: &str = concat!("SELECT f.place, t.created_at FROM ", fence!(), " WHERE t.owner = f.owner");
    let reported: Vec<(&Held, &Progress)> = renewals.filter_map(|renewal| Some((&renewal.held, renewal.progress?))).collect();
    if reported.is_empty() {
        return Ok(());
    }
    let rows = fenced(reported.iter().map(|(held, _)| (*held, 0)));
    let rows = sqlx::query(names.sql(CREATED)).bind(rows).fetch_all(&mut *connection).await?;
    let mut created = HashMap::with_capacity(rows.len());
    for row in &rows {
        created.insert(usize::try_from(row.try_get::<i32, _>(0)?).unwrap_or_default(), row.try_get::<Option<i64>, _>(1)?);
    }
    let keys: Vec<&str> = reported.iter().map(|(held, _)| held.key.as_str()).collect();
    let mut transaction = connection.begin().await?;
    let mut sides = side::load(&keys, true, names, &mut transaction).await?;
    let mut noted = Vec::with_capacity(reported.len());
    for (place, (held, progress)) in reported.iter().enumerate() {
        let Some(created_at) = created.get(&place).copied().flatten() else { continue };
        let known = sides.remove(&held.key).filter(|side| side.created_at == created_at);
        let mut side = known.unwrap_or_else(|| Side::new(created_at));
        let mut progress = (*progress).clone();
        progress.note.truncate(progress.note.floor_char_boundary(NOTE_BYTES_MAX));
        side.progress = Some(Reported { owner: held.token, progress });
        noted.push((held.key.as_str(), side));
    }
    side::store(&noted, names, &mut transaction).await?;
    transaction.commit().await?;
    Ok(())
}

/// New members of a task's data.
struct Update {
    shared: Arc<Shared>,
    _turns: Turns,
    lease_ref: LeaseRef,
    members: Arc<[u8]>,
}

#[async_trait]
impl Operation for Update {
    type Answer = LeaseAnswer;
    const DOING: &'static str = "updating a task's data";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<LeaseAnswer, Failure> {
        let leases = &self.shared.leases;
        let Some(held) = leases.get(self.lease_ref) else { return Ok(LeaseAnswer::Lost) };
        let now_ms = now(names, connection).await?;
        let last = held.timeouts.iter().copied().max().unwrap_or_default();
        let timeout = until(now_ms, held.alive_time).max(last);
        self.shared.hosts.cover(std::iter::once((held.token, timeout)), names, connection).await?;
        leases.writing(self.lease_ref, timeout, held.alive_time);
        if self.write(timeout, names, connection).await? {
            leases.written(self.lease_ref, timeout);
            return Ok(LeaseAnswer::Held);
        }
        leases.forget(self.lease_ref);
        Ok(LeaseAnswer::Lost)
    }
}

impl Update {
    /// Lock the row, merge, write it back. False if the lease does not hold.
    async fn write(&self, timeout: i64, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        const LOCK: &str = concat!("SELECT t.data, t.id FROM ", fence!(), " WHERE ", holds!(), " FOR UPDATE");
        const WRITE: &str = "UPDATE {t} SET data = ?, timeout = ? WHERE id = ?";
        let mut transaction = connection.begin().await?;
        let Some(held) = self.shared.leases.get(self.lease_ref) else { return Ok(false) };
        let rows = json(held.timeouts.iter().map(|was| (0, &held.key, held.token, was)));
        let Some(row) = sqlx::query(names.sql(LOCK)).bind(rows).fetch_optional(&mut *transaction).await? else {
            transaction.rollback().await?;
            return Ok(false);
        };
        let (stored, key): (Vec<u8>, String) = (row.try_get(0)?, row.try_get(1)?);
        let members = Arc::clone(&self.members);
        let of_key = key.clone();
        let merged = tokio::task::spawn_blocking(move || merged(&of_key, stored, &members)).await;
        let merged = merged.map_err(|_| Error::Closed)??;
        sqlx::query(names.sql(WRITE)).bind(merged).bind(timeout).bind(key).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(true)
    }
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
