//! Words about a module that may themselves come from it: bounded, and harmless to a terminal and a log.

use std::fmt::{self, Write};

/// The longest reason that is given for anything.
pub(super) const BYTES_MAX: usize = 4_096;

/// Text with a bound. What does not fit is left out, and an ellipsis says so.
#[derive(Debug, Default)]
pub(super) struct Bounded {
    text: String,
    bytes_max: usize,
    is_full: bool,
}

impl Bounded {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { text: String::new(), bytes_max, is_full: false }
    }

    /// Add a part, or as much of it as fits.
    pub(super) fn push(&mut self, part: &str) {
        if self.is_full {
            return;
        }
        let left = self.bytes_max - self.text.len();
        self.text.push_str(&part[..part.floor_char_boundary(left)]);
        if part.len() > left {
            self.is_full = true;
            self.text.push('…');
        }
    }

    /// Nothing more fits. Whoever writes a long text stops.
    pub(super) fn is_full(&self) -> bool {
        self.is_full
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }
}

/// The error ends whatever is being formatted.
impl Write for Bounded {
    fn write_str(&mut self, part: &str) -> fmt::Result {
        self.push(part);
        if self.is_full { Err(fmt::Error) } else { Ok(()) }
    }
}

/// A text as it may stand in a log and on a terminal: at most [`BYTES_MAX`] bytes and an ellipsis, no control characters, and none that
/// change the order in which text is shown. Line ends stay.
pub(super) fn tidy(text: &str) -> String {
    let mut tidy = Bounded::new(BYTES_MAX);
    for character in text.chars() {
        if tidy.is_full() {
            break;
        }
        if character != '\n' && crate::log::is_unprintable(character) {
            let _ = write!(tidy, "{}", character.escape_default());
        } else {
            tidy.push(character.encode_utf8(&mut [0; 4]));
        }
    }
    tidy.into_text()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_at_its_bound_and_says_so() {
        let mut bounded = Bounded::new(5);
        bounded.push("ab");
        bounded.push("cde");
        assert!(!bounded.is_full());
        bounded.push("f");
        bounded.push("g");
        assert!(bounded.is_full());
        assert_eq!(bounded.into_text(), "abcde…");
        let mut bounded = Bounded::new(4);
        bounded.push("\u{20ac}\u{20ac}");
        assert_eq!(bounded.into_text(), "\u{20ac}…");
    }

    #[test]
    fn nothing_that_a_terminal_obeys_stays() {
        assert_eq!(tidy("\u{1b}[31mred\r\n\u{9b}31m\u{202e}x"), "\\u{1b}[31mred\\r\n\\u{9b}31m\\u{202e}x");
        assert!(tidy(&"\u{1b}".repeat(10_000)).len() < BYTES_MAX + 10);
    }
}
