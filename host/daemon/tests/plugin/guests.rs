//! Components made in the test itself, out of text: component.wat is the contract's world, guest.wat the handler within it.
//!
//! | kind | what the handler does |
//! | --- | --- |
//! | f | finishes with the data as output |
//! | r, R | asks for another attempt after 5 s, after for ever |
//! | l | releases |
//! | e, j | fails to be tried again, fails for good |
//! | t, x | traps, recurses without end |
//! | w, m, g | loops, fills memory, logs without end |
//! | M | fills 1 GiB at once |
//! | a, A, y | allocates until refused, then traps, fails or loops |
//! | h | one heartbeat; the answer as output |
//! | c | waits until it is cancelled, then releases |
//! | u | updates the task's data with its data; the refusal's code as output |
//! | s, S | submits a task with its key and data; then finishes (a refusal's code as output) or traps |
//! | F | submits until refused; the refusal's code as output |
//! | d, b, k, K | its deadline, the time of its submission, the setting `colour`, the rest of the context as output |
//! | n | how often its instance was called, as output |
//! | i | how much of its memory was not zero; then fills it |
//! | o | returns 25 MiB |

const COMPONENT: &str = include_str!("component.wat");
const ROOM: &str = include_str!("room.wat");
/// A core module that fits into the component and is never called.
const IDLE: &str = "(func (export \"handle\") (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32) unreachable)";

/// The component of guest.wat.
pub(crate) fn handler() -> Vec<u8> {
    component(ROOM, include_str!("guest.wat"), "")
}

/// A handler that calls what its task's data tells, with the values that stand there, and returns what is left.
pub(crate) fn told() -> Vec<u8> {
    component(ROOM, include_str!("told.wat"), "")
}

/// The same with another digest: a custom section, which changes nothing but the bytes.
pub(crate) fn edition(bytes: &[u8], number: u32) -> Vec<u8> {
    let content = [b"\x07edition".as_slice(), &number.to_le_bytes()].concat();
    let length = u8::try_from(content.len()).expect("short");
    [bytes, &[0, length], &content].concat()
}

/// A plugin that does nothing, and imports more than the contract has, as component text.
pub(crate) fn importing(imports: &str) -> Vec<u8> {
    component(ROOM, IDLE, imports)
}

/// A component that exports nothing but an interface, given as component text with a function `$f` of any type.
pub(crate) fn exporting(function: &str, name: &str) -> Vec<u8> {
    let text = format!(
        "(component
            (core module $main
                (memory (export \"memory\") 1)
                (func (export \"realloc\") (param i32 i32 i32 i32) (result i32) unreachable)
                (func (export \"f\") (param i32 i32) (result i32) unreachable))
            (core instance $main (instantiate $main))
            (alias core export $main \"memory\" (core memory $memory))
            (func $f {function} (canon lift (core func $main \"f\") (memory $memory) (realloc (core func $main \"realloc\"))))
            (instance $handler (export \"handle\" (func $f)))
            (export \"{name}\" (instance $handler)))"
    );
    wat::parse_str(text).expect("component text")
}

/// A plugin whose start never ends.
pub(crate) fn never_starts() -> Vec<u8> {
    component(ROOM, &format!("{IDLE} (func $start (loop $for_ever (br $for_ever))) (start $start)"), "")
}

/// A plugin that needs this much memory at once.
pub(crate) fn needs_memory(pages: u32) -> Vec<u8> {
    component(&ROOM.replace("(memory (export \"memory\") 2)", &format!("(memory (export \"memory\") {pages})")), IDLE, "")
}

/// A plugin that is a great deal of work to compile.
pub(crate) fn bomb(functions: usize) -> Vec<u8> {
    let step = "(local.set 0 (i64.mul (i64.add (local.get 0) (i64.load (i32.wrap_i64 (local.get 0)))) (i64.const 7)))";
    let function = format!("(func (param i64) {})", step.repeat(4_000));
    component(ROOM, &format!("(import \"room\" \"memory\" (memory 1)) {IDLE} {}", function.repeat(functions)), "")
}

fn component(room: &str, main: &str, imports: &str) -> Vec<u8> {
    let text = COMPONENT.replace(";; ROOM", room).replace(";; MAIN", main).replace(";; MORE IMPORTS", imports);
    wat::parse_str(text).expect("component text")
}
