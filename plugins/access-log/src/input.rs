//! What a task asks for, and how its lines are read.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::time::{Duration, Instant};

use laelaps_plugin::{Context, Error, OrFail, Result};
use serde::Deserialize;

use crate::report::Tally;

/// Bytes of a line beyond which it is not kept.
const LINE_BYTES_MAX: usize = 65_536;
/// Lines between two looks at the host: some milliseconds of work.
const LINES_PER_LOOK: u64 = 8_192;
/// How often progress is shown at most: a heartbeat costs its host more than the lines between two looks.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// The most that `top` may ask for.
const TOP_MAX: usize = 1_000;

/// The task's data: exactly one of `lines`, `text` and `path`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    lines: Option<Vec<String>>,
    text: Option<String>,
    path: Option<String>,
    /// The byte range of `path`: its lines that begin at or after `from` ...
    from: Option<u64>,
    /// ... and before `to`.
    to: Option<u64>,
    /// The number of the first line, for parts of something larger.
    first_line: Option<u64>,
    /// How many paths and referrers are reported.
    top: Option<usize>,
    /// Whether visitors are counted or also listed.
    visitors: Option<VisitorsAs>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum VisitorsAs {
    Count,
    List,
}

/// How the report is made.
#[derive(Debug)]
pub(crate) struct Options {
    /// At least 1.
    pub(crate) first_line: u64,
    /// 0 to 1,000.
    pub(crate) top: usize,
    pub(crate) list_visitors: bool,
}

/// Where the lines come from.
#[derive(Debug)]
pub(crate) enum Source {
    Lines(Vec<String>),
    Text(String),
    File { path: String, from: u64, to: Option<u64> },
}

/// How reading came to an end.
#[derive(Debug, PartialEq)]
pub(crate) enum Ended {
    AtTheEnd,
    Cancelled,
}

impl Job {
    /// # Errors
    /// Code `bad-data` for a number out of its bounds.
    pub(crate) fn options(&self) -> Result<Options> {
        let first_line = self.first_line.unwrap_or(1);
        if first_line == 0 {
            return Err(Error::reject("bad-data", "data.first_line: lines are numbered from 1, found 0"));
        }
        let top = self.top.unwrap_or(10);
        if top > TOP_MAX {
            return Err(Error::reject("bad-data", format_args!("data.top: at most {TOP_MAX}, found {top}")));
        }
        Ok(Options { first_line, top, list_visitors: self.visitors == Some(VisitorsAs::List) })
    }

    /// # Errors
    /// Code `bad-data` if there is not exactly one source, or a range without a file.
    pub(crate) fn source(self) -> Result<Source> {
        let (from, to) = (self.from.unwrap_or(0), self.to);
        if self.path.is_none() && (self.from.is_some() || self.to.is_some()) {
            return Err(Error::reject("bad-data", "data: `from` and `to` are a range of a file; give `path` too"));
        }
        if to.is_some_and(|to| to < from) {
            return Err(Error::reject("bad-data", format_args!("data.to: {} is before `from`, {from}", to.unwrap_or(0))));
        }
        match (self.lines, self.text, self.path) {
            (Some(lines), None, None) => Ok(Source::Lines(lines)),
            (None, Some(text), None) => Ok(Source::Text(text)),
            (None, None, Some(path)) => Ok(Source::File { path, from, to }),
            (None, None, None) => Err(Error::reject("bad-data", "data: one of `lines`, `text` or `path` has to be there")),
            _ => Err(Error::reject("bad-data", "data: only one of `lines`, `text` and `path` can be there")),
        }
    }
}

impl Source {
    /// Reads every line into the tally, unless the host wants the attempt to end.
    ///
    /// # Errors
    /// Code `file`, to be tried again: the file may come, the grant may be mended.
    pub(crate) fn read_into(self, tally: &mut Tally, context: &Context) -> Result<Ended> {
        match self {
            Self::Lines(lines) => {
                for line in lines {
                    tally.add(line.as_bytes());
                    if is_time_to_look(tally) && context.is_cancelled() {
                        return Ok(Ended::Cancelled);
                    }
                }
                Ok(Ended::AtTheEnd)
            }
            Self::Text(text) => {
                let length = u64::try_from(text.len()).unwrap_or(u64::MAX);
                read_lines(text.as_bytes(), 0, length, tally, context).or_retry("text")
            }
            Self::File { path, from, to } => read_file(&path, from, to, tally, context).map_err(|error| {
                let hint = "is its folder granted to this route?";
                Error::retry("file", format_args!("{path}: {error}; {hint}"))
            }),
        }
    }
}

/// Reads the lines of a file that begin in the range, so that ranges which touch share no line and leave none out.
fn read_file(path: &str, from: u64, to: Option<u64>, tally: &mut Tally, context: &Context) -> std::io::Result<Ended> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let to = to.unwrap_or(length).min(length);
    // The byte before tells whether a line begins at `from`.
    let start = from.saturating_sub(1);
    file.seek(SeekFrom::Start(start))?;
    let mut reader = BufReader::with_capacity(LINE_BYTES_MAX, file);
    let mut position = start;
    if from > 0 {
        position += skip_line(&mut reader)?;
    }
    read_lines(reader, position, to, tally, context)
}

/// Reads lines from `position` on as long as they begin before `to`, in memory that does not depend on how long they are.
fn read_lines(
    mut reader: impl BufRead,
    mut position: u64,
    to: u64,
    tally: &mut Tally,
    context: &Context,
) -> std::io::Result<Ended> {
    let mut line = Vec::new();
    let begin = position;
    let mut shown: Option<Instant> = None;
    while position < to {
        line.clear();
        let limit = u64::try_from(LINE_BYTES_MAX + 1).unwrap_or(u64::MAX);
        let taken = reader.by_ref().take(limit).read_until(b'\n', &mut line)?;
        if taken == 0 {
            break;
        }
        position += u64::try_from(taken).unwrap_or(0);
        if line.last() == Some(&b'\n') {
            tally.add(&line[..line.len() - 1]);
        } else if taken > LINE_BYTES_MAX {
            position += skip_line(&mut reader)?;
            tally.add_overlong(&line);
        } else {
            tally.add(&line);
        }
        if is_time_to_look(tally) {
            if context.is_cancelled() {
                return Ok(Ended::Cancelled);
            }
            if shown.is_none_or(|shown| shown.elapsed() >= PROGRESS_INTERVAL) {
                context.progress(position - begin, to - begin, format!("{} lines, bytes read", tally.lines()));
                shown = Some(Instant::now());
            }
        }
    }
    Ok(Ended::AtTheEnd)
}

/// Reads past the end of the line, and says how many bytes that were.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let (length, ends) = match buffer.iter().position(|byte| *byte == b'\n') {
            Some(index) => (index + 1, true),
            None => (buffer.len(), buffer.is_empty()),
        };
        reader.consume(length);
        skipped += u64::try_from(length).unwrap_or(0);
        if ends {
            return Ok(skipped);
        }
    }
}

fn is_time_to_look(tally: &Tally) -> bool {
    tally.lines().is_multiple_of(LINES_PER_LOOK)
}
