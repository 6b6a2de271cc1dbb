//! Which plugin versions a host has served.

use super::MySql;
use crate::{HostId, Result};

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
}
