//! Lengths of time and sizes, as they stand in the file and as they are told.

use std::time::Duration;

use bytesize::ByteSize;
use jiff::{Span, SpanRelativeTo};

/// Ten years: longer than any length of time here makes sense.
pub(super) const YEARS_10: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A length of time from text such as `250ms`, `1h30m` or `14 days`; a day is 24 hours. None if it is no such text, or negative.
pub(super) fn duration_from_text(text: &str) -> Option<Duration> {
    if let Some(seconds) = number_from_text(text) {
        return duration_from_seconds(seconds);
    }
    let span: Span = text.parse().ok()?;
    Duration::try_from(span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?).ok()
}

/// A length of time from a number of seconds. None if it is negative, endless or not a number.
pub(super) fn duration_from_seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

/// A size from text such as `64MiB` or `1.5 GB`.
pub(super) fn size_from_text(text: &str) -> Option<u64> {
    text.parse::<ByteSize>().ok().map(|size| size.as_u64())
}

/// A number with underscores, which YAML 1.1 (PerfectQueue's) reads as a number, and YAML 1.2 as a text.
pub(super) fn number_from_text(text: &str) -> Option<f64> {
    let digits = |text: &str| text.starts_with(|first: char| first.is_ascii_digit());
    (text.contains('_') && digits(text)).then(|| text.replace('_', "")).and_then(|text| text.parse().ok())
}

/// A length of time in its largest fitting words: `500 ms`, `5 s`, `10 min`, `14 days`.
pub(super) fn tell_duration(duration: Duration) -> String {
    const UNITS: [(u128, &str); 4] = [(86_400_000, "days"), (3_600_000, "h"), (60_000, "min"), (1_000, "s")];
    let milliseconds = duration.as_millis();
    if duration > Duration::from_secs(2 * 365 * 86_400) {
        return format!("{} years", milliseconds / (365 * 86_400_000));
    }
    let unit = UNITS.iter().find(|(unit, _)| milliseconds >= *unit && milliseconds.is_multiple_of(*unit));
    match unit {
        Some((unit, name)) => format!("{} {name}", grouped(milliseconds / unit)),
        None => format!("{} ms", grouped(milliseconds)),
    }
}

/// A size in its largest fitting unit: `64 MiB`.
pub(super) fn tell_size(bytes: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let unit = UNITS.iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    match unit {
        Some((unit, name)) => format!("{} {name}", grouped(u128::from(bytes / unit))),
        None => format!("{} bytes", grouped(u128::from(bytes))),
    }
}

/// A number with a comma after every three digits: `1,024`.
pub(super) fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}
