//! `laelaps debug`: PerfectQueue's Ruby console, which has nothing to look into here.

use super::{Complaint, Exit};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// The address of the console.
    address: Vec<String>,
}

impl Arguments {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        let message = match self.address.first() {
            Some(address) => format!("there is no Ruby console at {address:?} or elsewhere"),
            None => "there is no Ruby console".to_owned(),
        };
        let hint = "see `laelaps stats`, `laelaps list --state running`, or the log with LAELAPS_LOG=debug";
        Err(Complaint::new(Exit::Usage, message, hint).into())
    }
}
