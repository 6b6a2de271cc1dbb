//! A look at any node.

use laelaps_watchdog::Session;
use serde_json::{Map, json};

use super::super::Exit;
use super::super::output::Output;
use super::servers::Servers;
use crate::intake::insert_bytes;

#[derive(Debug, clap::Args)]
pub(super) struct CheckExists {
    /// The path of the node
    #[arg(value_name = "PATH")]
    path: String,
}

impl CheckExists {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let session = Session::connect(&servers.options()?).await?;
        let there = session.check_exists(&self.path).await?;
        session.close().await;
        Ok(if there { Exit::Done } else { Exit::No })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct FetchNode {
    /// The path of the node
    #[arg(value_name = "PATH")]
    path: String,
    /// One JSON object, with the node's history
    #[arg(long)]
    json: bool,
}

impl FetchNode {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let session = Session::connect(&servers.options()?).await?;
        let node = session.fetch_node(&self.path).await?;
        session.close().await;
        let mut output = Output::open();
        if self.json {
            let mut members = Map::new();
            insert_bytes(&mut members, "data", &node.data);
            members.insert("version".to_owned(), node.version.into());
            members.insert("children".to_owned(), node.children.into());
            members.insert("created_ms".to_owned(), node.created_ms.into());
            members.insert("modified_ms".to_owned(), node.modified_ms.into());
            members.insert("session".to_owned(), json!(node.owner.map(|owner| owner.to_string())));
            output.json(&members)?;
        } else {
            output.bytes(&node.data)?;
            output.bytes(b"\n")?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}
