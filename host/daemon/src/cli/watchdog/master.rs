//! A master's calls, one command each.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use laelaps_watchdog::{NewQueue, PERL_BYTES_MAX, TimerAge};
use serde_json::{Map, Value, json};

use super::super::output::{Output, counted, in_one_line, table};
use super::super::{Complaint, Exit, Place, exit};
use super::servers::Servers;
use super::{RootPath, TIMER, close};
use crate::config;
use crate::intake::insert_bytes;

/// Bytes of a file of items at most.
const FILE_BYTES_MAX: u64 = 256 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct CreateQueue {
    #[command(flatten)]
    root: RootPath,
    /// The items
    #[arg(value_name = "ITEM")]
    items: Vec<String>,
    /// A file with an item on each line, after those of the command line; - for standard input
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Make the start barrier, which the first child that creates a timer removes
    #[arg(long)]
    sync_start: bool,
    /// Make the missing nodes above the root, too
    #[arg(long)]
    parents: bool,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl CreateQueue {
    pub(super) async fn run(self, servers: &Servers, place: &Place) -> anyhow::Result<Exit> {
        let mut items: Vec<Vec<u8>> = self.items.into_iter().map(String::into_bytes).collect();
        if let Some(path) = &self.file {
            items.extend(lines_of(path)?);
        }
        let count = items.len() as u64;
        let new = NewQueue { items, sync_start: self.sync_start, parents: self.parents };
        let mut queue = self.root.connect(servers).await?;
        // How long a child may go without a kick is no part of the queue: check-timers and get-timers say it.
        let cut = queue.create_queue(&new, Duration::MAX).await? as u64;
        close(queue).await;
        note(place, "watchdog create-queue", &self.root.root);
        if cut > 0 {
            let items = counted(cut, "item");
            exit::warn(&format!("{items} of more than {PERL_BYTES_MAX} bytes: a child that uses the Perl module gets that cut"));
        }
        let mut output = Output::open();
        if self.json {
            output.json(&json!({ "root": self.root.root, "items": count, "cut_for_perl": cut, "barrier": self.sync_start }))?;
        } else {
            let barrier = if self.sync_start { " and its barrier" } else { "" };
            output.line(&format!("made {} with {}{barrier}", self.root.root, counted(count, "item")))?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

/// The lines of a file, without their ends.
fn lines_of(path: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let name = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let unreadable = |error: std::io::Error| {
        Complaint::new(Exit::Usage, format!("{name}: cannot be read: {error}"), "name a file with an item on each line")
    };
    let mut bytes = Vec::new();
    let read = match path.to_str() {
        Some("-") => std::io::stdin().take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes),
        _ => std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)),
    };
    if read.map_err(unreadable)? as u64 > FILE_BYTES_MAX {
        let message = format!("{name}: larger than {} MiB", FILE_BYTES_MAX >> 20);
        return Err(Complaint::new(Exit::Usage, message, "put the data elsewhere, and its name into the items").into());
    }
    let mut lines: Vec<Vec<u8>> = bytes.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    // What follows the last line end is no line.
    if lines.last().is_some_and(Vec::is_empty) {
        lines.pop();
    }
    Ok(lines)
}

#[derive(Debug, clap::Args)]
pub(super) struct Attach {
    #[command(flatten)]
    root: RootPath,
}

impl Attach {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let mut queue = self.root.connect(servers).await?;
        queue.attach_queue(Duration::MAX).await?;
        close(queue).await;
        let mut output = Output::open();
        output.line(&format!("{} is there", self.root.root))?;
        output.close()?;
        Ok(Exit::Done)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct WaitSync {
    #[command(flatten)]
    root: RootPath,
    /// How long to wait
    #[arg(long, value_name = "TIME", default_value = "120", value_parser = config::duration_argument)]
    wait: Duration,
}

impl WaitSync {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let mut queue = self.root.connect(servers).await?;
        // A root that is not there has no barrier either, and nothing has begun.
        queue.attach_queue(Duration::MAX).await?;
        let begun = queue.wait_sync(self.wait).await?;
        close(queue).await;
        if begun {
            return Ok(Exit::Done);
        }
        anstream::eprintln!("no child has begun within {:?}", self.wait);
        Ok(Exit::No)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct QueueCount {
    #[command(flatten)]
    root: RootPath,
}

impl QueueCount {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let queue = self.root.connect(servers).await?;
        let count = queue.queue_count().await?;
        close(queue).await;
        let mut output = Output::open();
        output.line(&count.to_string())?;
        output.close()?;
        Ok(Exit::Done)
    }
}

/// When a timer counts as expired.
#[derive(Debug, clap::Args)]
struct Limit {
    /// How long a child may go without a kick
    #[arg(long, value_name = "TIME", default_value = TIMER, value_parser = config::duration_argument)]
    timer: Duration,
}

#[derive(Debug, clap::Args)]
pub(super) struct CheckTimers {
    #[command(flatten)]
    root: RootPath,
    #[command(flatten)]
    limit: Limit,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl CheckTimers {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let mut queue = self.root.connect(servers).await?;
        queue.attach_queue(self.limit.timer).await?;
        let count = queue.check_timers().await?;
        close(queue).await;
        let mut output = Output::open();
        if self.json {
            output.json(&json!({ "timers": count.alive, "expired": count.expired }))?;
        } else {
            output.line(&format!("{}, {} of them expired", counted(count.alive as u64, "timer"), count.expired))?;
        }
        output.close()?;
        Ok(if count.expired == 0 { Exit::Done } else { Exit::No })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct GetTimers {
    #[command(flatten)]
    root: RootPath,
    #[command(flatten)]
    limit: Limit,
    /// Only those not kicked in time
    #[arg(long)]
    expired: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

impl GetTimers {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let mut queue = self.root.connect(servers).await?;
        queue.attach_queue(self.limit.timer).await?;
        let timers = queue.get_timers(self.expired).await?;
        close(queue).await;
        let mut output = Output::open();
        if self.json {
            for timer in &timers {
                output.json(&timer_json(timer))?;
            }
        } else {
            write_timers(&mut output, &timers)?;
            output.line(&format!("{} entries.", timers.len()))?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

/// A timer for programs.
pub(super) fn timer_json(timer: &TimerAge) -> Value {
    let mut members = Map::new();
    insert_bytes(&mut members, "process", &timer.process);
    members.insert("timer".to_owned(), timer.name.as_str().into());
    members.insert("age_seconds".to_owned(), timer.age.as_secs_f64().into());
    members.insert("expired".to_owned(), timer.expired.into());
    members.insert("session".to_owned(), timer.session.to_string().into());
    members.into()
}

/// Timers for people; nothing if there are none.
pub(super) fn write_timers(output: &mut Output, timers: &[TimerAge]) -> std::io::Result<()> {
    if timers.is_empty() {
        return Ok(());
    }
    let mut rows = table(&["process", "timer", "last kick", "expired", "session"]);
    for timer in timers {
        rows.add_row([
            in_one_line(&timer.process_name(), 255),
            timer.name.clone(),
            ago(timer.age),
            if timer.expired { "yes" } else { "no" }.to_owned(),
            timer.session.to_string(),
        ]);
    }
    output.table(&rows)
}

/// How long ago, in seconds.
pub(super) fn ago(age: Duration) -> String {
    format!("{}.{:03} s ago", age.as_secs(), age.subsec_millis())
}

#[derive(Debug, clap::Args)]
pub(super) struct ClearTimers {
    #[command(flatten)]
    root: RootPath,
}

impl ClearTimers {
    pub(super) async fn run(self, servers: &Servers, place: &Place) -> anyhow::Result<Exit> {
        let queue = self.root.connect(servers).await?;
        let deleted = queue.clear_timers().await?;
        close(queue).await;
        note(place, "watchdog clear-timers", &self.root.root);
        let mut output = Output::open();
        output.line(&format!("deleted {} of {}", counted(deleted as u64, "node"), self.root.root))?;
        output.close()?;
        Ok(Exit::Done)
    }
}

/// These commands need no configuration. If there is one all the same, its audit log hears of them.
fn note(place: &Place, command: &str, root: &str) {
    if let Ok(config) = place.load() {
        Place::note(&config, command, json!({ "root": root }));
    }
}
