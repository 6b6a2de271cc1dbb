//! `laelaps plugin inspect`.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::output::{Output, printable};
use super::{Complaint, Exit, Place, read};
use crate::config;
use crate::plugin::{Config, Engine, Error, Inspection, Item, Limits, scan};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The module
    file: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let memory_bytes_max = memory_bytes_max(place)?;
        let bytes = read(&self.file)?;
        let mut inspection = engine(memory_bytes_max)?.inspect(&bytes).await?;
        let name = self.file.file_name().unwrap_or_default().to_string_lossy();
        if scan::plugin_name(&name).is_err() {
            inspection.problems.insert(0, scan::misnamed());
            inspection.fits = None;
        }
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

/// The most memory that a host would allow it: by the routes of the configuration; by the default of a route where there is none, since a
/// module can be looked at anywhere.
fn memory_bytes_max(place: &Place) -> anyhow::Result<u64> {
    match config::Config::load(&place.source()) {
        Ok(config) => Ok(config.plugins.memory_bytes_max),
        Err(config::Error::NoFile { .. }) => Ok(Limits::default().memory_bytes),
        Err(error) => Err(error.into()),
    }
}

/// Something to look at modules with, which starts them under the limits of a host.
pub(super) fn engine(memory_bytes_max: u64) -> Result<Arc<Engine>, Error> {
    Engine::new(&Config { instances_max: 1, memory_bytes_max, ..Config::default() })
}

fn write(output: &mut Output, inspection: &Inspection) -> std::io::Result<()> {
    output.line(&format!("sha256    {}", inspection.digest))?;
    output.line(&format!("size      {} bytes", inspection.size_bytes))?;
    if let Some(contract) = &inspection.fits {
        output.line(&format!("contract  {contract}"))?;
    }
    write_items(output, "imports", &inspection.imports)?;
    write_items(output, "exports", &inspection.exports)?;
    if inspection.left_out > 0 {
        output.line(&format!("\n{} more imports, exports and functions are not shown.", inspection.left_out))?;
    }
    Ok(())
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
