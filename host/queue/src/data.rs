//! A task's data: a JSON object, checked, compressed, and merged without touching what is not replaced.

use std::borrow::Cow;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{Read, Write};

use flate2::Compression as Level;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use crate::{Compression, Error, NewTask};

/// What gzip begins with, and JSON never.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How stored data is compressed.
pub(crate) fn compression(stored: &[u8]) -> Compression {
    if stored.starts_with(&GZIP_MAGIC) { Compression::Gzip } else { Compression::None }
}

/// Check that the bytes are a JSON object, as every way in means it: one object by RFC 8259 in UTF-8 and nothing but white space around it. No
/// byte order mark, no NUL, and escapes only in whole pairs of surrogates. Names may be there more than once, and it may be nested at will.
///
/// # Errors
/// What is wrong, in words that fit behind "data: ".
pub(crate) fn check(data: &[u8]) -> Result<(), String> {
    parses(data)?;
    no_lone_surrogates(data)
}

/// As [`check`], but with escapes of lone surrogates, which other programs may have stored. No text can be made of them.
///
/// # Errors
/// As [`check`].
pub(crate) fn parses(data: &[u8]) -> Result<(), String> {
    serde_json::from_str::<AnyObject>(text(data)?).map(drop).map_err(|error| format!("not a JSON object: {error}"))
}

/// That each escape of a surrogate in a JSON text has its other half. Outside strings there is no backslash.
fn no_lone_surrogates(json: &[u8]) -> Result<(), String> {
    let mut at = 0;
    while let Some(next) = json.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == b'\\')) {
        at += next;
        let length = match (escaped_unit(json, at), escaped_unit(json, at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(half @ 0xd800..=0xdfff), _) => {
                return Err(format!("not a JSON object: half of a pair of surrogates, \\u{half:04x}, at byte {at}"));
            }
            _ => 2,
        };
        at += length;
    }
    Ok(())
}

/// The sixteen bits of an escape, `\u` and four digits, that begins here.
fn escaped_unit(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at + 6)?.strip_prefix(b"\\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// The bytes as they are stored.
pub(crate) fn compress(data: Vec<u8>, compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => data,
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::with_capacity(data.len() / 4 + 32), Level::default());
            let written = encoder.write_all(&data).and_then(|()| encoder.finish());
            written.unwrap_or_else(|error| unreachable!("compressing into memory failed: {error}"))
        }
    }
}

/// The bytes as they were submitted.
///
/// # Errors
/// What is wrong with them: corrupt gzip, or more than [`NewTask::DATA_BYTES_MAX`] bytes.
pub(crate) fn decompress(stored: Vec<u8>) -> Result<Vec<u8>, String> {
    if compression(&stored) == Compression::None { Ok(stored) } else { inflate(&stored) }
}

/// The bytes as they were submitted, or, if they are damaged, as they are stored: to be shown.
pub(crate) fn readable(stored: Vec<u8>) -> Vec<u8> {
    if compression(&stored) == Compression::None { stored } else { inflate(&stored).unwrap_or(stored) }
}

fn inflate(stored: &[u8]) -> Result<Vec<u8>, String> {
    let mut data = Vec::with_capacity(stored.len().saturating_mul(3).min(NewTask::DATA_BYTES_MAX));
    let most = NewTask::DATA_BYTES_MAX as u64 + 1;
    GzDecoder::new(stored).take(most).read_to_end(&mut data).map_err(|error| format!("corrupt gzip: {error}"))?;
    if data.len() > NewTask::DATA_BYTES_MAX {
        return Err(format!("larger than {} bytes when decompressed", NewTask::DATA_BYTES_MAX));
    }
    Ok(data)
}

/// What a task's data becomes when members are set in it: its size, and its bytes, compressed as they were. In memory at once are at most what is
/// stored, the data, the result and twice the members, however many there are.
///
/// # Errors
/// [`Error::InvalidTask`] if the members are not a JSON object, what is stored cannot be read, or the data would be too large.
pub(crate) fn updated(key: &str, stored: Vec<u8>, members: &[u8]) -> Result<(usize, Vec<u8>), Error> {
    let invalid = |problem: String| Error::InvalidTask { key: key.to_owned(), problem };
    let compression = compression(&stored);
    let plain = decompress(stored).map_err(|problem| invalid(format!("the stored data is unreadable: {problem}")))?;
    let merged = merge(&plain, members).map_err(invalid)?;
    drop(plain);
    Ok((merged.len(), compress(merged, compression)))
}

/// Set the members of one JSON object in another. Other members keep their place and their very bytes; new ones come last.
///
/// # Errors
/// What is wrong, in words; also if one of them or the result were larger than [`NewTask::DATA_BYTES_MAX`].
pub(crate) fn merge(data: &[u8], members: &[u8]) -> Result<Vec<u8>, String> {
    if members.len() > NewTask::DATA_BYTES_MAX {
        return Err(format!("the update has {} bytes; at most {} are allowed", members.len(), NewTask::DATA_BYTES_MAX));
    }
    let mut new = Names::of(members).map_err(|problem| format!("the update is {problem}"))?;
    no_lone_surrogates(members).map_err(|problem| format!("the update is {problem}"))?;
    let mut merged = Object::with_capacity(data.len().saturating_add(members.len()));
    each_member(data, |_, name, value| {
        let slot = new.slot(name);
        match new.at(slot) {
            None => merged.push(name, value),
            // Of several members of one name the last counts for those who read them; one with the new value is enough.
            Some(at) => {
                if !new.use_up(slot) {
                    merged.push(name, new.value(at));
                }
            }
        }
    })
    .map_err(|problem| format!("the stored data is {problem}"))?;
    for at in new.unused() {
        merged.push(new.name(at), new.value(at));
    }
    merged.into_bytes()
}

/// Take the members of one name out of a JSON object: the value of the last of them as it was written, and the object without them. None if it
/// has none.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn take_member(data: &[u8], name: &str) -> Result<Option<(String, Vec<u8>)>, String> {
    let mut taken = None;
    each_member(data, |_, member, value| {
        if read_name(member) == name {
            taken = Some(value);
        }
    })?;
    let Some(taken) = taken else { return Ok(None) };
    let mut rest = Object::with_capacity(data.len());
    each_member(data, |_, member, value| {
        if read_name(member) != name {
            rest.push(member, value);
        }
    })?;
    Ok(Some((taken.to_owned(), rest.into_bytes()?)))
}

/// The names of a JSON object's members, to be found again: about one byte for each of the object's, since it may consist of a million of them.
struct Names<'a> {
    text: &'a str,
    /// A hash table with open addressing, never more than four fifths full. In a slot: where a name begins in the text, from 1 on, and whether
    /// it is used up. Of several members of one name it has the last.
    slots: Vec<u32>,
    hasher: RandomState,
}

/// In an empty slot.
const EMPTY: u32 = 0;
/// In the slot of a name that is used up. Data is far from being so large.
const USED: u32 = 1 << 31;

impl<'a> Names<'a> {
    fn of(members: &'a [u8]) -> Result<Self, String> {
        let text = text(members)?;
        // A member has five bytes or more with the sign that parts it from the next.
        let slots = vec![EMPTY; (members.len() / 4 + 8).next_power_of_two()];
        let mut names = Self { text, slots, hasher: RandomState::new() };
        each_member(members, |at, name, _| {
            let slot = names.slot(name);
            names.slots[slot] = at + 1;
        })?;
        Ok(names)
    }

    /// The slot of a name, or the empty one that it would have.
    fn slot(&self, name: &str) -> usize {
        let name = read_name(name);
        let mask = self.slots.len() - 1;
        #[allow(clippy::cast_possible_truncation, reason = "a part of a hash is one too")]
        let mut slot = self.hasher.hash_one(name.as_ref()) as usize & mask;
        while let Some(at) = self.at(slot)
            && read_name(self.name(at)) != name
        {
            slot = (slot + 1) & mask;
        }
        slot
    }

    /// Where the name in a slot begins.
    fn at(&self, slot: usize) -> Option<u32> {
        (self.slots[slot] & !USED).checked_sub(1)
    }

    /// Answers whether it was used up before.
    fn use_up(&mut self, slot: usize) -> bool {
        let before = self.slots[slot];
        self.slots[slot] |= USED;
        before & USED != 0
    }

    /// Where the names begin that are not used up, in order.
    fn unused(&self) -> Vec<u32> {
        let mut unused: Vec<u32> =
            self.slots.iter().filter(|slot| **slot & USED == 0).filter_map(|slot| slot.checked_sub(1)).collect();
        unused.sort_unstable();
        unused
    }

    /// The name as it is written, with its quotes.
    fn name(&self, at: u32) -> &'a str {
        let rest = &self.text[at as usize..];
        let mut is_escaped = false;
        let end = rest.bytes().skip(1).position(|byte| {
            let is_end = byte == b'"' && !is_escaped;
            is_escaped = byte == b'\\' && !is_escaped;
            is_end
        });
        end.map_or(rest, |end| &rest[..end + 2])
    }

    /// The value behind a name, as it is written.
    fn value(&self, at: u32) -> &'a str {
        let behind = &self.text[at as usize + self.name(at).len()..];
        let behind = behind.trim_start_matches([' ', '\t', '\r', '\n']);
        let value =
            serde_json::Deserializer::from_str(behind.strip_prefix(':').unwrap_or(behind)).into_iter::<&RawValue>().next();
        // It was read before.
        value.and_then(Result::ok).map_or("null", RawValue::get)
    }
}

/// A member's name: what is written between the quotes, without escapes. One that no text can be made of stays as it is written.
fn read_name(written: &str) -> Cow<'_, str> {
    if written.contains('\\') {
        serde_json::from_str(written).map_or(Cow::Borrowed(written), Cow::Owned)
    } else {
        Cow::Borrowed(written.get(1..written.len() - 1).unwrap_or_default())
    }
}

/// A JSON object that is being written, up to the largest that may be stored.
struct Object {
    bytes: Vec<u8>,
    /// How large it would be.
    length: usize,
}

impl Object {
    fn with_capacity(bytes: usize) -> Self {
        let mut object = Self { bytes: Vec::with_capacity(bytes.min(NewTask::DATA_BYTES_MAX)), length: 0 };
        object.write("{");
        object
    }

    fn push(&mut self, name: &str, value: &str) {
        let separator = if self.length > 1 { "," } else { "" };
        for part in [separator, name, ":", value] {
            self.write(part);
        }
    }

    /// What goes beyond the bound is only counted.
    fn write(&mut self, part: &str) {
        self.length = self.length.saturating_add(part.len());
        if self.length <= NewTask::DATA_BYTES_MAX {
            self.bytes.extend_from_slice(part.as_bytes());
        }
    }

    fn into_bytes(mut self) -> Result<Vec<u8>, String> {
        self.write("}");
        if self.length > NewTask::DATA_BYTES_MAX {
            return Err(format!("the updated data has {} bytes; at most {} are allowed", self.length, NewTask::DATA_BYTES_MAX));
        }
        Ok(self.bytes)
    }
}

fn text(data: &[u8]) -> Result<&str, String> {
    // serde_json does not look into strings that it skips.
    std::str::from_utf8(data).map_err(|error| format!("not a JSON object: {error}"))
}

/// Show each member of a JSON object, in order, as it is written: where it begins, its name with its quotes, its value. Nothing is built of it.
///
/// # Errors
/// What is wrong, in words that fit behind "data: ".
fn each_member<'a>(data: &'a [u8], visit: impl FnMut(u32, &'a str, &'a str)) -> Result<(), String> {
    let text = text(data)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let members = Members { text, visit };
    let walked = deserializer.deserialize_map(members).and_then(|()| deserializer.end());
    walked.map_err(|error| format!("not a JSON object: {error}"))
}

struct Members<'a, F> {
    text: &'a str,
    visit: F,
}

impl<'a, F: FnMut(u32, &'a str, &'a str)> Visitor<'a> for Members<'a, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'a>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some((name, value)) = map.next_entry::<&RawValue, &RawValue>()? {
            // Both are parts of the text.
            let at = (name.get().as_ptr() as usize).wrapping_sub(self.text.as_ptr() as usize);
            let at = u32::try_from(at).map_err(|_| serde::de::Error::custom("larger than four gigabytes"))?;
            (self.visit)(at, name.get(), value.get());
        }
        Ok(())
    }
}

/// A JSON object of which only that is known.
struct AnyObject;

impl<'de> Deserialize<'de> for AnyObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = AnyObject;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<AnyObject, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(AnyObject)
            }
        }
        deserializer.deserialize_map(Any)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn merging_keeps_order_and_bytes_of_what_is_not_replaced() {
        let data = br#"{ "z": 1.10, "a": {"deep": [1e400, null]}, "big": 123456789012345678901234567890 }"#;
        let merged = merge(data, br#"{"new":null,"z":[2]}"#).expect("both are objects");
        let expected = r#"{"z":[2],"a":{"deep": [1e400, null]},"big":123456789012345678901234567890,"new":null}"#;
        assert_eq!(String::from_utf8_lossy(&merged), expected);
    }

    #[test]
    fn names_are_alike_however_they_are_written() {
        let merge = |data: &str, members: &str| String::from_utf8(merge(data.as_bytes(), members.as_bytes()).expect("objects"));
        assert_eq!(
            merge(r#"{"a":1,"b":2}"#, r#"{ "\u0061" : 3 , "\u0062\n":4}"#).as_deref(),
            Ok(r#"{"a":3,"b":2,"\u0062\n":4}"#)
        );
        // The last of several counts.
        assert_eq!(merge(r#"{"a":1,"b":2,"a":3}"#, r#"{"a":4,"c":5,"a":6,"c":7}"#).as_deref(), Ok(r#"{"a":6,"b":2,"c":7}"#));
        assert_eq!(merge(r#"{"a":1,"a":2}"#, r#"{"":0}"#).as_deref(), Ok(r#"{"a":1,"a":2,"":0}"#));
        // No text can be made of half a pair: it is kept where it is stored, and let in nowhere.
        assert_eq!(merge(r#"{"\ud800":1}"#, r#"{"a":2}"#).as_deref(), Ok(r#"{"\ud800":1,"a":2}"#));
        assert_eq!(merge("{}", "{}").as_deref(), Ok("{}"));
    }

    #[test]
    fn a_member_is_taken_out_by_its_last_value() {
        let taken = take_member(br#"{"type":"a","n": 1,"t\u0079pe":"b"}"#, "type").expect("an object").expect("it is there");
        assert_eq!(taken, (r#""b""#.to_owned(), br#"{"n":1}"#.to_vec()));
        assert_eq!(take_member(b"{ }", "type"), Ok(None));
    }

    #[test]
    fn only_an_object_is_data() {
        assert_eq!(check(br#"{"a":[1,{"b":null}]}"#), Ok(()));
        for wrong in [&b"[]"[..], b"1", b"null", b"", b"{", b"{} {}", b"{\"a\":\"\xff\"}", b"\"{}\""] {
            assert!(check(wrong).is_err_and(|problem| problem.starts_with("not a JSON object")), "{wrong:?}");
        }
    }

    #[test]
    fn surrogates_come_in_pairs() {
        for right in [r#"{"\ud83d\uDE00":"\uDBFF\udfff\\ud800"}"#, r#"{"a":"\\\\ud800\u12345"}"#] {
            assert_eq!(check(right.as_bytes()), Ok(()), "{right}");
        }
        for wrong in [r#"{"a":"\uDC00\uD800"}"#, r#"{"a":"\ud83d\\\ude00"}"#, r#"{"a":"\ud83d\ud83d\ude00"}"#] {
            let told = check(wrong.as_bytes()).expect_err("half a pair");
            assert!(told.starts_with("not a JSON object: half of a pair"), "{told}");
            assert!(parses(wrong.as_bytes()).is_ok() && merge(b"{}", wrong.as_bytes()).is_err());
        }
        assert!(check(br#"{"\ud800":1}"#).is_err() && merge(b"{}", br#"{"\ud800":1}"#).is_err());
    }

    #[test]
    fn a_gzip_bomb_stops_at_the_bound() {
        let bomb = compress(vec![b' '; NewTask::DATA_BYTES_MAX + 1], Compression::Gzip);
        assert!(decompress(bomb).is_err_and(|problem| problem.starts_with("larger than 16777216 bytes")));
    }

    #[test]
    fn cut_off_gzip_is_told() {
        let mut stored = compress(br#"{"a":1}"#.to_vec(), Compression::Gzip);
        stored.truncate(stored.len() - 5);
        assert!(decompress(stored).is_err_and(|problem| problem.starts_with("corrupt gzip")));
    }

    proptest! {
        #[test]
        fn what_is_compressed_comes_back(data: Vec<u8>) {
            let stored = compress(data.clone(), Compression::Gzip);
            prop_assert_eq!(compression(&stored), Compression::Gzip);
            prop_assert_eq!(decompress(stored), Ok(data));
        }

        #[test]
        fn merging_is_setting_each_member(
            data in proptest::collection::btree_map("[a-c]{1,2}", any::<i32>(), 0..5),
            members in proptest::collection::btree_map("[a-c]{1,2}", any::<Option<bool>>(), 0..5),
        ) {
            let mut expected = serde_json::json!(data);
            for (name, value) in &members {
                expected[name] = serde_json::json!(value);
            }
            let merged = merge(&serde_json::to_vec(&data)?, &serde_json::to_vec(&members)?).map_err(TestCaseError::fail)?;
            prop_assert_eq!(serde_json::from_slice::<serde_json::Value>(&merged)?, expected);
        }
    }
}
