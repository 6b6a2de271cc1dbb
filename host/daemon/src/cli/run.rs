//! `laelaps run`.

use std::path::PathBuf;

use super::{Complaint, Exit, Place};
use crate::host;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Write the log here instead of where the configuration says [default: standard error]
    #[arg(long, value_name = "PATH")]
    log: Option<PathBuf>,
    /// Write the process number here, and hold the file locked while serving
    #[arg(long, value_name = "PATH")]
    pid_file: Option<PathBuf>,
    /// PerfectQueue's worker class.
    #[arg(hide = true)]
    class: Option<String>,
    /// PerfectQueue's load path.
    #[arg(short = 'I', hide = true)]
    include: Vec<String>,
    /// PerfectQueue's required libraries.
    #[arg(short = 'r', hide = true)]
    require: Vec<String>,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        self.refuse_ruby()?;
        host::run(host::Options { source: place.source(), log: self.log, pid_file: self.pid_file }).await?;
        Ok(Exit::Done)
    }

    fn refuse_ruby(&self) -> Result<(), Complaint> {
        const ROUTES: &str =
            "handlers are WebAssembly components here: name them under `routes:` in the configuration, then call `laelaps run`";
        let found = match (&self.class, self.include.first(), self.require.first()) {
            (Some(class), ..) => format!("found the worker class {class:?}, which only PerfectQueue has"),
            (None, Some(path), _) => format!("found -I {path}, which only PerfectQueue has"),
            (None, None, Some(library)) => format!("found -r {library}, which only PerfectQueue has"),
            (None, None, None) => return Ok(()),
        };
        Err(Complaint::new(Exit::Usage, found, ROUTES))
    }
}
