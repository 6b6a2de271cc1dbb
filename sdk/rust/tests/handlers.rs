//! What the SDK promises to handlers, run natively through its own double.

use std::time::Duration;

use laelaps_plugin::log::Level;
use laelaps_plugin::testing::Attempt;
use laelaps_plugin::{
    Application, Cancellation, Context, Decider, Error, FailureKind, OrFail, Outcome, Result, decider, handler, info, json,
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Mail {
    to: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    host: String,
}

#[handler]
fn send(mail: Mail, context: &Context) -> Result<Outcome> {
    let hosts: Vec<_> = mail.to.into_iter().map(|address| address.host).collect();
    info!("{} to {}", context.key(), hosts.join(" and "));
    Ok(Outcome::finish(hosts))
}

#[test]
fn a_handler_gets_typed_data_and_its_result_is_the_output() {
    let ended = Attempt::of(json!({ "to": [{ "host": "a" }, { "host": "b" }] })).key("mail-1").run(send);
    assert_eq!(ended.output::<Vec<String>>(), ["a", "b"]);
    assert_eq!(ended.log, [(Level::Info, "mail-1 to a and b".to_owned())]);
}

#[test]
fn what_serialises_is_an_output_and_null_is_none() {
    assert_eq!(Attempt::of(json!({})).run(|| Ok::<_, Error>(7)).output::<u32>(), 7);
    assert_eq!(Attempt::of(json!({})).run(|| Ok::<_, Error>(())).outcome(), Outcome::done());
    assert_eq!(Attempt::of(json!([2])).run(|data: Vec<u32>| Ok::<_, Error>(data)).output::<Vec<u32>>(), [2]);
    assert_eq!(
        Attempt::of(json!({})).kind("k").run(|context: &Context| Ok::<_, Error>(context.kind().to_owned())).output::<String>(),
        "k"
    );
}

#[test]
fn data_that_does_not_fit_is_rejected_and_names_the_member() {
    for (data, place) in [
        (&b"{\"to\":[{\"host\":\"a\"},{\"host\":5}]}"[..], "data.to[1].host: invalid type: integer `5`"),
        (b"{\"to\":7}", "data.to: invalid type"),
        (b"{}", "data: missing field `to`"),
        (b"{\"to\":[]} tail", "data: trailing characters"),
        (b"not json", "data: expected ident"),
        (b"{\"to\":[{}]}", "data.to[0]: missing field `host`"),
    ] {
        let error = Attempt::of_bytes(data).run(send).error();
        assert_eq!((error.kind(), error.code()), (FailureKind::Reject, "bad-data"));
        assert!(error.message().starts_with(place), "{}", error.message());
    }
}

#[test]
fn a_question_mark_makes_any_error_a_retry_with_its_causes() {
    #[derive(Debug)]
    struct Outer(std::num::ParseIntError);
    impl std::fmt::Display for Outer {
        fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("the port is wrong")
        }
    }
    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }
    let handler = || -> Result<u16> { Ok("many".parse().map_err(Outer)?) };
    let expected = Error::retry("error", "the port is wrong: invalid digit found in string");
    assert_eq!(Attempt::of(json!({})).run(handler).error(), expected);

    let handler = || -> Result<u16> { "many".parse().or_reject("bad-port") };
    assert_eq!(Attempt::of(json!({})).run(handler).error(), Error::reject("bad-port", "invalid digit found in string"));
}

#[test]
fn a_handler_may_have_an_error_of_its_own() {
    struct Busy;
    impl From<Busy> for Error {
        fn from(_: Busy) -> Self {
            Error::retry("busy", "come back later")
        }
    }
    assert_eq!(Attempt::of(json!({})).run(|| Err::<(), _>(Busy)).error().code(), "busy");
}

#[test]
fn follow_ups_carry_their_options_and_are_dropped_with_a_failure() {
    let submit = |context: &Context| {
        context
            .submit("next", "mail")
            .data(&json!({ "a": 1 }))
            .user("u")
            .max_running(2)
            .max_attempts(3)
            .priority(-4)
            .queue("mail")
            .gzip()
            .send()?;
        context.submit("bare", "mail").send()
    };
    let ended = Attempt::of(json!({})).run(submit);
    assert_eq!(ended.submitted.len(), 2);
    let next = &ended.submitted[0];
    assert_eq!((next.key.as_str(), &next.data, next.user.as_deref()), ("next", &json!({ "a": 1 }), Some("u")));
    assert_eq!((next.max_running, next.max_attempts, next.priority, next.gzip), (Some(2), Some(3), -4, true));
    assert_eq!((next.queue.as_deref(), &ended.submitted[1].queue), (Some("mail"), &None));
    assert_eq!(ended.submitted[1].data, json!({}));

    let ended = Attempt::of(json!({})).run(|context: &Context| {
        submit(context)?;
        Err::<(), _>(Error::retry("later", "on purpose"))
    });
    assert!(ended.submitted.is_empty());
}

#[test]
fn a_refused_follow_up_rejects_unless_another_attempt_may_do_better() {
    let submit = |context: &Context| context.submit("next", "mail").send();
    let error = Attempt::of(json!({})).refusing("too-many", "1,000 are enough").run(submit).error();
    assert_eq!(error, Error::reject("too-many", "1,000 are enough"));
    for code in ["not-granted", "too-deep"] {
        let error = Attempt::of(json!({})).refusing(code, "not by this route").run(submit).error();
        assert_eq!(error, Error::reject(code, "not by this route"));
    }
    for code in ["unavailable", "too-many-waiting"] {
        let error = Attempt::of(json!({})).refusing(code, "not now").run(submit).error();
        assert_eq!(error, Error::retry(code, "not now"));
    }
    let error = Attempt::of(json!({})).run(|context: &Context| context.submit("", "mail").send()).error();
    assert_eq!(error.code(), "invalid-key");
    let error = Attempt::of(json!({})).run(|context: &Context| context.submit("k", "mail").data(&[1]).send()).error();
    assert_eq!(error.code(), "invalid-data");
}

#[test]
fn updates_progress_and_settings_reach_host_and_handler() {
    #[derive(Deserialize, PartialEq, Debug)]
    struct Limits {
        most: u32,
    }
    let ended = Attempt::of(json!({})).setting("limits", json!({ "most": 4 })).setting("name", "x").setting("pin", "007").run(
        |context: &Context| {
            assert_eq!(context.setting_as::<Limits>("limits")?, Some(Limits { most: 4 }));
            assert_eq!(context.setting_as::<String>("name")?.as_deref(), Some("x"));
            assert_eq!(context.setting_as::<String>("pin")?.as_deref(), Some("007"));
            assert_eq!(context.setting_as::<u32>("absent")?, None);
            assert_eq!(context.settings().len(), 3);
            assert!(context.progress(1, 10, "begun") && context.hold_for(Duration::from_secs(900)));
            context.update_data(&json!({ "step": 2 }))?;
            context.setting_as::<u32>("name")
        },
    );
    assert_eq!(ended.updates, [json!({ "step": 2 })]);
    assert_eq!((ended.progress[0].done, ended.progress[0].total), (1, Some(10)));
    assert_eq!(ended.held_for, [Duration::from_secs(900)]);
    let error = ended.error();
    assert_eq!((error.code(), error.kind()), ("bad-setting", FailureKind::Retry));
    assert!(error.message().contains("`name` is x"), "{error}");
}

#[test]
fn a_cancelled_attempt_learns_why() {
    let why = |context: &Context| Ok::<_, Error>(format!("{:?} {}", context.cancellation(), context.heartbeat()));
    assert_eq!(Attempt::of(json!({})).run(why).output::<String>(), "None true");
    let graceful = Attempt::of(json!({})).cancelled(Cancellation::Graceful).run(why);
    assert_eq!(graceful.output::<String>(), "Some(Graceful) true");
    let lost = Attempt::of(json!({})).cancelled(Cancellation::LeaseLost).run(why);
    assert_eq!(lost.output::<String>(), "Some(LeaseLost) false");
}

/// An application that logs its steps, and does in each what its data says.
#[derive(Default)]
struct Steps;

#[derive(Deserialize)]
struct Plan {
    before: Option<bool>,
    perform: Option<String>,
    after_fails: Option<bool>,
}

impl Application for Steps {
    type Data = Plan;

    fn before_perform(&mut self, plan: &Plan, _context: &Context) -> Result<bool> {
        info!("before");
        plan.before.ok_or_else(|| Error::retry("before", "on purpose"))
    }

    fn perform(&mut self, plan: Plan, context: &Context) -> Result<Outcome> {
        info!("perform");
        if plan.after_fails == Some(true) {
            context.update_data(&json!({ "after_fails": true }))?;
        }
        match plan.perform.as_deref() {
            None => Ok(Outcome::finish("performed")),
            Some("fail") => Err(Error::reject("perform", "on purpose")),
            Some(decision) => self.decide(decision, json!({ "wait": 60 }), context),
        }
    }

    fn after_perform(&mut self, context: &Context) -> Result<()> {
        info!("after");
        if context.key() == "after-fails" { Err(Error::retry("after", "on purpose")) } else { Ok(()) }
    }

    fn decider(&self) -> Box<dyn Decider> {
        Box::new(Decisions)
    }
}

struct Decisions;

#[decider]
impl Decisions {
    fn quota_exceeded(&self, options: Wait, context: &Context) -> Result<Outcome> {
        info!("{} waits", context.key());
        Ok(Outcome::retry_after(Duration::from_secs(options.wait)))
    }

    fn closed(&self) -> Result<Outcome> {
        Ok(Outcome::release())
    }

    fn badly_called(&self, options: u8) -> Result<Outcome> {
        Ok(Outcome::finish(options))
    }

    fn unexpected_error_raised(&self, error: Error) -> Result<Outcome> {
        info!("unexpected {}", error.code());
        Err(error)
    }
}

#[derive(Deserialize)]
struct Wait {
    wait: u64,
}

fn steps(key: &str, plan: serde_json::Value) -> (Result<Outcome>, Vec<String>) {
    let ended = Attempt::of(plan).key(key).perform::<Steps>();
    (ended.result, ended.log.into_iter().map(|(_, line)| line).collect())
}

#[test]
fn before_perform_false_releases_and_runs_nothing_else() {
    let (result, log) = steps("k", json!({ "before": false }));
    assert_eq!(result, Ok(Outcome::Release(None)));
    assert_eq!(log, ["before"]);
}

#[test]
fn after_perform_always_follows_perform() {
    let (result, log) = steps("k", json!({ "before": true }));
    assert_eq!(result, Ok(Outcome::finish("performed")));
    assert_eq!(log, ["before", "perform", "after"]);

    let (result, log) = steps("k", json!({ "before": true, "perform": "fail" }));
    assert_eq!(result, Err(Error::reject("perform", "on purpose")));
    assert_eq!(log, ["before", "perform", "after", "unexpected perform"]);
}

#[test]
fn an_error_of_after_perform_counts_unless_perform_failed_first() {
    let (result, _) = steps("after-fails", json!({ "before": true }));
    assert_eq!(result, Err(Error::retry("after", "on purpose")));

    let (result, log) = steps("after-fails", json!({ "before": true, "perform": "fail" }));
    assert_eq!(result, Err(Error::reject("perform", "on purpose")));
    assert!(log.iter().any(|line| line.contains("after_perform failed too") && line.contains("after: on purpose")), "{log:?}");
}

#[test]
fn an_error_before_perform_goes_to_the_decider_and_after_perform_does_not_run() {
    let (result, log) = steps("k", json!({}));
    assert_eq!(result, Err(Error::retry("before", "on purpose")));
    assert_eq!(log, ["before", "unexpected before"]);
}

#[test]
fn a_named_decision_is_answered_with_its_options() {
    let (result, log) = steps("k", json!({ "before": true, "perform": "quota_exceeded" }));
    assert_eq!(result, Ok(Outcome::retry_after(Duration::from_secs(60))));
    assert_eq!(log, ["before", "perform", "k waits", "after"]);
    assert_eq!(steps("k", json!({ "before": true, "perform": "closed" })).0, Ok(Outcome::release()));
}

#[test]
fn an_undefined_decision_is_an_error_of_its_own() {
    let (result, log) = steps("k", json!({ "before": true, "perform": "no_such" }));
    let error = result.expect_err("nobody defined it");
    assert_eq!((error.code(), error.kind()), ("undefined-decision", FailureKind::Retry));
    let expected =
        "undefined decision `no_such` with options {\"wait\":60}; this decider defines quota_exceeded, closed, badly_called";
    assert_eq!(error.message(), expected);
    assert_eq!(log.last().map(String::as_str), Some("unexpected undefined-decision"));
}

#[test]
fn options_that_do_not_fit_name_the_decision() {
    let (result, _) = steps("k", json!({ "before": true, "perform": "badly_called" }));
    let error = result.expect_err("the options are an object");
    assert_eq!(error.code(), "bad-options");
    assert!(error.message().starts_with("decision `badly_called`: options: invalid type: map"), "{error}");
}

#[test]
fn unexpected_error_raised_can_be_decided_by_name() {
    let (result, log) = steps("k", json!({ "before": true, "perform": "unexpected_error_raised" }));
    assert_eq!(result.expect_err("the decider gives it back").code(), "unexpected-error");
    assert_eq!(log.last().map(String::as_str), Some("unexpected unexpected-error"));
}

#[test]
fn data_that_does_not_fit_an_application_is_rejected_before_anything_runs() {
    let (result, log) = steps("k", json!({ "before": "yes" }));
    let error = result.expect_err("`before` is no text");
    assert_eq!((error.code(), error.kind()), ("bad-data", FailureKind::Reject));
    assert!(log.is_empty());
}

#[test]
fn misused_attributes_say_what_to_write_instead() {
    let cases = trybuild::TestCases::new();
    cases.compile_fail("tests/refused/*.rs");
}
