//! `laelaps watchdog status`: a queue or a fleet at a glance.

use std::time::Duration;

use laelaps_watchdog::fleet::{Member, members};
use laelaps_watchdog::{Error, Options, TimerAge, WatchdogQueue};
use serde_json::{Value, json};

use super::super::output::{Output, counted, in_one_line, table};
use super::super::{Complaint, Exit, Place};
use super::master::{ago, timer_json, write_timers};
use super::servers::Servers;
use super::{TIMER, close};
use crate::config;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The path of a root; without one, the fleet and the queue of the configuration
    #[arg(value_name = "ROOT", env = "LAELAPS_WATCHDOG_ROOT", hide_env_values = true)]
    root: Option<String>,
    /// How long a queue's child may go without a kick; the hosts of a fleet say it themselves
    #[arg(long, value_name = "TIME", default_value = TIMER, value_parser = config::duration_argument)]
    timer: Duration,
    /// One JSON object for each root
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self, servers: &Servers, place: &Place) -> anyhow::Result<Exit> {
        let mut output = Output::open();
        match &self.root {
            Some(root) => self.show(&servers.options()?, root, &mut output).await?,
            None => {
                let config = place.load()?;
                let fleet = config.watchdog.map(|fleet| (fleet.zookeeper, fleet.root));
                let queue = config.watchdog_queue.map(|queue| (queue.zookeeper, queue.root));
                let roots: Vec<_> = fleet.into_iter().chain(queue).collect();
                if roots.is_empty() {
                    let hint = "name a ROOT, or add `watchdog` or `watchdog_queue` to the configuration";
                    return Err(
                        Complaint::new(Exit::Usage, "the configuration has no fleet and no queue of ZooKeeper's", hint).into()
                    );
                }
                for (zookeeper, root) in roots {
                    self.show(&zookeeper.options(), root.path(), &mut output).await?;
                }
            }
        }
        output.close()?;
        Ok(Exit::Done)
    }

    /// One root.
    async fn show(&self, options: &Options, root: &str, output: &mut Output) -> anyhow::Result<()> {
        let mut queue = WatchdogQueue::new(options, root).await?;
        match queue.attach_queue(self.timer).await {
            Ok(()) => {
                let seen = Seen::of(&queue).await?;
                if self.json { output.json(&seen.json(root))? } else { seen.write(output, root)? }
            }
            Err(Error::FleetRoot(_)) => {
                let hosts = members(queue.session(), queue.root()).await?;
                if self.json { output.json(&fleet_json(&hosts, root))? } else { write_fleet(output, &hosts, root)? }
            }
            // A queue is there while its master wants it, a fleet's root once it had a host.
            Err(Error::NoRoot(_)) if self.root.is_none() => {
                if self.json {
                    output.json(&json!({ "root": root, "kind": "absent" }))?;
                } else {
                    output.line(&format!("{root}: not there yet"))?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        close(queue).await;
        Ok(())
    }
}

/// A queue.
struct Seen {
    items: usize,
    barrier: bool,
    timers: Vec<TimerAge>,
}

impl Seen {
    async fn of(queue: &WatchdogQueue) -> Result<Self, Error> {
        let items = queue.queue_count().await?;
        // No patience: gone, or there.
        let barrier = queue.check_exists(&queue.root().child("sync")).await?;
        Ok(Self { items, barrier, timers: queue.get_timers(false).await? })
    }

    fn json(&self, root: &str) -> Value {
        let timers: Vec<Value> = self.timers.iter().map(timer_json).collect();
        json!({ "root": root, "kind": "queue", "items": self.items, "barrier": self.barrier, "timers": timers })
    }

    fn write(&self, output: &mut Output, root: &str) -> std::io::Result<()> {
        let expired = self.timers.iter().filter(|timer| timer.expired).count();
        output.line(&format!(
            "{root}: a queue of {}, {}{}",
            counted(self.items as u64, "item"),
            counted(self.timers.len() as u64, "timer"),
            if expired > 0 { format!(", {expired} of them expired") } else { String::new() }
        ))?;
        if self.barrier {
            output.line("the barrier stands: no child has begun")?;
        }
        write_timers(output, &self.timers)
    }
}

/// The host that hands on what the dead had: the lowest that is kicked in time.
fn acting(hosts: &[Member]) -> Option<&str> {
    hosts.iter().find(|host| !host.is_late()).map(|host| host.name.as_str())
}

fn fleet_json(hosts: &[Member], root: &str) -> Value {
    let acting = acting(hosts);
    let hosts: Vec<Value> = hosts
        .iter()
        .map(|host| {
            json!({
                "identity": host.identity.to_string(),
                "timer": host.name,
                "age_seconds": host.age.as_secs_f64(),
                "timer_seconds": host.timer.map(|timer| timer.as_secs_f64()),
                "late": host.is_late(),
                "acting": acting == Some(host.name.as_str()),
                "description": host.description,
            })
        })
        .collect();
    json!({ "root": root, "kind": "fleet", "hosts": hosts })
}

fn write_fleet(output: &mut Output, hosts: &[Member], root: &str) -> std::io::Result<()> {
    output.line(&format!("{root}: a fleet of {}", counted(hosts.len() as u64, "host")))?;
    if hosts.is_empty() {
        return Ok(());
    }
    let acting = acting(hosts);
    let mut rows = table(&["host", "timer", "last kick", "state", "identity"]);
    for host in hosts {
        let state = if acting == Some(host.name.as_str()) {
            "acting"
        } else if host.is_late() {
            "late"
        } else {
            "well"
        };
        rows.add_row([
            in_one_line(&describe(host), 255),
            host.name.clone(),
            ago(host.age),
            state.to_owned(),
            host.identity.to_string(),
        ]);
    }
    output.table(&rows)
}

/// Every text and number that the host says of itself, `name` first.
fn describe(host: &Member) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let name = host.description.get("name").map(word);
    let rest = host.description.iter().filter(|(key, _)| *key != "name").map(|(key, value)| format!("{key}={}", word(value)));
    name.into_iter().chain(rest).collect::<Vec<_>>().join(" ")
}
