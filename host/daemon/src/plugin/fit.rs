//! Whether a component fits the contract; if not, exactly what is wrong with it.
//!
//! The linker decides. What stands here only finds the words, because the linker's own stop at the first thing they meet and name types
//! by their place in a table.

use wasmtime::component::Component;
use wasmtime::component::types::{ComponentFunc, ComponentItem, Type};

use super::inspect::Item;

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

/// Everything that keeps a component from fitting, in words; nothing if it fits. `linked` is what the linker said: it knows the imports, but
/// looks at the export's type only when an instance is made.
pub(super) fn problems<T>(engine: &wasmtime::Engine, component: &Component, linked: &wasmtime::Result<T>) -> Vec<String> {
    let mut problems = Vec::new();
    if let Err(error) = linked {
        problems.extend(imports(engine, component).iter().flat_map(import_problems));
        problems.extend(export_problem(&exports(engine, component)));
        if problems.is_empty() {
            problems.push(format!("it does not fit {}: {error:#}", contract()));
        }
    } else {
        problems.extend(export_problem(&exports(engine, component)));
    }
    problems
}

/// What a component needs.
pub(super) fn imports(engine: &wasmtime::Engine, component: &Component) -> Vec<Item> {
    component.component_type().imports(engine).map(|(name, import)| item(engine, name, &import.ty)).collect()
}

/// What a component provides.
pub(super) fn exports(engine: &wasmtime::Engine, component: &Component) -> Vec<Item> {
    component.component_type().exports(engine).map(|(name, export)| item(engine, name, &export.ty)).collect()
}

fn item(engine: &wasmtime::Engine, name: &str, item: &ComponentItem) -> Item {
    let functions = match item {
        ComponentItem::ComponentFunc(function) => vec![(name.to_owned(), signature(function))],
        ComponentItem::ComponentInstance(instance) => instance
            .exports(engine)
            .filter_map(|(name, export)| match &export.ty {
                ComponentItem::ComponentFunc(function) => Some((name.to_owned(), signature(function))),
                _ => None,
            })
            .collect(),
        _ => Vec::new(),
    };
    Item { name: name.to_owned(), is_instance: matches!(item, ComponentItem::ComponentInstance(_)), functions }
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
    let parameters: Vec<String> = function.params().map(|(name, ty)| format!("{name}: {}", describe(&ty))).collect();
    let results: Vec<String> = function.results().map(|ty| describe(&ty)).collect();
    let head = if function.async_() { "async func" } else { "func" };
    match results.as_slice() {
        [] => format!("{head}({})", parameters.join(", ")),
        results => format!("{head}({}) -> {}", parameters.join(", "), results.join(", ")),
    }
}

fn describe(ty: &Type) -> String {
    let comma = |parts: Vec<String>| parts.join(", ");
    match ty {
        Type::Bool => "bool".into(),
        Type::S8 => "s8".into(),
        Type::U8 => "u8".into(),
        Type::S16 => "s16".into(),
        Type::U16 => "u16".into(),
        Type::S32 => "s32".into(),
        Type::U32 => "u32".into(),
        Type::S64 => "s64".into(),
        Type::U64 => "u64".into(),
        Type::Float32 => "f32".into(),
        Type::Float64 => "f64".into(),
        Type::Char => "char".into(),
        Type::String => "string".into(),
        Type::List(list) => format!("list<{}>", describe(&list.ty())),
        Type::Tuple(tuple) => format!("tuple<{}>", comma(tuple.types().map(|ty| describe(&ty)).collect())),
        Type::Record(record) => {
            format!(
                "record {{ {} }}",
                comma(record.fields().map(|field| format!("{}: {}", field.name, describe(&field.ty))).collect())
            )
        }
        Type::Variant(variant) => format!(
            "variant {{ {} }}",
            comma(
                variant
                    .cases()
                    .map(|case| case.ty.map_or_else(|| case.name.to_owned(), |ty| format!("{}({})", case.name, describe(&ty))))
                    .collect()
            )
        ),
        Type::Enum(names) => format!("enum {{ {} }}", comma(names.names().map(str::to_owned).collect())),
        Type::Flags(names) => format!("flags {{ {} }}", comma(names.names().map(str::to_owned).collect())),
        Type::Option(option) => format!("option<{}>", describe(&option.ty())),
        Type::Result(result) => match (result.ok(), result.err()) {
            (None, None) => "result".into(),
            (Some(ok), None) => format!("result<{}>", describe(&ok)),
            (ok, Some(error)) => format!("result<{}, {}>", ok.map_or_else(|| "_".into(), |ok| describe(&ok)), describe(&error)),
        },
        Type::Own(_) => "own<resource>".into(),
        Type::Borrow(_) => "borrow<resource>".into(),
        Type::Future(_) => "future".into(),
        Type::Stream(_) => "stream".into(),
        Type::ErrorContext => "error-context".into(),
        _ => "a type that this host does not know".into(),
    }
}

#[cfg(test)]
mod tests {
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
        for (interface, offered) in OFFERED {
            let name = format!("{PACKAGE}/{interface}@{VERSION}");
            let found = imports(&engine, &component).into_iter().find(|item| item.name == name).expect("imported").functions;
            let offered: Vec<_> = offered.iter().map(|(name, ty)| ((*name).to_owned(), (*ty).to_owned())).collect();
            assert_eq!(found, offered, "{name}");
        }
        let found = exports(&engine, &component);
        assert_eq!(found[0].functions, [("handle".to_owned(), HANDLE.to_owned())]);
        assert_eq!(export_problem(&found), None);
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
