//! Real ZooKeeper servers (Debian's `zookeeper`) for tests: one, or an ensemble of three, on free ports and in folders of their own.

#[path = "../../src/guarded.rs"]
mod guarded;
#[path = "../../src/patience.rs"]
mod patience;
mod server;

pub use patience::{LONG, PATIENCE, eventually};
pub use server::{Ensemble, Server, TICK, shared};
