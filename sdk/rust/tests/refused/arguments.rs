#![allow(unused_imports)]

use laelaps_plugin::{Result, handler};

#[handler(kind = "mail")]
fn handle() -> Result<()> {
    Ok(())
}

fn main() {}
