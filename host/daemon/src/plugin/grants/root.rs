//! Granted folders: found, opened, and kept open.
//!
//! The configured path may contain symbolic links (Kubernetes mounts are links). It is followed one name at a time, never by the kernel on
//! its own, so that every folder in which a name is looked up is known. None of them may be a folder that handlers can write to: there a
//! guest could rename what the path needs and put a link in its place. What the path leads to is opened without following anything further,
//! kept open, and shared by all attempts. Before each attempt the path is asked again what it leads to; only if that is another folder (an
//! operator has mounted or replaced it) is it followed and opened anew.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fd::OwnedFd;
use rustix::fs::{CWD, Mode, OFlags, fstat, openat, readlinkat};
use rustix::io::Errno;

use super::quota::Ledger;
use crate::plugin::FolderGrant;

/// Symbolic links on the way to a granted folder, as many as the kernel follows itself.
const LINKS_MAX: u32 = 40;

/// Which file or folder it is, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
}

/// The granted folders that are open, by their configured paths.
#[derive(Default)]
pub(in crate::plugin) struct Roots {
    open: Mutex<HashMap<PathBuf, Arc<Mutex<Option<Root>>>>>,
    /// What guests have made in each folder that was ever opened to be written to. These are also the folders that no granted path may
    /// pass through.
    ledgers: Mutex<HashMap<Identity, Arc<Ledger>>>,
}

#[derive(Clone)]
struct Root {
    folder: Arc<File>,
    identity: Identity,
}

/// The way to a folder.
struct Way {
    /// Every folder in which a name was looked up.
    passed: Vec<Identity>,
    /// Where it ends: an `O_PATH` descriptor.
    end: io::Result<OwnedFd>,
}

impl Roots {
    /// The folder of a grant, and what guests have made in it if it may be written to. Blocks.
    ///
    /// # Errors
    /// It cannot be opened, or its path passes through a folder that handlers may write to.
    pub(super) fn open(&self, grant: &FolderGrant) -> io::Result<(Arc<File>, Option<Arc<Ledger>>)> {
        let place = lock(&self.open).entry(grant.host.clone()).or_default().clone();
        let root = {
            let mut kept = lock(&place);
            let now =
                std::fs::metadata(&grant.host).map(|metadata| Identity { device: metadata.dev(), inode: metadata.ino() }).ok();
            match &*kept {
                Some(root) if Some(root.identity) == now => root.clone(),
                before => {
                    let root = self.find(&grant.host, before.as_ref());
                    *kept = root.as_ref().ok().cloned();
                    root?
                }
            }
        };
        if !grant.writable {
            return Ok((root.folder, None));
        }
        let mut ledgers = lock(&self.ledgers);
        if !ledgers.contains_key(&root.identity) {
            self.forget_replaced(&mut ledgers);
        }
        let ledger = ledgers.entry(root.identity).or_insert_with(|| Arc::new(Ledger::new(root.folder.clone()))).clone();
        Ok((root.folder, Some(ledger)))
    }

    /// Let go of folders to which no grant leads any more and in which no attempt is left.
    fn forget_replaced(&self, ledgers: &mut HashMap<Identity, Arc<Ledger>>) {
        let mut kept = HashSet::new();
        for place in lock(&self.open).values() {
            // Somebody is about to find out where it leads: another time.
            let Ok(root) = place.try_lock() else { return };
            kept.extend(root.as_ref().map(|root| root.identity));
        }
        ledgers.retain(|identity, ledger| kept.contains(identity) || Arc::strong_count(ledger) > 1);
    }

    /// Folders whose counts are kept.
    #[cfg(test)]
    pub(super) fn counted(&self) -> usize {
        lock(&self.ledgers).len()
    }

    /// Follow a path. If guests can change where it leads, it leads where it led before.
    fn find(&self, path: &Path, before: Option<&Root>) -> io::Result<Root> {
        let way = follow(path)?;
        let within = {
            let ledgers = lock(&self.ledgers);
            way.passed.iter().any(|passed| ledgers.contains_key(passed))
        };
        match before {
            Some(before) if within => return Ok(before.clone()),
            None if within => return Err(io::Error::other("it lies within a folder that handlers may write to")),
            _ => {}
        }
        let folder = openat(way.end?, c".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let identity = identity(&folder)?;
        Ok(Root { folder: Arc::new(File::from(folder)), identity })
    }
}

/// Grants that lie strictly within a writable one, as places in the list: (inner, outer). Guests could change where their paths lead. Blocks.
pub(crate) fn nested(grants: &[&FolderGrant]) -> Vec<(usize, usize)> {
    let mut ways: HashMap<&Path, Way> = HashMap::new();
    for grant in grants {
        let failed = |error| Way { passed: Vec::new(), end: Err(error) };
        ways.entry(&grant.host).or_insert_with(|| follow(&grant.host).unwrap_or_else(failed));
    }
    let mut outer_by_identity: HashMap<Identity, usize> = HashMap::new();
    let mut outer_by_path: HashMap<PathBuf, usize> = HashMap::new();
    for (place, grant) in grants.iter().enumerate().filter(|(_, grant)| grant.writable) {
        let end = ways.get(&*grant.host).and_then(|way| way.end.as_ref().ok()).and_then(|end| identity(end).ok());
        if let Some(end) = end {
            outer_by_identity.entry(end).or_insert(place);
        }
        // A folder that is not there yet is known by its name only.
        outer_by_path.entry(plain(&grant.host)).or_insert(place);
    }
    let mut seen = HashSet::new();
    let inner = grants.iter().enumerate().filter_map(|(place, grant)| {
        let way = ways.get(&*grant.host)?;
        let by_identity = way.passed.iter().rev().find_map(|passed| outer_by_identity.get(passed));
        let path = plain(&grant.host);
        let by_path = || path.ancestors().skip(1).find_map(|above| outer_by_path.get(above));
        Some((place, *by_identity.or_else(by_path)?))
    });
    // The same pair of paths once, however many routes grant them.
    inner.filter(|(inner, outer)| seen.insert((&grants[*inner].host, &grants[*outer].host))).collect()
}

/// Absolute and without superfluous dots and slashes; links and `..` stay.
fn plain(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())
}

/// Follow a path, one name at a time.
fn follow(path: &Path) -> io::Result<Way> {
    let path = std::path::absolute(path)?;
    let mut passed = Vec::new();
    let end = walk(&path, &mut passed);
    Ok(Way { passed, end })
}

fn walk(path: &Path, passed: &mut Vec<Identity>) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = || openat(CWD, c"/", flags, Mode::empty());
    let mut at = top()?;
    let mut left = names(path);
    let mut links = 0;
    while let Some(name) = left.pop() {
        passed.push(identity(&at)?);
        match openat(&at, &*name, flags, Mode::empty()) {
            Ok(next) => at = next,
            // A link is no folder; what is neither is no way either.
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let target = readlinkat(&at, &*name, Vec::new())
                    .map_err(|error| if error == Errno::INVAL { Errno::NOTDIR } else { error })?;
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP.into());
                }
                let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                if target.has_root() {
                    at = top()?;
                }
                left.append(&mut names(&target));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(at)
}

/// The names of a path, the first at the end.
fn names(path: &Path) -> Vec<OsString> {
    let named = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        Component::Prefix(_) | Component::RootDir | Component::CurDir => None,
    };
    path.components().rev().filter_map(named).collect()
}

fn identity(folder: &OwnedFd) -> io::Result<Identity> {
    let stat = fstat(folder)?;
    Ok(Identity { device: stat.st_dev, inode: stat.st_ino })
}

/// A panic while the lock was held cannot have left a half-changed map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
