//! Every sort of mistake: what is told, where, and with which hint.

use super::*;

/// The mistakes of a file, each as `line: key: message | hint`.
pub(super) fn problems(text: &str) -> Vec<String> {
    let error = load(text).expect_err("the file has mistakes");
    let tell = |problem: &Problem| {
        let line = problem.line.map_or_else(|| "-".to_owned(), |line| line.to_string());
        let key = problem.key.as_deref().unwrap_or("-");
        let hint = problem.hint.as_deref().map(|hint| format!(" | {hint}")).unwrap_or_default();
        format!("{line}: {key}: {}{hint}", problem.message)
    };
    error.problems().iter().map(tell).collect()
}

/// The one mistake of a section, with the keys added to the minimal one (so the first of them stands on line 4).
#[track_caller]
fn refused(keys: &str, expected: &str) {
    assert_eq!(problems(&with(keys)), [expected]);
}

/// The one mistake of a whole file.
#[track_caller]
fn refused_file(text: &str, expected: &str) {
    assert_eq!(problems(text), [expected]);
}

#[test]
fn all_mistakes_are_told_at_once_in_the_order_of_their_lines() {
    let text =
        with("processors: many\nalive_tiem: 3\nroutes:\n- type: a\n  plugin: p\n  memory: 5XB\n- pattern: '(?=a)'\n  plugin: q");
    let found = problems(&text);
    let starts = [
        "4: development.processors: found \"many\", expected a whole number from 1 to 1,024",
        "5: development.alive_tiem: no such key | did you mean alive_time?",
        "9: development.routes[1].memory: found \"5XB\", expected a size from 64 KiB to 4 GiB",
        "10: development.routes[2].pattern: \"(?=a)\" is not a regular expression of Rust's regex crate: look-around",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (found, start) in found.iter().zip(starts) {
        assert!(found.starts_with(start), "{found}");
    }
}

#[test]
fn how_long_a_task_is_suspected_is_the_sections_to_say() {
    let found = problems(&with("suspicion_time: soon"));
    assert!(
        found[0].starts_with("4: development.suspicion_time: found \"soon\", expected a length of time from 0 ms to 10 years"),
        "{found:?}"
    );
    let found = problems(&with("suspicion_time: 11 years"));
    assert!(found[0].starts_with("4: development.suspicion_time: found \"11 years\", expected"), "{found:?}");
    refused(
        "routes:\n- {type: a, plugin: p, suspicion_time: 1h}",
        "5: development.routes[1].suspicion_time: belongs to the section: a host that finds a task lost does not ask for its route | \
            move it beside `routes`; it counts for all of them",
    );
}

#[test]
fn the_place_of_a_merged_key_is_where_it_stands() {
    let text = "base: &base\n  type: rdb\n  processors: 0\ndevelopment:\n  <<: *base\n  url: sqlite:q\n";
    refused_file(text, "3: development.processors: found 0, expected a whole number from 1 to 1,024");
}

#[test]
fn the_file_as_a_whole() {
    refused_file(
        "",
        "-: -: the file is empty, expected a section for each environment | start with: `development: {type: rdb, url: \"sqlite:laelaps.db\", routes: []}` (docs/configuration.md has more)",
    );
    assert!(problems("- a\n")[0].starts_with("-: -: the file is not a mapping"));
    refused_file("development:\n  a: 1\n  a: 2\n", "2: -: not valid YAML: development: duplicate entry with key \"a\"");
    assert!(problems("development:\n\ttype: rdb\n")[0].ends_with("| YAML is indented with spaces, not with tabs"));
    assert!(problems("a: b\n---\nc: d\n")[0].contains("keep one document"));
    refused_file(
        "type: rdb\nurl: sqlite:q\n",
        "-: -: there is no section \"development\": the keys stand at the top of the file | write `development:` above them and indent them by two spaces",
    );
    refused_file(
        "production: {}\ndevelopement: {}\n",
        "-: -: there is no section \"development\", found production, developement | did you mean -e developement? The section is chosen by -e, else LAELAPS_ENV, else RAILS_ENV, else development",
    );
    refused_file("development: 5\n", "1: development: found 5, expected a mapping of keys");
    refused_file("development:\n  type: rdb\n  <<: 5\n", "3: development.<<: a merge (<<) takes a mapping or a list of mappings");
    assert!(problems("development:\n  <<: {a: 1}\n  <<: {b: 1}\n")[0].contains("`<<: [*first, *second]`"));
}

#[test]
fn a_file_that_cannot_be_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let load =
        |path: PathBuf| Config::load_with(&Source { path: Some(path), environment: None }, &|_| None).expect_err("refused");
    let missing = load(folder.path().join("none.yml"));
    assert!(missing.to_string().ends_with("none.yml: cannot be read"), "{missing}");
    assert_eq!(missing.hint().as_deref(), Some("name an existing file with -c FILE"));
    assert_eq!(load(folder.path().to_path_buf()).hint().as_deref(), Some("name the file, not its folder"));
    let latin = folder.path().join("latin.yml");
    std::fs::write(&latin, b"a: 1\nb: \xe9\n").expect("a file");
    assert!(load(latin).to_string().ends_with("latin.yml:2: this line is not UTF-8"));
    let large = folder.path().join("large.yml");
    std::fs::write(&large, "#".repeat(300 << 10)).expect("a file");
    assert!(load(large).to_string().ends_with("the file is larger than 256 KiB"));
}

#[test]
fn type_and_url() {
    let missing = problems("development:\n  processors: 1\n");
    assert_eq!(
        missing,
        [
            "1: development.type: the key is missing, expected rdb or rdb_compat | add `type: rdb`",
            "1: development.url: the key is missing, expected sqlite:PATH, postgres://USER@HOST/DATABASE or \
             mysql://USER@HOST/DATABASE | add `url: \"sqlite:laelaps.db\"`"
        ]
    );
    let url = |url: &str| problems(&format!("development: {{type: rdb, url: {url}}}")).join("\n");
    assert!(url("'postgres:db'").contains("found \"postgres\" without a server"));
    assert!(url("'sqlite:a.db?mode=ro'").contains("has options"));
    assert!(url("'sqlite:'").contains("names no file"));
    assert!(url("'sqlite::memory:'").contains("in memory"));
    assert!(url("'redis://joe:secret@db/q'").contains("found \"redis://db/q\""));
    assert!(url("queue.db").contains("is not a URL, expected sqlite:PATH"));
    assert!(url("{env: NOT_SET}").contains("development.url.env: the environment variable NOT_SET is not set"));
    assert!(url("{file: /does/not/exist}").contains("development.url.file: /does/not/exist: No such file"));
    assert!(url("{env: A, file: b}").contains("found both env and file"));
    assert!(url("\"<%= ENV['URL'] %>\"").contains("`{env: NAME}` to take it from the environment"));
    let kind = |kind: &str| problems(&format!("development: {{type: {kind}, url: 'sqlite:q'}}")).join("\n");
    assert!(kind("rdb_compat").contains("development.table: the key is missing"));
    assert!(kind("rdb_compat, table: t").contains("expected mysql://USER@HOST/DATABASE, the one of the Ruby workers"));
    assert!(kind("redis").contains("found \"redis\", expected rdb or rdb_compat"));
    let tls = problems("development: {type: rdb, url: 'mysql://db/q', ssl_mode: on}").join("\n");
    assert!(tls.contains("expected disabled, preferred, required, verify_ca or verify_identity"), "{tls}");
    refused(
        "table: tasks",
        "4: development.table: belongs to `type: rdb_compat`; the native tables have names of their own | remove the key",
    );
}

#[test]
fn attempts_are_not_counted_in_perfectqueues_table_alone() {
    let text = |more: &str| format!("development: {{type: rdb_compat, table: t, url: 'mysql://h/d', {more}}}");
    for more in ["max_attempts: 3", "routes: [{type: a, plugin: p, max_attempts: 3}]"] {
        let told = problems(&text(more)).join("\n");
        assert!(
            told.contains("max_attempts: PerfectQueue's table has no place for a count of attempts | add `side_table: true`"),
            "{told}"
        );
        load(&text(&format!("side_table: true, {more}"))).expect("the side table has");
    }
}

#[test]
fn a_secret_is_never_told() {
    for text in [
        "development: {type: rdb, url: 'mysql://joe:hunter2@db/q', processors: 0}",
        "development: {type: rdb_compat, table: t, url: 'postgres://joe:hunter2@db/q'}",
        "development: {type: rdb, url: 'redis://joe:hunter2@db/q?password=hunter2'}",
        "development: {type: rdb, url: ['hunter2']}",
        "development: {type: rdb, url: 'hunter2'}",
        "development: {type: rdb, url: 'sqlite:q', routes: [{type: a, plugin: p, settings: {token: [hunter2]}}]}",
    ] {
        let error = load(text).expect_err("refused");
        assert!(!format!("{error} {error:?} {:?}", error.hint()).contains("hunter2"), "{error:?}");
    }
}

#[test]
fn unknown_keys_are_errors_with_rdb_and_warnings_with_rdb_compat() {
    refused("procesors: 2", "4: development.procesors: no such key | did you mean processors?");
    let config = load("development: {type: rdb_compat, url: 'mysql://h/d', table: t, procesors: 2}").expect("only a warning");
    let expected = "procesors: no such key; ignored (did you mean processors?)";
    assert!(config.warnings.iter().any(|warning| warning.ends_with(expected)), "{:?}", config.warnings);
}

#[test]
fn numbers_times_and_words_out_of_their_bounds() {
    let number = "expected a whole number from 1 to 1,024";
    refused("processors: 1025", &format!("4: development.processors: found 1025, {number}"));
    refused("processors: -1", &format!("4: development.processors: found -1, {number}"));
    refused("processors: 1.5", &format!("4: development.processors: found 1.5, {number}"));
    refused("processors: [1]", &format!("4: development.processors: found a list, {number}"));
    refused("processors: !ruby/object 1", &format!("4: development.processors: found a value with a tag (!...), {number}"));
    let time = "expected a length of time from 10 ms to 1 h (a number of seconds, or text such as \"250ms\" or \"5m\")";
    for found in ["0", "-5", ".nan", ".inf"] {
        refused(&format!("poll_interval: {found}"), &format!("4: development.poll_interval: found {found}, {time}"));
    }
    refused("poll_interval: soon", &format!("4: development.poll_interval: found \"soon\", {time}"));
    refused("poll_interval: 1 month", &format!("4: development.poll_interval: found \"1 month\", {time}"));
    refused("disable_resource_limit: 1", "4: development.disable_resource_limit: found 1, expected true or false");
    assert!(problems(&with("child_graceful_kill_limit: always"))[0].ends_with("or `never`"));
    assert!(problems(&with("max_attempts: 0"))[0].ends_with("expected a whole number from 1 to 1,000,000, or `unlimited`"));
    assert!(problems(&with("log_level: 'a=b=c'"))[0].starts_with("4: development.log_level: found \"a=b=c\", expected a level"));
}

#[test]
fn values_that_contradict_each_other() {
    refused(
        "alive_time: 2\ntask_heartbeat_interval: 2",
        "5: development.task_heartbeat_interval: is not shorter than alive_time, so that every lease would end before its renewal | make it a third of alive_time or less, or leave it out",
    );
    refused(
        "child_heartbeat_interval: 2\nchild_heartbeat_limit: 2",
        "5: development.child_heartbeat_limit: is not longer than child_heartbeat_interval, so that every guest would count as stuck | make it three times child_heartbeat_interval or more, or leave it out",
    );
    refused(
        "backoff: {first: 10, max: 5}",
        "4: development.backoff.max: is shorter than first | make it as long as first, or longer",
    );
    refused(
        "backoff: quadratic",
        "4: development.backoff: found \"quadratic\", expected `fixed`, `exponential`, or a mapping of first, factor, max and jitter",
    );
    refused("backoff: {factor: 11}", "4: development.backoff.factor: found 11, expected a number from 1 to 10");
}

#[test]
fn routes() {
    refused("routes: {a: b}", "4: development.routes: found a mapping, expected a list of routes");
    refused("routes: [a]", "4: development.routes[1]: found \"a\", expected a mapping with type (or pattern) and plugin");
    refused(
        "routes:\n- {type: a}",
        "5: development.routes[1]: found no plugin, expected the name of one | add `plugin: NAME` for the file NAME.wasm in the plugin folder",
    );
    refused(
        "routes:\n- {plugin: p}",
        "5: development.routes[1]: found neither type nor pattern, expected one of them | `type:` takes one task type, `pattern:` every type in which a regular expression is found",
    );
    refused(
        "routes:\n- {type: a, pattern: b, plugin: p}",
        "5: development.routes[1]: found both type and pattern, expected one of them | make two routes of it",
    );
    refused(
        "routes:\n- {type: a, plugin: p.wasm}",
        "5: development.routes[1].plugin: found \"p.wasm\", expected the name without .wasm | write `plugin: p`",
    );
    assert!(problems(&with("routes:\n- {type: a, plugin: ../p}"))[0].contains("expected at most 128 letters, digits, dots"));
    refused("routes:\n- {type: a, plugin: p, memry: 1}", "5: development.routes[1].memry: no such key | did you mean memory?");
    let long = "x".repeat(256);
    assert!(
        problems(&with(&format!("routes:\n- {{type: {long}, plugin: p}}")))[0].ends_with("found 256 bytes, expected at most 255")
    );
}

#[test]
fn what_ruby_has_and_rust_has_not_is_refused_with_a_hint() {
    for (pattern, hint) in [
        ("(?!a)b", "put a route with the exception in front"),
        ("(?<=a)b", "put a route with the exception in front"),
        ("(a)\\1", "write the repeated part out"),
        ("a\\Z", "write \\z"),
        ("\\h+", "[0-9a-fA-F]"),
        ("(?>a)", "atomic groups"),
    ] {
        let found = problems(&with(&format!("routes:\n- {{pattern: '{pattern}', plugin: p}}")));
        assert!(found[0].starts_with("5: development.routes[1].pattern: ") && found[0].contains(hint), "{pattern}: {found:?}");
    }
    let config = load(&with("routes:\n- {pattern: '/^a$/', plugin: p}")).expect("valid");
    assert!(config.warnings[0].contains("the slashes at its ends are part of the pattern"), "{:?}", config.warnings);
}

#[test]
fn grants() {
    let grants = |grants: &str| problems(&with(&format!("routes:\n- {{type: a, plugin: p, grants: {grants}}}"))).join("\n");
    assert!(grants("{folders: [{guest: /a}]}").starts_with("5: development.routes[1].grants.folders[1]: found no host"));
    assert!(grants("{folders: [{host: a, guest: b}]}").contains("found \"b\", expected a path that starts with /"));
    assert!(grants("{folders: [{host: a, guest: /x}, {host: b, guest: /x}]}").contains("two folders have the guest name \"/x\""));
    assert!(grants("{folders: [a]}").contains("expected a mapping of host, guest and writable"));
    assert!(grants("{environment: ['A=B']}").contains("found \"A=B\", expected the name of an environment variable"));
    assert!(grants("{network: true}").contains("network: no such key | known here: folders, environment, follow_ups"));
    assert!(grants("all").contains("expected a mapping of folders, environment and follow_ups"));
    assert!(
        grants("{folders: [{host: a, guest: /a, writable: true, size_limit: much}]}")
            .contains("found \"much\", expected a size from")
    );
    assert!(grants("{folders: [{host: a, guest: /a, writable: true, file_limit: -1}]}").contains("or `unlimited`"));
}

#[test]
fn a_folder_within_one_that_handlers_may_write_to() {
    let ground = tempfile::tempdir().expect("folder");
    std::fs::create_dir_all(ground.path().join("rw/in")).expect("folders");
    std::os::unix::fs::symlink("rw/in", ground.path().join("link")).expect("link");
    let ground = ground.path().display();
    for (inner, writable) in [("rw/in", false), ("link", true), ("rw/not-there", false)] {
        let routes = format!(
            "routes:\n- {{type: a, plugin: p, grants: {{folders: [{{host: {ground}/{inner}, guest: /i, writable: {writable}}}]}}}}\n\
             - type: b\n  plugin: q\n  grants: {{folders: [{{host: /, guest: /r}}, {{host: {ground}/rw, guest: /w, writable: true}}]}}"
        );
        refused(
            &routes,
            &format!(
                "5: development.routes[1].grants.folders[1]: the folder {ground}/{inner} lies within {ground}/rw, to which handlers of route 2 \
                 at line 6 may write: they could change where its path leads | move one of the two out of the other, or grant the outer one \
                 without `writable: true`"
            ),
        );
    }
}

#[test]
fn a_writable_folder_that_holds_something_of_the_hosts_own() {
    let ground = tempfile::tempdir().expect("folder");
    std::fs::create_dir_all(ground.path().join("host/plugins")).expect("folders");
    let ground = ground.path().display();
    let grant = |folder: &str, writable: bool| {
        format!(
            "routes: [{{type: a, plugin: p, grants: {{folders: [{{host: {ground}/{folder}, guest: /w, writable: {writable}}}]}}}}]"
        )
    };
    let cases = [
        ("plugins: GROUND/host/plugins", "the plugin folder"),
        ("plugin_cache: GROUND/host/cache", "the folder for compiled code"),
        ("log: GROUND/host/log", "the log file"),
        ("audit_log: GROUND/host/audit.log", "the audit log"),
    ];
    for (own, what) in cases.map(|(own, what)| (own.replace("GROUND", &ground.to_string()), what)) {
        let key = own.split(':').next().expect("a key");
        let text = format!("{own}\n{}", grant("host", true));
        refused(
            &text,
            &format!(
                "4: development.{key}: {what} lies in {ground}/host, to which handlers of route 1 at line 5 may write: they could take over \
                 this host | grant a folder that holds nothing of the host's, or grant it without `writable: true`"
            ),
        );
        load(&with(&format!("{own}\n{}", grant("host", false)))).expect("they may read it");
        load(&with(&format!("{own}\n{}", grant("host/marks", true)))).expect("they may write beside it");
    }
    let plugins = format!("plugins: {ground}/host/plugins\n");
    assert!(problems(&with(&format!("{plugins}{}", grant("host/plugins", true))))[0].contains("the plugin folder lies in"));
    let queue = format!("development:\n  type: rdb\n  url: 'sqlite:{ground}/host/queue.db'\n  {}", grant("host", true));
    assert!(problems(&queue)[0].contains("development.url: the queue's file lies in"), "{:?}", problems(&queue));
}

#[test]
fn the_same_folder_may_be_granted_twice_and_limited() {
    let folder = |more: &str| format!("{{folders: [{{host: rw, guest: /w, writable: true{more}}}]}}");
    let text = with(&format!(
        "routes:\n- {{type: a, plugin: p, grants: {}}}\n- {{type: b, plugin: q, grants: {}}}\n- {{type: c, plugin: r, grants: {}}}",
        folder(""),
        folder(", size_limit: unlimited, file_limit: 7"),
        folder(", size_limit: 1KiB, file_limit: unlimited"),
    ));
    let config = load(&text).expect("valid");
    let limits = config.routes.iter().map(|route| {
        let folder = &route.grants.folders[0];
        (folder.bytes_max, folder.files_max)
    });
    assert_eq!(limits.collect::<Vec<_>>(), [(Some(1 << 30), Some(10_000)), (None, Some(7)), (Some(1_024), None)]);
    let text = with("routes:\n- {type: a, plugin: p, grants: {folders: [{host: ro, guest: /r, size_limit: 1KiB}]}}");
    let warnings = load(&text).expect("valid").warnings;
    assert!(warnings[0].contains("says nothing about a folder that is not writable"), "{warnings:?}");
}

#[test]
fn zookeepers_two_uses() {
    refused(
        "watchdog: {root: /fleet}",
        "4: development.watchdog.servers: the key is missing, expected ZooKeeper's servers, HOST:PORT separated by commas, with a chroot behind the last one if wanted | add `servers: \"zoo1:2181,zoo2:2181,zoo3:2181\"`",
    );
    refused(
        "watchdog: {servers: 'zoo:2181'}",
        "4: development.watchdog.root: the key is missing, expected the path of the fleet's own root, one for each database | add `root: /laelaps/fleet`",
    );
    refused("watchdog: true", "4: development.watchdog: found true, expected a mapping of servers, root, timer and so on");
    refused(
        "watchdog: {servers: 'zoo:2181', root: /fleet, timer: 100ms}",
        "4: development.watchdog.timer: found \"100ms\", expected a length of time from 500 ms to 1 h (a number of seconds, or text such as \"250ms\" or \"5m\")",
    );
    let found = problems(&with("watchdog: {servers: 'zoo:no', root: fleet, access: ourselves, digest: secret, tiemr: 1}"));
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(found.iter().all(|problem| !problem.contains("secret")), "{found:#?}");
    for expected in ["root", "digest: expected USER:PASSWORD", "tiemr: no such key | did you mean timer?", "zoo:no"] {
        assert!(found.iter().any(|problem| problem.contains(expected)), "{expected}: {found:#?}");
    }
    refused(
        "watchdog_queue: {servers: 'zoo:2181', root: /q, markers: /m}",
        "4: development.watchdog_queue.type: the key is missing, expected the type of the tasks that items become | add `type: TYPE`, and a route that takes it",
    );
    refused(
        "watchdog_queue: {servers: 'zoo:2181', root: /q, markers: /q, type: a}",
        "4: development.watchdog_queue: two of its roots, or one of them and the fleet's, are the same | give each a path of its own",
    );
    refused(
        &format!("watchdog_queue: {{servers: 'zoo:2181', root: /{}, markers: /m, type: a}}", "q".repeat(200)),
        "4: development.watchdog_queue.root: has 201 bytes, at most 200 are allowed where items become tasks",
    );
}

#[test]
fn a_fleet_in_the_database() {
    const EXPECTED: &str = r#"  fleet: zookeeper
    4: development.fleet: found "zookeeper", expected `database` or `none` | for a fleet in ZooKeeper leave the key out, and add `watchdog`
  fleet: true
    4: development.fleet: found true, expected `database` or `none` | for a fleet in ZooKeeper leave the key out, and add `watchdog`
  fleet: {servers: 'zoo:2181', root: /fleet}
    4: development.fleet: found a mapping, expected `database` or `none` | for a fleet in ZooKeeper leave the key out, and add `watchdog`
  fleet: Database
    4: development.fleet: found "Database", expected `database` or `none` | for a fleet in ZooKeeper leave the key out, and add `watchdog`
  fleet: [database]
    4: development.fleet: found a list, expected `database` or `none` | for a fleet in ZooKeeper leave the key out, and add `watchdog`
  host_timeout: 0
    4: development.host_timeout: found 0, expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  host_timeout: 999ms
    4: development.host_timeout: found "999ms", expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  host_timeout: 61m
    4: development.host_timeout: found "61m", expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  host_timeout: never
    4: development.host_timeout: found "never", expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  host_timeout: -10
    4: development.host_timeout: found -10, expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  host_timeout: [10]
    4: development.host_timeout: found a list, expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  fleet: none
  host_timeout: 10 parsecs
    5: development.host_timeout: found "10 parsecs", expected a length of time from 1 s to 1 h (a number of seconds, or text such as "250ms" or "5m")
  fleet: database
  watchdog: {servers: 'zoo:2181', root: /fleet}
    4: development.fleet: `watchdog` stands beside it, by which ZooKeeper tells who is alive | remove one of them
  fleet: none
  watchdog: {servers: 'zoo:2181', root: /fleet}
    4: development.fleet: `watchdog` stands beside it, by which ZooKeeper tells who is alive | remove one of them
  fleet: database
  watchdog: {root: /fleet}
    4: development.fleet: `watchdog` stands beside it, by which ZooKeeper tells who is alive | remove one of them
    5: development.watchdog.servers: the key is missing, expected ZooKeeper's servers, HOST:PORT separated by commas, with a chroot behind the last one if wanted | add `servers: "zoo1:2181,zoo2:2181,zoo3:2181"`
  flet: database
    4: development.flet: no such key | did you mean fleet?
  host_timeot: 10
    4: development.host_timeot: no such key | did you mean host_timeout?
  fleet: database (rdb_compat)
    5: development.fleet: PerfectQueue's table has no place for signs of life | remove the key; with `watchdog` and `side_table` ZooKeeper does it
"#;
    let on_server = |keys: &str| problems(&format!("development:\n  type: rdb\n  url: postgres://db/q\n{keys}"));
    let mut told = String::new();
    for keys in [
        "  fleet: zookeeper",
        "  fleet: true",
        "  fleet: {servers: 'zoo:2181', root: /fleet}",
        "  fleet: Database",
        "  fleet: [database]",
        "  host_timeout: 0",
        "  host_timeout: 999ms",
        "  host_timeout: 61m",
        "  host_timeout: never",
        "  host_timeout: -10",
        "  host_timeout: [10]",
        "  fleet: none\n  host_timeout: 10 parsecs",
        "  fleet: database\n  watchdog: {servers: 'zoo:2181', root: /fleet}",
        "  fleet: none\n  watchdog: {servers: 'zoo:2181', root: /fleet}",
        "  fleet: database\n  watchdog: {root: /fleet}",
        "  flet: database",
        "  host_timeot: 10",
    ] {
        told.push_str(&format!("{keys}\n    {}\n", on_server(keys).join("\n    ")));
    }
    let keys = "  fleet: database";
    let on_perfectqueue = format!("development:\n  type: rdb_compat\n  url: mysql://db/q\n  table: tasks\n{keys}");
    told.push_str(&format!("{keys} (rdb_compat)\n    {}\n", problems(&on_perfectqueue).join("\n    ")));
    assert_eq!(told, EXPECTED);
}
