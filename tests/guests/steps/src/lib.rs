//! An application that logs each of its steps and does in them what its task's data says, so that tests see the SDK through the real host.
//!
//! Data: `before` (default true), `perform` (`finish`, the default; `fail`; `panic`; anything else is the name of a decision), `after_fails`.

use std::time::Duration;

use laelaps_plugin::{Application, Context, Decider, Error, Outcome, Result, decider, handler, info, json};
use serde::{Deserialize, Serialize};

#[derive(Default)]
struct Steps {
    after_fails: bool,
}

#[derive(Deserialize)]
struct Plan {
    #[serde(default = "yes")]
    before: bool,
    #[serde(default = "finish")]
    perform: String,
    #[serde(default)]
    after_fails: bool,
}

fn yes() -> bool {
    true
}

fn finish() -> String {
    "finish".to_owned()
}

#[handler]
impl Application for Steps {
    type Data = Plan;

    fn before_perform(&mut self, plan: &Plan, _context: &Context) -> Result<bool> {
        info!("before_perform");
        self.after_fails = plan.after_fails;
        Ok(plan.before)
    }

    fn perform(&mut self, plan: Plan, context: &Context) -> Result<Outcome> {
        info!("perform");
        match plan.perform.as_str() {
            "finish" => Ok(Outcome::finish(json!({ "performed": context.key() }))),
            "fail" => Err(Error::retry("on-purpose", "the task asked for this failure")),
            "panic" => panic!("on purpose, in perform"),
            decision => self.decide(decision, Options { wait_ms: 1 }, context),
        }
    }

    fn after_perform(&mut self, _context: &Context) -> Result<()> {
        info!("after_perform");
        if self.after_fails { Err(Error::retry("after-failed", "the task asked for this failure")) } else { Ok(()) }
    }

    fn decider(&self) -> Box<dyn Decider> {
        Box::new(Decisions)
    }
}

struct Decisions;

#[derive(Deserialize, Serialize)]
struct Options {
    wait_ms: u64,
}

#[decider]
impl Decisions {
    fn come_back(&self, options: Options) -> Result<Outcome> {
        Ok(Outcome::retry_after(Duration::from_millis(options.wait_ms)))
    }

    fn unexpected_error_raised(&self, error: Error, context: &Context) -> Result<Outcome> {
        info!("unexpected_error_raised {}", error.code());
        if context.is_last_attempt() { Err(Error::reject("gave-up", error)) } else { Err(error) }
    }
}
