//! Signs of life. Each host's stands in a row of its own beside the host's: a claim holds the host's row as long as it waits for others, and a
//! host that waits is alive.
//!
//! The row comes with the first sign and goes when the host leaves, both under the lock of the host's row; so no sign outlives its host.

use std::time::Duration;

use super::failure::{self, Failure};
use super::session::Session;
use crate::outcome::ms;
use crate::{HostId, Sign};

/// Give a sign of life.
pub(super) async fn give(session: &mut Session, host: HostId, timeout: Duration) -> Result<(), Failure> {
    const GIVE: &str = "UPDATE laelaps.host_sign SET given = given + 1 WHERE host = $1 AND timeout_ms = $2";
    const HERE: &str = "SELECT id FROM laelaps.host WHERE id = $1 AND left_at IS NULL AND ended_at IS NULL FOR NO KEY UPDATE";
    const BEGIN: &str = "INSERT INTO laelaps.host_sign (host, given, timeout_ms) VALUES ($1, 1, $2)
        ON CONFLICT (host) DO UPDATE SET given = host_sign.given + 1, timeout_ms = excluded.timeout_ms";
    let timeout = ms(timeout);
    if sqlx::query(GIVE).bind(host.0).bind(timeout).execute(session.db()?).await?.rows_affected() > 0 {
        return Ok(());
    }
    session.begin().await?;
    let here: Option<i64> = sqlx::query_scalar(HERE).bind(host.0).fetch_optional(session.db()?).await?;
    if here.is_none() {
        return Err(failure::unknown_host(host));
    }
    sqlx::query(BEGIN).bind(host.0).bind(timeout).execute(session.db()?).await?;
    session.commit().await
}

/// All signs, in the order of their hosts.
pub(super) async fn read(session: &mut Session) -> Result<Vec<Sign>, Failure> {
    const READ: &str = "SELECT host_sign.host, host.identity, host_sign.given, host_sign.timeout_ms
        FROM laelaps.host_sign JOIN laelaps.host ON host.id = host_sign.host ORDER BY host_sign.host";
    let rows: Vec<(i64, Option<String>, i64, i64)> = sqlx::query_as(READ).fetch_all(session.db()?).await?;
    let sign = |(host, identity, count, timeout): (i64, Option<String>, i64, i64)| {
        let timeout = Duration::from_millis(u64::try_from(timeout).unwrap_or(u64::MAX));
        Sign { host: HostId(host), identity, count, timeout }
    };
    Ok(rows.into_iter().map(sign).collect())
}

/// Mark the hosts as ones that have left that gave no sign since these were read. Answers which of them have left by now, whoever said so: so
/// a try whose answer was lost makes no difference.
pub(super) async fn mark_dead(session: &mut Session, silent: &[Sign]) -> Result<Vec<HostId>, Failure> {
    // Waits for claims under way. What is marked later takes its turn with a first sign, and with whoever else marks it.
    const HOLD: &str = "SELECT id FROM laelaps.host WHERE id = ANY($1) ORDER BY id FOR NO KEY UPDATE";
    const MARK: &str =
        "WITH silent AS MATERIALIZED (SELECT host, given FROM unnest($1::int8[], $2::int8[]) AS asked (host, given)),
        gone AS (DELETE FROM laelaps.host_sign USING silent WHERE host_sign.host = silent.host AND host_sign.given = silent.given
            RETURNING host_sign.host)
        UPDATE laelaps.host SET left_at = (extract(epoch FROM clock_timestamp()) * 1000)::int8
        WHERE id = ANY(ARRAY(SELECT host FROM gone)) AND left_at IS NULL AND ended_at IS NULL";
    const LEFT: &str =
        "SELECT id FROM laelaps.host WHERE id = ANY($1) AND (left_at IS NOT NULL OR ended_at IS NOT NULL) ORDER BY id";
    let (hosts, counts): (Vec<i64>, Vec<i64>) = silent.iter().map(|sign| (sign.host.0, sign.count)).unzip();
    session.begin().await?;
    sqlx::query(HOLD).bind(&hosts).execute(session.db()?).await?;
    sqlx::query(MARK).bind(&hosts).bind(counts).execute(session.db()?).await?;
    let left: Vec<i64> = sqlx::query_scalar(LEFT).bind(&hosts).fetch_all(session.db()?).await?;
    session.commit().await?;
    Ok(left.into_iter().map(HostId).collect())
}

/// These hosts have left; their rows are held.
pub(super) async fn forget(session: &mut Session, hosts: &[i64]) -> Result<(), Failure> {
    sqlx::query("DELETE FROM laelaps.host_sign WHERE host = ANY($1)").bind(hosts).execute(session.db()?).await?;
    Ok(())
}
