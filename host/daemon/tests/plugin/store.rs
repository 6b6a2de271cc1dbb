//! Replacing plugins in a folder, in all the ways that people and programs do it.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use laelaps::plugin::{Config, Digest, Engine, Error, PluginStatus, Store};
use tempfile::TempDir;

use crate::guests;
use crate::support::{PATIENCE, config};

/// A store that watches a folder of its own.
struct Kennel {
    store: Arc<Store>,
    folder: PathBuf,
    handler: Vec<u8>,
    _home: TempDir,
}

impl Kennel {
    async fn new() -> Self {
        let home = tempfile::tempdir().expect("folder");
        let folder = home.path().join("plugins");
        fs::create_dir(&folder).expect("made");
        Self::on(home, folder).await
    }

    async fn on(home: TempDir, folder: PathBuf) -> Self {
        let config = Config { folder: folder.clone(), ..config() };
        let store = Store::open(Engine::new(&config).expect("engine"), config).await.expect("opened");
        Self { store, folder, handler: guests::handler(), _home: home }
    }

    fn edition(&self, number: u32) -> Vec<u8> {
        guests::edition(&self.handler, number)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.join(file)
    }

    fn serving(&self, plugin: &str) -> Option<Digest> {
        self.store.current(plugin).map(|version| version.digest())
    }

    fn status(&self, plugin: &str) -> Option<PluginStatus> {
        self.store.list().into_iter().find(|status| status.name == plugin)
    }

    /// Wait, without asking for a look, until a plugin serves this.
    async fn serves(&self, plugin: &str, digest: Option<Digest>) {
        let mut changes = self.store.changes();
        let wait = async {
            while self.serving(plugin) != digest {
                changes.changed().await.expect("the store lives");
            }
        };
        tokio::time::timeout(PATIENCE, wait)
            .await
            .unwrap_or_else(|_| panic!("{plugin} serves {:?}, not {digest:?}", self.serving(plugin)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_dropped_in_serves_and_a_new_name_is_a_new_plugin() {
    let kennel = Kennel::new().await;
    assert!(kennel.store.list().is_empty());
    fs::write(kennel.path("a.wasm"), kennel.edition(1)).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.edition(1)))).await;
    fs::write(kennel.path("b.wasm"), kennel.edition(1)).expect("written");
    kennel.serves("b", Some(Digest::of(&kennel.edition(1)))).await;
    assert!(kennel.serving("a").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_there_at_the_start_serves_once_the_store_is_open() {
    let home = tempfile::tempdir().expect("folder");
    fs::write(home.path().join("a.wasm"), guests::handler()).expect("written");
    let folder = home.path().to_owned();
    let kennel = Kennel::on(home, folder).await;
    assert_eq!(kennel.serving("a"), Some(Digest::of(&kennel.handler)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_is_replaced_in_place_by_renaming_and_through_links() {
    let kennel = Kennel::new().await;
    // In place.
    fs::write(kennel.path("a.wasm"), kennel.edition(1)).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.edition(1)))).await;
    fs::write(kennel.path("a.wasm"), kennel.edition(2)).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.edition(2)))).await;
    // By renaming over it.
    fs::write(kennel.path("a.wasm.new"), kennel.edition(3)).expect("written");
    fs::rename(kennel.path("a.wasm.new"), kennel.path("a.wasm")).expect("renamed");
    kennel.serves("a", Some(Digest::of(&kennel.edition(3)))).await;
    let status = kennel.status("a").expect("listed");
    assert_eq!(status.previous, [Digest::of(&kennel.edition(2)), Digest::of(&kennel.edition(1))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_config_map_is_followed_through_its_links() {
    let kennel = Kennel::new().await;
    for (data, number) in [("..one", 1), ("..two", 2)] {
        fs::create_dir(kennel.path(data)).expect("made");
        fs::write(kennel.path(data).join("a.wasm"), kennel.edition(number)).expect("written");
    }
    symlink("..one", kennel.path("..data")).expect("linked");
    symlink("..data/a.wasm", kennel.path("a.wasm")).expect("linked");
    kennel.serves("a", Some(Digest::of(&kennel.edition(1)))).await;
    symlink("..two", kennel.path("..data_tmp")).expect("linked");
    fs::rename(kennel.path("..data_tmp"), kennel.path("..data")).expect("renamed");
    fs::remove_dir_all(kennel.path("..one")).expect("removed");
    kennel.serves("a", Some(Digest::of(&kennel.edition(2)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_is_refused_leaves_the_serving_version_alone() {
    let kennel = Kennel::new().await;
    let good = kennel.edition(1);
    fs::write(kennel.path("a.wasm"), &good).expect("written");
    kennel.serves("a", Some(Digest::of(&good))).await;
    for bad in [&good[..good.len() / 2], b"\0asm\x01\0\0\0", b"nonsense", b""] {
        fs::write(kennel.path("a.wasm"), bad).expect("written");
        kennel.store.rescan().await;
        assert_eq!(kennel.serving("a"), Some(Digest::of(&good)));
        let refused = kennel.status("a").expect("listed").refused.expect("refused");
        assert_eq!(refused.digest, Some(Digest::of(bad)));
    }
    assert!(kennel.store.rescan().await.refused.is_empty(), "said once");
    fs::write(kennel.path("a.wasm"), &good).expect("written");
    assert!(kennel.store.rescan().await.admitted.is_empty(), "it has served all the time");
    assert_eq!(kennel.status("a").expect("listed").refused, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_content_again_is_no_event() {
    let kennel = Kennel::new().await;
    fs::write(kennel.path("a.wasm"), &kennel.handler).expect("written");
    kennel.store.rescan().await;
    let before = kennel.store.current("a").expect("serving").order();
    let changes = *kennel.store.changes().borrow();
    fs::write(kennel.path("copy"), &kennel.handler).expect("written");
    fs::rename(kennel.path("copy"), kennel.path("a.wasm")).expect("renamed");
    let rescan = kennel.store.rescan().await;
    assert!(rescan.admitted.is_empty() && rescan.refused.is_empty() && rescan.removed.is_empty(), "{rescan:?}");
    assert_eq!(kennel.store.current("a").expect("serving").order(), before);
    assert_eq!(*kennel.store.changes().borrow(), changes);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_file_unloads_its_plugin_and_held_versions_live_on() {
    let kennel = Kennel::new().await;
    fs::write(kennel.path("a.wasm"), &kennel.handler).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.handler))).await;
    let held = kennel.store.current("a").expect("serving");
    fs::remove_file(kennel.path("a.wasm")).expect("removed");
    kennel.serves("a", None).await;
    assert!(held.is_retired());
    assert!(kennel.status("a").is_none());
    fs::write(kennel.path("a.wasm"), &kennel.handler).expect("written");
    kennel.serves("a", Some(held.digest())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_still_being_written_is_waited_for() {
    let kennel = Kennel::new().await;
    let whole = kennel.edition(1);
    let path = kennel.path("a.wasm");
    let writer = tokio::spawn({
        let (whole, path) = (whole.clone(), path.clone());
        async move { write_slowly(&path, &whole).await }
    });
    kennel.serves("a", Some(Digest::of(&whole))).await;
    writer.await.expect("no panic");
    assert_eq!(kennel.status("a").expect("listed").refused, None);
}

/// In twenty pieces, with less between them than a file has to lie still.
async fn write_slowly(path: &Path, bytes: &[u8]) {
    let mut file = fs::File::create(path).expect("made");
    let mut pause = tokio::time::interval(Duration::from_millis(30));
    for piece in bytes.chunks(bytes.len() / 20) {
        file.write_all(piece).expect("written");
        pause.tick().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_files_with_a_plugins_name_are_looked_at() {
    let kennel = Kennel::new().await;
    for other in ["notes.txt", ".hidden.wasm", "a.cwasm", "bad name.wasm"] {
        fs::write(kennel.path(other), &kennel.handler).expect("written");
    }
    let rescan = kennel.store.rescan().await;
    assert!(rescan.admitted.is_empty() && rescan.refused.is_empty());
    assert!(kennel.store.list().is_empty());
    fs::create_dir(kennel.path("dir.wasm")).expect("made");
    kennel.store.rescan().await;
    assert_eq!(kennel.status("dir").expect("listed").refused.expect("refused").reason, "it is not a file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_goes_away_unloads_nothing_and_is_watched_again_when_it_is_back() {
    let kennel = Kennel::new().await;
    fs::write(kennel.path("a.wasm"), kennel.edition(1)).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.edition(1)))).await;
    let aside = kennel.folder.with_extension("aside");
    fs::rename(&kennel.folder, &aside).expect("renamed");
    assert!(kennel.store.rescan().await.unreadable.is_some());
    assert!(kennel.serving("a").is_some());
    fs::create_dir(&kennel.folder).expect("made");
    fs::write(kennel.path("a.wasm"), kennel.edition(2)).expect("written");
    kennel.serves("a", Some(Digest::of(&kennel.edition(2)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_not_there_at_the_start_is_an_error_with_a_hint() {
    let config = Config { folder: "/nowhere/plugins".into(), ..config() };
    let error = Store::open(Engine::new(&config).expect("engine"), config).await.err().expect("refused");
    assert!(matches!(error, Error::Folder { .. }));
    assert!(error.to_string().contains("/nowhere/plugins"), "{error}");
    assert!(error.hint().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_swaps_with_broken_files_between_end_with_the_last_good_one() {
    let kennel = Kennel::new().await;
    for number in 1..=10 {
        let content = if number % 5 == 0 { kennel.handler[..1000].to_vec() } else { kennel.edition(number) };
        fs::write(kennel.path("next"), content).expect("written");
        fs::rename(kennel.path("next"), kennel.path("a.wasm")).expect("renamed");
        let rescan = kennel.store.rescan().await;
        assert!(rescan.unsettled.is_empty());
    }
    assert_eq!(kennel.serving("a"), Some(Digest::of(&kennel.edition(9))));
    assert_eq!(kennel.status("a").expect("listed").previous.len(), 3);
}
