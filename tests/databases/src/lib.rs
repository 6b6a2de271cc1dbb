//! Real database servers for tests and benches (Debian's `postgresql` and `mariadb-server`), on free ports and in folders of their own.

mod certificates;
#[path = "../../src/guarded.rs"]
mod guarded;
pub mod mariadb;
#[path = "../../src/patience.rs"]
mod patience;
pub mod postgres;
mod server;

pub use certificates::Certificates;
pub use patience::{LONG, PATIENCE, eventually};
pub use server::Durability;
