//! What can go wrong with plugins as a whole. One module that is refused is no error: see [`super::Refused`].

use std::io;
use std::path::PathBuf;

/// Why the plugin machinery could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The runtime could not be set up.
    #[error("cannot set up the WebAssembly runtime for {instances} instances of {memory_bytes} bytes each: {reason}")]
    Runtime {
        /// Instances asked for.
        instances: u32,
        /// The largest memory limit.
        memory_bytes: u64,
        /// The reason in words.
        reason: String,
    },
    /// The plugin folder cannot be read.
    #[error("plugin folder {path}: {source}", path = folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// The operating system's words.
        source: io::Error,
    },
    /// The folder for compiled code cannot be used.
    #[error("folder for compiled plugins {path}: {problem}", path = folder.display())]
    Cache {
        /// The folder.
        folder: PathBuf,
        /// What is wrong with it.
        problem: String,
        /// The operating system's words, if it was asked.
        #[source]
        source: Option<io::Error>,
    },
    /// A module is not one that a host can serve.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// What to do about it, if that is more than the message says.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Runtime { .. } => {
                Some("lower `processors` or the routes' `memory`, or raise the limit on address space (ulimit -v)")
            }
            Self::Folder { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                Some("let the user of the host read the folder and enter it (chmod u+rx), or name another one as `plugins`")
            }
            Self::Folder { .. } => Some("create the folder, or name another one as `plugins` in the configuration"),
            Self::Cache { .. } => Some("name a folder of its own as `plugin_cache`: it must belong to this user, with mode 0700"),
            Self::Refused(_) => None,
        }
    }
}
