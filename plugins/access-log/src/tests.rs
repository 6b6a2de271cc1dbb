//! The whole handler, run natively, against lines made here and the real log of tests/data.

use std::io::Write;
use std::process::Command;

use laelaps_plugin::testing::Attempt;
use laelaps_plugin::{Cancellation, FailureKind, Outcome, json};
use serde_json::Value;

use crate::counter::{Counter, Visitors};
use crate::line::{self, unescape};
use crate::summarise;

const LOG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/apache_access.log");
const GOOD: &str = r#"1.2.3.4 - - [17/May/2015:10:05:03 +0000] "GET /a?b=c HTTP/1.1" 200 203 "http://r/" "curl/8""#;

fn report(data: Value) -> Value {
    Attempt::of(data).run(summarise).output()
}

fn rejected(data: Value) -> String {
    let error = Attempt::of(data).run(summarise).error();
    assert_eq!((error.kind(), error.code()), (FailureKind::Reject, "bad-data"));
    error.message().to_owned()
}

/// What awk says about the real log.
fn awk(program: &str) -> Vec<String> {
    let output = Command::new("awk").arg(program).arg(LOG).output().expect("awk runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("awk writes text").lines().map(str::to_owned).collect()
}

#[test]
fn the_real_log_counts_as_awk_counts_it() {
    let report = report(json!({ "path": LOG, "visitors": "list" }));
    assert_eq!(report["requests"].to_string(), awk("END { print NR }")[0]);
    assert_eq!(report["bytes"].to_string(), awk("{ bytes += $10 } END { printf \"%.0f\\n\", bytes }")[0]);
    assert_eq!(report["visitors"].to_string(), awk("!seen[$1]++ { visitors++ } END { print visitors }")[0]);
    let mut addresses = awk("!seen[$1]++ { print $1 }");
    addresses.sort();
    assert_eq!(report["visitor_addresses"], json!(addresses));
    for class in 1..=5 {
        let expected = &awk(&format!("$9 >= {class}00 && $9 < {}00 {{ n++ }} END {{ print n + 0 }}", class + 1))[0];
        assert_eq!(&report["status_classes"][format!("{class}xx")].to_string(), expected, "{class}xx");
    }
    for (place, name, field) in [("top_paths", "path", "$7"), ("top_referrers", "referrer", "substr($11, 2, length($11) - 2)")] {
        let program = format!(
            "{{ key = {field}; sub(/\\?.*/, \"\", key); if (key != \"-\") n[key]++ }} END {{ for (k in n) print n[k], k }}"
        );
        let program = if place == "top_paths" { program } else { program.replace("sub(/\\?.*/, \"\", key);", "") };
        let mut counts: Vec<(u64, String)> = awk(&program)
            .iter()
            .filter_map(|line| line.split_once(' ').map(|(count, key)| (count.parse().expect("a count"), key.to_owned())))
            .collect();
        counts.sort_by(|a, b| b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)));
        let top: Vec<Value> = counts.iter().take(10).map(|(count, key)| json!({ name: key, "requests": count })).collect();
        assert_eq!(report[place], json!(top));
    }
    let hours = awk("{ n[substr($4, 2, 14)]++ } END { for (hour in n) print n[hour], hour }");
    assert_eq!(report["hourly"].as_object().map(serde_json::Map::len), Some(hours.len()));
    for hour in hours {
        let (count, hour) = hour.split_once(' ').expect("a count and an hour");
        let key = format!("2015-05-{}T{}+00:00", &hour[..2], &hour[12..]);
        assert_eq!(report["hourly"][&key].to_string(), count, "{key}");
    }
    assert_eq!(report.get("inexact"), None);
}

#[test]
fn the_real_logs_damaged_line_is_counted_and_named() {
    let report = report(json!({ "path": LOG }));
    assert_eq!(report["malformed_total"], 1);
    let named = &report["malformed"][0];
    assert_eq!((&named["line"], &named["counted"]), (&json!(8899), &json!(true)));
    assert_eq!(named["reason"], "the agent's quotes are not closed");
    assert_eq!(report["requests"], 10_000);
}

#[test]
fn ranges_that_touch_add_up_to_the_whole_file() {
    let whole = report(json!({ "path": LOG }));
    let length = std::fs::metadata(LOG).expect("the log is there").len();
    for parts in [1, 2, 7, 100] {
        let bounds: Vec<u64> = (0..=parts).map(|part| length * part / parts).collect();
        let reports: Vec<Value> =
            bounds.windows(2).map(|range| report(json!({ "path": LOG, "from": range[0], "to": range[1] }))).collect();
        for member in ["lines", "requests", "bytes", "malformed_total"] {
            let sum: u64 = reports.iter().filter_map(|report| report[member].as_u64()).sum();
            assert_eq!(Some(sum), whole[member].as_u64(), "{member} of {parts} parts");
        }
    }
    // A range that begins exactly at a line, one that is empty, and one beyond the end.
    let first = std::fs::read(LOG).expect("the log is there").iter().position(|byte| *byte == b'\n').expect("a line") + 1;
    assert_eq!(report(json!({ "path": LOG, "from": first }))["requests"], 9_999);
    assert_eq!(report(json!({ "path": LOG, "to": first }))["requests"], 1);
    assert_eq!(report(json!({ "path": LOG, "from": first, "to": first }))["requests"], 0);
    assert_eq!(report(json!({ "path": LOG, "from": length + 10 }))["requests"], 0);
}

#[test]
fn text_lines_and_file_say_the_same() {
    let text = std::fs::read_to_string(LOG).expect("the log is there");
    let whole = report(json!({ "path": LOG }));
    assert_eq!(report(json!({ "text": text })), whole);
    assert_eq!(report(json!({ "lines": text.lines().collect::<Vec<_>>() })), whole);
    assert_eq!(report(json!({ "text": text.replace('\n', "\r\n") })), whole);
}

#[test]
fn a_part_names_lines_by_their_number_in_the_whole() {
    let data = json!({ "lines": [GOOD, "", "garbage"], "first_line": 101 });
    let report = report(data);
    assert_eq!((&report["lines"], &report["requests"]), (&json!(3), &json!(1)));
    assert_eq!(
        report["malformed"],
        json!([{ "line": 103, "reason": "no space after the address", "counted": false, "text": "garbage" }])
    );
}

#[test]
fn every_damage_is_named_and_only_a_damaged_tail_counts() {
    let damages = [
        ("1.2.3.4", "", "the address is neither"),
        ("1.2.3.4 ", "1.2.3.400 ", "the address is neither"),
        ("1.2.3.4 ", "- ", "the address is neither"),
        ("[17", "17", "no time in brackets"),
        ("0] ", "0 ", "the time's bracket is not closed"),
        ("17/May", "32/May", "the time is not like"),
        ("17/May/2015", "29/Feb/2015", "the time is not like"),
        ("10:05", "24:05", "the time is not like"),
        ("+0000", "0000", "the time is not like"),
        ("+0000", "+00ä", "the time is not like"),
        ("\"GET", "GET", "the request is not in quotes"),
        ("GET /a?b=c HTTP/1.1", "-", "the request is not like"),
        ("GET /a?b=c HTTP/1.1", "\\x16\\x03 /a HTTP/1.1", "the request is not like"),
        ("1\" 200", "1\"200", "no space after the request"),
        (" 200 ", " 2000 ", "the status is not"),
        (" 200 ", " 999 ", "the status is not"),
        (" 203 ", " +203 ", "the bytes are neither"),
    ];
    for (good, bad, reason) in damages {
        let line = GOOD.replacen(good, bad, 1);
        assert_ne!(line, GOOD, "{good} is in the line");
        let found = line::parse(&line).expect_err(&line);
        assert!(found.starts_with(reason), "{line}: {found}");
    }
    for (end, reason) in [
        (" \"http", "referrer and agent are missing"),
        ("ttp://r/", "the referrer is not in quotes"),
        (" \"curl", "the agent is missing"),
        ("/8\"", "the agent's quotes are not closed"),
    ] {
        let line = &GOOD[..GOOD.find(end).expect(end)];
        let entry = line::parse(line).expect(line);
        assert_eq!((entry.bytes, entry.tail), (203, Err(reason)), "{line}");
    }
}

#[test]
fn what_real_servers_write_is_understood() {
    let entry = |line: &str| line::parse(line).map(|entry| (entry.path.to_owned(), entry.bytes, entry.hour.to_string()));
    let hour = "2015-05-17T10+00:00".to_owned();
    for (good, other, path, bytes) in [
        (" 203 ", " - ", "/a", 0),
        ("1.2.3.4", "2001:db8::1", "/a", 203),
        ("1.2.3.4", "crawl-66-249.googlebot.com", "/a", 203),
        ("- - [", "- Jane Doe [", "/a", 203),
        ("GET /a?b=c HTTP/1.1", "GET /old", "/old", 203),
        ("GET /a?b=c HTTP/1.1", "GET /with space HTTP/1.0", "/with space", 203),
        ("GET /a?b=c HTTP/1.1", r#"GET /say\"hi\" HTTP/1.0"#, r#"/say\"hi\""#, 203),
        ("GET /a?b=c HTTP/1.1", "OPTIONS * HTTP/1.1", "*", 203),
        ("curl/8\"", "curl/8\" 0.003 \"extra\"", "/a", 203),
    ] {
        let line = GOOD.replacen(good, other, 1);
        assert_eq!(entry(&line), Ok((path.to_owned(), bytes, hour.clone())), "{line}");
    }
    let summer = GOOD.replace("17/May/2015:10:05:03 +0000", "29/Feb/2016:23:59:60 -0730");
    assert_eq!(entry(&summer).expect("a leap second of a leap day").2, "2016-02-29T23-07:30");
    assert_eq!(unescape(r#"a\"b\\\"c\x16"#), r#"a"b\"c\x16"#);
}

#[test]
fn bytes_that_are_no_text_and_lines_without_end_do_not_stop_it() {
    let mut file = tempfile();
    let path = file.1.clone();
    file.0.write_all(GOOD.as_bytes()).expect("write");
    file.0.write_all(b"\n\xff\xfe\x00\n").expect("write");
    file.0.write_all(&b"x".repeat(3_000_000)).expect("write");
    file.0.write_all(format!("\n{}", GOOD.replace("curl", "\u{fffd}")).as_bytes()).expect("write");
    let report = report(json!({ "path": path }));
    assert_eq!((&report["lines"], &report["requests"], &report["malformed_total"]), (&json!(4), &json!(2), &json!(2)));
    assert_eq!(report["malformed"][1]["reason"], "the line is longer than 65,536 bytes");
    std::fs::remove_file(path).expect("remove");
}

/// A file of this process alone.
fn tempfile() -> (std::fs::File, String) {
    let path = std::env::temp_dir().join(format!("access-log-test-{}", std::process::id()));
    (std::fs::File::create(&path).expect("create"), path.to_string_lossy().into_owned())
}

#[test]
fn a_hundred_malformed_lines_are_named_and_the_rest_counted() {
    let report = report(json!({ "lines": vec!["x"; 250] }));
    assert_eq!((report["malformed"].as_array().map(Vec::len), &report["malformed_total"]), (Some(100), &json!(250)));
}

#[test]
fn wrong_data_is_rejected_with_its_place() {
    assert!(rejected(json!({})).contains("one of `lines`, `text` or `path`"));
    assert!(rejected(json!({ "lines": [], "text": "" })).contains("only one of"));
    assert!(rejected(json!({ "lines": [1] })).starts_with("data.lines[0]: invalid type"));
    assert!(rejected(json!({ "lines": [], "from": 1 })).contains("`path`"));
    assert!(rejected(json!({ "path": LOG, "from": 2, "to": 1 })).starts_with("data.to: 1 is before"));
    assert!(rejected(json!({ "lines": [], "top": 1001 })).starts_with("data.top: at most 1000"));
    assert!(rejected(json!({ "lines": [], "first_line": 0 })).starts_with("data.first_line"));
    assert!(rejected(json!({ "lines": [], "visitors": "all" })).contains("unknown variant `all`"));
    assert!(rejected(json!({ "line": [] })).contains("unknown field `line`"));
}

#[test]
fn a_file_that_cannot_be_read_is_tried_again_and_says_why() {
    let error = Attempt::of(json!({ "path": "/no/such.log" })).run(summarise).error();
    assert_eq!((error.kind(), error.code()), (FailureKind::Retry, "file"));
    assert!(error.message().starts_with("/no/such.log: ") && error.message().ends_with("granted to this route?"), "{error}");
}

#[test]
fn progress_is_shown_and_a_cancelled_attempt_releases() {
    let ended = Attempt::of(json!({ "path": LOG })).run(summarise);
    assert_eq!(ended.progress.len(), 1);
    assert!(ended.progress[0].note.starts_with("8192 lines"));
    let ended = Attempt::of(json!({ "path": LOG })).cancelled(Cancellation::Graceful).run(summarise);
    assert_eq!(ended.outcome(), Outcome::release());
}

#[test]
fn a_full_counter_forgets_the_rarest_and_says_by_how_much_it_may_err() {
    let mut counter = Counter::new(100);
    for number in 0..10_000u64 {
        counter.add("often");
        counter.add(format!("rare {number}").as_str());
    }
    let top = counter.top(1);
    assert_eq!(top[0].0, "often");
    assert!(top[0].1 <= 10_000 && top[0].1 + counter.error() >= 10_000, "{top:?} {}", counter.error());
    assert!(counter.top(usize::MAX).len() <= 100);
}

#[test]
fn more_visitors_than_are_kept_are_estimated() {
    let mut visitors = Visitors::new(1_000);
    for number in 0..1_000 {
        visitors.add(&format!("10.0.0.{number}"));
        visitors.add("10.0.0.0");
    }
    assert_eq!((visitors.count(), visitors.is_exact()), (1_000, true));
    for number in 0..50_000 {
        visitors.add(&format!("v{number}"));
    }
    assert!(!visitors.is_exact() && visitors.addresses().is_none());
    assert!((35_000..70_000).contains(&visitors.count()), "{}", visitors.count());
}

#[test]
fn agents_are_told_apart_by_family() {
    let mut agents = crate::agents::Agents::default();
    let known = awk("BEGIN { FS = \"\\\"\" } NF >= 7 { print $6 }");
    known.iter().for_each(|agent| agents.add(Some(agent)));
    agents.add(None);
    let mut report = json!({});
    agents.report_into(&mut report);
    let total: u64 = report["agents"].as_object().expect("families").values().filter_map(Value::as_u64).sum();
    assert_eq!(total, u64::try_from(known.len()).expect("a count") + 1);
    assert_eq!(
        report["agents"]["Googlebot"],
        json!(
            awk("/Googlebot|AdsBot-Google|Mediapartners-Google/ && NR != 8899 { n++ } END { print n }")[0]
                .parse::<u64>()
                .expect("n")
        )
    );
    assert!(report["bot_share"].as_f64().is_some_and(|share| share > 0.05 && share < 0.6), "{report}");
    assert!(report["agents"]["other"].as_u64().is_some_and(|other| other < 1_000), "{report}");
}
