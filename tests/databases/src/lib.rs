//! Real database servers for tests and benches (Debian's `postgresql` and `mariadb-server`), on free ports and in folders of their own, and gates
//! before them.

mod certificates;
mod clock;
pub mod gate;
#[path = "../../src/guarded.rs"]
mod guarded;
mod later;
pub mod mariadb;
#[path = "../../src/names.rs"]
mod names;
#[path = "../../src/patience.rs"]
mod patience;
#[path = "../../src/ports.rs"]
mod ports;
pub mod postgres;
mod server;

pub use certificates::Certificates;
pub use clock::Clock;
pub use later::later_step;
pub use names::unique_name;
pub use patience::{LONG, PATIENCE, eventually, waiting_for};
pub use server::{Durability, Going, Replication};
