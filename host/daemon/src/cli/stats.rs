//! `laelaps stats`.

use laelaps_queue::Stats;

use super::output::{Output, in_one_line, table};
use super::{Exit, Place};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (_, queue) = place.open().await?;
        let stats = queue.backend().stats().await?;
        queue.backend().close().await;
        let mut output = Output::open();
        if self.json {
            output.json(&stats)?;
        } else {
            write(&mut output, &stats)?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

fn write(output: &mut Output, stats: &Stats) -> std::io::Result<()> {
    let oldest =
        stats.oldest_ready_ms.map(|age| format!("   the oldest for {}.{:03} s", age / 1_000, age % 1_000)).unwrap_or_default();
    let rows = [
        ("ready", stats.ready, oldest.as_str()),
        ("scheduled", stats.scheduled, ""),
        ("running", stats.running, ""),
        ("finished", stats.finished, ""),
        ("failed", stats.failed, ""),
        ("cancelled", stats.cancelled, ""),
    ];
    for (name, count, note) in rows {
        output.line(&format!("{name:<11}{count}{note}"))?;
    }
    if !stats.types.is_empty() {
        output.line("")?;
        let mut table = table(&["type", "waiting or running"]);
        for (task_type, count) in &stats.types {
            table.add_row([in_one_line(task_type, 255), count.to_string()]);
        }
        output.table(&table)?;
    }
    Ok(())
}
