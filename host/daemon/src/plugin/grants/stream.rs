//! Streams of a file's bytes and of a folder's entries. Each holds a bounded piece at a time.

use std::mem::{self, MaybeUninit};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, openat, statat};
use rustix::io::Errno;
use wasmtime_wasi::p2::bindings::filesystem::types::{DescriptorType, DirectoryEntry, ErrorCode};
use wasmtime_wasi::p2::{InputStream, OutputStream, Pollable, StreamError, StreamResult};

use super::handle::{Handle, PIECE_BYTES_MAX, Share, code};
use super::pool::Answer;

/// What is read for a guest that waits for data before it has asked for any.
const READ_AHEAD_BYTES: usize = 4 << 10;
/// What is read of a folder at a time, and while the attempt's streams hold much already. Names of 255 bytes fit several times; longer ones,
/// which a few file systems have, are read with the larger buffer.
const LISTING_BYTES: usize = 8 << 10;
const LISTING_BYTES_MIN: usize = 1 << 10;

/// A file as an input stream.
pub(super) struct Reader {
    handle: Arc<Handle>,
    position: u64,
    state: Reading,
}

enum Reading {
    Idle,
    Waiting(Answer<Result<(Bytes, Share), ErrorCode>>),
    Data { bytes: Bytes, _share: Share },
    Failed(ErrorCode),
    Ended,
}

impl Reader {
    pub(super) fn new(handle: Arc<Handle>, position: u64) -> Self {
        Self { handle, position, state: Reading::Idle }
    }

    fn start(&self, bytes: usize) -> Answer<Result<(Bytes, Share), ErrorCode>> {
        let (handle, position) = (self.handle.clone(), self.position);
        let buffers = &handle.grant.buffers;
        let share = buffers.take(bytes.min(buffers.piece()));
        handle.grant.pool.clone().run(move || {
            let mut buffer = vec![0; share.bytes()];
            let read = handle.read(&mut buffer, position)?;
            buffer.truncate(read);
            Ok((buffer.into(), share))
        })
    }

    async fn wait(&mut self) {
        if let Reading::Waiting(answer) = &mut self.state {
            self.state = match answer.await {
                Ok(Ok((bytes, _))) if bytes.is_empty() => Reading::Ended,
                Ok(Ok((bytes, share))) => Reading::Data { bytes, _share: share },
                Ok(Err(error)) => Reading::Failed(error),
                Err(_) => Reading::Failed(ErrorCode::Io),
            };
        }
    }
}

#[async_trait::async_trait]
impl InputStream for Reader {
    fn read(&mut self, size: usize) -> StreamResult<Bytes> {
        match &mut self.state {
            Reading::Idle if size == 0 => Ok(Bytes::new()),
            Reading::Idle => {
                self.state = Reading::Waiting(self.start(size));
                Ok(Bytes::new())
            }
            Reading::Waiting(_) => Ok(Bytes::new()),
            Reading::Data { bytes, .. } => {
                let piece = bytes.split_to(bytes.len().min(size));
                if bytes.is_empty() {
                    self.state = Reading::Idle;
                }
                self.position += piece.len() as u64;
                Ok(piece)
            }
            Reading::Failed(error) => {
                let error = *error;
                self.state = Reading::Ended;
                Err(StreamError::LastOperationFailed(error.into()))
            }
            Reading::Ended => Err(StreamError::Closed),
        }
    }

    async fn blocking_read(&mut self, size: usize) -> StreamResult<Bytes> {
        self.wait().await;
        if size > 0 && matches!(self.state, Reading::Idle) {
            self.state = Reading::Waiting(self.start(size));
            self.wait().await;
        }
        self.read(size)
    }

    /// Also when the guest drops the stream: else it could have any number of reads under way.
    async fn cancel(&mut self) {
        if let Reading::Waiting(answer) = mem::replace(&mut self.state, Reading::Ended) {
            let _ = answer.await;
        }
    }
}

#[async_trait::async_trait]
impl Pollable for Reader {
    async fn ready(&mut self) {
        if matches!(self.state, Reading::Idle) {
            self.state = Reading::Waiting(self.start(READ_AHEAD_BYTES));
        }
        self.wait().await;
    }
}

/// A file as an output stream.
pub(super) struct Writer {
    handle: Arc<Handle>,
    /// None: at the end.
    position: Option<u64>,
    state: Writing,
}

enum Writing {
    Ready,
    Waiting(Answer<Result<usize, ErrorCode>>),
    Failed(ErrorCode),
    Closed,
}

impl Writer {
    pub(super) fn new(handle: Arc<Handle>, position: Option<u64>) -> Self {
        Self { handle, position, state: Writing::Ready }
    }

    fn start(&self, bytes: Bytes) -> Answer<Result<usize, ErrorCode>> {
        let (handle, position) = (self.handle.clone(), self.position);
        let share = handle.grant.buffers.take(bytes.len());
        handle.grant.pool.clone().run(move || {
            let _share = share;
            let mut written = 0;
            while written < bytes.len() {
                let position = position.map(|position| position.saturating_add(written as u64));
                match handle.write(&bytes[written..], position) {
                    Ok(0) => return Err(ErrorCode::Io),
                    Ok(more) => written += more,
                    Err(ErrorCode::Interrupted) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(written)
        })
    }

    async fn wait(&mut self) {
        if let Writing::Waiting(answer) = &mut self.state {
            self.state = match answer.await {
                Ok(Ok(written)) => {
                    self.position = self.position.map(|position| position.saturating_add(written as u64));
                    Writing::Ready
                }
                Ok(Err(error)) => Writing::Failed(error),
                Err(_) => Writing::Failed(ErrorCode::Io),
            };
        }
    }

    /// Tell of an error once; afterwards the stream is closed.
    fn check(&mut self) -> StreamResult<()> {
        match self.state {
            Writing::Ready | Writing::Waiting(_) => Ok(()),
            Writing::Failed(error) => {
                self.state = Writing::Closed;
                Err(StreamError::LastOperationFailed(error.into()))
            }
            Writing::Closed => Err(StreamError::Closed),
        }
    }
}

#[async_trait::async_trait]
impl OutputStream for Writer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        match self.state {
            // A guest that writes more than it was permitted would have as much of it in the host as it has streams.
            Writing::Ready if bytes.len() > PIECE_BYTES_MAX => {
                Err(StreamError::Trap(wasmtime::Error::msg("write not permitted: it is larger than check_write allowed")))
            }
            Writing::Ready => {
                self.state = Writing::Waiting(self.start(bytes));
                Ok(())
            }
            Writing::Closed => Err(StreamError::Closed),
            Writing::Waiting(_) | Writing::Failed(_) => {
                Err(StreamError::Trap(wasmtime::Error::msg("write not permitted: check_write was not called first")))
            }
        }
    }

    async fn blocking_write_and_flush(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.wait().await;
        self.check()?;
        self.state = Writing::Waiting(self.start(bytes));
        self.wait().await;
        self.check()
    }

    /// What was written is in the system's hands as soon as the write is done.
    fn flush(&mut self) -> StreamResult<()> {
        self.check()
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        self.check()?;
        Ok(if matches!(self.state, Writing::Ready) { self.handle.grant.buffers.piece() } else { 0 })
    }

    /// Also when the guest drops the stream: else it could have any number of writes under way.
    async fn cancel(&mut self) {
        if let Writing::Waiting(answer) = mem::replace(&mut self.state, Writing::Closed) {
            let _ = answer.await;
        }
    }
}

#[async_trait::async_trait]
impl Pollable for Writer {
    async fn ready(&mut self) {
        self.wait().await;
    }
}

/// The entries of a folder, in whatever order the system has them.
pub(super) struct Listing {
    pub(super) source: Arc<Source>,
    /// Entries that were read and not yet taken: a type, two bytes of length, and the name, for each.
    batch: Vec<u8>,
    share: Option<Share>,
    taken: usize,
    pub(super) ended: bool,
}

/// Where a listing reads: a descriptor of its own, since it holds the place.
pub(super) struct Source {
    folder: OwnedFd,
    pub(super) handle: Arc<Handle>,
}

impl Listing {
    /// Blocks.
    pub(super) fn open(handle: Arc<Handle>) -> Result<Self, ErrorCode> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = openat(handle.file(), c".", flags, Mode::empty()).map_err(|error| code(error.into()))?;
        let source = Arc::new(Source { folder, handle });
        let mut listing = Self { source, batch: Vec::new(), share: None, taken: 0, ended: false };
        let batch = listing.source.read()?;
        listing.refill(batch);
        Ok(listing)
    }

    /// What [`Source::read`] has returned.
    pub(super) fn refill(&mut self, (batch, share): (Vec<u8>, Share)) {
        self.ended = batch.is_empty();
        (self.batch, self.share, self.taken) = (batch, Some(share), 0);
    }

    /// Memory for entries that were read and not yet taken.
    #[cfg(test)]
    pub(super) fn held_bytes(&self) -> usize {
        assert!(self.share.as_ref().is_none_or(|share| share.bytes() == self.batch.capacity()));
        self.batch.capacity()
    }

    /// The next entry; None if there is none without reading on.
    pub(super) fn next(&mut self) -> Option<Result<DirectoryEntry, ErrorCode>> {
        let [kind, low, high, rest @ ..] = self.batch.get(self.taken..)? else { return None };
        let name = &rest[..usize::from(u16::from_le_bytes([*low, *high]))];
        let entry = match std::str::from_utf8(name) {
            Ok(name) => {
                Ok(DirectoryEntry { type_: type_of(FileType::from_raw_mode(u32::from(*kind) << 12)), name: name.to_owned() })
            }
            Err(_) => Err(ErrorCode::IllegalByteSequence),
        };
        self.taken += 3 + name.len();
        if self.taken == self.batch.len() {
            // Between two reads it holds nothing.
            (self.batch, self.share, self.taken) = (Vec::new(), None, 0);
        }
        Some(entry)
    }
}

impl Source {
    /// Some more entries; none at the end. Blocks.
    pub(super) fn read(&self) -> Result<(Vec<u8>, Share), ErrorCode> {
        let buffers = &self.handle.grant.buffers;
        let room = if buffers.piece() < PIECE_BYTES_MAX { LISTING_BYTES_MIN } else { LISTING_BYTES };
        let batch = match self.read_into(room) {
            Err(ErrorCode::Invalid) if room < LISTING_BYTES => self.read_into(LISTING_BYTES)?,
            read => read?,
        };
        let share = buffers.take(batch.capacity());
        Ok((batch, share))
    }

    fn read_into(&self, room: usize) -> Result<Vec<u8>, ErrorCode> {
        let mut batch = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); LISTING_BYTES];
        let mut entries = RawDir::new(&self.folder, &mut buffer[..room]);
        while let Some(entry) = entries.next() {
            match entry {
                Ok(entry) => {
                    let name = entry.file_name();
                    if name != c"." && name != c".." {
                        let kind = match entry.file_type() {
                            FileType::Unknown => statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW)
                                .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
                            kind => kind,
                        };
                        let name = name.to_bytes();
                        let Ok(length) = u16::try_from(name.len()) else { return Err(ErrorCode::NameTooLong) };
                        batch.push(kind.as_raw_mode().to_le_bytes()[1] >> 4);
                        batch.extend_from_slice(&length.to_le_bytes());
                        batch.extend_from_slice(name);
                    }
                }
                Err(Errno::INTR) => continue,
                Err(error) => return Err(code(error.into())),
            }
            if entries.is_buffer_empty() && !batch.is_empty() {
                break;
            }
        }
        batch.shrink_to_fit();
        Ok(batch)
    }
}

pub(super) fn type_of(kind: FileType) -> DescriptorType {
    match kind {
        FileType::RegularFile => DescriptorType::RegularFile,
        FileType::Directory => DescriptorType::Directory,
        FileType::Symlink => DescriptorType::SymbolicLink,
        FileType::BlockDevice => DescriptorType::BlockDevice,
        FileType::CharacterDevice => DescriptorType::CharacterDevice,
        _ => DescriptorType::Unknown,
    }
}
