//! A task's data as the table has it: a JSON object with the type inside, perhaps compressed.

use crate::{Compression, data};

/// The member under which the type stands.
const TYPE: &str = "type";

/// A task's data as it was read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) task_type: String,
    /// A JSON object, without the type.
    pub(super) data: Vec<u8>,
    pub(super) compression: Compression,
}

/// The most bytes of a row's data that are read: the largest data, with its type.
const STORED_BYTES_MAX: i64 = 16_842_752;

/// Whether data of so many bytes is read at all.
///
/// # Errors
/// What is wrong with it.
pub(super) fn length_fits(bytes: i64) -> Result<(), String> {
    if bytes <= STORED_BYTES_MAX { Ok(()) } else { Err(format!("{bytes} bytes are stored; at most {STORED_BYTES_MAX} are read")) }
}

/// Take type and data apart. What is empty or not a JSON object reads as `{}`; without a type in it, the key's part before the first full stop
/// is the type.
///
/// # Errors
/// What is wrong with compressed data that cannot be read.
pub(super) fn read(key: &str, stored: Vec<u8>) -> Result<Read, String> {
    let compression = data::compression(&stored);
    let plain = data::decompress(stored)?;
    let (task_type, data) = split(plain).unwrap_or_else(|| (None, b"{}".to_vec()));
    let from_key = || key.split('.').next().unwrap_or_default().to_owned();
    Ok(Read { task_type: task_type.filter(|task_type| !task_type.is_empty()).unwrap_or_else(from_key), data, compression })
}

/// The bytes to be stored. A `type` among the members gives way to the task's type. Everything else keeps its bytes.
pub(super) fn write(task_type: &str, data: &[u8], compression: Compression) -> Result<Vec<u8>, String> {
    let taken = data::take_member(data, TYPE)?;
    let data = taken.as_ref().map_or(data, |(_, rest)| rest);
    let text = data.trim_ascii_start().strip_prefix(b"{").unwrap_or_default();
    let head = format!("{{\"{TYPE}\":{}", serde_json::Value::from(task_type));
    let mut stored = Vec::with_capacity(head.len() + 1 + text.len());
    stored.extend_from_slice(head.as_bytes());
    if !text.trim_ascii_start().starts_with(b"}") {
        stored.push(b',');
    }
    stored.extend_from_slice(text);
    Ok(data::compress(stored, compression))
}

/// The type and the other members; None if it is not a JSON object in UTF-8.
fn split(plain: Vec<u8>) -> Option<(Option<String>, Vec<u8>)> {
    data::parses(&plain).ok()?;
    let (first, rest) = match leading(&plain) {
        Some((first, rest)) => {
            drop(plain);
            (first, rest)
        }
        None => (None, plain),
    };
    let (later, data) = match data::take_member(&rest, TYPE).ok()? {
        Some((later, data)) => (Some(later), data),
        None => (None, rest),
    };
    // Of two members with one name the later one counts, as it does in Ruby.
    let later = later.map(|value| serde_json::from_str::<String>(&value).unwrap_or_default());
    Some((later.or(first), data))
}

/// A type that stands first, where [`write`] puts it, so that what is behind it comes back byte by byte.
fn leading(plain: &[u8]) -> Option<(Option<String>, Vec<u8>)> {
    let behind = plain.strip_prefix(b"{\"type\":")?;
    let mut values = serde_json::Deserializer::from_slice(behind).into_iter::<String>();
    let task_type = values.next()?.ok()?;
    let rest = &behind[values.byte_offset()..];
    let members = match rest.first()? {
        b',' => &rest[1..],
        b'}' => rest,
        _ => return None,
    };
    Some((Some(task_type), [b"{", members].concat()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(key: &str, stored: &[u8]) -> (String, String) {
        let read = read(key, stored.to_vec()).unwrap();
        (read.task_type, String::from_utf8(read.data).unwrap())
    }

    #[test]
    fn what_is_written_comes_back_byte_by_byte() {
        for text in [r#"{ "z" : 1.50, "a":[1e400,null ], "z":2 }"#, "{}", "{ }", r#"{"a":{"type":1}}"#] {
            for compression in [Compression::None, Compression::Gzip] {
                let stored = write("mail.\"send\"", text.as_bytes(), compression).unwrap();
                assert_eq!(data::compression(&stored), compression);
                let read = read("key", stored).unwrap();
                assert_eq!((read.task_type.as_str(), read.compression), ("mail.\"send\"", compression));
                assert_eq!(String::from_utf8(read.data).unwrap(), if text == "{ }" { "{}" } else { text });
            }
        }
    }

    #[test]
    fn the_tasks_type_wins_over_a_member_of_that_name() {
        let stored = write("mine", br#"{"a":1,"type":"theirs","b":2}"#, Compression::None).unwrap();
        assert_eq!(String::from_utf8(stored.clone()).unwrap(), r#"{"type":"mine","a":1,"b":2}"#);
        assert_eq!(reading("key", &stored), ("mine".to_owned(), r#"{"a":1,"b":2}"#.to_owned()));
    }

    #[test]
    fn what_ruby_writes_is_read() {
        assert_eq!(reading("k", br#"{"a":1,"type":"t","b":[2]}"#), ("t".to_owned(), r#"{"a":1,"b":[2]}"#.to_owned()));
        assert_eq!(reading("k", br#"{"type":"one","a":1,"type":"two"}"#), ("two".to_owned(), r#"{"a":1}"#.to_owned()));
    }

    #[test]
    fn without_a_type_the_key_has_it() {
        for stored in [&br#"{"a":1}"#[..], br#"{"type":"","a":1}"#, br#"{"type":7,"a":1}"#, br#"{"type":null,"a":1}"#] {
            assert_eq!(reading("report.2026.11", stored), ("report".to_owned(), r#"{"a":1}"#.to_owned()));
        }
        assert_eq!(reading("plain", b"{}").0, "plain");
    }

    #[test]
    fn what_is_no_object_reads_as_an_empty_one() {
        for stored in [&b""[..], b"no json", b"[1]", b"{\"a\":", b"{\"a\":\"\xff\"}", b"null"] {
            assert_eq!(reading("t.1", stored), ("t".to_owned(), "{}".to_owned()), "{stored:?}");
        }
    }

    #[test]
    fn the_largest_data_is_read_and_what_is_larger_is_not() {
        let task_type = "\u{1}".repeat(crate::NewTask::NAME_BYTES_MAX);
        let data = format!("{{\"x\":\"{}\"}}", "x".repeat(crate::NewTask::DATA_BYTES_MAX - 8));
        let stored = write(&task_type, data.as_bytes(), Compression::None).unwrap();
        let bytes = i64::try_from(stored.len()).unwrap();
        assert_eq!(length_fits(bytes), Ok(()));
        assert!(length_fits(STORED_BYTES_MAX + 1).is_err());
    }

    #[test]
    fn corrupt_gzip_is_told() {
        let mut stored = write("t", br#"{"a":1}"#, Compression::Gzip).unwrap();
        stored.truncate(stored.len() - 5);
        assert!(read("k", stored).is_err_and(|problem| problem.starts_with("corrupt gzip")));
    }
}
