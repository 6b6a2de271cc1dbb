//! The hostile suite: what a stranger's module, its guests and its folders try against a host, and that it comes to nothing.
//!
//! Each test puts hostile modules beside a good plugin into a [`Yard`]: a real host in a memory cgroup of its own (or under a limit on its
//! data, where the machine has no such cgroup). A stream of good tasks runs all the while. At the end every good task has finished, the host
//! is the process that was started, its memory stayed below [`yard::HOST_BYTES_MAX`], nothing was killed for memory, it is quiet again, and
//! what it says of the attack names the plugin and the reason. How much slower the good tasks are is held to twice in `tests/soak hostile`.
//!
//! docs/security.md lists these tests beside the promises that they keep.

mod admission;
mod death;
mod deputies;
mod folders;
mod handed;
mod names;
mod pointers;
mod quotas;
mod resources;
mod types;
mod wat;
mod yard;

use yard::{Yard, attack, refusals};
