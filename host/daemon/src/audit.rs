//! The audit log (`audit_log`): who changed what this host runs, one JSON object a line. docs/daemon.md lists the events.
//!
//! Beside the log, which is for whoever wants to know how things go: this one has only what changes something, whatever the log's level is. A
//! line is written whole, by one call, to a file that is open for appending, so lines of the host and of commands never mix. A line that cannot
//! be written is said in the log, once, and stops nothing. Values of settings, of granted variables and of URLs are never in it.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::OFlags;
use serde_json::{Map, Value, json};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

use crate::config::{Config, Matcher, Route};
use crate::plugin::{Digest, FolderGrant, FollowUps, Grants, Keys, Queues, Refused, Types, Users, Version};
use crate::signals::{Manner, Verb};

/// Readable by its owner alone.
const MODE: u32 = 0o600;

/// What is kept of the reason why a file was refused, which may repeat much of the file.
const REASON_BYTES_MAX: usize = 4 << 10;

/// The audit log of this process, if it is a host that has one.
static HOST: Mutex<Option<Host>> = Mutex::new(None);

struct Host {
    file: File,
    name: String,
    /// What the routes of the configuration that counts grant to each plugin.
    granted: BTreeMap<String, Value>,
}

/// A file that lines are appended to. Opened again after an error, at the next line.
struct File {
    path: PathBuf,
    file: Option<std::fs::File>,
    /// That it cannot be written was said.
    is_told: bool,
}

impl File {
    fn new(path: &Path) -> Self {
        Self { path: path.to_path_buf(), file: None, is_told: false }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            // A pipe that nobody reads must not hold up the host.
            none => none.insert(
                OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(MODE)
                    .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                    .open(&self.path)?,
            ),
        };
        let written =
            file.write(line).and_then(|count| if count == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) });
        if written.is_err() {
            self.file = None;
        }
        written
    }
}

/// Let the lines of this process go where the configuration says, and remember what its routes grant.
pub(crate) fn start(config: &Config) {
    let mut host = host();
    let kept = host.take().map(|host| host.file).filter(|file| config.audit_log.as_deref() == Some(&file.path));
    let file = kept.or_else(|| config.audit_log.as_deref().map(File::new));
    *host = file.map(|file| Host { file, name: config.host_name.clone(), granted: granted(config) });
}

/// Plugins that are admitted from now on are for the routes of this configuration.
pub(crate) fn prepare(config: &Config) {
    if let Some(host) = host().as_mut() {
        host.granted = granted(config);
    }
}

/// Open the file anew, after it was rotated.
pub(crate) fn reopen() {
    if let Some(host) = host().as_mut() {
        host.file.file = None;
    }
}

/// A configuration is in force. `when`: at the `start`, or by a `restart`.
pub(crate) fn configuration(config: &Config, when: &str) {
    let routes: Vec<Value> = config.routes.iter().map(route).collect();
    let fields = json!({ "when": when, "file": absolute(&config.path), "environment": config.environment, "sha256": config.digest, "routes": routes });
    write("configuration", fields);
}

/// The file of this configuration was read again for a restart and cannot be used, so this one stays in force. Why says the log.
pub(crate) fn configuration_refused(config: &Config) {
    write("configuration-refused", json!({ "file": absolute(&config.path), "environment": config.environment }));
}

/// A signal was heard.
pub(crate) fn signal(name: &str, verb: Verb) {
    let manner = |manner| if manner == Manner::Graceful { "graceful" } else { "immediate" };
    let asks = match verb {
        Verb::Shutdown(how) => format!("{} shutdown", manner(how)),
        Verb::Restart(how) => format!("{} restart with the configuration read again", manner(how)),
        Verb::Replace(how) => format!("{} replacement of plugins", manner(how)),
        Verb::ReopenLogs => "log files opened again".to_owned(),
    };
    write("signal", json!({ "signal": name, "asks": asks }));
}

/// A version of a plugin serves from now on.
pub(crate) fn admitted(folder: &Path, version: &Version, previous: Option<Digest>) {
    let event = if previous.is_some() { "plugin-replaced" } else { "plugin-admitted" };
    let mut fields = plugin(folder, version.plugin(), Some(version.digest()));
    fields.insert("size".into(), version.size_bytes().into());
    if let Some(previous) = previous {
        fields.insert("replaces".into(), previous.to_string().into());
    }
    fields.insert(
        "grants".into(),
        host().as_ref().and_then(|host| host.granted.get(version.plugin()).cloned()).unwrap_or(json!([])),
    );
    write(event, fields.into());
}

/// A file in the plugin folder does not serve.
pub(crate) fn refused(folder: &Path, refused: &Refused) {
    let mut fields = plugin(folder, &refused.plugin, refused.digest);
    let size = std::fs::metadata(file_of(folder, &refused.plugin)).ok().map(|metadata| metadata.len());
    let reason = &refused.reason[..refused.reason.floor_char_boundary(REASON_BYTES_MAX)];
    fields.extend([("size".to_owned(), json!(size)), ("reason".to_owned(), json!(reason))]);
    write("plugin-refused", fields.into());
}

/// A plugin's file is gone, and the plugin with it.
pub(crate) fn removed(folder: &Path, version: &Version) {
    write("plugin-removed", plugin(folder, version.plugin(), Some(version.digest())).into());
}

/// A command changed something. It has an entry of its own, whether or not a host runs.
///
/// # Errors
/// The configuration's file cannot be written.
pub(crate) fn command(config: &Config, command: &str, fields: Value) -> io::Result<()> {
    let Some(path) = &config.audit_log else { return Ok(()) };
    let mut entry = json!({
        "command": command, "user": user_name(), "login_uid": login_uid(), "configuration": absolute(&config.path), "environment": config.environment,
    });
    if let (Some(entry), Value::Object(fields)) = (entry.as_object_mut(), fields) {
        entry.extend(fields);
    }
    File::new(path).append(&line("command", &config.host_name, entry))
}

fn write(event: &str, fields: Value) {
    let mut host = host();
    let Some(host) = host.as_mut() else { return };
    let line = line(event, &host.name, fields);
    match host.file.append(&line) {
        Ok(()) => host.file.is_told = false,
        Err(error) => {
            if !std::mem::replace(&mut host.file.is_told, true) {
                let path = host.file.path.display();
                tracing::error!(%path, %error, event, "cannot write the audit log: what happens is missing in it until it can be written again");
            }
        }
    }
}

/// One entry with its end of line. JSON escapes line ends; other control characters, which could mislead a terminal, are escaped here.
fn line(event: &str, host: &str, fields: Value) -> Vec<u8> {
    let mut time = String::new();
    // As the log writes it. Writing to a string cannot fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    let mut entry = Map::new();
    entry.extend(
        [("time", time.into()), ("event", event.into()), ("host", host.into())]
            .map(|(name, value): (&str, Value)| (name.to_owned(), value)),
    );
    entry.extend([("pid".to_owned(), std::process::id().into()), ("uid".to_owned(), rustix::process::getuid().as_raw().into())]);
    if let Value::Object(fields) = fields {
        entry.extend(fields);
    }
    let mut line = String::new();
    for character in Value::Object(entry).to_string().chars() {
        if character.is_control() || matches!(character, '\u{2028}' | '\u{2029}') {
            line.push_str(&format!("\\u{:04x}", u32::from(character)));
        } else {
            line.push(character);
        }
    }
    line.push('\n');
    line.into_bytes()
}

fn plugin(folder: &Path, plugin: &str, digest: Option<Digest>) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("plugin".to_owned(), plugin.into());
    fields.insert("sha256".to_owned(), json!(digest.map(|digest| digest.to_string())));
    fields.insert("file".to_owned(), absolute(&file_of(folder, plugin)).into());
    fields
}

fn file_of(folder: &Path, plugin: &str) -> PathBuf {
    folder.join(format!("{plugin}.wasm"))
}

fn absolute(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf()).to_string_lossy().into_owned()
}

/// What all routes grant, by plugin.
fn granted(config: &Config) -> BTreeMap<String, Value> {
    let mut granted: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for route in &config.routes {
        granted.entry(route.plugin.clone()).or_default().push(self::route(route));
    }
    granted.into_iter().map(|(plugin, routes)| (plugin, routes.into())).collect()
}

fn route(route: &Route) -> Value {
    let (key, types) = match &route.matcher {
        Matcher::Exact(exact) => ("type", exact.as_str()),
        Matcher::Pattern(pattern) => ("pattern", pattern.as_str()),
    };
    let mut told = json!({ "plugin": route.plugin, "grants": grants(&route.grants) });
    told[key] = types.into();
    told
}

/// Folders with their limits, the names of variables without their values, and which follow-up tasks may be submitted.
fn grants(grants: &Grants) -> Value {
    let folders: Vec<Value> = grants.folders.iter().map(folder).collect();
    let environment: Vec<&str> = grants.environment.iter().map(|(name, _)| name.as_str()).collect();
    let FollowUps { types, users, keys, queues, depth, waiting } = &grants.follow_ups;
    let types = match types {
        Types::Own => json!("own"),
        Types::Listed(types) => json!(types),
        Types::Any => json!("any"),
    };
    let users = match users {
        Users::Own => "own",
        Users::Any => "any",
    };
    let keys = match keys {
        Keys::Own => json!("own"),
        Keys::Prefix(prefix) => json!({ "prefix": prefix }),
        Keys::Any => json!("any"),
    };
    let queues = match queues {
        Queues::Own => json!("own"),
        Queues::Listed(queues) => json!(queues),
        Queues::Any => json!("any"),
    };
    let follow_ups =
        json!({ "types": types, "users": users, "keys": keys, "queues": queues, "depth": depth, "waiting": waiting });
    json!({ "folders": folders, "environment": environment, "follow_ups": follow_ups })
}

/// A limit that is null is none.
fn folder(folder: &FolderGrant) -> Value {
    let mut told = json!({ "host": absolute(&folder.host), "guest": folder.guest, "writable": folder.writable });
    if folder.writable {
        told["size_limit"] = json!(folder.bytes_max);
        told["file_limit"] = json!(folder.files_max);
    }
    told
}

/// The name of this process's user, if the machine's own list has it.
fn user_name() -> Option<String> {
    let uid = rustix::process::getuid().as_raw().to_string();
    let users = std::fs::read_to_string("/etc/passwd").ok()?;
    users.lines().find_map(|line| {
        let mut parts = line.split(':');
        let (name, _, id) = (parts.next()?, parts.next()?, parts.next()?);
        (id == uid).then(|| name.to_owned())
    })
}

/// The user who logged in, whatever it has become since (`sudo`); None for services and where the kernel does not keep it.
fn login_uid() -> Option<u32> {
    let uid = std::fs::read_to_string("/proc/self/loginuid").ok()?.trim().parse().ok()?;
    (uid != u32::MAX).then_some(uid)
}

/// A panic while the lock was held leaves at most an entry out.
fn host() -> std::sync::MutexGuard<'static, Option<Host>> {
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_can_forge_an_entry() {
        let forged = "x\"}\n{\"event\":\"command\"}\r\u{9b}2J\u{7f}\u{2028}";
        let line = String::from_utf8(line("signal", "host", json!({ "file": forged }))).expect("text");
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(line.trim_end_matches('\n').chars().all(|character| !character.is_control()), "{line}");
        let entry: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&entry["event"], &entry["file"]), (&json!("signal"), &json!(forged)));
        assert!(entry["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{entry}");
    }
}
