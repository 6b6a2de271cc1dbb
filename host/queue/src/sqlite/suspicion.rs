//! Who is to blame for a host's death, and how blame is taken back.
//!
//! A loss is provisional. A host that turns out to live takes back what its losses did to its tasks, and its part in the deaths of the plugin
//! version that ran on it.

use std::collections::BTreeMap;

use sqlx::Row as _;
use sqlx::sqlite::SqlitePool;

use super::accounts::{Changes, Owner, Waiting, json};
use super::failure::{self, Failure};
use super::writer::Session;
use crate::outcome::ms;
use crate::{HostId, LeaseRef, PluginVersion, Policy, Quarantine, Timestamp, fair};

/// What one task's excused losses were.
#[derive(Default)]
struct Excused {
    losses: i64,
    alone: i64,
}

/// Take back losses. Answers how many were.
pub(super) async fn excuse(session: &mut Session, host: HostId, leases: &[LeaseRef]) -> Result<u64, Failure> {
    const EXCUSE: &str = "UPDATE attempt SET event = 'excused'
        FROM (SELECT value ->> 0 AS id, value ->> 1 AS number FROM json_each(?1)) AS asked
        WHERE attempt.task = asked.id AND attempt.lease = asked.number AND attempt.event = 'lost'
        RETURNING task, host, alone, ended_at";
    let leases = json(leases.iter().map(|lease_ref| (lease_ref.task, lease_ref.lease)));
    let rows: Vec<(i64, Option<i64>, i64, i64)> = sqlx::query_as(EXCUSE).bind(leases).fetch_all(session.db()).await?;
    let mut hosts = vec![host.0];
    hosts.extend(rows.iter().filter_map(|(_, host, ..)| *host));
    forget_deaths(session, &hosts).await?;
    let mut tasks: BTreeMap<i64, Vec<(i64, i64)>> = BTreeMap::new();
    for (task, _, alone, ended_at) in &rows {
        tasks.entry(*task).or_default().push((*alone, *ended_at));
    }
    let mut changes = Changes::default();
    for (task, losses) in tasks {
        lift(session, task, &losses, &mut changes).await?;
    }
    changes.write(session).await?;
    Ok(rows.len() as u64)
}

async fn forget_deaths(session: &mut Session, hosts: &[i64]) -> Result<(), Failure> {
    const FORGET: &str = "DELETE FROM plugin_death WHERE host IN (SELECT value FROM json_each(?1))";
    sqlx::query(FORGET).bind(json(hosts)).execute(session.db()).await?;
    Ok(())
}

/// Let excused losses, each whether it was alone and when it was found, count no more for their task. Those from before an attempt that ended
/// otherwise do not count any more anyway.
async fn lift(session: &mut Session, task: i64, losses: &[(i64, i64)], changes: &mut Changes) -> Result<(), Failure> {
    const SINCE: &str = "SELECT lost_at FROM task WHERE id = ?1 AND lost > 0";
    const LIFT: &str = "UPDATE task SET lost = max(lost - ?2, 0), lost_alone = max(lost_alone - ?3, 0),
            lost_at = CASE WHEN lost > ?2 THEN coalesce((SELECT min(ended_at) FROM attempt
                WHERE attempt.task = task.id AND event = 'lost' AND ended_at >= task.lost_at), lost_at) END
        WHERE id = ?1";
    const COMPANY: &str = "UPDATE task SET alone = 0 WHERE id = ?1 AND state = 'waiting' AND alone AND lost < ?2
        RETURNING run_at, CAST(user AS BLOB), max_running, priority, CAST(queue AS BLOB)";
    const OUT: &str = "DELETE FROM suspect WHERE turn = ?1 AND task = ?2";
    let since: Option<Option<i64>> = sqlx::query_scalar(SINCE).bind(task).fetch_optional(session.db()).await?;
    let Some(since) = since else { return Ok(()) };
    let mut excused = Excused::default();
    for (alone, _) in losses.iter().filter(|(_, ended_at)| since.is_none_or(|since| *ended_at >= since)) {
        excused.losses += 1;
        excused.alone += *alone;
    }
    sqlx::query(LIFT).bind(task).bind(excused.losses).bind(excused.alone).execute(session.db()).await?;
    let company = sqlx::query(COMPANY).bind(task).bind(Policy::LOST_MAX).fetch_optional(session.db()).await?;
    let Some(company) = company else { return Ok(()) };
    let (run_at, max_running, priority) = (company.try_get(0)?, company.try_get(2)?, company.try_get(3)?);
    if let (Ok(user), Ok(queue)) = (String::from_utf8(company.try_get(1)?), String::from_utf8(company.try_get(4)?))
        && sqlx::query(OUT).bind(fair::turn(priority, run_at)).bind(task).execute(session.db()).await?.rows_affected() == 1
    {
        changes
            .enqueue(session, &[Waiting { task, run_at, priority, owner: Owner { queue, user }, max_running, alone: false }])
            .await?;
    }
    Ok(())
}

/// Replace the set of versions that run on a host.
pub(super) async fn note_running(session: &mut Session, host: HostId, versions: &[PluginVersion]) -> Result<(), Failure> {
    const ENTER: &str = "INSERT INTO plugin_version (digest, name) SELECT value ->> 0, value ->> 1 FROM json_each(?1) WHERE true
        ON CONFLICT (digest) DO UPDATE SET name = excluded.name WHERE name IS NOT excluded.name";
    const NOTE: &str = "INSERT INTO host_running (host, plugin)
        SELECT ?2, id FROM plugin_version WHERE digest IN (SELECT value ->> 0 FROM json_each(?1))";
    if !is_here(session, host).await? {
        return Err(failure::unknown_host(host));
    }
    let rows = json(versions.iter().map(|version| (&version.digest, &version.name)));
    leave(session, &[host]).await?;
    if !versions.is_empty() {
        sqlx::query(ENTER).bind(rows.clone()).execute(session.db()).await?;
        sqlx::query(NOTE).bind(rows).bind(host.0).execute(session.db()).await?;
    }
    Ok(())
}

/// Whether the host is registered and has not left.
pub(super) async fn is_here(session: &mut Session, host: HostId) -> Result<bool, Failure> {
    const HERE: &str = "SELECT EXISTS (SELECT 1 FROM host WHERE id = ?1 AND left_at IS NULL AND ended_at IS NULL)";
    Ok(sqlx::query_scalar(HERE).bind(host.0).fetch_one(session.db()).await?)
}

/// Nothing runs on these hosts any more.
pub(super) async fn leave(session: &mut Session, hosts: &[HostId]) -> Result<(), Failure> {
    const LEAVE: &str = "DELETE FROM host_running WHERE host IN (SELECT value FROM json_each(?1))";
    sqlx::query(LEAVE).bind(json(hosts)).execute(session.db()).await?;
    Ok(())
}

/// These hosts were found dead. Those on which one version ran alone count against it, each once.
pub(super) async fn died(session: &mut Session, hosts: &[HostId]) -> Result<(), Failure> {
    const ENTER: &str = "INSERT INTO plugin_death (host, plugin, at)
        SELECT host, min(plugin), ?2 FROM host_running WHERE host IN (SELECT value FROM json_each(?1))
        GROUP BY host HAVING count(*) = 1 ON CONFLICT (host) DO NOTHING";
    const FORGET: &str = "DELETE FROM plugin_death WHERE host <= (SELECT max(id) FROM host) - ?1";
    let now = session.now;
    if sqlx::query(ENTER).bind(json(hosts)).bind(now).execute(session.db()).await?.rows_affected() > 0 {
        sqlx::query(FORGET).bind(Quarantine::HOSTS).execute(session.db()).await?;
    }
    leave(session, hosts).await
}

/// The versions of which so many hosts died that no host runs them.
pub(super) async fn quarantined(readers: &SqlitePool) -> Result<Vec<Quarantine>, sqlx::Error> {
    const QUARANTINED: &str = "SELECT CAST(coalesce(name, '') AS BLOB), CAST(digest AS BLOB), count(*), max(at)
        FROM (SELECT plugin, at, at - lag(at, ?1) OVER (PARTITION BY plugin ORDER BY at) AS apart FROM plugin_death) AS death
        JOIN plugin_version ON plugin_version.id = death.plugin
        GROUP BY death.plugin HAVING min(apart) <= ?2 ORDER BY digest";
    let asked = sqlx::query_as(QUARANTINED).bind(Quarantine::DEATHS - 1).bind(ms(Quarantine::WITHIN));
    let rows: Vec<(Vec<u8>, Vec<u8>, i64, i64)> = asked.fetch_all(readers).await?;
    let lossy = |text: &[u8]| String::from_utf8_lossy(text).into_owned();
    let quarantine = |(name, digest, deaths, since): &(Vec<u8>, Vec<u8>, i64, i64)| Quarantine {
        version: PluginVersion { name: lossy(name), digest: lossy(digest) },
        deaths: u32::try_from(*deaths).unwrap_or(u32::MAX),
        since: Timestamp(*since),
    };
    Ok(rows.iter().map(quarantine).collect())
}

/// Forget the deaths of a version. Answers whether it had any.
pub(super) async fn release(session: &mut Session, digest: String) -> Result<bool, Failure> {
    const RELEASE: &str = "DELETE FROM plugin_death WHERE plugin = (SELECT id FROM plugin_version WHERE digest = ?1)";
    Ok(sqlx::query(RELEASE).bind(digest).execute(session.db()).await?.rows_affected() > 0)
}
