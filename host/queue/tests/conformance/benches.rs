//! What tests/bench does before it measures: it reads the crate's statements out of its sources, and has to find them.

use std::fs;
use std::path::Path;

#[path = "../../benches/storage/statements.rs"]
mod statements;

/// What stands between quotes in a text.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('"').skip(1).step_by(2)
}

/// Whether it is the name of a statement, and not SQL of one word.
fn is_name(text: &str) -> bool {
    let is_sql = ["COMMIT", "ROLLBACK"].contains(&text);
    !is_sql && !text.is_empty() && text.chars().all(|character| character.is_ascii_uppercase() || character == '_')
}

#[test]
fn every_statement_that_the_benches_run_is_found_in_the_crate() {
    let raw = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/storage/raw");
    for database in ["sqlite", "postgres", "mariadb"] {
        let bench = fs::read_to_string(raw.join(database).with_extension("rs")).expect("the bench can be read");
        let included = quoted(&bench).filter(|text| text.starts_with("../") && text.ends_with(".rs"));
        let sources: Vec<String> = included.map(|path| fs::read_to_string(raw.join(path)).expect(path)).collect();
        let mut found = 0;
        for name in quoted(&bench).filter(|text| is_name(text)) {
            let is_here = |source: &&String| source.contains(&format!("const {name}: &str ="));
            let first = sources.iter().find(is_here).unwrap_or_else(|| panic!("{database}: nothing is called {name}"));
            // As the bench does: with all the sources that it has.
            let all: Vec<&str> = sources.iter().map(String::as_str).collect();
            let statement = statements::statement(first, &all, name);
            let is_whole = !statement.is_empty() && !statement.contains("!(");
            assert!(is_whole, "{database}: {name} is {statement}");
            found += 1;
        }
        assert!(found >= 2, "{database}: {found} statements");
    }
}
