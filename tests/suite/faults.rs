//! Faults to order (host/daemon/src/fault.rs): that no release has them, and what a host makes of them. `tests/run` leaves out what is below
//! `with_faults` where the program has none.

use std::process::Command;

use laelaps_tests::{has_faults, laelaps, workspace_file};
use serde_json::Value;

mod with_faults;

#[test]
fn only_a_build_for_tests_has_faults() {
    // tests/run asks for them, and tests/soak runs the same test on the release build, which must not have them.
    assert_eq!(has_faults(), cfg!(debug_assertions), "{}", laelaps().display());
}

#[test]
fn a_release_build_with_faults_does_not_compile() {
    let compile = |assertions: &str| {
        let mut rustc = Command::new("rustc");
        rustc.args(["--crate-type=lib", "--edition=2024", "--emit=metadata", "--cfg=feature=\"fault-injection\""]);
        rustc.args(["-o", "/dev/null", "-C", assertions]).arg(workspace_file("host/daemon/src/fault.rs"));
        // The rest of the crate is not there, so it fails in any case; it is the reason that counts.
        rustc.env("CARGO_PKG_VERSION", "0").current_dir(workspace_file(""));
        let output = rustc.output().unwrap();
        String::from_utf8_lossy(&output.stderr).contains("a release build must not have it")
    };
    assert!(compile("debug-assertions=no"));
    assert!(!compile("debug-assertions=yes"));
}

#[test]
fn a_release_build_has_no_debug_assertions_and_nobody_asks_for_faults() {
    let mut cargo = Command::new("cargo");
    cargo.args(["metadata", "--format-version=1", "--locked", "--offline", "--no-deps"]).current_dir(workspace_file(""));
    let metadata: Value = serde_json::from_slice(&cargo.output().unwrap().stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let daemon = packages.iter().find(|package| package["name"] == "laelaps").unwrap();
    assert!(daemon["features"]["fault-injection"].is_array(), "the feature has another name");
    for (feature, asks_for) in daemon["features"].as_object().unwrap() {
        assert!(!asks_for.to_string().contains("fault-injection"), "{feature} turns it on");
    }
    for package in packages {
        assert!(!package["dependencies"].to_string().contains("fault-injection"), "{} turns it on", package["name"]);
    }
    let manifest = std::fs::read_to_string(workspace_file("Cargo.toml")).unwrap();
    assert!(!manifest.contains("debug-assertions"), "a profile changes what keeps faults out of releases");
}
