//! `laelaps watchdog`: shell scripts as masters and children. `tests/run` leaves out what is below `with_zookeeper` where there is none.

use laelaps_tests::Site;

mod with_zookeeper;

#[tokio::test]
async fn without_servers_a_command_says_how_to_name_them() {
    let site = Site::new().await;
    let answer = site.laelaps(["watchdog", "queue-count", "/q"]).await;
    assert_eq!(answer.code, Some(2), "{answer:?}");
    assert_eq!(
        answer.stderr,
        "error: no ZooKeeper servers are named\nhint: add --servers HOST:PORT,..., or set LAELAPS_WATCHDOG_SERVERS\n"
    );
}

#[tokio::test]
async fn servers_that_do_not_answer_are_named() {
    let site = Site::new().await;
    // Nobody listens on the discard port.
    let arguments = ["watchdog", "status", "/q", "--servers", "127.0.0.1:9", "--session-timeout", "300ms"];
    let answer = site.laelaps(arguments).await;
    assert_eq!(answer.code, Some(8), "{answer:?}");
    assert!(answer.stderr.contains("no ZooKeeper server let us in") && answer.stderr.contains("127.0.0.1:9"), "{answer:?}");
    assert!(answer.stderr.contains("\nhint: check the server list"), "{answer:?}");
}
