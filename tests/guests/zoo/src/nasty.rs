//! Handlers that a host has to survive.

use std::hint::black_box;
use std::io::Write;

use serde_json::{Value, json};

use crate::bindings::laelaps::worker::context::{self, Compression, SubmitOptions};
use crate::bindings::laelaps::worker::log;
use crate::bindings::laelaps::worker::types::{Finished, Outcome, Task};
use crate::files::wait_for_gate;
use crate::fine::sleep;
use crate::{Answer, finish, parameter};

const MEBIBYTE: usize = 1 << 20;

#[allow(clippy::disallowed_methods, reason = "leaving in the middle of a call is one of the things a guest can do to its host")]
pub(crate) fn visit(task: &Task, data: &Value) -> Option<Answer> {
    Some(match task.kind.as_str() {
        "panic" => panic!("{}", data["message"].as_str().unwrap_or("on purpose")),
        "unreachable" => unreachable(),
        "overflow" => finish(&json!({ "depth": recurse(0) })),
        "exit" => parameter(data, "code").map(|code| std::process::exit(code.unwrap_or(3))),
        "spin" => spin(),
        "sleep" => parameter(data, "ms").and_then(|ms| {
            sleep(ms.unwrap_or(u64::from(u32::MAX)));
            finish(&json!({ "slept": true }))
        }),
        "allocate" | "allocate-too" => allocate(data),
        "fill" => parameter(data, "bytes").and_then(|bytes| fill(bytes.unwrap_or(48 * MEBIBYTE))),
        "log-flood" => loop {
            log::log(log::Level::Info, &"log flood ".repeat(100));
        },
        "stdout-flood" => flood(&mut std::io::stdout()),
        "stderr-flood" => flood(&mut std::io::stderr()),
        "blank-lines" => blank_lines(data),
        "heartbeat-flood" => loop {
            context::heartbeat(None, None);
        },
        "submit-flood" => submit_flood(task),
        "fork" => fork(task, data),
        "huge-output" => parameter(data, "bytes")
            .map(|bytes| Outcome::Finish(Finished { output: Some(vec![b'x'; bytes.unwrap_or(4 * MEBIBYTE)]), retention: None })),
        "leftovers" => leftovers(data),
        _ => return None,
    })
}

pub(crate) fn spin() -> ! {
    loop {
        black_box(0);
    }
}

fn unreachable() -> Answer {
    #[cfg(target_arch = "wasm32")]
    core::arch::wasm32::unreachable();
    #[cfg(not(target_arch = "wasm32"))]
    std::process::abort();
}

#[allow(unconditional_recursion, reason = "running out of stack is the point")]
fn recurse(depth: u64) -> u64 {
    let frame = black_box([depth; 64]);
    recurse(frame[0] + 1) + black_box(frame)[63]
}

/// Takes memory without end, or `bytes` of it in all, and touches every page.
fn allocate(data: &Value) -> Answer {
    let limit: usize = parameter(data, "bytes")?.unwrap_or(usize::MAX);
    // Asking politely shows a refusal to the handler; otherwise the allocator's abort is a trap.
    let polite = data["polite"] == true;
    let mut taken: Vec<Vec<u8>> = Vec::new();
    while taken.len() * MEBIBYTE < limit {
        let mut block = Vec::new();
        if polite && block.try_reserve_exact(MEBIBYTE).is_err() {
            return finish(&json!({ "mebibytes": taken.len(), "refused": true }));
        }
        block.resize(MEBIBYTE, 1);
        taken.push(black_box(block));
    }
    wait_for_gate(&json!({ "gate": data["hold"] }))?;
    finish(&json!({ "mebibytes": taken.len(), "refused": false }))
}

/// One `memory.fill` after another over `bytes`: each is a single step in which no epoch is looked at.
fn fill(bytes: usize) -> Answer {
    let mut buffer = vec![0u8; bytes];
    for value in (0..=u8::MAX).cycle() {
        black_box(&mut buffer).fill(black_box(value));
    }
    unreachable!("the cycle has no end")
}

fn flood(stream: &mut dyn Write) -> Answer {
    let block = b"flood ".repeat(1000);
    loop {
        // A host may close the stream; the flood goes on all the same.
        let _ = stream.write_all(&block);
    }
}

/// Writes `count` lines of nothing, then finishes.
fn blank_lines(data: &Value) -> Answer {
    let count: usize = parameter(data, "count")?.unwrap_or(100_000);
    let _ = std::io::stdout().write_all(&b"\n".repeat(count));
    finish(&json!({ "lines": count }))
}

fn submit_flood(task: &Task) -> Answer {
    let options =
        SubmitOptions { run_at: None, user: None, max_running: None, max_attempts: None, compression: Compression::None };
    let data = format!("{{\"filler\":\"{}\"}}", "x".repeat(10_000));
    for number in 0u64.. {
        if let Err(refusal) = context::submit(&format!("{}-{number}", task.key), "silent", data.as_bytes(), &options) {
            return finish(&json!({ "taken": number, "code": refusal.code, "message": refusal.message }));
        }
    }
    unreachable!("a host that takes follow-ups without end")
}

/// Submits `count` of its own sort and with its own data, under random keys, and finishes whatever comes of it.
fn fork(task: &Task, data: &Value) -> Answer {
    use std::hash::{BuildHasher, RandomState};
    let count: u32 = parameter(data, "count")?.unwrap_or(2);
    let prefix: String = parameter(data, "prefix")?.unwrap_or_else(|| "zoo/".to_owned());
    let delay_ms: Option<u64> = parameter(data, "delay_ms")?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 2));
    let options = SubmitOptions {
        run_at: delay_ms.map(|delay_ms| now + delay_ms),
        user: None,
        max_running: None,
        max_attempts: None,
        compression: Compression::None,
    };
    let mut codes = Vec::new();
    for _ in 0..count {
        let key = format!("{prefix}{:016x}", RandomState::new().hash_one(task.attempt));
        if let Err(refusal) = context::submit(&key, &task.kind, &task.data, &options) {
            codes.push(refusal.code);
        }
    }
    finish(&json!({ "codes": codes }))
}

/// Looks for bytes that another instance left in this memory, then leaves some.
fn leftovers(data: &Value) -> Answer {
    const SIZE: usize = 4 * MEBIBYTE;
    static mut STATIC: [u8; MEBIBYTE] = [0; MEBIBYTE];
    let fingerprint: u8 = parameter(data, "fingerprint")?.unwrap_or(0xA5);
    // A guest has one thread, and this is the only use of the buffer.
    let found_static = unsafe {
        let buffer: &mut [u8] = std::slice::from_raw_parts_mut((&raw mut STATIC).cast::<u8>(), MEBIBYTE);
        let found = black_box(&*buffer).iter().filter(|&&byte| byte != 0).count();
        buffer.fill(fingerprint);
        black_box(buffer);
        found
    };
    let (found_grown, grown) = grown_leftovers(SIZE, fingerprint);
    finish(&json!({ "found_static": found_static, "found_grown": found_grown, "looked_at": MEBIBYTE + grown }))
}

/// The same for memory that is grown now, which the contract of WebAssembly says is zero.
#[cfg(target_arch = "wasm32")]
fn grown_leftovers(size: usize, fingerprint: u8) -> (usize, usize) {
    const PAGE: usize = 65_536;
    let before = core::arch::wasm32::memory_grow(0, size / PAGE);
    if before == usize::MAX {
        return (0, 0);
    }
    // The pages were grown for this slice alone.
    let pages = unsafe { std::slice::from_raw_parts_mut((before * PAGE) as *mut u8, size) };
    let found = black_box(&*pages).iter().filter(|&&byte| byte != 0).count();
    pages.fill(fingerprint);
    black_box(pages);
    (found, size)
}

#[cfg(not(target_arch = "wasm32"))]
fn grown_leftovers(_size: usize, _fingerprint: u8) -> (usize, usize) {
    (0, 0)
}
