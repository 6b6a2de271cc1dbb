//! Which plugin versions a host has served.

use std::collections::BTreeSet;

use super::rows::{ids, json};
use super::{MySql, failure};
use crate::{HostId, Result, Serves};

impl MySql {
    pub(super) async fn served_by(&self, host: HostId) -> Result<Vec<String>> {
        const SERVED: &str = "SELECT v.digest FROM laelaps_host_plugin AS p JOIN laelaps_plugin_version AS v ON v.id = p.plugin
            WHERE p.host = ? ORDER BY p.noted_at, v.digest";
        let read = self.runner.read_together("reading the plugin versions of a host", move |session| {
            Box::pin(async move {
                let digests: Vec<Vec<u8>> = sqlx::query_scalar(SERVED).bind(host.0).fetch_all(session.db()).await?;
                Ok(digests.iter().map(|digest| String::from_utf8_lossy(digest).into_owned()).collect())
            })
        });
        read.await
    }

    /// Note what a host serves from now on.
    pub(super) async fn note_service(&self, host: HostId, serves: &Serves) -> Result<()> {
        const HERE: &str = "SELECT COUNT(*) FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0";
        const NOTE: &str = "UPDATE laelaps_host SET serves = ? WHERE id = ? AND left_at = 0 AND ended_at = 0";
        let serves = serves.to_text();
        self.run("noting what a host serves", move |session| {
            let serves = serves.clone();
            Box::pin(async move {
                // A row that says the same already does not count as changed.
                let here: i64 = sqlx::query_scalar(HERE).bind(host.0).fetch_one(session.db()).await?;
                if here == 0 {
                    return Err(failure::unknown_host(host));
                }
                sqlx::query(NOTE).bind(serves.into_bytes()).bind(host.0).execute(session.db()).await?;
                Ok(())
            })
        })
        .await
    }

    /// Note which plugin versions a host serves from now on; those it served before stay noted.
    pub(super) async fn note_versions(&self, host: HostId, digests: &[String]) -> Result<()> {
        const HERE: &str = "SELECT COUNT(*) FROM laelaps_host WHERE id = ? AND left_at = 0 AND ended_at = 0";
        const NOTE: &str =
            concat!("INSERT IGNORE INTO laelaps_host_plugin (host, plugin, noted_at) SELECT ?, s.id, ? FROM ", ids!());
        let plugins = self.plugin_ids(digests.iter().map(String::as_str).collect::<BTreeSet<_>>()).await?;
        let plugins = json(plugins.into_values());
        self.run("noting plugin versions", move |session| {
            let plugins = plugins.clone();
            Box::pin(async move {
                let here: i64 = sqlx::query_scalar(HERE).bind(host.0).fetch_one(session.db()).await?;
                if here == 0 {
                    return Err(failure::unknown_host(host));
                }
                let now = session.now;
                sqlx::query(NOTE).bind(host.0).bind(now).bind(plugins).execute(session.db()).await?;
                Ok(())
            })
        })
        .await
    }
}
