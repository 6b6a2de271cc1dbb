//! What a handler may reach of the world: what its route grants, and nothing else.

use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder};

use super::capture::{Capture, Stream};
use super::{Error, Grants};

/// The most random bytes of one call.
const RANDOM_BYTES_MAX: u64 = 1 << 20;

/// The world of one instance: clocks, random numbers, captured standard streams, and the grants. No network, no arguments, empty input.
///
/// # Errors
/// [`Error::Refused`] if a granted folder cannot be opened now.
pub(super) fn world(grants: &Grants, capture: &Capture) -> Result<WasiCtx, Error> {
    let mut builder = WasiCtxBuilder::new();
    builder
        .stdout(capture.pipe(Stream::Stdout))
        .stderr(capture.pipe(Stream::Stderr))
        .max_random_size(RANDOM_BYTES_MAX)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        // File operations go to threads of their own, so that a slow disk does not hold a guest's thread.
        .allow_blocking_current_thread(false);
    for (name, value) in &grants.environment {
        builder.env(name, value);
    }
    for folder in &grants.folders {
        let permissions = if folder.writable { FsPerms::ReadWrite } else { FsPerms::ReadOnly };
        builder.preopened_dir(&folder.host, &folder.guest, permissions).map_err(|error| {
            Error::Refused(format!("the granted folder {} cannot be opened: {error:#}", folder.host.display()))
        })?;
    }
    Ok(builder.build())
}
