//! Hostile modules as text: the contract's world with core modules put in, as the daemon's own tests build it.

/// The contract's world, with marks where core modules go.
const COMPONENT: &str = include_str!("../../host/daemon/tests/plugin/component.wat");
/// What stands behind the lowered imports and before the core module.
const BEFORE_MAIN: &str = "  (core module $main";
/// A memory, and who hands it out.
const ROOM: &str = include_str!("../../host/daemon/tests/plugin/room.wat");
/// The type of the core function behind `handle`.
pub(super) const HANDLE: &str = "(param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)";

/// A plugin whose core module is this text, with `$memory` of its own room.
pub(super) fn plugin(main: &str) -> Vec<u8> {
    component(ROOM, main, "", "", "")
}

/// A plugin that does nothing, with another memory and another `cabi_realloc`.
pub(super) fn room(room: &str, body: &str) -> Vec<u8> {
    component(room, &format!("(import \"room\" \"memory\" (memory 1)) (func (export \"handle\") {HANDLE} {body})"), "", "", "")
}

/// A plugin that does nothing, and imports more than the contract has.
pub(super) fn importing(imports: &str) -> Vec<u8> {
    component(ROOM, &format!("(func (export \"handle\") {HANDLE} unreachable)"), imports, "", "")
}

/// A plugin that imports more than the contract has, as component text, lowers that, hands it to its core module, and has this text as core
/// module.
pub(super) fn with_imports(imports: &str, lowered: &str, handed_over: &str, main: &str) -> Vec<u8> {
    component(ROOM, main, imports, lowered, handed_over)
}

fn component(room: &str, main: &str, imports: &str, lowered: &str, handed_over: &str) -> Vec<u8> {
    let text = COMPONENT
        .replace(";; ROOM", room)
        .replace(";; MAIN", main)
        .replace(";; MORE IMPORTS", imports)
        .replace(BEFORE_MAIN, &format!("{lowered}{BEFORE_MAIN}"))
        .replace("(with \"log\" (instance $log-core))", &format!("(with \"log\" (instance $log-core)) {handed_over}"));
    parse(&text)
}

/// A component out of its text.
pub(super) fn parse(text: &str) -> Vec<u8> {
    wat::parse_str(text).unwrap_or_else(|error| panic!("{error}"))
}

/// Bytes as a text of WAT writes them.
pub(super) fn escaped(text: &str) -> String {
    text.bytes().map(|byte| format!("\\{byte:02x}")).collect()
}
