//! What can be wrong with a configuration, and how it is told.

use std::fmt;
use std::path::{Path, PathBuf};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No file was named, and none is at the usual places.
    #[error("there is no configuration file: neither {}", join(tried, " nor "))]
    NoFile {
        /// The places.
        tried: Vec<PathBuf>,
    },
    /// The file cannot be read.
    #[error("{}: cannot be read", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The operating system's words.
        #[source]
        source: std::io::Error,
    },
    /// The file was read and is refused.
    #[error("{}", join_problems(problems))]
    Invalid {
        /// All its mistakes, in the order of their lines; at least one.
        problems: Vec<Problem>,
        /// What else is odd: each one line, with its place.
        warnings: Vec<String>,
    },
}

impl Error {
    /// What to do about it, where that is not said with each of [`Error::problems`].
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NoFile { tried } => {
                let first = tried.first().map_or_else(String::new, |path| path.display().to_string());
                Some(format!("create {first} (docs/configuration.md has an example), or name a file with -c FILE"))
            }
            Self::Unreadable { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound => Some("name an existing file with -c FILE".to_owned()),
                std::io::ErrorKind::PermissionDenied => Some("let the user that runs laelaps read it".to_owned()),
                std::io::ErrorKind::IsADirectory => Some("name the file, not its folder".to_owned()),
                _ => None,
            },
            Self::Invalid { .. } => None,
        }
    }

    /// The mistakes of a refused file.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Invalid { problems, .. } => problems,
            _ => &[],
        }
    }

    /// What else is odd about a refused file.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        match self {
            Self::Invalid { warnings, .. } => warnings,
            _ => &[],
        }
    }
}

/// One mistake: where it stands, what was found and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1, if it is known.
    pub line: Option<usize>,
    /// The key with its section, for example `development.routes[2].memory`; None if the mistake belongs to no key.
    pub key: Option<String>,
    /// What was found and what is allowed. Secrets are left out.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_place(formatter, &self.path, self.line)?;
        if let Some(key) = &self.key {
            write!(formatter, "{key}: ")?;
        }
        formatter.write_str(&self.message)
    }
}

fn write_place(formatter: &mut impl fmt::Write, path: &Path, line: Option<usize>) -> fmt::Result {
    match line {
        Some(line) => write!(formatter, "{}:{line}: ", path.display()),
        None => write!(formatter, "{}: ", path.display()),
    }
}

fn join(paths: &[PathBuf], separator: &str) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(separator)
}

fn join_problems(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("; ")
}
