//! Hosts that died while one plugin version alone ran on them, and the versions that stand under quarantine for it.

use std::collections::BTreeSet;

use sqlx::Row as _;

use super::MySql;
use super::connect::text;
use super::failure::{self, Failure};
use super::hosts::RUNS_NOTHING;
use super::rows::{ids, json};
use super::session::Session;
use crate::earlier::Earlier;
use crate::outcome::ms;
use crate::{HostId, PluginVersion, Quarantine, Result, Timestamp};

/// Enter the deaths of hosts whose attempts are found lost: of each one, and against the version that alone ran there.
pub(super) async fn note_deaths(session: &mut Session<'_>, hosts: &[i64]) -> Result<(), Failure> {
    const DIED: &str = concat!(
        "SELECT h.id, MIN(r.plugin), COUNT(*) FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id
        STRAIGHT_JOIN laelaps_host_running AS r FORCE INDEX (PRIMARY) ON r.host = h.id WHERE h.died_at = 0 GROUP BY h.id"
    );
    const ENTER: &str =
        "INSERT IGNORE INTO laelaps_plugin_death (plugin, host, at) SELECT s.plugin, s.host, ? FROM JSON_TABLE(?, '$[*]'
        COLUMNS (plugin BIGINT PATH '$[0]', host BIGINT PATH '$[1]')) AS s";
    const FORGET: &str = "DELETE FROM laelaps_plugin_death WHERE host <= ?";
    const NOTE: &str =
        concat!("UPDATE ", ids!(), " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id SET h.died_at = ?");
    if hosts.is_empty() {
        return Ok(());
    }
    let died: Vec<(i64, i64, i64)> = sqlx::query_as(DIED).bind(json(hosts)).fetch_all(session.db()).await?;
    if died.is_empty() {
        return Ok(());
    }
    let now = session.now;
    let alone: Vec<(i64, i64)> =
        died.iter().filter(|(_, _, versions)| *versions == 1).map(|(host, plugin, _)| (*plugin, *host)).collect();
    sqlx::query(ENTER).bind(now).bind(json(&alone)).execute(session.db()).await?;
    if let Some(last) = alone.iter().map(|(_, host)| host).max() {
        sqlx::query(FORGET).bind(last - i64::from(Quarantine::HOSTS)).execute(session.db()).await?;
    }
    sqlx::query(NOTE).bind(json(died.iter().map(|(host, _, _)| host))).bind(now).execute(session.db()).await?;
    Ok(())
}

impl MySql {
    pub(super) async fn note_running_versions(&self, host: HostId, versions: &[PluginVersion]) -> Result<()> {
        // Held, so that nobody strikes the host off before its set is written, and two sets take turns.
        const HERE: &str = "SELECT id FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0 FOR UPDATE";
        const NAME: &str = "UPDATE JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$[0]', name VARCHAR(255) CHARACTER SET utf8mb4 PATH '$[1]')) AS s
            STRAIGHT_JOIN laelaps_plugin_version AS v FORCE INDEX (PRIMARY) ON v.id = s.id SET v.name = s.name WHERE v.name <> s.name";
        const NOTE: &str = concat!("INSERT INTO laelaps_host_running (host, plugin) SELECT DISTINCT ?, s.id FROM ", ids!());
        let plugins = self.plugin_ids(versions.iter().map(|version| version.digest.as_str()).collect::<BTreeSet<_>>()).await?;
        let named: Vec<(i64, String)> =
            versions.iter().filter_map(|version| Some((*plugins.get(&version.digest)?, cut(&version.name).to_owned()))).collect();
        self.run("noting which plugin versions run", move |session| {
            let named = named.clone();
            Box::pin(async move {
                let here: Option<i64> = sqlx::query_scalar(HERE).bind(host.0).fetch_optional(session.db()).await?;
                if here.is_none() {
                    return Err(failure::unknown_host(host));
                }
                sqlx::query(RUNS_NOTHING).bind(json([host.0])).execute(session.db()).await?;
                if !named.is_empty() {
                    sqlx::query(NAME).bind(json(&named)).execute(session.db()).await?;
                    let ids = json(named.iter().map(|(id, _)| id));
                    sqlx::query(NOTE).bind(host.0).bind(ids).execute(session.db()).await?;
                }
                Ok(())
            })
        })
        .await
    }

    pub(super) async fn versions_under_quarantine(&self) -> Result<Vec<Quarantine>> {
        // MariaDB wants the distance written out; it is Quarantine::DEATHS less one.
        const GUILTY: &str = "SELECT v.name, v.digest, COUNT(*), MAX(d.at) FROM (
                SELECT plugin, at, at - LAG(at, 2) OVER (PARTITION BY plugin ORDER BY at) AS apart FROM laelaps_plugin_death) AS d
            JOIN laelaps_plugin_version AS v ON v.id = d.plugin GROUP BY v.id, v.name, v.digest HAVING MIN(d.apart) <= ? ORDER BY v.digest";
        self.runner
            .read_together("reading the quarantine", |session| {
                Box::pin(async move {
                    let rows = sqlx::query(GUILTY).bind(ms(Quarantine::WITHIN)).fetch_all(session.db()).await?;
                    let mut guilty = Vec::with_capacity(rows.len());
                    for row in &rows {
                        guilty.push(Quarantine {
                            version: PluginVersion { name: text(row, 0)?, digest: text(row, 1)? },
                            deaths: u32::try_from(row.try_get::<i64, _>(2)?).unwrap_or(u32::MAX),
                            since: Timestamp(row.try_get(3)?),
                        });
                    }
                    Ok(guilty)
                })
            })
            .await
    }

    pub(super) async fn release_version(&self, digest: &str) -> Result<bool> {
        const RELEASE: &str =
            "DELETE FROM laelaps_plugin_death WHERE plugin IN (SELECT id FROM laelaps_plugin_version WHERE digest = ?)";
        let digest = digest.as_bytes().to_vec();
        let earlier = Earlier::default();
        self.run("releasing a plugin version", move |session| {
            let (digest, earlier) = (digest.clone(), earlier.clone());
            Box::pin(async move {
                let released = sqlx::query(RELEASE).bind(digest).execute(session.db()).await?.rows_affected() > 0;
                // The deaths may have gone with an earlier try.
                let released = released || earlier.get().unwrap_or(false);
                earlier.note(released);
                Ok(released)
            })
        })
        .await
    }
}

/// A name as far as the column takes it.
fn cut(name: &str) -> &str {
    &name[..name.floor_char_boundary(255)]
}
