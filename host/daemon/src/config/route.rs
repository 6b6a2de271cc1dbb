//! The entries of `routes:`.

use std::time::Duration;

use laelaps_queue::{Kind, Policy};
use regex::Regex;
use serde_yaml::Value;

use super::document::{Report, Step};
use super::keys::{Keys, Unknown, mismatch, secret_of};
use super::{Lookup, Matcher, Route, grants, section};
use crate::plugin::{FollowUps, Grants, Limits, Queues, scan};

/// The most routes of a section.
const ROUTES_MAX: usize = 1_000;

const DAYS_30: Duration = Duration::from_secs(30 * 24 * 3600);

/// All routes, in order.
pub(super) fn read_all(keys: &mut Keys<'_>, policy: &Policy, kind: &Kind, lookup: &Lookup<'_>) -> Vec<Route> {
    let follow_ups = match kind {
        Kind::Native => FollowUps::default(),
        Kind::PerfectQueue(_) => FollowUps::of_perfectqueue(),
    };
    let Some(list) = keys.list("routes", "a list of routes", ROUTES_MAX) else { return Vec::new() };
    if list.is_empty() {
        keys.warn("routes", "there is no route: every task waits until there is one");
    }
    let mut routes: Vec<Route> = Vec::new();
    for (index, entry) in list.into_iter().enumerate() {
        let mut place = keys.place("routes");
        place.push(Step::Entry(index));
        let Value::Mapping(mapping) = entry else {
            mismatch(keys.report, &place, &entry, "a mapping with type (or pattern) and plugin");
            continue;
        };
        let defaults = Defaults { policy, follow_ups: &follow_ups };
        let route = read(Keys::new(mapping, place.clone(), keys.report), index, defaults, lookup);
        if let (Kind::PerfectQueue(_), Some(route)) = (kind, &route)
            && route.grants.follow_ups.queues != Queues::Own
        {
            let place = [&place[..], &["grants", "follow_ups", "queues"].map(|key| Step::Key(key.to_owned()))].concat();
            let hint = "leave it out: follow-ups go to the same table";
            keys.report.problem(&place, "a table of PerfectQueue's is one queue".to_owned(), Some(hint.to_owned()));
        }
        if let Some(route) = route {
            warn_if_never_reached(&route, &routes, &place, keys.report);
            routes.push(route);
        }
    }
    routes
}

/// What holds where a route says nothing.
#[derive(Clone, Copy)]
struct Defaults<'a> {
    policy: &'a Policy,
    follow_ups: &'a FollowUps,
}

fn read(mut keys: Keys<'_>, index: usize, defaults: Defaults<'_>, lookup: &Lookup<'_>) -> Option<Route> {
    let line = keys.line().unwrap_or(0);
    let matcher = matcher(&mut keys);
    let plugin = plugin_name(&mut keys);
    let limits = limits(&mut keys);
    let policy = section::policy(&mut keys, defaults.policy);
    if keys.take(section::SUSPICION).is_some() {
        let problem = "belongs to the section: a host that finds a task lost does not ask for its route".to_owned();
        keys.problem(section::SUSPICION, problem, Some("move it beside `routes`; it counts for all of them"));
    }
    let grants = match keys.mapping("grants", "a mapping of folders, environment and follow_ups") {
        Some(keys) => grants::read(keys, defaults.follow_ups, lookup),
        None => Grants { follow_ups: defaults.follow_ups.clone(), ..Grants::default() },
    };
    let settings = keys.mapping("settings", "a mapping of texts").map(|keys| settings(keys, lookup));
    keys.finish(Unknown::Refuse);
    Some(Route {
        index,
        matcher: matcher?,
        plugin: plugin?,
        limits,
        grants,
        settings: settings.unwrap_or_default().into(),
        policy,
        line,
    })
}

fn matcher(keys: &mut Keys<'_>) -> Option<Matcher> {
    let exact = keys.has("type").then(|| keys.text("type", "a task type: a text of 1 to 255 bytes"));
    let pattern = keys.has("pattern").then(|| keys.text_or_empty("pattern", "a regular expression"));
    keys.take("type");
    keys.take("pattern");
    match (exact, pattern) {
        (Some(exact), None) => {
            let exact = exact?;
            if exact.len() > laelaps_queue::NewTask::NAME_BYTES_MAX {
                keys.problem("type", format!("found {} bytes, expected at most 255", exact.len()), None);
                return None;
            }
            Some(Matcher::Exact(exact))
        }
        (None, Some(pattern)) => {
            let pattern = pattern?;
            match Regex::new(&pattern) {
                Ok(regex) => {
                    if pattern.len() > 2 && pattern.starts_with('/') && pattern.ends_with('/') {
                        keys.warn("pattern", "the slashes at its ends are part of the pattern here; leave them out");
                    }
                    Some(Matcher::Pattern(regex))
                }
                Err(error) => {
                    let reason = regex_reason(&error);
                    keys.problem(
                        "pattern",
                        format!("{pattern:?} is not a regular expression of Rust's regex crate: {reason}"),
                        regex_hint(&pattern, &reason),
                    );
                    None
                }
            }
        }
        (Some(_), Some(_)) => {
            keys.problem_here("found both type and pattern, expected one of them".to_owned(), Some("make two routes of it"));
            None
        }
        (None, None) => {
            keys.problem_here(
                "found neither type nor pattern, expected one of them".to_owned(),
                Some("`type:` takes one task type, `pattern:` every type in which a regular expression is found"),
            );
            None
        }
    }
}

/// The last line of the parser's drawing, which says what is wrong.
fn regex_reason(error: &regex::Error) -> String {
    match error {
        regex::Error::CompiledTooBig(bytes) => format!("compiled it is larger than {bytes} bytes"),
        other => {
            let text = other.to_string();
            let last = text.lines().next_back().unwrap_or_default();
            last.strip_prefix("error: ").unwrap_or(last).to_owned()
        }
    }
}

/// What Ruby's expressions have and Rust's have not.
fn regex_hint(pattern: &str, reason: &str) -> Option<&'static str> {
    if reason.contains("look-around") {
        return Some("put a route with the exception in front of this one instead: the first route that fits wins");
    }
    if reason.contains("backreference") {
        return Some("write the repeated part out, or one route for each case");
    }
    if pattern.contains("\\Z") {
        return Some("for Ruby's \\Z write \\z, the end of the type");
    }
    if pattern.contains("\\h") || pattern.contains("\\H") {
        return Some("for Ruby's \\h write [0-9a-fA-F]");
    }
    if ["(?>", "\\G", "\\R", "\\X", "\\K"].iter().any(|form| pattern.contains(form)) {
        return Some("atomic groups and \\G, \\R, \\X, \\K of Ruby have no counterpart; write the pattern without them");
    }
    None
}

fn plugin_name(keys: &mut Keys<'_>) -> Option<String> {
    if !keys.has("plugin") {
        keys.take("plugin");
        let hint = "add `plugin: NAME` for the file NAME.wasm in the plugin folder";
        keys.problem_here("found no plugin, expected the name of one".to_owned(), Some(hint));
        return None;
    }
    let name = keys.text("plugin", "the name of a plugin")?;
    if !scan::is_name(&name) {
        let most = scan::NAME_BYTES_MAX;
        let message =
            format!("found {name:?}, expected at most {most} letters, digits, dots, underscores and hyphens, no dot in front");
        keys.problem("plugin", message, Some("the name is that of a file in the plugin folder, without .wasm"));
        return None;
    }
    if let Some(bare) = name.strip_suffix(".wasm") {
        let hint = format!("write `plugin: {bare}`");
        keys.problem("plugin", format!("found {name:?}, expected the name without .wasm"), Some(&hint));
        return None;
    }
    Some(name)
}

fn limits(keys: &mut Keys<'_>) -> Limits {
    let defaults = Limits::default();
    Limits {
        memory_bytes: keys.size("memory", 64 << 10..=4 << 30).unwrap_or(defaults.memory_bytes),
        time: keys.duration_or("time_limit", Duration::from_millis(1)..=DAYS_30, "unlimited").flatten(),
        output_bytes: keys.size("output_limit", 0..=16 << 20).unwrap_or(defaults.output_bytes),
        log_bytes: keys.size("log_limit", 0..=16 << 20).unwrap_or(defaults.log_bytes),
        handles: keys.whole("handles", 8..=100_000).unwrap_or(defaults.handles),
        follow_ups: follow_ups_max(keys).unwrap_or(defaults.follow_ups),
        follow_up_bytes: keys.size("follow_up_data", 0..=256 << 20).unwrap_or(defaults.follow_up_bytes),
    }
}

/// How many one attempt may submit. Which ones stands in the grants.
fn follow_ups_max(keys: &mut Keys<'_>) -> Option<u32> {
    if !keys.has_mapping("follow_ups") {
        return keys.whole("follow_ups", 0..=10_000);
    }
    keys.take("follow_ups");
    let hint = "which follow-ups it may submit stands in its grants: `grants: {follow_ups: {...}}`";
    keys.problem("follow_ups", "found a mapping, expected a whole number from 0 to 10,000".to_owned(), Some(hint));
    None
}

fn settings(mut keys: Keys<'_>, lookup: &Lookup<'_>) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    for (key, value) in keys.rest() {
        let name = key.as_str().map_or_else(|| super::keys::describe(&key), str::to_owned);
        let place = keys.place(&name);
        let value = match value {
            Value::Null => Some(String::new()),
            Value::Bool(answer) => Some(answer.to_string()),
            Value::Number(number) => Some(number.to_string()),
            other => secret_of(other, place, keys.report, "a text", lookup),
        };
        settings.extend(value.map(|value| (name, value)));
    }
    settings.sort();
    settings
}

fn warn_if_never_reached(route: &Route, earlier: &[Route], place: &[Step], report: &mut Report) {
    let shadow = match &route.matcher {
        Matcher::Exact(exact) => earlier.iter().find(|earlier| earlier.matcher.matches(exact)),
        Matcher::Pattern(pattern) => earlier
            .iter()
            .find(|earlier| matches!(&earlier.matcher, Matcher::Pattern(other) if other.as_str() == pattern.as_str())),
    };
    if let Some(shadow) = shadow {
        report
            .warning(place, &format!("is never reached: route {} at line {} takes all its tasks", shadow.index + 1, shadow.line));
    }
}
