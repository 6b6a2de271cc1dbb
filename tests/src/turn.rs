//! Who has the machine. Most tests run side by side; one that measures time has it to itself.

use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

static MACHINE: RwLock<()> = RwLock::const_new(());

/// The right to use the machine, until dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its drop")]
pub(crate) enum Turn {
    /// Beside others.
    Shared(RwLockReadGuard<'static, ()>),
    /// Alone.
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Turn {
    pub(crate) async fn shared() -> Self {
        Self::Shared(MACHINE.read().await)
    }

    pub(crate) async fn alone() -> Self {
        Self::Alone(MACHINE.write().await)
    }
}
