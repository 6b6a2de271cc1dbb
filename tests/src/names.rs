//! Names for what tests make on servers that all of them share.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A name that nothing else has on the server. By chance: the numbers of processes come again within one run of the tests.
#[must_use]
pub fn unique_name(prefix: &str) -> String {
    format!("{prefix}_{:016x}", RandomState::new().build_hasher().finish())
}
