//! `laelaps watchdog create-timer`: a command under a timer of its own.
//!
//! The timer says that the command runs: it is made before the command starts, kicked while it runs, and deleted when it has ended. A timer
//! whose session ended is made anew under a new session, so that the master sees the command again. A timer that is gone while the session
//! lives was cleared by the master, which thereby calls its children off: the command gets a TERM, unless it is told to go on.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::task::Poll;
use std::time::Duration;

use laelaps_watchdog::{Error, Options, PERL_BYTES_MAX, Timer, WatchdogQueue};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Interval, MissedTickBehavior};

use super::super::{Exit, exit};
use super::child::TIMER_VARIABLE;
use super::servers::{SERVERS_VARIABLE, Servers};
use super::{RootPath, close};
use crate::config;

/// As a shell exits when a command is not there, or cannot be started.
const NOT_FOUND: u8 = 127;
const NOT_STARTED: u8 = 126;
/// As a shell exits when a signal ended a command: this and the signal's number.
const SIGNALLED: i32 = 128;

#[derive(Debug, clap::Args)]
pub(super) struct CreateTimer {
    #[command(flatten)]
    root: RootPath,
    /// What the master sees [default: HOST:PROCESS of this program]
    #[arg(long, value_name = "ID")]
    process: Option<String>,
    /// Between two kicks; a fifth of the master's timer is a good choice
    #[arg(long, value_name = "TIME", default_value = "10", value_parser = config::duration_argument)]
    kick: Duration,
    /// Kick nothing: the command does it with `laelaps watchdog kick-dog`, so that one that hangs is noticed
    #[arg(long, conflicts_with = "kick")]
    no_kick: bool,
    /// Let the command go on when the master clears the queue, instead of sending it a TERM
    #[arg(long)]
    go_on: bool,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", last = true, required = true)]
    command: Vec<OsString>,
}

impl CreateTimer {
    pub(super) async fn run(self, servers: &Servers) -> anyhow::Result<Exit> {
        let process = self
            .process
            .clone()
            .unwrap_or_else(|| format!("{}:{}", rustix::system::uname().nodename().to_string_lossy(), std::process::id()));
        if process.len() > PERL_BYTES_MAX {
            let bytes = process.len();
            exit::warn(&format!(
                "a process identifier of {bytes} bytes: a master that uses the Perl module sees the first {PERL_BYTES_MAX}"
            ));
        }
        let mut keeper =
            Keeper::begin(servers.options()?, &self.root.root, process, (!self.no_kick).then_some(self.kick)).await?;
        let mut signals = Signals::install()?;
        let mut command = tokio::process::Command::new(&self.command[0]);
        command.args(&self.command[1..]).env(SERVERS_VARIABLE, servers.list()?).env("LAELAPS_WATCHDOG_ROOT", &self.root.root);
        command.env(TIMER_VARIABLE, keeper.timer_name()).kill_on_drop(true);
        let exit = match command.spawn() {
            Ok(child) => same_exit(self.accompany(child, &mut keeper, &mut signals).await?),
            Err(error) => {
                let code = if error.kind() == std::io::ErrorKind::NotFound { NOT_FOUND } else { NOT_STARTED };
                exit::warn(&format!("{}: cannot be started: {error}", self.command[0].to_string_lossy()));
                Exit::Same(code)
            }
        };
        keeper.end().await;
        Ok(exit)
    }

    /// Keeps the timer and passes signals on until the command has ended.
    async fn accompany(&self, mut child: Child, keeper: &mut Keeper, signals: &mut Signals) -> std::io::Result<ExitStatus> {
        let mut cleared = false;
        loop {
            tokio::select! {
                ended = child.wait() => return ended,
                signal = signals.next() => pass_on(&child, signal),
                () = keeper.until_cleared(), if !cleared => {
                    cleared = true;
                    if self.go_on {
                        exit::warn("the master has cleared the queue; the command goes on without a timer");
                    } else {
                        exit::warn("the master has cleared the queue; ending the command");
                        pass_on(&child, Signal::TERM);
                    }
                }
            }
        }
    }
}

fn pass_on(child: &Child, signal: Signal) {
    // No number: it has ended, and nobody else is hit.
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended a moment ago.
        let _ = kill_process(pid, signal);
    }
}

fn same_exit(status: ExitStatus) -> Exit {
    let code = status.code().or_else(|| status.signal().map(|signal| SIGNALLED + signal));
    Exit::Same(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

/// The signals that the command gets in our place.
struct Signals {
    streams: Vec<(tokio::signal::unix::Signal, Signal)>,
}

impl Signals {
    fn install() -> std::io::Result<Self> {
        let mut passed_on = vec![Signal::TERM, Signal::HUP, Signal::USR1, Signal::USR2];
        // A terminal sends these to the command as well as to us.
        let from_keyboard = [Signal::INT, Signal::QUIT];
        let terminal = std::io::stdin().is_terminal();
        if !terminal {
            passed_on.extend(from_keyboard);
        }
        let stream = |kind: Signal| Ok((signal(SignalKind::from_raw(kind.as_raw()))?, kind));
        let mut streams = passed_on.into_iter().map(stream).collect::<std::io::Result<Vec<_>>>()?;
        if terminal {
            // They must not end us before the command: they are taken, and nothing is done about them.
            for kind in from_keyboard {
                drop(signal(SignalKind::from_raw(kind.as_raw()))?);
            }
        }
        streams.shrink_to_fit();
        Ok(Self { streams })
    }

    /// The next one. Cancel-safe.
    async fn next(&mut self) -> Signal {
        std::future::poll_fn(|context| {
            for (stream, kind) in &mut self.streams {
                if let Poll::Ready(Some(())) = stream.poll_recv(context) {
                    return Poll::Ready(*kind);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// A timer, and a new one when its session is over.
struct Keeper {
    options: Options,
    root: String,
    process: String,
    /// None while there is no session.
    held: Option<(WatchdogQueue, Timer)>,
    /// None if the command kicks.
    beat: Option<Interval>,
    /// Whether it was said that there is no session.
    said: bool,
}

impl Keeper {
    async fn begin(options: Options, root: &str, process: String, kick: Option<Duration>) -> Result<Self, Error> {
        let beat = kick.map(|kick| {
            let mut beat = tokio::time::interval(kick);
            beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
            beat
        });
        let mut keeper = Self { options, root: root.to_owned(), process, held: None, beat, said: false };
        keeper.join().await?;
        Ok(keeper)
    }

    async fn join(&mut self) -> Result<(), Error> {
        let queue = WatchdogQueue::new(&self.options, &self.root).await?;
        let timer = queue.create_timer(self.process.as_bytes()).await?;
        self.held = Some((queue, timer));
        Ok(())
    }

    fn timer_name(&self) -> &str {
        self.held.as_ref().map_or("", |(_, timer)| timer.name())
    }

    /// Kicks until the master has cleared the queue. Cancel-safe: a kick that is broken off may have been done or not.
    async fn until_cleared(&mut self) {
        loop {
            match (&mut self.beat, &self.held) {
                (Some(beat), _) => drop(beat.tick().await),
                (None, Some((queue, _))) => {
                    let end = queue.session().ended().await;
                    exit::warn(&format!("the ZooKeeper session {end}: the timer is gone, and kick-dog answers so"));
                    self.held = None;
                    continue;
                }
                // The command kicks a timer by its name: it would not know another one.
                (None, None) => std::future::pending().await,
            }
            let kicked = match &self.held {
                Some((_, timer)) => timer.kick_dog().await,
                None => self.join().await.map(|()| {
                    self.said = false;
                    exit::warn("connected again, under a new session and with a new timer");
                    true
                }),
            };
            match kicked {
                Ok(true) => {}
                Ok(false) | Err(Error::NoRoot(_)) => return,
                Err(error) => self.complain(&error),
            }
        }
    }

    fn complain(&mut self, error: &Error) {
        if matches!(error, Error::SessionEnded { .. }) {
            self.held = None;
        }
        if !std::mem::replace(&mut self.said, true) {
            exit::warn(&format!("cannot kick the timer, trying again: {error}"));
        }
    }

    /// Ends the timer, and waits for that no longer than the session can last.
    async fn end(self) {
        let Some((queue, timer)) = self.held else { return };
        let patience = queue.session().timeout();
        match tokio::time::timeout(patience, timer.end()).await {
            Ok(Ok(())) => close(queue).await,
            Ok(Err(error)) => exit::warn(&format!("the timer ends with its session: {error}")),
            Err(_) => exit::warn("no server answers; the timer ends with its session"),
        }
    }
}
