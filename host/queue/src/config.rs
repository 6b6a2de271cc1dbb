//! Where the tasks are, and how the database is used.

use std::path::PathBuf;
use std::time::Duration;

use crate::{Error, Policy, Result};

/// Where the tasks are and how the database is used.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `sqlite:PATH` (also `sqlite://PATH`), relative to the working directory; `postgres://USER:PASSWORD@HOST:PORT/DATABASE` (also
    /// `postgresql:`); `mysql://...` (also `mysql2:` and `mariadb:`).
    pub url: String,
    /// Whose tables they are.
    pub kind: Kind,
    /// What follows outcomes.
    pub policy: Policy,
    /// How long to wait for a database that another program keeps locked before [`crate::Error::Locked`], or that cannot be reached. On a server
    /// an operation is also tried again for as long if its connections are cut, or if other transactions are in the way (ten times at least).
    /// What it then fails with is retryable ([`crate::Error::is_retryable`]).
    pub patience: Duration,
    /// How a database server is spoken to; an embedded one needs none of it.
    pub connections: Connections,
    /// Steps of the schema after those of this program: a test of upgrades has it play a later one.
    #[doc(hidden)]
    pub later_steps: Vec<crate::SchemaStep>,
}

/// Whose tables the tasks are kept in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Our own (`type: rdb`).
    Native,
    /// PerfectQueue's (`type: rdb_compat`), which its Ruby programs use at the same time. Only on MySQL and MariaDB.
    PerfectQueue(PerfectQueue),
}

/// PerfectQueue's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PerfectQueue {
    /// Its name.
    pub table: String,
    /// Claims that found something between two removals of rows whose retention has ended, the first after a random part of it; 0: at every
    /// such claim.
    pub cleanup_interval: u32,
    /// Keep what the table has no column for (attempts, outputs, errors, which host runs what) in tables of ours beside it, `TABLE_laelaps` and
    /// `TABLE_laelaps_hosts`.
    pub side_table: bool,
}

/// How a database server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connections {
    /// The most connections at once, a listener not counted: 1 to 100.
    pub max: u32,
    /// How long one try to connect may take.
    pub connect_timeout: Duration,
    /// How long one statement may take before the server gives it up.
    pub statement_timeout: Duration,
    /// Let the server wake this program when tasks come in (PostgreSQL's LISTEN), on one more connection.
    pub listen: bool,
    /// Encryption, if it is not as the URL says (or as the driver does by default: encrypted where the server can).
    pub tls: Option<Tls>,
    /// The file of the authority that signed the server's certificate; None: those of the machine. Without `tls` it means
    /// [`Tls::VerifyAuthority`].
    pub certificate_authority: Option<PathBuf>,
}

impl Connections {
    /// How much encryption is wanted, if that is not left to the URL: an authority is not named for nothing.
    pub(crate) fn encryption(&self) -> Option<Tls> {
        self.tls.or(self.certificate_authority.as_ref().map(|_| Tls::VerifyAuthority))
    }
}

/// How much encryption is wanted. PostgreSQL's `sslmode` and MySQL's `ssl_mode` have the same five.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tls {
    /// Never encrypted.
    Disabled,
    /// Encrypted where the server can.
    Preferred,
    /// Encrypted or not at all, whoever the server is.
    Required,
    /// Encrypted, and the server's certificate is signed by a known authority.
    VerifyAuthority,
    /// Encrypted, and the certificate is for this very server.
    VerifyIdentity,
}

impl Default for Connections {
    fn default() -> Self {
        Self {
            max: 8,
            connect_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(60),
            listen: true,
            tls: None,
            certificate_authority: None,
        }
    }
}

/// A kind of database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// An embedded one, in this file.
    Sqlite(PathBuf),
    /// A PostgreSQL server.
    Postgres,
    /// A MySQL or MariaDB server.
    MySql,
}

impl Database {
    /// Its name, for people.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sqlite(_) => "SQLite",
            Self::Postgres => "PostgreSQL",
            Self::MySql => "MySQL",
        }
    }
}

impl Config {
    /// How long to wait for a locked or unreachable database by default.
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// A queue at `url`, with defaults for everything else.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            kind: Kind::Native,
            policy: Policy::default(),
            patience: Self::PATIENCE,
            connections: Connections::default(),
            later_steps: Vec::new(),
        }
    }

    /// Check the URL without opening anything, and answer the database it names.
    ///
    /// # Errors
    /// [`Error::Config`] if the URL is not one of a supported database.
    pub fn database(&self) -> Result<Database> {
        let problem = |problem: String| Error::Config { setting: "url", problem };
        let Some((scheme, rest)) = self.url.split_once(':') else {
            return Err(problem("names no database; write sqlite:PATH, for example sqlite:laelaps.db".to_owned()));
        };
        let database = match scheme {
            "sqlite" => Database::Sqlite(file(rest).map_err(problem)?),
            "postgres" | "postgresql" => Database::Postgres,
            "mysql" | "mysql2" | "mariadb" => Database::MySql,
            _ => {
                return Err(problem(format!(
                    "{scheme:?} is not a known kind of database; write sqlite:PATH, postgres://... or mysql://..."
                )));
            }
        };
        if matches!(self.kind, Kind::PerfectQueue(_)) && database != Database::MySql {
            return Err(problem(format!("PerfectQueue's table is on MySQL or MariaDB, not on {}", database.name())));
        }
        Ok(database)
    }

    /// The database as it may be told: without password.
    #[must_use]
    pub fn place(&self) -> String {
        let Some((scheme, rest)) = self.url.split_once("://") else {
            return self.url.strip_prefix("sqlite:").unwrap_or(&self.url).to_owned();
        };
        if scheme == "sqlite" {
            return rest.to_owned();
        }
        // What follows a question mark may be a secret as well.
        let rest = rest.split('?').next().unwrap_or_default();
        let server = rest.rsplit_once('@').map_or(rest, |(_, server)| server);
        format!("{scheme}://{server}")
    }
}

/// The file that follows `sqlite:`.
fn file(rest: &str) -> Result<PathBuf, String> {
    let path = rest.strip_prefix("//").unwrap_or(rest);
    if path.is_empty() {
        return Err("names no file; write sqlite:PATH, for example sqlite:laelaps.db".to_owned());
    }
    if path.starts_with(":memory:") {
        return Err("a database in memory would lose its tasks; name a file".to_owned());
    }
    if let Some((_, options)) = path.split_once('?') {
        return Err(format!("options are not taken in the URL (found \"?{options}\"); the file's name alone is enough"));
    }
    Ok(PathBuf::from(path))
}
