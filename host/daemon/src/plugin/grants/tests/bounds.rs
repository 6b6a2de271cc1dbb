//! What guests make is counted, and what they may open and hold is bounded.

use rustix::fs::{CWD, FileType, Mode, mknodat};
use wasmtime_wasi::p2::bindings::filesystem::types::OpenFlags;

use super::super::handle::{Buffers, PIECE_BYTES_MAX};
use super::super::stream::Listing;
use super::*;

const KIB: usize = 1 << 10;

/// A host with the folder `rw`, and its grant with these limits.
fn limited(bytes_max: Option<u64>, files_max: Option<u64>) -> (Host, FolderGrant) {
    let host = Host::new();
    host.make_folder("rw");
    let grant = FolderGrant { bytes_max, files_max, ..host.grant("rw") };
    (host, grant)
}

#[tokio::test]
async fn what_guests_write_is_counted_and_what_was_there_is_not() {
    let (host, grant) = limited(Some(100 * KIB as u64), Some(10));
    write_file(&host.path("rw/before"), &"b".repeat(500 * KIB));
    let mut guest = host.guest(std::slice::from_ref(&grant)).await;
    assert_eq!(host.made("rw").await, (0, 0));
    assert_eq!(guest.write("one", 60 * KIB).await, Ok(60 * KIB as u64));
    assert_eq!(guest.write("two", 41 * KIB).await, Err(ErrorCode::Quota));
    assert_eq!(guest.write("two", 40 * KIB).await, Ok(40 * KIB as u64));
    assert_eq!(host.made("rw").await, (100 * KIB as u64, 2));
    // Writing over it makes nothing longer; another instance and another grant of the folder see the same count.
    assert_eq!(guest.write("one", 60 * KIB).await, Ok(60 * KIB as u64));
    let mut other = host.guest(std::slice::from_ref(&grant)).await;
    assert_eq!(other.write("three", 1).await, Err(ErrorCode::Quota));
    assert_eq!(other.write("before", 500 * KIB).await, Ok(500 * KIB as u64), "it is as long as before");
    assert_eq!(other.write("before", 500 * KIB + 1).await, Err(ErrorCode::Quota));
    let mut roomier = host.guest(&[FolderGrant { bytes_max: None, ..grant }]).await;
    assert_eq!(roomier.write("three", 1).await, Ok(1));
    // What guests made gives its room back, what they did not make does not.
    assert_eq!(guest.unlink("before").await, Ok(()));
    assert_eq!(guest.unlink("one").await, Ok(()));
    assert_eq!(host.made("rw").await, (40 * KIB as u64 + 1, 2));
}

#[tokio::test]
async fn a_file_that_was_there_counts_by_what_guests_add_to_it() {
    let (host, grant) = limited(Some(10), Some(1));
    write_file(&host.path("rw/before"), "12345");
    write_file(&host.path("rw/other"), "12345");
    let mut guest = host.guest(&[grant]).await;
    assert_eq!(guest.write("before", 15).await, Ok(15));
    assert_eq!(host.made("rw").await, (10, 1));
    assert_eq!(guest.write("before", 16).await, Err(ErrorCode::Quota));
    guest.open("before", OpenFlags::TRUNCATE, WRITE).await.expect("cut");
    assert_eq!(host.made("rw").await.0, 0);
    assert_eq!(guest.write("before", 1).await, Ok(1));
    assert_eq!(guest.write("other", 6).await, Err(ErrorCode::Quota), "it would be the second file");
}

#[tokio::test]
async fn holes_and_streams_count_like_writes() {
    let (host, grant) = limited(Some(10 * KIB as u64), None);
    let mut guest = host.guest(&[grant]).await;
    let fd = guest.open("file", CREATE, WRITE).await.expect("open");
    assert_eq!(told(guest.view().set_size(same(&fd), 1 << 40).await), Err(ErrorCode::Quota));
    assert_eq!(told(guest.view().write(same(&fd), vec![1], 1 << 40).await), Err(ErrorCode::Quota));
    assert_eq!(told(guest.view().set_size(same(&fd), 8 * KIB as u64).await), Ok(()));
    assert_eq!(host.made("rw").await.0, 8 * KIB as u64);
    assert_eq!(told(guest.view().set_size(same(&fd), 0).await), Ok(()));
    assert_eq!(host.made("rw").await.0, 0);
    for append in [false, true] {
        let stream = if append { guest.view().append_via_stream(same(&fd)) } else { guest.view().write_via_stream(same(&fd), 0) };
        let stream = stream.unwrap_or_else(|_| panic!("a stream"));
        let stream = guest.table.get_mut(&stream).expect("there");
        let chunk = || vec![b's'; 4 * KIB].into();
        stream.blocking_write_and_flush(chunk()).await.unwrap_or_else(|_| panic!("{append}: within the limit"));
        if append {
            let Err(wasmtime_wasi::p2::StreamError::LastOperationFailed(error)) = stream.blocking_write_and_flush(chunk()).await
            else {
                panic!("beyond the limit");
            };
            let error = guest.table.push(error).expect("room");
            assert_eq!(
                wasmtime_wasi::p2::bindings::filesystem::types::Host::filesystem_error_code(&mut guest.view(), error)
                    .expect("no trap"),
                Some(ErrorCode::Quota)
            );
        }
    }
    assert_eq!(host.made("rw").await.0, 8 * KIB as u64);
}

#[tokio::test]
async fn files_folders_and_links_count_by_name() {
    let (host, grant) = limited(None, Some(4));
    let mut guest = host.guest(&[grant]).await;
    let folder = guest.root(0);
    let root = || same(&folder);
    assert_eq!(guest.write("file", 1).await, Ok(1));
    assert_eq!(guest.make_folder("folder").await, Ok(()));
    assert_eq!(told(guest.view().symlink_at(root(), "file".into(), "link".into()).await), Ok(()));
    assert_eq!(told(guest.view().link_at(root(), PathFlags::empty(), "file".into(), root(), "name".into()).await), Ok(()));
    assert_eq!(host.made("rw").await, (1, 4));
    assert_eq!(guest.write("fifth", 1).await, Err(ErrorCode::Quota));
    assert_eq!(guest.make_folder("fifth").await, Err(ErrorCode::Quota));
    assert_eq!(told(guest.view().symlink_at(root(), "file".into(), "fifth".into()).await), Err(ErrorCode::Quota));
    assert_eq!(
        told(guest.view().link_at(root(), PathFlags::empty(), "file".into(), root(), "fifth".into()).await),
        Err(ErrorCode::Quota)
    );
    assert_eq!(guest.make_folder("folder").await, Err(ErrorCode::Exist), "what is there is told as that");
    assert_eq!(std::fs::read_dir(host.path("rw")).expect("readable").count(), 4);
    // One name of two: the bytes stay.
    assert_eq!(guest.unlink("file").await, Ok(()));
    assert_eq!(host.made("rw").await, (1, 3));
    assert_eq!(guest.unlink("name").await, Ok(()));
    assert_eq!(guest.unlink("link").await, Ok(()));
    assert_eq!(told(guest.view().remove_directory_at(root(), "folder".into()).await), Ok(()));
    assert_eq!(host.made("rw").await, (0, 0));
}

#[tokio::test]
async fn a_file_without_a_name_counts_until_it_is_closed() {
    let (host, grant) = limited(Some(100), None);
    let mut guest = host.guest(&[grant]).await;
    assert_eq!(guest.write("file", 100).await, Ok(100));
    let fd = guest.open("file", OpenFlags::empty(), READ).await.expect("open");
    assert_eq!(guest.unlink("file").await, Ok(()));
    assert_eq!(host.made("rw").await.0, 100);
    assert_eq!(guest.write("another", 1).await, Err(ErrorCode::Quota));
    HostDescriptor::drop(&mut guest.view(), fd).expect("closed");
    assert_eq!(guest.write("another", 100).await, Ok(100));
    // And a guest that ends closes what it has open.
    guest.open("another", OpenFlags::empty(), READ).await.expect("open");
    assert_eq!(guest.unlink("another").await, Ok(()));
    drop(guest);
    assert_eq!(host.made("rw").await, (0, 0));
}

#[tokio::test]
async fn renaming_moves_the_count_along() {
    let host = Host::new();
    host.make_folder("one");
    host.make_folder("two");
    let limit = |name| FolderGrant { bytes_max: Some(100), ..host.grant(name) };
    let mut guest = host.guest(&[limit("one"), limit("two")]).await;
    assert_eq!(guest.write("a", 60).await, Ok(60));
    assert_eq!(guest.write("b", 40).await, Ok(40));
    assert_eq!(guest.rename("b", 0, "a").await, Ok(()), "over another one");
    assert_eq!(host.made("one").await, (40, 1));
    assert_eq!(guest.rename("a", 1, "a").await, Ok(()));
    assert_eq!((host.made("one").await, host.made("two").await), ((0, 0), (40, 1)));
    assert_eq!(guest.write("b", 61).await, Ok(61));
    assert_eq!(guest.rename("b", 1, "b").await, Err(ErrorCode::Quota), "there is no room there");
    assert_eq!((host.made("one").await, host.made("two").await), ((61, 1), (40, 1)));
    // What is counted in one folder cannot be made larger through another one.
    let open = guest.open("b", OpenFlags::empty(), WRITE).await.expect("open");
    assert_eq!(guest.rename("b", 1, "c").await, Err(ErrorCode::CrossDevice));
    HostDescriptor::drop(&mut guest.view(), open).expect("closed");
    assert_eq!(guest.make_folder("folder").await, Ok(()));
    assert_eq!(guest.rename("folder", 1, "folder").await, Err(ErrorCode::CrossDevice));
    let (from, to) = (guest.root(0), guest.root(1));
    let linked = guest.view().link_at(from, PathFlags::empty(), "b".into(), to, "c".into()).await;
    assert_eq!(told(linked), Err(ErrorCode::CrossDevice));
}

#[tokio::test]
async fn what_others_delete_is_noticed_when_the_limit_is_reached() {
    let (host, grant) = limited(Some(100), Some(2));
    let mut guest = host.guest(&[grant]).await;
    assert_eq!(guest.make_folder("folder").await, Ok(()));
    assert_eq!(guest.write("folder/result", 100).await, Ok(100));
    // It may be that the folder was looked through a moment ago.
    std::fs::remove_file(host.path("rw/folder/result")).expect("collected");
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(120);
    while guest.write("folder/next", 100).await != Ok(100) {
        assert!(std::time::Instant::now() < patience, "the room is not given back");
    }
    assert_eq!(host.made("rw").await, (100, 2));
}

#[tokio::test]
async fn a_part_of_the_disk_stays_free() {
    let (host, grant) = limited(None, None);
    let mut guest = host.guest(&[grant]).await;
    let fd = guest.open("file", CREATE, WRITE).await.expect("open");
    // A hole needs no space, but is counted as if it did.
    assert_eq!(told(guest.view().set_size(same(&fd), 1 << 60).await), Err(ErrorCode::InsufficientSpace));
    assert_eq!(told(guest.view().set_size(same(&fd), 1 << 20).await), Ok(()));
}

#[tokio::test]
async fn pipes_sockets_and_devices_cannot_be_opened_and_keep_nobody_waiting() {
    let (host, grant) = limited(None, None);
    mknodat(CWD, host.path("rw/pipe"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).expect("a pipe");
    std::os::unix::fs::symlink("pipe", host.path("rw/link")).expect("a link");
    let _listener = std::os::unix::net::UnixListener::bind(host.path("rw/socket")).expect("a socket");
    let mut guest = host.guest(&[grant, FolderGrant::read_only("/dev", "/dev")]).await;
    for path in ["pipe", "link", "socket"] {
        for (how, flags) in
            [(OpenFlags::empty(), READ), (OpenFlags::empty(), WRITE), (CREATE, WRITE), (OpenFlags::TRUNCATE, READ)]
        {
            assert_eq!(guest.open(path, how, flags).await.map(|_| ()), Err(ErrorCode::NotPermitted), "{path} {how:?} {flags:?}");
        }
    }
    let now = wasmtime_wasi::p2::bindings::filesystem::types::NewTimestamp::Now;
    let root = guest.root(0);
    assert_eq!(told(guest.view().set_times_at(root, FOLLOW, "pipe".into(), now, now).await), Err(ErrorCode::NotPermitted));
    let devices = guest.root(1);
    let opened = guest.view().open_at(devices, FOLLOW, "null".into(), OpenFlags::empty(), READ).await;
    assert_eq!(told(opened).map(|_| ()), Err(ErrorCode::NotPermitted));
    assert_eq!(guest.list("").await, Err(ErrorCode::NoEntry));
    assert_eq!(guest.list(".").await.expect("listed"), ["link", "pipe", "socket"], "they are seen");
    assert_eq!(guest.unlink("pipe").await, Ok(()), "and can be removed");
}

#[tokio::test]
async fn a_listing_holds_a_few_entries_at_a_time_however_many_there_are() {
    const FILES: usize = 3_000;
    let (host, grant) = limited(None, None);
    for number in 0..FILES {
        write_file(&host.path(&format!("rw/{number:060}")), "");
    }
    let mut guest = host.guest(&[grant]).await;
    assert_eq!(guest.list(".").await.expect("listed").len(), FILES);
    let root = guest.root(0);
    for _ in 0..100 {
        let entries = told(guest.view().read_directory(same(&root)).await).expect("listed");
        for _ in 0..FILES / 2 {
            told(guest.view().read_directory_entry(Resource::new_borrow(entries.rep())).await).expect("an entry");
            let listing = guest.table.get(&Resource::<Listing>::new_borrow(entries.rep())).expect("there");
            assert!(listing.held_bytes() <= 8 * KIB, "{}", listing.held_bytes());
        }
    }
    // Once the streams of an attempt hold much together, a listing gets by with less, and still tells every entry.
    let _held: Vec<_> = (0..100).map(|_| guest.files.granted[0].0.grant.buffers.take(PIECE_BYTES_MAX)).collect();
    assert_eq!(guest.list(".").await.expect("listed").len(), FILES);
    let entries = told(guest.view().read_directory(same(&root)).await).expect("listed");
    let listing = guest.table.get(&Resource::<Listing>::new_borrow(entries.rep())).expect("there");
    assert!(listing.held_bytes() <= KIB, "{}", listing.held_bytes());
}

#[tokio::test]
async fn streams_get_by_with_little_once_they_hold_much_together() {
    let (host, grant) = limited(None, None);
    let mut guest = host.guest(&[grant]).await;
    let fd = guest.open("file", CREATE, READ | WRITE).await.expect("open");
    let stream = guest.view().write_via_stream(same(&fd), 0).unwrap_or_else(|_| panic!("a stream"));
    let stream = guest.table.get_mut(&stream).expect("there");
    // Without leave, a guest could have as much of its memory in the host as it has streams.
    let written = stream.write(vec![0; PIECE_BYTES_MAX + 1].into());
    assert!(matches!(written, Err(wasmtime_wasi::p2::StreamError::Trap(_))), "{written:?}");

    let buffers = Arc::new(Buffers::default());
    let held: Vec<_> = (0..100).map(|_| buffers.take(buffers.piece())).collect();
    let bytes: usize = held.iter().map(|share| share.bytes()).sum();
    assert!(bytes < 3 << 20, "{bytes}");
    drop(held);
    assert_eq!(buffers.piece(), PIECE_BYTES_MAX);
}

#[tokio::test]
async fn an_endless_path_is_refused_before_anybody_walks_it() {
    let (host, grant) = limited(None, None);
    let mut guest = host.guest(&[grant]).await;
    assert_eq!(guest.open(&"./".repeat(1 << 20), OpenFlags::empty(), READ).await.map(|_| ()), Err(ErrorCode::NameTooLong));
}
