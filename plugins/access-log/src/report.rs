//! From lines to the report.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use crate::counter::{Counter, Visitors};
use crate::input::Options;
use crate::line::{self, Entry, Hour};

/// Which edition of the plugin this is.
pub(crate) const EDITION: u32 = if cfg!(feature = "second-edition") { 2 } else { 1 };

/// Different paths, and referrers, that are counted exactly. With the longest key below, at most some 10 MiB each.
const DIFFERENT_MAX: usize = 20_000;
/// Bytes of a path or referrer that tell it from others; longer ones are cut.
const KEY_BYTES_MAX: usize = 512;
/// Different hours that are counted exactly: more than two years.
const HOURS_MAX: usize = 20_000;
/// Visitors that are counted exactly.
const VISITORS_MAX: usize = 100_000;
/// Malformed lines that are named; the rest is only counted.
const NAMED_MAX: usize = 100;
/// Bytes of a malformed line that are shown.
const SHOWN_BYTES_MAX: usize = 160;

/// A line that was damaged.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Malformed {
    /// Its number, from 1, or from the task's `first_line`.
    line: u64,
    /// What is wrong with it.
    reason: &'static str,
    /// Whether it counts all the same, since only its tail is damaged.
    counted: bool,
    /// Its beginning.
    text: String,
}

/// What was counted so far.
#[derive(Debug)]
pub(crate) struct Tally {
    line: u64,
    lines: u64,
    requests: u64,
    bytes: u64,
    status_classes: [u64; 5],
    paths: Counter<String>,
    referrers: Counter<String>,
    visitors: Visitors,
    hours: Counter<Hour>,
    malformed: Vec<Malformed>,
    malformed_total: u64,
    #[cfg(any(test, feature = "second-edition"))]
    agents: crate::agents::Agents,
}

impl Tally {
    pub(crate) fn new(options: &Options) -> Self {
        Self {
            line: options.first_line - 1,
            lines: 0,
            requests: 0,
            bytes: 0,
            status_classes: [0; 5],
            paths: Counter::new(DIFFERENT_MAX),
            referrers: Counter::new(DIFFERENT_MAX),
            visitors: Visitors::new(VISITORS_MAX),
            hours: Counter::new(HOURS_MAX),
            malformed: Vec::new(),
            malformed_total: 0,
            #[cfg(any(test, feature = "second-edition"))]
            agents: crate::agents::Agents::default(),
        }
    }

    /// Lines read so far, blank ones included.
    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }

    /// Takes the next line, which need not be UTF-8.
    pub(crate) fn add(&mut self, line: &[u8]) {
        self.begin_line();
        let line = String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line));
        if line.trim().is_empty() {
            return;
        }
        match line::parse(&line) {
            Ok(entry) => {
                self.count(&entry);
                if let Err(reason) = entry.tail {
                    self.name(&line, reason, true);
                }
            }
            Err(reason) => self.name(&line, reason, false),
        }
    }

    /// Takes the next line, of which only the beginning could be kept.
    pub(crate) fn add_overlong(&mut self, beginning: &[u8]) {
        self.begin_line();
        self.name(&String::from_utf8_lossy(beginning), "the line is longer than 65,536 bytes", false);
    }

    /// The report.
    pub(crate) fn report(&self, options: &Options) -> Value {
        let ranked = |counter: &Counter<String>, name: &str| -> Vec<Value> {
            counter.top(options.top).into_iter().map(|(key, count)| json!({ name: key, "requests": count })).collect()
        };
        let classes: BTreeMap<String, u64> =
            (1..).zip(self.status_classes).map(|(class, count)| (format!("{class}xx"), count)).collect();
        let hourly: BTreeMap<String, u64> =
            self.hours.sorted().into_iter().map(|(hour, count)| (hour.to_string(), count)).collect();
        let mut report = json!({
            "edition": EDITION,
            "lines": self.lines,
            "requests": self.requests,
            "bytes": self.bytes,
            "status_classes": classes,
            "top_paths": ranked(&self.paths, "path"),
            "top_referrers": ranked(&self.referrers, "referrer"),
            "visitors": self.visitors.count(),
            "hourly": hourly,
            "malformed": self.malformed,
            "malformed_total": self.malformed_total,
        });
        if options.list_visitors {
            report["visitor_addresses"] = json!(self.visitors.addresses());
        }
        let inexact = self.inexact();
        if !inexact.is_empty() {
            report["inexact"] = json!(inexact);
        }
        #[cfg(feature = "second-edition")]
        self.agents.report_into(&mut report);
        report
    }

    /// What is not exact because there was more of it than is kept, with what is known about the error.
    fn inexact(&self) -> BTreeMap<&'static str, String> {
        let counters =
            [("top_paths", self.paths.error()), ("top_referrers", self.referrers.error()), ("hourly", self.hours.error())];
        let counters = counters
            .into_iter()
            .filter(|(_, error)| *error > 0)
            .map(|(name, error)| (name, format!("a count may be too low by up to {error}")));
        let visitors =
            (!self.visitors.is_exact()).then(|| ("visitors", "an estimate from a sample, within 1 % most likely".to_owned()));
        counters.chain(visitors).collect()
    }

    fn begin_line(&mut self) {
        self.line += 1;
        self.lines += 1;
    }

    fn count(&mut self, entry: &Entry<'_>) {
        self.requests += 1;
        self.bytes = self.bytes.saturating_add(entry.bytes);
        self.status_classes[usize::from(entry.status / 100 - 1)] += 1;
        self.paths.add(key(entry.path).as_ref());
        self.visitors.add(entry.address);
        self.hours.add(&entry.hour);
        let Ok(tail) = &entry.tail else { return };
        if let Some(referrer) = tail.referrer {
            self.referrers.add(key(referrer).as_ref());
        }
        #[cfg(any(test, feature = "second-edition"))]
        self.agents.add(tail.agent);
    }

    fn name(&mut self, line: &str, reason: &'static str, counted: bool) {
        self.malformed_total += 1;
        if self.malformed.len() < NAMED_MAX {
            let text = cut(line, SHOWN_BYTES_MAX).to_owned();
            self.malformed.push(Malformed { line: self.line, reason, counted, text });
        }
    }
}

/// A path or referrer as it is counted.
fn key(text: &str) -> Cow<'_, str> {
    line::unescape(cut(text, KEY_BYTES_MAX))
}

/// At most so many bytes of a text, whole characters.
fn cut(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}
