//! The keys that say where the tasks are and how the database is spoken to.

use std::path::PathBuf;
use std::time::Duration;

use laelaps_queue::{Connections, Database, Kind, PerfectQueue, Tls};
use serde_yaml::Value;

use super::Lookup;
use super::keys::{Keys, Unknown, describe};

const HOUR: Duration = Duration::from_secs(3600);

/// Where the tasks are, and how the database is spoken to.
pub(super) struct Place {
    pub(super) url: String,
    pub(super) kind: Kind,
    pub(super) connections: Connections,
    /// What becomes of keys that nobody knows: applications keep keys of their own beside PerfectQueue's.
    pub(super) unknown: Unknown,
}

/// Read the keys. `cleanup_interval` is the section's.
pub(super) fn place(keys: &mut Keys<'_>, cleanup_interval: u32, lookup: &Lookup<'_>) -> Place {
    let (kind, unknown) = kind(keys, cleanup_interval);
    let url = url(keys, &kind, lookup).unwrap_or_default();
    let is_embedded = url.starts_with("sqlite:");
    let connections = connections(keys, is_embedded, &kind);
    Place { url, kind, connections, unknown }
}

fn kind(keys: &mut Keys<'_>, cleanup_interval: u32) -> (Kind, Unknown) {
    const EXPECTED: &str = "expected rdb or rdb_compat";
    let Some(value) = keys.take("type") else {
        keys.problem("type", format!("the key is missing, {EXPECTED}"), Some("add `type: rdb`"));
        return (Kind::Native, Unknown::Refuse);
    };
    match value.as_str() {
        Some("rdb") => {
            for key in ["table", "side_table"] {
                if keys.take(key).is_some() {
                    let problem = "belongs to `type: rdb_compat`; the native tables have names of their own".to_owned();
                    keys.problem(key, problem, Some("remove the key"));
                }
            }
            (Kind::Native, Unknown::Refuse)
        }
        Some("rdb_compat") => {
            let table = keys.text("table", "the name of PerfectQueue's table");
            if table.is_none() {
                let problem = "the key is missing, expected the name of PerfectQueue's table".to_owned();
                keys.problem("table", problem, Some("add `table: NAME`, as in the configuration of the Ruby workers"));
            }
            let side_table = keys.yes_or_no("side_table").unwrap_or(false);
            (Kind::PerfectQueue(PerfectQueue { table: table.unwrap_or_default(), cleanup_interval, side_table }), Unknown::Warn)
        }
        _ => {
            keys.problem("type", format!("found {}, {EXPECTED}", describe(&value)), Some("write `type: rdb`"));
            (Kind::Native, Unknown::Warn)
        }
    }
}

fn url(keys: &mut Keys<'_>, kind: &Kind, lookup: &Lookup<'_>) -> Option<String> {
    let (expected, hint, missing) = match kind {
        Kind::Native => (
            "sqlite:PATH, postgres://USER@HOST/DATABASE or mysql://USER@HOST/DATABASE",
            "write `url: \"sqlite:PATH\"`, or the URL of a server",
            "add `url: \"sqlite:laelaps.db\"`",
        ),
        Kind::PerfectQueue(_) => (
            "mysql://USER@HOST/DATABASE, the one of the Ruby workers",
            "write the URL of the Ruby workers; PerfectQueue's table is on MySQL or MariaDB",
            "add `url: \"mysql2://USER@HOST/DATABASE\"`",
        ),
    };
    if !keys.has("url") {
        keys.take("url");
        keys.problem("url", format!("the key is missing, expected {expected}"), Some(missing));
        return None;
    }
    let url = keys.secret("url", expected, lookup)?;
    let config = laelaps_queue::Config { kind: kind.clone(), ..laelaps_queue::Config::new(url.clone()) };
    let scheme = url.split_once(':').map(|(scheme, _)| scheme);
    let problem = match config.database() {
        Ok(Database::Sqlite(_)) => None,
        // Drivers would take a URL without server for one on this machine; whoever wrote it meant something else.
        Ok(_) if !url.contains("://") => Some(format!("found {:?} without a server", scheme.unwrap_or_default())),
        Ok(_) => None,
        Err(_) if scheme == Some("sqlite") && *kind == Kind::Native => {
            let file = url["sqlite:".len()..].trim_start_matches("//");
            Some(match file.split('?').next().unwrap_or_default() {
                "" => "names no file".to_owned(),
                ":memory:" => "names a database in memory, which ends with the process and its tasks with it".to_owned(),
                _ => "has options, which SQLite's URL does not take".to_owned(),
            })
        }
        Err(_) if url.contains("://") || scheme == Some("sqlite") => Some(format!("found {:?}", config.place())),
        Err(_) => Some("is not a URL".to_owned()),
    };
    match problem {
        Some(problem) => {
            keys.problem("url", format!("{problem}, expected {expected}"), Some(hint));
            None
        }
        None => Some(url),
    }
}

fn connections(keys: &mut Keys<'_>, is_embedded: bool, kind: &Kind) -> Connections {
    const SERVERS_ONLY: [&str; 7] =
        ["connect_timeout", "sslca", "ssl_mode", "max_connections", "statement_timeout", "listen", "use_connection_pooling"];
    let defaults = Connections::default();
    if is_embedded {
        for key in SERVERS_ONLY {
            if keys.take(key).is_some() {
                keys.warn(key, "has no effect: an embedded database is not connected to");
            }
        }
        return defaults;
    }
    if keys.take("use_connection_pooling").is_some() {
        keys.warn("use_connection_pooling", "has no effect: connections are always pooled");
    }
    let certificate_authority = keys.text("sslca", "the path of a certificate file").map(PathBuf::from);
    let tls = tls(keys).or(certificate_authority.as_ref().map(|_| Tls::VerifyAuthority));
    let pooled = if *kind == Kind::Native { defaults.max } else { 4 };
    Connections {
        max: keys.whole("max_connections", 2..=100).unwrap_or(pooled),
        connect_timeout: keys.duration("connect_timeout", Duration::from_millis(100)..=HOUR).unwrap_or(defaults.connect_timeout),
        statement_timeout: keys
            .duration("statement_timeout", Duration::from_millis(100)..=HOUR)
            .unwrap_or(defaults.statement_timeout),
        listen: keys.yes_or_no("listen").unwrap_or(defaults.listen),
        tls,
        certificate_authority,
    }
}

/// The five ways have names of their own in MySQL and in PostgreSQL; Ruby writes them as symbols.
fn tls(keys: &mut Keys<'_>) -> Option<Tls> {
    const EXPECTED: &str = "disabled, preferred, required, verify_ca or verify_identity";
    let value = keys.take("ssl_mode")?;
    let word = match &value {
        Value::String(word) => word.trim_start_matches(':').to_lowercase().replace('-', "_"),
        _ => String::new(),
    };
    let tls = match word.as_str() {
        "disabled" | "disable" => Tls::Disabled,
        "preferred" | "prefer" => Tls::Preferred,
        "required" | "require" => Tls::Required,
        "verify_ca" => Tls::VerifyAuthority,
        "verify_identity" | "verify_full" => Tls::VerifyIdentity,
        _ => {
            keys.problem("ssl_mode", format!("found {}, expected {EXPECTED}", describe(&value)), Some("write one of them"));
            return None;
        }
    };
    Some(tls)
}
