//! One mapping of the file, read key by key: what is wrong is noted, and reading goes on, so that all mistakes are told at once.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde_yaml::{Mapping, Value};

use super::Lookup;
use super::document::{Report, Step};
use super::quantity::{
    duration_from_seconds, duration_from_text, grouped, number_from_text, size_from_text, tell_duration, tell_size,
};

pub(super) const ERB_HINT: &str = "Ruby templates (<%= ... %>) are not evaluated; write the value itself";
const ERB_SECRET_HINT: &str =
    "Ruby templates (<%= ... %>) are not evaluated; write the value itself, or `{env: NAME}` to take it from the environment";

/// The most bytes of a file that holds a secret.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// A mapping of the file. Every method that takes a key marks it as known; [`Keys::finish`] reports those that nobody took.
pub(super) struct Keys<'a> {
    mapping: Mapping,
    place: Vec<Step>,
    known: Vec<&'static str>,
    pub(super) report: &'a mut Report,
}

/// What to do about a key that nobody knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    Refuse,
    /// PerfectQueue's applications keep keys of their own beside its keys.
    Warn,
}

impl<'a> Keys<'a> {
    pub(super) fn new(mapping: Mapping, place: Vec<Step>, report: &'a mut Report) -> Self {
        Self { mapping, place, known: Vec::new(), report }
    }

    /// Whether the key is there with a value.
    pub(super) fn has(&self, key: &str) -> bool {
        self.mapping.get(key).is_some_and(|value| !value.is_null())
    }

    /// Whether the key is there, if only with nothing.
    pub(super) fn is_named(&self, key: &str) -> bool {
        self.mapping.contains_key(key)
    }

    /// Whether the key is there with a mapping.
    pub(super) fn has_mapping(&self, key: &str) -> bool {
        self.mapping.get(key).is_some_and(Value::is_mapping)
    }

    /// The value of a key; None if it is missing or null, which is the same.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.mapping.remove(key).filter(|value| !value.is_null())
    }

    /// The place of a key of this mapping.
    pub(super) fn place(&self, key: &str) -> Vec<Step> {
        let mut place = self.place.clone();
        place.push(Step::Key(key.to_owned()));
        place
    }

    /// The line of this mapping, from 1.
    pub(super) fn line(&self) -> Option<usize> {
        self.report.line(&self.place)
    }

    /// Note that a key has an impossible value.
    pub(super) fn problem(&mut self, key: &str, message: String, hint: Option<&str>) {
        let place = self.place(key);
        self.report.problem(&place, message, hint.map(str::to_owned));
    }

    /// Note something odd about a key.
    pub(super) fn warn(&mut self, key: &str, message: &str) {
        let place = self.place(key);
        self.report.warning(&place, message);
    }

    /// Note that this mapping as a whole is wrong.
    pub(super) fn problem_here(&mut self, message: String, hint: Option<&str>) {
        let place = self.place.clone();
        self.report.problem(&place, message, hint.map(str::to_owned));
    }

    /// A whole number.
    pub(super) fn whole(&mut self, key: &'static str, range: RangeInclusive<u32>) -> Option<u32> {
        let value = self.take(key)?;
        self.check(key, &value, whole_of(&value, &range), &expected_whole(&range))
    }

    /// A whole number, or a word for "without limit" (`Some(None)`).
    pub(super) fn whole_or(&mut self, key: &'static str, range: RangeInclusive<u32>, word: &str) -> Option<Option<u32>> {
        let value = self.take(key)?;
        if value.as_str() == Some(word) {
            return Some(None);
        }
        let expected = format!("{}, or `{word}`", expected_whole(&range));
        self.check(key, &value, whole_of(&value, &range), &expected).map(Some)
    }

    /// A number.
    pub(super) fn number(&mut self, key: &'static str, range: RangeInclusive<f64>) -> Option<f64> {
        let value = self.take(key)?;
        let number = number_of(&value).filter(|number| range.contains(number));
        self.check(key, &value, number, &format!("a number from {} to {}", range.start(), range.end()))
    }

    /// A length of time.
    pub(super) fn duration(&mut self, key: &'static str, range: RangeInclusive<Duration>) -> Option<Duration> {
        let value = self.take(key)?;
        self.check(key, &value, duration_of(&value, &range), &expected_duration(&range))
    }

    /// A length of time, or a word for "without limit" (`Some(None)`).
    pub(super) fn duration_or(
        &mut self,
        key: &'static str,
        range: RangeInclusive<Duration>,
        word: &str,
    ) -> Option<Option<Duration>> {
        let value = self.take(key)?;
        if value.as_str() == Some(word) {
            return Some(None);
        }
        let expected = format!("{}, or `{word}`", expected_duration(&range));
        self.check(key, &value, duration_of(&value, &range), &expected).map(Some)
    }

    /// A size in bytes.
    pub(super) fn size(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.take(key)?;
        self.check(key, &value, size_of(&value, &range), &expected_size(&range))
    }

    /// A size in bytes, or a word for "without limit" (`Some(None)`).
    pub(super) fn size_or(&mut self, key: &'static str, range: RangeInclusive<u64>, word: &str) -> Option<Option<u64>> {
        let value = self.take(key)?;
        if value.as_str() == Some(word) {
            return Some(None);
        }
        let expected = format!("{}, or `{word}`", expected_size(&range));
        self.check(key, &value, size_of(&value, &range), &expected).map(Some)
    }

    /// Yes or no. YAML 1.1, which PerfectQueue reads, has more words for it than YAML 1.2.
    pub(super) fn yes_or_no(&mut self, key: &'static str) -> Option<bool> {
        let value = self.take(key)?;
        let answer = match &value {
            Value::Bool(answer) => Some(*answer),
            Value::String(text) if ["yes", "on"].contains(&text.to_lowercase().as_str()) => Some(true),
            Value::String(text) if ["no", "off"].contains(&text.to_lowercase().as_str()) => Some(false),
            _ => None,
        };
        self.check(key, &value, answer, "true or false")
    }

    /// A text of 1 to 4,096 bytes without control characters.
    pub(super) fn text(&mut self, key: &'static str, what: &str) -> Option<String> {
        self.text_that(key, what, |text| !text.is_empty())
    }

    /// A text of at most 4,096 bytes without control characters.
    pub(super) fn text_or_empty(&mut self, key: &'static str, what: &str) -> Option<String> {
        self.text_that(key, what, |_| true)
    }

    fn text_that(&mut self, key: &'static str, what: &str, allowed: impl Fn(&str) -> bool) -> Option<String> {
        let value = self.take(key)?;
        let plain = |text: &str| text.len() <= 4096 && !text.contains(char::is_control) && !text.contains("<%");
        let text = value.as_str().filter(|text| plain(text) && allowed(text)).map(str::to_owned);
        self.check(key, &value, text, what)
    }

    /// A text that may be a secret: it stands there, or `{env: NAME}` or `{file: PATH}` say where it is. It is never told.
    pub(super) fn secret(&mut self, key: &'static str, what: &str, environment: &Lookup<'_>) -> Option<String> {
        let value = self.take(key)?;
        let place = self.place(key);
        secret_of(value, place, self.report, what, environment)
    }

    /// A mapping within this one.
    pub(super) fn mapping(&mut self, key: &'static str, what: &str) -> Option<Keys<'_>> {
        match self.take(key)? {
            Value::Mapping(mapping) => {
                let place = self.place(key);
                Some(Keys::new(mapping, place, self.report))
            }
            other => {
                self.check::<()>(key, &other, None, what);
                None
            }
        }
    }

    /// A list of at most `entries_max` entries; empty if it is missing, None if it is no such list.
    pub(super) fn list(&mut self, key: &'static str, what: &str, entries_max: usize) -> Option<Vec<Value>> {
        match self.take(key) {
            None => Some(Vec::new()),
            Some(Value::Sequence(list)) if list.len() > entries_max => {
                self.problem(
                    key,
                    format!("found {} entries, expected at most {}", list.len(), grouped(entries_max as u128)),
                    None,
                );
                None
            }
            Some(Value::Sequence(list)) => Some(list),
            Some(other) => self.check(key, &other, None, what),
        }
    }

    /// What is left: every key with its value, of an open mapping such as `settings`.
    pub(super) fn rest(&mut self) -> Mapping {
        std::mem::take(&mut self.mapping)
    }

    /// Report the keys that nobody took.
    pub(super) fn finish(mut self, unknown: Unknown) {
        for (key, _) in self.rest() {
            let name = key.as_str().map_or_else(|| describe(&key), str::to_owned);
            let near = nearest(&name, self.known.iter().copied());
            let hint = near.map(|near| format!("did you mean {near}?"));
            match unknown {
                Unknown::Refuse => {
                    let message = "no such key".to_owned();
                    let hint = hint.unwrap_or_else(|| format!("known here: {}", self.known.join(", ")));
                    self.problem(&name, message, Some(&hint));
                }
                Unknown::Warn => {
                    let message = format!("no such key; ignored{}", hint.map(|hint| format!(" ({hint})")).unwrap_or_default());
                    self.warn(&name, &message);
                }
            }
        }
    }

    fn check<T>(&mut self, key: &str, found: &Value, good: Option<T>, expected: &str) -> Option<T> {
        if good.is_none() {
            let place = self.place(key);
            mismatch(self.report, &place, found, expected);
        }
        good
    }
}

/// Note that a value is not what it has to be.
pub(super) fn mismatch(report: &mut Report, place: &[Step], found: &Value, expected: &str) {
    let hint = found.as_str().filter(|text| text.contains("<%")).map(|_| ERB_HINT.to_owned());
    report.problem(place, format!("found {}, expected {expected}", describe(found)), hint);
}

/// A text that may be a secret; see [`Keys::secret`].
pub(super) fn secret_of(
    value: Value,
    place: Vec<Step>,
    report: &mut Report,
    what: &str,
    environment: &Lookup<'_>,
) -> Option<String> {
    match value {
        Value::String(text) if text.contains("<%") => {
            report.problem(&place, format!("found a Ruby template, expected {what}"), Some(ERB_SECRET_HINT.to_owned()));
            None
        }
        Value::String(text) => Some(text),
        Value::Mapping(mapping) => {
            let mut keys = Keys::new(mapping, place, report);
            let (name, file) = (keys.text("env", "the name of a variable"), keys.text("file", "the path of a file"));
            let found = match (name, file) {
                (Some(name), None) => environment(&name).or_else(|| {
                    keys.problem("env", format!("the environment variable {name} is not set"), Some("set it, or remove the key"));
                    None
                }),
                (None, Some(file)) => {
                    let read = secret_from_file(&file);
                    read.map_err(|problem| keys.problem("file", format!("{file}: {problem}"), None)).ok()
                }
                (Some(_), Some(_)) => {
                    keys.problem_here("found both env and file, expected one of them".to_owned(), None);
                    None
                }
                (None, None) => {
                    keys.problem_here(format!("expected {what}, `{{env: NAME}}` or `{{file: PATH}}`"), None);
                    None
                }
            };
            keys.finish(Unknown::Refuse);
            found
        }
        other => {
            // Numbers and the like may be a secret as well: only the sort of value is told.
            let sort = sort_of(&other);
            report.problem(&place, format!("found {sort}, expected {what}, `{{env: NAME}}` or `{{file: PATH}}`"), None);
            None
        }
    }
}

fn secret_from_file(path: &str) -> Result<String, String> {
    use std::io::Read as _;
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > SECRET_BYTES_MAX {
        return Err(format!("larger than {}", tell_size(SECRET_BYTES_MAX)));
    }
    let text = text.trim_end_matches(['\n', '\r']);
    if text.is_empty() { Err("the file is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// A value in words, cut to a readable length.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Bool(answer) => answer.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => {
            let short: String = text.chars().take(80).collect();
            let dots = if short.len() < text.len() { "..." } else { "" };
            format!("{short:?}{dots}")
        }
        other => sort_of(other).to_owned(),
    }
}

fn sort_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Sequence(_) => "a list",
        Value::Mapping(_) => "a mapping",
        Value::Tagged(_) => "a value with a tag (!...)",
    }
}

/// The known name that somebody may have meant.
pub(super) fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let scored = known.map(|known| (strsim::jaro_winkler(&name.to_lowercase(), known), known));
    scored.filter(|(score, _)| *score >= 0.84).max_by(|left, right| left.0.total_cmp(&right.0)).map(|(_, known)| known)
}

fn size_of(value: &Value, range: &RangeInclusive<u64>) -> Option<u64> {
    let size = match value {
        Value::Number(number) => number.as_u64(),
        Value::String(text) => size_from_text(text),
        _ => None,
    };
    size.filter(|size| range.contains(size))
}

fn expected_size(range: &RangeInclusive<u64>) -> String {
    let (least, most) = (tell_size(*range.start()), tell_size(*range.end()));
    format!("a size from {least} to {most} (a number of bytes, or text such as \"64MiB\")")
}

fn whole_of(value: &Value, range: &RangeInclusive<u32>) -> Option<u32> {
    let number = match value {
        Value::Number(number) => number.as_u64(),
        // Only digits and underscores, so the text is a whole number.
        Value::String(text) if number_from_text(text).is_some() => text.replace('_', "").parse().ok(),
        _ => None,
    };
    number.and_then(|number| u32::try_from(number).ok()).filter(|number| range.contains(number))
}

fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => number_from_text(text),
        _ => None,
    }
}

fn duration_of(value: &Value, range: &RangeInclusive<Duration>) -> Option<Duration> {
    let duration = match value {
        Value::Number(number) => number.as_f64().and_then(duration_from_seconds),
        Value::String(text) => duration_from_text(text),
        _ => None,
    };
    duration.filter(|duration| range.contains(duration))
}

fn expected_whole(range: &RangeInclusive<u32>) -> String {
    format!("a whole number from {} to {}", grouped((*range.start()).into()), grouped((*range.end()).into()))
}

fn expected_duration(range: &RangeInclusive<Duration>) -> String {
    format!(
        "a length of time from {} to {} (a number of seconds, or text such as \"250ms\" or \"5m\")",
        tell_duration(*range.start()),
        tell_duration(*range.end())
    )
}
