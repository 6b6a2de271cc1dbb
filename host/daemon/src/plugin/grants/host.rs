//! `wasi:filesystem` as guests see it: the functions of the contract, each handed to the plugin's file threads.
//!
//! The semantics are those of wasmtime-wasi's own implementation, which has no place for what is different here: operations run on threads of
//! the plugin, what guests make is counted, folders are listed piece by piece, and pipes and devices cannot be opened.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::num::NonZeroU64;
use std::sync::Arc;

use cap_primitives::fs::{FileTypeExt as _, Metadata, MetadataExt as _};
use rustix::fs::{AtFlags, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, fadvise, fcntl_getfl, futimens};
use wasmtime::component::{Resource, ResourceTable};
use wasmtime_wasi::p2::bindings::clocks::wall_clock::Datetime;
use wasmtime_wasi::p2::bindings::filesystem::preopens;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    self, Advice, DescriptorFlags, DescriptorStat, DescriptorType, DirectoryEntry, ErrorCode, Filesize, HostDescriptor,
    HostDirectoryEntryStream, MetadataHashValue, NewTimestamp, OpenFlags, PathFlags,
};
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, FsError, FsResult};

use super::Files;
use super::handle::{Handle, PIECE_BYTES_MAX, code};
use super::path::{self, Wish};
use super::stream::{Listing, Reader, Writer};

/// The files of one instance, while it calls the host.
pub(in crate::plugin) struct FilesView<'a> {
    pub(in crate::plugin) files: &'a Files,
    pub(in crate::plugin) table: &'a mut ResourceTable,
}

/// What a guest's descriptor stands for. Bindings know it by the name of wasmtime-wasi's own type, of which there is none here.
type Descriptor = Resource<types::Descriptor>;
type Entries = Resource<types::DirectoryEntryStream>;

impl FilesView<'_> {
    fn handle(&self, descriptor: &Descriptor) -> FsResult<Arc<Handle>> {
        Ok(self.table.get(&Resource::<Arc<Handle>>::new_borrow(descriptor.rep()))?.clone())
    }

    fn folder(&self, descriptor: &Descriptor) -> FsResult<Arc<Handle>> {
        let handle = self.handle(descriptor)?;
        if handle.is_folder { Ok(handle) } else { Err(ErrorCode::NotDirectory.into()) }
    }

    fn file(&self, descriptor: &Descriptor) -> FsResult<Arc<Handle>> {
        let handle = self.handle(descriptor)?;
        if handle.is_folder { Err(ErrorCode::BadDescriptor.into()) } else { Ok(handle) }
    }

    fn keep(&mut self, handle: Arc<Handle>) -> FsResult<Descriptor> {
        Ok(Resource::new_own(self.table.push(handle)?.rep()))
    }
}

/// Run something on the plugin's file threads.
async fn on<T, F>(handle: Arc<Handle>, body: F) -> FsResult<T>
where
    T: Send + 'static,
    F: FnOnce(Arc<Handle>) -> Result<T, ErrorCode> + Send + 'static,
{
    let pool = handle.grant.pool.clone();
    match pool.run(move || body(handle)).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(ErrorCode::Io.into()),
    }
}

impl preopens::Host for FilesView<'_> {
    fn get_directories(&mut self) -> wasmtime::Result<Vec<(Descriptor, String)>> {
        let mut granted = Vec::with_capacity(self.files.granted.len());
        for (handle, name) in &self.files.granted {
            let index = self.table.push(handle.clone())?;
            granted.push((Resource::new_own(index.rep()), name.clone()));
        }
        Ok(granted)
    }
}

impl types::Host for FilesView<'_> {
    fn convert_error_code(&mut self, error: FsError) -> wasmtime::Result<ErrorCode> {
        error.downcast()
    }

    fn filesystem_error_code(&mut self, error: Resource<wasmtime::Error>) -> wasmtime::Result<Option<ErrorCode>> {
        Ok(self.table.get(&error)?.downcast_ref::<ErrorCode>().copied())
    }
}

impl HostDescriptor for FilesView<'_> {
    fn read_via_stream(&mut self, descriptor: Descriptor, offset: Filesize) -> FsResult<Resource<DynInputStream>> {
        let handle = self.handle(&descriptor)?;
        if handle.is_folder {
            return Err(ErrorCode::IsDirectory.into());
        }
        let stream: DynInputStream = Box::new(Reader::new(handle, offset));
        Ok(self.table.push(stream)?)
    }

    fn write_via_stream(&mut self, descriptor: Descriptor, offset: Filesize) -> FsResult<Resource<DynOutputStream>> {
        let handle = self.file(&descriptor)?;
        handle.check_writable()?;
        let stream: DynOutputStream = Box::new(Writer::new(handle, Some(offset)));
        Ok(self.table.push(stream)?)
    }

    fn append_via_stream(&mut self, descriptor: Descriptor) -> FsResult<Resource<DynOutputStream>> {
        let handle = self.file(&descriptor)?;
        handle.check_writable()?;
        let stream: DynOutputStream = Box::new(Writer::new(handle, None));
        Ok(self.table.push(stream)?)
    }

    async fn advise(&mut self, descriptor: Descriptor, offset: Filesize, length: Filesize, advice: Advice) -> FsResult<()> {
        let advice = match advice {
            Advice::Normal => rustix::fs::Advice::Normal,
            Advice::Sequential => rustix::fs::Advice::Sequential,
            Advice::Random => rustix::fs::Advice::Random,
            Advice::WillNeed => rustix::fs::Advice::WillNeed,
            Advice::DontNeed => rustix::fs::Advice::DontNeed,
            Advice::NoReuse => rustix::fs::Advice::NoReuse,
        };
        on(self.file(&descriptor)?, move |file| {
            fadvise(file.file(), offset, NonZeroU64::new(length), advice).map_err(|error| code(error.into()))
        })
        .await
    }

    async fn sync_data(&mut self, descriptor: Descriptor) -> FsResult<()> {
        on(self.handle(&descriptor)?, |handle| handle.file().sync_data().map_err(code)).await
    }

    async fn sync(&mut self, descriptor: Descriptor) -> FsResult<()> {
        on(self.handle(&descriptor)?, |handle| handle.file().sync_all().map_err(code)).await
    }

    async fn get_flags(&mut self, descriptor: Descriptor) -> FsResult<DescriptorFlags> {
        let handle = self.handle(&descriptor)?;
        // No operation: what the system knows of a descriptor needs no file system.
        let set = fcntl_getfl(handle.file()).map_err(|error| code(error.into()))?;
        let write = if handle.is_folder { DescriptorFlags::MUTATE_DIRECTORY } else { DescriptorFlags::WRITE };
        let all = [
            (handle.reads, DescriptorFlags::READ),
            (handle.writes, write),
            (set.contains(OFlags::DSYNC), DescriptorFlags::REQUESTED_WRITE_SYNC),
            (set.contains(OFlags::SYNC), DescriptorFlags::FILE_INTEGRITY_SYNC),
            (set.contains(OFlags::RSYNC), DescriptorFlags::DATA_INTEGRITY_SYNC),
        ];
        Ok(all.into_iter().filter(|(holds, _)| *holds).fold(DescriptorFlags::empty(), |flags, (_, flag)| flags | flag))
    }

    async fn get_type(&mut self, descriptor: Descriptor) -> FsResult<DescriptorType> {
        // Nothing else can be opened.
        Ok(if self.handle(&descriptor)?.is_folder { DescriptorType::Directory } else { DescriptorType::RegularFile })
    }

    async fn set_size(&mut self, descriptor: Descriptor, size: Filesize) -> FsResult<()> {
        on(self.file(&descriptor)?, move |file| file.set_size(size)).await
    }

    async fn set_times(&mut self, descriptor: Descriptor, access: NewTimestamp, change: NewTimestamp) -> FsResult<()> {
        let handle = self.handle(&descriptor)?;
        handle.check_writable()?;
        let times = timestamps(access, change)?;
        on(handle, move |handle| futimens(handle.file(), &times).map_err(|error| code(error.into()))).await
    }

    async fn read(&mut self, descriptor: Descriptor, length: Filesize, offset: Filesize) -> FsResult<(Vec<u8>, bool)> {
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(PIECE_BYTES_MAX);
        on(self.file(&descriptor)?, move |file| {
            let mut buffer = vec![0; length];
            let read = file.read(&mut buffer, offset)?;
            buffer.truncate(read);
            Ok((buffer, read == 0))
        })
        .await
    }

    async fn write(&mut self, descriptor: Descriptor, bytes: Vec<u8>, offset: Filesize) -> FsResult<Filesize> {
        let file = self.file(&descriptor)?;
        file.check_writable()?;
        on(file, move |file| Ok(file.write(&bytes, Some(offset))? as u64)).await
    }

    async fn read_directory(&mut self, descriptor: Descriptor) -> FsResult<Entries> {
        let listing = on(self.folder(&descriptor)?, Listing::open).await?;
        Ok(Resource::new_own(self.table.push(listing)?.rep()))
    }

    async fn create_directory_at(&mut self, descriptor: Descriptor, path: String) -> FsResult<()> {
        on(self.folder(&descriptor)?, move |folder| path::make_folder(&folder, &path)).await
    }

    async fn stat(&mut self, descriptor: Descriptor) -> FsResult<DescriptorStat> {
        on(self.handle(&descriptor)?, |handle| Ok(stat(&Metadata::from_file(handle.file()).map_err(code)?))).await
    }

    async fn stat_at(&mut self, descriptor: Descriptor, flags: PathFlags, path: String) -> FsResult<DescriptorStat> {
        let follow = flags.contains(PathFlags::SYMLINK_FOLLOW);
        on(self.folder(&descriptor)?, move |folder| Ok(stat(&path::metadata(&folder, &path, follow)?))).await
    }

    async fn set_times_at(
        &mut self,
        descriptor: Descriptor,
        flags: PathFlags,
        path: String,
        access: NewTimestamp,
        change: NewTimestamp,
    ) -> FsResult<()> {
        let folder = self.folder(&descriptor)?;
        let (follow, times) = (flags.contains(PathFlags::SYMLINK_FOLLOW), timestamps(access, change)?);
        on(folder, move |folder| path::set_times(&folder, &path, follow, &times)).await
    }

    async fn link_at(
        &mut self,
        descriptor: Descriptor,
        flags: PathFlags,
        old: String,
        target: Descriptor,
        new: String,
    ) -> FsResult<()> {
        let (from, to) = (self.folder(&descriptor)?, self.folder(&target)?);
        from.check_writable()?;
        to.check_writable()?;
        if flags.contains(PathFlags::SYMLINK_FOLLOW) {
            return Err(ErrorCode::Invalid.into());
        }
        on(from, move |from| path::link(&from, &old, &to, &new)).await
    }

    async fn open_at(
        &mut self,
        descriptor: Descriptor,
        path_flags: PathFlags,
        path: String,
        how: OpenFlags,
        flags: DescriptorFlags,
    ) -> FsResult<Descriptor> {
        let folder = self.folder(&descriptor)?;
        let wish = Wish { follow: path_flags.contains(PathFlags::SYMLINK_FOLLOW), how, flags };
        wish.check(&folder)?;
        let opened = on(folder, move |folder| path::open(&folder, &path, wish)).await?;
        self.keep(Arc::new(opened))
    }

    async fn readlink_at(&mut self, descriptor: Descriptor, path: String) -> FsResult<String> {
        on(self.folder(&descriptor)?, move |folder| path::read_link(&folder, &path)).await
    }

    async fn remove_directory_at(&mut self, descriptor: Descriptor, path: String) -> FsResult<()> {
        on(self.folder(&descriptor)?, move |folder| path::remove(&folder, &path, AtFlags::REMOVEDIR)).await
    }

    async fn rename_at(&mut self, descriptor: Descriptor, old: String, target: Descriptor, new: String) -> FsResult<()> {
        let (from, to) = (self.folder(&descriptor)?, self.folder(&target)?);
        on(from, move |from| path::rename(&from, &old, &to, &new)).await
    }

    async fn symlink_at(&mut self, descriptor: Descriptor, target: String, path: String) -> FsResult<()> {
        on(self.folder(&descriptor)?, move |folder| path::make_symlink(&folder, &target, &path)).await
    }

    async fn unlink_file_at(&mut self, descriptor: Descriptor, path: String) -> FsResult<()> {
        on(self.folder(&descriptor)?, move |folder| path::remove(&folder, &path, AtFlags::empty())).await
    }

    async fn is_same_object(&mut self, one: Descriptor, other: Descriptor) -> wasmtime::Result<bool> {
        let both = [self.handle(&one), self.handle(&other)];
        let [Ok(one), Ok(other)] = both else { return Err(wasmtime::Error::msg("unknown descriptor")) };
        let same = on(one, move |one| Ok(identity(&one)? == identity(&other)?)).await;
        same.or_else(|error| error.downcast().map(|_| false))
    }

    async fn metadata_hash(&mut self, descriptor: Descriptor) -> FsResult<MetadataHashValue> {
        on(self.handle(&descriptor)?, |handle| Ok(hash(identity(&handle)?))).await
    }

    async fn metadata_hash_at(&mut self, descriptor: Descriptor, flags: PathFlags, path: String) -> FsResult<MetadataHashValue> {
        let follow = flags.contains(PathFlags::SYMLINK_FOLLOW);
        on(self.folder(&descriptor)?, move |folder| {
            let metadata = path::metadata(&folder, &path, follow)?;
            Ok(hash((metadata.dev(), metadata.ino())))
        })
        .await
    }

    fn drop(&mut self, descriptor: Descriptor) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Arc<Handle>>::new_own(descriptor.rep()))?;
        Ok(())
    }
}

impl HostDirectoryEntryStream for FilesView<'_> {
    async fn read_directory_entry(&mut self, entries: Entries) -> FsResult<Option<DirectoryEntry>> {
        let place = || Resource::<Listing>::new_borrow(entries.rep());
        loop {
            let listing = self.table.get_mut(&place())?;
            if let Some(entry) = listing.next() {
                return Ok(Some(entry?));
            }
            if listing.ended {
                return Ok(None);
            }
            let source = listing.source.clone();
            let batch = on(source.handle.clone(), move |_| source.read()).await?;
            self.table.get_mut(&place())?.refill(batch);
        }
    }

    fn drop(&mut self, entries: Entries) -> wasmtime::Result<()> {
        self.table.delete(Resource::<Listing>::new_own(entries.rep()))?;
        Ok(())
    }
}

fn identity(handle: &Handle) -> Result<(u64, u64), ErrorCode> {
    let metadata = Metadata::from_file(handle.file()).map_err(code)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn hash(identity: (u64, u64)) -> MetadataHashValue {
    let mut hasher = DefaultHasher::new();
    identity.hash(&mut hasher);
    let lower = hasher.finish();
    // There are no more than 64 bits; the upper half only shall not look like the lower.
    MetadataHashValue { lower, upper: lower ^ 0x4009_21fb_5444_2d18 }
}

fn stat(metadata: &Metadata) -> DescriptorStat {
    // What the contract cannot say, as a time before 1970, is not told.
    let moment = |time: std::io::Result<cap_primitives::time::SystemTime>| Datetime::try_from(time.ok()?.into_std()).ok();
    DescriptorStat {
        type_: type_of(metadata),
        link_count: metadata.nlink(),
        size: metadata.len(),
        data_access_timestamp: moment(metadata.accessed()),
        data_modification_timestamp: moment(metadata.modified()),
        status_change_timestamp: moment(metadata.created()),
    }
}

fn type_of(metadata: &Metadata) -> DescriptorType {
    let kind = metadata.file_type();
    if kind.is_file() {
        DescriptorType::RegularFile
    } else if kind.is_dir() {
        DescriptorType::Directory
    } else if kind.is_symlink() {
        DescriptorType::SymbolicLink
    } else if kind.is_block_device() {
        DescriptorType::BlockDevice
    } else if kind.is_char_device() {
        DescriptorType::CharacterDevice
    } else {
        DescriptorType::Unknown
    }
}

fn timestamps(access: NewTimestamp, change: NewTimestamp) -> Result<Timestamps, ErrorCode> {
    let moment = |stamp| -> Result<Timespec, ErrorCode> {
        match stamp {
            NewTimestamp::NoChange => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT }),
            NewTimestamp::Now => Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW }),
            NewTimestamp::Timestamp(Datetime { seconds, nanoseconds }) => {
                let seconds =
                    seconds.checked_add(u64::from(nanoseconds / 1_000_000_000)).and_then(|seconds| i64::try_from(seconds).ok());
                Ok(Timespec { tv_sec: seconds.ok_or(ErrorCode::Overflow)?, tv_nsec: i64::from(nanoseconds % 1_000_000_000) })
            }
        }
    };
    Ok(Timestamps { last_access: moment(access)?, last_modification: moment(change)? })
}
