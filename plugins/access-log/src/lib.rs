//! What a web server's access log in the combined format says, as JSON. README.md tells data and result.

#[cfg(any(test, feature = "second-edition"))]
mod agents;
mod counter;
mod input;
mod line;
mod report;

use laelaps_plugin::{Context, Outcome, Result, handler};

use input::{Ended, Job};
use report::Tally;

#[handler]
fn summarise(job: Job, context: &Context) -> Result<Outcome> {
    let options = job.options()?;
    let mut tally = Tally::new(&options);
    match job.source()?.read_into(&mut tally, context)? {
        Ended::AtTheEnd => Ok(Outcome::finish(tally.report(&options))),
        // Another host, or the next version of this plugin, begins again: nothing was changed by reading.
        Ended::Cancelled => Ok(Outcome::release()),
    }
}

#[cfg(test)]
mod tests;
