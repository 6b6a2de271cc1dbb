//! `laelaps plugin`: looking at plugins, and trying them out.

mod inspect;
mod quarantine;
mod run;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use super::output::{Output, in_one_line, table};
use super::{Complaint, Exit, Place};
use crate::plugin::scan::{self, Content};
use crate::plugin::{self, Digest, Error, Inspection};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the files of the plugin folder: what they are, and which routes name them
    List(List),
    /// Show what a file imports and exports, and whether a host would serve it
    Inspect(inspect::Arguments),
    /// Run one task in a handler, here and now, without a database
    Run(Box<run::Arguments>),
    /// List plugin versions that no host runs any more, because hosts died while they ran nothing else
    Quarantine(quarantine::List),
    /// Let a plugin version under quarantine run again
    Release(quarantine::Release),
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        match self.command {
            Command::List(arguments) => arguments.run(place).await,
            Command::Inspect(arguments) => arguments.run(place).await,
            Command::Run(arguments) => arguments.run().await,
            Command::Quarantine(arguments) => arguments.run(place).await,
            Command::Release(arguments) => arguments.run(place).await,
        }
    }
}

#[derive(Debug, clap::Args)]
struct List {
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(serde::Serialize)]
struct FoundJson<'a> {
    plugin: &'a str,
    path: String,
    digest: Option<Digest>,
    size_bytes: Option<u64>,
    contract: Option<&'a str>,
    problems: &'a [String],
    routes: &'a [usize],
}

impl List {
    async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let config = place.load()?;
        let found = survey(&config.plugins).await?;
        let routes_of = |name: &str| -> Vec<usize> {
            config.routes.iter().filter(|route| route.plugin == name).map(|route| route.index + 1).collect()
        };
        let mut output = Output::open();
        let mut rows = table(&["plugin", "sha256", "bytes", "routes", "contract"]);
        for plugin in &found {
            let routes = routes_of(&plugin.name);
            if self.json {
                output.json(&plugin.json(&routes))?;
            } else {
                let told = match plugin.refusal() {
                    Some(reason) => format!("refused: {reason}"),
                    None => plugin.contract().unwrap_or_default().to_owned(),
                };
                let routes: Vec<String> = routes.iter().map(usize::to_string).collect();
                let size = plugin.inspection.as_ref().map(|inspection| inspection.size_bytes.to_string()).unwrap_or_default();
                rows.add_row([
                    in_one_line(&plugin.name, 150),
                    plugin.short_digest(),
                    size,
                    routes.join(" "),
                    in_one_line(&told, 300),
                ]);
            }
        }
        if !self.json {
            if !found.is_empty() {
                output.table(&rows)?;
            }
            output.line(&format!("{} entries.", found.len()))?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

/// A file of the plugin folder.
pub(super) struct Found {
    /// The plugin that it is or would be.
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// What it is, or why that cannot be said.
    inspection: Result<Inspection, String>,
}

impl Found {
    /// Why a host would not serve it; None if it would.
    pub(super) fn refusal(&self) -> Option<String> {
        match &self.inspection {
            Ok(inspection) if inspection.fits.is_some() => None,
            Ok(inspection) => Some(inspection.problems.join("; ")),
            Err(problem) => Some(problem.clone()),
        }
    }

    /// The version of the contract that it fits; None if it is refused.
    pub(super) fn contract(&self) -> Option<&str> {
        self.inspection.as_ref().ok().and_then(|inspection| inspection.fits.as_deref())
    }

    pub(super) fn short_digest(&self) -> String {
        self.inspection.as_ref().map(|inspection| inspection.digest.short()).unwrap_or_default()
    }

    fn json<'a>(&'a self, routes: &'a [usize]) -> FoundJson<'a> {
        let inspection = self.inspection.as_ref();
        FoundJson {
            plugin: &self.name,
            path: self.path.display().to_string(),
            digest: inspection.ok().map(|inspection| inspection.digest),
            size_bytes: inspection.ok().map(|inspection| inspection.size_bytes),
            contract: inspection.ok().and_then(|inspection| inspection.fits.as_deref()),
            problems: match inspection {
                Ok(inspection) => &inspection.problems,
                Err(problem) => std::slice::from_ref(problem),
            },
            routes,
        }
    }
}

/// Look at every file of the plugin folder that is a plugin, or looks like one by its name, as a host would.
pub(super) async fn survey(config: &plugin::Config) -> anyhow::Result<Vec<Found>> {
    let folder = &config.folder;
    let listing = scan::list(folder).map_err(|source| Error::Folder { folder: folder.clone(), source })?;
    let mut found: Vec<Found> = listing
        .misnamed
        .iter()
        .map(|file| Found {
            name: file.trim_end_matches(".wasm").to_owned(),
            path: folder.join(file),
            inspection: Err(scan::misnamed()),
        })
        .collect();
    let engine = if listing.files.is_empty() { None } else { Some(inspect::engine(config.memory_bytes_max)?) };
    for (name, signature) in listing.files {
        let path = scan::path(folder, &name);
        let inspection = match (&engine, scan::read(&path, signature)) {
            (Some(engine), Content::Whole(bytes)) => engine.inspect(&bytes).await.map_err(|error| error.to_string()),
            (_, Content::Unreadable(reason)) => Err(reason),
            (_, Content::Unsettled) => Err("the file is being written; look again".to_owned()),
            (None, Content::Whole(_)) => continue,
        };
        found.push(Found { name, path, inspection });
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

/// A module's bytes.
fn read(path: &Path) -> Result<Vec<u8>, Complaint> {
    let unreadable = |error: std::io::Error| {
        Complaint::new(Exit::Usage, format!("{}: cannot be read: {error}", path.display()), "name a component: a file NAME.wasm")
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(scan::MODULE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > scan::MODULE_BYTES_MAX {
        let message = format!("{}: larger than {} MiB", path.display(), scan::MODULE_BYTES_MAX >> 20);
        return Err(Complaint::new(Exit::Plugin, message, "strip the module: `wasm-tools strip`"));
    }
    Ok(bytes)
}
