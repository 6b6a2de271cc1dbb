//! Running a handler natively, in `cargo test`, with a double in the host's place.
//!
//! ```
//! use laelaps_plugin::{Context, Outcome, Result, json, testing::Attempt};
//!
//! fn greet(name: String) -> Result<String> {
//!     Ok(format!("hello {name}"))
//! }
//!
//! fn greet_again(context: &Context) -> Result<Outcome> {
//!     context.submit("again", "greet").data(&json!({ "name": "you" })).send()?;
//!     Ok(Outcome::retry())
//! }
//!
//! let ended = Attempt::of(json!("world")).run(greet);
//! assert_eq!(ended.output::<String>(), "hello world");
//!
//! let ended = Attempt::of(json!({})).run(greet_again);
//! assert_eq!(ended.outcome(), Outcome::Retry(None));
//! assert_eq!(ended.submitted[0].kind, "greet");
//! ```

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::host::{Host, SubmitRequest, milliseconds};
use crate::log::Level;
use crate::{Application, Cancellation, Context, Error, Handler, Outcome, Progress, Result, Task, application};

/// One attempt that a test is about to make. Without more it is the first attempt of the task `test` of type `test`, with its lease in force.
#[derive(Clone, Debug)]
pub struct Attempt {
    task: Task,
    cancellation: Option<Cancellation>,
    lease_lost: bool,
    refusal: Option<(String, String)>,
    deadline_ms: Option<u64>,
    created_at_ms: u64,
    max_attempts: Option<u32>,
    queue: String,
    settings: Vec<(String, String)>,
}

/// What came of it.
#[derive(Debug)]
pub struct Ended {
    /// What the handler answered.
    pub result: Result<Outcome>,
    /// The follow-up tasks that the host would store. None of them after a failure.
    pub submitted: Vec<Submitted>,
    /// What was merged into the task's data, in order.
    pub updates: Vec<Value>,
    /// What was shown of the work, in order.
    pub progress: Vec<Progress>,
    /// For how long the handler asked to hold the task, in order.
    pub held_for: Vec<Duration>,
    /// Lines for the log, in order.
    pub log: Vec<(Level, String)>,
}

/// A follow-up task.
#[derive(Clone, Debug, PartialEq)]
pub struct Submitted {
    /// Its key.
    pub key: String,
    /// Its type.
    pub kind: String,
    /// Its data.
    pub data: Value,
    /// Not before this moment.
    pub run_at: Option<SystemTime>,
    /// The user on whose account it runs.
    pub user: Option<String>,
    /// The most tasks of its user that run at once.
    pub max_running: Option<u32>,
    /// The most attempts before it ends as failed.
    pub max_attempts: Option<u32>,
    /// Of its user's tasks the smaller runs first; 0 is the usual one.
    pub priority: i32,
    /// The queue in which it waits. None: the task's own.
    pub queue: Option<String>,
    /// Whether its data is stored compressed.
    pub gzip: bool,
}

impl Attempt {
    /// An attempt of a task with this data.
    ///
    /// # Panics
    /// If `data` has no JSON form.
    pub fn of(data: impl Serialize) -> Self {
        match serde_json::to_vec(&data) {
            Ok(data) => Self::of_bytes(data),
            Err(error) => panic!("the task's data has no JSON form: {error}"),
        }
    }

    /// An attempt of a task with these bytes for data, to see how a handler bears what it did not expect.
    pub fn of_bytes(data: impl Into<Vec<u8>>) -> Self {
        let task = Task { key: "test".to_owned(), kind: "test".to_owned(), data: data.into(), user: None, attempt: 1 };
        Self {
            task,
            cancellation: None,
            lease_lost: false,
            refusal: None,
            deadline_ms: None,
            created_at_ms: 0,
            max_attempts: None,
            queue: "default".to_owned(),
            settings: Vec::new(),
        }
    }

    /// The task's key.
    #[must_use]
    pub fn key(mut self, key: &str) -> Self {
        self.task.key = key.to_owned();
        self
    }

    /// The task's type.
    #[must_use]
    pub fn kind(mut self, kind: &str) -> Self {
        self.task.kind = kind.to_owned();
        self
    }

    /// The task's user.
    #[must_use]
    pub fn user(mut self, user: &str) -> Self {
        self.task.user = Some(user.to_owned());
        self
    }

    /// The number of the attempt.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        self.task.attempt = attempt;
        self
    }

    /// The most attempts the task gets.
    #[must_use]
    pub fn max_attempts(mut self, most: u32) -> Self {
        self.max_attempts = Some(most);
        self
    }

    /// The queue in which the task waited. Without this: `default`.
    #[must_use]
    pub fn queue(mut self, queue: &str) -> Self {
        self.queue = queue.to_owned();
        self
    }

    /// When the task was submitted. Without this: 1970-01-01.
    #[must_use]
    pub fn created_at(mut self, moment: SystemTime) -> Self {
        self.created_at_ms = milliseconds(moment.duration_since(UNIX_EPOCH).unwrap_or_default());
        self
    }

    /// When the attempt would be stopped.
    #[must_use]
    pub fn deadline(mut self, moment: SystemTime) -> Self {
        self.deadline_ms = Some(milliseconds(moment.duration_since(UNIX_EPOCH).unwrap_or_default()));
        self
    }

    /// A setting of the route.
    #[must_use]
    pub fn setting(mut self, name: &str, value: impl Into<Value>) -> Self {
        let text = match value.into() {
            Value::String(text) => text,
            value => value.to_string(),
        };
        self.settings.push((name.to_owned(), text));
        self
    }

    /// The host asks the attempt to end.
    #[must_use]
    pub fn cancelled(mut self, reason: Cancellation) -> Self {
        self.cancellation = Some(reason);
        self.lease_lost |= reason == Cancellation::LeaseLost;
        self
    }

    /// The host refuses every follow-up and update, for example with `too-many` or `unavailable`.
    #[must_use]
    pub fn refusing(mut self, code: &str, message: &str) -> Self {
        self.refusal = Some((code.to_owned(), message.to_owned()));
        self
    }

    /// Runs a handler function.
    pub fn run<P>(self, handler: impl Handler<P>) -> Ended {
        self.end(|context| handler.handle(context))
    }

    /// Runs an application.
    pub fn perform<A: Application + Default>(self) -> Ended {
        self.end(application::run_application::<A>)
    }

    fn end(self, handler: impl FnOnce(&Context) -> Result<Outcome>) -> Ended {
        let recorded = Rc::new(RefCell::new(Recorded::default()));
        let context = Context::new(self.task.clone(), Box::new(Double { attempt: self, recorded: Rc::clone(&recorded) }));
        let outer = LOG.replace(Some(Vec::new()));
        let result = handler(&context);
        let log = LOG.replace(outer).unwrap_or_default();
        let Recorded { submitted, updates, progress, held_for } = recorded.take();
        let submitted = if result.is_ok() { submitted } else { Vec::new() };
        Ended { result, submitted, updates, progress, held_for, log }
    }
}

impl Ended {
    /// The outcome.
    ///
    /// # Panics
    /// If the handler failed, with its error.
    #[track_caller]
    pub fn outcome(&self) -> Outcome {
        match &self.result {
            Ok(outcome) => outcome.clone(),
            Err(error) => panic!("the handler failed: {error}"),
        }
    }

    /// The output, read as JSON.
    ///
    /// # Panics
    /// If the handler failed, or finished without output of that shape.
    #[track_caller]
    pub fn output<T: DeserializeOwned>(&self) -> T {
        match self.outcome().output() {
            Ok(output) => output,
            Err(error) => panic!("{error}"),
        }
    }

    /// The failure.
    ///
    /// # Panics
    /// If the handler did not fail, with its outcome.
    #[track_caller]
    pub fn error(&self) -> Error {
        match &self.result {
            Err(error) => error.clone(),
            Ok(outcome) => panic!("the handler did not fail: {outcome:?}"),
        }
    }
}

thread_local! {
    /// The lines of the attempt that this thread is making, if it is making one.
    static LOG: RefCell<Option<Vec<(Level, String)>>> = const { RefCell::new(None) };
}

pub(crate) fn log_enabled(_level: Level) -> bool {
    true
}

pub(crate) fn log_line(level: Level, message: String) {
    LOG.with_borrow_mut(|lines| match lines {
        Some(lines) => lines.push((level, message)),
        None => eprintln!("{level:?}: {message}"),
    });
}

#[derive(Default)]
struct Recorded {
    submitted: Vec<Submitted>,
    updates: Vec<Value>,
    progress: Vec<Progress>,
    held_for: Vec<Duration>,
}

struct Double {
    attempt: Attempt,
    recorded: Rc<RefCell<Recorded>>,
}

impl Double {
    /// What the host would say to this JSON: it takes objects.
    fn object(&self, json: &[u8]) -> Result<Value> {
        if let Some((code, message)) = &self.attempt.refusal {
            return Err(Error::refused(code.clone(), message.clone()));
        }
        match serde_json::from_slice(json) {
            Ok(value @ Value::Object(_)) => Ok(value),
            Ok(value) => Err(Error::refused("invalid-data".to_owned(), format!("not a JSON object: {value}"))),
            Err(error) => Err(Error::refused("invalid-data".to_owned(), format!("not JSON: {error}"))),
        }
    }
}

impl Host for Double {
    fn heartbeat(&self, progress: Option<&Progress>, alive_time: Option<Duration>) -> bool {
        let mut recorded = self.recorded.borrow_mut();
        recorded.progress.extend(progress.cloned());
        recorded.held_for.extend(alive_time);
        !self.attempt.lease_lost
    }

    fn cancellation(&self) -> Option<Cancellation> {
        self.attempt.cancellation
    }

    fn update_data(&self, members: &[u8]) -> Result<()> {
        let members = self.object(members)?;
        self.recorded.borrow_mut().updates.push(members);
        Ok(())
    }

    fn submit(&self, request: SubmitRequest) -> Result<()> {
        let data = self.object(&request.data)?;
        if request.key.is_empty() || request.key.len() > 255 {
            let message = format!("a key has 1 to 255 bytes, this one has {}", request.key.len());
            return Err(Error::refused("invalid-key".to_owned(), message));
        }
        self.recorded.borrow_mut().submitted.push(Submitted {
            key: request.key,
            kind: request.kind,
            data,
            run_at: request.run_at_ms.map(|unix_ms| UNIX_EPOCH + Duration::from_millis(unix_ms)),
            user: request.user,
            max_running: request.max_running,
            max_attempts: request.max_attempts,
            priority: request.priority.unwrap_or(0),
            queue: request.queue,
            gzip: request.gzip,
        });
        Ok(())
    }

    fn deadline_ms(&self) -> Option<u64> {
        self.attempt.deadline_ms
    }

    fn created_at_ms(&self) -> u64 {
        self.attempt.created_at_ms
    }

    fn max_attempts(&self) -> Option<u32> {
        self.attempt.max_attempts
    }

    fn queue(&self) -> String {
        self.attempt.queue.clone()
    }

    fn setting(&self, name: &str) -> Option<String> {
        self.attempt.settings.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn settings(&self) -> Vec<(String, String)> {
        self.attempt.settings.clone()
    }
}
