//! `laelaps watchdog status`: a queue or a fleet at a glance.

use std::time::Duration;

use laelaps_watchdog::fleet::{Member, members};
use laelaps_watchdog::{Error, TimerAge, WatchdogQueue};
use serde_json::{Value, json};

use super::super::Exit;
use super::super::output::{Output, counted, in_one_line, table};
use super::master::{ago, timer_json, write_timers};
use super::servers::Servers;
use super::{RootPath, TIMER, close};
use crate::config;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    root: RootPath,
    /// How long a queue's child may go without a kick; the hosts of a fleet say it themselves
    #[arg(long, value_name = "TIME", default_value = TIMER, value_parser = config::duration_argument)]
    timer: Duration,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let mut queue = self.root.connect(servers).await?;
        let mut output = Output::open();
        match queue.attach_queue(self.timer).await {
            Ok(()) => {
                let seen = Seen::of(&queue).await?;
                if self.json { output.json(&seen.json(&self.root.root))? } else { seen.write(&mut output, &self.root.root)? }
            }
            Err(Error::FleetRoot(_)) => {
                let hosts = members(queue.session(), queue.root()).await?;
                if self.json {
                    output.json(&fleet_json(&hosts, &self.root.root))?;
                } else {
                    write_fleet(&mut output, &hosts, &self.root.root)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        close(queue).await;
        output.close()?;
        Ok(Exit::Done)
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
