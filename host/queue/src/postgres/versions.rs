//! Plugin versions: which a host has served, which run on it, and which of them ran alone on hosts that died.

use std::collections::{BTreeMap, BTreeSet};

use sqlx::Row as _;

use super::failure::{self, Failure};
use super::session::Session;
use super::settle::{clean, plugin_ids};
use crate::earlier::Earlier;
use crate::outcome::ms;
use crate::{HostId, PluginVersion, Quarantine, Timestamp};

pub(super) async fn served_by(session: &mut Session, host: HostId) -> Result<Vec<String>, Failure> {
    const SERVED: &str =
        "SELECT digest FROM laelaps.host_plugin JOIN laelaps.plugin_version ON plugin_version.id = host_plugin.plugin
        WHERE host = $1 ORDER BY noted_at, digest";
    Ok(sqlx::query_scalar(SERVED).bind(host.0).fetch_all(session.db()?).await?)
}

/// Note which plugin versions a host serves from now on; those it served before stay noted.
pub(super) async fn note_plugins(session: &mut Session, host: HostId, digests: &[String]) -> Result<(), Failure> {
    const NOTE: &str = "INSERT INTO laelaps.host_plugin (host, plugin, noted_at)
        SELECT $1, plugin, (extract(epoch FROM clock_timestamp()) * 1000)::int8 FROM unnest($2::int4[]) AS noted (plugin) ORDER BY plugin
        ON CONFLICT (host, plugin) DO NOTHING";
    is_here(session, host).await?;
    let ids = plugin_ids(session, digests.iter().map(String::as_str).collect()).await?;
    sqlx::query(NOTE).bind(host.0).bind(ids.into_values().collect::<Vec<i32>>()).execute(session.db()?).await?;
    Ok(())
}

/// # Errors
/// [`crate::Error::UnknownHost`] if the host is not there, or has left.
async fn is_here(session: &mut Session, host: HostId) -> Result<(), Failure> {
    const HERE: &str = "SELECT EXISTS (SELECT FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL)";
    let here: bool = sqlx::query_scalar(HERE).bind(host.0).fetch_one(session.db()?).await?;
    if here { Ok(()) } else { Err(failure::unknown_host(host)) }
}

/// Note which plugin versions run on a host from now on, the whole set.
pub(super) async fn note_running(session: &mut Session, host: HostId, versions: &[PluginVersion]) -> Result<(), Failure> {
    const NAME: &str =
        "UPDATE laelaps.plugin_version SET name = asked.name FROM unnest($1::int4[], $2::text[]) AS asked (id, name)
        WHERE plugin_version.id = asked.id AND plugin_version.name <> asked.name";
    const NOTE: &str = "WITH gone AS (DELETE FROM laelaps.host_running WHERE host = $1 AND plugin <> ALL($2::int4[]))
        INSERT INTO laelaps.host_running (host, plugin) SELECT $1, plugin FROM unnest($2::int4[]) AS noted (plugin) ORDER BY plugin
        ON CONFLICT DO NOTHING";
    // Held, so that nobody strikes the host off before its set is written, and two sets take turns.
    const HERE: &str = "SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL FOR NO KEY UPDATE";
    let names: BTreeMap<String, String> = versions.iter().map(|version| (clean(&version.digest), clean(&version.name))).collect();
    let ids = plugin_ids(session, names.keys().map(String::as_str).collect::<BTreeSet<&str>>()).await?;
    let (named, said): (Vec<i32>, Vec<&str>) =
        ids.iter().filter_map(|(digest, id)| Some((*id, names.get(digest)?.as_str()))).unzip();
    session.begin().await?;
    let here: Option<i64> = sqlx::query_scalar(HERE).bind(host.0).fetch_optional(session.db()?).await?;
    if here.is_none() {
        return Err(failure::unknown_host(host));
    }
    sqlx::query(NAME).bind(&named).bind(said).execute(session.db()?).await?;
    sqlx::query(NOTE).bind(host.0).bind(&named).execute(session.db()?).await?;
    session.commit().await
}

/// Hosts that left in good order run nothing.
pub(super) async fn nothing_runs(session: &mut Session, hosts: &[i64]) -> Result<(), Failure> {
    sqlx::query("DELETE FROM laelaps.host_running WHERE host = ANY($1)").bind(hosts).execute(session.db()?).await?;
    Ok(())
}

/// $1 hosts that were found dead. Each dies once. One whose row is held claims at this moment, and so it lives.
pub(super) const DIED: &str = "WITH clock AS MATERIALIZED (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8 AS now),
    dead AS (
        UPDATE laelaps.host SET died_at = (SELECT now FROM clock) WHERE id = ANY(ARRAY(
            SELECT id FROM laelaps.host WHERE id = ANY($1) AND died_at IS NULL FOR NO KEY UPDATE SKIP LOCKED))
        RETURNING id)
    INSERT INTO laelaps.plugin_death (plugin, host, at)
    SELECT min(plugin), host, (SELECT now FROM clock) FROM laelaps.host_running WHERE host = ANY(ARRAY(SELECT id FROM dead))
    GROUP BY host HAVING count(*) = 1 ON CONFLICT DO NOTHING";

/// These hosts were found dead: that counts against the plugin version that alone ran on them.
pub(super) async fn died(session: &mut Session, hosts: &[i64]) -> Result<(), Failure> {
    const FORGET: &str = "DELETE FROM laelaps.plugin_death WHERE host <= $1";
    let Some(last) = hosts.iter().max() else { return Ok(()) };
    if sqlx::query(DIED).bind(hosts).execute(session.db()?).await?.rows_affected() > 0 {
        sqlx::query(FORGET).bind(last - i64::from(Quarantine::HOSTS)).execute(session.db()?).await?;
    }
    Ok(())
}

/// These hosts live after all.
pub(super) async fn lives(session: &mut Session, hosts: &[i64]) -> Result<(), Failure> {
    const LIVES: &str = "WITH lives AS (UPDATE laelaps.host SET died_at = NULL WHERE id = ANY($1) AND died_at IS NOT NULL)
        DELETE FROM laelaps.plugin_death WHERE host = ANY($1)";
    sqlx::query(LIVES).bind(hosts).execute(session.db()?).await?;
    Ok(())
}

pub(super) async fn quarantined(session: &mut Session) -> Result<Vec<Quarantine>, Failure> {
    const QUARANTINED: &str = "SELECT name, digest, count(*), max(at)
        FROM (SELECT plugin, at, at - lag(at, $1::int4) OVER (PARTITION BY plugin ORDER BY at) AS apart FROM laelaps.plugin_death) AS death
        JOIN laelaps.plugin_version ON plugin_version.id = death.plugin
        GROUP BY plugin_version.id HAVING min(apart) <= $2 ORDER BY name, digest";
    let others = i32::try_from(Quarantine::DEATHS - 1).unwrap_or(i32::MAX);
    let rows = sqlx::query(QUARANTINED).bind(others).bind(ms(Quarantine::WITHIN)).fetch_all(session.db()?).await?;
    let quarantine = |row: &sqlx::postgres::PgRow| {
        Ok(Quarantine {
            version: PluginVersion { name: row.try_get(0)?, digest: row.try_get(1)? },
            deaths: u32::try_from(row.try_get::<i64, _>(2)?).unwrap_or(u32::MAX),
            since: Timestamp(row.try_get(3)?),
        })
    };
    Ok(rows.iter().map(quarantine).collect::<Result<_, sqlx::Error>>()?)
}

/// Forget the deaths of a plugin version; answers whether there were any. An earlier try whose answer was lost had some.
pub(super) async fn release(session: &mut Session, digest: &str, earlier: &Earlier<bool>) -> Result<bool, Failure> {
    const RELEASE: &str =
        "DELETE FROM laelaps.plugin_death WHERE plugin = (SELECT id FROM laelaps.plugin_version WHERE digest = $1)";
    session.begin().await?;
    let released = sqlx::query(RELEASE).bind(clean(digest)).execute(session.db()?).await?.rows_affected();
    let released = released > 0 || earlier.get().unwrap_or(false);
    earlier.note(released);
    session.commit().await?;
    Ok(released)
}
