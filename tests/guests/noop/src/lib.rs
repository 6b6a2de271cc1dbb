//! A handler that does nothing.

use laelaps_plugin::{Outcome, Result, handler};
use serde::de::IgnoredAny;

#[handler]
fn nothing(_data: IgnoredAny) -> Result<Outcome> {
    Ok(Outcome::done())
}
