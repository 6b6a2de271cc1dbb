//! What a handler says while it works: kept up to a bound, counted beyond it.
//!
//! The bound is split: the larger part keeps the beginning, the rest keeps the end, because the last lines before a failure are the ones
//! that explain it. Nothing here waits, and nothing grows beyond the bound, so endless output costs its own guest's time and no more.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use super::usage::{Purpose, Share};

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Every step.
    Trace,
    /// For whoever looks for a fault.
    Debug,
    /// Worth knowing.
    Info,
    /// Something to look at.
    Warn,
    /// Something is broken.
    Error,
}

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// The contract's `log` interface.
    Log,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// One line that a handler wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Where it came from.
    pub stream: Stream,
    /// How much it matters; standard output counts as info, standard error as warn.
    pub level: Level,
    /// The line without its end, at most 8 KiB; bytes that are not UTF-8 are replaced.
    pub text: String,
}

/// What a handler wrote during one attempt, within [`super::Limits::log_bytes`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Captured {
    /// The lines that were kept: the first ones and, if some had to be dropped, the last ones.
    pub lines: Vec<Line>,
    /// How many of `lines` stand before the gap; all of them if nothing was dropped.
    pub lines_before_gap: usize,
    /// Lines that were not kept, because there were too many.
    pub dropped_lines: u64,
    /// Their bytes, and the bytes cut off from overlong lines.
    pub dropped_bytes: u64,
}

/// The longest line that is kept whole.
const LINE_BYTES_MAX: usize = 8 << 10;
/// What a kept line counts beside its text, so that a million empty lines are bounded too.
const LINE_OVERHEAD_BYTES: u64 = 32;
/// What a guest may hand over in one write.
const WRITE_BYTES_MAX: usize = 64 << 10;

/// Collects what one instance writes. Clones write to the same place.
#[derive(Clone, Default)]
pub(super) struct Capture(Arc<Mutex<Buffers>>);

#[derive(Default)]
struct Buffers {
    /// The limit on the kept lines together.
    log_bytes: u64,
    head: Vec<Line>,
    head_bytes_left: u64,
    tail: VecDeque<Line>,
    tail_bytes_left: u64,
    /// Once a line has not fitted into the head, all later ones go to the tail, so that the order stays.
    head_is_full: bool,
    stdout: Partial,
    stderr: Partial,
    dropped_lines: u64,
    dropped_bytes: u64,
    /// What the kept lines cost.
    share: Option<Share>,
}

/// A line whose end has not been written yet.
#[derive(Default)]
struct Partial {
    bytes: Vec<u8>,
    cut_bytes: u64,
}

impl Capture {
    /// Start with nothing, for one attempt.
    pub(super) fn begin(&self, log_bytes: u64) {
        let tail = log_bytes / 4;
        *self.buffers() = Buffers { log_bytes, head_bytes_left: log_bytes - tail, tail_bytes_left: tail, ..Buffers::default() };
    }

    /// Everything since [`Capture::begin`]; nothing stays.
    pub(super) fn take(&self) -> Captured {
        let mut buffers = self.buffers();
        buffers.end_line(Stream::Stdout);
        buffers.end_line(Stream::Stderr);
        let mut buffers = std::mem::take(&mut *buffers);
        let lines_before_gap = buffers.head.len();
        let mut lines = std::mem::take(&mut buffers.head);
        lines.extend(buffers.tail);
        Captured {
            lines_before_gap: if buffers.dropped_lines == 0 { lines.len() } else { lines_before_gap },
            lines,
            dropped_lines: buffers.dropped_lines,
            dropped_bytes: buffers.dropped_bytes,
        }
    }

    /// One line of the `log` interface. A line end within it does not split it.
    pub(super) fn log(&self, level: Level, message: String) {
        self.buffers().push(Line { stream: Stream::Log, level, text: message }, 0);
    }

    /// The last text on standard error, for the message of a trap: at most `bytes_max` bytes, whole lines.
    pub(super) fn stderr_end(&self, bytes_max: usize) -> String {
        let mut buffers = self.buffers();
        buffers.end_line(Stream::Stderr);
        let mut left = bytes_max;
        let newest_first = buffers.tail.iter().rev().chain(buffers.head.iter().rev());
        let mut lines: Vec<&str> = newest_first
            .filter(|line| line.stream == Stream::Stderr)
            .map_while(|line| {
                left = left.checked_sub(line.text.len() + 1)?;
                Some(line.text.as_str())
            })
            .collect();
        lines.reverse();
        lines.join("\n")
    }

    /// A standard stream of a guest.
    pub(super) fn pipe(&self, stream: Stream) -> Pipe {
        Pipe { capture: self.clone(), stream }
    }

    fn write(&self, stream: Stream, bytes: &[u8]) {
        self.buffers().write(stream, bytes);
    }

    /// A panic while the lock was held leaves whole lines behind, so what there is stays usable.
    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffers {
    fn write(&mut self, stream: Stream, mut bytes: &[u8]) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.extend(stream, &bytes[..end]);
            self.end_line_always(stream);
            bytes = &bytes[end + 1..];
        }
        self.extend(stream, bytes);
    }

    fn extend(&mut self, stream: Stream, bytes: &[u8]) {
        let partial = self.partial(stream);
        let fits = bytes.len().min(LINE_BYTES_MAX - partial.bytes.len());
        partial.bytes.extend_from_slice(&bytes[..fits]);
        partial.cut_bytes += (bytes.len() - fits) as u64;
    }

    fn end_line(&mut self, stream: Stream) {
        let partial = self.partial(stream);
        if !partial.bytes.is_empty() {
            self.end_line_always(stream);
        }
    }

    fn end_line_always(&mut self, stream: Stream) {
        let partial = std::mem::take(self.partial(stream));
        let bytes = partial.bytes.strip_suffix(b"\r").unwrap_or(&partial.bytes);
        let level = if stream == Stream::Stderr { Level::Warn } else { Level::Info };
        let text = String::from_utf8_lossy(cut_whole_characters(bytes, partial.cut_bytes > 0)).into_owned();
        self.push(Line { stream, level, text }, partial.cut_bytes);
    }

    fn partial(&mut self, stream: Stream) -> &mut Partial {
        if stream == Stream::Stderr { &mut self.stderr } else { &mut self.stdout }
    }

    fn push(&mut self, mut line: Line, cut_bytes: u64) {
        self.dropped_bytes += cut_bytes;
        if line.text.len() > LINE_BYTES_MAX {
            let end = line.text.floor_char_boundary(LINE_BYTES_MAX);
            self.dropped_bytes += (line.text.len() - end) as u64;
            line.text.truncate(end);
            line.text.shrink_to_fit();
        }
        let cost = cost(&line);
        if !self.head_is_full && cost <= self.head_bytes_left {
            self.head_bytes_left -= cost;
            self.head.push(line);
            return self.count();
        }
        self.head_is_full = true;
        while cost > self.tail_bytes_left {
            let Some(oldest) = self.tail.pop_front() else {
                // It would not fit even alone.
                return self.drop_line(&line);
            };
            self.tail_bytes_left += self::cost(&oldest);
            self.drop_line(&oldest);
        }
        self.tail_bytes_left -= cost;
        self.tail.push_back(line);
        self.count();
    }

    /// Count what is kept as a part of what this process holds.
    fn count(&mut self) {
        let kept = self.log_bytes - self.head_bytes_left - self.tail_bytes_left;
        self.share.get_or_insert_with(|| Share::new(Purpose::Output, 0)).set(kept);
    }

    fn drop_line(&mut self, line: &Line) {
        self.dropped_lines += 1;
        self.dropped_bytes += line.text.len() as u64;
    }
}

fn cost(line: &Line) -> u64 {
    line.text.len() as u64 + LINE_OVERHEAD_BYTES
}

/// Bytes that were cut off somewhere, without the half of a character that may stand at their end.
fn cut_whole_characters(bytes: &[u8], was_cut: bool) -> &[u8] {
    if !was_cut {
        return bytes;
    }
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => &bytes[..error.valid_up_to()],
        _ => bytes,
    }
}

/// A standard stream that ends in a [`Capture`].
///
/// It is always ready and never holds bytes back. Wasmtime's own adapter from an asynchronous writer queues empty writes without a bound
/// (GHSA-5m8g-xhq4-4h93), so guests never get that one.
#[derive(Clone)]
pub(super) struct Pipe {
    capture: Capture,
    stream: Stream,
}

impl IsTerminal for Pipe {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Pipe {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait]
impl Pollable for Pipe {
    async fn ready(&mut self) {}
}

#[async_trait]
impl OutputStream for Pipe {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.capture.write(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BYTES_MAX)
    }
}

impl AsyncWrite for Pipe {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.capture.write(self.stream, bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capture(log_bytes: u64) -> Capture {
        let capture = Capture::default();
        capture.begin(log_bytes);
        capture
    }

    fn texts(captured: &Captured) -> Vec<&str> {
        captured.lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn writes_become_lines_however_they_are_cut() {
        let capture = capture(1 << 10);
        capture.write(Stream::Stdout, b"one\ntw");
        capture.write(Stream::Stderr, b"aside");
        capture.write(Stream::Stdout, b"o\r\n\nthree");
        let captured = capture.take();
        assert_eq!(texts(&captured), ["one", "two", "", "three", "aside"]);
        assert_eq!(captured.lines[4].stream, Stream::Stderr);
        assert_eq!(captured.dropped_lines, 0);
        assert_eq!(captured.lines_before_gap, 5);
        assert_eq!(capture.take(), Captured::default(), "nothing stays");
    }

    #[test]
    fn bytes_that_are_not_utf_8_are_replaced() {
        let capture = capture(1 << 10);
        capture.write(Stream::Stdout, b"a\xffb\n");
        capture.write(Stream::Stdout, "half \u{1f415}".as_bytes().split_last_chunk::<2>().expect("long enough").0);
        assert_eq!(texts(&capture.take()), ["a\u{fffd}b", "half \u{fffd}"]);
    }

    #[test]
    fn an_overlong_line_is_cut_at_a_character_and_the_rest_counted() {
        let capture = capture(64 << 10);
        let long = "\u{20ac}".repeat(LINE_BYTES_MAX);
        capture.write(Stream::Stdout, long.as_bytes());
        capture.log(Level::Info, long.clone());
        let captured = capture.take();
        for line in &captured.lines {
            assert!(line.text.len() <= LINE_BYTES_MAX);
            assert!(line.text.chars().all(|character| character == '\u{20ac}'), "no half character");
        }
        assert!(captured.dropped_bytes >= 2 * (long.len() - LINE_BYTES_MAX) as u64);
    }

    #[test]
    fn endless_output_is_bounded_and_keeps_its_beginning_and_its_end() {
        let capture = capture(4 << 10);
        for number in 0..100_000 {
            capture.log(Level::Info, format!("line {number}"));
        }
        let captured = capture.take();
        let kept: usize = captured.lines.iter().map(|line| line.text.len()).sum();
        assert!(kept < 4 << 10);
        assert_eq!(captured.lines[0].text, "line 0");
        assert_eq!(captured.lines.last().expect("some").text, "line 99999");
        assert_eq!(captured.lines.len() as u64 + captured.dropped_lines, 100_000);
        assert!(captured.lines_before_gap < captured.lines.len());
    }

    #[test]
    fn empty_lines_are_bounded_too() {
        let capture = capture(4 << 10);
        capture.write(Stream::Stdout, &b"\n".repeat(1 << 20));
        let captured = capture.take();
        assert!(captured.lines.len() <= 4096 / 32);
        assert_eq!(captured.lines.len() as u64 + captured.dropped_lines, 1 << 20);
    }

    #[test]
    fn a_bound_of_nothing_keeps_nothing() {
        let capture = capture(0);
        capture.log(Level::Error, "x".into());
        let captured = capture.take();
        assert!(captured.lines.is_empty());
        assert_eq!((captured.dropped_lines, captured.dropped_bytes), (1, 1));
    }

    #[test]
    fn the_end_of_standard_error_is_at_hand_for_a_trap() {
        let capture = capture(1 << 10);
        capture.write(Stream::Stderr, b"early\nthread 'main' panicked\nat src/lib.rs");
        capture.log(Level::Info, "other".into());
        assert_eq!(capture.stderr_end(100), "early\nthread 'main' panicked\nat src/lib.rs");
        assert_eq!(capture.stderr_end(20), "at src/lib.rs");
    }
}
