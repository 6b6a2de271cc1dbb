//! Whatever guests do, what is counted is what is there: bytes of all files and the number of all names, in a folder that was empty.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;

use super::like_wasmtime::{Call, answer, call};
use super::*;

/// Bytes and names below a folder.
fn there(folder: &Path) -> (u64, u64) {
    let (mut sizes, mut names) = (HashMap::new(), 0);
    let mut left = vec![folder.to_owned()];
    while let Some(folder) = left.pop() {
        for entry in std::fs::read_dir(folder).expect("readable") {
            let entry = entry.expect("readable");
            let metadata = entry.metadata().expect("there");
            names += 1;
            if metadata.is_dir() {
                left.push(entry.path());
            } else if metadata.is_file() {
                sizes.insert(metadata.ino(), metadata.len());
            }
        }
    }
    (sizes.values().sum(), names)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn after_any_calls_what_is_counted_is_what_is_there(calls in proptest::collection::vec(call(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let host = Host::new();
            host.make_folder("rw");
            let mut guest = host.guest(&[host.grant("rw")]).await;
            for call in &calls {
                answer(&mut guest.view(), call).await;
            }
            drop(guest);
            prop_assert_eq!(host.made("rw").await, there(&host.path("rw")));
            Ok(())
        })?;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn guests_that_change_the_same_files_at_once_get_no_more_than_the_limit() {
    let host = Arc::new(Host::new());
    host.make_folder("rw");
    let (bytes_max, files_max) = (200, 6);
    let grant = FolderGrant { bytes_max: Some(bytes_max), files_max: Some(files_max), ..host.grant("rw") };
    let mut runner = TestRunner::deterministic();
    let mut draw = move |count: usize| -> Vec<Call> {
        proptest::collection::vec(call(), count).new_tree(&mut runner).expect("calls").current()
    };
    for round in 0..10 {
        let guests: Vec<_> = (0..8)
            .map(|_| {
                let (host, grant, calls) = (host.clone(), grant.clone(), draw(300));
                tokio::spawn(async move {
                    let mut guest = host.guest(&[grant]).await;
                    for call in &calls {
                        answer(&mut guest.view(), call).await;
                    }
                })
            })
            .collect();
        for guest in guests {
            guest.await.expect("no panic");
        }
        let (counted, found) = (host.made("rw").await, there(&host.path("rw")));
        assert!(found.0 <= bytes_max && found.1 <= files_max, "round {round}: {found:?}");
        assert!(counted.0 >= found.0 && counted.1 == found.1, "round {round}: {counted:?} counted, {found:?} there");
    }
}
