use proptest::prelude::*;

use super::*;

/// A small alphabet, so that types and patterns meet.
fn task_type() -> impl Strategy<Value = String> {
    "[ab.]{1,4}"
}

fn matcher() -> impl Strategy<Value = String> {
    let exact = task_type().prop_map(|text| format!("type: '{text}'"));
    let pattern =
        prop_oneof!["[ab]", "\\^[ab]", "[ab]\\$", "\\^[ab]\\*b", "a\\|bb"].prop_map(|text| format!("pattern: '{text}'"));
    prop_oneof![exact, pattern]
}

fn routes(matchers: &[String]) -> Config {
    let mut keys = String::from("routes:\n");
    for (index, matcher) in matchers.iter().enumerate() {
        keys.push_str(&format!("- {{{matcher}, plugin: p{index}}}\n"));
    }
    load(&with(&keys)).expect("valid")
}

/// Any YAML that a section could hold.
fn value() -> impl Strategy<Value = serde_yaml::Value> {
    use serde_yaml::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z0-9 :<>%{}\\\\/*_-]{0,12}".prop_map(Value::from),
        proptest::sample::select(vec!["5s", "64MiB", "rdb", "sqlite:q", "never", "1_000", "(?=a)", "<%= x %>"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::vec((key(), inner), 0..6)
                .prop_map(|entries| Value::Mapping(entries.into_iter().map(|(key, value)| (Value::from(key), value)).collect())),
        ]
    })
}

fn key() -> impl Strategy<Value = String> {
    let known = [
        "type",
        "url",
        "table",
        "log",
        "processors",
        "poll_interval",
        "alive_time",
        "retry_wait",
        "backoff",
        "first",
        "max",
        "routes",
        "plugin",
        "pattern",
        "memory",
        "grants",
        "folders",
        "host",
        "guest",
        "environment",
        "follow_ups",
        "types",
        "users",
        "keys",
        "depth",
        "settings",
        "env",
        "file",
        "<<",
        "debug",
    ];
    prop_oneof![4 => proptest::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => "[a-z_]{0,8}"]
}

proptest! {
    #[test]
    fn the_first_route_that_fits_wins_and_what_is_remembered_says_the_same(
        matchers in proptest::collection::vec(matcher(), 1..8),
        types in proptest::collection::vec(task_type(), 1..20),
    ) {
        let config = routes(&matchers);
        let remembering = Routes::new(config.routes.clone());
        for task_type in types.iter().chain(&types) {
            let first = config.routes.iter().find(|route| route.matcher.matches(task_type));
            let answered = remembering.route(task_type);
            prop_assert_eq!(answered.map(|route| route.index), first.map(|route| route.index));
        }
    }

    #[test]
    fn more_types_than_are_remembered_change_no_answer(count in 1_usize..3) {
        let config = routes(&["pattern: '7$'".to_owned()]);
        let remembering = Routes::new(config.routes);
        for number in 0..count * Routes::REMEMBERED_MAX + 5 {
            prop_assert_eq!(remembering.route(&number.to_string()).is_some(), number % 10 == 7);
        }
    }

    #[test]
    fn any_section_is_accepted_or_refused_with_a_reason(section in value()) {
        let text = serde_yaml::to_string(&serde_yaml::Mapping::from_iter([(serde_yaml::Value::from("development"), section)]))
            .expect("YAML");
        if let Err(error) = load(&text) {
            prop_assert!(!error.problems().is_empty());
            prop_assert!(error.problems().iter().all(|problem| !problem.message.is_empty()));
        }
    }

    #[test]
    fn any_text_is_accepted_or_refused_with_a_reason(text in "(?s).{0,200}") {
        if let Err(error) = load(&text) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn any_bytes_of_yaml_signs_are_accepted_or_refused(text in "[-a:{}\\[\\],&*!|>'\"%@`# \n\t?~<]{0,60}") {
        if let Err(error) = load(&format!("development:\n  {text}")) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn a_valid_configuration_means_what_was_written(
        processors in 1_u32..=1_024,
        poll_ms in 10_u64..=3_600_000,
        alive_s in 3_u64..=604_800,
        prefetch in 0_u32..=1_000,
        attempts in proptest::option::of(1_u32..=1_000_000),
        retention_s in 0_u64..=1_000_000,
        memory in 65_536_u64..=(4 << 30),
        first_ms in 1_u64..=1_000,
        factor in 1.0_f64..=10.0,
        jitter in 0.0_f64..=1.0,
    ) {
        let attempts_text = attempts.map_or_else(|| "unlimited".to_owned(), |attempts| attempts.to_string());
        let config = load(&with(&format!(
            "processors: {processors}\npoll_interval: {poll_ms}ms\nalive_time: {alive_s}\ntask_prefetch: {prefetch}\n\
             max_attempts: {attempts_text}\nretention_time: {retention_s}\n\
             backoff: {{first: {first_ms}ms, factor: {factor}, max: 1h, jitter: {jitter}}}\n\
             routes: [{{type: a, plugin: p, memory: {memory}}}]"
        ))).expect("valid");
        prop_assert_eq!(config.processors, processors);
        prop_assert_eq!(config.poll_interval, Duration::from_millis(poll_ms));
        prop_assert_eq!(config.alive_time, Duration::from_secs(alive_s));
        prop_assert_eq!(config.task_prefetch, prefetch);
        prop_assert_eq!(config.queue.policy.max_attempts, attempts);
        prop_assert_eq!(config.queue.policy.retention, Duration::from_secs(retention_s));
        prop_assert_eq!(config.routes[0].limits.memory_bytes, memory);
        let backoff = Backoff::Exponential {
            first: Duration::from_millis(first_ms),
            factor,
            max: Duration::from_secs(3_600),
            jitter,
        };
        prop_assert_eq!(config.queue.policy.backoff, backoff);
    }

    #[test]
    fn a_length_of_time_is_read_as_it_is_told(milliseconds in 10_u64..=3_600_000) {
        let told = super::super::quantity::tell_duration(Duration::from_millis(milliseconds)).replace(',', "");
        let config = load(&with(&format!("poll_interval: {told}"))).expect("valid");
        prop_assert_eq!(config.poll_interval, Duration::from_millis(milliseconds));
    }
}
