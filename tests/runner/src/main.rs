//! What `tests/run` does once everything is built.
//!
//! It starts the servers that the tests share, lets cargo-nextest run the tests (a process each), runs again alone what failed, and says what
//! came of it. A test that fails and then passes alone is *flaky*: the run tells its name and keeps both outputs, since what failed once will
//! fail again, on somebody else's machine. Counts come from what nextest reported of each test; a test that was chosen and that no report
//! mentions counts as failed.

mod load;
mod nextest;
mod outcome;
mod report;
mod servers;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;

use crate::load::Load;
use crate::nextest::{Chosen, Nextest};
use crate::outcome::{Outcome, Round};
use crate::servers::{Server, Servers};

/// Where the outputs of failed and flaky tests are kept, below the folder of the workspace.
const KEPT: &str = "target/tests";

/// Below this many tests each process starts what it needs by itself: three servers would take longer than the tests.
const SHARE_SERVERS_FROM: usize = 25;

/// So many failures are no flakiness: something that all of them need is broken, and running them again would take long to say the same.
const RUN_AGAIN_MAX: usize = 20;

/// Runs the tests that tests/run has built.
#[derive(Debug, Parser)]
#[command(name = "laelaps-test-runner")]
struct Arguments {
    /// Runs everything so many times.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Keeps two processors busy beside the tests.
    #[arg(long)]
    beside_load: bool,
    /// Fails the run if a test is flaky.
    #[arg(long)]
    strict: bool,
    /// How many tests run at once.
    #[arg(long, default_value_t = 4)]
    at_once: u16,
    /// Prints what each test printed, for figures.
    #[arg(long)]
    figures: bool,
    /// Runs the examples in documentation, too.
    #[arg(long)]
    documentation: bool,
    /// A server that the tests share.
    #[arg(long = "server", value_enum)]
    servers: Vec<Server>,
    /// Leaves out tests whose names contain this.
    #[arg(long = "skip", value_name = "NAME")]
    skips: Vec<String>,
    /// Why tests are left out.
    #[arg(long = "left-out", value_name = "REASON")]
    left_out: Vec<String>,
    /// How many seconds it took to make the machine ready, for the closing lines.
    #[arg(long, default_value_t = 0)]
    prepared: u64,
    /// How many seconds it took to build, likewise.
    #[arg(long, default_value_t = 0)]
    built: u64,
    /// The program cargo-nextest.
    #[arg(long, default_value = "cargo-nextest")]
    nextest: String,
    /// An argument for cargo: packages, features, profile.
    #[arg(long = "cargo", value_name = "ARGUMENT", allow_hyphen_values = true)]
    cargo: Vec<String>,
    /// Runs only tests whose names contain one of these.
    names: Vec<String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    match Box::pin(run(&Arguments::parse())).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("tests/run: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether every test passed.
async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let begun = Instant::now();
    let nextest = Nextest::new(arguments);
    let kept = Path::new(KEPT);
    if kept.exists() {
        std::fs::remove_dir_all(kept).with_context(|| format!("cannot remove {}", kept.display()))?;
    }
    let chosen = nextest.list().await?;
    let mut rounds = Vec::new();
    for number in 1..=arguments.repeat {
        if arguments.repeat > 1 {
            println!("tests/run: round {number} of {}", arguments.repeat);
        }
        let round = Box::pin(round(arguments, &nextest, &chosen, number)).await?;
        if arguments.repeat > 1 {
            println!("tests/run: round {number} of {}: {}", arguments.repeat, round.counts(chosen.left_out));
        }
        rounds.push(round);
    }
    let outcome = Outcome::of(rounds);
    let counts = outcome.counts(0);
    if counts.passed + counts.failed == 0 {
        bail!("no test's name contains {:?}", arguments.names);
    }
    let (prepared, built) = (Duration::from_secs(arguments.prepared), Duration::from_secs(arguments.built));
    let took = [("preparing", prepared), ("building", built), ("testing", begun.elapsed())];
    print!("{}", report::closing(&outcome, &arguments.left_out, chosen.left_out, &took));
    Ok(outcome.passes(arguments.strict))
}

async fn round(arguments: &Arguments, nextest: &Nextest, chosen: &Chosen, number: u16) -> anyhow::Result<Round> {
    let begun = Instant::now();
    let share = chosen.tests.len() >= SHARE_SERVERS_FROM;
    let servers = if share { Box::pin(Servers::start(&arguments.servers)).await } else { Servers::default() };
    let load = arguments.beside_load.then(Load::start);
    let mut round = Round { tests: nextest.run(chosen, &servers).await?, ..Round::default() };
    if arguments.documentation {
        round.documentation = nextest.documentation().await?;
    }
    drop(load); // alone is without it
    let failed: Vec<usize> = (0..round.tests.len()).filter(|&index| !round.tests[index].passed).collect();
    if failed.len() > RUN_AGAIN_MAX {
        println!("tests/run: {} tests failed; too many to run each of them again alone", failed.len());
    } else {
        for index in failed {
            let test = &mut round.tests[index];
            println!("tests/run: {} failed; running it again alone", test.name());
            let again = nextest.again(test, &servers).await?;
            test.passed_again = again.passed;
            test.keep(&Path::new(KEPT).join(format!("round-{number}")), &again.output)?;
        }
    }
    round.took = begun.elapsed();
    Ok(round)
}
