//! `laelaps demo`: the main job on the embedded default, to watch. A real host process, a real component, real log lines, a live replace.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use laelaps_queue::{Filter, NewTask, Queue, State, Task};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::plugin;

/// Real lines of a web server's access log; tests/data/README.md names their origin.
const LOG: &str = include_str!("../../../../tests/data/apache_access.log");
/// How many of them the demo reads.
const LINES: usize = 4_000;
/// plugins/access-log, first and second edition, built by build.rs.
const EDITION_1: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/access-log-1.wasm"));
const EDITION_2: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/access-log-2.wasm"));

/// How long the demo takes to submit its tasks, so that there is something to watch.
const SUBMITTING: Duration = Duration::from_secs(4);
/// How long the demo may wait for the next thing to happen before it gives up: a slow machine may take its time, and one that gets on is waited for.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at the queue.
const LOOK: Duration = Duration::from_millis(50);

/// Arguments of `laelaps demo`.
#[derive(clap::Args, Debug)]
pub(super) struct Arguments {
    /// How many tasks to run
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(10..=10_000))]
    tasks: u32,
}

/// Run the demo in a temporary folder that is removed at the end, also after Ctrl-C.
///
/// # Errors
/// A step failed, or a task was lost.
pub(super) async fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // From before there is anything to be left behind.
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot take over Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot take over the signal TERM")?;
    let folder = tempfile::Builder::new().prefix("laelaps-demo-").tempdir().context("cannot make a temporary folder")?;
    let mut demo = Demo::start(folder.path()).await?;
    let result = tokio::select! {
        result = demo.play(arguments.tasks) => result,
        _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("terminated")),
    };
    if result.is_err() {
        demo.show_log();
    }
    demo.stop().await?;
    result
}

struct Demo {
    folder: PathBuf,
    host: tokio::process::Child,
    queue: Queue,
}

impl Demo {
    async fn start(folder: &Path) -> anyhow::Result<Self> {
        let plugins = folder.join("plugins");
        std::fs::create_dir(&plugins)?;
        std::fs::write(plugins.join("access-log.wasm"), EDITION_1)?;
        let database = folder.join("queue.db");
        let url = format!("sqlite:{}", database.display());
        // JSON is YAML, and needs no care with quoting.
        let configuration = json!({ "demo": {
            "type": "rdb",
            "url": url,
            "processors": 4,
            "poll_interval": 0.2,
            "retention_time": 3600,
            "plugins": plugins,
            "plugin_cache": folder.join("cache"),
            "routes": [{ "type": "access-log", "plugin": "access-log" }],
        }});
        let file = folder.join("laelaps.yml");
        std::fs::write(&file, serde_json::to_string_pretty(&configuration)?)?;

        let queue = Queue::open(&laelaps_queue::Config::new(url)).await?;
        queue.init().await?;

        let program = std::env::current_exe().context("cannot find the program itself")?;
        let host = tokio::process::Command::new(program)
            .arg("-c")
            .arg(&file)
            .args(["-e", "demo", "run", "--log"])
            .arg(folder.join("host.log"))
            .stdin(Stdio::null())
            .kill_on_drop(true)
            // Of its own, so that Ctrl-C ends the demo in order: first the demo's part, then the host.
            .process_group(0)
            .spawn()
            .context("cannot start a host")?;
        Ok(Self { folder: folder.to_path_buf(), host, queue })
    }

    async fn play(&mut self, count: u32) -> anyhow::Result<()> {
        println!("A queue (SQLite) and a host with 4 processors run in {}.", self.folder.display());
        println!("The handler is plugins/access-log, a WebAssembly component of {} KiB.\n", EDITION_1.len() / 1024);
        let tasks = tasks(count);
        let started = Instant::now();
        let bar = ProgressBar::new(u64::from(count));
        bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} tasks finished  {msg}")?);
        bar.set_message("edition 1 serves");

        let (half, last) = (tasks.len() / 2, tasks.len() * 3 / 4);
        let pause = SUBMITTING / count;
        for (index, task) in tasks.iter().enumerate() {
            // On a slow machine the host may still be compiling: each version is given something to do.
            if index == half {
                self.until_finished(1, &bar).await?;
                self.replace()?;
                bar.suspend(|| println!("{index} tasks submitted; access-log.wasm is replaced now, while they flow"));
            }
            if index == last {
                self.until_second_edition_serves().await?;
                bar.set_message("edition 2 serves");
            }
            self.queue.submit(task.clone()).await?;
            if index % 10 == 0 {
                bar.set_position(self.queue.stats().await?.finished);
                self.alive()?;
            }
            tokio::time::sleep(pause).await;
        }
        self.until_finished(count, &bar).await?;
        bar.finish_and_clear();
        let finished = self.finished().await?;
        report(&finished, &tasks, started.elapsed())
    }

    /// As an operator does it: write beside, then rename over.
    fn replace(&self) -> anyhow::Result<()> {
        let beside = self.folder.join("plugins/.access-log.wasm.new");
        std::fs::write(&beside, EDITION_2)?;
        std::fs::rename(&beside, self.folder.join("plugins/access-log.wasm"))?;
        Ok(())
    }

    async fn until_second_edition_serves(&mut self) -> anyhow::Result<()> {
        let version = plugin::Digest::of(EDITION_2).short();
        let deadline = Instant::now() + PATIENCE;
        let mut looks = tokio::time::interval(LOOK);
        while !std::fs::read_to_string(self.folder.join("host.log"))?.contains(&version) {
            looks.tick().await;
            self.alive()?;
            if Instant::now() > deadline {
                bail!("the new version does not serve after {PATIENCE:?}; the host's log follows");
            }
        }
        Ok(())
    }

    /// Wait until that many tasks are finished.
    async fn until_finished(&mut self, count: u32, bar: &ProgressBar) -> anyhow::Result<()> {
        let mut deadline = Instant::now() + PATIENCE;
        let mut finished = 0;
        let mut looks = tokio::time::interval(LOOK);
        loop {
            looks.tick().await;
            let stats = self.queue.stats().await?;
            bar.set_position(stats.finished);
            if stats.finished >= u64::from(count) {
                return Ok(());
            }
            if stats.finished > finished {
                (finished, deadline) = (stats.finished, Instant::now() + PATIENCE);
            }
            self.alive()?;
            if stats.failed > 0 || Instant::now() > deadline {
                bail!("{} tasks finished of {count} waited for, {} failed; the host's log follows", stats.finished, stats.failed);
            }
        }
    }

    fn alive(&mut self) -> anyhow::Result<()> {
        match self.host.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the host ended ({status}); its log follows"),
        }
    }

    async fn finished(&self) -> anyhow::Result<Vec<Task>> {
        let mut filter = Filter { states: vec![State::Finished], limit: 1_000, with_data: true, ..Filter::default() };
        let mut all = Vec::new();
        loop {
            let page = self.queue.list(&filter).await?;
            all.extend(page.tasks);
            match page.next {
                Some(next) => filter.after = Some(next),
                None => return Ok(all),
            }
        }
    }

    fn show_log(&self) {
        let log = std::fs::read_to_string(self.folder.join("host.log")).unwrap_or_default();
        for line in log.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev() {
            eprintln!("  {line}");
        }
    }

    async fn stop(mut self) -> anyhow::Result<()> {
        if let Some(id) = self.host.id().and_then(|id| i32::try_from(id).ok()).and_then(rustix::process::Pid::from_raw) {
            // It may have ended by itself; then there is nothing to stop.
            let _ = rustix::process::kill_process(id, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(PATIENCE, self.host.wait()).await.is_err() {
            self.host.kill().await?;
        }
        self.queue.close().await;
        Ok(())
    }
}

/// The log, cut into `count` tasks of consecutive lines.
fn tasks(count: u32) -> Vec<NewTask> {
    let lines: Vec<&str> = LOG.lines().take(LINES).collect();
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    (0..count)
        .map(|index| {
            let from = index * lines.len() / count;
            let to = (index + 1) * lines.len() / count;
            let data = json!({ "lines": lines[from..to], "top": 1_000, "visitors": "list" });
            NewTask::new(format!("access-log.{index:05}"), "access-log", data.to_string())
        })
        .collect()
}

fn report(finished: &[Task], submitted: &[NewTask], took: Duration) -> anyhow::Result<()> {
    let mut versions: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut totals = Totals::default();
    for task in finished {
        let output: Value = serde_json::from_slice(task.output.as_deref().unwrap_or_default())
            .with_context(|| format!("task {} has no JSON output", task.key))?;
        let digest = task.plugin_digest.clone().unwrap_or_default();
        let version = versions.entry(digest).or_default();
        version.0 += 1;
        version.1 = output["edition"].as_u64().unwrap_or(1);
        totals.add(&output);
    }
    let lost = submitted.len() - finished.len();
    println!("{} tasks submitted, {} finished, {lost} lost, in {:.1} s.\n", submitted.len(), finished.len(), took.as_secs_f64());
    println!("Which version ran them:");
    let mut versions: Vec<_> = versions.into_iter().collect();
    versions.sort_by_key(|(_, (_, edition))| *edition);
    for (digest, (count, edition)) in &versions {
        println!("  edition {edition}, sha256 {}: {count} tasks", digest.get(..12).unwrap_or(digest));
    }
    totals.print();
    println!("\nWhat to try next:");
    println!("  write a handler:      sdk/rust/README.md, a first plugin in five minutes");
    println!("  run your own queue:   README.md, then `laelaps init` and `laelaps run`");
    println!("  try one by hand:      laelaps plugin run HANDLER.wasm --kind TYPE --data '{{}}'");
    if versions.len() < 2 {
        bail!("only one version ran");
    }
    if lost > 0 {
        bail!("{lost} tasks were lost");
    }
    Ok(())
}

/// What the log says, summed over all tasks.
#[derive(Default)]
struct Totals {
    requests: u64,
    bytes: u64,
    status_classes: BTreeMap<String, u64>,
    paths: BTreeMap<String, u64>,
    visitors: BTreeSet<String>,
    malformed: u64,
    /// Requests and those by robots, as far as the second edition counted.
    told_apart: (u64, u64),
}

impl Totals {
    fn add(&mut self, output: &Value) {
        let number = |name: &str| output[name].as_u64().unwrap_or(0);
        self.requests += number("requests");
        self.bytes += number("bytes");
        self.malformed += number("malformed_total");
        for (class, count) in output["status_classes"].as_object().into_iter().flatten() {
            *self.status_classes.entry(class.clone()).or_default() += count.as_u64().unwrap_or(0);
        }
        for top in output["top_paths"].as_array().into_iter().flatten() {
            let path = top["path"].as_str().unwrap_or_default().to_owned();
            *self.paths.entry(path).or_default() += top["requests"].as_u64().unwrap_or(0);
        }
        let addresses = output["visitor_addresses"].as_array().into_iter().flatten();
        self.visitors.extend(addresses.filter_map(Value::as_str).map(str::to_owned));
        if let Some(bots) = output["bots"].as_u64() {
            self.told_apart.0 += number("requests");
            self.told_apart.1 += bots;
        }
    }

    fn print(&self) {
        println!("\nWhat the log says:");
        let classes = self.status_classes.iter().filter(|(_, count)| **count > 0);
        let classes: Vec<String> = classes.map(|(class, count)| format!("{count} {class}")).collect();
        println!("  {} requests ({}), {} bytes sent", self.requests, classes.join(", "), self.bytes);
        println!("  {} visitors, {} malformed lines", self.visitors.len(), self.malformed);
        let mut paths: Vec<_> = self.paths.iter().collect();
        paths.sort_by_key(|(path, count)| (std::cmp::Reverse(**count), *path));
        for (path, count) in paths.into_iter().take(3) {
            println!("  {count:>5}  {path}");
        }
        let (requests, bots) = self.told_apart;
        if requests > 0 {
            println!("  and, since edition 2 serves: {bots} of {requests} requests came from robots");
        }
    }
}
