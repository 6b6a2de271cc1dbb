//! What needs a grant: files, environment, network. And the two files by which tests follow a handler: its mark and its gate.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::bindings::laelaps::worker::types::{Failure, Task};
use crate::fine::{PATIENCE, sleep};
use crate::{Answer, finish, parameter, reject};

pub(crate) fn visit(task: &Task, data: &Value) -> Option<Answer> {
    Some(match task.kind.as_str() {
        "write-file" => path(data).and_then(|path| {
            let text: String = parameter(data, "text")?.unwrap_or_else(|| task.key.clone());
            answer(&path, fs::write(&path, text)).and_then(|()| finish(&json!({ "wrote": path })))
        }),
        "read-file" => {
            path(data).and_then(|path| answer(&path, fs::read_to_string(&path))).and_then(|text| finish(&json!({ "text": text })))
        }
        "list-folder" => path(data).and_then(|path| list(&path)),
        "remove-file" => path(data).and_then(|path| answer(&path, fs::remove_file(&path))).and_then(|()| finish(&json!({}))),
        "open-many" => open_many(data),
        "list-many" => list_many(data),
        "environment" => environment(),
        "connect" => connect(data),
        _ => return None,
    })
}

/// Appends `KEY ATTEMPT` as one line to the file that `mark` names.
pub(crate) fn mark(task: &Task, data: &Value) -> Result<(), Failure> {
    let Some(path) = parameter::<String>(data, "mark")? else { return Ok(()) };
    let line = format!("{} {}\n", task.key, task.attempt);
    let written = OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
    answer(&path, written)
}

/// Waits until the file that `gate` names is there.
pub(crate) fn wait_for_gate(data: &Value) -> Result<(), Failure> {
    let Some(gate) = parameter::<String>(data, "gate")? else { return Ok(()) };
    let begun = Instant::now();
    // A guest has nothing that tells it of a new file.
    while !Path::new(&gate).exists() {
        if begun.elapsed() > PATIENCE {
            return Err(reject("gate", &format!("{gate} was not there within {PATIENCE:?}")));
        }
        sleep(5);
    }
    Ok(())
}

fn path(data: &Value) -> Result<String, Failure> {
    parameter(data, "path")?.ok_or_else(|| reject("bad-parameter", "parameter `path` is missing"))
}

fn answer<T>(path: &str, result: std::io::Result<T>) -> Result<T, Failure> {
    result.map_err(|error| reject("file", &format!("{path}: {error}")))
}

fn list(path: &str) -> Answer {
    let mut names: Vec<String> =
        answer(path, fs::read_dir(path))?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    finish(&json!({ "names": names }))
}

/// Opens `path` again and again, `count` times, and keeps every handle.
fn open_many(data: &Value) -> Answer {
    let path = path(data)?;
    let count: usize = parameter(data, "count")?.unwrap_or(usize::MAX);
    let mut open = Vec::new();
    while open.len() < count {
        match File::open(&path) {
            Ok(file) => open.push(file),
            Err(error) => return finish(&json!({ "open": open.len(), "refused": error.to_string() })),
        }
    }
    finish(&json!({ "open": open.len() }))
}

/// Begins to list the folder `path`, `count` times, and keeps every listing where it is.
fn list_many(data: &Value) -> Answer {
    let path = path(data)?;
    let count: usize = parameter(data, "count")?.unwrap_or(1);
    let mut listings = Vec::new();
    for _ in 0..count {
        let mut listing = answer(&path, fs::read_dir(&path))?;
        if let Some(entry) = listing.next() {
            answer(&path, entry)?;
        }
        listings.push(listing);
    }
    finish(&json!({ "listings": listings.len() }))
}

fn environment() -> Answer {
    let names: serde_json::Map<String, Value> = std::env::vars().map(|(name, value)| (name, Value::from(value))).collect();
    let arguments: Vec<String> = std::env::args().collect();
    finish(&json!({ "environment": names, "arguments": arguments }))
}

fn connect(data: &Value) -> Answer {
    let address: String = parameter(data, "address")?.unwrap_or_else(|| "127.0.0.1:80".to_owned());
    match TcpStream::connect(&address) {
        Ok(_) => finish(&json!({ "connected": true })),
        Err(error) => finish(&json!({ "connected": false, "error": error.to_string() })),
    }
}
