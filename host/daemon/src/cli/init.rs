//! `laelaps init`.

use anyhow::Context as _;
use laelaps_queue::{Config, Database, Migration, PlannedStep, Queue};
use serde_json::json;

use super::output::Output;
use super::{Exit, Place, exit};
use crate::start::{self, News};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the SQL that would be run, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Wait for a database that cannot be reached, however long it takes, instead of `pq_connect_timeout`
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let config = place.load()?;
        if self.dry_run {
            return dry_run(&config.queue).await;
        }
        let migration = if self.wait { made_in_time(&config.queue).await? } else { made(&config.queue).await? };
        Place::note(&config, "init", json!({ "schema": migration.version, "steps": migration.applied.len() }));
        let mut output = Output::open();
        output.line(&match (migration.from, migration.applied.as_slice()) {
            (_, []) => format!("the queue is ready: schema {} was there already", migration.version),
            (0, _) => format!("the queue is ready: schema {}", migration.version),
            (from, _) => format!("the queue is ready: schema {}, brought up to date from {from}", migration.version),
        })?;
        output.close()?;
        Ok(Exit::Done)
    }
}

async fn made(config: &Config) -> anyhow::Result<Migration> {
    let queue = Queue::open(config).await?;
    let migration = queue.backend().init().await;
    queue.backend().close().await;
    migration.with_context(|| format!("cannot make the tables in {}", config.place()))
}

/// As [`made`], once the database is there.
async fn made_in_time(config: &Config) -> anyhow::Result<Migration> {
    let short = start::impatient(config);
    let look = async || {
        // What is wrong is known at once, and the tables are made with all patience.
        Queue::open(&short).await?.backend().close().await;
        made(config).await
    };
    let tell = |news: News<'_>| {
        if let News::Reason(error, waited) = news {
            let hint = start::hint(error);
            exit::warn(&format!("waiting for the database, for {} s so far: {error:#} ({hint})", waited.as_secs()));
        }
    };
    start::until_there(look, tell).await
}

async fn dry_run(config: &Config) -> anyhow::Result<Exit> {
    let mut output = Output::open();
    // Opening a file that is not there would make one: a new one elsewhere has the same way to go.
    let steps = match config.database()? {
        Database::Sqlite(path) if !path.exists() => {
            let folder = tempfile::tempdir()?;
            let url = format!("sqlite:{}", folder.path().join("queue.db").display());
            plan(&Config { url, ..config.clone() }).await?
        }
        _ => plan(config).await?,
    };
    if steps.is_empty() {
        output.line("-- nothing to do: the tables are there already")?;
    }
    for PlannedStep { version, oldest_program, sql } in steps {
        output.line(&format!("-- {}: to schema {version}", config.place()))?;
        if version > 1 && oldest_program == version {
            output.line("-- stop the hosts and producers of older programs first: they cannot work on it")?;
        } else if version > 1 {
            output.line(&format!("-- programs that know schema {oldest_program} go on working"))?;
        }
        output.line(sql.trim_end())?;
    }
    output.close()?;
    Ok(Exit::Done)
}

async fn plan(config: &Config) -> anyhow::Result<Vec<PlannedStep>> {
    let queue = Queue::open(config).await?;
    let plan = queue.backend().plan().await;
    queue.backend().close().await;
    plan.with_context(|| format!("cannot plan the tables in {}", config.place()))
}
