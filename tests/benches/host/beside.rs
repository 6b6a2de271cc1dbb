//! What a user's limit and a report of progress leave of a host's rate, and what was promised of that. Tasks with and without take turns within each
//! round, and what counts is their ratio within a round.

use laelaps_queue::NewTask;
use laelaps_tests::task;
use serde_json::{Value, json};

use crate::{PREFETCH, PROCESSORS, ROUNDS, Stage, System, figure};

/// Tasks that run one by one, and tasks at full speed.
const LIMITED_TASKS: usize = 5_000;
const PROGRESS_TASKS: usize = 50_000;
/// What a worker of PerfectQueue in Ruby does of one user's tasks with limit 1, tasks a second, on two cores.
const RUBY_LIMITED: f64 = 144.0;

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Part {
    /// Tasks of one user of whom one may run, on a host that runs one at a time.
    Limited,
    /// Tasks that report their progress once.
    Progress,
}

impl Part {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Limited => "limited",
            Self::Progress => "progress",
        }
    }

    /// At least so much of the rate of tasks without it.
    fn bound(self) -> f64 {
        match self {
            Self::Limited => 0.5,
            Self::Progress => 0.8,
        }
    }

    fn tasks(self, quick: bool) -> usize {
        let full = match self {
            Self::Limited => LIMITED_TASKS,
            Self::Progress => PROGRESS_TASKS,
        };
        if quick { full / 10 } else { full }
    }

    fn section(self) -> Value {
        match self {
            Self::Limited => json!({ "processors": 1, "task_prefetch": 0, "poll_interval": 1 }),
            Self::Progress => json!({ "processors": PROCESSORS, "task_prefetch": PREFETCH, "poll_interval": 0.05 }),
        }
    }

    /// A task with or without it.
    fn task(self, number: usize, with: bool) -> NewTask {
        let key = format!("task-{number}");
        match self {
            Self::Limited => {
                let user = with.then(|| "ann".to_owned());
                let max_running = user.as_ref().map(|_| 1);
                NewTask { user, max_running, ..task(key, "silent", json!({})) }
            }
            Self::Progress => task(key, "heartbeat", json!({ "count": u32::from(with) })),
        }
    }

    /// What is measured on a system: its name, whether a table of ours stands beside PerfectQueue's, and whether users are looked at there.
    fn cases(self, system: System, name: &str) -> Vec<(String, bool, bool)> {
        match (self, system) {
            (_, System::Graphile) => Vec::new(),
            (Self::Limited, System::Compat) => [(false, true), (true, true), (false, false), (true, false)]
                .map(|(side_table, fair)| {
                    let order = if fair { "fair" } else { "by age" };
                    let side = if side_table { "with" } else { "without" };
                    (format!("{name}, {order}, {side} a side table"), side_table, fair)
                })
                .to_vec(),
            // Without it progress is kept nowhere.
            (Self::Progress, System::Compat) => vec![(format!("{name}, fair, with a side table"), true, true)],
            _ => vec![(name.to_owned(), false, true)],
        }
    }
}

/// What was promised, and what came of it.
pub(crate) struct Promise {
    what: String,
    bound: f64,
    measured: f64,
    least: f64,
    most: f64,
    remark: String,
}

impl Promise {
    fn of(what: String, bound: f64, values: &[f64], remark: String) -> Self {
        let (measured, least, most) = figure(values);
        Self { what, bound, measured, least, most, remark }
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.measured >= self.bound
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "what": self.what, "relation": "at least", "bound": self.bound, "measured": self.measured, "min": self.least, "max": self.most,
            "kept": self.is_kept(), "remark": self.remark,
        })
    }
}

pub(crate) fn print(promises: &[Promise]) {
    if !promises.is_empty() {
        println!("{:92} {:>8} {:>8} {:>16}  kept?", "promise, x", "bound", "measured", "rounds");
    }
    for promise in promises {
        let Promise { what, bound, measured, least, most, remark } = promise;
        let (apart, answer) = (format!("{least:.2} .. {most:.2}"), if promise.is_kept() { "yes" } else { "NO" });
        println!("{what:92} {:>8} {measured:>8.2} {apart:>16}  {answer:4} {remark}", format!(">= {bound}"));
    }
}

pub(crate) async fn measure(part: Part, asked: &[(System, &'static str)], quick: bool) -> Vec<Promise> {
    let mut promises = Vec::new();
    for (system, name) in asked {
        for (name, side_table, fair) in part.cases(*system, name) {
            let (mut with, mut without) = (Vec::new(), Vec::new());
            for round in 1..=ROUNDS {
                for (has_it, rates) in [(true, &mut with), (false, &mut without)] {
                    let mut section = part.section();
                    if *system == System::Compat && !fair {
                        section["disable_resource_limit"] = json!(true);
                    }
                    let tasks: Vec<NewTask> = (0..part.tasks(quick)).map(|number| part.task(number, has_it)).collect();
                    rates.push(Stage::set(*system, "zoo", side_table, section).await.rate(&tasks).await);
                }
                eprintln!("round {round}: {}, {name}: {:.0} of {:.0} tasks/s", part.word(), with[round - 1], without[round - 1]);
            }
            let remark = format!("{:.0} of {:.0} tasks/s", figure(&with).0, figure(&without).0);
            let ratios: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with / without).collect();
            let what = match part {
                Part::Limited => format!("{name}: one user with limit 1, of the same tasks without user"),
                Part::Progress => format!("{name}: with a report of progress, of those without"),
            };
            promises.push(Promise::of(what, part.bound(), &ratios, remark));
            if (part, *system) == (Part::Limited, System::Compat) {
                let of_ruby: Vec<f64> = with.iter().map(|with| with / RUBY_LIMITED).collect();
                let what = format!("{name}: one user with limit 1, of Ruby's {RUBY_LIMITED} tasks/s");
                promises.push(Promise::of(what, 1.0, &of_ruby, String::new()));
            }
        }
    }
    promises
}
