//! One line of the combined format: `address identity user [time] "request" status bytes "referrer" "agent"`.

use std::borrow::Cow;
use std::net::IpAddr;

/// The longest name of the domain name system.
const NAME_BYTES_MAX: usize = 253;

/// What a line that counts says.
#[derive(Debug, PartialEq)]
pub(crate) struct Entry<'a> {
    /// Who asked: an address, or a name where the server looks names up.
    pub(crate) address: &'a str,
    /// The hour in which it asked, by the server's own clock: `2015-05-17T10+00:00`.
    pub(crate) hour: Hour,
    /// What was asked for, without the query.
    pub(crate) path: &'a str,
    /// The status, 100 to 599.
    pub(crate) status: u16,
    /// Bytes sent; none is 0.
    pub(crate) bytes: u64,
    /// What follows, or what is wrong with it.
    pub(crate) tail: Result<Tail<'a>, &'static str>,
}

/// Where the visitor came from, and with what.
#[derive(Debug, PartialEq)]
pub(crate) struct Tail<'a> {
    /// None where the server wrote `-` or nothing.
    pub(crate) referrer: Option<&'a str>,
    /// The same.
    pub(crate) agent: Option<&'a str>,
}

/// An hour as the log writes it, in a form that sorts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hour {
    year: u16,
    month: u8,
    day: u8,
    hour: u8,
    /// Minutes east of Greenwich.
    offset: i16,
}

impl std::fmt::Display for Hour {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { year, month, day, hour, offset } = self;
        let sign = if *offset < 0 { '-' } else { '+' };
        let offset = offset.unsigned_abs();
        write!(formatter, "{year:04}-{month:02}-{day:02}T{hour:02}{sign}{:02}:{:02}", offset / 60, offset % 60)
    }
}

/// Reads a line. An error says why it does not count; a damaged tail is said in the entry, which counts.
pub(crate) fn parse(line: &str) -> Result<Entry<'_>, &'static str> {
    let (address, rest) = line.split_once(' ').ok_or("no space after the address")?;
    if !is_address(address) {
        return Err("the address is neither an IP address nor a host name");
    }
    // The user may hold spaces, so the time is found by its bracket.
    let (_, rest) = rest.split_once(" [").ok_or("no time in brackets")?;
    let (time, rest) = rest.split_once("] ").ok_or("the time's bracket is not closed")?;
    let hour = parse_time(time).ok_or("the time is not like 17/May/2015:10:05:03 +0000")?;
    let (request, rest) = quoted(rest).ok_or("the request is not in quotes")?;
    let path = parse_request(request).ok_or("the request is not like GET /path HTTP/1.1")?;
    let rest = rest.strip_prefix(' ').ok_or("no space after the request")?;
    let (status, rest) = rest.split_once(' ').ok_or("no bytes after the status")?;
    let status = parse_status(status).ok_or("the status is not a number from 100 to 599")?;
    let (bytes, tail) = rest.split_once(' ').map_or((rest, None), |(bytes, tail)| (bytes, Some(tail)));
    let bytes = parse_bytes(bytes).ok_or("the bytes are neither a number nor -")?;
    Ok(Entry { address, hour, path, status, bytes, tail: parse_tail(tail) })
}

/// Undoes the escapes with which a server keeps quotes and backslashes apart from its own; others (`\x16`) stay as they are.
pub(crate) fn unescape(text: &str) -> Cow<'_, str> {
    if text.contains(r#"\""#) || text.contains(r"\\") {
        // A backslash that was escaped must not meet the next character again.
        text.replace(r"\\", "\0").replace(r#"\""#, "\"").replace('\0', r"\").into()
    } else {
        text.into()
    }
}

fn is_address(text: &str) -> bool {
    let is_name = |text: &str| {
        text.len() <= NAME_BYTES_MAX
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
            && text.bytes().any(|byte| byte.is_ascii_alphanumeric())
            // Digits and dots alone are an address, and then it has to be one.
            && !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    };
    text.parse::<IpAddr>().is_ok() || is_name(text)
}

/// `17/May/2015:10:05:03 +0000`, every part of it checked.
fn parse_time(text: &str) -> Option<Hour> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (moment, offset) = text.split_once(' ')?;
    let (date, clock) = moment.split_once(':')?;
    let [day, month, year] = parts::<3>(date, '/')?;
    let [hour, minute, second] = parts::<3>(clock, ':')?;
    let month = MONTHS.iter().zip(1u8..).find(|(name, _)| **name == month)?.1;
    let (year, day) = (digits::<u16>(year, 4)?, digits::<u8>(day, 2)?);
    if day == 0 || day > days_in(year, month) {
        return None;
    }
    let (hour, minute, second) = (digits::<u8>(hour, 2)?, digits::<u8>(minute, 2)?, digits::<u8>(second, 2)?);
    // A leap second is second 60.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    Some(Hour { year, month, day, hour, offset: parse_offset(offset)? })
}

/// `+0000`, in minutes.
fn parse_offset(text: &str) -> Option<i16> {
    let minutes = |text: &str| -> Option<i16> {
        let (hours, minutes) = text.split_at_checked(2)?;
        let (hours, minutes) = (digits::<i16>(hours, 2)?, digits::<i16>(minutes, 2)?);
        (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
    };
    match text.split_at_checked(1)? {
        ("+", rest) => minutes(rest),
        ("-", rest) => minutes(rest).map(|minutes| -minutes),
        _ => None,
    }
}

fn days_in(year: u16, month: u8) -> u8 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        _ => 31,
    }
}

fn parts<const N: usize>(text: &str, separator: char) -> Option<[&str; N]> {
    text.split(separator).collect::<Vec<_>>().try_into().ok()
}

/// A number of exactly so many digits: `FromStr` alone would take a sign.
fn digits<T: std::str::FromStr>(text: &str, count: usize) -> Option<T> {
    (text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// The path of `GET /path?query HTTP/1.1`. HTTP/0.9 has no version, and a path may hold spaces where the client wrote some.
fn parse_request(request: &str) -> Option<&str> {
    let (method, rest) = request.split_once(' ')?;
    if method.is_empty() || !method.bytes().all(|byte| byte.is_ascii_alphabetic() || matches!(byte, b'-' | b'_')) {
        return None;
    }
    let target = rest.rsplit_once(' ').filter(|(_, version)| version.starts_with("HTTP/")).map_or(rest, |(target, _)| target);
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    (!path.trim().is_empty()).then_some(path)
}

fn parse_status(text: &str) -> Option<u16> {
    digits::<u16>(text, 3).filter(|status| (100..600).contains(status))
}

fn parse_bytes(text: &str) -> Option<u64> {
    match text {
        "-" => Some(0),
        number if !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()) => number.parse().ok(),
        _ => None,
    }
}

fn parse_tail(tail: Option<&str>) -> Result<Tail<'_>, &'static str> {
    let tail = tail.ok_or("referrer and agent are missing")?;
    let (referrer, rest) = quoted(tail).ok_or("the referrer is not in quotes")?;
    let rest = rest.strip_prefix(' ').ok_or("the agent is missing")?;
    // Servers may add fields of their own after the agent.
    let (agent, _) = quoted(rest).ok_or("the agent's quotes are not closed")?;
    let present = |text: &str| !text.is_empty() && text != "-";
    Ok(Tail { referrer: Some(referrer).filter(|text| present(text)), agent: Some(agent).filter(|text| present(text)) })
}

/// What is between the quotes at the beginning, still escaped, and what follows them.
fn quoted(text: &str) -> Option<(&str, &str)> {
    let text = text.strip_prefix('"')?;
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some((&text[..index], &text[index + 1..])),
            _ => {}
        }
    }
    None
}
