//! How `laelaps watchdog` reaches ZooKeeper.

use std::path::PathBuf;
use std::time::Duration;

use laelaps_watchdog::{Access, Digest, Options};

use super::super::{Complaint, Exit};
use crate::config;

/// The variable that names the servers; the command under a timer gets it, too.
pub(super) const SERVERS_VARIABLE: &str = "LAELAPS_WATCHDOG_SERVERS";

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "ZooKeeper")]
pub(super) struct Servers {
    /// The servers: HOST:PORT separated by commas, with a chroot behind the last one if wanted
    #[arg(long, value_name = "LIST", env = SERVERS_VARIABLE, hide_env_values = true, global = true)]
    servers: Option<String>,
    /// How long the servers keep the session without a sign of life, 100 ms to 1 h
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = config::duration_argument, global = true)]
    session_timeout: Duration,
    /// A file with USER:PASSWORD of ZooKeeper's scheme `digest`
    #[arg(long, value_name = "FILE", global = true)]
    digest_file: Option<PathBuf>,
    /// Who may use the nodes that are made: `everybody`, `ourselves` or SCHEME:ID:PERMISSIONS,...
    #[arg(long, value_name = "LIST", default_value = "everybody", global = true)]
    access: String,
}

impl Servers {
    /// How to connect.
    pub(super) fn options(&self) -> anyhow::Result<Options> {
        let servers = self.list()?;
        let digest = match &self.digest_file {
            Some(path) => vec![read_digest(path)?],
            None => Vec::new(),
        };
        let access = Access::parse(&self.access)?;
        Ok(Options { session_timeout: self.session_timeout, digest, access, ..Options::new(servers) })
    }

    /// The server list.
    pub(super) fn list(&self) -> Result<&str, Complaint> {
        let missing = || {
            let hint = format!("add --servers HOST:PORT,..., or set {SERVERS_VARIABLE}");
            Complaint::new(Exit::Usage, "no ZooKeeper servers are named", hint)
        };
        self.servers.as_deref().ok_or_else(missing)
    }
}

fn read_digest(path: &std::path::Path) -> anyhow::Result<Digest> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        let hint = "the file holds one line, USER:PASSWORD, and this user may read it";
        Complaint::new(Exit::Usage, format!("{}: cannot be read: {error}", path.display()), hint)
    })?;
    Ok(Digest::parse(text.trim_end_matches(['\n', '\r']))?)
}
