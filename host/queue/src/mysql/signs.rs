//! Signs of life. Each host's stands in a row of its own beside the host's: a claim holds the host's row as long as it waits for others, and a
//! host that waits is alive.
//!
//! The row comes with the first sign and goes when the host leaves, both under the lock of the host's row; so no sign outlives its host.

use std::time::Duration;

use sqlx::Row as _;
use sqlx::mysql::MySqlRow;

use super::MySql;
use super::failure::{self, Failure};
use super::hosts::{LEAVE, identity};
use super::rows::{ids, json};
use super::session::{Session, Waiting};
use crate::outcome::ms;
use crate::{HostId, Result, Sign};

impl MySql {
    pub(super) async fn leave_sign(&self, host: HostId, timeout: Duration) -> Result<()> {
        let doing = "giving a sign of life";
        self.runner.run(Waiting::Long, doing, move |session| Box::pin(async move { give(session, host, timeout).await })).await
    }

    pub(super) async fn read_signs(&self) -> Result<Vec<Sign>> {
        self.runner.read_together("reading signs of life", |session| Box::pin(async move { read(session).await })).await
    }

    /// Mark the hosts as ones that have left that gave no sign since these were read. Answers which of them have left by now, whoever said so:
    /// so a try whose answer was lost makes no difference.
    pub(super) async fn mark_hosts_dead(&self, silent: &[Sign]) -> Result<Vec<HostId>> {
        let silent: Vec<(i64, i64)> = silent.iter().map(|sign| (sign.host.0, sign.count)).collect();
        self.run("marking hosts as dead", move |session| {
            let silent = silent.clone();
            Box::pin(async move { mark_dead(session, &silent).await })
        })
        .await
    }
}

async fn give(session: &mut Session<'_>, host: HostId, timeout: Duration) -> Result<(), Failure> {
    const GIVE: &str = "UPDATE laelaps_host_sign SET given = given + 1 WHERE host = ? AND timeout_ms = ?";
    const HERE: &str = "SELECT id FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0 FOR UPDATE";
    const BEGIN: &str = "INSERT INTO laelaps_host_sign (host, given, timeout_ms) VALUES (?, 1, ?)
        ON DUPLICATE KEY UPDATE given = given + 1, timeout_ms = VALUES(timeout_ms)";
    let timeout = ms(timeout);
    if sqlx::query(GIVE).bind(host.0).bind(timeout).execute(session.db()).await?.rows_affected() > 0 {
        return Ok(());
    }
    let here: Option<i64> = sqlx::query_scalar(HERE).bind(host.0).fetch_optional(session.db()).await?;
    if here.is_none() {
        return Err(failure::unknown_host(host));
    }
    sqlx::query(BEGIN).bind(host.0).bind(timeout).execute(session.db()).await?;
    Ok(())
}

async fn read(session: &mut Session<'_>) -> Result<Vec<Sign>, Failure> {
    const READ: &str = "SELECT s.host, h.identity, s.given, s.timeout_ms FROM laelaps_host_sign AS s
        STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.host ORDER BY s.host";
    let sign = |row: &MySqlRow| {
        let timeout: i64 = row.try_get(3)?;
        Ok::<Sign, sqlx::Error>(Sign {
            host: HostId(row.try_get(0)?),
            identity: identity(row, 1)?,
            count: row.try_get(2)?,
            timeout: Duration::from_millis(u64::try_from(timeout).unwrap_or(u64::MAX)),
        })
    };
    let rows = sqlx::query(READ).fetch_all(session.db()).await?;
    Ok(rows.iter().map(sign).collect::<std::result::Result<_, _>>()?)
}

async fn mark_dead(session: &mut Session<'_>, silent: &[(i64, i64)]) -> Result<Vec<HostId>, Failure> {
    // Waits for claims under way. What is marked later takes its turn with a first sign, and with whoever else marks it.
    const HOLD: &str =
        concat!("SELECT h.id FROM ", ids!(), " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id FOR UPDATE");
    const GONE: &str = "SELECT g.host FROM JSON_TABLE(?, '$[*]' COLUMNS (host BIGINT PATH '$[0]', given BIGINT PATH '$[1]')) AS s
        STRAIGHT_JOIN laelaps_host_sign AS g FORCE INDEX (PRIMARY) ON g.host = s.host WHERE g.given = s.given FOR UPDATE";
    const LEFT: &str = concat!(
        "SELECT h.id FROM ",
        ids!(),
        " STRAIGHT_JOIN laelaps_host AS h FORCE INDEX (PRIMARY) ON h.id = s.id WHERE h.left_at <> 0 OR h.ended_at <> 0 ORDER BY h.id"
    );
    let mut hosts: Vec<i64> = silent.iter().map(|(host, _)| *host).collect();
    hosts.sort_unstable();
    let hosts = json(hosts);
    sqlx::query(HOLD).bind(hosts.clone()).fetch_all(session.db()).await?;
    let gone: Vec<i64> = sqlx::query_scalar(GONE).bind(json(silent)).fetch_all(session.db()).await?;
    let now = session.now;
    sqlx::query(LEAVE).bind(json(&gone)).bind(now).execute(session.db()).await?;
    forget(session, &gone).await?;
    let left: Vec<i64> = sqlx::query_scalar(LEFT).bind(hosts).fetch_all(session.db()).await?;
    Ok(left.into_iter().map(HostId).collect())
}

/// These hosts have left; their rows are held.
pub(super) async fn forget(session: &mut Session<'_>, hosts: &[i64]) -> Result<(), Failure> {
    const FORGET: &str =
        concat!("DELETE g FROM ", ids!(), " STRAIGHT_JOIN laelaps_host_sign AS g FORCE INDEX (PRIMARY) ON g.host = s.id");
    if !hosts.is_empty() {
        sqlx::query(FORGET).bind(json(hosts)).execute(session.db()).await?;
    }
    Ok(())
}
