//! Faults to order, for the tests: what a host has to survive and what no test can do to it from outside.
//!
//! Only a build with the feature `fault-injection` has them, and only for tests: a build without debug assertions, as every release is,
//! does not compile with it. Without the feature, what is called here is empty and nothing reads `LAELAPS_FAULT`.
//!
//! `LAELAPS_FAULT` lists faults, with commas between them:
//!
//! | fault | what happens |
//! | --- | --- |
//! | `block-thread=TYPE` | a guest's thread that begins an attempt on a task of this type does not come back, as if in one endless instruction |
//! | `block-thread=TYPE:N` | the same for the first N such attempts |
//! | `abort-at=STEP` | the process is killed, as by a power cut, where it calls [`reach`] with this step |
//! | `abort-at=STEP:N` | the same, where it does so for the Nth time |
//! | `block-at=STEP` | the host's own thread that calls [`reach`] with this step does not come back |
//! | `block-at=STEP:N` | the same, where one does so for the Nth time |
//! | `block-file=PATH` | a file operation of a guest's that opens this path below a granted folder does not come back, as on a mount that hangs |
//! | `block-file=PATH:N` | the same for the first N such operations |
//! | `later-build=FILE` | the program plays a later build, whose schema goes on with the steps of this file: JSON, a list of `[version, oldest_program, sql]` |
//!
//! Blocked threads come back once there is a file `unblock` in the working directory.

#[cfg(feature = "fault-injection")]
mod injection;

#[cfg(feature = "fault-injection")]
pub(crate) use injection::{VERSION, arm, block_file, block_thread, later_steps, reach};
#[cfg(not(feature = "fault-injection"))]
pub(crate) use none::{VERSION, arm, block_file, block_thread, later_steps, reach};

#[cfg(all(feature = "fault-injection", not(debug_assertions)))]
compile_error!("the feature fault-injection is for tests: a release build must not have it");

#[cfg(not(feature = "fault-injection"))]
mod none {
    /// What `laelaps --version` tells.
    pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

    /// Read what is ordered. To be called once, before anything else.
    #[inline]
    pub(crate) const fn arm() -> Result<(), String> {
        Ok(())
    }

    /// This step is reached; a test may have ordered that the process ends here, or does not get any further.
    #[inline]
    pub(crate) const fn reach(_step: &str) {}

    /// A guest's thread begins an attempt on a task of this type; a test may have ordered that it does not come back.
    #[inline]
    pub(crate) const fn block_thread(_task_type: &str) {}

    /// A guest opens this path below a granted folder; a test may have ordered that this does not come back.
    #[inline]
    pub(crate) const fn block_file(_path: &std::path::Path) {}

    /// Steps of the schema after those of this build.
    #[inline]
    pub(crate) const fn later_steps() -> Vec<laelaps_queue::SchemaStep> {
        Vec::new()
    }
}
