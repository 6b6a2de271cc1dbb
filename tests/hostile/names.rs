//! Names of functions in a module's name section, which a backtrace prints: demangling them must cost nothing.

use laelaps_queue::State;
use serde_json::json;

use super::wat::{HANDLE, escaped, plugin};
use super::yard::assert_printable;
use super::{Yard, attack, refusals};

/// The longest name that WebAssembly's readers take.
const NAME_BYTES_MAX: usize = 100_000;

/// A C++ name whose text doubles with each level: `f(a<b, b>, a<a<b, b>, a<b, b>>, ...)`, where `b` is so long.
fn doubling(levels: usize, name_bytes: usize) -> String {
    let mut name = format!("_Z1f1aI{name_bytes}{}S0_E", "b".repeat(name_bytes));
    for level in 1..levels {
        let back = substitution(level);
        name.push_str(&format!("S_I{back}{back}E"));
    }
    name
}

/// The mangled name of the substitution with this number, counted from the second on.
fn substitution(number: usize) -> String {
    const DIGITS: &[u8; 36] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ";
    let (mut number, mut digits) = (number, Vec::new());
    loop {
        digits.push(char::from(DIGITS[number % 36]));
        number /= 36;
        if number == 0 {
            break;
        }
    }
    format!("S{}_", digits.iter().rev().collect::<String>())
}

/// Names that are hard to print, each with what it is.
fn names() -> Vec<(&'static str, String)> {
    let cut = |mut name: String| {
        name.truncate(NAME_BYTES_MAX);
        name
    };
    vec![
        // Time, in the 2.8 KB of a module.
        ("cpp", doubling(30, 1)),
        // Memory, in 17 and in 92 KB: gigabytes of text.
        ("cpp-17k", doubling(20, 16_500)),
        ("cpp-92k", doubling(18, 91_500)),
        ("cpp-levels", doubling(8_000, 1)),
        ("cpp-deep", cut(format!("_Z1f{}i", "P".repeat(90_000)))),
        ("cpp-nested", cut(format!("_Z1f{}1a", "N".repeat(90_000)))),
        ("cpp-template", cut(format!("_Z1f{}iE", "1aI".repeat(30_000)))),
        ("rust-v0", format!("_RINvC1a1f{}", "TB7_B7_E".repeat(10_000))),
        ("rust-v0-deep", cut(format!("_RNvC1a1f{}", "INtC1a1b".repeat(12_000)))),
        ("rust-legacy", cut(format!("_ZN{}17h0123456789abcdefE", "4$LT$".repeat(19_000)))),
        ("long", "x".repeat(NAME_BYTES_MAX)),
        ("escapes", format!("\u{1b}[31m\u{9b}31m\u{202e}\u{7}\r\n2026-11-27T00:00:00Z  INFO forged {}", "\n".repeat(50))),
    ]
}

/// A module whose handler has this name and traps.
fn trapping(name: &str) -> Vec<u8> {
    plugin(&format!("(func $h (@name \"{}\") (export \"handle\") {HANDLE} unreachable)", escaped(name)))
}

/// A module whose start function has this name and traps: what it comes to is seen when the file is dropped.
fn not_starting(name: &str) -> Vec<u8> {
    let handler = format!("(func (export \"handle\") {HANDLE} unreachable)");
    plugin(&format!("{handler} (func $s (@name \"{}\") unreachable) (start $s)", escaped(name)))
}

#[tokio::test]
async fn a_trap_in_a_function_with_a_name_that_explodes_costs_the_host_nothing() {
    let names = names();
    let routes: Vec<_> = names.iter().map(|(kind, _)| json!({ "type": kind, "plugin": kind, "time_limit": 86_400 })).collect();
    let modules: Vec<_> = names.iter().map(|(kind, name)| (*kind, trapping(name))).collect();
    let mut yard = Yard::open(&routes, &modules).await;
    yard.survives("traps in functions with names that explode", async |yard, round| {
        let tasks: Vec<_> = names.iter().map(|(kind, _)| attack(format!("{kind}-{round}"), kind, json!({}))).collect();
        for ended in yard.ends(&tasks).await {
            let (state, message) = (ended.state, ended.error_message.unwrap_or_default());
            assert_eq!((state, ended.error_code.as_deref()), (State::Failed, Some("trap")), "{}: {message}", ended.key);
            assert!(message.contains("unreachable") && message.len() <= 4_096, "{}: {message}", ended.key);
            assert_printable(&message, true);
        }
    })
    .await;
    yard.no_line_is_forged();
}

#[tokio::test]
async fn a_module_that_traps_at_its_start_is_refused_whatever_its_functions_are_called() {
    let names = names();
    let mut yard = Yard::open(&[], &[]).await;
    let mut times = 0;
    yard.survives("starts of functions with names that explode", async |yard, _round| {
        times += 1;
        for (kind, name) in &names {
            yard.plug(kind, &not_starting(name));
        }
        for (kind, _) in &names {
            let line = refusals(yard, kind, times).await;
            assert!(line.contains("it cannot be started") && line.len() <= 6_000, "{kind}: {line}");
            assert_printable(&line, false);
        }
    })
    .await;
    yard.no_line_is_forged();
}
