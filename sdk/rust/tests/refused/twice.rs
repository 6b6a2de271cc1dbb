#![allow(unused_imports)]

use laelaps_plugin::{Result, handler};

#[handler]
fn first() -> Result<()> {
    Ok(())
}

#[handler]
fn second() -> Result<()> {
    Ok(())
}

fn main() {}
