//! Whatever a guest does, it sees what it would see with wasmtime-wasi's own files: the same calls are made to both, on two folders that are
//! the same to begin with, and have to have the same results and leave the same behind. The table holds the cases of the crate's own tests
//! (its test-programs) by their names; the property draws calls at random.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;

use proptest::prelude::*;
use wasmtime_wasi::filesystem::{WasiFilesystemCtxView, WasiFilesystemView as _};
use wasmtime_wasi::p2::bindings::clocks::wall_clock::Datetime;
use wasmtime_wasi::p2::bindings::filesystem::preopens;
use wasmtime_wasi::p2::bindings::filesystem::types::{self, HostDescriptor, HostDirectoryEntryStream, NewTimestamp};
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};

use super::*;

/// One call, or a few that belong together. Paths are relative to the granted folder.
#[derive(Clone, Debug)]
pub(super) enum Call {
    /// Open, tell of the descriptor, and then read, write, cut and list it, whatever it is.
    Open {
        path: String,
        follow: bool,
        how: u8,
        flags: u8,
    },
    MakeFolder(String),
    RemoveFolder(String),
    Unlink(String),
    Rename(String, String),
    Link(String, String, bool),
    Symlink(String, String),
    ReadLink(String),
    Stat(String, bool),
    SetTimes(String, bool, u64),
    /// A file's bytes at an offset.
    Write(String, u64, usize),
    Cut(String, u64),
    List(String),
    Sync(String),
    /// Whether two paths are the same object, and have the same hash.
    Same(String, String),
}

struct Theirs {
    context: WasiCtx,
    table: ResourceTable,
}

impl WasiView for Theirs {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.context, table: &mut self.table }
    }
}

impl Theirs {
    fn new(folder: &Path, permissions: FsPerms) -> Self {
        let mut builder = WasiCtxBuilder::new();
        builder.preopened_dir(folder, "/", permissions).expect("opened").allow_blocking_current_thread(true);
        Self { context: builder.build(), table: ResourceTable::new() }
    }
}

pub(super) trait Files: HostDescriptor + HostDirectoryEntryStream + preopens::Host + types::Host {}
impl Files for FilesView<'_> {}
impl Files for WasiFilesystemCtxView<'_> {}

/// Both of a case, and whether guests may write.
struct Pair {
    ours: Guest,
    /// Kept for its threads.
    _folders: Arc<Folders>,
    theirs: Theirs,
    grounds: [TempDir; 2],
    writable: bool,
    at_first: BTreeMap<String, String>,
}

impl Pair {
    async fn new(writable: bool) -> Self {
        let grounds = [ground(), ground()];
        for ground in &grounds {
            let root = ground.path().join("root");
            std::fs::create_dir_all(root.join("folder/inner")).expect("folders");
            std::fs::create_dir_all(root.join("empty")).expect("folders");
            write_file(&ground.path().join("outside"), "not yours");
            write_file(&root.join("file"), "0123456789");
            write_file(&root.join("folder/inside"), "inside");
            for (target, name) in [
                ("file", "link"),
                ("folder", "folder-link"),
                ("nowhere", "dangling"),
                ("loop", "loop"),
                ("../outside", "way-out"),
                ("../root/file", "around"),
                ("/etc/hostname", "absolute"),
                ("..", "above"),
                ("folder/../file", "there-and-back"),
            ] {
                symlink(target, root.join(name)).expect("link");
            }
        }
        let [one, other] = [0, 1].map(|place: usize| grounds[place].path().join("root"));
        let grant = if writable { FolderGrant::writable(one, "/") } else { FolderGrant::read_only(one, "/") };
        let folders = Arc::new(Folders::default());
        let files = folders.open("plugin", &Arc::from([grant])).await.expect("opened");
        let mut at_first = BTreeMap::new();
        describe(grounds[0].path(), "", &mut at_first);
        let permissions = if writable { FsPerms::ReadWrite } else { FsPerms::ReadOnly };
        Self {
            ours: Guest { files, table: ResourceTable::new() },
            _folders: folders,
            theirs: Theirs::new(&other, permissions),
            grounds,
            writable,
            at_first,
        }
    }

    /// Make the call to both.
    async fn call(&mut self, call: &Call) -> [String; 2] {
        [answer(&mut self.ours.view(), call).await, answer(&mut self.theirs.filesystem(), call).await]
    }

    /// Make the call to both, which have to answer alike and to leave the same behind. Then they begin anew, if it has changed anything.
    async fn agree(&mut self, call: &Call) {
        let [ours, theirs] = self.call(call).await;
        assert_eq!(ours, theirs, "{call:?}: ours, theirs");
        let [ours, theirs] = self.trees();
        assert_eq!(ours, theirs, "{call:?}: left behind by ours, by theirs");
        if ours != self.at_first {
            *self = Self::new(self.writable).await;
        }
    }

    /// What is left of both.
    fn trees(&self) -> [BTreeMap<String, String>; 2] {
        [0, 1].map(|place: usize| {
            let mut tree = BTreeMap::new();
            describe(self.grounds[place].path(), "", &mut tree);
            tree
        })
    }
}

/// In memory where there is such a place: nothing here is about disks.
fn ground() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("folder")
}

fn describe(at: &Path, name: &str, tree: &mut BTreeMap<String, String>) {
    let kind = std::fs::symlink_metadata(at).expect("there");
    let what = if kind.is_dir() {
        for entry in std::fs::read_dir(at).expect("readable") {
            let entry = entry.expect("readable");
            describe(&entry.path(), &format!("{name}/{}", entry.file_name().to_string_lossy()), tree);
        }
        "folder".to_owned()
    } else if kind.is_symlink() {
        format!("link to {}", std::fs::read_link(at).expect("readable").display())
    } else {
        format!("file {:?}", String::from_utf8_lossy(&std::fs::read(at).expect("readable")))
    };
    tree.insert(name.to_owned(), what);
}

/// What a call answers, as text: the error code, or what there is to tell.
pub(super) async fn answer<V: Files>(view: &mut V, call: &Call) -> String {
    match made(view, call).await {
        Ok(answer) => answer,
        Err(error) => match view.convert_error_code(error) {
            Ok(code) => format!("{code:?}"),
            Err(trap) => format!("trap: {trap}"),
        },
    }
}

async fn made<V: Files>(view: &mut V, call: &Call) -> FsResult<String> {
    let root = view.get_directories().expect("folders").swap_remove(0).0;
    let at = || same(&root);
    let flags = |follow: bool| if follow { FOLLOW } else { PathFlags::empty() };
    let fine = |()| "done".to_owned();
    match call.clone() {
        Call::Open { path, follow, how, flags: open } => {
            let (how, open) = (OpenFlags::all() & open_flags(how), descriptor_flags(open));
            let fd = view.open_at(at(), flags(follow), path, how, open).await?;
            Ok(uses(view, &fd).await)
        }
        Call::MakeFolder(path) => view.create_directory_at(at(), path).await.map(fine),
        Call::RemoveFolder(path) => view.remove_directory_at(at(), path).await.map(fine),
        Call::Unlink(path) => view.unlink_file_at(at(), path).await.map(fine),
        Call::Rename(old, new) => view.rename_at(at(), old, at(), new).await.map(fine),
        Call::Link(old, new, follow) => view.link_at(at(), flags(follow), old, at(), new).await.map(fine),
        Call::Symlink(target, path) => view.symlink_at(at(), target, path).await.map(fine),
        Call::ReadLink(path) => view.readlink_at(at(), path).await,
        Call::Stat(path, follow) => view.stat_at(at(), flags(follow), path).await.map(stat),
        Call::SetTimes(path, follow, seconds) => {
            let time = NewTimestamp::Timestamp(Datetime { seconds, nanoseconds: 5 });
            view.set_times_at(at(), flags(follow), path.clone(), NewTimestamp::NoChange, time).await?;
            let stat = view.stat_at(at(), flags(follow), path).await?;
            Ok(format!(
                "{}",
                stat.data_modification_timestamp.is_some_and(|time| time.seconds == seconds && time.nanoseconds == 5)
            ))
        }
        Call::Write(path, offset, bytes) => {
            let fd = view.open_at(at(), FOLLOW, path, OpenFlags::empty(), READ | WRITE).await?;
            let written = view.write(same(&fd), vec![b'w'; bytes], offset).await?;
            Ok(format!("{written}; {}", uses(view, &fd).await))
        }
        Call::Cut(path, size) => {
            let fd = view.open_at(at(), FOLLOW, path, OpenFlags::empty(), READ | WRITE).await?;
            view.set_size(same(&fd), size).await?;
            Ok(stat(view.stat(fd).await?))
        }
        Call::List(path) => {
            let fd = view.open_at(at(), FOLLOW, path, OpenFlags::DIRECTORY, READ).await?;
            entries(view, &fd).await
        }
        Call::Sync(path) => {
            let fd = view.open_at(at(), FOLLOW, path, OpenFlags::empty(), READ).await?;
            view.sync(same(&fd)).await?;
            view.sync_data(fd).await.map(fine)
        }
        Call::Same(one, other) => {
            let one = view.open_at(at(), FOLLOW, one, OpenFlags::empty(), READ).await?;
            let other = view.open_at(at(), FOLLOW, other, OpenFlags::empty(), READ).await?;
            let hashes = [view.metadata_hash(same(&one)).await?, view.metadata_hash(same(&other)).await?];
            let hashes = hashes.map(|hash| (hash.lower, hash.upper));
            Ok(format!("{:?} {}", view.is_same_object(one, other).await.ok(), hashes[0] == hashes[1]))
        }
    }
}

/// Everything that can be asked of a descriptor, each with its own answer.
async fn uses<V: Files>(view: &mut V, fd: &Fd) -> String {
    let mut told = Vec::new();
    let mut tell = |view: &mut V, what: &str, answer: FsResult<String>| {
        let answer =
            answer.unwrap_or_else(|error| view.convert_error_code(error).map_or("trap".to_owned(), |code| format!("{code:?}")));
        told.push(format!("{what} {answer}"));
    };
    let answer = view.get_type(same(fd)).await.map(|kind| format!("{kind:?}"));
    tell(view, "type", answer);
    let answer = view.get_flags(same(fd)).await.map(|flags| format!("{flags:?}"));
    tell(view, "flags", answer);
    let answer = view.stat(same(fd)).await.map(stat);
    tell(view, "stat", answer);
    for (length, offset) in [(4, 0), (100, 8), (4, 100), (0, 0)] {
        let answer =
            view.read(same(fd), length, offset).await.map(|(bytes, end)| format!("{:?} {end}", String::from_utf8_lossy(&bytes)));
        tell(view, "read", answer);
    }
    for offset in [3, 12] {
        let answer = view.write(same(fd), b"abc".to_vec(), offset).await.map(|written| written.to_string());
        tell(view, "write", answer);
    }
    let answer = view.set_size(same(fd), 14).await.map(|()| "set".to_owned());
    tell(view, "size", answer);
    let answer = view.stat(same(fd)).await.map(stat);
    tell(view, "stat", answer);
    let answer = view.advise(same(fd), 0, 4, types::Advice::WillNeed).await.map(|()| "advised".to_owned());
    tell(view, "advise", answer);
    let answer = view.set_times(same(fd), NewTimestamp::NoChange, NewTimestamp::Now).await.map(|()| "set".to_owned());
    tell(view, "times", answer);
    let answer = view.read_via_stream(same(fd), 0).map(|_| "stream".to_owned());
    tell(view, "in", answer);
    let answer = view.write_via_stream(same(fd), 0).map(|_| "stream".to_owned());
    tell(view, "out", answer);
    let answer = view.append_via_stream(same(fd)).map(|_| "stream".to_owned());
    tell(view, "append", answer);
    let answer = entries(view, fd).await;
    tell(view, "list", answer);
    let answer = view
        .open_at(same(fd), PathFlags::empty(), "inside".to_owned(), OpenFlags::empty(), READ)
        .await
        .map(|_| "open".to_owned());
    tell(view, "open below", answer);
    told.join("; ")
}

async fn entries<V: Files>(view: &mut V, fd: &Fd) -> FsResult<String> {
    let stream = view.read_directory(same(fd)).await?;
    let mut names = Vec::new();
    while let Some(entry) = view.read_directory_entry(Resource::new_borrow(stream.rep())).await? {
        names.push(format!("{} {:?}", entry.name, entry.type_));
    }
    names.sort();
    HostDirectoryEntryStream::drop(view, stream).expect("dropped");
    Ok(names.join(", "))
}

fn stat(stat: types::DescriptorStat) -> String {
    // A folder's size is the file system's affair.
    let size = if stat.type_ == types::DescriptorType::Directory { 0 } else { stat.size };
    format!("{:?} {} {size}", stat.type_, stat.link_count)
}

fn open_flags(bits: u8) -> OpenFlags {
    let all = [OpenFlags::CREATE, OpenFlags::DIRECTORY, OpenFlags::EXCLUSIVE, OpenFlags::TRUNCATE];
    all.into_iter().enumerate().filter(|(bit, _)| bits & (1 << bit) != 0).fold(OpenFlags::empty(), |all, (_, flag)| all | flag)
}

fn descriptor_flags(bits: u8) -> DescriptorFlags {
    let all = [READ, WRITE, DescriptorFlags::MUTATE_DIRECTORY, DescriptorFlags::FILE_INTEGRITY_SYNC];
    all.into_iter()
        .enumerate()
        .filter(|(bit, _)| bits & (1 << bit) != 0)
        .fold(DescriptorFlags::empty(), |all, (_, flag)| all | flag)
}

const PATHS: [&str; 34] = [
    "file",
    "file/",
    "file/.",
    "file/..",
    "folder",
    "folder/",
    "folder/.",
    "folder/..",
    "folder/../..",
    "folder/inside",
    "folder/inner",
    "folder//inside",
    "./file",
    ".",
    "..",
    "",
    "/",
    "/etc",
    "../outside",
    "../root",
    "missing",
    "missing/",
    "missing/below",
    "link",
    "link/",
    "folder-link",
    "folder-link/",
    "folder-link/inside",
    "dangling",
    "loop",
    "way-out",
    "absolute",
    "above/outside",
    "there-and-back",
];

/// The cases of the crate's tests: file_pread_pwrite, file_truncation, file_truncation_readonly, interesting_paths, nofollow_errors,
/// dangling_symlink, symlink_loop, path_open_create_existing, path_open_missing, path_open_dirfd_not_dir, dir_fd_op_failures, path_filestat,
/// fd_filestat_get, fd_readdir, overwrite_preopen and file_stream_not_permitted are all among every path opened in every way and then used.
#[tokio::test]
async fn every_path_opened_in_every_way_answers_as_with_wasmtimes_own_files() {
    for writable in [true, false] {
        let mut pair = Pair::new(writable).await;
        for path in PATHS {
            for how in 0..16 {
                for (flags, follow) in [(1, true), (2, true), (3, true), (3, false), (0, false), (5, true), (9, true)] {
                    pair.agree(&Call::Open { path: path.to_owned(), follow, how, flags }).await;
                }
            }
        }
    }
}

/// path_rename, path_rename_trailing_slashes, path_rename_dir_trailing_slashes, path_link, path_symlink_trailing_slashes, symlink_create,
/// readlink, remove_directory, remove_nonempty_directory, unlink_file_trailing_slashes, symlink_filestat, file_settime_overflow: every path
/// in every operation, and every two paths in those that take two.
#[tokio::test]
async fn every_operation_on_every_path_answers_as_with_wasmtimes_own_files() {
    for writable in [true, false] {
        let mut pair = Pair::new(writable).await;
        for one in PATHS {
            let mut calls = vec![
                Call::MakeFolder(one.to_owned()),
                Call::RemoveFolder(one.to_owned()),
                Call::Unlink(one.to_owned()),
                Call::ReadLink(one.to_owned()),
                Call::List(one.to_owned()),
                Call::Sync(one.to_owned()),
            ];
            for follow in [false, true] {
                calls.push(Call::Stat(one.to_owned(), follow));
                calls.push(Call::SetTimes(one.to_owned(), follow, 1_000_000));
                calls.push(Call::SetTimes(one.to_owned(), follow, u64::MAX));
            }
            for other in PATHS {
                calls.push(Call::Rename(one.to_owned(), other.to_owned()));
                calls.push(Call::Link(one.to_owned(), other.to_owned(), false));
                calls.push(Call::Symlink(one.to_owned(), other.to_owned()));
                if writable {
                    calls.push(Call::Same(one.to_owned(), other.to_owned()));
                }
            }
            calls.push(Call::Link(one.to_owned(), "new".to_owned(), true));
            for call in calls {
                pair.agree(&call).await;
            }
        }
    }
}

fn path() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => proptest::sample::select(&["a", "b", "a/c", "b/c", "a/c/d", "file", "folder", "folder/inside", "link"][..]).prop_map(str::to_owned),
        1 => proptest::sample::select(&PATHS[..]).prop_map(str::to_owned),
    ]
}

pub(super) fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        3 => (path(), any::<bool>(), 0_u8..16, 0_u8..4).prop_map(|(path, follow, how, flags)| Call::Open { path, follow, how, flags }),
        2 => path().prop_map(Call::MakeFolder),
        1 => path().prop_map(Call::RemoveFolder),
        2 => path().prop_map(Call::Unlink),
        3 => (path(), path()).prop_map(|(old, new)| Call::Rename(old, new)),
        2 => (path(), path()).prop_map(|(old, new)| Call::Link(old, new, false)),
        2 => (path(), path()).prop_map(|(target, path)| Call::Symlink(target, path)),
        1 => (path(), any::<bool>()).prop_map(|(path, follow)| Call::Stat(path, follow)),
        2 => (path(), 0_u64..40, 0_usize..20).prop_map(|(path, offset, bytes)| Call::Write(path, offset, bytes)),
        1 => (path(), 0_u64..40).prop_map(|(path, size)| Call::Cut(path, size)),
        1 => path().prop_map(Call::List),
        1 => (path(), path()).prop_map(|(one, other)| Call::Same(one, other)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_calls_one_after_the_other_answer_as_with_wasmtimes_own_files(calls in proptest::collection::vec(call(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut pair = Pair::new(true).await;
            for call in &calls {
                let [ours, theirs] = pair.call(call).await;
                prop_assert_eq!(ours, theirs, "{:?}: ours, theirs", call);
            }
            let [ours, theirs] = pair.trees();
            prop_assert_eq!(ours, theirs, "left behind by ours, by theirs");
            Ok(())
        })?;
    }
}
