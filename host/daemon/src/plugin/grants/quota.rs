//! What guests have made in a folder that they may write to, and whether they may make more.
//!
//! Counted is what guests make from the moment on at which this process first opens the folder to be written to; what lies there then is
//! free, and so is what others put there later. The count belongs to the folder: all grants of it share it, each with a limit of its own. It
//! is kept in memory, so it begins anew with the process. A file costs the bytes by which guests made it longer, holes included, and one of
//! the number of files for each name that guests gave it; a folder or a link costs one of the number. A file that guests did not make, but
//! made longer, costs one as well. Deleting gives back what the file cost once its last name is gone and the last handle is closed.
//!
//! What others delete is noticed only when a limit is reached: then the folder is looked through, at most for [`WALK_TIME`] and seldom.
//!
//! A guest must also not fill the disk on which the host itself may keep its queue: a part of it stays free of what guests write.

use std::collections::HashMap;
use std::fs::File;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat, fstat, fstatvfs, openat, statat};
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;

use super::root::Identity;

/// What stays free on a disk, or a twentieth of the disk if that is less.
const ROOM_KEPT_BYTES: u64 = 64 << 20;
/// Growth between two looks at the free space, at most.
const ROOM_STEP_BYTES: u64 = 64 << 20;
/// How long a folder is looked through at most.
const WALK_TIME: Duration = Duration::from_secs(2);
/// Time between two walks, as a multiple of the time that the last one took, and at least.
const WALK_REST_FACTOR: u32 = 20;
const WALK_REST_MIN: Duration = Duration::from_millis(200);
/// How deep a walk goes. What is deeper is left alone, and its count stays.
const WALK_DEPTH_MAX: usize = 64;
/// Folders of one folder, which a walk has to remember.
const WALK_FOLDERS_MAX: usize = 20_000;

/// What guests may make. None: no limit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quota {
    pub(super) bytes_max: Option<u64>,
    pub(super) files_max: Option<u64>,
}

/// What guests have made in one folder.
pub(super) struct Ledger {
    folder: Arc<File>,
    /// Written while names change, so that a name means the same file from the look at it to its removal.
    names: RwLock<()>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    files: HashMap<Identity, Entry>,
    /// The sums over `files`.
    cost: Cost,
    /// Names that could not be looked at after they were made: counted, and never given back.
    unknown_names: u64,
    /// Bytes that may be written before the free space is looked at again.
    room_bytes: u64,
    /// When the folder may be looked through again.
    walk_after: Option<Instant>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    bytes: u64,
    files: u64,
}

/// A file that guests made, made longer, or have open.
#[derive(Clone, Debug, Default)]
struct Entry {
    /// Names that guests gave it.
    names: u64,
    /// Open handles of guests.
    handles: u64,
    /// Bytes by which guests made it longer.
    bytes: u64,
    /// Its size as far as it is known.
    size: u64,
    /// It has no name any more.
    gone: bool,
}

impl Entry {
    fn cost(&self) -> Cost {
        let grown = u64::from(self.bytes > 0 && !self.gone);
        Cost { bytes: self.bytes, files: if self.names > 0 { self.names } else { grown } }
    }

    fn is_idle(&self) -> bool {
        self.handles == 0 && (self.gone || self.cost() == Cost::default())
    }
}

impl State {
    fn change<T>(&mut self, file: Identity, change: impl FnOnce(&mut Entry) -> T) -> T {
        let entry = self.files.entry(file).or_default();
        let before = entry.cost();
        let result = change(entry);
        let is_idle = entry.is_idle();
        let after = if is_idle { Cost::default() } else { entry.cost() };
        self.cost.bytes = self.cost.bytes - before.bytes + after.bytes;
        self.cost.files = self.cost.files - before.files + after.files;
        if is_idle {
            self.files.remove(&file);
        }
        result
    }

    fn has_place(&self, quota: Quota, growth: Cost) -> bool {
        let within =
            |now: u64, more: u64, most: Option<u64>| most.is_none_or(|most| more == 0 || now.saturating_add(more) <= most);
        within(self.cost.bytes, growth.bytes, quota.bytes_max)
            && within(self.cost.files.saturating_add(self.unknown_names), growth.files, quota.files_max)
    }
}

impl Ledger {
    pub(super) fn new(folder: Arc<File>) -> Self {
        Self { folder, names: RwLock::default(), state: Mutex::default() }
    }

    /// Held while names are made, changed or removed.
    pub(super) fn change_names(&self) -> RwLockWriteGuard<'_, ()> {
        self.names.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Held while a file that is there is opened.
    pub(super) fn use_names(&self) -> RwLockReadGuard<'_, ()> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether guests may make one more file. Only while names are held for change, and the name is then [`Ledger::named`].
    pub(super) fn may_name(&self, quota: Quota, names: &RwLockWriteGuard<'_, ()>) -> Result<(), ErrorCode> {
        let growth = Cost { bytes: 0, files: 1 };
        if self.state().has_place(quota, growth) {
            return Ok(());
        }
        self.walk(names);
        if self.state().has_place(quota, growth) { Ok(()) } else { Err(ErrorCode::Quota) }
    }

    /// A guest has given a file its first name or another one; None if it cannot be looked at.
    pub(super) fn named(&self, file: Option<Identity>) {
        let mut state = self.state();
        match file {
            Some(file) => state.change(file, |entry| {
                entry.names += 1;
                entry.gone = false;
            }),
            None => state.unknown_names += 1,
        }
    }

    /// A name was removed, of what it stood for before.
    pub(super) fn unnamed(&self, before: &Stat) {
        let is_folder = FileType::from_raw_mode(before.st_mode) == FileType::Directory;
        let last = is_folder || before.st_nlink <= 1;
        let mut state = self.state();
        state.change(identity(before), |entry| {
            entry.names = if last { 0 } else { entry.names.saturating_sub(1) };
            entry.gone = last;
        });
    }

    /// A file has come from another ledger with all its bytes.
    pub(super) fn moved_in(&self, quota: Quota, file: &Stat) -> Result<(), ErrorCode> {
        let bytes = u64::try_from(file.st_size).unwrap_or(0);
        let mut state = self.state();
        if !state.has_place(quota, Cost { bytes, files: 1 }) {
            return Err(ErrorCode::Quota);
        }
        state.change(identity(file), |entry| {
            entry.names += 1;
            entry.bytes = bytes;
            entry.size = bytes;
        });
        Ok(())
    }

    /// A file leaves for another ledger. Not while guests have it open: what they write through their handles is counted here.
    pub(super) fn may_leave(&self, file: &Stat) -> bool {
        self.state().files.get(&identity(file)).is_none_or(|entry| entry.handles == 0)
    }

    /// A guest has opened a file.
    pub(super) fn opened(&self, file: &Stat, truncated: bool) {
        let size = u64::try_from(file.st_size).unwrap_or(0);
        let mut state = self.state();
        let begin = |entry: &mut Entry| {
            entry.handles += 1;
            if truncated {
                entry.bytes = 0;
                entry.size = size;
            } else if entry.handles == 1 {
                entry.size = size;
                entry.bytes = entry.bytes.min(size);
            }
        };
        state.change(identity(file), begin);
    }

    /// A guest has closed a file.
    pub(super) fn closed(&self, file: Identity) {
        self.state().change(file, |entry| entry.handles = entry.handles.saturating_sub(1));
    }

    /// Where a write of so many bytes at the end of a file begins, as far as is known.
    pub(super) fn end_of(&self, file: Identity) -> u64 {
        self.state().files.get(&file).map_or(0, |entry| entry.size)
    }

    /// A guest is about to write up to `end`, or to make the file so long. What it adds is counted before.
    pub(super) fn grow(&self, quota: Quota, file: Identity, handle: &File, end: u64) -> Result<(), ErrorCode> {
        if self.try_grow(quota, file, handle, end)? {
            return Ok(());
        }
        let names = self.change_names();
        self.walk(&names);
        drop(names);
        if self.try_grow(quota, file, handle, end)? { Ok(()) } else { Err(ErrorCode::Quota) }
    }

    fn try_grow(&self, quota: Quota, file: Identity, handle: &File, end: u64) -> Result<bool, ErrorCode> {
        let mut state = self.state();
        let Some(entry) = state.files.get(&file) else { return Err(ErrorCode::Io) };
        let bytes = end.saturating_sub(entry.size);
        if bytes == 0 {
            return Ok(true);
        }
        let files = u64::from(entry.cost().files == 0 && !entry.gone);
        if !state.has_place(quota, Cost { bytes, files }) {
            return Ok(false);
        }
        if bytes > state.room_bytes {
            drop(state);
            let room = room_bytes(handle);
            if bytes > room {
                return Err(ErrorCode::InsufficientSpace);
            }
            state = self.state();
            // Others write as well: only a part of the room is used before the next look.
            state.room_bytes = ((room - bytes) / 8).min(ROOM_STEP_BYTES).saturating_add(bytes);
            if !state.has_place(quota, Cost { bytes, files }) {
                return Ok(false);
            }
        }
        state.room_bytes = state.room_bytes.saturating_sub(bytes);
        // Another guest may have made it longer meanwhile; then less is counted.
        state.change(file, |entry| {
            let bytes = end.saturating_sub(entry.size);
            entry.bytes += bytes;
            entry.size += bytes;
        });
        Ok(true)
    }

    /// A guest has written up to `end`. If that is less than it was about to, `size` is what the file has now.
    pub(super) fn wrote(&self, file: Identity, end: u64, size: Option<u64>) {
        self.state().change(file, |entry| {
            if let Some(size) = size.filter(|size| *size < entry.size) {
                entry.bytes = entry.bytes.saturating_sub(entry.size - size);
                entry.size = size;
            }
            // Another write that failed meanwhile may have taken it off.
            let missing = end.saturating_sub(entry.size);
            entry.bytes += missing;
            entry.size += missing;
        });
    }

    /// Find out which files others have deleted or cut, unless the last walk was a moment ago.
    fn walk(&self, _names: &RwLockWriteGuard<'_, ()>) {
        let begun = Instant::now();
        if self.state().walk_after.is_some_and(|after| begun < after) {
            return;
        }
        let mut found = HashMap::new();
        let whole = look_through(&self.folder, begun, &mut |identity, size| {
            if self.state().files.contains_key(&identity) {
                found.insert(identity, size);
            }
        });
        let mut state = self.state();
        state.walk_after = Some(begun + (begun.elapsed() * WALK_REST_FACTOR).max(WALK_REST_MIN) + begun.elapsed());
        if !whole {
            return;
        }
        let known: Vec<Identity> = state.files.keys().copied().collect();
        for file in known {
            state.change(file, |entry| match found.get(&file) {
                None => {
                    entry.gone = true;
                    entry.names = 0;
                }
                // A write under way may be counted, but not be in its size yet.
                Some(size) if entry.handles == 0 => {
                    entry.bytes = entry.bytes.min(*size);
                    entry.size = *size;
                }
                Some(_) => {}
            });
        }
    }

    /// Bytes and files that guests have made.
    #[cfg(test)]
    pub(super) fn made(&self) -> (u64, u64) {
        let state = self.state();
        (state.cost.bytes, state.cost.files + state.unknown_names)
    }

    /// A panic while the lock was held cannot have left a half-changed state.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn identity(stat: &Stat) -> Identity {
    Identity { device: stat.st_dev, inode: stat.st_ino }
}

/// What guests may still write to the disk of this file. A file system that does not say has room.
fn room_bytes(file: &File) -> u64 {
    match fstatvfs(file) {
        Ok(disk) if disk.f_blocks > 0 => {
            let bytes = |blocks: u64| blocks.saturating_mul(disk.f_frsize.max(1));
            bytes(disk.f_bavail).saturating_sub(ROOM_KEPT_BYTES.min(bytes(disk.f_blocks) / 20))
        }
        _ => u64::MAX,
    }
}

/// Tell of every file below a folder with its size. Answers whether all of it was seen.
fn look_through(folder: &File, begun: Instant, tell: &mut impl FnMut(Identity, u64)) -> bool {
    let open = |at: &dyn AsFd, name: &std::ffi::CStr| -> rustix::io::Result<OwnedFd> {
        openat(at.as_fd(), name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
    };
    let Ok(top) = open(folder, c".") else { return false };
    let mut open_folders = vec![(top, Vec::new(), false)];
    let mut buffer = [MaybeUninit::uninit(); 8 << 10];
    while let Some((at, below, read)) = open_folders.last_mut() {
        if !*read {
            *read = true;
            let mut entries = RawDir::new(&*at, &mut buffer);
            while let Some(entry) = entries.next() {
                let Ok(entry) = entry else { return false };
                let name = entry.file_name();
                if name == c"." || name == c".." {
                    continue;
                }
                if begun.elapsed() > WALK_TIME {
                    return false;
                }
                match statat(&*at, name, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => {
                        tell(identity(&stat), u64::try_from(stat.st_size).unwrap_or(0));
                        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                            below.push(name.to_owned());
                        }
                        if below.len() > WALK_FOLDERS_MAX {
                            return false;
                        }
                    }
                    Err(rustix::io::Errno::NOENT) => {}
                    Err(_) => return false,
                }
            }
        }
        match below.pop() {
            Some(name) => {
                let next = match open(at, &name) {
                    Ok(next) => next,
                    Err(rustix::io::Errno::NOENT) => continue,
                    Err(_) => return false,
                };
                if open_folders.len() >= WALK_DEPTH_MAX {
                    return false;
                }
                open_folders.push((next, Vec::new(), false));
            }
            None => {
                open_folders.pop();
            }
        }
    }
    true
}

/// A file's state as the ledger needs it.
pub(super) fn stat_of(file: &File) -> Result<Stat, ErrorCode> {
    fstat(file).map_err(|error| ErrorCode::from(std::io::Error::from(error)))
}
