//! `laelaps submit --file`: JSON Lines, in groups that are each one transaction.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read as _};
use std::path::Path;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use laelaps_queue::{NewTask, Queue, Submitted};

use super::super::output::{Output, counted, in_one_line};
use super::{Complaint, Exit, Options, Place, line};

/// A group ends at this many tasks, or this many bytes of their data.
const GROUP_TASKS: usize = 1_000;
const GROUP_BYTES: usize = 4 << 20;

/// The most bytes of a line: a task's data, and room for the rest of it.
const LINE_BYTES_MAX: usize = NewTask::DATA_BYTES_MAX + (64 << 10);

/// What programs on Windows begin a file of UTF-8 with. It is no part of the first line.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Bad lines that are told one by one.
const TOLD_MAX: u64 = 20;

/// Submit the good lines of a file, and name the others.
pub(super) async fn submit(path: &Path, options: &Options, place: &Place) -> anyhow::Result<Exit> {
    let mut lines = Lines::open(path)?;
    let (_, queue) = place.open().await?;
    let mut counts = Counts::default();
    let mut group = Group::default();
    let result = loop {
        let more = group.fill(&mut lines, &mut counts, options)?;
        if let Err(error) = group.submit(&queue, &mut counts).await {
            break Err(error);
        }
        if !more {
            break Ok(());
        }
    };
    queue.backend().close().await;
    lines.bar.finish_and_clear();
    let bad = counted(counts.bad, "bad line");
    let told = format!("{} submitted, {} existed already, {bad}", counts.created, counts.existed);
    result.with_context(|| {
        format!("{}: stopped after line {} ({told}); submit the file again to go on", lines.name, counts.settled_line)
    })?;
    conclude(&lines.name, &told, counts.bad)
}

/// Only check the lines.
pub(super) fn check(path: &Path, options: &Options) -> anyhow::Result<Exit> {
    let mut lines = Lines::open(path)?;
    let mut counts = Counts::default();
    let mut good = 0;
    let mut group = Group::default();
    loop {
        let more = group.fill(&mut lines, &mut counts, options)?;
        good += group.tasks.len() as u64;
        group = Group::default();
        if !more {
            break;
        }
    }
    lines.bar.finish_and_clear();
    conclude(
        &lines.name,
        &format!("{}, {}; nothing was submitted", counted(good, "good line"), counted(counts.bad, "bad line")),
        counts.bad,
    )
}

fn conclude(name: &str, told: &str, bad: u64) -> anyhow::Result<Exit> {
    let mut output = Output::open();
    output.line(told)?;
    output.close()?;
    if bad == 0 {
        return Ok(Exit::Done);
    }
    let hint = "mend what is named above and submit the whole file again: keys that exist are passed over";
    Err(Complaint::new(Exit::Usage, format!("{name}: {} cannot be submitted", counted(bad, "line")), hint).into())
}

#[derive(Debug, Default)]
struct Counts {
    created: u64,
    existed: u64,
    bad: u64,
    /// Everything up to this line is submitted, or named as bad.
    settled_line: u64,
}

/// Tasks that are submitted together.
#[derive(Debug, Default)]
struct Group {
    tasks: Vec<NewTask>,
    bytes: usize,
    last_line: u64,
}

impl Group {
    /// Take lines until the group is full; false at the end of the file.
    fn fill(&mut self, lines: &mut Lines, counts: &mut Counts, options: &Options) -> anyhow::Result<bool> {
        while self.tasks.len() < GROUP_TASKS && self.bytes < GROUP_BYTES {
            let Some(line) = lines.next().with_context(|| format!("{}: cannot be read", lines.name))? else { return Ok(false) };
            self.last_line = lines.number;
            let task = match line {
                Next::Blank => continue,
                Next::TooLong => Err(format!("the line is longer than {LINE_BYTES_MAX} bytes")),
                Next::Line => line::parse(&lines.buffer, options),
            };
            match task {
                Ok(task) => {
                    self.bytes += task.data.len();
                    self.tasks.push(task);
                }
                Err(problem) => {
                    counts.bad += 1;
                    lines.complain(counts.bad, &problem);
                }
            }
        }
        Ok(true)
    }

    async fn submit(&mut self, queue: &Queue, counts: &mut Counts) -> anyhow::Result<()> {
        if !self.tasks.is_empty() {
            for answer in queue.backend().submit(&self.tasks).await? {
                match answer {
                    Submitted::Created => counts.created += 1,
                    Submitted::AlreadyExists => counts.existed += 1,
                }
            }
        }
        counts.settled_line = self.last_line;
        self.tasks.clear();
        self.bytes = 0;
        Ok(())
    }
}

enum Next {
    /// It is in [`Lines::buffer`].
    Line,
    Blank,
    TooLong,
}

/// A file, line by line.
struct Lines {
    name: String,
    reader: Box<dyn BufRead>,
    buffer: Vec<u8>,
    number: u64,
    /// Shown on a terminal only.
    bar: ProgressBar,
}

impl Lines {
    fn open(path: &Path) -> anyhow::Result<Self> {
        let (name, reader, size): (_, Box<dyn BufRead>, _) = if path == Path::new("-") {
            ("standard input".to_owned(), Box::new(io::stdin().lock()), None)
        } else {
            let name = path.display().to_string();
            let file = File::open(path).map_err(|error| {
                let hint = "name a file of JSON lines, or - for standard input";
                Complaint::new(Exit::Usage, format!("{name}: cannot be opened: {error}"), hint)
            })?;
            let size = file.metadata().ok().filter(std::fs::Metadata::is_file).map(|metadata| metadata.len());
            (name, Box::new(BufReader::with_capacity(1 << 16, file)), size)
        };
        let bar = match size {
            Some(size) => ProgressBar::new(size).with_style(style("{bar:40} {bytes}/{total_bytes}, {eta} left")),
            None => ProgressBar::new_spinner().with_style(style("{spinner} {bytes} read")),
        };
        Ok(Self { name, reader, buffer: Vec::new(), number: 0, bar })
    }

    fn next(&mut self) -> io::Result<Option<Next>> {
        self.buffer.clear();
        let read = self.reader.by_ref().take(LINE_BYTES_MAX as u64 + 1).read_until(b'\n', &mut self.buffer)?;
        if read == 0 {
            return Ok(None);
        }
        self.number += 1;
        self.bar.inc(read as u64);
        if self.number == 1 && self.buffer.starts_with(BYTE_ORDER_MARK) {
            self.buffer.drain(..BYTE_ORDER_MARK.len());
        }
        if read > LINE_BYTES_MAX && self.buffer.last() != Some(&b'\n') {
            let rest = self.reader.skip_until(b'\n')?;
            self.bar.inc(rest as u64);
            return Ok(Some(Next::TooLong));
        }
        let length = self.buffer.trim_ascii_end().len();
        self.buffer.truncate(length);
        Ok(Some(if length == 0 { Next::Blank } else { Next::Line }))
    }

    fn complain(&self, bad: u64, problem: &str) {
        if bad > TOLD_MAX + 1 {
            return;
        }
        let line = match bad <= TOLD_MAX {
            true => format!("{}:{}: {}", self.name, self.number, in_one_line(problem, 300)),
            false => "further bad lines are only counted".to_owned(),
        };
        self.bar.suspend(|| anstream::eprintln!("{line}"));
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants above; a wrong one shows as the default bar.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
