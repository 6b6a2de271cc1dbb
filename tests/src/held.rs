//! Tasks that run until the test lets them end.

use std::ops::Range;

use laelaps_queue::Queue;
use serde_json::json;

use crate::patience::{LONG, eventually};
use crate::{Site, submit, task};

/// Submits tasks, `held-NUMBER`, that say that they have begun by the mark `held`, and wait for the gate `gate`.
///
/// # Panics
/// If the queue refuses, or has one of the keys already.
pub async fn submit_held(queue: &Queue, range: Range<usize>) {
    let held = |number| task(format!("held-{number}"), "silent", json!({ "mark": "/marks/held", "gate": "/marks/gate" }));
    submit(queue, &range.map(held).collect::<Vec<_>>()).await;
}

/// Waits until attempts of held tasks have begun so often in all.
///
/// # Panics
/// If they have not for long.
pub async fn have_begun(site: &Site, times: usize) {
    eventually(LONG, &format!("held tasks have begun {times} times"), async || {
        let begun = site.marks("held").len();
        if begun == times { Ok(()) } else { Err(format!("{begun}")) }
    })
    .await;
}
