//! The node under which a queue or a fleet lives, and the names below it.

use crate::{Error, Result};

/// The data of a queue's root.
pub(crate) const QUEUE_ROOT: &[u8] = b"watchdog";
/// The data of a queue's root while its items are still being made in more than one step. Perl peers do not look at it.
pub(crate) const HALF_FILLED_ROOT: &[u8] = b"watchdog, being filled";
/// The data of a fleet's root, which tells it from a queue's.
pub(crate) const FLEET_ROOT: &[u8] = b"laelaps fleet";
/// The data of the root for the markers of items that are being moved, likewise.
pub(crate) const MARKERS_ROOT: &[u8] = b"laelaps markers";

/// How items are called: this and ten digits.
pub(crate) const ITEM_PREFIX: &str = "queue-";
/// How timers are called: this and ten digits.
pub(crate) const TIMER_PREFIX: &str = "timer-";
/// The start barrier.
pub(crate) const BARRIER: &str = "sync";

/// Bytes of a root's path at most, so that a request's size is bounded by its data.
const PATH_BYTES_MAX: usize = 1_024;

/// The checked path of a root, as seen from the session's chroot. Never `/` itself, never below `/zookeeper`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Root(String);

impl Root {
    /// Checks a path.
    ///
    /// # Errors
    /// [`Error::Config`] if it does not begin with a slash, ends with one, is `/`, has an empty, `.` or `..` part or a control character, is
    /// longer than 1,024 bytes, or lies below `/zookeeper`.
    pub fn new(path: impl Into<String>) -> Result<Root> {
        let path = path.into();
        match wrong_with(&path) {
            None => Ok(Root(path)),
            Some(problem) => Err(Error::config("root", &path, problem)),
        }
    }

    /// The path.
    pub fn path(&self) -> &str {
        &self.0
    }

    /// The path of the node above; `/` if there is none but the chroot.
    pub fn parent(&self) -> &str {
        match self.0.rfind('/') {
            None | Some(0) => "/",
            Some(at) => &self.0[..at],
        }
    }

    /// The path of a child.
    pub fn child(&self, name: &str) -> String {
        format!("{}/{name}", self.0)
    }
}

impl std::fmt::Display for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// What is wrong with a path, if anything.
pub(crate) fn wrong_with(path: &str) -> Option<String> {
    let Some(below) = path.strip_prefix('/') else { return Some("a path begins with a slash".to_owned()) };
    if below.is_empty() {
        return Some("the top itself cannot be used, name a node below it".to_owned());
    }
    if path.len() > PATH_BYTES_MAX {
        return Some(format!("{} bytes, at most {PATH_BYTES_MAX} are allowed", path.len()));
    }
    if path.ends_with('/') {
        return Some("a path does not end with a slash".to_owned());
    }
    if path.chars().any(char::is_control) {
        return Some("a path has no control characters".to_owned());
    }
    if let Some(part) = below.split('/').find(|part| matches!(*part, "" | "." | "..")) {
        return Some(format!("{part:?} is not a name"));
    }
    (below == "zookeeper" || below.starts_with("zookeeper/")).then(|| "/zookeeper belongs to the servers".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_that_zookeeper_would_refuse_is_refused_with_the_reason() {
        for (path, reason) in [
            ("", "begins with a slash"),
            ("jobs", "begins with a slash"),
            ("/", "the top itself"),
            ("/jobs/", "end with a slash"),
            ("/a//b", "not a name"),
            ("/a/../b", "not a name"),
            ("/a\u{1}", "control"),
            ("/zookeeper/quota", "belongs to the servers"),
        ] {
            let error = Root::new(path).unwrap_err().to_string();
            assert!(error.contains(reason), "{path:?}: {error}");
        }
        assert!(Root::new(format!("/{}", "x".repeat(1_024))).is_err());
    }

    #[test]
    fn a_root_knows_its_parent_and_its_children() {
        let root = Root::new("/jobs/nightly").unwrap();
        assert_eq!((root.parent(), root.child("sync").as_str()), ("/jobs", "/jobs/nightly/sync"));
        assert_eq!(Root::new("/jobs").unwrap().parent(), "/");
    }
}
