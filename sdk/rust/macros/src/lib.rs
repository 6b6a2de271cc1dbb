//! The attributes of `laelaps-plugin`. Use them through that crate, which documents what they expand to.

mod decider;
mod handler;

use proc_macro::TokenStream;
use syn::{Item, ItemImpl, parse_macro_input};

/// Makes a function, or an `impl Application for ...`, the handler of this component.
///
/// A function takes the task's data (any type that deserialises), a `&Context`, both in this order, or nothing, and returns a `Result` of an
/// `Outcome` or of anything that serialises, with which the task is finished.
#[proc_macro_attribute]
pub fn handler(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let item = parse_macro_input!(item as Item);
    handler::expand(&arguments.into(), item).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes the methods of an `impl` block decisions: `impl Decider` finds them by their names.
///
/// A method takes `&self`, then the decision's options (any type that deserialises), a `&Context`, both in this order, or nothing more, and
/// returns `Result<Outcome>`. A method `unexpected_error_raised(&self, error: Error, context: &Context)` says what becomes of errors
/// that no decision was made about.
#[proc_macro_attribute]
pub fn decider(arguments: TokenStream, item: TokenStream) -> TokenStream {
    let item = parse_macro_input!(item as ItemImpl);
    decider::expand(&arguments.into(), item).unwrap_or_else(syn::Error::into_compile_error).into()
}
