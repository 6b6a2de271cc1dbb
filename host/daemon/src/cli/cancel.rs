//! `laelaps cancel`.

use super::output::Output;
use super::{Exit, Name, Place, Which};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    task: Which,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (config, queue) = place.open().await?;
        let (backend, retention) = (queue.backend(), config.queue.policy.retention);
        let name = self.task.name();
        let is_left = match &name {
            Name::Key(key) => backend.cancel(key, retention).await.map(|()| true)?,
            Name::Id(id) => {
                backend.cancel_by_id(*id, retention).await?;
                backend.get_by_id(*id).await?.is_some()
            }
        };
        backend.close().await;
        Place::note(&config, "cancel", name.fields());
        let mut output = Output::open();
        output.line(&format!("{name} is {}", if is_left { "cancelled" } else { "removed" }))?;
        output.close()?;
        Ok(Exit::Done)
    }
}
