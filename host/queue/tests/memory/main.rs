//! What merging costs in memory: a program of its own, since it counts what all of its threads have allocated.

#![allow(unsafe_code, reason = "an allocator is unsafe by nature")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use laelaps_queue::{Config, LeaseAnswer, NewTask, PollOptions, Queue};

/// The system's allocator, and how much of it is in use.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn taken(bytes: usize) {
    let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(now, Ordering::Relaxed);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the same.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A JSON object of so many bytes, all of it members of a few bytes each.
fn small_members(bytes: usize, value: u8) -> Vec<u8> {
    let mut object = String::with_capacity(bytes + 32);
    for number in 0.. {
        let separator = if number == 0 { '{' } else { ',' };
        object.push_str(&format!("{separator}\"{number:x}\":{value}"));
        if object.len() >= bytes {
            break;
        }
    }
    object.push('}');
    object.into_bytes()
}

#[tokio::test]
async fn merging_a_million_members_costs_a_few_times_their_bytes() {
    const BYTES: usize = 15_000_000;
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}", folder.path().join("queue.db").display());
    let queue = Queue::open(&Config::new(url)).await.unwrap();
    queue.init().await.unwrap();
    queue.submit(NewTask::new("large", "type", small_members(BYTES, 0))).await.unwrap();
    let mut task = queue.poll(&PollOptions::default()).await.unwrap().unwrap();
    let members = small_members(BYTES, 1);
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    assert_eq!(task.update_data(&members).await.unwrap(), LeaseAnswer::Held);
    let times = (PEAK.load(Ordering::Relaxed) - before) as f64 / BYTES as f64;
    assert!(times < 8.0, "{times:.1} times as much as the members have");
    assert_eq!(task.data(), members, "the same names with other values, in their places");
}
