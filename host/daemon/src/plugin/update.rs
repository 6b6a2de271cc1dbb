//! `context.update-data`: new members for a task's data, with a bound on what all guests together make the host hold for it.
//!
//! The host needs several times the data's size while it merges: what is stored, the members, the result, and what the database's client makes
//! of both. So large updates take turns. One waits with its members still in the guest's own memory, which counts towards the guest's limit.

use std::sync::Arc;

use laelaps_queue::{LeaseAnswer, NewTask};
use tokio::sync::{Semaphore, SemaphorePermit};
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, WasmList};

use super::Cancellation;
use super::abi::latest::laelaps::worker::context;
use super::guest::{Guest, lease_lost, refusal};

/// What is merged at the same time in this process: data and members together, in KiB. The two largest fit.
const MERGED_KIB_MAX: u32 = 32 << 10;
/// Data and members of this size together do not wait: an update of a few bytes shall not stand behind one of megabytes.
const SMALL_BYTES: usize = 64 << 10;

static MERGED_KIB: Semaphore = Semaphore::const_new(MERGED_KIB_MAX as usize);

/// Put the call in place of the generated one, which would copy the members into the host before anybody could ask whether there is room.
pub(super) fn add_to_linker(linker: &mut Linker<Guest>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    linker.instance("laelaps:worker/context@0.1.0")?.func_wrap_async(
        "update-data",
        |store: StoreContextMut<'_, Guest>, (members,): (WasmList<u8>,)| {
            Box::new(async move { Ok((update(store, members).await?,)) })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

async fn update(mut store: StoreContextMut<'_, Guest>, members: WasmList<u8>) -> wasmtime::Result<Result<(), context::Refusal>> {
    if members.len() > NewTask::DATA_BYTES_MAX {
        let problem = format!("the update has {} bytes; at most {} are allowed", members.len(), NewTask::DATA_BYTES_MAX);
        return Ok(Err(refusal("too-large", problem)));
    }
    let room = room(store.data().attempt.data_bytes.saturating_add(members.len())).await;
    let members = members.as_le_slice(&store).to_vec();
    store.data_mut().update(members, room).await
}

/// Wait until so much may be merged.
async fn room(bytes: usize) -> Option<SemaphorePermit<'static>> {
    if bytes <= SMALL_BYTES {
        return None;
    }
    let kib = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(MERGED_KIB_MAX);
    // It is never closed.
    MERGED_KIB.acquire_many(kib).await.ok()
}

impl Guest {
    /// Merge the members into the data of this guest's task. The room is kept until the host is done, also if the guest is stopped before.
    pub(super) async fn update(
        &mut self,
        members: Vec<u8>,
        room: Option<SemaphorePermit<'static>>,
    ) -> wasmtime::Result<Result<(), context::Refusal>> {
        if self.attempt.is_lease_lost() {
            return Ok(Err(lease_lost()));
        }
        let bytes = members.len();
        let merge = |services: Arc<dyn super::Services>| async move {
            let answer = services.update_data(members).await;
            drop(room);
            answer
        };
        Ok(match self.attempt.ask(merge).await? {
            Ok(LeaseAnswer::Held) => {
                self.attempt.data_bytes = self.attempt.data_bytes.saturating_add(bytes).min(NewTask::DATA_BYTES_MAX);
                Ok(())
            }
            Ok(LeaseAnswer::Lost) => {
                self.attempt.control.cancel(Cancellation::LeaseLost);
                Err(lease_lost())
            }
            Err(laelaps_queue::Error::InvalidTask { problem, .. }) => Err(refusal("invalid-data", problem)),
            // The database's own words are for the operator, not for the handler.
            Err(error) => Err(refusal("unavailable", error.to_string())),
        })
    }
}
