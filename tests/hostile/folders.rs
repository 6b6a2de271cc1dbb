//! What guests try with folders that they were granted, and with those that they were not.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use laelaps_queue::State;
use laelaps_tests::{PATIENCE, guest, output, scaled};
use rustix::fs::{FileType, Mode, makedev, mknodat};
use serde_json::{Value, json};

use super::{Yard, attack};

/// A route that takes these kinds of the zoo's, with these folders.
fn route(plugin: &str, kinds: &str, folders: &Value) -> Value {
    json!({ "pattern": format!("^({kinds})$"), "plugin": plugin, "time_limit": 86_400, "grants": { "folders": folders } })
}

/// A yard whose attacker has the site's folder `marks` as `/rw`, writable.
async fn yard(kinds: &str) -> Yard {
    let yard = Yard::open(&[], &[("zoo", guest("zoo"))]).await;
    let marks = json!([{ "host": yard.site.path("marks"), "guest": "/rw", "writable": true }]);
    yard.reconfigure(&[route("zoo", kinds, &marks)]).await
}

#[tokio::test]
async fn a_path_out_of_a_grant_leads_nowhere() {
    let mut yard = yard("read-file|write-file|list-folder|remove-file").await;
    let secret = yard.site.path("secret");
    fs::write(&secret, "not yours").unwrap();
    let outside = secret.display().to_string();
    // What an operator's or another program's link leads to.
    symlink(&secret, yard.site.path("marks/way-out")).unwrap();
    symlink("..", yard.site.path("marks/up")).unwrap();
    let dots = format!("/rw{}/etc/passwd", "/..".repeat(40));
    let paths = [
        outside.as_str(),
        "/etc/passwd",
        "/rw/../secret",
        "/rw/./.././secret",
        "/rw//..//secret",
        "/rw/way-out",
        "/rw/way-out/",
        "/rw/up/secret",
        "/rw/up/up/etc/passwd",
        dots.as_str(),
        "/rw/\u{0}/../../secret",
        "..",
        "/",
        "/proc/self/environ",
        "/dev/zero",
        "/rw/up/",
        "/rw/..",
        "secret",
        "./secret",
    ];
    yard.survives("paths out of a grant", async |yard, round| {
        let kinds = ["read-file", "write-file", "list-folder", "remove-file"];
        let tasks: Vec<_> = (0..)
            .zip(paths.iter().flat_map(|path| kinds.iter().map(move |kind| (kind, path))))
            .map(|(number, (kind, path))| attack(format!("out-{round}-{number}"), kind, json!({ "path": path, "text": "mine" })))
            .collect();
        for ended in yard.ends(&tasks).await {
            let data = String::from_utf8_lossy(ended.data.as_deref().unwrap_or_default()).into_owned();
            // A link inside the grant is the guest's to remove.
            if ended.task_type == "remove-file" && (data.contains("/rw/way-out\"") || data.contains("/rw/up\"")) {
                continue;
            }
            assert_eq!((ended.state, ended.error_code.as_deref()), (State::Failed, Some("file")), "{data}: {ended:?}");
        }
        assert_eq!(fs::read_to_string(&secret).unwrap(), "not yours");
        let _ = fs::remove_file(yard.site.path("marks/way-out"));
        symlink(&secret, yard.site.path("marks/way-out")).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_link_that_a_guest_makes_leads_nowhere_outside_of_its_grant() {
    let mut yard = yard("link").await;
    let secret = yard.site.path("secret");
    fs::write(&secret, "not yours").unwrap();
    let targets = [
        "/etc/passwd".to_owned(),
        "../secret".to_owned(),
        "./../secret".to_owned(),
        "../../../../../../etc/passwd".to_owned(),
        secret.display().to_string(),
        "/proc/self/root/etc/passwd".to_owned(),
        "inner/../../secret".to_owned(),
        "../secret/".to_owned(),
    ];
    fs::create_dir(yard.site.path("marks/inner")).unwrap();
    yard.survives("links that guests make", async |yard, round| {
        let data = json!({ "path": "/rw/mine", "targets": targets });
        let ended = yard.ends(&[attack(format!("link-{round}"), "link", data)]).await;
        assert_eq!(ended[0].state, State::Finished, "{:?}", ended[0].error_message);
        assert_eq!(output(&ended[0])["leaks"], json!([]), "{}", output(&ended[0]));
        assert_eq!(fs::read_to_string(&secret).unwrap(), "not yours");
    })
    .await;
}

/// A grant within a writable grant: refused. And if a host were to start with it, a guest that puts a link in its place gets nothing by it.
#[tokio::test]
async fn a_grant_inside_of_a_writable_one_is_refused_and_leaks_nothing() {
    let yard = Yard::open(&[], &[("zoo", guest("zoo"))]).await;
    let (rw, inner, outside) = (yard.site.path("marks"), yard.site.path("marks/in"), yard.site.path("outside"));
    fs::create_dir(&inner).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "not yours").unwrap();
    let nested = json!([
        { "host": rw, "guest": "/rw", "writable": true },
        { "host": inner, "guest": "/in", "writable": true },
    ]);
    let mut yard = yard.stopped().await;
    yard.configure(&[route("zoo", "swap|read-file|write-file", &nested)]);
    let checked = yard.site.laelaps(["-c", "laelaps.yml", "check"]).await;
    if checked.code == Some(3) {
        let text = checked.stdout + &checked.stderr;
        assert!(text.contains("marks/in") && text.contains("writable"), "{text}");
        let mut host = yard.site.spawn_with(&[], &[]);
        let status = host.exited(PATIENCE).await;
        assert_eq!(status.code(), Some(3), "the host refuses what check refuses");
        return;
    }
    let mut host = yard.site.start().await;
    // It was not refused: show what that costs.
    let swap = attack("swap", "swap", json!({ "path": "/rw/in", "to": "../outside" }));
    yard.ends_with(&mut host, &[swap]).await;
    let read = attack("read", "read-file", json!({ "path": "/in/secret" }));
    let stolen = yard.ends_with(&mut host, &[read]).await;
    let text = String::from_utf8_lossy(stolen[0].output.as_deref().unwrap_or_default()).into_owned();
    panic!("a grant inside of a writable one was not refused; check: {:?}; a guest read through it: {text}", checked.code);
}

#[tokio::test]
async fn a_grant_is_the_folder_that_it_led_to_and_may_be_a_link() {
    // Kubernetes mounts what it updates so: NAME -> ..data/NAME, ..data -> ..DATE.
    let yard = Yard::open(&[], &[("zoo", guest("zoo"))]).await;
    let volume = yard.site.path("volume");
    for (date, text) in [("..one", "first"), ("..two", "second")] {
        fs::create_dir_all(volume.join(date).join("config")).unwrap();
        fs::write(volume.join(date).join("config/text"), text).unwrap();
    }
    symlink("..one", volume.join("..data")).unwrap();
    symlink("..data/config", volume.join("config")).unwrap();
    let grant = json!([{ "host": volume.join("config"), "guest": "/config" }]);
    let mut yard = yard.reconfigure(&[route("zoo", "read-file", &grant)]).await;
    let read = async |yard: &mut Yard, key: &str| {
        let ended = yard.ends(&[attack(key, "read-file", json!({ "path": "/config/text" }))]).await;
        output(&ended[0])["text"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(read(&mut yard, "first").await, "first");
    symlink("..two", volume.join("..tmp")).unwrap();
    fs::rename(volume.join("..tmp"), volume.join("..data")).unwrap();
    assert_eq!(read(&mut yard, "second").await, "second");
}

#[tokio::test]
async fn listings_of_a_large_folder_cost_the_host_little() {
    let mut yard = yard("list-many").await;
    let folder = yard.site.path("marks/many");
    fs::create_dir(&folder).unwrap();
    let long = "n".repeat(200);
    for number in 0..scaled(200_000) {
        fs::File::create(folder.join(format!("{number:06}-{long}"))).unwrap();
    }
    yard.survives("listings of a large folder", async |yard, round| {
        // Two at a time, each with nearly as many listings as its route allows handles.
        let tasks: Vec<_> = (0..4)
            .map(|number| {
                let data = json!({ "path": "/rw/many", "count": 100 });
                laelaps_queue::NewTask { max_running: Some(2), ..attack(format!("list-{round}-{number}"), "list-many", data) }
            })
            .collect();
        for ended in yard.ends(&tasks).await {
            // Few are enough where they are charged to the attempt; the host is what counts.
            assert!(ended.state.is_terminal(), "{ended:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_pipe_in_a_grant_holds_no_thread_and_no_other_plugin() {
    let yard = Yard::open(&[], &[("zoo", guest("zoo")), ("other", guest("zoo-2"))]).await;
    let (given, others) = (yard.site.path("marks"), yard.site.path("others"));
    fs::create_dir(&others).unwrap();
    fs::write(others.join("file"), "content").unwrap();
    assert!(Command::new("mkfifo").arg(given.join("pipe")).status().unwrap().success());
    symlink("pipe", given.join("link-to-pipe")).unwrap();
    // Only root can make one.
    let device =
        mknodat(rustix::fs::CWD, given.join("device"), FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(1, 5));
    let folders = |host| json!([{ "host": host, "guest": "/given", "writable": true }]);
    let quick = route("zoo", "read-file", &folders(&given));
    let mut yard = yard.reconfigure(&[quick, route("other", "list-folder|write-file", &folders(&others))]).await;
    yard.survives("pipes and devices in a grant", async |yard, round| {
        let mut files = vec!["pipe", "link-to-pipe"];
        files.extend(device.is_ok().then_some("device"));
        let tasks: Vec<_> = (0..100)
            .map(|number| {
                let path = format!("/given/{}", files[number % files.len()]);
                laelaps_queue::NewTask {
                    max_running: None,
                    ..attack(format!("open-{round}-{number}"), "read-file", json!({ "path": path }))
                }
            })
            .collect();
        for ended in yard.ends(&tasks).await {
            assert_eq!((ended.state, ended.error_code.as_deref()), (State::Failed, Some("file")), "{:?}", ended.error_message);
        }
        let other = attack(format!("other-{round}"), "list-folder", json!({ "path": "/given" }));
        let ended = yard.ends(&[other]).await;
        assert_eq!(ended[0].state, State::Finished, "another plugin's files: {:?}", ended[0].error_message);
    })
    .await;
}

#[tokio::test]
async fn there_is_no_network_and_no_environment() {
    let mut yard = yard("sockets|connect|environment").await;
    yard.survives("looks around for network and environment", async |yard, round| {
        let kinds = ["sockets", "connect", "environment"];
        let tasks: Vec<_> = kinds.iter().map(|kind| attack(format!("{kind}-{round}"), kind, json!({}))).collect();
        let ended = yard.ends(&tasks).await;
        assert_eq!(output(&ended[0])["open"], json!([]), "{ended:?}");
        assert_eq!(output(&ended[1])["connected"], false, "{ended:?}");
        assert_eq!(output(&ended[2]), json!({ "environment": {}, "arguments": [] }), "{ended:?}");
    })
    .await;
}
