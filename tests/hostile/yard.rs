//! A host under attack, with a good plugin beside it.

use std::cell::Cell;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use laelaps_queue::{Filter, NewTask, Queue, State, Task};
use laelaps_tests::{
    Host, LONG, PATIENCE, Site, eventually, guest, laelaps, measured, promised, scaled, submit, task, with_edition,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

/// What a host may come to, with routes of 64 MiB and three processors.
pub(super) const HOST_BYTES_MAX: u64 = 512 << 20;
/// What the host and its compiling child may come to together.
const CAGE_BYTES: u64 = 1_536 << 20;
/// A good task may take this many times as long beside an attack as without.
const SLOWER_PROMISE: f64 = 2.0;
/// Times that an attack is measured: a percentile of one short measurement also tells of what else the machine did.
const ROUNDS: usize = 3;
/// Over so long a time a host that has nothing to do uses less than half of one processor.
const QUIET_WINDOW: Duration = Duration::from_millis(200);
/// Tasks at once: two for an attacker at most, so that one is left for the good tasks.
const PROCESSORS: usize = 3;
/// The good plugin, and the beginning of its tasks' types.
const GOOD: &str = "good";

/// A running host with the plugin `good`, and whatever a test adds.
pub(super) struct Yard {
    pub(super) site: Site,
    pub(super) queue: Queue,
    pub(super) host: Host,
    /// Numbers the editions of modules, so that none is known from an earlier run.
    edition: u32,
    streams: usize,
    cage: Cage,
}

/// A task of the attacker's, of whom one runs at a time: a queue's own limit, so that what is measured is the sandbox.
pub(super) fn attack(key: impl Into<String>, kind: &str, data: Value) -> NewTask {
    NewTask { user: Some("attacker".to_owned()), max_running: Some(1), max_attempts: Some(1), ..task(key, kind, data) }
}

/// What the host says of files that it does not admit.
pub(super) async fn refusals(yard: &mut Yard, plugin: &str, times: usize) -> String {
    let named = format!("plugin={plugin} ");
    yard.until(LONG, &format!("{plugin} is refused {times} times"), async |yard| {
        let lines = yard.host.lines_with("file is refused");
        let mut lines = lines.into_iter().filter(|line| line.contains(&named));
        lines.nth(times - 1).ok_or_else(|| format!("{:?}", yard.host.lines_with(&named)))
    })
    .await
}

impl Yard {
    /// A host with these routes and plugins. Other types than `good` go to the first route that takes them.
    pub(super) async fn open(routes: &[Value], plugins: &[(&str, Vec<u8>)]) -> Self {
        Self::open_with(json!({}), routes, plugins).await
    }

    /// The same with more members in its section.
    pub(super) async fn open_with(section: Value, routes: &[Value], plugins: &[(&str, Vec<u8>)]) -> Self {
        let site = Site::new().await;
        configure(&site, section, routes);
        site.plug(GOOD, &guest("noop"));
        let edition = fresh_number();
        for (number, (name, module)) in (0..).zip(plugins) {
            site.plug(name, &with_edition(module, edition.wrapping_add(number)));
        }
        Self::start(site, edition.wrapping_add(1_000)).await
    }

    /// A host with other routes behind that of the good plugin, in the same site: paths of the site are known only now.
    pub(super) async fn reconfigure(self, routes: &[Value]) -> Self {
        let stopped = self.stopped().await;
        stopped.configure(routes);
        let Stopped { site, edition, .. } = stopped;
        Self::start(site, edition).await
    }

    /// Ends the host, and keeps the site.
    pub(super) async fn stopped(self) -> Stopped {
        let Self { site, queue, host, edition, .. } = self;
        host.stop().await;
        Stopped { site, queue, edition }
    }

    async fn start(site: Site, edition: u32) -> Self {
        let queue = site.queue().await;
        let mut host = site.spawn_with(&[], &[]);
        let cage = Cage::around(host.process_id());
        host.notified("READY=1", LONG).await;
        Self { site, queue, host, edition, streams: 0, cage }
    }

    /// Puts an edition of a module into the plugin folder that no host has seen.
    pub(super) fn plug(&mut self, name: &str, module: &[u8]) {
        self.edition = self.edition.wrapping_add(1);
        self.site.plug(name, &with_edition(module, self.edition));
    }

    /// Submits tasks and waits until each has ended, however it did; returns them in their order.
    pub(super) async fn ends(&mut self, tasks: &[NewTask]) -> Vec<Task> {
        submit(&self.queue, tasks).await;
        let mut ended = Vec::new();
        for task in tasks {
            let promise = format!("{} has ended", task.key);
            let found = async |yard: &mut Self| {
                let found = without_data(&yard.queue, &task.key).await.into_iter().find(|found| found.key == task.key).unwrap();
                if found.state.is_terminal() { Ok(()) } else { Err(found.state.as_str().to_owned()) }
            };
            self.until(LONG, &promise, found).await;
            ended.push(self.queue.backend().get(&task.key).await.unwrap().unwrap());
        }
        ended
    }

    /// [`eventually`], which ends as soon as the host does.
    pub(super) async fn until<T>(
        &mut self,
        patience: Duration,
        promise: &str,
        mut probe: impl AsyncFnMut(&mut Self) -> Result<T, String>,
    ) -> T {
        eventually(patience, promise, async || {
            self.is_alive().await;
            probe(self).await
        })
        .await
    }

    async fn is_alive(&mut self) {
        if !self.host.is_running() {
            let status = self.host.exited(PATIENCE).await;
            let killed = self.cage.killed();
            panic!("the attack ended the host: {status} (signal {:?}); killed for memory in its cage: {killed}", status.signal());
        }
    }

    /// Runs an attack, again and again, while good tasks come; then looks at what it came to.
    pub(super) async fn survives(&mut self, what: &str, mut attack: impl AsyncFnMut(&mut Self, usize)) {
        let count = scaled(500);
        let mut ratio = f64::INFINITY;
        for measurement in 0..ROUNDS {
            let alone = percentile_99(&self.good_tasks(count, async |_| ()).await);
            let mut round = measurement * 1_000_000;
            let beside = self.good_tasks(count, async |yard: &mut Self| {
                attack(yard, round).await;
                round += 1;
            });
            let beside = percentile_99(&beside.await);
            measured(&format!("p99 of a good task alone, and beside {what}"), format!("{alone:?}, {beside:?}"));
            ratio = ratio.min(beside.as_secs_f64() / alone.as_secs_f64());
            if ratio <= SLOWER_PROMISE || scaled(2) == 1 {
                break;
            }
        }
        promised(&format!("p99 of a good task beside {what}, times that alone"), ratio, SLOWER_PROMISE);
        self.is_unharmed(what).await;
    }

    /// A good task every 10 ms while `beside` is called over and over: `count` of them at least, and until it returns. How long each took from
    /// submit to finish, by the database's clock.
    async fn good_tasks(&mut self, count: usize, mut beside: impl AsyncFnMut(&mut Self)) -> Vec<Duration> {
        self.streams += 1;
        let (prefix, queue) = (format!("{GOOD}-{}-", self.streams), self.queue.clone());
        let (submitted, is_over) = (Cell::new(0_usize), Cell::new(false));
        let stream = async {
            let mut ticks = tokio::time::interval(Duration::from_millis(10));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            while submitted.get() < count || !is_over.get() {
                ticks.tick().await;
                // An attack that takes long has company all the time, but no more than that: several tests run at once.
                for _ in 0..if submitted.get() < count { 0 } else { 9 } {
                    ticks.tick().await;
                }
                submit(&queue, &[task(format!("{prefix}{}", submitted.get()), GOOD, json!({}))]).await;
                submitted.set(submitted.get() + 1);
            }
        };
        let attack = async {
            loop {
                beside(self).await;
                if submitted.get() >= count {
                    break;
                }
                tokio::task::yield_now().await;
            }
            is_over.set(true);
        };
        tokio::join!(stream, attack);
        let submitted = submitted.get();
        let last = format!("{prefix}{}", submitted - 1);
        self.until(PATIENCE, "the last good task is finished", async |yard| {
            let last = yard.queue.backend().get(&last).await.unwrap().unwrap();
            if last.state == State::Finished { Ok(()) } else { Err(last.state.as_str().to_owned()) }
        })
        .await;
        self.until(PATIENCE, "the good tasks are finished", async |yard| {
            let tasks = without_data(&yard.queue, &prefix).await;
            let finished = tasks.iter().filter(|task| task.state == State::Finished).count();
            if finished < submitted {
                return Err(format!("{finished} of {submitted}"));
            }
            Ok(tasks.iter().map(|task| task.finished_at.unwrap().since(task.created_at)).collect())
        })
        .await
    }

    /// The host is the one that was started, was always small, and has nothing to do any more.
    pub(super) async fn is_unharmed(&mut self, what: &str) {
        self.is_alive().await;
        let peak = self.peak_bytes();
        measured(&format!("memory of the host beside {what}, at most"), format!("{} MiB", peak >> 20));
        assert!(peak < HOST_BYTES_MAX, "{what}: the host came to {} MiB, of {} allowed", peak >> 20, HOST_BYTES_MAX >> 20);
        assert_eq!(self.cage.killed(), 0, "{what}: something of the host was killed for memory");
        let mut since = (Instant::now(), self.processor_time());
        self.until(PATIENCE, &format!("the host is quiet after {what}"), async |yard| {
            let (passed, used) = (since.0.elapsed(), yard.processor_time().saturating_sub(since.1));
            // Shorter times say nothing: the system counts in hundredths of a second.
            if passed < QUIET_WINDOW {
                return Err(format!("{used:?} so far"));
            }
            since = (Instant::now(), yard.processor_time());
            if used * 2 < passed { Ok(()) } else { Err(format!("{used:?} of {passed:?}")) }
        })
        .await;
    }

    /// No line of the log is a guest's or a module's own, and none does anything to a terminal.
    pub(super) fn no_line_is_forged(&self) {
        for line in self.host.lines_with("") {
            assert!(!line.starts_with("2026-11-27T"), "a line of the log is an attacker's: {line:?}");
            assert_printable(&line, false);
        }
    }

    /// The most memory that the host's process ever had.
    pub(super) fn peak_bytes(&self) -> u64 {
        let status = fs::read_to_string(self.process("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Processor time of all its threads so far, as the system counts it: in hundredths of a second.
    fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(self.process("stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        // User and system time are the 14th and 15th field, and two stand before the name's end.
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    fn process(&self, file: &str) -> PathBuf {
        Path::new("/proc").join(self.host.process_id().to_string()).join(file)
    }
}

/// A site whose host was ended.
pub(super) struct Stopped {
    pub(super) site: Site,
    queue: Queue,
    edition: u32,
}

impl Stopped {
    /// Writes the configuration, with other routes behind that of the good plugin.
    pub(super) fn configure(&self, routes: &[Value]) {
        configure(&self.site, json!({}), routes);
    }

    /// Submits tasks and waits until each has ended on a host of the test's own.
    pub(super) async fn ends_with(&mut self, host: &mut Host, tasks: &[NewTask]) -> Vec<Task> {
        submit(&self.queue, tasks).await;
        let mut ended = Vec::new();
        for task in tasks {
            let promise = format!("{} has ended", task.key);
            let found = async || {
                assert!(host.is_running(), "the host has ended");
                let found = self.queue.backend().get(&task.key).await.unwrap().unwrap();
                if found.state.is_terminal() { Ok(found) } else { Err(found.state.as_str().to_owned()) }
            };
            ended.push(eventually(PATIENCE, &promise, found).await);
        }
        ended
    }
}

fn configure(site: &Site, section: Value, routes: &[Value]) {
    let mut all = vec![json!({ "pattern": format!("^{GOOD}"), "plugin": GOOD })];
    all.extend(routes.iter().cloned());
    let mut members = json!({
        "processors": PROCESSORS, "poll_interval": 0.01, "retry_wait": 0.05, "routes": all,
        // Not the one of the other tests: it keeps few modules, and these are many.
        "plugin_cache": laelaps().with_file_name("compiled-for-hostile-tests"),
    });
    members.as_object_mut().unwrap().extend(section.as_object().unwrap().clone());
    site.configure(members);
}

/// Tasks by the beginning of their key. Who asks again and again would be an attack of its own, with large data.
async fn without_data(queue: &Queue, prefix: &str) -> Vec<Task> {
    let mut filter = Filter { key_prefix: Some(prefix.to_owned()), limit: 1_000, ..Filter::default() };
    let mut tasks = Vec::new();
    loop {
        let page = queue.backend().list(&filter).await.unwrap();
        tasks.extend(page.tasks);
        match page.next {
            Some(next) => filter.after = Some(next),
            None => return tasks,
        }
    }
}

fn percentile_99(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    // The clock counts milliseconds: what takes less than one took one.
    times[times.len() * 99 / 100].max(Duration::from_millis(1))
}

/// A number that no other run has.
pub(super) fn fresh_number() -> u32 {
    use std::hash::{BuildHasher as _, RandomState};
    u32::try_from(RandomState::new().hash_one(0) & 0xffff_ffff).unwrap()
}

/// Fails if a text could do more to a terminal or a log than stand there. Line ends are allowed where `lines` says so.
pub(super) fn assert_printable(text: &str, lines: bool) {
    let is_harmless = |character: char| {
        !character.is_control()
            && !('\u{202a}'..='\u{202e}').contains(&character)
            && !('\u{2066}'..='\u{2069}').contains(&character)
            || lines && character == '\n'
    };
    if let Some(bad) = text.chars().find(|character| !is_harmless(*character)) {
        panic!("{bad:?} in {:?}", text.chars().take(600).collect::<String>());
    }
}

/// What bounds the host and its children in memory, whatever the host itself does about it.
struct Cage {
    /// Its cgroup. None: the machine lets us make none, and the host's data is limited instead.
    group: Option<PathBuf>,
}

impl Cage {
    fn around(process: u32) -> Self {
        let group = Self::group(process);
        if group.is_none() {
            let process = Pid::from_raw(i32::try_from(process).unwrap());
            let limit = Rlimit { current: Some(2 * CAGE_BYTES), maximum: Some(2 * CAGE_BYTES) };
            prlimit(process, Resource::Data, limit).expect("a limit on the data of one's own child");
        }
        Self { group }
    }

    /// A memory cgroup with the process in it, of version 1 below our own, or of version 2 below the root.
    fn group(process: u32) -> Option<PathBuf> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let own =
            own.lines().find_map(|line| line.split_once(":memory:").map(|(_, path)| path.trim_start_matches('/').to_owned()));
        let (parent, limit) = match own {
            Some(own) => (Path::new("/sys/fs/cgroup/memory").join(own), "memory.limit_in_bytes"),
            None => (PathBuf::from("/sys/fs/cgroup"), "memory.max"),
        };
        let group = parent.join(format!("laelaps-hostile-{process}"));
        fs::create_dir(&group).ok()?;
        let made = fs::write(group.join(limit), CAGE_BYTES.to_string())
            .and_then(|()| fs::write(group.join("cgroup.procs"), process.to_string()));
        if made.is_err() {
            let _ = fs::remove_dir(&group);
            return None;
        }
        Some(group)
    }

    /// How often something in it was killed for memory.
    fn killed(&self) -> u64 {
        let Some(group) = &self.group else { return 0 };
        let read = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
        let text = read("memory.oom_control") + &read("memory.events");
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")).map_or(0, |count| count.trim().parse().unwrap())
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        let Some(group) = &self.group else { return };
        // The host was killed just before, and takes a moment to be gone.
        let patience = Instant::now() + PATIENCE;
        while fs::remove_dir(group).is_err() && group.exists() && Instant::now() < patience {
            std::thread::yield_now();
        }
    }
}
