//! Whether a component fits the contract; if not, exactly what is wrong with it.
//!
//! The linker decides. What stands here only finds the words, because the linker's own stop at the first thing they meet and name types
//! by their place in a table.
//!
//! Runs in the compiling child. Even there everything is bounded: eighteen levels of `tuple<T, T>` are a quarter of a million types once
//! they are written out, and a component may have a million imports.

use wasmtime::component::types::{ComponentFunc, ComponentItem, Type};
use wasmtime::component::{Component, Linker};

use super::abi::PluginPre;
use super::guest::Guest;
use super::inspect::Item;
use super::reason::{self, Bounded};

/// The longest type that is written out, and the longest name. Every type of the contract is much shorter.
const TYPE_BYTES_MAX: usize = 4_096;
const NAME_BYTES_MAX: usize = 512;
/// The most text about all imports and exports together; those of Python's runtime have 30 KB.
const ITEMS_BYTES_MAX: usize = 256 << 10;
/// What an item or a function counts beside its text.
const ITEM_OVERHEAD_BYTES: usize = 32;

/// The contract's package.
const PACKAGE: &str = "laelaps:worker";
/// The version that is linked, and that the compatible ones are measured by.
pub(super) const VERSION: &str = "0.1.0";
/// WASI packages that are offered, all in version 0.2.
const WASI: [&str; 6] = ["wasi:cli", "wasi:clocks", "wasi:filesystem", "wasi:io", "wasi:random", "wasi:sockets"];

/// The functions of the contract, as [`signature`] writes them. A test compares them with the WIT files.
const OFFERED: [(&str, &[(&str, &str)]); 2] = [
    (
        "context",
        &[
            (
                "heartbeat",
                "func(progress: option<record { done: u64, total: option<u64>, note: string }>, alive-time: option<u64>) -> bool",
            ),
            ("is-cancelled", "func() -> option<enum { graceful, immediate, lease-lost }>"),
            ("update-data", "func(members: list<u8>) -> result<_, record { code: string, message: string }>"),
            (
                "submit",
                "func(key: string, kind: string, data: list<u8>, options: record { run-at: option<u64>, user: option<string>, \
                 max-running: option<u32>, max-attempts: option<u32>, compression: enum { none, gzip } }) \
                 -> result<_, record { code: string, message: string }>",
            ),
            ("deadline", "func() -> option<u64>"),
            ("created-at", "func() -> u64"),
            ("max-attempts", "func() -> option<u32>"),
            ("setting", "func(name: string) -> option<string>"),
            ("settings", "func() -> list<tuple<string, string>>"),
            ("[constructor]submission", "func(key: string, kind: string) -> own<resource>"),
            ("[method]submission.run-at", "func(self: borrow<resource>, moment: u64)"),
            ("[method]submission.user", "func(self: borrow<resource>, user: string)"),
            ("[method]submission.max-running", "func(self: borrow<resource>, most: u32)"),
            ("[method]submission.max-attempts", "func(self: borrow<resource>, most: u32)"),
            ("[method]submission.priority", "func(self: borrow<resource>, priority: s32)"),
            ("[method]submission.compression", "func(self: borrow<resource>, compression: enum { none, gzip })"),
            (
                "[method]submission.submit",
                "func(self: borrow<resource>, data: list<u8>) -> result<_, record { code: string, message: string }>",
            ),
            ("[method]submission.queue", "func(self: borrow<resource>, queue: string)"),
            ("queue", "func() -> string"),
        ],
    ),
    (
        "log",
        &[
            ("log", "func(level: enum { trace, debug, info, warn, error }, message: string)"),
            ("enabled", "func(level: enum { trace, debug, info, warn, error }) -> bool"),
        ],
    ),
];

/// What a plugin has to export.
const HANDLE: &str = "func(task: record { key: string, kind: string, data: list<u8>, user: option<string>, attempt: u32 }) \
    -> result<variant { finish(record { output: option<list<u8>>, retention: option<u64> }), retry(option<u64>), release(option<u64>) }, \
    record { kind: enum { retry, reject }, code: string, message: string }>";

/// The name and version of the contract that a component fits.
pub(super) fn contract() -> String {
    format!("{PACKAGE}@{VERSION}")
}

/// What a component is, seen from the contract.
pub(super) struct Fit {
    /// What it needs.
    pub(super) imports: Vec<Item>,
    /// What it provides.
    pub(super) exports: Vec<Item>,
    /// Imports, exports and functions that did not fit into the bound.
    pub(super) left_out: usize,
    /// Everything that keeps it from fitting, in words; nothing if it fits.
    pub(super) problems: Vec<String>,
}

/// Look at a component. The linker knows the imports, but looks at the export's type only when an instance is made.
pub(super) fn examine(engine: &wasmtime::Engine, linker: &Linker<Guest>, component: &Component) -> Fit {
    let mut room = Room { bytes_left: ITEMS_BYTES_MAX, left_out: 0 };
    let ty = component.component_type();
    // The exports first, so that no number of imports hides them.
    let exports: Vec<Item> = ty.exports(engine).filter_map(|(name, export)| room.item(engine, name, &export.ty)).collect();
    let imports: Vec<Item> = ty.imports(engine).filter_map(|(name, import)| room.item(engine, name, &import.ty)).collect();
    let mut problems = Problems::default();
    if let Err(error) = linker.instantiate_pre(component).and_then(PluginPre::new) {
        imports.iter().flat_map(import_problems).for_each(|problem| problems.add(problem));
        problems.extend(export_problem(&exports));
        if problems.all.is_empty() {
            problems.add(format!("it does not fit {}: {error:#}", contract()));
        }
    } else {
        problems.extend(export_problem(&exports));
    }
    Fit { imports, exports, left_out: room.left_out, problems: problems.all }
}

/// Problems up to a bound. The first of many says what is wrong.
#[derive(Default)]
struct Problems {
    all: Vec<String>,
    bytes: usize,
}

impl Problems {
    fn add(&mut self, problem: String) {
        self.bytes += problem.len();
        // The first one always: whoever reads them cuts it.
        if self.all.is_empty() || self.bytes <= reason::BYTES_MAX {
            self.all.push(problem);
        }
    }

    fn extend(&mut self, problem: Option<String>) {
        problem.into_iter().for_each(|problem| self.add(problem));
    }
}

/// Room for what is said of imports and exports.
struct Room {
    bytes_left: usize,
    left_out: usize,
}

impl Room {
    /// None if there is no room for it.
    fn item(&mut self, engine: &wasmtime::Engine, name: &str, item: &ComponentItem) -> Option<Item> {
        let name = self.text(name)?;
        let functions = match item {
            ComponentItem::ComponentFunc(function) => self.function(&name, function).into_iter().collect(),
            ComponentItem::ComponentInstance(instance) => instance
                .exports(engine)
                .filter_map(|(name, export)| match &export.ty {
                    ComponentItem::ComponentFunc(function) => self.function(name, function),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        };
        Some(Item { name, is_instance: matches!(item, ComponentItem::ComponentInstance(_)), functions })
    }

    fn function(&mut self, name: &str, function: &ComponentFunc) -> Option<(String, String)> {
        let name = self.text(name)?;
        let signature = signature(function);
        self.bytes_left = self.bytes_left.saturating_sub(signature.len());
        Some((name, signature))
    }

    /// A name, if there is room for another item.
    fn text(&mut self, name: &str) -> Option<String> {
        if self.bytes_left == 0 {
            self.left_out += 1;
            return None;
        }
        let mut text = Bounded::new(NAME_BYTES_MAX);
        text.push(name);
        let text = text.into_text();
        self.bytes_left = self.bytes_left.saturating_sub(text.len() + ITEM_OVERHEAD_BYTES);
        Some(text)
    }
}

fn import_problems(item: &Item) -> Vec<String> {
    let name = &item.name;
    let (path, version) = name.split_once('@').unwrap_or((name, ""));
    let (package, interface) = path.split_once('/').unwrap_or((path, ""));
    if package == PACKAGE {
        return contract_import_problems(item, interface, version);
    }
    if WASI.contains(&package) && version.starts_with("0.2.") {
        return Vec::new();
    }
    let hint = if package.starts_with("wasi:") {
        format!("this host offers WASI 0.2 ({})", WASI.join(", "))
    } else {
        format!("this host offers {PACKAGE}/context@{VERSION}, {PACKAGE}/log@{VERSION} and WASI 0.2")
    };
    vec![format!("it imports `{name}`, which no plugin gets: {hint}")]
}

fn contract_import_problems(item: &Item, interface: &str, version: &str) -> Vec<String> {
    let name = &item.name;
    if !is_compatible(version) {
        return vec![format!(
            "it imports `{name}`, but this host speaks version {VERSION} of the contract: build it against that version, or upgrade the host"
        )];
    }
    if interface == "types" {
        return Vec::new();
    }
    let Some((_, offered)) = OFFERED.iter().find(|(known, _)| *known == interface) else {
        return vec![format!("it imports `{name}`, but the contract has no interface `{interface}` for plugins to import")];
    };
    let function_problem = |(function, found): &(String, String)| match offered.iter().find(|(known, _)| known == function) {
        None => Some(format!("it imports the function `{function}` of `{name}`, which this host does not have")),
        Some((_, expected)) if expected != found => Some(format!(
            "it imports the function `{function}` of `{name}` with another type: expected `{expected}`, found `{found}`"
        )),
        Some(_) => None,
    };
    item.functions.iter().filter_map(function_problem).collect()
}

fn export_problem(exports: &[Item]) -> Option<String> {
    let wanted = format!("{PACKAGE}/handler@{VERSION}");
    let Some(handler) = exports.iter().find(|item| item.name.split('@').next() == Some("laelaps:worker/handler")) else {
        return Some(format!("it does not export `{wanted}`, so it is no plugin: {}", another_world(exports)));
    };
    let version = handler.name.split_once('@').map_or("", |(_, version)| version);
    if !is_compatible(version) {
        return Some(format!(
            "it exports `{}`, but this host speaks version {VERSION} of the contract: build it against that version, or upgrade the host",
            handler.name
        ));
    }
    if !handler.is_instance {
        return Some(format!("its export `{}` is not an interface", handler.name));
    }
    match handler.functions.iter().find(|(name, _)| name == "handle") {
        None => Some(format!("its export `{}` has no function `handle`", handler.name)),
        Some((_, found)) if found != HANDLE => Some(format!(
            "its export `{}` has a function `handle` of another type: expected `{HANDLE}`, found `{found}`",
            handler.name
        )),
        Some(_) => None,
    }
}

fn another_world(exports: &[Item]) -> String {
    let names: Vec<&str> = exports.iter().map(|item| item.name.as_str()).collect();
    if names.iter().any(|name| name.starts_with("wasi:cli/run")) {
        "it is a command-line program (it exports `wasi:cli/run`)".into()
    } else if names.iter().any(|name| name.starts_with("wasi:http/")) {
        "it is an HTTP handler (it exports an interface of `wasi:http`)".into()
    } else if names.is_empty() {
        "it exports nothing at all".into()
    } else {
        format!("it exports {}", names.iter().take(10).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", "))
    }
}

/// Before 1.0 the second number says what is compatible.
fn is_compatible(version: &str) -> bool {
    version.starts_with("0.1.") && !version.contains('-')
}

/// A function's type as WIT writes it, with the types' structure in the place of their names, which a component does not keep.
fn signature(function: &ComponentFunc) -> String {
    let mut out = Bounded::new(TYPE_BYTES_MAX);
    out.push(if function.async_() { "async func(" } else { "func(" });
    list(&mut out, function.params(), |(name, ty), out| {
        out.push(name);
        out.push(": ");
        describe(&ty, out);
    });
    out.push(")");
    let mut results = function.results().peekable();
    if results.peek().is_some() {
        out.push(" -> ");
        list(&mut out, results, |ty, out| describe(&ty, out));
    }
    out.into_text()
}

/// Write a list with commas, as far as it fits.
fn list<T>(out: &mut Bounded, parts: impl Iterator<Item = T>, mut write: impl FnMut(T, &mut Bounded)) {
    for (index, part) in parts.enumerate() {
        if out.is_full() {
            return;
        }
        if index > 0 {
            out.push(", ");
        }
        write(part, out);
    }
}

/// Every call writes something before it descends, so a full text ends the descent, however much the type would expand to.
fn describe(ty: &Type, out: &mut Bounded) {
    if out.is_full() {
        return;
    }
    match ty {
        Type::List(list) => within(out, "list<", &list.ty(), ">"),
        Type::Option(option) => within(out, "option<", &option.ty(), ">"),
        Type::Tuple(tuple) => {
            out.push("tuple<");
            list(out, tuple.types(), |ty, out| describe(&ty, out));
            out.push(">");
        }
        Type::Record(record) => {
            out.push("record { ");
            list(out, record.fields(), |field, out| {
                out.push(field.name);
                out.push(": ");
                describe(&field.ty, out);
            });
            out.push(" }");
        }
        Type::Variant(variant) => {
            out.push("variant { ");
            list(out, variant.cases(), |case, out| {
                out.push(case.name);
                if let Some(ty) = case.ty {
                    within(out, "(", &ty, ")");
                }
            });
            out.push(" }");
        }
        Type::Enum(names) => words(out, "enum { ", names.names()),
        Type::Flags(names) => words(out, "flags { ", names.names()),
        Type::Result(result) => match (result.ok(), result.err()) {
            (None, None) => out.push("result"),
            (Some(ok), None) => within(out, "result<", &ok, ">"),
            (ok, Some(error)) => {
                out.push("result<");
                match ok {
                    Some(ok) => describe(&ok, out),
                    None => out.push("_"),
                }
                within(out, ", ", &error, ">");
            }
        },
        plain => out.push(word(plain)),
    }
}

fn within(out: &mut Bounded, before: &str, ty: &Type, after: &str) {
    out.push(before);
    describe(ty, out);
    out.push(after);
}

fn words<'a>(out: &mut Bounded, before: &str, names: impl Iterator<Item = &'a str>) {
    out.push(before);
    list(out, names, |name, out| out.push(name));
    out.push(" }");
}

/// A type that consists of no others.
fn word(ty: &Type) -> &'static str {
    match ty {
        Type::Bool => "bool",
        Type::S8 => "s8",
        Type::U8 => "u8",
        Type::S16 => "s16",
        Type::U16 => "u16",
        Type::S32 => "s32",
        Type::U32 => "u32",
        Type::S64 => "s64",
        Type::U64 => "u64",
        Type::Float32 => "f32",
        Type::Float64 => "f64",
        Type::Char => "char",
        Type::String => "string",
        Type::Own(_) => "own<resource>",
        Type::Borrow(_) => "borrow<resource>",
        Type::Future(_) => "future",
        Type::Stream(_) => "stream",
        Type::ErrorContext => "error-context",
        _ => "a type that this host does not know",
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// The contract's world as wit-component writes it, which the tests under `tests/plugin` also link: so what is compared here is what
    /// the linker offers.
    fn component(engine: &wasmtime::Engine) -> Component {
        let room = "(memory (export \"memory\") 1) (global (export \"next\") (mut i32) (i32.const 0))
            (func (export \"cabi_realloc\") (param i32 i32 i32 i32) (result i32) unreachable)";
        let main = "(func (export \"handle\") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable)";
        let text = include_str!("../../tests/plugin/component.wat").replace(";; ROOM", room).replace(";; MAIN", main);
        Component::new(engine, wat::parse_str(text).expect("text")).expect("component")
    }

    #[test]
    fn the_words_for_the_contract_are_the_contracts() {
        let engine = wasmtime::Engine::new(&super::super::engine::code_settings()).expect("engine");
        let component = component(&engine);
        let linker: Linker<Guest> = super::super::engine::linker(&engine).expect("linker");
        let Fit { imports, exports, left_out, problems } = examine(&engine, &linker, &component);
        assert_eq!((left_out, problems), (0, Vec::new()));
        for (interface, offered) in OFFERED {
            let name = format!("{PACKAGE}/{interface}@{VERSION}");
            let found = &imports.iter().find(|item| item.name == name).expect("imported").functions;
            let offered: Vec<_> = offered.iter().map(|(name, ty)| ((*name).to_owned(), (*ty).to_owned())).collect();
            assert_eq!(*found, offered, "{name}");
        }
        assert_eq!(exports[0].functions, [("handle".to_owned(), HANDLE.to_owned())]);
    }

    /// A component that imports `f`, a function of a type that doubles so many times.
    fn bomb(levels: usize, name_bytes: usize) -> Vec<u8> {
        let mut text =
            format!("(component (type $t (record (field \"a{}\" u8))) (import \"t\" (type $t0 (eq $t)))", "b".repeat(name_bytes));
        for level in 0..levels {
            let _ = write!(text, "(type $t{} (tuple $t{level} $t{level}))", level + 1);
        }
        let _ = write!(text, "(import \"f\" (func (param \"p\" $t{levels}))))");
        wat::parse_str(text).expect("text")
    }

    #[test]
    fn a_type_that_expands_to_gigabytes_is_described_within_its_bound() {
        let engine = wasmtime::Engine::new(&super::super::engine::code_settings()).expect("engine");
        let linker: Linker<Guest> = super::super::engine::linker(&engine).expect("linker");
        let component = Component::new(&engine, bomb(17, 90_000)).expect("component");
        let Fit { imports, problems, .. } = examine(&engine, &linker, &component);
        let (_, described) = &imports.iter().find(|import| import.name == "f").expect("imported").functions[0];
        assert!(described.len() <= TYPE_BYTES_MAX + '…'.len_utf8() && described.ends_with('…'), "{}", described.len());
        assert!(problems.iter().map(String::len).sum::<usize>() < 4 * reason::BYTES_MAX, "{problems:?}");
    }

    #[test]
    fn more_functions_than_anybody_reads_are_counted_and_the_exports_are_told_all_the_same() {
        let engine = wasmtime::Engine::new(&super::super::engine::code_settings()).expect("engine");
        let linker: Linker<Guest> = super::super::engine::linker(&engine).expect("linker");
        let mut text = "(component (import \"a:b/c\" (instance ".to_owned();
        (0..20_000).for_each(|number| write!(text, "(export \"f{number}\" (func))").expect("a text"));
        text.push_str(")) (instance $i) (export \"x:y/z\" (instance $i)))");
        let component = Component::new(&engine, wat::parse_str(text).expect("text")).expect("component");
        let Fit { imports, exports, left_out, problems } = examine(&engine, &linker, &component);
        assert_eq!(imports[0].functions.len() + left_out, 20_000);
        assert!(left_out > 10_000 && exports[0].name == "x:y/z");
        assert!(problems.iter().map(String::len).sum::<usize>() < 2 * reason::BYTES_MAX);
    }

    #[test]
    fn only_the_same_line_of_versions_is_compatible() {
        assert!(is_compatible("0.1.0") && is_compatible("0.1.12"));
        for other in ["", "0.2.0", "1.0.0", "0.10.0", "0.1.0-rc.1"] {
            assert!(!is_compatible(other), "{other}");
        }
    }

    #[test]
    fn a_program_and_an_http_handler_are_recognised() {
        let item = |name: &str| Item { name: name.into(), is_instance: true, functions: Vec::new() };
        assert!(export_problem(&[item("wasi:cli/run@0.2.6")]).expect("a problem").contains("command-line program"));
        assert!(export_problem(&[item("wasi:http/incoming-handler@0.2.6")]).expect("a problem").contains("HTTP handler"));
        assert!(export_problem(&[]).expect("a problem").contains("exports nothing at all"));
    }
}
