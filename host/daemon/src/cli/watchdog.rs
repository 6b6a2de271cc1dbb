//! `laelaps watchdog`: WatchdogQueue's calls, so that shell scripts can be a master or a child. Needs no configuration; only `status` can
//! take its roots from one.

mod child;
mod fetch;
mod master;
mod servers;
mod status;
mod timer;

use laelaps_watchdog::WatchdogQueue;

use super::{Exit, Place};
use servers::Servers;

/// How long a child may go without a kick, as WatchdogQueue has it.
const TIMER: &str = "120";

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    servers: Servers,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Master: make a queue of items
    #[command(alias = "create_queue")]
    CreateQueue(master::CreateQueue),
    /// Look whether a queue is there and filled
    #[command(alias = "attach_queue", alias = "attach-queue")]
    Attach(master::Attach),
    /// Master: wait until the first child has removed the start barrier
    #[command(alias = "wait_sync")]
    WaitSync(master::WaitSync),
    /// Master: print how many items nobody has taken yet
    #[command(alias = "queue_count")]
    QueueCount(master::QueueCount),
    /// Master: count the children's timers, and those not kicked in time
    #[command(alias = "check_timers")]
    CheckTimers(master::CheckTimers),
    /// Master: list the children's timers
    #[command(alias = "get_timers")]
    GetTimers(master::GetTimers),
    /// Master: delete a queue with all that is below it
    #[command(alias = "clear_timers")]
    ClearTimers(master::ClearTimers),
    /// Child: run a command under a timer that is kicked while it runs, and exit as it exits
    #[command(alias = "create_timer")]
    CreateTimer(timer::CreateTimer),
    /// Child: take an item and print it
    Consume(child::Consume),
    /// Child: kick a timer by hand
    #[command(alias = "kick_dog")]
    KickDog(child::KickDog),
    /// Show a queue or a fleet: items, barrier, timers, hosts
    Status(status::Arguments),
    /// Look whether a node is there; any node, by its absolute path
    #[command(alias = "check_exists")]
    CheckExists(fetch::CheckExists),
    /// Print what a node holds; any node, by its absolute path
    #[command(alias = "fetch_node")]
    FetchNode(fetch::FetchNode),
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let servers = &self.servers;
        match self.command {
            Command::CreateQueue(arguments) => arguments.run(servers, place).await,
            Command::Attach(arguments) => arguments.run(servers).await,
            Command::WaitSync(arguments) => arguments.run(servers).await,
            Command::QueueCount(arguments) => arguments.run(servers).await,
            Command::CheckTimers(arguments) => arguments.run(servers).await,
            Command::GetTimers(arguments) => arguments.run(servers).await,
            Command::ClearTimers(arguments) => arguments.run(servers, place).await,
            Command::CreateTimer(arguments) => arguments.run(servers).await,
            Command::Consume(arguments) => arguments.run(servers).await,
            Command::KickDog(arguments) => arguments.run(servers).await,
            Command::Status(arguments) => arguments.run(servers, place).await,
            Command::CheckExists(arguments) => arguments.run(servers).await,
            Command::FetchNode(arguments) => arguments.run(servers).await,
        }
    }
}

/// The queue that a command works on.
#[derive(Debug, clap::Args)]
struct RootPath {
    /// The path of the queue's root
    #[arg(value_name = "ROOT", env = "LAELAPS_WATCHDOG_ROOT", hide_env_values = true)]
    root: String,
}

impl RootPath {
    /// A session of our own, at this root.
    async fn connect(&self, servers: &Servers) -> anyhow::Result<WatchdogQueue> {
        Ok(WatchdogQueue::new(&servers.options()?, &self.root).await?)
    }
}

/// Ends the session now instead of leaving it to its timeout.
async fn close(queue: WatchdogQueue) {
    let session = queue.session().clone();
    drop(queue);
    session.close().await;
}
