//! Which plugin versions a host has served.

use super::failure::Failure;
use super::session::Session;
use crate::HostId;

pub(super) async fn served_by(session: &mut Session, host: HostId) -> Result<Vec<String>, Failure> {
    const SERVED: &str =
        "SELECT digest FROM laelaps.host_plugin JOIN laelaps.plugin_version ON plugin_version.id = host_plugin.plugin
        WHERE host = $1 ORDER BY noted_at, digest";
    Ok(sqlx::query_scalar(SERVED).bind(host.0).fetch_all(session.db()?).await?)
}
