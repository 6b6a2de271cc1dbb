//! `laelaps show`.

use laelaps_queue::{AttemptRecord, Error, Task};

use super::json::TaskJson;
use super::output::{Output, in_one_line, moment, printable, run_at, table};
use super::{Complaint, Exit, Name, Place, Which};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    task: Which,
    /// All of it as one JSON object
    #[arg(long, conflicts_with_all = ["data", "output"])]
    json: bool,
    /// Only its data, byte by byte
    #[arg(long, conflicts_with = "output")]
    data: bool,
    /// Only its output, byte by byte
    #[arg(long)]
    output: bool,
}

impl Arguments {
    pub(super) async fn run(self, place: &Place) -> anyhow::Result<Exit> {
        let (_, queue) = place.open().await?;
        let task = match self.task.name() {
            Name::Key(key) => queue.backend().get(&key).await?.ok_or(Error::NotFound(key))?,
            Name::Id(id) => queue.backend().get_by_id(id).await?.ok_or(Error::NoSuchId(id))?,
        };
        // What is shown of a key that cannot be read may be the key of another task.
        let attempts = match task.unreadable {
            None => queue.backend().attempts(&task.key).await?,
            Some(_) => Vec::new(),
        };
        queue.backend().close().await;
        let mut output = Output::open();
        if self.json {
            output.json(&TaskJson::new(&task).with_history(&attempts))?;
        } else if self.data {
            output.bytes(task.data.as_deref().unwrap_or_default())?;
        } else if self.output {
            output.bytes(task.output.as_deref().ok_or_else(|| no_output(&task))?)?;
        } else {
            write(&mut output, &task, &attempts)?;
        }
        output.close()?;
        Ok(Exit::Done)
    }
}

fn no_output(task: &Task) -> Complaint {
    let hint = match task.state.is_terminal() {
        true => "its handler returned none",
        false => "a task has its output once it is finished",
    };
    Complaint::new(Exit::WrongState, format!("task {:?} is {} and has no output", task.key, task.state.as_str()), hint)
}

fn write(output: &mut Output, task: &Task, attempts: &[AttemptRecord]) -> std::io::Result<()> {
    for (name, value) in facts(task) {
        output.line(&format!("{name:<15}{}", printable(&value).replace('\n', "\n               ")))?;
    }
    output.line(&format!("{:<15}{}", "data", bytes_in_words(task.data.as_deref())))?;
    if task.output.is_some() {
        output.line(&format!("{:<15}{}", "output", bytes_in_words(task.output.as_deref())))?;
    }
    if !attempts.is_empty() {
        output.line("")?;
        let mut table = table(&["attempt", "ended_at", "event", "error", "plugin", "host"]);
        for attempt in attempts {
            table.add_row(row(attempt));
        }
        output.table(&table)?;
    }
    Ok(())
}

/// What is known of a task, without what does not apply.
fn facts(task: &Task) -> Vec<(&'static str, String)> {
    let limit = |limit: Option<u32>| limit.map(|limit| format!(" of at most {limit}")).unwrap_or_default();
    let mut facts = vec![
        ("key", task.key.clone()),
        ("type", task.task_type.clone()),
        ("queue", task.queue.clone()),
        ("state", task.state.as_str().to_owned()),
        ("id", task.id.0.to_string()),
        ("attempts", format!("{}{}", task.attempts, limit(task.max_attempts))),
        ("created_at", moment(task.created_at)),
        ("run_at", run_at(task)),
    ];
    let mut add = |name, value: Option<String>| facts.extend(value.map(|value| (name, value)));
    add("user", task.user.clone());
    add("priority", (task.priority != 0).then(|| task.priority.to_string()));
    add("max_running", task.max_running.map(|limit| limit.to_string()));
    add("lost", (task.lost > 0).then(|| task.lost.to_string()));
    add("until", task.until.map(moment));
    add("host", task.host.map(|host| host.0.to_string()));
    add(
        "progress",
        task.progress.as_ref().map(|progress| {
            let total = progress.total.map(|total| format!(" of {total}")).unwrap_or_default();
            format!("{}{total} {}", progress.done, progress.note)
        }),
    );
    add("finished_at", task.finished_at.map(moment));
    add("retained_until", task.retained_until.map(moment));
    add("plugin", task.plugin_digest.clone());
    add("error_code", task.error_code.clone());
    add("error", task.error_message.clone());
    add("unreadable", task.unreadable.clone());
    facts
}

fn bytes_in_words(bytes: Option<&[u8]>) -> String {
    match bytes.map(std::str::from_utf8) {
        None => String::new(),
        Some(Ok(text)) => printable(text),
        Some(Err(_)) => {
            format!("{} bytes that are not text; write them to a file with --output", bytes.unwrap_or_default().len())
        }
    }
}

fn row(attempt: &AttemptRecord) -> Vec<String> {
    let error = match (&attempt.error_code, &attempt.error_message) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (code, message) => code.clone().or_else(|| message.clone()).unwrap_or_default(),
    };
    vec![
        attempt.attempt.to_string(),
        moment(attempt.ended_at),
        attempt.event.clone(),
        in_one_line(&error, 200),
        attempt.plugin_digest.as_deref().map(|digest| digest.chars().take(12).collect()).unwrap_or_default(),
        in_one_line(&attempt.host, 80),
    ]
}
