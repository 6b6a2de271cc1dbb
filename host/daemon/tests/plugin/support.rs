//! An engine, attempts and services for tests.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use laelaps::plugin::{Completion, Config, Control, Engine, Grants, Invocation, Level, Limits, Services, Version};
use laelaps_queue::{
    ClaimedTask, Compression, Descent, Event, Lease, LeaseAnswer, LeaseRef, NewTask, Progress, TaskId, Timestamp,
};
use tempfile::TempDir;

use crate::guests;

/// How long a test waits for what has to happen: it only ends a wait that is hopeless.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// A configuration whose compiler is the real program, and whose compiled code all tests of a run share.
pub(crate) fn config() -> Config {
    Config {
        instances_max: 8,
        compiler: Some(PathBuf::from(env!("CARGO_BIN_EXE_laelaps"))),
        poll_interval: Duration::from_millis(500),
        ..Config::default()
    }
}

/// An engine with the handler of guest.wat. A test makes one, first of all.
pub(crate) struct Bench {
    pub(crate) engine: Arc<Engine>,
    pub(crate) version: Arc<Version>,
    pub(crate) services: Arc<Recorder>,
    pub(crate) limits: Limits,
    pub(crate) max_requests: Option<u32>,
    _cache: TempDir,
}

impl Bench {
    pub(crate) async fn new() -> Self {
        Self::with(config()).await
    }

    pub(crate) async fn with(config: Config) -> Self {
        Self::of(config, &guests::handler()).await
    }

    /// With another module.
    pub(crate) async fn of(mut config: Config, module: &[u8]) -> Self {
        let cache = tempfile::tempdir().expect("folder");
        config.cache_folder = Some(cache.path().join("code"));
        let engine = Engine::new(&config).expect("engine");
        let version = engine.load("guest", module).await.expect("the handler is admitted");
        Self { engine, version, services: Arc::default(), limits: Limits::default(), max_requests: None, _cache: cache }
    }

    /// Run one attempt to its end.
    pub(crate) async fn run(&self, kind: &str, data: &[u8]) -> Completion {
        self.invoke(kind, data, &Arc::new(Control::new())).await
    }

    pub(crate) async fn invoke(&self, kind: &str, data: &[u8], control: &Arc<Control>) -> Completion {
        let invocation = Invocation {
            version: self.version.clone(),
            task: task(kind, data),
            limits: self.limits.clone(),
            grants: Grants::default(),
            settings: Arc::new([("colour".into(), "blue".into())]),
            max_requests: self.max_requests,
            route: 0,
            log_level: Level::Info,
            control: control.clone(),
            services: self.services.clone(),
        };
        tokio::time::timeout(PATIENCE, self.engine.invoke(invocation)).await.expect("an attempt ends")
    }
}

/// The bytes a handler finished with.
pub(crate) fn output(completion: &Completion) -> &[u8] {
    match &completion.event {
        Event::Finish { output, .. } => output.as_deref().unwrap_or_default(),
        other => panic!("not finished: {other:?}"),
    }
}

/// The number a handler finished with.
pub(crate) fn number(completion: &Completion) -> u64 {
    u64::from_le_bytes(output(completion).try_into().expect("eight bytes"))
}

pub(crate) fn task(kind: &str, data: &[u8]) -> ClaimedTask {
    ClaimedTask {
        lease_ref: LeaseRef { task: TaskId(1), lease: Lease(1) },
        key: "a-key".into(),
        task_type: kind.into(),
        data: data.to_vec(),
        queue: "default".to_owned(),
        user: Some("somebody".into()),
        max_running: None,
        descent: Descent { root: TaskId(1), depth: 0 },
        compression: Compression::None,
        attempt: 1,
        max_attempts: None,
        lost: 0,
        lost_alone: 0,
        alone: false,
        releases: 0,
        created_at: Timestamp(1_700_000_000_000),
        claimed_at: Timestamp(1_700_000_000_000),
        until: Timestamp(1_700_000_300_000),
    }
}

/// Services that remember what they were asked.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) beats: Mutex<Vec<(Option<Progress>, Option<Duration>)>>,
    pub(crate) updates: Mutex<Vec<Vec<u8>>>,
    pub(crate) lease: Mutex<Held>,
    /// How often it was asked how many follow-ups wait, and what it answers: None is that the queue does not keep it.
    pub(crate) waiting: Mutex<(u32, Option<u32>)>,
    /// Follow-ups of all attempts.
    pub(crate) submitted: Mutex<u32>,
}

/// How the lease stands.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Held {
    #[default]
    Yes,
    No,
    /// The database does not answer.
    Unknown,
}

#[async_trait]
impl Services for Recorder {
    async fn heartbeat(&self, progress: Option<Progress>, alive_time: Option<Duration>) -> bool {
        let lease = *self.lease.lock().expect("no panic");
        if lease == Held::Unknown {
            std::future::pending::<()>().await;
        }
        self.beats.lock().expect("no panic").push((progress, alive_time));
        lease == Held::Yes
    }

    async fn update_data(&self, members: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error> {
        NewTask::new("key", "type", members.clone()).check()?;
        self.updates.lock().expect("no panic").push(members);
        Ok(if *self.lease.lock().expect("no panic") == Held::Yes { LeaseAnswer::Held } else { LeaseAnswer::Lost })
    }

    async fn now(&self) -> Timestamp {
        Timestamp(1_700_000_000_000)
    }

    async fn relatives(&self, limit: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        if *self.lease.lock().expect("no panic") == Held::Unknown {
            return Err(laelaps_queue::Error::Closed);
        }
        let mut waiting = self.waiting.lock().expect("no panic");
        waiting.0 += 1;
        Ok(waiting.1.map(|waiting| waiting.min(limit)))
    }

    fn count_follow_up(&self, most: u32) -> bool {
        let mut submitted = self.submitted.lock().expect("no panic");
        let has_room = *submitted < most;
        *submitted += u32::from(has_room);
        has_room
    }

    fn leads_here(&self, task_type: &str) -> bool {
        task_type != "elsewhere"
    }
}
