//! Real ZooKeeper servers (Debian's `zookeeper`) for tests: one, or an ensemble of three, on free ports and in folders of their own.

#[path = "../../src/guarded.rs"]
mod guarded;
#[path = "../../src/names.rs"]
mod names;
#[path = "../../src/patience.rs"]
mod patience;
#[path = "../../src/ports.rs"]
mod ports;
mod server;

pub use names::unique_name;
pub use patience::{LONG, PATIENCE, eventually, waiting_for};
pub use server::{Ensemble, SHARED_PORT, Server, TICK, shared};
