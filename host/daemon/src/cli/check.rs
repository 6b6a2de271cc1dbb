//! `laelaps check`: everything that would keep a host from serving, without serving.

use std::time::SystemTime;

use laelaps_queue::{Database, Filter, Kind, Quarantine, Queue, QueuedType, SchemaStatus, State, Task, Timestamp};
use laelaps_watchdog::{Root, Session, WatchdogQueue, fleet};

use super::output::{Output, counted, in_one_line, moment, table};
use super::plugin::{Found, survey};
use super::{Complaint, Exit, Place, exit};
use crate::config::Config;
use crate::fleet::ZooKeeper;
use crate::host;
use crate::plugin::scan;
use crate::serves;

/// Tasks that ended as failed, looked at for those that were set aside.
const FAILED_MAX: usize = 100_000;
/// Set-aside tasks that are named.
const NAMED_MAX: usize = 10;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Compare every table of the queue with every other, too: reads all of it, and changes nothing
    #[arg(long)]
    data: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let config = place.load()?;
        let mut output = Output::open();
        output.line(&format!(
            "configuration  {}, section {}: {}",
            config.path.display(),
            config.environment,
            counted(config.routes.len() as u64, "route")
        ))?;
        if config.queue.kind == Kind::Native {
            output.line(&format!("queues         {}", config.queues))?;
        }
        output.flush()?;
        for warning in config.warnings.iter().chain(&config.missing_files()) {
            exit::warn(warning);
        }
        // The rest is checked whatever fails; the first failure names the exit code.
        let mut first = Exit::Done;
        let mut note = |found: Result<String, anyhow::Error>, output: &mut Output| -> anyhow::Result<()> {
            match found {
                Ok(line) => output.line(&line)?,
                Err(error) => {
                    let code = exit::tell_and_go_on(&error);
                    first = if first == Exit::Done { code } else { first };
                }
            }
            Ok(())
        };
        match database(&config).await {
            Ok((line, queue)) => {
                note(Ok(line), &mut output)?;
                for problem in Box::pin(look_into(&queue, &config, self.data, &mut output)).await? {
                    note(Err(problem), &mut output)?;
                }
                if let Some(fleet) = fleet_in_database(&queue, &config).await.transpose() {
                    note(fleet, &mut output)?;
                }
                queue.close().await;
            }
            Err(error) => note(Err(error), &mut output)?,
        }
        for (what, zookeeper, root) in roots(&config) {
            note(look_at_root(what, zookeeper, root).await, &mut output)?;
        }
        match survey(&config.plugins).await {
            Ok(found) => {
                output.line(&format!(
                    "plugins        {}: {}",
                    config.plugins.folder.display(),
                    counted(found.len() as u64, "file")
                ))?;
                write_plugins(&mut output, &found)?;
                for refused in found.iter().filter(|found| found.refusal().is_some()) {
                    note(Err(refusal(refused, &config).into()), &mut output)?;
                }
            }
            Err(error) => note(Err(error), &mut output)?,
        }
        output.close()?;
        Ok(first)
    }
}

/// How hosts of this fleet are told from dead ones, where neither ZooKeeper nor a lock beside a file does it.
async fn fleet_in_database(queue: &Queue, config: &Config) -> anyhow::Result<Option<String>> {
    let is_on_server = config.queue.kind == Kind::Native && !matches!(config.queue.database()?, Database::Sqlite(_));
    let told = match config.host_timeout {
        Some(timeout) => {
            let signs = queue.backend().signs().await?;
            let others = signs.iter().filter(|sign| sign.timeout != timeout).map(|sign| sign.host.0.to_string());
            let others: Vec<String> = others.take(NAMED_MAX).collect();
            if !others.is_empty() {
                exit::warn(&format!(
                    "hosts with another host_timeout than {timeout:?} (number {}): give all hosts of a fleet the same",
                    others.join(", ")
                ));
            }
            format!("in the database: {}, dead after {timeout:?} without a sign of life", counted(signs.len() as u64, "host"))
        }
        None if is_on_server && config.watchdog.is_none() => {
            format!("none: a dead host's tasks come back when their leases end, after {:?}", config.alive_time)
        }
        None => return Ok(None),
    };
    Ok(Some(format!("fleet          {told}")))
}

/// What the configuration has in ZooKeeper.
fn roots(config: &Config) -> Vec<(&'static str, &ZooKeeper, &Root)> {
    let fleet = config.watchdog.iter().map(|fleet| ("fleet", &fleet.zookeeper, &fleet.root));
    let queue = config.watchdog_queue.iter().map(|queue| ("queue", &queue.zookeeper, &queue.root));
    fleet.chain(queue).collect()
}

/// A root that is not there yet is no reason for a host not to serve: the fleet's is made, the queue's is waited for.
async fn look_at_root(what: &str, zookeeper: &ZooKeeper, root: &Root) -> anyhow::Result<String> {
    let session = Session::connect(&zookeeper.options()).await?;
    let timeout = session.timeout();
    let found = match (what, session.fetch_node(root.path()).await) {
        ("fleet", Ok(_)) => counted(fleet::members(&session, root).await?.len() as u64, "host"),
        (_, Ok(_)) => counted(WatchdogQueue::over(session.clone(), root.clone()).queue_count().await? as u64, "item"),
        (_, Err(laelaps_watchdog::Error::NoNode(_))) => "not there yet".to_owned(),
        (_, Err(error)) => return Err(error.into()),
    };
    session.close().await;
    Ok(format!("{what:<14} {root}: {found}, sessions end after {timeout:?}"))
}

/// What is said of the database, and the queue in it, still open.
async fn database(config: &Config) -> anyhow::Result<(String, Queue)> {
    let (is_ours, hint) = match &config.queue.kind {
        Kind::Native => {
            (true, "somebody changed them by hand; put them back, or move the tasks to a new database made by `laelaps init`")
        }
        Kind::PerfectQueue(_) => {
            (false, "`laelaps init` makes what is said of it and leaves the rest as it is, which ALTER TABLE may mend")
        }
    };
    let queue = if is_ours { host::open_queue(config).await? } else { Queue::open(&config.queue).await? };
    let (status, drift) = (queue.schema_status().await, queue.backend().drift().await);
    let asked = machine();
    let now = queue.backend().now().await;
    let answered = machine();
    let (status, drift) = (status?, drift?);
    // Of a table that somebody else made, what is missing says more than a version that is written nowhere.
    let drift_counts = match status {
        SchemaStatus::Current(_) => true,
        SchemaStatus::Old { .. } => !is_ours,
        // What a newer program made is unknown here.
        SchemaStatus::Missing | SchemaStatus::Newer { .. } | SchemaStatus::TooNew { .. } | SchemaStatus::Other { .. } => false,
    };
    if drift_counts && !drift.is_empty() {
        let message = format!("{}: the tables are not as init makes them: {}", config.queue.place(), drift.join("; "));
        return Err(Complaint::new(Exit::Database, message, hint.to_owned()).into());
    }
    let version = match &status {
        SchemaStatus::Newer { found, known, program } => {
            let by =
                program.as_ref().map(|program| format!(", made by Laelaps {}", in_one_line(program, 64))).unwrap_or_default();
            format!("{found}{by}, admits this program, which knows schema {known}; its tables are not compared")
        }
        fit => host::fit(config, fit)?.to_string(),
    };
    let clock = if is_ours { String::new() } else { format!("\nclock          {}", ahead(now?, asked, answered)) };
    Ok((format!("database       {}: schema {version}{clock}", config.queue.place()), queue))
}

/// What a host would find when it works on the queue. What stops nobody is warned of here; the rest is answered.
async fn look_into(queue: &Queue, config: &Config, data: bool, output: &mut Output) -> anyhow::Result<Vec<anyhow::Error>> {
    let (backend, place) = (queue.backend(), config.queue.place());
    let mut problems = Vec::new();
    output.flush()?;
    match backend.rehearse().await {
        Ok(missing) => problems.extend(missing.into_iter().map(|missing| {
            let hint = match config.queue.kind {
                Kind::Native => {
                    "let an administrator of the database grant or set what is named; docs/databases.md and docs/databases-mysql.md list what a host needs"
                }
                Kind::PerfectQueue(_) => {
                    "let an administrator of the database grant or set what is named; docs/perfectqueue.md lists what a host needs"
                }
            };
            Complaint::new(Exit::Database, format!("{place}: a host could not work: {}", in_one_line(&missing, 1_000)), hint)
                .into()
        })),
        Err(error) => problems.push(error.into()),
    }
    match backend.warnings().await {
        Ok(warnings) => warnings.iter().for_each(|warning| exit::warn(&format!("{place}: {warning}"))),
        Err(error) => problems.push(error.into()),
    }
    match set_aside(queue).await {
        Ok(None) => {}
        Ok(Some(told)) => exit::warn(&format!("{place}: {told}")),
        Err(error) => problems.push(error.into()),
    }
    match unserved(queue).await {
        Ok(None) => {}
        Ok(Some(told)) => exit::warn(&format!("{place}: {told}")),
        Err(error) => problems.push(error.into()),
    }
    match backend.quarantined().await {
        Ok(quarantined) => {
            quarantined.iter().for_each(|quarantine| exit::warn(&format!("{place}: {}", in_quarantine(quarantine))))
        }
        Err(error) => problems.push(error.into()),
    }
    if data {
        match backend.audit().await {
            Ok(findings) if findings.is_empty() => output.line("data           every table agrees with every other")?,
            Ok(findings) => {
                output.line(&format!("data           {}", counted(findings.len() as u64, "contradiction")))?;
                for finding in &findings {
                    output.line(&format!("  {}", in_one_line(finding, 1_000)))?;
                }
                output.flush()?;
                let hint = "hosts mend some of it by themselves: check again in a minute; report what stays, with these lines";
                let message = format!("{place}: {} in the data", counted(findings.len() as u64, "contradiction"));
                problems.push(Complaint::new(Exit::Database, message, hint).into());
            }
            Err(error) => problems.push(error.into()),
        }
    }
    Ok(problems)
}

fn in_quarantine(Quarantine { version, deaths, since }: &Quarantine) -> String {
    let (name, digest) = (in_one_line(&version.name, 150), in_one_line(&version.digest, 64));
    let (deaths, since) = (counted((*deaths).into(), "host"), moment(*since));
    format!(
        "plugin {name}, version {digest}, is under quarantine: {deaths} died while it ran alone there, the last at {since}. Its tasks wait; \
        replace the plugin, or let it run again with `laelaps plugin release {digest}`"
    )
}

/// The tasks that were set aside because they cannot be read, in words.
async fn set_aside(queue: &Queue) -> laelaps_queue::Result<Option<String>> {
    let mut filter = Filter { states: vec![State::Failed], limit: 1_000, ..Filter::default() };
    let (mut looked_at, mut found) = (0, Vec::new());
    let is_whole = loop {
        let page = queue.backend().list(&filter).await?;
        looked_at += page.tasks.len();
        let is_set_aside =
            |task: &&Task| task.unreadable.is_some() || matches!(task.error_code.as_deref(), Some("unreadable" | "damaged-data"));
        found.extend(page.tasks.iter().filter(is_set_aside).map(|task| task.id.0));
        filter.after = page.next;
        if page.next.is_none() || looked_at >= FAILED_MAX {
            break page.next.is_none();
        }
    };
    if found.is_empty() {
        return Ok(None);
    }
    let named: Vec<String> = found.iter().take(NAMED_MAX).map(i64::to_string).collect();
    let more = if found.len() > NAMED_MAX { ", ..." } else { "" };
    let bound = if is_whole { "" } else { " or more" };
    Ok(Some(format!(
        "{}{bound} set aside, because what is stored of them cannot be read (number {}{more}): `laelaps show --id N` tells what is wrong, \
        `laelaps cancel --id N` removes one; then its producer can submit it again",
        counted(found.len() as u64, "task"),
        named.join(", ")
    )))
}

/// The types with tasks that no live host serves, in words. Without a live host there is nothing to say: this may be the check before the first start.
async fn unserved(queue: &Queue) -> laelaps_queue::Result<Option<String>> {
    let Some(types) = queue.backend().types().await? else { return Ok(None) };
    let hosts = queue.backend().hosts().await?;
    let unserved = serves::unserved(&hosts, types);
    if unserved.is_empty() || !serves::any_lives(&hosts) {
        return Ok(None);
    }
    let named = |QueuedType { queue, task_type, tasks }: &QueuedType| {
        let tasks = counted(*tasks, "task");
        format!("{} in queue {} ({tasks})", in_one_line(task_type, 100), in_one_line(queue, 64))
    };
    let first: Vec<String> = unserved.iter().take(NAMED_MAX).map(named).collect();
    let more = if unserved.len() > NAMED_MAX { ", ..." } else { "" };
    Ok(Some(format!(
        "{} that no live host serves: {}{more}. Their tasks wait for a host that serves the queue, and has a route for the type and its plugin; \
        `laelaps stats` lists more",
        counted(unserved.len() as u64, "type"),
        first.join(", ")
    )))
}

/// The machine's clock, in seconds.
#[expect(clippy::disallowed_methods, reason = "the difference is what is asked for; no lease and no schedule depends on it")]
fn machine() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// Workers in Ruby go by the clock of their machine: one that is ahead takes leases that live. Ours goes by the server's, and is only told.
/// The server read its clock between `asked` and `answered`: an answer that takes long is no difference.
fn ahead(server: Timestamp, asked: f64, answered: f64) -> String {
    let server = server.0 as f64 / 1_000.0;
    let (ahead, behind) = (asked - server, server - answered);
    if ahead >= 2.0 {
        format!("this machine is {ahead:.0} s ahead of the server: a Ruby worker here takes leases of others too early")
    } else if behind >= 2.0 {
        format!("this machine is {behind:.0} s behind the server: a Ruby worker here finds tasks late")
    } else {
        "this machine and the server agree within 2 s".to_owned()
    }
}

fn write_plugins(output: &mut Output, found: &[Found]) -> std::io::Result<()> {
    if found.is_empty() {
        return Ok(());
    }
    let mut table = table(&["  plugin", "sha256", "contract"]);
    for plugin in found {
        table.add_row([
            format!("  {}", in_one_line(&plugin.name, 150)),
            plugin.short_digest(),
            plugin.contract().unwrap_or("refused").to_owned(),
        ]);
    }
    output.table(&table)
}

fn refusal(found: &Found, config: &Config) -> Complaint {
    let routes: Vec<String> =
        config.routes.iter().filter(|route| route.plugin == found.name).map(|route| (route.index + 1).to_string()).collect();
    let hint = match routes.as_slice() {
        [] if !scan::is_name(&found.name) => "rename the file, or remove it".to_owned(),
        [] => "no route names it; replace or remove the file".to_owned(),
        [one] => format!("route {one} needs it: its tasks wait until the file is replaced"),
        several => format!("routes {} need it: their tasks wait until the file is replaced", several.join(", ")),
    };
    let message = format!("{}: {}", found.path.display(), found.refusal().unwrap_or_default());
    Complaint::new(Exit::Plugin, message, hint)
}
