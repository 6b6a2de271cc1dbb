//! Tasks on their way into a database: checked, compressed, of one key only the first.

use std::collections::HashMap;

use crate::task::stored_queue;
use crate::{Compression, Descent, Error, NewTask, Result, Submitted, data};

/// Tasks that keep their bounds, ready to be stored.
#[derive(Clone, Debug, Default)]
pub(crate) struct Batch {
    /// What is to be stored, each key once.
    pub(crate) rows: Vec<Row>,
    /// For each task that was asked for: its row, or None if an earlier one has the same key.
    pub(crate) places: Vec<Option<usize>>,
}

/// One task as it is stored.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) key: String,
    pub(crate) task_type: String,
    /// As it stands in the tables: empty for the default queue.
    pub(crate) queue: String,
    /// Empty for none.
    pub(crate) user: String,
    pub(crate) max_running: Option<u32>,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) priority: i32,
    pub(crate) run_at: Option<i64>,
    /// The size of the data before compression.
    pub(crate) bytes: usize,
    /// The data, compressed if that was asked for.
    pub(crate) stored: Vec<u8>,
    pub(crate) compression: Compression,
    /// Where a follow-up comes from.
    pub(crate) descent: Option<Descent>,
}

impl Batch {
    /// Check and compress.
    ///
    /// # Errors
    /// [`Error::InvalidTask`] for the first task that breaks a bound.
    pub(crate) fn new(tasks: &[NewTask]) -> Result<Self> {
        if tasks.len() > NewTask::BATCH_MAX {
            let problem = format!("the batch has {} tasks; at most {} are taken at once", tasks.len(), NewTask::BATCH_MAX);
            return Err(Error::InvalidTask { key: tasks[0].key.clone(), problem });
        }
        let mut batch = Self::default();
        let mut seen = HashMap::with_capacity(tasks.len());
        for task in tasks {
            task.check()?;
            let first = seen.insert(task.key.as_str(), ()).is_none();
            batch.places.push(first.then_some(batch.rows.len()));
            if first {
                batch.rows.push(Row::of(task));
            }
        }
        Ok(batch)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// How many tasks it has to store, and how much data.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.rows.len(), self.rows.iter().map(|row| row.stored.len()).sum())
    }

    /// The answers in the order of the tasks, where the rows that `created` names were new.
    pub(crate) fn answers(places: &[Option<usize>], created: impl Fn(usize) -> bool) -> Vec<Submitted> {
        let answer = |place: &Option<usize>| match place {
            Some(row) if created(*row) => Submitted::Created,
            _ => Submitted::AlreadyExists,
        };
        places.iter().map(answer).collect()
    }
}

impl Row {
    fn of(task: &NewTask) -> Self {
        let plain = if task.data.is_empty() { b"{}".to_vec() } else { task.data.clone() };
        Self {
            key: task.key.clone(),
            task_type: task.task_type.clone(),
            queue: stored_queue(task.queue.as_deref()).to_owned(),
            user: task.user.clone().unwrap_or_default(),
            max_running: task.max_running,
            max_attempts: task.max_attempts,
            priority: task.priority,
            run_at: if task.held { Some(NewTask::HELD_AT.0) } else { task.run_at.map(|moment| moment.0) },
            bytes: plain.len(),
            stored: data::compress(plain, task.compression),
            compression: task.compression,
            descent: task.descent,
        }
    }
}

/// The first of the rows that fit into one statement: at most so many, with so much data unless one alone has more.
pub(crate) fn chunk(rows: &[Row], rows_max: usize, bytes_max: usize) -> (&[Row], &[Row]) {
    let mut bytes = 0_usize;
    let fitting = rows.iter().take(rows_max).take_while(|row| {
        bytes += row.stored.len();
        bytes <= bytes_max
    });
    let fitting = fitting.count().max(1).min(rows.len());
    rows.split_at(fitting)
}
