//! Open files and folders of guests.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use wasmtime_wasi::p2::bindings::filesystem::types::ErrorCode;

use super::pool::Pool;
use super::quota::{Ledger, Quota};
use super::root::Identity;

/// The most bytes that one read returns and that a stream takes in one write.
pub(super) const PIECE_BYTES_MAX: usize = 64 << 10;
/// The same while an attempt's streams hold [`BUFFERS_BYTES_MAX`] already.
const PIECE_BYTES_MIN: usize = 4 << 10;
/// What the streams of one attempt hold together before they get by with little pieces.
const BUFFERS_BYTES_MAX: usize = 2 << 20;

/// What all handles below one granted folder share in one instance.
pub(super) struct Grant {
    /// What guests have made there, and how much they may make; None if they may not write.
    pub(super) counted: Option<(Arc<Ledger>, Quota)>,
    pub(super) pool: Arc<Pool>,
    pub(super) buffers: Arc<Buffers>,
}

impl Grant {
    pub(super) fn ledger(&self) -> Option<(&Arc<Ledger>, Quota)> {
        self.counted.as_ref().map(|(ledger, quota)| (ledger, *quota))
    }
}

/// A file or a folder that a guest has open. Dropping it closes a file on the plugin's file threads.
pub(super) struct Handle {
    /// None only while it is dropped.
    file: Option<Arc<File>>,
    pub(super) is_folder: bool,
    pub(super) reads: bool,
    pub(super) writes: bool,
    pub(super) grant: Arc<Grant>,
    /// Which file the ledger knows it as.
    counted: Option<Identity>,
}

impl Handle {
    /// What was just opened.
    pub(super) fn new(file: File, reads: bool, writes: bool, grant: Arc<Grant>, counted: Option<Identity>) -> Self {
        Self { file: Some(Arc::new(file)), is_folder: false, reads, writes, grant, counted }
    }

    /// A granted folder, whose descriptor all attempts share.
    pub(super) fn granted(folder: Arc<File>, grant: Arc<Grant>) -> Self {
        let writes = grant.counted.is_some();
        Self { file: Some(folder), is_folder: true, reads: true, writes, grant, counted: None }
    }

    pub(super) fn into_folder(mut self) -> Self {
        self.is_folder = true;
        self
    }

    #[expect(clippy::expect_used, reason = "it is taken out by drop alone")]
    pub(super) fn file(&self) -> &File {
        self.file.as_ref().expect("only dropping takes it out")
    }

    pub(super) fn check_writable(&self) -> Result<(), ErrorCode> {
        self.writable_ledger().map(drop)
    }

    pub(super) fn writable_ledger(&self) -> Result<(&Arc<Ledger>, Quota), ErrorCode> {
        self.grant.ledger().ok_or(ErrorCode::NotPermitted)
    }

    /// Read at most `buffer.len()` bytes; 0 is the end of the file. Blocks.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<usize, ErrorCode> {
        loop {
            match self.file().read_at(buffer, offset) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read.map_err(code),
            }
        }
    }

    /// Write at least one of these bytes, at `offset` or, if there is none, at the end. Blocks.
    pub(super) fn write(&self, bytes: &[u8], offset: Option<u64>) -> Result<usize, ErrorCode> {
        let (ledger, quota) = self.writable_ledger()?;
        let file = self.counted.ok_or(ErrorCode::BadDescriptor)?;
        let begin = offset.unwrap_or_else(|| ledger.end_of(file));
        let end = begin.checked_add(bytes.len() as u64).ok_or(ErrorCode::FileTooLarge)?;
        if !self.writes {
            return Err(ErrorCode::BadDescriptor);
        }
        ledger.grow(quota, file, self.file(), end)?;
        let written = match offset {
            Some(offset) => self.file().write_at(bytes, offset),
            None => append(self.file(), bytes),
        };
        match &written {
            Ok(written) if *written == bytes.len() => ledger.wrote(file, end, None),
            _ => {
                let size = self.file().metadata().map(|metadata| metadata.len()).ok();
                ledger.wrote(file, 0, size);
            }
        }
        written.map_err(code)
    }

    /// Cut a file, or make it longer with a hole, which counts as if it were written. Blocks.
    pub(super) fn set_size(&self, size: u64) -> Result<(), ErrorCode> {
        let (ledger, quota) = self.writable_ledger()?;
        let file = self.counted.ok_or(ErrorCode::BadDescriptor)?;
        if !self.writes {
            // As the system has it of a descriptor that is not open for writing.
            return Err(ErrorCode::Invalid);
        }
        ledger.grow(quota, file, self.file(), size)?;
        let set = self.file().set_len(size);
        ledger.wrote(file, 0, self.file().metadata().map(|metadata| metadata.len()).ok());
        set.map_err(code)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let (Some((ledger, _)), Some(file)) = (self.grant.ledger(), self.counted) {
            ledger.closed(file);
        }
        // Closing a folder never waits. A file that another handle shares is closed by the last.
        let file = self.file.take().filter(|_| !self.is_folder).and_then(Arc::into_inner);
        if let Some(file) = file {
            self.grant.pool.close(file);
        }
    }
}

fn append(file: &File, bytes: &[u8]) -> io::Result<usize> {
    match pwritev2(file, &[io::IoSlice::new(bytes)], 0, ReadWriteFlags::APPEND) {
        // A kernel or a file system without it: the last known end is the best there is.
        Err(Errno::NOSYS | Errno::NOTSUP) => file.write_at(bytes, file.metadata()?.len()),
        written => Ok(written?),
    }
}

/// The contract's word for an error of the system's.
pub(super) fn code(error: io::Error) -> ErrorCode {
    match Errno::from_io_error(&error) {
        Some(Errno::DQUOT) => ErrorCode::Quota,
        Some(Errno::XDEV) => ErrorCode::CrossDevice,
        Some(Errno::ROFS) => ErrorCode::ReadOnly,
        Some(Errno::TXTBSY) => ErrorCode::TextFileBusy,
        Some(Errno::NXIO | Errno::NODEV) => ErrorCode::NoSuchDevice,
        _ => ErrorCode::from(error),
    }
}

/// What the streams of one attempt hold in the host's memory.
#[derive(Default)]
pub(super) struct Buffers(AtomicUsize);

/// A part of it, given back when dropped.
pub(super) struct Share {
    buffers: Arc<Buffers>,
    bytes: usize,
}

impl Buffers {
    /// As many bytes as a stream may have now.
    pub(super) fn piece(&self) -> usize {
        if self.0.load(Ordering::Relaxed) < BUFFERS_BYTES_MAX { PIECE_BYTES_MAX } else { PIECE_BYTES_MIN }
    }

    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Share {
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Share { buffers: self.clone(), bytes }
    }
}

impl Share {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.buffers.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
