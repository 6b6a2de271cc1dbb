//! `laelaps stats`.

use laelaps_queue::{HostRecord, Kind, NewTask, QueuedType, Serves, Stats};

use super::output::{Output, exact_moment, in_one_line, table};
use super::{Exit, Place};
use crate::config::{Config, Routes};
use crate::serves;

/// The plugin versions of a host that a table shows: the latest. JSON has them all.
const PLUGINS_SHOWN: usize = 4;

/// The types without host that a table shows: those with the most tasks. JSON has them all.
const UNSERVED_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (config, queue) = place.open().await?;
        let stats = queue.backend().stats().await?;
        let types = queue.backend().types().await?;
        let known = queue.backend().hosts().await?;
        let unserved =
            types.map(|types| Unserved { types: serves::unserved(&known, types), any_lives: serves::any_lives(&known) });
        let mut hosts = Vec::new();
        for host in known {
            let plugins = queue.backend().host_plugins(host.id).await?;
            hosts.push((host, plugins));
        }
        queue.backend().close().await;
        let mut output = Output::open();
        if self.json {
            output.json(&StatsJson {
                stats: &stats,
                unserved: unserved.as_ref().map(|unserved| &*unserved.types),
                hosts: hosts.iter().map(HostJson::new).collect(),
            })?;
        } else {
            write(&mut output, &stats, &config)?;
            if let Some(unserved) = &unserved {
                unserved.write(&mut output)?;
            }
            write_hosts(&mut output, &hosts)?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

#[derive(serde::Serialize)]
struct StatsJson<'a> {
    #[serde(flatten)]
    stats: &'a Stats,
    /// Null if nobody can know.
    unserved: Option<&'a [QueuedType]>,
    hosts: Vec<HostJson<'a>>,
}

#[derive(serde::Serialize)]
struct HostJson<'a> {
    id: i64,
    name: &'a str,
    process_id: u32,
    started_at: String,
    running: u64,
    /// Null if only its leases can tell.
    alive: Option<bool>,
    /// Null if it has not said, or there is no place for it.
    serves: Option<&'a Serves>,
    plugins: &'a [String],
}

impl<'a> HostJson<'a> {
    fn new((host, plugins): &'a (HostRecord, Vec<String>)) -> Self {
        Self {
            id: host.id.0,
            name: &host.name,
            process_id: host.process_id,
            started_at: exact_moment(host.started_at),
            running: host.running,
            alive: host.alive,
            serves: host.serves.as_ref(),
            plugins,
        }
    }
}

/// The types that no live host serves.
struct Unserved {
    types: Vec<QueuedType>,
    any_lives: bool,
}

impl Unserved {
    fn write(&self, output: &mut Output) -> std::io::Result<()> {
        // Without a host nothing is served, which the empty table of hosts says.
        if self.types.is_empty() || !self.any_lives {
            return Ok(());
        }
        output.line("")?;
        let mut table = table(&["served by no live host", "queue", "waiting or running"]);
        for QueuedType { queue, task_type, tasks } in self.types.iter().take(UNSERVED_SHOWN) {
            table.add_row([in_one_line(task_type, 255), in_one_line(queue, 64), tasks.to_string()]);
        }
        output.table(&table)?;
        match self.types.len().saturating_sub(UNSERVED_SHOWN) {
            0 => Ok(()),
            more => output.line(&format!("and {more} more; --json has them")),
        }
    }
}

fn write_hosts(output: &mut Output, hosts: &[(HostRecord, Vec<String>)]) -> std::io::Result<()> {
    if hosts.is_empty() {
        return Ok(());
    }
    output.line("")?;
    let mut table = table(&["host", "name", "process", "running", "alive", "plugin versions"]);
    for (host, plugins) in hosts {
        let alive = match host.alive {
            Some(true) => "yes",
            Some(false) => "no",
            None => "see leases",
        };
        let short = |digest: &String| digest.chars().take(12).collect::<String>();
        let mut versions: Vec<String> = plugins.iter().rev().take(PLUGINS_SHOWN).rev().map(short).collect();
        if plugins.len() > PLUGINS_SHOWN {
            versions.insert(0, format!("{} before", plugins.len() - PLUGINS_SHOWN));
        }
        table.add_row([
            host.id.0.to_string(),
            in_one_line(&host.name, 100),
            host.process_id.to_string(),
            host.running.to_string(),
            alive.to_owned(),
            versions.join(", "),
        ]);
    }
    output.table(&table)
}

fn write(output: &mut Output, stats: &Stats, config: &Config) -> std::io::Result<()> {
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
    // With the default queue alone it would say what is said above.
    if stats.queues.iter().any(|(queue, _)| queue != NewTask::DEFAULT_QUEUE) {
        output.line("")?;
        let mut table = table(&["queue", "waiting or running"]);
        for (queue, count) in &stats.queues {
            table.add_row([in_one_line(queue, 64), count.to_string()]);
        }
        output.table(&table)?;
    }
    if !stats.types.is_empty() {
        output.line("")?;
        let mut table = table(&["type", "waiting or running", "plugin"]);
        let routes = Routes::new(config.routes.clone());
        let without_route = match config.queue.kind {
            Kind::Native => "no route here: left to hosts that have one",
            Kind::PerfectQueue(_) => "no route here: left to other workers",
        };
        for (task_type, count) in &stats.types {
            let plugin = routes.route(task_type).map_or(without_route, |route| &route.plugin);
            table.add_row([in_one_line(task_type, 255), count.to_string(), plugin.to_owned()]);
        }
        output.table(&table)?;
    }
    Ok(())
}
