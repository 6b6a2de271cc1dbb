//! The command line: one file per command. People get tables and sentences, programs JSON and exit codes; errors go to standard error
//! with their causes and a hint. docs/cli.md describes it.

mod cancel;
mod check;
mod completions;
mod debug;
#[cfg(feature = "demo")]
mod demo;
mod exit;
mod force_finish;
mod init;
mod json;
mod list;
mod output;
mod plugin;
mod retry;
mod run;
mod show;
mod stats;
mod submit;
mod watchdog;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use laelaps_queue::{Queue, TaskId};
use serde_json::json;

pub use exit::{Complaint, Exit};

use crate::config::{Config, Source};
use crate::{audit, fault, host};

/// A worker host: tasks from a database, handlers as WebAssembly components, replaced without a restart
#[derive(Debug, clap::Parser)]
#[command(name = "laelaps", version = fault::VERSION, after_help = exit::TABLE, max_term_width = 120)]
struct Arguments {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
}

/// Which configuration a command works with.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Configuration")]
pub(crate) struct Place {
    /// The configuration [default: config/laelaps.yml, else config/perfectqueue.yml]
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// The section of the configuration [default: LAELAPS_ENV, else RAILS_ENV, else development]
    #[arg(short, long, value_name = "ENV", global = true)]
    environment: Option<String>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Create the tables of the queue, or bring them up to date
    Init(init::Arguments),
    /// Serve: claim tasks and run them until a signal ends it
    Run(run::Arguments),
    /// Submit a task, or a file of tasks
    Submit(submit::Arguments),
    /// List tasks
    List(list::Arguments),
    /// Show a task with its data, output and attempts
    Show(show::Arguments),
    /// Finish a waiting or running task by hand
    #[command(alias = "force_finish", alias = "finish")]
    ForceFinish(force_finish::Arguments),
    /// Make a waiting task due now, or give a failed or cancelled one a new life
    Retry(retry::Arguments),
    /// Call a waiting or running task off
    Cancel(cancel::Arguments),
    /// Count what the queue holds
    Stats(stats::Arguments),
    /// Check the configuration, the database and the plugins without serving
    Check(check::Arguments),
    /// Look at plugins and try them out
    Plugin(plugin::Arguments),
    /// Be a master or a child of a WatchdogQueue on ZooKeeper, or look at one
    Watchdog(Box<watchdog::Arguments>),
    /// See it all at work: a temporary queue, a host, a plugin that is replaced while tasks flow
    #[cfg(feature = "demo")]
    Demo(demo::Arguments),
    /// Print the completions for a shell
    Completions(completions::Arguments),
    /// PerfectQueue's Ruby console
    #[command(hide = true)]
    Debug(debug::Arguments),
}

/// Parse, run, tell what went wrong, answer the exit code.
#[must_use]
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return exit::usage(&error),
    };
    match run_to_end(arguments) {
        Ok(exit) => exit.into(),
        Err(error) => exit::tell(&error),
    }
}

fn run_to_end(arguments: Arguments) -> anyhow::Result<Exit> {
    fault::arm().map_err(|problem| Complaint::new(Exit::Usage, problem, "unset it; it is for tests"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    // The commands are boxed: the largest of them would else make every one as large on the stack.
    let result = runtime.block_on(Box::pin(arguments.command.run(&arguments.place)));
    // A thread that a guest keeps to itself must not keep the program from ending.
    runtime.shutdown_background();
    result
}

impl Command {
    async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        match self {
            Self::Init(arguments) => arguments.run(place).await,
            Self::Run(arguments) => arguments.run(place).await,
            Self::Submit(arguments) => arguments.run(place).await,
            Self::List(arguments) => arguments.run(place).await,
            Self::Show(arguments) => arguments.run(place).await,
            Self::ForceFinish(arguments) => arguments.run(place).await,
            Self::Retry(arguments) => arguments.run(place).await,
            Self::Cancel(arguments) => arguments.run(place).await,
            Self::Stats(arguments) => arguments.run(place).await,
            Self::Check(arguments) => arguments.run(place).await,
            Self::Plugin(arguments) => arguments.run(place).await,
            Self::Watchdog(arguments) => arguments.run(place).await,
            #[cfg(feature = "demo")]
            Self::Demo(arguments) => demo::run(&arguments).await.map(|()| Exit::Done),
            Self::Completions(arguments) => arguments.run(),
            Self::Debug(arguments) => arguments.run(),
        }
    }
}

impl Place {
    fn source(&self) -> Source {
        Source { path: self.config.clone(), environment: self.environment.clone() }
    }

    fn load(&self) -> anyhow::Result<Config> {
        Ok(Config::load(&self.source())?)
    }

    /// Note in the configuration's audit log that a command changed something. One that cannot be written is warned of: what was done is done.
    fn note(config: &Config, command: &str, fields: serde_json::Value) {
        if let (Err(error), Some(path)) = (audit::command(config, command, fields), &config.audit_log) {
            exit::warn(&format!("the audit log {} cannot be written: {error}", path.display()));
        }
    }

    /// The configuration and the queue it names, which has to be there: only `init` makes one.
    async fn open(&self) -> anyhow::Result<(Config, Queue)> {
        let config = self.load()?;
        let queue = host::open_queue(&config).await?;
        Ok((config, queue))
    }
}

/// The name of a queue, for a command's argument.
fn queue(text: &str) -> Result<String, String> {
    laelaps_queue::check_queue(text).map(|()| text.to_owned())
}

/// The key of one task.
#[derive(Debug, clap::Args)]
struct Key {
    /// The key of the task
    #[arg(value_name = "KEY")]
    key: String,
}

/// One task, by its key or by its number.
#[derive(Debug, clap::Args)]
struct Which {
    /// The key of the task
    #[arg(value_name = "KEY", required_unless_present = "id")]
    key: Option<String>,
    /// The number of the task instead of its key, as `list` shows it: also of one that cannot be read
    #[arg(long, value_name = "N", conflicts_with = "key", allow_negative_numbers = true)]
    id: Option<i64>,
}

/// What names a task.
enum Name {
    Key(String),
    Id(TaskId),
}

impl Which {
    fn name(self) -> Name {
        // One of the two is there: the command line was refused otherwise.
        match self.id {
            Some(id) => Name::Id(TaskId(id)),
            None => Name::Key(self.key.unwrap_or_default()),
        }
    }
}

impl Name {
    /// For the audit log.
    fn fields(&self) -> serde_json::Value {
        match self {
            Self::Key(key) => json!({ "task": key }),
            Self::Id(id) => json!({ "task_id": id.0 }),
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Key(key) => write!(formatter, "task {key:?}"),
            Self::Id(id) => write!(formatter, "task number {}", id.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::Arguments;

    #[test]
    fn the_definition_of_the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
