//! What the queue makes of its database: `tests/bench storage`, or `cargo bench -p laelaps-queue --bench storage -- WORD...`; the words stand
//! in [`words`]. Servers are the bench's own, with the durability that they have by default.
//!
//! Each figure of the crate stands beside raw SQL on the same disk in the same run. Candidates take turns within each round, so that whatever
//! else the machine does hits all alike; ratios are taken within a round. What was promised is listed at the end, with what was measured.

#![expect(clippy::unwrap_used, reason = "a bench may stop where it stands")]

mod backlog;
mod fill;
mod finished;
mod home;
mod path;
mod perfectqueue;
mod pinned;
mod producers;
mod queues;
mod raw;
mod report;
mod statements;
mod submit;
mod words;
mod work;

use std::process::ExitCode;

use self::home::Home;
use self::report::Report;
use self::words::Words;

#[tokio::main]
async fn main() -> ExitCode {
    let words = match Words::read(std::env::args().skip(1)) {
        Ok(words) => words,
        Err(problem) => {
            eprintln!("{problem}");
            return ExitCode::from(2);
        }
    };
    let mut report = Report::new(&words);
    for database in words::DATABASES.into_iter().filter(|database| words.wants_database(database)) {
        measure(database, &words, &mut report).await;
    }
    let kept = report.conclude(&words);
    if words.check && !kept { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

async fn measure(database: &'static str, words: &Words, report: &mut Report) {
    let parts: Vec<&str> = words::PARTS.into_iter().filter(|part| words.wants(part) && home::has_part(database, part)).collect();
    if parts.is_empty() {
        return;
    }
    for part in parts {
        // Each part on a server of its own: what one leaves behind (dead rows, a log to be written down) is not the next one's burden.
        let home = Home::start(database).await;
        report.say(format!("\n{}: {part}", home.name()));
        match part {
            "submit" => submit::measure(&home, words, report).await,
            "producers" => producers::measure(&home, words, report).await,
            "path" => path::measure(&home, words, report).await,
            "backlog" => backlog::measure(&home, words, report).await,
            "finished" => finished::measure(&home, words, report).await,
            "queues" => queues::measure(&home, words, report).await,
            "pinned" => pinned::measure(&home, words, report).await,
            _ => perfectqueue::measure(&home, words, report).await,
        }
    }
    report.say("");
}
