//! `laelaps completions`.

use clap::CommandFactory as _;

use super::Exit;
use super::output::Output;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The shell
    shell: clap_complete::Shell,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Arguments::command(), "laelaps", &mut script);
        let mut output = Output::open();
        output.bytes(&script)?;
        output.close()?;
        Ok(Exit::Done)
    }
}
