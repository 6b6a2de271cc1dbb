//! A running host: a real process, with everything that can be done to one.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::Site;
use crate::patience::{PATIENCE, waiting_for};
use crate::program::has_faults;

/// A `laelaps run` process. Killed when dropped; if the test is failing then, the end of its log is printed.
#[derive(Debug)]
pub struct Host {
    child: Child,
    lines: Lines,
    notices: Notices,
}

impl Site {
    /// Starts a host and waits until it says that it is ready.
    pub async fn start(&self) -> Host {
        self.start_with(&[], &[]).await
    }

    /// The same with more arguments after `run`, and environment variables.
    pub async fn start_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Host {
        let mut host = self.spawn_with(arguments, environment);
        host.notified("READY=1", PATIENCE).await;
        host
    }

    /// Starts a host with faults to order (host/daemon/src/fault.rs).
    ///
    /// # Panics
    /// If the program has none.
    pub async fn start_with_fault(&self, fault: &str) -> Host {
        assert!(has_faults(), "the program has no faults; build it with `cargo build --features fault-injection`");
        self.start_with(&[], &[("LAELAPS_FAULT", fault)]).await
    }

    /// Starts a host without waiting for anything.
    ///
    /// # Panics
    /// If the process cannot be started.
    #[must_use]
    pub fn spawn_with(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Host {
        let notices = Notices::bind(self);
        let mut child = self
            .command()
            .args(["-c", "laelaps.yml", "run"])
            .args(arguments)
            .env("NOTIFY_SOCKET", &notices.path)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("laelaps starts");
        let lines = Lines::default();
        lines.follow(child.stdout.take().expect("stdout is piped"));
        lines.follow(child.stderr.take().expect("stderr is piped"));
        Host { child, lines, notices }
    }
}

impl Host {
    /// Sends a signal to the process.
    ///
    /// # Panics
    /// If the process has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        let id = self.child.id().expect("the host was not waited for yet");
        let id = Pid::from_raw(i32::try_from(id).expect("a process id")).expect("a process id");
        kill_process(id, signal).expect("the host gets its signal");
    }

    /// Ends the process as a power cut would, and waits until it is gone.
    pub async fn kill(&mut self) {
        self.signal(Signal::KILL);
        let status = self.exited(PATIENCE).await;
        assert_eq!(status.signal(), Some(9), "killed, not ended by itself");
    }

    /// Waits for the process to end by itself.
    ///
    /// # Panics
    /// If it does not within the patience.
    pub async fn exited(&mut self, patience: Duration) -> ExitStatus {
        match waiting_for("the host's end", timeout(patience, self.child.wait())).await {
            Ok(status) => status.expect("a child can be waited for"),
            Err(_) => panic!("the host did not end within {patience:?}"),
        }
    }

    /// Asks for a graceful shutdown and waits for a clean end.
    pub async fn stop(mut self) {
        self.signal(Signal::TERM);
        let status = self.exited(PATIENCE).await;
        assert!(status.success(), "after TERM the host ended with {status}");
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be asked").is_none()
    }

    /// Waits for a message to the service manager, such as `READY=1`, that was not waited for before.
    ///
    /// # Panics
    /// If the process ends, or the patience does.
    pub async fn notified(&mut self, notice: &str, patience: Duration) {
        let awaited = async {
            tokio::select! {
                () = self.notices.wait_for(notice) => Ok(()),
                status = self.child.wait() => Err(status.expect("a child can be waited for")),
            }
        };
        match waiting_for(&format!("{notice} from the host"), timeout(patience, awaited)).await {
            Ok(Ok(())) => {}
            Ok(Err(status)) => {
                self.lines.finished().await;
                panic!("the host ended with {status} before {notice}")
            }
            Err(_) => panic!("no {notice} from the host within {patience:?}"),
        }
    }

    /// Whether the service manager has got this message by now, which was not waited for before.
    pub fn was_notified(&mut self, notice: &str) -> bool {
        self.notices.receive();
        self.notices.pending.iter().any(|pending| pending == notice)
    }

    /// Waits for a log line that contains `text`, among all lines so far and to come; returns it.
    ///
    /// # Panics
    /// If there is none within the patience.
    pub async fn logged(&self, text: &str, patience: Duration) -> String {
        self.logged_times(text, 1, patience).await
    }

    /// Waits for the `count`th line that contains `text`.
    ///
    /// # Panics
    /// If there are fewer within the patience.
    pub async fn logged_times(&self, text: &str, count: usize, patience: Duration) -> String {
        let line = self.lines.wait_for(text, count);
        match waiting_for(&format!("a log line with {text:?}"), timeout(patience, line)).await {
            Ok(line) => line,
            Err(_) => panic!("{} of {count} log lines with {text:?} within {patience:?}", self.lines.with(text).len()),
        }
    }

    /// All log lines so far that contain `text`.
    #[must_use]
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        self.lines.with(text)
    }

    /// How many lines it has logged so far.
    #[must_use]
    pub fn line_count(&self) -> usize {
        *self.lines.count.borrow()
    }

    /// The process id.
    ///
    /// # Panics
    /// If the process has ended and was waited for.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.child.id().expect("the host was not waited for yet")
    }

    /// The most memory that the process has had so far, in bytes.
    ///
    /// # Panics
    /// If the process has ended.
    #[must_use]
    pub fn memory_peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process_id())).expect("the host runs");
        let kibibytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"));
        kibibytes.and_then(|number| number.trim().parse::<u64>().ok()).expect("its peak in kB") * 1024
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.child.start_kill();
        if std::thread::panicking() {
            let lines = self.lines.all.lock().unwrap_or_else(PoisonError::into_inner);
            eprintln!("--- the host's log, last of {} lines", lines.len());
            for line in lines.iter().skip(lines.len().saturating_sub(60)) {
                let end = line.char_indices().nth(400).map_or(line.len(), |(end, _)| end);
                eprintln!("{}", &line[..end]);
            }
        }
    }
}

/// What a process printed, line by line.
#[derive(Clone, Debug)]
struct Lines {
    all: Arc<Mutex<Vec<String>>>,
    count: watch::Sender<usize>,
    /// Streams that may still bring lines.
    open: watch::Sender<usize>,
}

impl Default for Lines {
    fn default() -> Self {
        Self { all: Arc::default(), count: watch::Sender::new(0), open: watch::Sender::new(0) }
    }
}

impl Lines {
    fn follow(&self, stream: impl AsyncRead + Unpin + Send + 'static) {
        let lines = self.clone();
        self.open.send_modify(|open| *open += 1);
        tokio::spawn(async move {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).await.is_ok_and(|length| length > 0) {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                lines.all.lock().unwrap_or_else(PoisonError::into_inner).push(text);
                lines.count.send_modify(|count| *count += 1);
                line.clear();
            }
            lines.open.send_modify(|open| *open -= 1);
        });
    }

    /// Waits until everything is read that an ended process wrote.
    async fn finished(&self) {
        let mut open = self.open.subscribe();
        // A child of it may live on with its standard error.
        let _ = timeout(PATIENCE, open.wait_for(|open| *open == 0)).await;
    }

    fn with(&self, text: &str) -> Vec<String> {
        let lines = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter(|line| line.contains(text)).cloned().collect()
    }

    async fn wait_for(&self, text: &str, count: usize) -> String {
        let mut changes = self.count.subscribe();
        loop {
            changes.borrow_and_update();
            if let Some(line) = self.with(text).into_iter().nth(count - 1) {
                return line;
            }
            changes.changed().await.expect("the sender lives as long as the host");
        }
    }
}

/// The other end of the service manager's socket.
#[derive(Debug)]
struct Notices {
    path: PathBuf,
    socket: UnixDatagram,
    pending: Vec<String>,
}

impl Notices {
    fn bind(site: &Site) -> Self {
        let folder = tempfile::Builder::new().prefix("notify-").tempdir_in(site.folder()).expect("a temporary folder");
        // The site removes it with everything else.
        let path = folder.keep().join("socket");
        let socket = UnixDatagram::bind(&path).expect("a socket in a new folder");
        Self { path, socket, pending: Vec::new() }
    }

    /// Takes what has come.
    fn receive(&mut self) {
        let mut message = vec![0; 4096];
        while let Ok(length) = self.socket.try_recv(&mut message) {
            self.pending.extend(String::from_utf8_lossy(&message[..length]).lines().map(str::to_owned));
        }
    }

    async fn wait_for(&mut self, notice: &str) {
        let mut message = vec![0; 4096];
        loop {
            if let Some(found) = self.pending.iter().position(|pending| pending == notice) {
                self.pending.drain(..=found);
                return;
            }
            let length = self.socket.recv(&mut message).await.expect("a bound socket receives");
            self.pending.extend(String::from_utf8_lossy(&message[..length]).lines().map(str::to_owned));
        }
    }
}
