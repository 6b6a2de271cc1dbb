//! A version of a plugin: its digest, and its code ready to be instantiated.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use super::abi::PluginPre;
use super::usage::Share;

/// The sha256 of a plugin's file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The first 12 hexadecimal digits: enough for people to tell versions apart.
    #[must_use]
    pub fn short(&self) -> String {
        let mut text = self.to_string();
        text.truncate(12);
        text
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let text: String =
            self.0.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|half| DIGITS[usize::from(half)] as char).collect();
        formatter.write_str(&text)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One version of a plugin that has been compiled, linked and tried.
pub struct Version {
    pub(super) plugin: Arc<str>,
    pub(super) digest: Digest,
    /// The same in hexadecimal digits, which stands in every settlement.
    pub(super) digest_text: Arc<str>,
    pub(super) order: u64,
    pub(super) size_bytes: u64,
    /// Another version serves now, or none.
    pub(super) retired: AtomicBool,
    /// The share of its compiled code.
    pub(super) _code: Share,
    /// Linked code. Dropping the last version of a component frees its code and its pooled slots.
    pub(super) pre: PluginPre,
}

impl Version {
    /// The plugin's name.
    #[must_use]
    pub fn plugin(&self) -> &str {
        &self.plugin
    }

    /// The same, to be kept.
    #[must_use]
    pub fn plugin_shared(&self) -> Arc<str> {
        Arc::clone(&self.plugin)
    }

    /// The digest of its file.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The same in hexadecimal digits.
    #[must_use]
    pub fn digest_text(&self) -> &Arc<str> {
        &self.digest_text
    }

    /// Its place in the order of admission in this process, over all plugins: 1 is the first.
    #[must_use]
    pub fn order(&self) -> u64 {
        self.order
    }

    /// The size of its file.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it has been replaced or removed. Attempts that began on it still finish on it.
    #[must_use]
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::SeqCst)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Version")
            .field("plugin", &self.plugin)
            .field("digest", &self.digest)
            .field("order", &self.order)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_reads_as_sha256sum_writes_it() {
        let digest = Digest::of(b"");
        assert_eq!(digest.to_string(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_eq!(digest.short(), "e3b0c44298fc");
    }
}
