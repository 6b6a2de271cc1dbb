//! Components to plug in.

use std::fs;

use sha2::{Digest, Sha256};

use crate::program::workspace_file;

/// The bytes of the guest of this name.
///
/// # Panics
/// If it was not built.
#[must_use]
pub fn guest(name: &str) -> Vec<u8> {
    let path = workspace_file(&format!("target/guests/{name}.wasm"));
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}; build the guests with `tests/guests/build`", path.display()))
}

/// The same component under another digest: with a custom section that holds `number`. No guest can tell.
///
/// # Panics
/// If `component` is not WebAssembly.
#[must_use]
pub fn with_edition(component: &[u8], number: u32) -> Vec<u8> {
    assert!(component.starts_with(b"\0asm"), "not WebAssembly");
    const NAME: &[u8] = b"edition";
    let mut changed = component.to_vec();
    // A custom section: id 0, the length of what follows, the length of its name, its name, its content. All lengths are below 128, which
    // LEB128 writes as one byte.
    changed.extend([0, 1 + 7 + 4, 7]);
    changed.extend(NAME);
    changed.extend(number.to_le_bytes());
    changed
}

/// The digest of a component, as the host and the database name a version: sha256 in hexadecimal.
#[must_use]
pub fn digest(component: &[u8]) -> String {
    Sha256::digest(component).iter().map(|byte| format!("{byte:02x}")).collect()
}
