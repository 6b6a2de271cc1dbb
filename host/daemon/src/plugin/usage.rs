//! What this process holds in memory for its guests, counted where it is taken and given back.
//!
//! For the process and not for an engine, since two engines live beside each other while a restart builds. Plain sums that nothing waits for:
//! a reader may see one part of a change before another.

use std::sync::atomic::{AtomicU64, Ordering};

use wasmtime::component::Component;

/// What it is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Linear memory of all instances, also of those that wait to be used again.
    Guests,
    /// Compiled code of all versions that serve or are still run.
    Code,
    /// What guests have written and nobody has logged yet.
    Output,
    /// Data of claimed tasks.
    Data,
}

static HELD: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

fn sum(purpose: Purpose) -> &'static AtomicU64 {
    &HELD[purpose as usize]
}

/// The share of a component's compiled code.
pub(super) fn of_code(component: &Component) -> Share {
    let range = component.image_range();
    Share::new(Purpose::Code, (range.end as usize).saturating_sub(range.start as usize) as u64)
}

/// How many bytes are held for something at this moment.
pub(crate) fn held(purpose: Purpose) -> u64 {
    sum(purpose).load(Ordering::Relaxed)
}

/// A share of the sum, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share {
    purpose: Purpose,
    bytes: u64,
}

impl Share {
    /// So many bytes.
    pub(crate) fn new(purpose: Purpose, bytes: u64) -> Self {
        let mut share = Self { purpose, bytes: 0 };
        share.set(bytes);
        share
    }

    /// So many from now on.
    pub(crate) fn set(&mut self, bytes: u64) {
        if bytes > self.bytes {
            sum(self.purpose).fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            sum(self.purpose).fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}
