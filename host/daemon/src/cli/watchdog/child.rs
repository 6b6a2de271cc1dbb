//! A child's calls that need no life of their own.

use laelaps_watchdog::Error;
use serde_json::Map;

use super::super::output::{Output, in_one_line};
use super::super::{Exit, exit};
use super::servers::Servers;
use super::{RootPath, close};
use crate::intake::insert_bytes;

/// The variable that names the timer of the command below `create-timer`.
pub(super) const TIMER_VARIABLE: &str = "LAELAPS_WATCHDOG_TIMER";

/// The most characters of an item in a message.
const ITEM_WIDTH: usize = 2_000;

#[derive(Debug, clap::Args)]
pub(super) struct Consume {
    #[command(flatten)]
    root: RootPath,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Consume {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let queue = self.root.connect(servers).await?;
        let item = match queue.consume().await {
            Ok(Some(item)) => item,
            Ok(None) => {
                close(queue).await;
                return Ok(Exit::No);
            }
            Err(error) => {
                if let Error::Uncertain { item: Some(item), .. } = &error {
                    let data = in_one_line(&String::from_utf8_lossy(&item.data), ITEM_WIDTH);
                    exit::warn(&format!("we or another child took {}: {data}", item.name));
                }
                return Err(error.into());
            }
        };
        // It is ours alone now: print it before anything else can go wrong.
        let mut output = Output::open();
        if self.json {
            let mut members = Map::new();
            members.insert("name".to_owned(), item.name.into());
            insert_bytes(&mut members, "item", &item.data);
            output.json(&members)?;
        } else {
            output.bytes(&item.data)?;
            output.bytes(b"\n")?;
        }
        output.close()?;
        close(queue).await;
        Ok(Exit::Done)
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct KickDog {
    #[command(flatten)]
    root: RootPath,
    /// The name of the timer, such as timer-0000000000
    #[arg(value_name = "TIMER", env = TIMER_VARIABLE, hide_env_values = true)]
    timer: String,
}

impl KickDog {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let queue = self.root.connect(servers).await?;
        let kicked = match queue.open_timer(&self.timer).await {
            Ok(timer) => timer.kick_dog().await?,
            // To the child it is all the same whether its timer or the whole queue was cleared.
            Err(Error::NoNode(_) | Error::NoRoot(_)) => false,
            Err(error) => return Err(error.into()),
        };
        close(queue).await;
        if kicked {
            return Ok(Exit::Done);
        }
        anstream::eprintln!("{} is gone: the master has cleared the queue, or its session has ended", self.timer);
        Ok(Exit::No)
    }
}
