//! What a handler may reach of the world: what its route grants, and nothing else.
//!
//! Files are ours from the descriptor to the stream; the rest of WASI is wasmtime-wasi's. A file or folder that a guest opens belongs to the
//! grant below which it was opened, and all of its operations run on the threads of the plugin ([`pool`]).

mod handle;
mod host;
mod path;
mod pool;
mod quota;
mod root;
mod stream;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker};
use wasmtime_wasi::p2::bindings::filesystem::{preopens, types};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder};

use self::handle::{Buffers, Grant, Handle};
pub(super) use self::host::FilesView;
pub(super) use self::pool::Pools;
use self::quota::Quota;
use self::root::Roots;
pub(crate) use self::root::nested;
use super::capture::{Capture, Stream};
use super::guest::Guest;
use super::{Error, FolderGrant, Grants};

/// The most random bytes of one call.
const RANDOM_BYTES_MAX: u64 = 1 << 20;

/// The world of one instance without its files: clocks, random numbers, captured standard streams and granted variables. No network, no
/// arguments, empty input.
pub(super) fn world(grants: &Grants, capture: &Capture) -> WasiCtx {
    let mut builder = WasiCtxBuilder::new();
    builder
        .stdout(capture.pipe(Stream::Stdout))
        .stderr(capture.pipe(Stream::Stderr))
        .max_random_size(RANDOM_BYTES_MAX)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .allow_blocking_current_thread(false);
    for (name, value) in &grants.environment {
        builder.env(name, value);
    }
    builder.build()
}

/// What an engine has for the files of all its plugins.
#[derive(Default)]
pub(super) struct Folders {
    pub(super) pools: Pools,
    roots: Roots,
}

/// The granted folders of one instance, with the names under which it sees them.
#[derive(Default)]
pub(super) struct Files {
    granted: Vec<(Arc<Handle>, String)>,
}

impl Folders {
    /// Open what is granted to an instance of this plugin. Without a folder it does nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] if a granted folder cannot be opened now.
    pub(super) async fn open(self: &Arc<Self>, plugin: &str, grants: &Arc<[FolderGrant]>) -> Result<Files, Error> {
        if grants.is_empty() {
            return Ok(Files::default());
        }
        let pool = self.pools.of(plugin);
        let (folders, granted) = (self.clone(), grants.clone());
        // Even to find a folder may wait for its disk.
        let opened = pool.run(move || granted.iter().map(|grant| folders.roots.open(grant)).collect::<Vec<_>>()).await;
        let opened = opened.unwrap_or_else(|error| vec![Err(error)]);
        let buffers = Arc::new(Buffers::default());
        let mut files = Files::default();
        for (grant, opened) in grants.iter().zip(opened) {
            let (folder, ledger) = opened.map_err(|error: io::Error| {
                Error::Refused(format!("the granted folder {} cannot be opened: {error}", grant.host.display()))
            })?;
            let quota = Quota { bytes_max: grant.bytes_max, files_max: grant.files_max };
            let shared = Grant { counted: ledger.map(|ledger| (ledger, quota)), pool: pool.clone(), buffers: buffers.clone() };
            files.granted.push((Arc::new(Handle::granted(folder, Arc::new(shared))), grant.guest.clone()));
        }
        Ok(files)
    }
}

/// How bindings find the files of a guest.
struct HasFiles;

impl HasData for HasFiles {
    type Data<'a> = FilesView<'a>;
}

/// Everything of WASI that a handler may import, with files as they are granted here.
pub(super) fn link(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    linker.allow_shadowing(true);
    preopens::add_to_linker::<_, HasFiles>(linker, Guest::files)?;
    types::add_to_linker::<_, HasFiles>(linker, Guest::files)?;
    linker.allow_shadowing(false);
    Ok(())
}
