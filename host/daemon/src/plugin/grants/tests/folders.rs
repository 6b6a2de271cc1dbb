//! Which folder a grant leads to, whatever guests and operators do to its path.

use std::os::unix::fs::symlink;

use super::super::nested;
use super::*;

/// What a guest reads in the file `name` of its first folder.
async fn read(guest: &mut Guest) -> Result<String, ErrorCode> {
    let fd = guest.open("name", OpenFlags::empty(), READ).await?;
    let (bytes, _) = told(guest.view().read(fd, 100, 0).await)?;
    Ok(String::from_utf8(bytes).expect("text"))
}

async fn leads_to(host: &Host, grant: &FolderGrant) -> Result<String, String> {
    let mut guest = host.try_guest(std::slice::from_ref(grant)).await?;
    read(&mut guest).await.map_err(|code| code.to_string())
}

fn named_folder(host: &Host, path: &str) {
    host.make_folder(path);
    write_file(&host.path(&format!("{path}/name")), path);
}

#[tokio::test]
async fn a_guest_that_puts_a_link_in_a_folders_place_gains_nothing() {
    let host = Host::new();
    named_folder(&host, "rw/in");
    named_folder(&host, "outside");
    let inner = FolderGrant::read_only(host.path("rw/in"), "/in");
    assert_eq!(leads_to(&host, &inner).await, Ok("rw/in".into()), "nobody may write above it yet");
    let mut attacker = host.guest(&[host.grant("rw")]).await;
    assert_eq!(attacker.rename("in", 0, "gone").await, Ok(()));
    symlink("../outside", host.path("rw/in")).expect("link");
    assert_eq!(leads_to(&host, &inner).await, Ok("rw/in".into()), "the folder that it led to before");
    // Nor does a grant gain anything that was never opened before, by whatever way it leads there.
    named_folder(&host, "rw/other/in");
    symlink(host.path("rw/other"), host.path("way")).expect("link");
    for path in ["rw/other/in", "way/in", "rw/gone/../in"] {
        let refused = leads_to(&host, &FolderGrant::read_only(host.path(path), "/in")).await.expect_err("refused");
        assert!(refused.contains("it lies within a folder that handlers may write to"), "{path}: {refused}");
    }
    assert_eq!(leads_to(&host, &FolderGrant::read_only(host.path("outside"), "/o")).await, Ok("outside".into()));
}

#[tokio::test]
async fn a_folder_that_an_operator_replaces_is_opened_anew() {
    let host = Host::new();
    let grant = FolderGrant::read_only(host.path("mount/current"), "/m");
    let missing = leads_to(&host, &grant).await.expect_err("it is not there yet");
    assert!(missing.contains("mount/current cannot be opened: No such file or directory"), "{missing}");
    // As Kubernetes mounts a volume: names that lead through a link, which is exchanged.
    named_folder(&host, "mount/version-1");
    named_folder(&host, "mount/version-2");
    symlink("version-1", host.path("mount/data")).expect("link");
    symlink("data", host.path("mount/current")).expect("link");
    assert_eq!(leads_to(&host, &grant).await, Ok("mount/version-1".into()));
    let mut guest = host.guest(std::slice::from_ref(&grant)).await;
    symlink("version-2", host.path("mount/new")).expect("link");
    std::fs::rename(host.path("mount/new"), host.path("mount/data")).expect("exchanged");
    assert_eq!(leads_to(&host, &grant).await, Ok("mount/version-2".into()));
    assert_eq!(read(&mut guest).await, Ok("mount/version-1".into()), "an attempt keeps what it has");
    // As a program that writes a new folder and puts it in the old one's place.
    std::fs::rename(host.path("mount/version-2"), host.path("mount/old")).expect("away");
    named_folder(&host, "mount/version-2");
    write_file(&host.path("mount/version-2/name"), "another");
    assert_eq!(leads_to(&host, &grant).await, Ok("another".into()));
    std::fs::remove_file(host.path("mount/data")).expect("removed");
    leads_to(&host, &grant).await.expect_err("it is not there any more");
}

#[tokio::test]
async fn a_folder_that_was_replaced_is_let_go_of_once_no_attempt_has_it() {
    let host = Host::new();
    let mut long = None;
    for day in 0..10 {
        host.make_folder("out");
        let mut guest = host.guest(&[host.grant("out")]).await;
        assert_eq!(guest.write("result", 10).await, Ok(10));
        assert_eq!(host.made("out").await, (10, 1), "day {day}: each folder is counted for itself");
        if day == 0 {
            long = Some(guest);
        }
        std::fs::rename(host.path("out"), host.path(&format!("day-{day}"))).expect("away");
    }
    // The first is still written to, the last is where the grant leads or led; one more may not have been looked at since.
    assert!(host.folders.roots.counted() <= 3, "{}", host.folders.roots.counted());
    assert_eq!(long.expect("an attempt").write("more", 10).await, Ok(10));
}

#[tokio::test]
async fn what_is_no_folder_is_told_as_that() {
    let host = Host::new();
    write_file(&host.path("file"), "");
    symlink("loop", host.path("loop")).expect("link");
    for (path, reason) in [("file", "Not a directory"), ("file/below", "Not a directory"), ("loop", "Too many levels")] {
        let refused = leads_to(&host, &FolderGrant::read_only(host.path(path), "/f")).await.expect_err("refused");
        assert!(refused.contains(reason), "{path}: {refused}");
    }
}

#[test]
fn folders_within_a_writable_one_are_found_by_whatever_path() {
    let host = Host::new();
    host.make_folder("rw/in/deep");
    host.make_folder("ro/in");
    host.make_folder("rw-beside");
    symlink(host.path("rw/in"), host.path("way-in")).expect("link");
    symlink(host.path("rw"), host.path("same")).expect("link");
    symlink(host.path("rw-beside"), host.path("rw/way-out")).expect("link");
    let found = |inner: &str, inner_writable: bool, outer: &str, outer_writable: bool| {
        let grant = |path: &str, writable| FolderGrant { writable, ..host.grant(path) };
        let (inner, outer) = (grant(inner, inner_writable), grant(outer, outer_writable));
        let both = [nested(&[&inner, &outer]) == [(0, 1)], nested(&[&outer, &inner]) == [(1, 0)]];
        let none = [nested(&[&inner, &outer]).is_empty(), nested(&[&outer, &inner]).is_empty()];
        assert!(both == [true; 2] || none == [true; 2], "{both:?}");
        both[0]
    };
    for inner in ["rw/in", "rw/in/deep", "way-in", "way-in/deep", "same/in", "rw/way-out", "rw/not-there", "rw/./in"] {
        for writable in [false, true] {
            assert!(found(inner, writable, "rw", true), "{inner}");
            assert!(found(inner, writable, "same", true) || inner == "rw/not-there", "{inner}");
            assert!(!found(inner, writable, "rw", false), "{inner}: handlers cannot write to the outer one");
        }
    }
    for beside in ["rw", "same", "rw-beside", "ro", "ro/in", "nowhere"] {
        assert!(!found(beside, true, "rw", true), "{beside}");
    }
    assert!(found("nowhere/in", false, "nowhere", true), "neither is there yet");
    assert!(found("rw", true, ".", true));
}
