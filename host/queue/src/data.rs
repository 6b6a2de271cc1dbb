//! A task's data: a JSON object, checked, compressed, and merged without touching what is not replaced.

use std::fmt;
use std::io::{Read, Write};

use flate2::Compression as Level;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use crate::{Compression, NewTask};

/// What gzip begins with, and JSON never.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// How stored data is compressed.
pub(crate) fn compression(stored: &[u8]) -> Compression {
    if stored.starts_with(&GZIP_MAGIC) { Compression::Gzip } else { Compression::None }
}

/// Check that the bytes are a JSON object.
///
/// # Errors
/// What is wrong, in words that fit behind "data: ".
pub(crate) fn check(data: &[u8]) -> Result<(), String> {
    // serde_json does not look into strings that it skips.
    let text = std::str::from_utf8(data).map_err(|error| format!("not a JSON object: {error}"))?;
    serde_json::from_str::<AnyObject>(text).map(drop).map_err(|error| format!("not a JSON object: {error}"))
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
    if compression(&stored) == Compression::None {
        return Ok(stored);
    }
    let mut data = Vec::with_capacity(stored.len().saturating_mul(3).min(NewTask::DATA_BYTES_MAX));
    let most = NewTask::DATA_BYTES_MAX as u64 + 1;
    GzDecoder::new(stored.as_slice()).take(most).read_to_end(&mut data).map_err(|error| format!("corrupt gzip: {error}"))?;
    if data.len() > NewTask::DATA_BYTES_MAX {
        return Err(format!("larger than {} bytes when decompressed", NewTask::DATA_BYTES_MAX));
    }
    Ok(data)
}

/// Set the members of one JSON object in another. Other members keep their place and their very bytes; new ones come last.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn merge(data: &[u8], members: &[u8]) -> Result<Vec<u8>, String> {
    let mut merged: Members<'_> =
        serde_json::from_slice(data).map_err(|error| format!("the stored data is not a JSON object: {error}"))?;
    let set: Members<'_> = serde_json::from_slice(members).map_err(|error| format!("not a JSON object: {error}"))?;
    let mut places: std::collections::HashMap<String, usize> =
        merged.0.iter().enumerate().map(|(place, (name, _))| (name.clone(), place)).collect();
    for (name, value) in set.0 {
        if let Some(&place) = places.get(&name) {
            merged.0[place].1 = value;
        } else {
            places.insert(name.clone(), merged.0.len());
            merged.0.push((name, value));
        }
    }
    serde_json::to_vec(&merged).map_err(|error| error.to_string())
}

/// Take the members of one name out of a JSON object: the value of the last of them as it was written, and the object without them. One that
/// has none keeps its very bytes.
///
/// # Errors
/// What is wrong, in words.
pub(crate) fn take_member(data: &[u8], name: &str) -> Result<(Option<String>, Vec<u8>), String> {
    let mut members: Members<'_> = serde_json::from_slice(data).map_err(|error| format!("not a JSON object: {error}"))?;
    let taken = members.0.iter().rfind(|(member, _)| member == name).map(|(_, value)| value.get().to_owned());
    if taken.is_none() {
        return Ok((None, data.to_vec()));
    }
    members.0.retain(|(member, _)| member != name);
    let rest = serde_json::to_vec(&members).map_err(|error| error.to_string())?;
    Ok((taken, rest))
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

/// The members of a JSON object in their order, each value as it was written.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Vec<(String, &'de RawValue)>;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(members)
            }
        }
        deserializer.deserialize_map(InOrder).map(Members)
    }
}

impl Serialize for Members<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
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
    fn only_an_object_is_data() {
        assert_eq!(check(br#"{"a":[1,{"b":null}]}"#), Ok(()));
        for wrong in [&b"[]"[..], b"1", b"null", b"", b"{", b"{} {}", b"{\"a\":\"\xff\"}", b"\"{}\""] {
            assert!(check(wrong).is_err_and(|problem| problem.starts_with("not a JSON object")), "{wrong:?}");
        }
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
