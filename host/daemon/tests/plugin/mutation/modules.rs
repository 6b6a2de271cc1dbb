//! Mutated modules, through the real compiling child, the linker and the self-test.

use std::time::Duration;

use laelaps::plugin::{CompileLimits, Config, Engine};
use laelaps_tests::{Dice, Mutation, workspace_file};

use super::{assert_no_panic, assert_reason, count_panics, peak_bytes};
use crate::guests;
use crate::support::{PATIENCE, config};

/// What the process that admits may come to. It is a test's, with a test's allocator.
const HOST_BYTES_MAX: u64 = 512 << 20;

/// What names are replaced by: texts that are hard to print, to demangle or to fit.
const NAMES: [&str; 10] = [
    "_Z1f1aI1bS0_ES_IS1_S1_ES_IS2_S2_ES_IS3_S3_ES_IS4_S4_ES_IS5_S5_ES_IS6_S6_ES_IS7_S7_E",
    "_RINvC1a1fTB7_B7_ETB7_B7_ETB7_B7_E",
    "_ZN4$LT$4$GT$17h0123456789abcdefE",
    "\u{1b}[31m\u{1b}]0;t\u{7}",
    "\r\n2026-11-27T00:00:00Z  INFO forged",
    "\u{202e}\u{2066}\u{9b}31m",
    "laelaps:worker/handler@0.1.0",
    "laelaps:worker/context@0.1.9",
    "wasi:filesystem/types@0.2.6",
    "cabi_realloc",
];

fn corpus() -> Vec<Vec<u8>> {
    let mut modules = vec![
        guests::handler(),
        guests::told(),
        guests::exporting("(param \"task\" string) (result string)", "laelaps:worker/handler@0.1.0"),
        guests::importing("(import \"test:other/database\" (instance (export \"query\" (func (param \"sql\" (list string))))))"),
        guests::importing(
            "(import \"test:types/deep\" (instance (type (record (field \"abcdefghijklmnopqrstuvwxyz\" u8)))
                (export \"first\" (type (eq 0))) (type (tuple 1 1)) (type (tuple 2 2)) (type (list 3)) (type (option 4))
                (type (func (param \"p\" 5))) (export \"f\" (func (type 6)))))",
        ),
    ];
    // Built by tests/run; a run of these tests alone goes without.
    for name in ["noop", "c"] {
        modules.extend(std::fs::read(workspace_file(&format!("target/guests/{name}.wasm"))));
    }
    modules
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mutated_module_is_admitted_or_refused_with_a_short_reason() {
    count_panics();
    let compile_limits = CompileLimits { memory_bytes: 1 << 30, time: Duration::from_secs(20) };
    let engine = Engine::new(&Config { compile_limits, ..config() }).expect("engine");
    let corpus = corpus();
    let (mut fit, mut crashed) = (0, 0);
    let mut mutation = Mutation::begin("modules");
    while let Some(mut dice) = mutation.next_case() {
        let module = mutated(&mut dice, &corpus);
        let inspected = tokio::time::timeout(PATIENCE, engine.inspect(&module)).await.expect("it is decided about");
        let reasons = match inspected {
            Ok(inspection) => {
                assert_eq!(inspection.fits.is_some(), inspection.problems.is_empty(), "{inspection:?}");
                fit += u32::from(inspection.fits.is_some());
                inspection.problems
            }
            Err(error) => vec![error.to_string()],
        };
        for reason in &reasons {
            assert_reason(reason);
            assert!(!reason.contains("panicked at") || reason.contains("the compiler crashed"), "{reason}");
            crashed += u32::from(reason.contains("the compiler crashed"));
        }
        assert_no_panic();
        assert!(peak_bytes() < HOST_BYTES_MAX, "this process came to {} MiB", peak_bytes() >> 20);
    }
    // A crash of the child is a refusal like any other; it is told, since it is a finding of the compiler's.
    println!("measured: mutated modules that still fit: {fit}; that crashed the compiling child: {crashed}");
}

fn mutated(dice: &mut Dice, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut module = corpus[dice.below(corpus.len())].clone();
    let other = &corpus[dice.below(corpus.len())];
    match dice.below(4) {
        0 => dice.mutate(&mut module, other),
        1 => rename(dice, &mut module),
        2 => rearrange(dice, &mut module, other),
        _ => {
            rename(dice, &mut module);
            dice.mutate(&mut module, other);
        }
    }
    module
}

/// Writes one of [`NAMES`] over one to four names, as far as each reaches, so that all lengths stay right.
fn rename(dice: &mut Dice, module: &mut [u8]) {
    for _ in 0..=dice.below(4) {
        let start = dice.below(module.len());
        let is_text = |byte: &u8| byte.is_ascii_graphic();
        let Some(at) = module[start..].windows(6).position(|bytes| bytes.iter().all(is_text)) else { continue };
        let at = start + at;
        let length = module[at..].iter().take_while(|byte| is_text(byte)).count();
        let name = dice.choose(&NAMES).as_bytes();
        for (byte, new) in module[at..at + length].iter_mut().zip(name) {
            *byte = *new;
        }
    }
}

/// Removes, doubles or swaps sections of a component, or takes one of another's.
fn rearrange(dice: &mut Dice, module: &mut Vec<u8>, other: &[u8]) {
    let (mut own, others) = (sections(module), sections(other));
    for _ in 0..=dice.below(3) {
        if own.is_empty() {
            break;
        }
        let (at, to) = (dice.below(own.len()), dice.below(own.len()));
        match dice.below(4) {
            0 => drop(own.remove(at)),
            1 => own.insert(to, own[at].clone()),
            2 => own.swap(at, to),
            _ if !others.is_empty() => own.insert(to, others[dice.below(others.len())].clone()),
            _ => {}
        }
    }
    let header = module[..module.len().min(8)].to_vec();
    *module = [header, own.concat()].concat();
}

/// The sections behind the first eight bytes, each whole; what follows something that is none is left out.
fn sections(module: &[u8]) -> Vec<Vec<u8>> {
    let mut sections = Vec::new();
    let mut rest = module.get(8..).unwrap_or_default();
    while let Some((length, head)) = length(rest.get(1..).unwrap_or_default()) {
        let Some(section) = rest.get(..1 + head + length) else { break };
        sections.push(section.to_vec());
        rest = &rest[section.len()..];
    }
    sections
}

/// A number in LEB128, and how many bytes it takes.
fn length(bytes: &[u8]) -> Option<(usize, usize)> {
    let mut number = 0;
    for (place, byte) in bytes.iter().take(4).enumerate() {
        number |= usize::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Some((number, place + 1));
        }
    }
    None
}
