//! The plugin machinery with real components: compiled by the real child process, run in the real pool.

mod admission;
mod attempts;
mod guests;
mod mutation;
mod store;
mod support;
