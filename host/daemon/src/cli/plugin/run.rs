//! `laelaps plugin run`: one attempt of one task, as a host would run it, without a host.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use laelaps_queue::{
    ClaimedTask, Compression, Descent, Event, Lease, LeaseAnswer, LeaseRef, NewTask, Progress, TaskId, Timestamp,
};
use serde_json::{Map, Value};

use super::super::output::{Output, in_one_line, printable};
use super::{Complaint, Exit, read};
use crate::config;
use crate::plugin::{
    Completion, Config, Control, Engine, FolderGrant, FollowUps, Grants, Invocation, Keys, Level, Limits, Queues, Services,
    Stream, Types, Users, Version, nested, scan,
};

/// The name under which a module is served here whose file has none that a plugin may have.
const NAME: &str = "plugin";

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The handler's output goes to standard output, all else to standard error. Nothing is granted unless it is named here, except \
                  follow-up tasks of the same type."
)]
pub(super) struct Arguments {
    /// The module
    file: PathBuf,
    /// The type of the task
    #[arg(short, long, alias = "type", value_name = "TYPE")]
    kind: String,
    /// The data: a JSON object, or - to read it from standard input
    #[arg(short, long, value_name = "JSON", default_value = "{}")]
    data: String,
    /// The key of the task
    #[arg(long, default_value = "local")]
    key: String,
    /// The user of the task
    #[arg(short, long)]
    user: Option<String>,
    /// The queue of the task
    #[arg(long, value_name = "QUEUE", default_value = NewTask::DEFAULT_QUEUE, value_parser = crate::cli::queue)]
    queue: String,
    /// The number of the attempt
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    attempt: u32,
    /// The most memory it may use
    #[arg(long, value_name = "SIZE", default_value = "64MiB", value_parser = config::size_argument)]
    memory: u64,
    /// The longest it may take [default: unlimited]
    #[arg(long, value_name = "TIME", value_parser = config::duration_argument)]
    time_limit: Option<Duration>,
    /// A setting (may be given several times)
    #[arg(long = "setting", value_name = "NAME=VALUE", value_parser = pair)]
    settings: Vec<(String, String)>,
    /// A folder that it may read (may be given several times)
    #[arg(long = "folder", value_name = "FOLDER=/GUEST", value_parser = pair)]
    folders: Vec<(String, String)>,
    /// A folder that it may read and write (may be given several times)
    #[arg(long = "writable-folder", value_name = "FOLDER=/GUEST", value_parser = pair)]
    writable_folders: Vec<(String, String)>,
    /// A variable of the environment, given away with its value (may be given several times)
    #[arg(long = "env", value_name = "NAME")]
    variables: Vec<String>,
    /// A type of the follow-up tasks it may submit, or any (may be given several times) [default: TYPE]
    #[arg(long = "follow-up-type", value_name = "TYPE")]
    follow_up_types: Vec<String>,
    /// How the keys of its follow-up tasks begin, or any [default: the module's name and /; keys that extend KEY are always taken]
    #[arg(long, value_name = "PREFIX")]
    follow_up_keys: Option<String>,
    /// Let it submit follow-up tasks on any user's account
    #[arg(long)]
    follow_ups_of_any_user: bool,
    /// A queue of the follow-up tasks it may submit beside QUEUE, or any (may be given several times)
    #[arg(long = "follow-up-queue", value_name = "QUEUE", value_parser = crate::cli::queue)]
    follow_up_queues: Vec<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, value)| !name.is_empty() && !value.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "expected NAME=VALUE".to_owned())
}

impl Arguments {
    pub(super) async fn run(self) -> anyhow::Result<Exit> {
        let task = self.task()?;
        let grants = self.grants()?;
        let bytes = read(&self.file)?;
        let (engine, version) = self.serve(&bytes).await?;
        let mut settings = self.settings.clone();
        settings.sort();
        let completion = engine
            .invoke(Invocation {
                version,
                task: task.clone(),
                limits: Limits { memory_bytes: self.memory, time: self.time_limit, ..Limits::default() },
                grants,
                settings: settings.into(),
                max_requests: None,
                route: 0,
                log_level: Level::Trace,
                control: Arc::new(Control::new()),
                services: Arc::new(Local::new(&task)),
            })
            .await;
        tell(&completion)
    }

    /// Let the module through the same door as a host: read, compiled, linked and tried.
    async fn serve(&self, bytes: &[u8]) -> anyhow::Result<(Arc<Engine>, Arc<Version>)> {
        let engine = Engine::new(&Config {
            memory_bytes_max: self.memory.max(Limits::default().memory_bytes),
            instances_max: 2,
            ..Config::default()
        })?;
        let version = engine.load(self.name(), bytes).await.map_err(|error| {
            let message = format!("{}: {}", self.file.display(), printable(&error.to_string()));
            Complaint::new(Exit::Plugin, message, "`laelaps plugin inspect FILE` shows what it imports and exports")
        })?;
        Ok((engine, version))
    }

    /// The name under which a plugin folder would have it.
    fn name(&self) -> &str {
        let stem = self.file.file_stem().and_then(|stem| stem.to_str());
        stem.filter(|name| scan::is_name(name)).unwrap_or(NAME)
    }

    fn follow_ups(&self) -> FollowUps {
        let mut follow_ups = FollowUps::default();
        if self.follow_up_types.iter().any(|name| name == "any") {
            follow_ups.types = Types::Any;
        } else if !self.follow_up_types.is_empty() {
            follow_ups.types = Types::Listed(self.follow_up_types.clone());
        }
        match self.follow_up_keys.as_deref() {
            Some("any") => follow_ups.keys = Keys::Any,
            Some(prefix) => follow_ups.keys = Keys::Prefix(prefix.to_owned()),
            None => {}
        }
        if self.follow_ups_of_any_user {
            follow_ups.users = Users::Any;
        }
        if self.follow_up_queues.iter().any(|name| name == "any") {
            follow_ups.queues = Queues::Any;
        } else if !self.follow_up_queues.is_empty() {
            follow_ups.queues = Queues::Listed(self.follow_up_queues.clone());
        }
        follow_ups
    }

    fn task(&self) -> anyhow::Result<ClaimedTask> {
        let data = super::super::submit::data_bytes(self.data.clone())?;
        let new =
            NewTask { user: self.user.clone(), queue: Some(self.queue.clone()), ..NewTask::new(&self.key, &self.kind, data) };
        new.check()?;
        let now = now();
        Ok(ClaimedTask {
            lease_ref: LeaseRef { task: TaskId(1), lease: Lease(1) },
            key: new.key,
            queue: self.queue.clone(),
            task_type: new.task_type,
            data: new.data,
            user: new.user,
            max_running: None,
            descent: Descent { root: TaskId(1), depth: 0 },
            compression: Compression::None,
            attempt: self.attempt,
            max_attempts: None,
            lost: 0,
            lost_alone: 0,
            alone: false,
            releases: 0,
            created_at: now,
            claimed_at: now,
            until: now.plus(Duration::from_secs(300)),
        })
    }

    fn grants(&self) -> anyhow::Result<Grants> {
        let read_only = self.folders.iter().map(|(host, guest)| FolderGrant::read_only(host, guest));
        let writable = self.writable_folders.iter().map(|(host, guest)| FolderGrant::writable(host, guest));
        let folders = read_only.chain(writable).collect();
        let mut grants = Grants { folders, environment: Vec::new(), follow_ups: self.follow_ups() };
        let all: Vec<&FolderGrant> = grants.folders.iter().collect();
        if let Some((inner, outer)) = nested(&all).first() {
            let [inner, outer] = [inner, outer].map(|place| grants.folders[*place].host.display().to_string());
            let message = format!("the granted folder {inner} lies within {outer}, to which the handler may write");
            return Err(Complaint::new(Exit::Usage, message, "name folders that do not lie within each other").into());
        }
        for grant in &*grants.folders {
            if !grant.host.is_dir() {
                let message = format!("the granted folder {} does not exist", grant.host.display());
                return Err(Complaint::new(Exit::Usage, message, "name an existing folder: --folder FOLDER=/GUEST").into());
            }
        }
        for name in &self.variables {
            let value = config::environment_variable(name).ok_or_else(|| {
                Complaint::new(Exit::Usage, format!("the environment variable {name} is not set"), "set it, or leave --env out")
            })?;
            grants.environment.push((name.clone(), value));
        }
        Ok(grants)
    }
}

/// What a host would do for the attempt, without a database behind it.
struct Local {
    kind: String,
    data: Mutex<Map<String, Value>>,
}

impl Local {
    fn new(task: &ClaimedTask) -> Self {
        Self { kind: task.task_type.clone(), data: Mutex::new(serde_json::from_slice(&task.data).unwrap_or_default()) }
    }
}

#[async_trait]
impl Services for Local {
    async fn heartbeat(&self, progress: Option<Progress>, _alive_time: Option<Duration>) -> bool {
        if let Some(progress) = progress {
            let total = progress.total.map(|total| format!(" of {total}")).unwrap_or_default();
            anstream::eprintln!("progress: {}{total} {}", progress.done, in_one_line(&progress.note, 200));
        }
        true
    }

    async fn update_data(&self, members: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error> {
        let members: Map<String, Value> =
            serde_json::from_slice(&members).map_err(|error| laelaps_queue::Error::InvalidTask {
                key: "local".to_owned(),
                problem: format!("the members to merge are not a JSON object: {error}"),
            })?;
        let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        data.extend(members);
        anstream::eprintln!("data: {}", in_one_line(&Value::Object(data.clone()).to_string(), 1_000));
        Ok(LeaseAnswer::Held)
    }

    async fn now(&self) -> Timestamp {
        now()
    }

    async fn relatives(&self, _limit: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        Ok(Some(0))
    }

    fn count_follow_up(&self, most: u32) -> bool {
        // An attempt alone: its route's number of follow-ups is less.
        most > 0
    }

    fn leads_here(&self, task_type: &str) -> bool {
        task_type == self.kind
    }
}

/// There is no database whose clock could be asked.
fn now() -> Timestamp {
    Timestamp(jiff::Timestamp::now().as_millisecond())
}

fn tell(completion: &Completion) -> anyhow::Result<Exit> {
    let captured = &completion.captured;
    for (index, line) in captured.lines.iter().enumerate() {
        if index == captured.lines_before_gap && captured.dropped_lines > 0 {
            anstream::eprintln!("... {} lines and {} bytes are left out ...", captured.dropped_lines, captured.dropped_bytes);
        }
        let from = match line.stream {
            Stream::Log => format!("{:?}", line.level).to_lowercase(),
            Stream::Stdout => "stdout".to_owned(),
            Stream::Stderr => "stderr".to_owned(),
        };
        anstream::eprintln!("{from}: {}", printable(&line.text));
    }
    for task in &completion.follow_ups {
        let data = String::from_utf8_lossy(&task.data);
        anstream::eprintln!("submitted: {:?} of type {:?}: {}", task.key, task.task_type, in_one_line(&data, 200));
    }
    if let Event::Finish { output: bytes, .. } = &completion.event {
        let mut output = Output::open();
        output.bytes(bytes.as_deref().unwrap_or_default())?;
        if std::io::IsTerminal::is_terminal(&std::io::stdout()) {
            output.line("")?;
        }
        output.close()?;
        anstream::eprintln!("finished; at most {} KiB of memory", completion.memory_bytes_peak.div_ceil(1_024));
        return Ok(Exit::Done);
    }
    Err(Complaint { exit: Exit::Plugin, message: in_words(&completion.event), hint: None }.into())
}

fn in_words(event: &Event) -> String {
    let after = |delay: &Option<Duration>| delay.map(|delay| format!(" after {delay:?}")).unwrap_or_default();
    match event {
        Event::Finish { .. } => "the handler finished the task".to_owned(),
        Event::Retry { delay } => format!("the handler asks for another attempt{}", after(delay)),
        Event::Release { delay } => format!("the handler releases the task{}", after(delay)),
        Event::Failure { kind, code, message } => {
            format!("the handler failed ({kind:?}) with {}: {}", printable(code), printable(message))
        }
        Event::Trap { message } => format!("the handler trapped: {}", printable(message)),
        Event::TimedOut { limit } => format!("the handler was stopped at its time limit of {limit:?}"),
        Event::OutOfMemory { limit_bytes } => format!("the handler needs more memory than its limit of {limit_bytes} bytes"),
        Event::Malformed { message } => format!("the handler breaks the contract: {}", printable(message)),
        Event::Stopped => "the attempt was stopped".to_owned(),
        Event::Unrouted { message } | Event::Quarantined { message } => message.clone(),
        Event::Lost | Event::Overdue => "the attempt was lost".to_owned(),
    }
}
