//! The host's log: standard error, or a file that can be opened anew after it was rotated.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// A bare level is meant for the host and its handlers: the libraries below them stay at info, or every statement would be a line.
fn directives(filter: &str) -> String {
    match filter.parse::<tracing::Level>() {
        Ok(level) if level > tracing::Level::INFO => format!("info,laelaps={level},guest={level}"),
        _ => filter.to_owned(),
    }
}

/// Where the log goes. Clones share the file.
#[derive(Clone)]
pub(crate) struct Log {
    output: Arc<Mutex<Output>>,
    /// Puts another filter in force.
    refilter: Arc<OnceLock<Refilter>>,
}

type Refilter = Box<dyn Fn(EnvFilter) -> Result<(), tracing_subscriber::reload::Error> + Send + Sync>;

enum Output {
    StandardError,
    File { path: PathBuf, file: File },
}

impl Log {
    /// Start the process's log. To be called once.
    ///
    /// `filter` is in tracing's syntax, for example `info` or `warn,laelaps=debug`.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the filter is not understood.
    pub(crate) fn start(path: Option<&Path>, filter: &str) -> io::Result<Self> {
        let log = Self { output: Arc::new(Mutex::new(Output::open(path)?)), refilter: Arc::default() };
        let filter = EnvFilter::builder().parse(directives(filter)).map_err(io::Error::other)?;
        let colours = path.is_none() && io::IsTerminal::is_terminal(&io::stderr());
        let subscriber = tracing_subscriber::fmt().with_ansi(colours).with_writer(log.clone());
        let subscriber = subscriber.with_env_filter(filter).with_filter_reloading();
        let handle = subscriber.reload_handle();
        subscriber.init();
        log.refilter.get_or_init(|| Box::new(move |filter| handle.reload(filter)));
        Ok(log)
    }

    /// Put another filter in force.
    ///
    /// # Errors
    /// The filter is not understood; the old one stays.
    pub(crate) fn filter(&self, filter: &str) -> io::Result<()> {
        let filter = EnvFilter::builder().parse(directives(filter)).map_err(io::Error::other)?;
        self.refilter.get().map_or(Ok(()), |refilter| refilter(filter)).map_err(io::Error::other)
    }

    /// Open the log's file again, or another one. On an error the old file stays.
    ///
    /// # Errors
    /// The file cannot be opened for appending.
    pub(crate) fn reopen(&self, path: Option<&Path>) -> io::Result<()> {
        let output = Output::open(path)?;
        *self.output.lock().unwrap_or_else(PoisonError::into_inner) = output;
        Ok(())
    }

    /// The file it goes to; None: standard error.
    #[must_use]
    pub(crate) fn path(&self) -> Option<PathBuf> {
        match &*self.output.lock().unwrap_or_else(PoisonError::into_inner) {
            Output::StandardError => None,
            Output::File { path, .. } => Some(path.clone()),
        }
    }
}

impl Output {
    fn open(path: Option<&Path>) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::StandardError) };
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self::File { path: path.to_path_buf(), file })
    }
}

/// Since when one line of the log is being written, in milliseconds since the log was started; 0: none is. A process has one log.
static WRITING_SINCE_MS: AtomicU64 = AtomicU64::new(0);
/// When the log was started.
static STARTED: OnceLock<Instant> = OnceLock::new();

/// For how long the log has not taken a line that is being written: its disk may hang, or nobody reads its pipe. Whoever has
/// something to write waits for it.
pub(crate) fn stuck_for() -> Option<Duration> {
    let since = WRITING_SINCE_MS.load(Ordering::Relaxed);
    (since > 0).then(|| Duration::from_millis(now_ms().saturating_sub(since)))
}

fn now_ms() -> u64 {
    let started = STARTED.get_or_init(Instant::now);
    u64::try_from(started.elapsed().as_millis()).map_or(u64::MAX, |passed| passed.saturating_add(1))
}

/// Writes one event; an event is handed over whole, so lines of different threads never mix.
pub(crate) struct Line {
    output: Arc<Mutex<Output>>,
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let event = contained(bytes);
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        WRITING_SINCE_MS.store(now_ms(), Ordering::Relaxed);
        let written = match &mut *output {
            Output::StandardError => io::stderr().write_all(&event),
            Output::File { file, .. } => file.write_all(&event),
        };
        WRITING_SINCE_MS.store(0, Ordering::Relaxed);
        written.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line { output: Arc::clone(&self.output) }
    }
}

/// Whether a terminal may do something else with a character than show it where it stands.
pub(crate) fn is_unprintable(character: char) -> bool {
    character.is_control()
        || matches!(character, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' | '\u{061c}')
}

/// An event as it may stand in the log: its further lines are marked as such, so that no text of a handler, a producer or a database passes
/// for an event of its own.
fn contained(event: &[u8]) -> Cow<'_, [u8]> {
    let (text, end) = event.split_at(event.len() - usize::from(event.ends_with(b"\n")));
    if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
        return Cow::Borrowed(event);
    }
    let mut contained = Vec::with_capacity(event.len() + 64);
    for byte in text {
        match byte {
            b'\n' => contained.extend_from_slice(b"\n    | "),
            // It would take a terminal back to the beginning of the line.
            b'\r' => contained.extend_from_slice(b"\\r"),
            byte => contained.push(*byte),
        }
    }
    contained.extend_from_slice(end);
    Cow::Owned(contained)
}

#[cfg(test)]
mod tests {
    use super::contained;

    #[test]
    fn an_event_of_one_line_stays_as_it_is() {
        assert_eq!(&*contained(b"2026-01-01 INFO ready\n"), b"2026-01-01 INFO ready\n");
        assert_eq!(&*contained(b""), b"");
        assert_eq!(&*contained(b"\n"), b"\n");
    }

    #[test]
    fn further_lines_of_an_event_cannot_be_taken_for_events() {
        assert_eq!(&*contained(b"a\nb\r\n\nc\n"), b"a\n    | b\\r\n    | \n    | c\n");
    }
}
