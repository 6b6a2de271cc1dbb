//! `laelaps list`.

use std::num::NonZeroU32;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use laelaps_queue::{Filter, State, Task, TaskId};

use super::json::TaskJson;
use super::output::{Output, in_one_line, moment, run_at, table};
use super::{Exit, Place};

/// Tasks fetched at a time.
const PAGE: u32 = 1_000;
/// The most characters of a task's data in a table.
const DATA_WIDTH: usize = 200;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only tasks in this state (may be given several times)
    #[arg(short, long, value_name = "STATE", value_parser = state_parser())]
    state: Vec<State>,
    /// Only tasks of this queue
    #[arg(long, value_name = "QUEUE", value_parser = super::queue)]
    queue: Option<String>,
    /// Only tasks of this type
    #[arg(long = "type", value_name = "TYPE")]
    task_type: Option<String>,
    /// Only tasks of this user
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Only tasks whose key starts with this
    #[arg(long, value_name = "TEXT")]
    prefix: Option<String>,
    /// The most tasks to list; 0 lists all
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1_000)]
    limit: u32,
    /// Only what follows the task with this id: to go on where a list ended
    #[arg(long, value_name = "ID")]
    after: Option<i64>,
    /// Only the task with this number
    #[arg(long, value_name = "N", allow_negative_numbers = true, conflicts_with_all = ["state", "queue", "task_type", "user", "prefix", "after", "unreadable"])]
    id: Option<i64>,
    /// Only tasks that cannot be read; every task that the other filters let pass is looked at
    #[arg(long)]
    unreadable: bool,
    /// With the tasks' data; in JSON also with their output
    #[arg(long)]
    data: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

fn state_parser() -> impl clap::builder::TypedValueParser<Value = State> {
    PossibleValuesParser::new(State::ALL.map(State::as_str)).try_map(|word| {
        State::ALL.into_iter().find(|state| state.as_str() == word).ok_or_else(|| format!("no such state: {word}"))
    })
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (_, queue) = place.open().await?;
        if let Some(id) = self.id.map(TaskId) {
            let task = queue.backend().get_by_id(id).await?.ok_or(laelaps_queue::Error::NoSuchId(id))?;
            queue.backend().close().await;
            let mut listing = Listing::new(self.json, self.data);
            listing.add(&[if self.data { task } else { Task { data: None, output: None, ..task } }])?;
            listing.close()?;
            return Ok(Exit::Done);
        }
        let mut filter = self.filter();
        let mut left = NonZeroU32::new(self.limit).map_or(u64::MAX, |limit| limit.get().into());
        let mut listing = Listing::new(self.json, self.data);
        let next = loop {
            filter.limit = if self.unreadable { PAGE } else { u32::try_from(left.min(PAGE.into())).unwrap_or(PAGE) };
            let mut page = queue.backend().list(&filter).await?;
            if self.unreadable {
                page.tasks.retain(|task| task.unreadable.is_some());
                let most = usize::try_from(left).unwrap_or(usize::MAX);
                if page.tasks.len() > most {
                    page.tasks.truncate(most);
                    page.next = page.tasks.last().map(|task| task.id);
                }
            }
            left -= page.tasks.len() as u64;
            listing.add(&page.tasks)?;
            filter.after = page.next;
            if page.next.is_none() || left == 0 {
                break page.next;
            }
        };
        queue.backend().close().await;
        listing.close()?;
        if let Some(next) = next {
            anstream::eprintln!("more follow: add --after {}, or a larger --limit", next.0);
        }
        Ok(Exit::Done)
    }

    fn filter(&self) -> Filter {
        Filter {
            states: self.state.clone(),
            queue: self.queue.clone(),
            task_type: self.task_type.clone(),
            user: self.user.clone(),
            key_prefix: self.prefix.clone(),
            after: self.after.map(TaskId),
            limit: PAGE,
            with_data: self.data,
        }
    }
}

/// What was listed so far. JSON goes out page by page; a table has to know all its rows to be laid out.
struct Listing {
    output: Output,
    table: Option<comfy_table::Table>,
    data: bool,
    count: u64,
    unreadable: u64,
}

impl Listing {
    fn new(json: bool, data: bool) -> Self {
        let mut header = vec!["key", "type", "user", "state", "created_at", "timeout", "attempts", "id"];
        if data {
            header.push("data");
        }
        Self { output: Output::open(), table: (!json).then(|| table(&header)), data, count: 0, unreadable: 0 }
    }

    fn add(&mut self, tasks: &[Task]) -> anyhow::Result<()> {
        self.count += tasks.len() as u64;
        self.unreadable += tasks.iter().filter(|task| task.unreadable.is_some()).count() as u64;
        for task in tasks {
            match &mut self.table {
                Some(table) => {
                    table.add_row(row(task, self.data));
                }
                None => self.output.json(&TaskJson::new(task))?,
            }
        }
        Ok(())
    }

    fn close(mut self) -> anyhow::Result<()> {
        if let Some(table) = self.table {
            if self.count > 0 {
                self.output.table(&table)?;
            }
            self.output.line(&format!("{} entries.", self.count))?;
        }
        self.output.close()?;
        if self.unreadable > 0 {
            let hint = "`laelaps show --id N` tells what is wrong with one, `laelaps cancel --id N` removes it";
            anstream::eprintln!("{} of these cannot be read: {hint}", self.unreadable);
        }
        Ok(())
    }
}

fn row(task: &Task, with_data: bool) -> Vec<String> {
    // PerfectQueue's one time column: when the task may run, when its lease ends, when it is removed.
    let timeout = match task.state {
        State::Waiting => Some(run_at(task)),
        State::Running => task.until.map(moment),
        State::Finished | State::Failed | State::Cancelled => task.retained_until.map(moment),
    };
    let mut row = vec![
        in_one_line(&task.key, 255),
        in_one_line(&task.task_type, 255),
        in_one_line(task.user.as_deref().unwrap_or(""), 255),
        match task.unreadable {
            None => task.state.as_str().to_owned(),
            Some(_) => format!("{}, unreadable", task.state.as_str()),
        },
        moment(task.created_at),
        timeout.unwrap_or_default(),
        task.attempts.to_string(),
        task.id.0.to_string(),
    ];
    if with_data {
        row.push(in_one_line(&String::from_utf8_lossy(task.data.as_deref().unwrap_or_default()), DATA_WIDTH));
    }
    row
}
