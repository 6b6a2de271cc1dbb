//! Files as guests see them, called as a component would call them.

mod bounds;
mod counts;
mod folders;
mod like_wasmtime;

use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;
use wasmtime::component::{Resource, ResourceTable};
use wasmtime_wasi::p2::FsResult;
use wasmtime_wasi::p2::bindings::filesystem::preopens::Host as _;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    Descriptor, DescriptorFlags, ErrorCode, HostDescriptor, HostDirectoryEntryStream as _, OpenFlags, PathFlags,
};

use super::{Files, FilesView, Folders};
use crate::plugin::FolderGrant;

const READ: DescriptorFlags = DescriptorFlags::READ;
const WRITE: DescriptorFlags = DescriptorFlags::WRITE;
const CREATE: OpenFlags = OpenFlags::CREATE;
const FOLLOW: PathFlags = PathFlags::SYMLINK_FOLLOW;

/// What a host has, with a folder to grant parts of.
struct Host {
    folders: Arc<Folders>,
    ground: TempDir,
}

impl Host {
    fn new() -> Self {
        Self { folders: Arc::default(), ground: tempfile::tempdir().expect("folder") }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.ground.path().join(name)
    }

    fn make_folder(&self, name: &str) {
        std::fs::create_dir_all(self.path(name)).expect("folder");
    }

    fn grant(&self, name: &str) -> FolderGrant {
        FolderGrant::writable(self.path(name), format!("/{name}"))
    }

    async fn guest(&self, grants: &[FolderGrant]) -> Guest {
        self.try_guest(grants).await.expect("the folders are opened")
    }

    async fn try_guest(&self, grants: &[FolderGrant]) -> Result<Guest, String> {
        let files = self.folders.open("plugin", &grants.to_vec().into()).await.map_err(|error| error.to_string())?;
        Ok(Guest { files, table: ResourceTable::new() })
    }

    /// What guests have made in a folder, as it is counted: bytes and files.
    async fn made(&self, name: &str) -> (u64, u64) {
        let grant = self.grant(name);
        self.folders.roots.open(&grant).expect("open").1.expect("writable").made()
    }
}

/// An instance with its files.
struct Guest {
    files: Files,
    table: ResourceTable,
}

type Fd = Resource<Descriptor>;

impl Guest {
    fn view(&mut self) -> FilesView<'_> {
        FilesView { files: &self.files, table: &mut self.table }
    }

    /// The granted folder at this place.
    fn root(&mut self, place: usize) -> Fd {
        self.view().get_directories().expect("folders").swap_remove(place).0
    }

    async fn open(&mut self, path: &str, how: OpenFlags, flags: DescriptorFlags) -> Result<Fd, ErrorCode> {
        let root = self.root(0);
        let opened = self.view().open_at(root, FOLLOW, path.to_owned(), how, flags).await;
        told(opened)
    }

    async fn write(&mut self, path: &str, bytes: usize) -> Result<u64, ErrorCode> {
        let fd = self.open(path, CREATE, WRITE).await?;
        let written = self.view().write(same(&fd), vec![b'x'; bytes], 0).await;
        HostDescriptor::drop(&mut self.view(), fd).expect("closed");
        told(written)
    }

    async fn unlink(&mut self, path: &str) -> Result<(), ErrorCode> {
        let root = self.root(0);
        told(self.view().unlink_file_at(root, path.to_owned()).await)
    }

    async fn make_folder(&mut self, path: &str) -> Result<(), ErrorCode> {
        let root = self.root(0);
        told(self.view().create_directory_at(root, path.to_owned()).await)
    }

    async fn rename(&mut self, old: &str, to: usize, new: &str) -> Result<(), ErrorCode> {
        let (from, to) = (self.root(0), self.root(to));
        told(self.view().rename_at(from, old.to_owned(), to, new.to_owned()).await)
    }

    /// The names in a folder, sorted.
    async fn list(&mut self, path: &str) -> Result<Vec<String>, ErrorCode> {
        let fd = self.open(path, OpenFlags::DIRECTORY, READ).await?;
        let entries = told(self.view().read_directory(same(&fd)).await)?;
        let mut names = Vec::new();
        while let Some(entry) = told(self.view().read_directory_entry(Resource::new_borrow(entries.rep())).await)? {
            names.push(entry.name);
        }
        names.sort();
        Ok(names)
    }
}

fn same(fd: &Fd) -> Fd {
    Resource::new_borrow(fd.rep())
}

fn told<T>(result: FsResult<T>) -> Result<T, ErrorCode> {
    result.map_err(|error| error.downcast().expect("an error code, no trap"))
}

fn write_file(path: &Path, text: &str) {
    std::fs::write(path, text).expect("written");
}
