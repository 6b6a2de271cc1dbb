//! How much guests may put into the folders that they may write to.

use std::fs::{self, Metadata};
use std::path::Path;

use laelaps_queue::{NewTask, State, Task};
use laelaps_tests::{guest, output, scaled};
use serde_json::{Value, json};

use super::{Yard, attack};

/// A yard whose attacker has `marks` as `/rw`, with these members in its grant as well.
async fn yard(limits: Value) -> Yard {
    let yard = Yard::open(&[], &[("zoo", guest("zoo"))]).await;
    let mut folder = json!({ "host": yard.site.path("marks"), "guest": "/rw", "writable": true });
    folder.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
    let route = json!({ "type": "fill-folder", "plugin": "zoo", "grants": { "folders": [folder] } });
    yard.reconfigure(&[route]).await
}

fn fill(key: String, data: Value) -> NewTask {
    let mut data = data;
    data["path"] = json!("/rw");
    attack(key, "fill-folder", data)
}

fn refused(ended: &Task) -> (u64, String) {
    assert_eq!(ended.state, State::Finished, "{:?}", ended.error_message);
    let told = output(ended);
    let kind = told["kind"].as_str().unwrap_or_else(|| panic!("nothing was refused: {told}")).to_owned();
    (told["files"].as_u64().unwrap(), kind)
}

/// Files below a folder, and the bytes that they hold by their length.
fn held(folder: &Path) -> (usize, u64) {
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap()).collect();
    (files.len(), files.iter().map(Metadata::len).sum())
}

#[tokio::test]
async fn a_guest_cannot_fill_a_folder_beyond_ten_thousand_files() {
    let mut yard = yard(json!({})).await;
    // Others' files are not counted, and not refused.
    for number in 0..20 {
        fs::write(yard.site.path("marks").join(format!("ours-{number}")), "x").unwrap();
    }
    let mut is_first = true;
    yard.survives("a guest that makes files without end", async |yard, round| {
        let ended = yard.ends(&[fill(format!("fill-{round}"), json!({ "files": 10_500 }))]).await;
        let (files, kind) = refused(&ended[0]);
        assert_eq!(kind, "QuotaExceeded");
        if std::mem::take(&mut is_first) {
            assert_eq!(files, 10_000);
        }
        assert_eq!(held(&yard.site.path("marks")).0, 10_020);
    })
    .await;
}

#[tokio::test]
async fn a_guest_cannot_make_a_sparse_file_beyond_a_gibibyte() {
    let mut yard = yard(json!({})).await;
    yard.survives("a guest that makes a sparse file", async |yard, round| {
        let data = json!({ "files": 1, "bytes": (1_u64 << 30) + 1, "sparse": true });
        let ended = yard.ends(&[fill(format!("sparse-{round}"), data)]).await;
        assert_eq!(refused(&ended[0]).1, "QuotaExceeded");
        assert!(held(&yard.site.path("marks")).1 <= 1 << 30);
    })
    .await;
}

#[tokio::test]
async fn a_guest_cannot_fill_a_folder_beyond_what_its_grant_says() {
    let limit = scaled(100) as u64 * 1_000_000;
    let mut yard = yard(json!({ "size_limit": limit, "file_limit": 100 })).await;
    yard.survives("a guest that writes without end", async |yard, round| {
        let ended = yard.ends(&[fill(format!("fill-{round}"), json!({ "files": 90, "bytes": 3_000_000 }))]).await;
        // The host says "quota" here, too; what wasi-libc makes of a failed write is an error of no certain kind.
        let (_, kind) = refused(&ended[0]);
        assert!(["QuotaExceeded", "Uncategorized"].contains(&kind.as_str()), "{kind}");
        let (files, bytes) = held(&yard.site.path("marks"));
        assert!(files <= 100 && bytes <= limit, "{files} files of {bytes} bytes, of {limit} allowed");
    })
    .await;
}
