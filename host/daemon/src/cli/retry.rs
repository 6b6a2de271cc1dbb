//! `laelaps retry`.

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
        let name = self.task.name();
        match &name {
            Name::Key(key) => queue.backend().retry(key).await?,
            Name::Id(id) => queue.backend().retry_by_id(*id).await?,
        }
        queue.backend().close().await;
        Place::note(&config, "retry", name.fields());
        let mut output = Output::open();
        output.line(&format!("{name} may run now"))?;
        output.close()?;
        Ok(Exit::Done)
    }
}
