//! What a guest does by a path below a folder that it holds. All of it blocks, and runs on the plugin's file threads.
//!
//! Paths never leave the folder: cap-primitives resolves them, by `openat2` with `RESOLVE_BENEATH` where the kernel has it, else name by
//! name. Operations on a name (remove, rename, link) resolve the folder of the name so, and then act on the name itself, which is never followed.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Component, Path};
use std::sync::Arc;

use cap_primitives::fs::{FollowSymlinks, Metadata, OpenOptions, OpenOptionsExt as _, open_dir, stat};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, Stat, Timestamps, linkat, mkdirat, renameat, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use wasmtime_wasi::p2::bindings::filesystem::types::{DescriptorFlags, ErrorCode, OpenFlags};

use super::handle::{Handle, code};
use super::quota::{Ledger, Quota, identity, stat_of};
use super::root::Identity;

/// The longest path, as for the system itself.
const PATH_BYTES_MAX: usize = 4_096;

/// How a guest wants something opened.
#[derive(Clone, Copy)]
pub(super) struct Wish {
    pub(super) follow: bool,
    pub(super) how: OpenFlags,
    pub(super) flags: DescriptorFlags,
}

impl Wish {
    /// Refuse what makes no sense, or what the grant does not allow, before the system sees it.
    pub(super) fn check(self, folder: &Handle) -> Result<(), ErrorCode> {
        let sync =
            DescriptorFlags::FILE_INTEGRITY_SYNC | DescriptorFlags::DATA_INTEGRITY_SYNC | DescriptorFlags::REQUESTED_WRITE_SYNC;
        if self.flags.intersects(sync) {
            return Err(ErrorCode::Unsupported);
        }
        let makes = OpenFlags::CREATE | OpenFlags::EXCLUSIVE | OpenFlags::TRUNCATE;
        if self.how.contains(OpenFlags::DIRECTORY) && self.how.intersects(makes) {
            return Err(ErrorCode::Invalid);
        }
        if self.writes() { folder.check_writable() } else { Ok(()) }
    }

    fn writes(self) -> bool {
        self.how.intersects(OpenFlags::CREATE | OpenFlags::TRUNCATE) || self.flags.contains(DescriptorFlags::WRITE)
    }

    fn reads(self) -> bool {
        // What is not opened to be written is opened to be read, since the system knows nothing else.
        self.flags.contains(DescriptorFlags::READ) || !self.flags.contains(DescriptorFlags::WRITE)
    }

    fn options(self) -> OpenOptions {
        // Nothing waits for the other end of a pipe, and no terminal becomes the host's.
        let never_wait = OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut options = OpenOptions::new();
        options
            .read(self.reads())
            .write(self.writes())
            .truncate(self.how.contains(OpenFlags::TRUNCATE))
            .create(self.how.contains(OpenFlags::CREATE))
            .create_new(self.how.contains(OpenFlags::CREATE | OpenFlags::EXCLUSIVE))
            ._cap_fs_ext_follow(FollowSymlinks::follow(self.follow))
            .custom_flags(never_wait.bits().cast_signed());
        options
    }
}

/// Open a file or a folder; anything else is refused, if possible before it is touched.
pub(super) fn open(folder: &Handle, path: &str, wish: Wish) -> Result<Handle, ErrorCode> {
    let path = checked(path)?;
    crate::fault::block_file(path);
    let (file, counted) = match folder.grant.ledger() {
        Some((ledger, quota)) => open_counted(folder, path, wish, ledger, quota)?,
        None => {
            is_there(folder, path, wish)?;
            (open_as(folder.file(), path, &wish.options())?, None)
        }
    };
    let handle = Handle::new(file, wish.reads(), wish.writes(), folder.grant.clone(), counted);
    let metadata = Metadata::from_file(handle.file()).map_err(code)?;
    check_type(&metadata)?;
    if metadata.is_dir() {
        return Ok(handle.into_folder());
    }
    if wish.how.contains(OpenFlags::DIRECTORY) { Err(ErrorCode::NotDirectory) } else { Ok(handle) }
}

/// Open, and count what is made by it. A guest cannot make or remove the name in between: that takes the names for change.
fn open_counted(
    folder: &Handle,
    path: &Path,
    wish: Wish,
    ledger: &Ledger,
    quota: Quota,
) -> Result<(File, Option<Identity>), ErrorCode> {
    let counted = |file: File, made: bool| {
        let stat = stat_of(&file)?;
        if made {
            ledger.named(Some(identity(&stat)));
        }
        ledger.opened(&stat, wish.how.contains(OpenFlags::TRUNCATE));
        Ok((file, Some(identity(&stat))))
    };
    {
        let _names = ledger.use_names();
        if is_there(folder, path, wish)? || !wish.how.contains(OpenFlags::CREATE) {
            return counted(open_as(folder.file(), path, &wish.options())?, false);
        }
    }
    let names = ledger.change_names();
    let made = !is_there(folder, path, wish)?;
    if made {
        ledger.may_name(quota, &names)?;
    }
    counted(open_as(folder.file(), path, &wish.options())?, made)
}

/// Whether a path leads to something now; what may not be opened is refused here, before it is touched.
fn is_there(folder: &Handle, path: &Path, wish: Wish) -> Result<bool, ErrorCode> {
    match stat(folder.file(), path, FollowSymlinks::follow(wish.follow)) {
        Ok(metadata) => check_type(&metadata).map(|()| true),
        Err(_) => Ok(false),
    }
}

fn open_as(folder: &File, path: &Path, options: &OpenOptions) -> Result<File, ErrorCode> {
    cap_primitives::fs::open(folder, path, options).map_err(code)
}

/// Pipes, sockets and devices are not for guests: to open one can wait for ever, or make a device do something.
fn check_type(metadata: &Metadata) -> Result<(), ErrorCode> {
    if metadata.is_file() || metadata.is_dir() || metadata.is_symlink() { Ok(()) } else { Err(ErrorCode::NotPermitted) }
}

pub(super) fn metadata(folder: &Handle, path: &str, follow: bool) -> Result<Metadata, ErrorCode> {
    stat(folder.file(), checked(path)?, FollowSymlinks::follow(follow)).map_err(code)
}

pub(super) fn read_link(folder: &Handle, path: &str) -> Result<String, ErrorCode> {
    let target = cap_primitives::fs::read_link(folder.file(), checked(path)?).map_err(code)?;
    String::from_utf8(target.into_os_string().into_vec()).map_err(|_| ErrorCode::IllegalByteSequence)
}

pub(super) fn set_times(folder: &Handle, path: &str, follow: bool, times: &Timestamps) -> Result<(), ErrorCode> {
    folder.check_writable()?;
    if follow {
        // Opened like everything else, so that a pipe keeps nobody waiting.
        let wish = |flags| Wish { follow, how: OpenFlags::empty(), flags };
        let opened = match open(folder, path, wish(DescriptorFlags::READ)) {
            Err(ErrorCode::Access) => open(folder, path, wish(DescriptorFlags::WRITE)),
            opened => opened,
        };
        return done(rustix::fs::futimens(opened?.file(), times));
    }
    let spot = Spot::of(folder, checked(path)?)?;
    done(utimensat(spot.folder(), spot.name, times, AtFlags::SYMLINK_NOFOLLOW))
}

pub(super) fn make_folder(folder: &Handle, path: &str) -> Result<(), ErrorCode> {
    let (ledger, quota) = folder.writable_ledger()?;
    // As mkdir has it, the slash of `new/` says nothing.
    let spot = Spot::of(folder, without_slashes(checked(path)?))?;
    make(ledger, quota, &spot, || mkdirat(spot.folder(), spot.name, Mode::from_raw_mode(0o777)))
}

pub(super) fn make_symlink(folder: &Handle, target: &str, path: &str) -> Result<(), ErrorCode> {
    let (ledger, quota) = folder.writable_ledger()?;
    // Guests could not follow it, but others might.
    if checked(target)?.has_root() {
        return Err(ErrorCode::NotPermitted);
    }
    let spot = Spot::of(folder, checked(path)?)?;
    make(ledger, quota, &spot, || symlinkat(target, spot.folder(), spot.name))
}

fn make(ledger: &Ledger, quota: Quota, spot: &Spot<'_>, make: impl FnOnce() -> rustix::io::Result<()>) -> Result<(), ErrorCode> {
    let names = ledger.change_names();
    // Without room for more, what is there already is still told as that.
    ledger.may_name(quota, &names).map_err(|error| if spot.stat().is_ok() { ErrorCode::Exist } else { error })?;
    done(make())?;
    ledger.named(spot.stat().ok().map(|stat| identity(&stat)));
    Ok(())
}

pub(super) fn link(from: &Handle, old: &str, to: &Handle, new: &str) -> Result<(), ErrorCode> {
    let (ledger, quota) = from.writable_ledger()?;
    let (other, _) = to.writable_ledger()?;
    if !Arc::ptr_eq(ledger, other) {
        return Err(ErrorCode::CrossDevice);
    }
    let (old, new) = (Spot::of(from, checked(old)?)?, Spot::of(to, checked(new)?)?);
    make(ledger, quota, &new, || linkat(old.folder(), old.name, new.folder(), new.name, AtFlags::empty()))
}

pub(super) fn remove(folder: &Handle, path: &str, flags: AtFlags) -> Result<(), ErrorCode> {
    let (ledger, _) = folder.writable_ledger()?;
    let spot = Spot::of(folder, checked(path)?)?;
    let _names = ledger.change_names();
    let before = spot.stat();
    done(unlinkat(spot.folder(), spot.name, flags))?;
    if let Ok(before) = before {
        ledger.unnamed(&before);
    }
    Ok(())
}

pub(super) fn rename(from: &Handle, old: &str, to: &Handle, new: &str) -> Result<(), ErrorCode> {
    let (ledger, _) = from.writable_ledger()?;
    let (other, quota) = to.writable_ledger()?;
    let (old, new) = (checked(old)?, checked(new)?);
    let must_be_folder = [old, new].iter().any(|path| path.as_os_str().as_bytes().ends_with(b"/"));
    let (old, new) = (Spot::of(from, without_slashes(old))?, Spot::of(to, without_slashes(new))?);
    // With a slash behind the name the system refuses to rename anything but a folder, and follows no link.
    let mut old_name = old.name.to_owned();
    if must_be_folder {
        old_name.push("/");
    }
    let act = || done(renameat(old.folder(), &*old_name, new.folder(), new.name));
    if Arc::ptr_eq(ledger, other) {
        let _names = ledger.change_names();
        let (source, replaced) = (old.stat(), new.stat());
        act()?;
        forget_replaced(ledger, source, replaced);
        return Ok(());
    }
    // Always in the same order, so that two guests never wait for each other.
    let (first, second) = if Arc::as_ptr(ledger) < Arc::as_ptr(other) { (ledger, other) } else { (other, ledger) };
    let _names = (first.change_names(), second.change_names());
    let source = old.stat().map_err(errno)?;
    let kind = FileType::from_raw_mode(source.st_mode);
    // What it holds, or who holds it, would be counted in the wrong place: to be copied instead, as from another disk.
    if !matches!(kind, FileType::RegularFile | FileType::Symlink) || source.st_nlink != 1 || !ledger.may_leave(&source) {
        return Err(ErrorCode::CrossDevice);
    }
    let replaced = new.stat();
    other.moved_in(quota, &source)?;
    if let Err(error) = act() {
        other.unnamed(&source);
        return Err(error);
    }
    ledger.unnamed(&source);
    forget_replaced(other, Ok(source), replaced);
    Ok(())
}

/// What stood under the new name is gone, unless both were names of one file: then nothing has changed.
fn forget_replaced(ledger: &Ledger, source: rustix::io::Result<Stat>, replaced: rustix::io::Result<Stat>) {
    if let (Ok(source), Ok(replaced)) = (source, replaced)
        && identity(&source) != identity(&replaced)
    {
        ledger.unnamed(&replaced);
    }
}

/// A name in the folder in which it is.
struct Spot<'a> {
    given: &'a File,
    opened: Option<File>,
    name: &'a OsStr,
}

impl<'a> Spot<'a> {
    fn of(start: &'a Handle, path: &'a Path) -> Result<Self, ErrorCode> {
        let (above, name) = split(path)?;
        let opened = if above.as_os_str().is_empty() { None } else { Some(open_dir(start.file(), above).map_err(code)?) };
        Ok(Self { given: start.file(), opened, name })
    }

    fn folder(&self) -> &File {
        self.opened.as_ref().unwrap_or(self.given)
    }

    fn stat(&self) -> rustix::io::Result<Stat> {
        statat(self.folder(), self.name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

/// The path of the folder and the name in it. A path that ends in a slash, `.` or `..` is a folder, and its name in itself is a dot.
fn split(path: &Path) -> Result<(&Path, &OsStr), ErrorCode> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(ErrorCode::NoEntry);
    }
    let is_folder = bytes.ends_with(b"/") || bytes.ends_with(b"/.");
    let mut components = path.components();
    match components.next_back() {
        Some(last @ (Component::Normal(_) | Component::CurDir)) if !is_folder => Ok((components.as_path(), last.as_os_str())),
        _ => Ok((path, Component::CurDir.as_os_str())),
    }
}

fn without_slashes(path: &Path) -> &Path {
    let mut bytes = path.as_os_str().as_bytes();
    while let [rest @ .., b'/'] = bytes {
        if rest.is_empty() {
            break;
        }
        bytes = rest;
    }
    Path::new(OsStr::from_bytes(bytes))
}

fn checked(path: &str) -> Result<&Path, ErrorCode> {
    if path.len() < PATH_BYTES_MAX { Ok(Path::new(path)) } else { Err(ErrorCode::NameTooLong) }
}

fn done(result: rustix::io::Result<()>) -> Result<(), ErrorCode> {
    result.map_err(errno)
}

fn errno(error: Errno) -> ErrorCode {
    code(error.into())
}
