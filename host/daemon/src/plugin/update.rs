//! `context.update-data`: new members for a task's data, with a bound on what all guests together make the host hold for it.
//!
//! The host needs several times the data's size while it merges: what is stored, the members, the result, and what the database's client makes
//! of both. So large updates take turns. One waits with its members still in the guest's own memory, which counts towards the guest's limit.
//!
//! The largest also leave the database to others in between: an update writes the task's whole data, and on SQLite nobody else writes meanwhile.

use std::sync::Arc;
use std::time::Duration;

use laelaps_queue::{LeaseAnswer, NewTask};
use tokio::sync::{Mutex, MutexGuard, Semaphore, SemaphorePermit};
use tokio::time::Instant;
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, WasmList};

use super::Cancellation;
use super::abi::latest::laelaps::worker::context;
use super::guest::{Guest, lease_lost, refusal};

/// What is merged at the same time in this process: data and members together, in KiB. The two largest fit.
const MERGED_KIB_MAX: u32 = 32 << 10;
/// Data and members of this size together do not wait: an update of a few bytes shall not stand behind one of megabytes.
const SMALL_BYTES: usize = 64 << 10;

/// Data and members of this size together go one at a time, with pauses. A disk writes less within a few milliseconds.
const LARGE_BYTES: usize = 1 << 20;
/// The pause after such an update is so many times as long as the update took: together they have a quarter of the database's time at most.
const PAUSE_TIMES: u32 = 3;
/// A longer pause would only tell of a database that is slow or away.
const PAUSE_MAX: Duration = Duration::from_secs(1);

static MERGED_KIB: Semaphore = Semaphore::const_new(MERGED_KIB_MAX as usize);
/// When the next large update may begin. Held by the one under way.
static NEXT_LARGE: Mutex<Option<Instant>> = Mutex::const_new(None);

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
    let bytes = store.data().attempt.data_bytes.saturating_add(members.len());
    let share = Share { _turn: turn(bytes).await, _room: room(bytes).await };
    let members = members.as_le_slice(&store).to_vec();
    store.data_mut().update(members, share).await
}

/// What an update has of what all guests share, until it is done.
#[derive(Default)]
pub(super) struct Share {
    _turn: Option<Turn>,
    _room: Option<SemaphorePermit<'static>>,
}

/// The turn of a large update. The next one comes a while after its end.
struct Turn {
    begun: Instant,
    next: MutexGuard<'static, Option<Instant>>,
}

/// Wait for a turn, if so much needs one.
async fn turn(bytes: usize) -> Option<Turn> {
    if bytes < LARGE_BYTES {
        return None;
    }
    let next = NEXT_LARGE.lock().await;
    if let Some(moment) = *next {
        tokio::time::sleep_until(moment).await;
    }
    Some(Turn { begun: Instant::now(), next })
}

impl Drop for Turn {
    fn drop(&mut self) {
        *self.next = Some(Instant::now() + (self.begun.elapsed() * PAUSE_TIMES).min(PAUSE_MAX));
    }
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
    /// Merge the members into the data of this guest's task. The share is kept until the host is done, also if the guest is stopped before.
    pub(super) async fn update(&mut self, members: Vec<u8>, share: Share) -> wasmtime::Result<Result<(), context::Refusal>> {
        if self.attempt.is_lease_lost() {
            return Ok(Err(lease_lost()));
        }
        let bytes = members.len();
        let merge = |services: Arc<dyn super::Services>| async move {
            let answer = services.update_data(members).await;
            drop(share);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_large_update_leaves_three_quarters_of_the_time_to_others_and_a_small_one_waits_for_none() {
        let mut begun = Vec::new();
        for _ in 0..3 {
            let large = turn(LARGE_BYTES).await.expect("a large one needs a turn");
            begun.push(large.begun);
            // Beside one under way, and in its pause.
            assert!(turn(LARGE_BYTES - 1).await.is_none());
            while large.begun.elapsed() < Duration::from_millis(2) {
                tokio::task::yield_now().await;
            }
            drop(large);
            assert!(turn(LARGE_BYTES - 1).await.is_none());
        }
        for pair in begun.windows(2) {
            assert!(pair[1] - pair[0] >= Duration::from_millis(2) * (1 + PAUSE_TIMES), "{pair:?}");
        }
        // One that took long, as while the database was away.
        let mut large = turn(LARGE_BYTES).await.expect("a large one needs a turn");
        large.begun = large.begun.checked_sub(PAUSE_MAX * 100).expect("the machine runs for longer");
        drop(large);
        assert!(NEXT_LARGE.lock().await.expect("the next turn's moment") <= Instant::now() + PAUSE_MAX);
    }
}
