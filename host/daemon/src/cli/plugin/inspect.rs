//! `laelaps plugin inspect`.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::output::{Output, printable};
use super::{Complaint, Exit, read};
use crate::plugin::{Config, Engine, Error, Inspection, Item};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The module
    file: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self) -> anyhow::Result<Exit> {
        let bytes = read(&self.file)?;
        let inspection = engine()?.inspect(&bytes).await?;
        let mut output = Output::open();
        if self.json {
            output.json(&inspection)?;
        } else {
            write(&mut output, &inspection)?;
        }
        output.close()?;
        if inspection.fits.is_some() {
            return Ok(Exit::Done);
        }
        let message = format!("{}: {}", self.file.display(), printable(&inspection.problems.join("\n  ")));
        Err(Complaint { exit: Exit::Plugin, message, hint: None }.into())
    }
}

/// Something to look at modules with: it allows as much memory as a route may at all.
pub(super) fn engine() -> Result<Arc<Engine>, Error> {
    Engine::new(&Config { instances_max: 1, memory_bytes_max: 4 << 30, ..Config::default() })
}

fn write(output: &mut Output, inspection: &Inspection) -> std::io::Result<()> {
    output.line(&format!("sha256    {}", inspection.digest))?;
    output.line(&format!("size      {} bytes", inspection.size_bytes))?;
    if let Some(contract) = &inspection.fits {
        output.line(&format!("contract  {contract}"))?;
    }
    write_items(output, "imports", &inspection.imports)?;
    write_items(output, "exports", &inspection.exports)
}

fn write_items(output: &mut Output, title: &str, items: &[Item]) -> std::io::Result<()> {
    if items.is_empty() {
        return Ok(());
    }
    output.line(&format!("\n{title}"))?;
    for item in items {
        output.line(&format!("  {}", printable(&item.name)))?;
        // Everybody knows what WASI's interfaces hold; --json has them whole.
        let functions: &[_] = if item.name.starts_with("wasi:") { &[] } else { &item.functions };
        for (name, signature) in functions {
            output.line(&format!("    {}: {}", printable(name), printable(signature)))?;
        }
    }
    Ok(())
}
