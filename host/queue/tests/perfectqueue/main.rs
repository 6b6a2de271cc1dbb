//! PerfectQueue's own table, shared with Ruby. Ruby's part is played by plain SQL, statement for statement as PerfectQueue 0.10.1 sends it.

#![expect(clippy::unwrap_used, reason = "a test may stop where it stands")]

mod fixture;
mod ruby;

mod answers;
mod audit;
mod charsets;
mod claims;
mod data;
mod descent;
mod ends;
mod fences;
mod hold;
mod hosts;
mod limited;
mod lock;
mod losses;
mod neighbours;
mod order;
mod races;
mod rehearsal;
mod schema;
mod storm;
mod unreadable;
