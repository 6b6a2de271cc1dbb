//! What lies in the plugin folder, and whether it lies still.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The largest module that is read: the host holds it in memory until it is admitted. Those of Python and JavaScript have 12 to 18 MB.
pub(crate) const MODULE_BYTES_MAX: u64 = 128 << 20;
/// The longest name of a plugin.
pub(crate) const NAME_BYTES_MAX: usize = 128;
/// The most entries of the folder that are looked at.
const ENTRIES_MAX: usize = 10_000;

/// What tells one content of a file from another without reading it. A file that is replaced, or written to, gets another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    /// Changes even where a copy sets the time of modification back.
    changed: (i64, i64),
}

impl Signature {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The plugins that a folder holds, and the names that look like plugins but cannot be.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    pub(crate) files: BTreeMap<String, Signature>,
    pub(crate) misnamed: Vec<String>,
    /// The folder itself, so that its replacement is noticed.
    pub(super) folder: Option<(u64, u64)>,
}

/// What reading a file came to.
pub(crate) enum Content {
    /// It is whole, and has not changed since the folder was listed.
    Whole(Vec<u8>),
    /// It changed meanwhile, or is gone.
    Unsettled,
    /// It cannot be read, or is nothing to be read.
    Unreadable(String),
}

/// List a folder. Symbolic links count as what they lead to; those that lead nowhere do not count.
pub(crate) fn list(folder: &Path) -> io::Result<Listing> {
    let metadata = fs::metadata(folder)?;
    let mut listing = Listing { folder: Some((metadata.dev(), metadata.ino())), ..Listing::default() };
    for entry in fs::read_dir(folder)?.take(ENTRIES_MAX) {
        let entry = entry?;
        let name = entry.file_name();
        let Some(plugin) = name.to_str().map_or(Some(Err(())), |name| plugin_name(name).transpose()) else { continue };
        match (plugin, fs::metadata(entry.path())) {
            (Ok(plugin), Ok(metadata)) => {
                listing.files.insert(plugin.to_owned(), Signature::of(&metadata));
            }
            (Err(()), Ok(_)) => listing.misnamed.push(name.to_string_lossy().into_owned()),
            (_, Err(_)) => {}
        }
    }
    Ok(listing)
}

/// The plugin of a file's name: None if it is no module, an error if it is one with a name that no plugin can have.
pub(crate) fn plugin_name(file: &str) -> Result<Option<&str>, ()> {
    let Some(name) = file.strip_suffix(".wasm") else { return Ok(None) };
    if name.is_empty() || name.starts_with('.') {
        // Hidden: how editors and copying programs name what is not complete yet.
        return Ok(None);
    }
    if is_name(name) { Ok(Some(name)) } else { Err(()) }
}

/// Whether a plugin can have this name.
pub(crate) fn is_name(name: &str) -> bool {
    let is_sane = |character: char| character.is_ascii_alphanumeric() || "._-".contains(character);
    (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.starts_with('.') && name.chars().all(is_sane)
}

/// Why a file that looks like a plugin by its name is none.
pub(crate) fn misnamed() -> String {
    format!("no plugin can have this name: it has letters, digits, dots, dashes and underscores, at most {NAME_BYTES_MAX}")
}

/// The file of a plugin.
pub(crate) fn path(folder: &Path, plugin: &str) -> PathBuf {
    folder.join(format!("{plugin}.wasm"))
}

/// Read a file whole, if it is still the one that was listed, and still that afterwards.
pub(crate) fn read(path: &Path, listed: Signature) -> Content {
    match read_as_listed(path, listed) {
        Ok(content) => content,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Content::Unsettled,
        Err(error) => Content::Unreadable(format!("the file cannot be read: {error}")),
    }
}

fn read_as_listed(path: &Path, listed: Signature) -> io::Result<Content> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Ok(Content::Unreadable("it is not a file".into()));
    }
    if metadata.size() > MODULE_BYTES_MAX {
        return Ok(Content::Unreadable(format!(
            "the file has {} bytes, more than the {MODULE_BYTES_MAX} allowed",
            metadata.size()
        )));
    }
    // Not blocking, in case that it has become a pipe since it was looked at.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    if Signature::of(&file.metadata()?) != listed {
        return Ok(Content::Unsettled);
    }
    let bytes = read_whole(&file, metadata.size())?;
    let is_same = |metadata: &Metadata| Signature::of(metadata) == listed;
    if is_same(&file.metadata()?) && is_same(&fs::metadata(path)?) && bytes.len() as u64 == metadata.size() {
        Ok(Content::Whole(bytes))
    } else {
        Ok(Content::Unsettled)
    }
}

fn read_whole(file: &File, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    file.take(MODULE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_wasm_files_with_sane_names_are_plugins() {
        assert_eq!(plugin_name("mail.wasm"), Ok(Some("mail")));
        assert_eq!(plugin_name("a.b-c_d.1.wasm"), Ok(Some("a.b-c_d.1")));
        for other in ["mail.cwasm", "mail", "mail.wasm~", ".mail.wasm", ".wasm", "..data"] {
            assert_eq!(plugin_name(other), Ok(None), "{other}");
        }
        for bad in ["a b.wasm", "\u{e9}.wasm", &format!("{}.wasm", "x".repeat(129))] {
            assert_eq!(plugin_name(bad), Err(()), "{bad}");
        }
    }

    #[test]
    fn a_file_that_changed_since_it_was_listed_is_not_read() {
        let folder = tempfile::tempdir().expect("folder");
        let file = path(folder.path(), "a");
        fs::write(&file, "one").expect("written");
        let listed = list(folder.path()).expect("listed").files["a"];
        assert!(matches!(read(&file, listed), Content::Whole(bytes) if bytes == b"one"));
        fs::write(&file, "other").expect("written");
        assert!(matches!(read(&file, listed), Content::Unsettled));
        fs::remove_file(&file).expect("removed");
        assert!(matches!(read(&file, listed), Content::Unsettled));
    }

    #[test]
    fn folders_and_links_that_lead_nowhere_are_told_apart_from_files() {
        let folder = tempfile::tempdir().expect("folder");
        fs::create_dir(folder.path().join("dir.wasm")).expect("made");
        std::os::unix::fs::symlink("nowhere", folder.path().join("link.wasm")).expect("linked");
        fs::write(folder.path().join("bad name.wasm"), "").expect("written");
        let listing = list(folder.path()).expect("listed");
        assert_eq!(listing.files.keys().collect::<Vec<_>>(), ["dir"]);
        assert_eq!(listing.misnamed, ["bad name.wasm"]);
        assert!(matches!(read(&path(folder.path(), "dir"), listing.files["dir"]), Content::Unreadable(_)));
    }
}
