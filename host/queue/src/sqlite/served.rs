//! Which plugin versions a host has served.

use super::Sqlite;
use crate::{HostId, Result};

impl Sqlite {
    pub(super) async fn served_by(&self, host: HostId) -> Result<Vec<String>> {
        const SERVED: &str =
            "SELECT plugin_version.digest FROM host_plugin JOIN plugin_version ON plugin_version.id = host_plugin.plugin
            WHERE host_plugin.host = ?1 ORDER BY host_plugin.noted_at, plugin_version.digest";
        let read = sqlx::query_scalar(SERVED).bind(host.0).fetch_all(&self.readers).await;
        read.map_err(self.reading("reading the plugin versions of a host"))
    }
}
