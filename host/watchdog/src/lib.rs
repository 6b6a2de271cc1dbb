//! Who is alive, and what is left to do, kept in ZooKeeper.
//!
//! - [`WatchdogQueue`] speaks WatchdogQueue's layout, so that masters and children written for the Perl module share a root with ours.
//! - [`fleet`] tells the living hosts of a fleet from the dead, and chooses the one that hands on what the dead had.
//! - [`mover`] moves items into a database so that none is lost and none comes twice.
//! - [`Session`] is the connection under it: states, expiry, authentication.
//!
//! This crate knows no database and no WebAssembly, and is usable alone. It runs on tokio: a session lives on the runtime it was
//! connected on.

mod age;
mod error;
pub mod fleet;
mod items;
pub mod mover;
mod node;
mod queue;
mod root;
mod session;
mod timer;

pub use error::{Error, Result};
pub use items::{ITEM_BYTES_MAX, Item, NewQueue, PERL_BYTES_MAX};
pub use node::Node;
pub use queue::WatchdogQueue;
pub use root::Root;
pub use session::{Access, Digest, End, Options, Session, SessionId, State, Ticket};
pub use timer::{Timer, TimerAge, TimerCount};
