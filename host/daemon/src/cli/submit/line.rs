//! One line of a file of tasks.

use laelaps_queue::{Compression, NewTask, Timestamp};
use serde::Deserialize;
use serde::de::Error as _;
use serde_json::value::RawValue;

use super::Options;

/// The members of a line.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    key: String,
    #[serde(rename = "type")]
    task_type: String,
    /// Kept as the producer wrote it, byte by byte.
    #[serde(borrow)]
    data: &'a RawValue,
    queue: Option<String>,
    user: Option<String>,
    #[serde(default, deserialize_with = "moment")]
    run_at: Option<Timestamp>,
    priority: Option<i32>,
    max_running: Option<u32>,
    max_attempts: Option<u32>,
    gzip: Option<bool>,
}

/// The task of a line, within its bounds. What a line does not say, `defaults` say.
///
/// # Errors
/// What is wrong with the line, in words.
pub(super) fn parse(line: &[u8], defaults: &Options) -> Result<NewTask, String> {
    let line: Line<'_> = serde_json::from_slice(line).map_err(|error| in_words(&error))?;
    let mut task = defaults.task(line.key, line.task_type, line.data.get().as_bytes().to_vec());
    task.queue = line.queue.or(task.queue);
    task.user = line.user.or(task.user);
    task.run_at = line.run_at.or(task.run_at);
    let has_user = task.user.as_ref().is_some_and(|user| !user.is_empty());
    if line.max_running.is_some() && !has_user {
        return Err(format!("task {:?}: max_running without user; it limits the tasks of a user", task.key));
    }
    // The option is for the lines that have a user.
    task.max_running = line.max_running.or(task.max_running.filter(|_| has_user));
    task.max_attempts = line.max_attempts.or(task.max_attempts);
    task.priority = line.priority.unwrap_or(task.priority);
    if let Some(gzip) = line.gzip {
        task.compression = if gzip { Compression::Gzip } else { Compression::None };
    }
    match task.check() {
        Ok(()) => Ok(task),
        Err(laelaps_queue::Error::InvalidTask { key, problem }) => Err(format!("task {key:?}: {problem}")),
        Err(other) => Err(other.to_string()),
    }
}

/// A moment from a number of seconds since 1970, or a time as ISO 8601 writes it, with its offset. A date is its beginning in UTC.
pub(super) fn moment_from_text(text: &str) -> Result<Timestamp, String> {
    if let Ok(seconds) = text.parse::<f64>() {
        return moment_from_seconds(seconds).ok_or_else(|| out_of_range(text));
    }
    match text.parse::<jiff::Timestamp>().map(|moment| moment.as_millisecond()).ok().or_else(|| milliseconds_from_text(text)) {
        Some(moment) if moment <= NewTask::RUN_AT_MAX.0 => Ok(Timestamp(moment)),
        Some(_) => Err(out_of_range(text)),
        None => Err("expected seconds since 1970, a time with its offset such as 2026-12-24T18:00:00Z, or a date".to_owned()),
    }
}

/// What a [`jiff::Timestamp`] leaves out: the last 26 hours of the year 9999, in which whoever means "never" likes to be; and dates.
fn milliseconds_from_text(text: &str) -> Option<i64> {
    let pieces = jiff::fmt::temporal::Pieces::parse(text).ok().filter(|pieces| pieces.time_zone_annotation().is_none())?;
    let offset = match pieces.to_numeric_offset() {
        Some(offset) => offset.seconds(),
        None if pieces.time().is_none() => 0,
        // A time of day without an offset could be anybody's.
        None => return None,
    };
    let moment = pieces.date().to_datetime(pieces.time().unwrap_or(jiff::civil::Time::midnight()));
    let since_1970 = moment.duration_since(jiff::civil::date(1970, 1, 1).to_datetime(jiff::civil::Time::midnight()));
    i64::try_from(since_1970.as_millis()).ok()?.checked_sub(i64::from(offset) * 1_000)
}

/// Before all that anybody means, in seconds.
const LONG_AGO: f64 = -1e12;

fn moment_from_seconds(seconds: f64) -> Option<Timestamp> {
    // A moment that has passed means now, however long ago it was.
    let seconds = if seconds < LONG_AGO { LONG_AGO } else { seconds };
    let milliseconds = jiff::SignedDuration::try_from_secs_f64((seconds * 1_000.0).round()).ok()?.as_secs();
    Some(Timestamp(milliseconds)).filter(|moment| *moment <= NewTask::RUN_AT_MAX)
}

fn out_of_range(text: &str) -> String {
    format!("found {text}, expected seconds since 1970 up to the year 9999")
}

fn moment<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Timestamp>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Moment {
        Seconds(f64),
        Text(String),
    }
    match Option::<Moment>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Moment::Seconds(seconds)) => {
            let moment = moment_from_seconds(seconds);
            moment.map(Some).ok_or_else(|| D::Error::custom(format!("run_at: {}", out_of_range(&seconds.to_string()))))
        }
        Some(Moment::Text(text)) => {
            moment_from_text(&text).map(Some).map_err(|problem| D::Error::custom(format!("run_at: {problem}")))
        }
    }
}

/// The parser counts lines within its input, which is a line itself: only the column says something.
fn in_words(error: &serde_json::Error) -> String {
    let words = error.to_string().replace(" at line 1 column ", " at column ");
    let words = words
        .replace(", expected i32", ", expected a whole number")
        .replace(", expected u32", ", expected a whole number from 0 on");
    if error.is_data() { words } else { format!("not JSON: {words}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(line: &str) -> Result<NewTask, String> {
        parse(line.as_bytes(), &Options::default())
    }

    #[test]
    fn a_line_keeps_its_data_as_the_producer_wrote_it() {
        let task = task(r#"{"key":"k","type":"t","data":{"z":1.0,"a" : 12345678901234567890123,"z":2}}"#).expect("valid");
        assert_eq!(task.data, br#"{"z":1.0,"a" : 12345678901234567890123,"z":2}"#);
    }

    #[test]
    fn a_limit_of_a_user_needs_one() {
        let limit = |line: &str, defaults: &Options| parse(line.as_bytes(), defaults).map(|task| task.max_running);
        let (with, without) = (r#"{"key":"k","type":"t","data":{},"user":"ann"}"#, r#"{"key":"k","type":"t","data":{}}"#);
        let refused = limit(r#"{"key":"k","type":"t","data":{},"max_running":2}"#, &Options::default());
        assert_eq!(refused, Err("task \"k\": max_running without user; it limits the tasks of a user".to_owned()));
        let defaults = Options { max_running: Some(3), ..Options::default() };
        assert_eq!((limit(with, &defaults), limit(without, &defaults)), (Ok(Some(3)), Ok(None)));
    }

    #[test]
    fn a_line_wins_over_the_options_and_the_options_over_nothing() {
        let defaults = Options {
            user: Some("ann".to_owned()),
            max_attempts: Some(3),
            priority: Some(-3),
            queue: Some("mail".to_owned()),
            gzip: true,
            ..Options::default()
        };
        let line =
            br#"{"key":"k","type":"t","data":{},"max_attempts":5,"priority":7,"gzip":false,"run_at":"2023-11-14T22:13:20.5Z"}"#;
        let task = parse(line, &defaults).expect("valid");
        assert_eq!((task.user.as_deref(), task.queue.as_deref()), (Some("ann"), Some("mail")));
        let elsewhere = parse(br#"{"key":"k","type":"t","data":{},"queue":"default"}"#, &defaults).expect("valid");
        assert_eq!(elsewhere.queue.as_deref(), Some("default"));
        assert_eq!((task.max_attempts, task.priority), (Some(5), 7));
        assert_eq!(parse(br#"{"key":"k","type":"t","data":{}}"#, &defaults).expect("valid").priority, -3);
        assert_eq!(task.compression, Compression::None);
        assert_eq!(task.run_at, Some(Timestamp(1_700_000_000_500)));
    }

    #[test]
    fn a_task_may_wait_until_the_very_end_of_the_year_9999() {
        let end = NewTask::RUN_AT_MAX;
        let start_of_last_day = Timestamp(end.0 - 86_399_999);
        for (text, expected) in [
            ("9999-12-31T23:59:59.999Z", end),
            ("9999-12-31T23:59:59.999+00:00", end),
            ("9999-12-31T22:59:59.999-01:00", end),
            ("9999-12-31", start_of_last_day),
            ("9999-12-31T00:00:00Z", start_of_last_day),
            ("253402300799.999", end),
            ("2023-11-14T22:13:20Z", Timestamp(1_700_000_000_000)),
            ("2023-11-15T00:13:20+02:00", Timestamp(1_700_000_000_000)),
            ("1970-01-01", Timestamp(0)),
        ] {
            assert_eq!(moment_from_text(text), Ok(expected), "{text}");
            let line = format!(r#"{{"key":"k","type":"t","data":{{}},"run_at":"{text}"}}"#);
            assert_eq!(task(&line).expect("valid").run_at, Some(expected), "{line}");
        }
        for text in
            ["9999-12-31T23:59:59.999-00:01", "253402300800", "1e300", "inf", "nan", "2026-12-24T18:00:00", "tomorrow", ""]
        {
            assert!(moment_from_text(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_options_are_those_that_every_other_way_takes() {
        #[derive(Deserialize)]
        struct Case {
            options: String,
            is: Option<serde_json::Value>,
        }
        let cases: Vec<Case> = serde_json::from_str(include_str!("../../../../../tests/data/options.json")).expect("cases");
        for Case { options, is } in cases {
            let members = options.trim().strip_prefix('{').expect("an object").trim();
            let comma = if members == "}" { "" } else { "," };
            let parsed = task(&format!(r#"{{"key":"k","type":"t","data":{{}}{comma}{members}"#));
            let said = parsed.as_ref().ok().map(|task| {
                let queue = task.queue.as_deref().filter(|queue| *queue != NewTask::DEFAULT_QUEUE);
                let user = task.user.as_deref().filter(|user| !user.is_empty());
                let (run_at, later) = (task.run_at.map(|moment| moment.0), 1_795_000_000_000);
                let mut said = serde_json::json!({
                    "queue": queue, "user": user, "run_at": run_at.filter(|moment| *moment > later), "priority": task.priority,
                    "max_running": task.max_running, "max_attempts": task.max_attempts,
                });
                said.as_object_mut().expect("an object").retain(|_, value| !value.is_null() && *value != 0);
                said
            });
            let is = is.map(|mut is| {
                is.as_object_mut().expect("an object").retain(|_, value| *value != 0);
                is
            });
            assert_eq!(said, is, "{options}: {parsed:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said_with_its_column() {
        assert_eq!(task("{\"key\":\"k\",").unwrap_err(), "not JSON: EOF while parsing a value at column 11");
        assert!(task(r#"{"key":"k","type":"t","data":{},"colour":1}"#).unwrap_err().starts_with("unknown field `colour`"));
        assert!(task(r#"{"key":"k","type":"t"}"#).unwrap_err().starts_with("missing field `data`"));
        assert!(task(r#"{"key":"k","type":"t","data":[]}"#).unwrap_err().contains("object"));
        assert!(task(r#"{"key":"k","type":"t","data":{},"run_at":1e300}"#).unwrap_err().contains("run_at"));
        let refused = task(r#"{"key":"k","type":"t","data":{},"priority":101}"#).unwrap_err();
        assert_eq!(refused, "task \"k\": priority is 101; -100 to 100 are allowed");
    }
}
