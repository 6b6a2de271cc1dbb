//! The main job on real data: what components count equals what awk counts.

use std::collections::BTreeMap;
use std::process::Command;

use laelaps_tests::{LONG, Site, all_tasks, guest, output, submit, task, wait_for_finished, workspace_file};
use serde_json::json;

/// What awk says of the whole file, one number a line: requests, bytes, then `status-class count` for each class.
///
/// A combined log line is `address - user [time zone] "method path protocol" status bytes "referrer" "agent"`: split at quotes, the third
/// part is ` status bytes `. `-` bytes count as 0, which is what awk makes of them.
const AWK: &str = r#"
    BEGIN { FS = "\"" }
    { split($3, part, " "); requests++; bytes += part[2]; class[substr(part[1], 1, 1) "xx"]++ }
    END { print "requests", requests; printf "bytes %.0f\n", bytes; for (name in class) print name, class[name] }
"#;

#[tokio::test]
async fn ten_thousand_real_lines_in_a_hundred_tasks_sum_up_to_what_awk_counts() {
    let path = workspace_file("tests/data/apache_access.log");
    let answer = Command::new("awk").arg(AWK).arg(&path).output().unwrap();
    assert!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    let counted: BTreeMap<String, u64> = String::from_utf8(answer.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, number)| (name.to_owned(), number.parse().unwrap()))
        .collect();

    let site = Site::new().await;
    site.plug("access-log", &guest("access-log"));
    site.configure(json!({ "processors": 4, "routes": [{ "type": "access-log", "plugin": "access-log" }] }));
    let queue = site.queue().await;
    let log = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 10_000);
    let tasks: Vec<_> = lines
        .chunks(100)
        .enumerate()
        .map(|(number, lines)| {
            task(format!("chunk-{number}"), "access-log", json!({ "lines": lines, "first_line": number * 100 + 1 }))
        })
        .collect();
    assert_eq!(tasks.len(), 100);
    submit(&queue, &tasks).await;
    let host = site.start().await;
    wait_for_finished(&queue, 100, LONG).await;

    let mut summed: BTreeMap<String, u64> = BTreeMap::new();
    let mut malformed = Vec::new();
    for task in all_tasks(&queue).await {
        let report = output(&task);
        for name in ["requests", "bytes"] {
            *summed.entry(name.to_owned()).or_default() += report[name].as_u64().unwrap();
        }
        for (class, number) in report["status_classes"].as_object().unwrap() {
            *summed.entry(class.clone()).or_default() += number.as_u64().unwrap();
        }
        malformed.extend(report["malformed"].as_array().unwrap().iter().map(|line| line["line"].as_u64().unwrap()));
    }
    summed.retain(|_, number| *number > 0);
    assert_eq!(summed, counted);
    assert_eq!(malformed, [8_899], "the one line with a damaged tail is counted, and named");
    host.stop().await;
}
