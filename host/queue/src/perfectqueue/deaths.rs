//! Plugin versions that hosts died with. A watched host keeps the set of versions it runs in its row; when it is found dead while the set was a single version, that
//! is one death of the version, in a table of ours. Enough of them put it under quarantine until an operator releases it.
//!
//! A host is found dead by the watchdog ([`super::hosts`]), or by the first claim that meets a lease of its that ran out ([`super::lost`]). Each
//! host dies once at most, and one that comes back takes its death back. Hosts that nobody watches have no row, so that their deaths are not seen.

use async_trait::async_trait;
use sqlx::Row as _;
use sqlx::mysql::MySqlConnection;

use super::run::{Operation, begin, commit};
use super::table::{Names, json};
use crate::earlier::Earlier;
use crate::mysql::connect::text;
use crate::mysql::failure::Failure;
use crate::outcome::ms;
use crate::{PluginVersion, Quarantine, Result, Timestamp};

/// The set of a host's row: names and digests.
fn written(versions: &[PluginVersion]) -> String {
    json(versions.iter().map(|version| (&version.name, &version.digest)))
}

/// The versions that a host runs from now on.
pub(super) struct NoteRunning {
    pub(super) number: u32,
    pub(super) versions: Vec<PluginVersion>,
}

#[async_trait]
impl Operation for NoteRunning {
    type Answer = ();
    const DOING: &'static str = "noting which plugins run";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<(), Failure> {
        const NOTE: &str = "UPDATE {h} SET plugins = ? WHERE id = ?";
        let query = sqlx::query(names.sql(NOTE)).bind(written(&self.versions)).bind(self.number);
        Ok(query.execute(connection).await.map(drop)?)
    }
}

/// Hosts of these numbers are dead: enter a death for each whose versions were a single one.
pub(super) async fn enter(
    hosts: &[u32],
    now_ms: i64,
    names: &Names,
    connection: &mut MySqlConnection,
) -> Result<(), sqlx::Error> {
    const SETS: &str = "SELECT h.id, h.plugins FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS f
        STRAIGHT_JOIN {h} AS h FORCE INDEX (PRIMARY) ON h.id = f.id WHERE h.plugins IS NOT NULL";
    const ENTER: &str =
        "INSERT INTO {d} (host, name, digest, at) VALUES (?, ?, ?, ?) ON DUPLICATE KEY UPDATE host = VALUES(host)";
    const FORGET: &str = "DELETE FROM {d} WHERE host <= ?";
    if hosts.is_empty() {
        return Ok(());
    }
    for row in sqlx::query(names.sql(SETS)).bind(json(hosts)).fetch_all(&mut *connection).await? {
        let host: u64 = row.try_get(0)?;
        // Somebody who changed it by hand gets along without it.
        let versions: Vec<(String, String)> = serde_json::from_str(&text(&row, 1)?).unwrap_or_default();
        if let [(name, digest)] = versions.as_slice() {
            let query = sqlx::query(names.sql(ENTER)).bind(host).bind(name).bind(digest).bind(now_ms);
            query.execute(&mut *connection).await?;
            let old = host.saturating_sub(u64::from(Quarantine::HOSTS));
            sqlx::query(names.sql(FORGET)).bind(old).execute(&mut *connection).await?;
            tracing::warn!(host, plugin = name, digest, "a host died while it ran this plugin version alone");
        }
    }
    Ok(())
}

/// These hosts are not dead.
pub(super) async fn take_back(hosts: &[u32], names: &Names, connection: &mut MySqlConnection) -> Result<(), sqlx::Error> {
    const TAKE_BACK: &str = "DELETE d FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS f
        STRAIGHT_JOIN {d} AS d FORCE INDEX (PRIMARY) ON d.host = f.id";
    if hosts.is_empty() {
        return Ok(());
    }
    sqlx::query(names.sql(TAKE_BACK)).bind(json(hosts)).execute(connection).await.map(drop)
}

/// What is under quarantine.
pub(super) struct Quarantined;

#[async_trait]
impl Operation for Quarantined {
    type Answer = Vec<Quarantine>;
    const DOING: &'static str = "looking for plugins under quarantine";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<Self::Answer, Failure> {
        // MariaDB wants the distance written out; it is Quarantine::DEATHS less one.
        const QUARANTINED: &str = "SELECT d.name, d.digest, COUNT(*), MAX(d.at) FROM (
                SELECT name, digest, at, at - LAG(at, 2) OVER (PARTITION BY name, digest ORDER BY at) AS apart FROM {d}) AS d
            GROUP BY d.name, d.digest HAVING MIN(d.apart) <= ? ORDER BY d.name, d.digest";
        let rows = sqlx::query(names.sql(QUARANTINED)).bind(ms(Quarantine::WITHIN)).fetch_all(connection).await?;
        let mut quarantined = Vec::with_capacity(rows.len());
        for row in &rows {
            let version = PluginVersion { name: text(row, 0)?, digest: text(row, 1)? };
            let deaths = u32::try_from(row.try_get::<i64, _>(2)?).unwrap_or(u32::MAX);
            quarantined.push(Quarantine { version, deaths, since: Timestamp(row.try_get(3)?) });
        }
        Ok(quarantined)
    }
}

/// Let a version run again.
pub(super) struct ReleasePlugin {
    pub(super) digest: String,
    /// Whether an earlier try has.
    pub(super) earlier: Earlier<bool>,
}

#[async_trait]
impl Operation for ReleasePlugin {
    type Answer = bool;
    const DOING: &'static str = "releasing a plugin from quarantine";

    async fn run(&self, names: &Names, connection: &mut MySqlConnection) -> Result<bool, Failure> {
        const RELEASE: &str = "DELETE FROM {d} WHERE digest = ?";
        begin(connection).await?;
        let released = sqlx::query(names.sql(RELEASE)).bind(&self.digest).execute(&mut *connection).await?.rows_affected() > 0;
        let released = released || self.earlier.get().unwrap_or(false);
        self.earlier.note(released);
        commit(connection).await?;
        Ok(released)
    }
}
