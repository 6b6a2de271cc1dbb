//! The harness of the end-to-end tests.
//!
//! A test makes a [`Site`]: a temporary folder with a configuration, a plugin folder and a queue. It starts [`Host`]s there, which
//! are real `laelaps run` processes, does to them what operators and fate do, and looks at the database through the queue crate. Nothing is
//! mocked, nothing is shared between sites, and no test waits for anything but an event with a stated patience ([`eventually`]).
//!
//! The guests come from `target/guests`, which `tests/guests/build` fills; the `laelaps` program comes from the folder of the running test.

mod database;
mod figures;
mod guests;
mod held;
mod host;
mod mutation;
mod patience;
mod program;
mod proxy;
mod queue;
mod rate;
mod server;
mod site;

pub use database::{Database, on};
pub use figures::{Figure, measured, promised, scaled};
pub use guests::{digest, guest, with_edition};
pub use held::{have_begun, submit_held};
pub use host::Host;
pub use mutation::{Dice, Mutation};
pub use patience::{LONG, PATIENCE, eventually, waiting_for};
pub use program::{Answer, has_faults, laelaps, workspace_file};
pub use proxy::Proxy;
pub use queue::{all_tasks, output, submit, task, wait_for_finished, wait_for_state, wait_for_stats};
pub use rate::rate;
pub use rustix::process::Signal;
pub use server::Server;
pub use site::Site;
