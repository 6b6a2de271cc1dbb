//! The zoo: a handler that behaves as its task's kind says, well or badly, so that tests can meet every behaviour a host has to bear.
//!
//! Every kind reads its parameters from the task's data; README.md lists them. Bindings are used raw, without the SDK, so that the host is
//! tested against the contract and not against our own conveniences.

// Generated glue is unsafe by nature, and expands here too.
#![allow(unsafe_code)]
// What the host's own code must not call is what a handler may try.
#![allow(clippy::disallowed_methods)]
// Elsewhere than in a component there is nobody to export to; the crate still has to build with its workspace.
#![cfg_attr(not(target_family = "wasm"), allow(dead_code))]

mod bindings {
    #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated from the contract")]
    wit_bindgen::generate!({ path: "../../../wit", world: "plugin" });
}
mod files;
mod fine;
mod hostile;
mod nasty;

use bindings::exports::laelaps::worker::handler::Guest;
use bindings::laelaps::worker::types::{Failure, FailureKind, Finished, Outcome, Task};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// What a visitor of the zoo gets back.
type Answer = Result<Outcome, Failure>;

/// Which build this is; two builds differ in nothing else.
const EDITION: u32 = if cfg!(feature = "second-edition") { 2 } else { 1 };

struct Zoo;

impl Guest for Zoo {
    fn handle(task: Task) -> Answer {
        let data: Value = serde_json::from_slice(&task.data).map_err(|error| reject("bad-data", &error.to_string()))?;
        // Any kind can leave a trace of having begun, and wait for the test's permission to go on.
        files::mark(&task, &data)?;
        files::wait_for_gate(&data)?;
        fine::visit(&task, &data)
            .or_else(|| files::visit(&task, &data))
            .or_else(|| nasty::visit(&task, &data))
            .or_else(|| hostile::visit(&task, &data))
            .unwrap_or_else(|| {
                Err(reject(
                    "no-such-animal",
                    &format!("the zoo has no `{}`; tests/guests/zoo/README.md lists what it has", task.kind),
                ))
            })
    }
}

fn finish(output: &Value) -> Answer {
    Ok(Outcome::Finish(Finished { output: Some(output.to_string().into_bytes()), retention: None }))
}

fn reject(code: &str, message: &str) -> Failure {
    Failure { kind: FailureKind::Reject, code: code.to_owned(), message: message.to_owned() }
}

/// A parameter of the task's data; a wrong type is a mistake of the test, which the failure names.
fn parameter<T: DeserializeOwned>(data: &Value, name: &str) -> Result<Option<T>, Failure> {
    match data.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|error| reject("bad-parameter", &format!("parameter `{name}` is {value}: {error}"))),
    }
}

#[cfg(target_family = "wasm")]
bindings::export!(Zoo with_types_in bindings);
