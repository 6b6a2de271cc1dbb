//! `laelaps cancel`.

use serde_json::json;

use super::output::Output;
use super::{Exit, Key, Place};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    task: Key,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (config, queue) = place.open().await?;
        queue.backend().cancel(&self.task.key, config.queue.policy.retention).await?;
        queue.backend().close().await;
        Place::note(&config, "cancel", json!({ "task": self.task.key }));
        let mut output = Output::open();
        output.line(&format!("task {:?} is cancelled", self.task.key))?;
        output.close()?;
        Ok(Exit::Done)
    }
}
