//! What the compiling child says about a module, and the file that carries it in front of the compiled code.
//!
//! ```text
//!   MAGIC | length of the report, u32 little-endian | report, JSON | compiled code, if the component fits the contract
//! ```

use serde::{Deserialize, Serialize};

use super::super::inspect::Item;

/// Changes with the layout of the file and with the meaning of the report.
pub(super) const MAGIC: &[u8; 8] = b"LAELAPS1";
/// The largest report that is read. The child keeps within [`super::super::fit::ITEMS_BYTES_MAX`], before JSON escapes it.
const REPORT_BYTES_MAX: usize = 1 << 20;

/// The child's answer about a module that it could compile.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// What the component needs, as far as it fits into the bound.
    pub(super) imports: Vec<Item>,
    /// What it provides, as far as it fits into the bound.
    pub(super) exports: Vec<Item>,
    /// Imports, exports and functions that did not fit into the bound.
    pub(super) left_out: usize,
    /// Why it does not fit the contract. Empty: it does, and code follows.
    pub(super) problems: Vec<String>,
    /// How the child was confined while it read the module.
    pub(super) confinement: Confinement,
}

/// What kept the compiling child from everything but its pipes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Confinement {
    /// A filter of system calls was in force.
    pub(crate) seccomp: bool,
    /// Landlock was in force, at least in part.
    pub(crate) landlock: bool,
}

impl Report {
    /// The file's beginning; compiled code follows it.
    pub(super) fn head(&self) -> Result<Vec<u8>, String> {
        let report = serde_json::to_vec(self).map_err(|error| error.to_string())?;
        let length = u32::try_from(report.len()).ok().filter(|_| report.len() <= REPORT_BYTES_MAX);
        let length = length.ok_or_else(|| format!("its report has {} bytes", report.len()))?;
        Ok([MAGIC.as_slice(), &length.to_le_bytes(), &report].concat())
    }

    /// The report of a file, and the compiled code after it.
    ///
    /// # Errors
    /// The file is not what a compiling child of this version writes.
    pub(super) fn split(file: &[u8]) -> Result<(Self, &[u8]), String> {
        let torn = || "it was not written by this version, or not to its end".to_owned();
        let rest = file.strip_prefix(MAGIC).ok_or_else(torn)?;
        let (length, rest) = rest.split_first_chunk::<4>().ok_or_else(torn)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if length > REPORT_BYTES_MAX {
            return Err(torn());
        }
        let (report, code) = rest.split_at_checked(length).ok_or_else(torn)?;
        let report = serde_json::from_slice(report).map_err(|error| format!("its report cannot be read: {error}"))?;
        Ok((report, code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_as_it_was_written_and_never_from_a_torn_file() {
        let report = Report { problems: vec!["no".into()], left_out: 3, ..Report::default() };
        let mut file = report.head().expect("small");
        let head_bytes = file.len();
        file.extend_from_slice(b"code");
        let (read, code) = Report::split(&file).expect("whole");
        assert_eq!((read.problems, read.left_out, code), (vec!["no".to_owned()], 3, &b"code"[..]));
        for end in 0..head_bytes {
            assert!(Report::split(&file[..end]).is_err(), "{end}");
        }
        let mut endless = file.clone();
        endless[MAGIC.len()..MAGIC.len() + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(Report::split(&endless).is_err());
    }
}
