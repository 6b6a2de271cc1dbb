//! Attempts per second of one component, fresh and reused, one at a time and several at once.
//!
//! `cargo bench -p laelaps --bench invoke -- FILE.wasm [KIND [DATA [AT_ONCE]]]`; the handler has to finish that task.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use laelaps::plugin::{Config, Control, Engine, Grants, Invocation, Level, Limits, Services, Version};
use laelaps_queue::{ClaimedTask, Compression, Descent, Event, Lease, LeaseAnswer, LeaseRef, Progress, TaskId, Timestamp};

/// How long each figure is measured.
const MEASURED: Duration = Duration::from_secs(3);

struct NoServices;

#[async_trait]
impl Services for NoServices {
    async fn heartbeat(&self, _: Option<Progress>, _: Option<Duration>) -> bool {
        true
    }

    async fn update_data(&self, _: Vec<u8>) -> Result<LeaseAnswer, laelaps_queue::Error> {
        Ok(LeaseAnswer::Held)
    }

    async fn relatives(&self, _limit: u32) -> Result<Option<u32>, laelaps_queue::Error> {
        Ok(None)
    }

    fn count_follow_up(&self, _most: u32) -> bool {
        true
    }

    fn leads_here(&self, _task_type: &str) -> bool {
        true
    }

    async fn now(&self) -> Timestamp {
        Timestamp(0)
    }
}

struct Bench {
    engine: Arc<Engine>,
    version: Arc<Version>,
    kind: String,
    data: Vec<u8>,
    services: Arc<NoServices>,
}

impl Bench {
    async fn attempt(&self, max_requests: Option<u32>) -> Event {
        let task = ClaimedTask {
            lease_ref: LeaseRef { task: TaskId(1), lease: Lease(1) },
            key: "a-key".into(),
            task_type: self.kind.clone(),
            data: self.data.clone(),
            queue: "default".to_owned(),
            user: None,
            max_running: None,
            descent: Descent { root: TaskId(1), depth: 0 },
            compression: Compression::None,
            attempt: 1,
            max_attempts: None,
            lost: 0,
            lost_alone: 0,
            alone: false,
            releases: 0,
            created_at: Timestamp(0),
            claimed_at: Timestamp(0),
            until: Timestamp(0),
        };
        let invocation = Invocation {
            version: self.version.clone(),
            task,
            limits: Limits { memory_bytes: 256 << 20, ..Limits::default() },
            grants: Grants::default(),
            settings: Arc::new([]),
            max_requests,
            route: 0,
            log_level: Level::Info,
            control: Arc::new(Control::new()),
            services: self.services.clone(),
        };
        self.engine.invoke(invocation).await.event
    }

    /// Attempts per second, and the time of one at the median and the 99th percentile.
    async fn measure(self: &Arc<Self>, name: &str, at_once: usize, max_requests: Option<u32>) {
        let started = Instant::now();
        let workers: Vec<_> = (0..at_once)
            .map(|_| {
                let bench = self.clone();
                tokio::spawn(async move {
                    let mut times = Vec::new();
                    while started.elapsed() < MEASURED {
                        let begun = Instant::now();
                        let event = bench.attempt(max_requests).await;
                        assert!(matches!(event, Event::Finish { .. }), "the handler has to finish: {event:?}");
                        times.push(begun.elapsed());
                    }
                    times
                })
            })
            .collect();
        let mut times = Vec::new();
        for worker in workers {
            times.extend(worker.await.expect("no panic"));
        }
        let per_second = times.len() as f64 / started.elapsed().as_secs_f64();
        times.sort_unstable();
        let (median, high) = (times[times.len() / 2], times[times.len() * 99 / 100]);
        println!("{name:>8}, {at_once} at once: {per_second:>9.0} a second; median {median:>9.1?}, 99 % within {high:>9.1?}");
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let Some(file) = arguments.next() else {
        // `cargo test --benches` calls us without one.
        eprintln!("usage: cargo bench -p laelaps --bench invoke -- FILE.wasm [KIND [DATA [AT_ONCE]]]");
        return;
    };
    let kind = arguments.next().unwrap_or_else(|| "echo".into());
    let data = arguments.next().unwrap_or_else(|| "{}".into()).into_bytes();
    let at_once = arguments.next().and_then(|number| number.parse().ok()).unwrap_or(4);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    runtime.block_on(async {
        let config = Config {
            memory_bytes_max: 256 << 20,
            instances_max: 32,
            compiler: Some(PathBuf::from(env!("CARGO_BIN_EXE_laelaps"))),
            ..Config::default()
        };
        let engine = Engine::new(&config).expect("engine");
        let started = Instant::now();
        let version = engine.load("bench", &std::fs::read(&file).expect("the file")).await.expect("admitted");
        println!("{file}: admitted within {:.2?}", started.elapsed());
        let bench = Arc::new(Bench { engine, version, kind, data, services: Arc::new(NoServices) });
        for (name, max_requests) in [("fresh", None), ("reused", Some(1_000))] {
            bench.measure(name, 1, max_requests).await;
            bench.measure(name, at_once, max_requests).await;
        }
    });
}
