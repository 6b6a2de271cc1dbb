//! The end-to-end tests: what is promised of a running host, each promise by its name.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it is")]

mod access_log;
mod audit;
mod cli;
mod crash;
mod daemon;
mod demo;
mod documents;
mod fairness;
mod faults;
mod fleet;
mod follow_ups;
mod grants;
#[path = "../hostile/mod.rs"]
mod hostile;
mod idle;
mod invariants;
mod languages;
mod layering;
mod limits;
mod memory;
mod mutation;
mod neighbours;
mod offenders;
mod perfectqueue;
mod producers;
mod queues;
mod rehearsal;
mod replace;
mod sdk;
mod servers;
mod set_aside;
mod signals;
mod signs;
mod slept;
mod start;
mod tasks;
mod upgrade;
mod watchdog;
mod wrong_input;
