//! Handlers that attack their host through what they were granted, or were not. tests/hostile says what each must come to.

use std::fs::{self, File, ReadDir};
use std::io::Write;
use std::net::{TcpListener, ToSocketAddrs, UdpSocket};

use serde_json::{Value, json};

use crate::bindings::laelaps::worker::context::{self, Compression, Progress, Submission, SubmitOptions};
use crate::bindings::laelaps::worker::log;
use crate::bindings::laelaps::worker::types::{Failure, Outcome, Task};
use crate::{Answer, finish, parameter, reject};

pub(crate) fn visit(task: &Task, data: &Value) -> Option<Answer> {
    Some(match task.kind.as_str() {
        "swap" => swap(data),
        "link" => link(data),
        "fill-folder" => fill_folder(data),
        "list-many" => list_many(data),
        "sockets" => sockets(),
        "update-large" => update_large(data),
        "huge-text" => huge_text(data),
        "endless-line" => endless_line(),
        "descend" => descend(task, data),
        _ => return None,
    })
}

fn text(data: &Value, name: &str) -> Result<String, Failure> {
    parameter(data, name)?.ok_or_else(|| reject("bad-parameter", &format!("parameter `{name}` is missing")))
}

fn number(data: &Value, name: &str, default: usize) -> Result<usize, Failure> {
    Ok(parameter(data, name)?.unwrap_or(default))
}

#[allow(deprecated, reason = "the only function of the standard library that makes links on every target")]
fn make_link(to: &str, path: &str) -> std::io::Result<()> {
    fs::soft_link(to, path)
}

/// Moves the folder `path` away and puts a link to `to` in its place.
fn swap(data: &Value) -> Answer {
    let (path, to) = (text(data, "path")?, text(data, "to")?);
    let moved = fs::rename(&path, format!("{path}.away"));
    let linked = make_link(&to, &path);
    finish(&json!({ "moved": moved.is_ok(), "linked": linked.is_ok(), "errors": format!("{moved:?} {linked:?}") }))
}

/// Makes a link at `path` to each of `targets`, and reads and writes through it.
fn link(data: &Value) -> Answer {
    let path = text(data, "path")?;
    let targets: Vec<String> = parameter(data, "targets")?.unwrap_or_default();
    let mut leaks = Vec::new();
    for target in targets {
        let _ = fs::remove_file(&path);
        let linked = make_link(&target, &path);
        let read = fs::read(&path);
        if let Ok(bytes) = &read {
            leaks.push(json!({ "target": target, "linked": linked.is_ok(), "bytes": bytes.len() }));
        }
        if fs::write(&path, "from the guest").is_ok() {
            // A link that could not be made leaves the name free: then this was a file of its own.
            let is_link = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.file_type().is_symlink());
            if is_link {
                leaks.push(json!({ "target": target, "wrote": true }));
            }
        }
    }
    finish(&json!({ "leaks": leaks }))
}

/// Makes `files` files of `bytes` each in the folder `path`, until one is refused. `sparse` sets their length instead of writing.
fn fill_folder(data: &Value) -> Answer {
    let path = text(data, "path")?;
    let (files, bytes) = (number(data, "files", usize::MAX)?, number(data, "bytes", 0)?);
    let block = vec![b'x'; bytes.min(1 << 20)];
    for file in 0..files {
        if let Err(error) = make_file(&format!("{path}/made-{file}"), bytes, &block, data["sparse"] == true) {
            return finish(&json!({ "files": file, "refused": error.to_string(), "kind": format!("{:?}", error.kind()) }));
        }
    }
    finish(&json!({ "files": files }))
}

fn make_file(path: &str, bytes: usize, block: &[u8], sparse: bool) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    if sparse {
        return file.set_len(bytes as u64);
    }
    let mut left = bytes;
    while left > 0 {
        let part = left.min(block.len());
        file.write_all(&block[..part])?;
        left -= part;
    }
    Ok(())
}

/// Opens `count` listings of `path` and keeps all of them.
fn list_many(data: &Value) -> Answer {
    let path = text(data, "path")?;
    let mut open: Vec<ReadDir> = Vec::new();
    while open.len() < number(data, "count", usize::MAX)? {
        match fs::read_dir(&path) {
            Ok(mut listing) => {
                let _ = listing.next();
                open.push(listing);
            }
            Err(error) => return finish(&json!({ "open": open.len(), "refused": error.to_string() })),
        }
    }
    finish(&json!({ "open": open.len() }))
}

/// Which ways to the network are open.
fn sockets() -> Answer {
    let mut open = Vec::new();
    if TcpListener::bind("127.0.0.1:0").is_ok() {
        open.push("listen");
    }
    if UdpSocket::bind("127.0.0.1:0").is_ok_and(|socket| socket.send_to(b"x", "127.0.0.1:9").is_ok()) {
        open.push("send");
    }
    if ("localhost", 80).to_socket_addrs().is_ok_and(|mut addresses| addresses.next().is_some()) {
        open.push("look up");
    }
    finish(&json!({ "open": open }))
}

/// Merges a member of `bytes` (15 MB) into the task's data, `count` times.
fn update_large(data: &Value) -> Answer {
    let (bytes, count) = (number(data, "bytes", 15_000_000)?, number(data, "count", 3)?);
    let mut refused = None;
    for round in 0..count {
        let letter = char::from(b'a' + u8::try_from(round % 26).unwrap_or(0));
        let mut members = String::with_capacity(bytes + 16);
        members.push_str("{\"large\":\"");
        members.extend(std::iter::repeat_n(letter, bytes));
        members.push_str("\"}");
        if let Err(refusal) = context::update_data(members.as_bytes()) {
            refused = Some(refusal.code);
        }
    }
    finish(&json!({ "rounds": count, "refused": refused }))
}

/// Hands a text of `bytes` to the function that `to` names.
fn huge_text(data: &Value) -> Answer {
    let huge = "x".repeat(number(data, "bytes", 30 << 20)?);
    let options =
        SubmitOptions { run_at: None, user: None, max_running: None, max_attempts: None, compression: Compression::None };
    let answer = match data["to"].as_str() {
        Some("log") => {
            log::log(log::Level::Info, &huge);
            None
        }
        Some("note") => {
            context::heartbeat(Some(&Progress { done: 0, total: None, note: huge }), None);
            None
        }
        Some("setting") => context::setting(&huge),
        Some("key") => context::submit(&huge, "silent", b"{}", &options).err().map(|refusal| refusal.code),
        Some("kind") => context::submit("a-key", &huge, b"{}", &options).err().map(|refusal| refusal.code),
        Some("user") => {
            let submission = Submission::new("a-key", "silent");
            submission.user(&huge);
            submission.submit(b"{}").err().map(|refusal| refusal.code)
        }
        Some("queue") => {
            let submission = Submission::new("a-key", "silent");
            submission.queue(&huge);
            submission.submit(b"{}").err().map(|refusal| refusal.code)
        }
        Some("members") => context::update_data(huge.as_bytes()).err().map(|refusal| refusal.code),
        _ => return Err(reject("bad-parameter", "parameter `to` names no function")),
    };
    finish(&json!({ "answer": answer }))
}

/// Writes to standard output for ever, and never ends a line.
fn endless_line() -> Answer {
    let block = [b'x'; 65_536];
    loop {
        let _ = std::io::stdout().write_all(&block);
        let _ = std::io::stdout().flush();
    }
}

/// Submits `width` (1) tasks of its own type that do the same, each under the key of this one and a number more; in each of `rounds` (1)
/// attempts.
fn descend(task: &Task, data: &Value) -> Answer {
    let width = number(data, "width", 1)?;
    let options = SubmitOptions {
        run_at: parameter(data, "run_at_ms")?,
        user: None,
        max_running: None,
        max_attempts: Some(1),
        compression: Compression::None,
    };
    for child in 0..width {
        let key = format!("{}/{}-{child}", task.key, task.attempt);
        if let Err(refusal) = context::submit(&key, &task.kind, &task.data, &options) {
            return finish(&json!({ "taken": child, "code": refusal.code, "message": refusal.message }));
        }
    }
    if task.attempt < parameter(data, "rounds")?.unwrap_or(1) {
        return Ok(Outcome::Retry(Some(0)));
    }
    finish(&json!({ "taken": width }))
}
