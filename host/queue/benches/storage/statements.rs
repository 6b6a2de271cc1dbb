//! The very statements that the crate runs, read out of its sources: a copy would be another statement some day, and the limit a wrong one.

/// The text of `const NAME: &str` in a source, of one that is not inside a function if there are several. Macros that it names are looked for in
/// all sources.
pub(crate) fn statement(source: &str, sources: &[&str], name: &str) -> String {
    let heads = [format!("pub(super) const {name}: &str ="), format!("const {name}: &str =")];
    let found = heads.iter().find_map(|head| source.split_once(head.as_str()));
    let (_, expression) = found.unwrap_or_else(|| panic!("the crate has no statement {name} here any more"));
    expand(sources, expression, "")
}

/// Literals and macros up to the end of the constant, in a macro's body with what `$set` stands for.
fn expand(sources: &[&str], expression: &str, set: &str) -> String {
    let mut text = String::new();
    let mut rest = expression.trim_start();
    loop {
        if let Some(literal) = rest.strip_prefix('"') {
            rest = take_literal(literal, &mut text).trim_start();
        } else if rest.is_empty() || rest.starts_with([';', '}']) {
            return text;
        } else if let Some(inside) = rest.strip_prefix(['(', ')', ',']) {
            rest = inside.trim_start();
        } else if let Some(after) = rest.strip_prefix("$($set)+") {
            text.push_str(&expand(sources, set, ""));
            rest = after.trim_start();
        } else if let Some(comment) = rest.strip_prefix("//") {
            rest = comment.split_once('\n').map_or("", |(_, rest)| rest).trim_start();
        } else {
            let (name, mut after) = rest.split_once('!').expect("literals, concat! and macros of them");
            if name != "concat" {
                let (set, behind) = arguments(after);
                let head = format!("macro_rules! {name} {{");
                let body = sources.iter().find_map(|source| source.split_once(&head)).expect("a macro of these sources").1;
                let body = body.split_once("=> {").expect("a rule").1;
                text.push_str(&expand(sources, body, set));
                after = behind;
            }
            rest = after.trim_start();
        }
    }
}

/// What a macro is called with, which has no literals, and what follows.
fn arguments(call: &str) -> (&str, &str) {
    let mut depth = 0;
    for (place, character) in call.char_indices() {
        match character {
            '(' => depth += 1,
            ')' if depth == 1 => return (&call[1..place], &call[place + 1..]),
            ')' => depth -= 1,
            _ => {}
        }
    }
    panic!("a call without end");
}

/// Append a literal; answers what follows it.
fn take_literal<'r>(literal: &'r str, text: &mut String) -> &'r str {
    let mut characters = literal.char_indices();
    while let Some((place, character)) = characters.next() {
        match character {
            '"' => return &literal[place + 1..],
            '\\' => text.extend(characters.next().map(|(_, escaped)| escaped)),
            other => text.push(other),
        }
    }
    panic!("a literal without end");
}
