//! Decisions: what an application does in the cases it has names for, kept apart from the work itself.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Context, Error, Outcome, Result, task};

/// The decision about an error that nobody decided about before.
pub(crate) const UNEXPECTED_ERROR_RAISED: &str = "unexpected_error_raised";

/// Answers an application's named decisions. Usually written by [`decider`](macro@crate::decider) on an `impl` block, a method for each.
pub trait Decider {
    /// Answers the decision of this name.
    ///
    /// # Errors
    /// [`undefined_decision`] for a name that it does not know, code `bad-options` for options that do not fit the decision, and whatever
    /// the decision itself answers.
    fn decide(&self, name: &str, options: Value, context: &Context) -> Result<Outcome>;

    /// What becomes of an error that no decision was made about: by default it fails the attempt as it is.
    ///
    /// # Errors
    /// The error itself, or another.
    fn unexpected_error_raised(&self, error: Error, context: &Context) -> Result<Outcome> {
        let _ = context;
        Err(error)
    }
}

/// Knows no decision but the default one about unexpected errors.
#[derive(Clone, Copy, Debug, Default)]
pub struct DefaultDecider;

impl Decider for DefaultDecider {
    fn decide(&self, name: &str, options: Value, _context: &Context) -> Result<Outcome> {
        Err(undefined_decision(name, &options, &[]))
    }
}

/// The error for a decision that nobody defined: code `undefined-decision`, tried again, since a mended plugin can be dropped in meanwhile.
pub fn undefined_decision(name: &str, options: &Value, known: &[&str]) -> Error {
    let known = match known {
        [] => "this decider defines none".to_owned(),
        known => format!("this decider defines {}", known.join(", ")),
    };
    Error::retry("undefined-decision", format_args!("undefined decision `{name}` with options {options}; {known}"))
}

/// Options as the JSON that decisions read.
pub(crate) fn options(options: impl Serialize) -> Result<Value> {
    serde_json::to_value(options).map_err(|error| Error::retry("bad-options", error))
}

/// Options as a decision's own type.
///
/// # Errors
/// Code `bad-options`, to be tried again, naming the decision and the member that does not fit.
pub fn read<T: DeserializeOwned>(name: &str, options: &Value) -> Result<T> {
    task::read("bad-options", "options", options.to_string().as_bytes())
        .map_err(|error| Error::retry(error.code(), format_args!("decision `{name}`: {}", error.message())))
}

/// The error that somebody who calls `unexpected_error_raised` by its name describes in the options.
pub(crate) fn described_error(options: &Value) -> Error {
    let code = options.get("code").and_then(Value::as_str).unwrap_or("unexpected-error");
    match options.get("error").or_else(|| options.get("message")) {
        Some(Value::String(message)) => Error::retry(code, message),
        Some(message) => Error::retry(code, message),
        None => Error::retry(code, options),
    }
}
