//! `laelaps submit`: one task, or a file of tasks.

mod file;
mod line;

use std::io::Read as _;
use std::path::PathBuf;

use laelaps_queue::{Compression, NewTask, Submitted, Timestamp};

use super::output::Output;
use super::{Complaint, Exit, Place};

#[derive(Debug, clap::Args)]
#[command(
    after_help = "A file holds one JSON object a line: {\"key\": ..., \"type\": ..., \"data\": {...}} and, if wanted, queue, user, run_at, \
                        priority, max_running, max_attempts and gzip. Lines that cannot be submitted are named and passed over; a key that exists counts as submitted, so a \
                        mended file can be submitted again as a whole."
)]
pub(super) struct Arguments {
    /// The key, unique in the queue: 1 to 255 bytes
    #[arg(required_unless_present = "file")]
    key: Option<String>,
    /// The type, which chooses the route: 1 to 255 bytes
    #[arg(value_name = "TYPE", required_unless_present = "file")]
    task_type: Option<String>,
    /// The data: a JSON object, or - to read it from standard input
    #[arg(required_unless_present = "file")]
    data: Option<String>,
    /// Submit every line of a JSON Lines file; - reads standard input
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["key", "task_type", "data"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    /// A key that exists is no failure
    #[arg(long, conflicts_with = "file")]
    if_new: bool,
    /// Only check the lines; submit nothing
    #[arg(long, requires = "file")]
    dry_run: bool,
}

/// What a producer may say about a task; with --file, about the lines that do not say it.
#[derive(Clone, Debug, Default, clap::Args)]
struct Options {
    /// The queue in which it waits: 1 to 64 letters, digits and characters out of _-.:/ [default: default]
    #[arg(long, value_name = "QUEUE", value_parser = super::queue)]
    queue: Option<String>,
    /// On whose account it runs
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Not before this moment: seconds since 1970, a time such as 2026-12-24T18:00:00Z, or a date (its beginning in UTC)
    #[arg(short = 't', long, value_name = "UNIXTIME", value_parser = line::moment_from_text, allow_negative_numbers = true)]
    run_at: Option<Timestamp>,
    /// From -100 to 100: of a user's tasks, and of those without user, the smaller runs first [default: 0]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(i32).range(-100..=100), allow_negative_numbers = true)]
    priority: Option<i32>,
    /// The most tasks of this user at once
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    max_running: Option<u32>,
    /// The most attempts before it fails
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), allow_negative_numbers = true)]
    max_attempts: Option<u32>,
    /// Store the data compressed
    #[arg(long)]
    gzip: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        match (self.file, self.key, self.task_type, self.data) {
            (Some(file), ..) if self.dry_run => file::check(&file, &self.options),
            (Some(file), ..) => file::submit(&file, &self.options, place).await,
            (None, Some(key), Some(task_type), Some(data)) => {
                if self.options.max_running.is_some() && self.options.user.is_none() {
                    let message = "found --max-running without --user: it limits the tasks of a user";
                    return Err(Complaint::new(Exit::Usage, message, "add -u USER, or leave --max-running out").into());
                }
                let task = self.options.task(key, task_type, data_bytes(data)?);
                submit_one(task, self.if_new, place).await
            }
            // clap has asked for them.
            _ => Err(Complaint::new(Exit::Usage, "found no task, expected KEY TYPE DATA", "or --file FILE").into()),
        }
    }
}

impl Options {
    fn task(&self, key: String, task_type: String, data: Vec<u8>) -> NewTask {
        NewTask {
            run_at: self.run_at,
            queue: self.queue.clone(),
            user: self.user.clone(),
            priority: self.priority.unwrap_or(0),
            max_running: self.max_running,
            max_attempts: self.max_attempts,
            compression: if self.gzip { Compression::Gzip } else { Compression::None },
            ..NewTask::new(key, task_type, data)
        }
    }
}

async fn submit_one(task: NewTask, if_new: bool, place: &Place) -> anyhow::Result<Exit> {
    task.check()?;
    let (_, queue) = place.open().await?;
    let answers = queue.backend().submit(std::slice::from_ref(&task)).await?;
    queue.backend().close().await;
    let mut output = Output::open();
    match answers.first() {
        Some(Submitted::AlreadyExists) if !if_new => {
            let message = format!("a task with the key {:?} exists already; nothing was changed", task.key);
            let hint = "`laelaps show KEY` shows it; with --if-new this is no failure";
            return Err(Complaint::new(Exit::WrongState, message, hint).into());
        }
        Some(Submitted::AlreadyExists) => output.line(&format!("task {:?} exists already", task.key))?,
        _ => output.line(&format!("task {:?} is submitted", task.key))?,
    }
    output.close()?;
    Ok(Exit::Done)
}

/// The bytes of a DATA argument, `-` standing for standard input.
pub(super) fn data_bytes(data: String) -> anyhow::Result<Vec<u8>> {
    if data != "-" {
        return Ok(data.into_bytes());
    }
    // One byte more than a task may have, so that too much is told as such.
    let mut bytes = Vec::new();
    std::io::stdin().lock().take(NewTask::DATA_BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}
