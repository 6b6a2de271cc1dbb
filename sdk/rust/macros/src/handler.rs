//! `#[handler]`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{Error, FnArg, Item, ItemFn, ItemImpl, Result, ReturnType, Type};

const FORMS: &str = "a handler takes the task's data, a `&Context`, both in this order, or nothing: \
                     `fn handle(data: Data, context: &Context) -> Result<Outcome>`";

pub(crate) fn expand(arguments: &TokenStream, item: Item) -> Result<TokenStream> {
    if !arguments.is_empty() {
        return Err(Error::new_spanned(
            arguments,
            "#[handler] takes no arguments: which tasks come here is for the host's routes to say",
        ));
    }
    match item {
        Item::Fn(function) => function_handler(&function),
        Item::Impl(implementation) => application_handler(&implementation),
        other => Err(Error::new_spanned(other, "#[handler] belongs on a function or on an `impl Application for ...` block")),
    }
}

fn function_handler(function: &ItemFn) -> Result<TokenStream> {
    let signature = &function.sig;
    if let Some(token) = &signature.asyncness {
        return Err(Error::new_spanned(
            token,
            "a handler is not async: a component runs one task at a time, so blocking is fine",
        ));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new_spanned(&signature.generics, "a handler cannot be generic: its data has one type"));
    }
    if matches!(signature.output, ReturnType::Default) {
        return Err(Error::new_spanned(
            signature,
            "a handler returns a `Result`: of an `Outcome`, or of anything that serialises",
        ));
    }
    let name = &signature.ident;
    let parameters = signature.inputs.iter().map(parameter).collect::<Result<Vec<_>>>()?;
    let body = match parameters.as_slice() {
        [] => quote!(::laelaps_plugin::__private::answer(#name())),
        [Parameter::Context] => quote!(::laelaps_plugin::__private::answer(#name(context))),
        [Parameter::Data(data)] => quote!(::laelaps_plugin::__private::run(context, |data: #data, _| #name(data))),
        [Parameter::Data(data), Parameter::Context] => {
            quote!(::laelaps_plugin::__private::run(context, |data: #data, context| #name(data, context)))
        }
        _ => return Err(Error::new_spanned(&signature.inputs, FORMS)),
    };
    let export = export(&body);
    // Natively the function may have no caller but a test.
    Ok(quote! {
        #[cfg_attr(not(target_family = "wasm"), allow(dead_code))]
        #function
        #export
    })
}

fn application_handler(implementation: &ItemImpl) -> Result<TokenStream> {
    let Some((_, path, _)) = &implementation.trait_ else {
        return Err(Error::new_spanned(
            &implementation.self_ty,
            "#[handler] belongs on a function or on an `impl Application for ...` block, not on an inherent `impl`",
        ));
    };
    if path.segments.last().is_none_or(|segment| segment.ident != "Application") {
        return Err(Error::new_spanned(
            path,
            "#[handler] makes a component of an `impl Application for ...`, not of another trait",
        ));
    }
    if !implementation.generics.params.is_empty() {
        return Err(Error::new_spanned(&implementation.generics, "a handler cannot be generic: a component has one"));
    }
    let application = &implementation.self_ty;
    let export = export(&quote!(::laelaps_plugin::__private::run_application::<#application>(context)));
    Ok(quote! {
        #implementation
        #export
    })
}

/// The component's export, which answers with `body`, an expression of `context`.
fn export(body: &TokenStream) -> TokenStream {
    quote! {
        // A component has one handler: a second attribute defines this again, and the compiler says so by this name.
        #[doc(hidden)]
        #[allow(dead_code)]
        enum OneHandlerPerPlugin {}

        const _: () = {
            #[cfg_attr(not(target_family = "wasm"), allow(dead_code))]
            fn answer(context: &::laelaps_plugin::Context) -> ::laelaps_plugin::Result<::laelaps_plugin::Outcome> {
                #body
            }

            #[cfg(target_family = "wasm")]
            use ::laelaps_plugin::__private::{Exports, bindings::{self, laelaps::worker::types}};

            #[cfg(target_family = "wasm")]
            struct Plugin;

            #[cfg(target_family = "wasm")]
            impl Exports for Plugin {
                fn handle(task: types::Task) -> ::core::result::Result<types::Outcome, types::Failure> {
                    ::laelaps_plugin::__private::serve(task, answer)
                }
            }

            #[cfg(target_family = "wasm")]
            ::laelaps_plugin::__private::export_plugin!(Plugin with_types_in bindings);
        };
    }
}

enum Parameter<'a> {
    Data(&'a Type),
    Context,
}

fn parameter(argument: &FnArg) -> Result<Parameter<'_>> {
    match argument {
        FnArg::Receiver(receiver) => Err(Error::new_spanned(
            receiver,
            "a handler function has no `self`; for a handler with steps, put #[handler] on an `impl Application for ...` block",
        )),
        FnArg::Typed(typed) => match typed.ty.as_ref() {
            Type::Reference(reference) if is_context(&reference.elem) && reference.mutability.is_none() => Ok(Parameter::Context),
            Type::Reference(reference) if is_context(&reference.elem) => {
                Err(Error::new_spanned(reference, "the context is shared: take it as `&Context`"))
            }
            Type::Reference(reference) => Err(Error::new_spanned(
                reference,
                "the task's data is handed over by value: take an owned type, `String` rather than `&str`",
            )),
            owned if is_context(owned) => Err(Error::new_spanned(owned, "the context is lent: take it as `&Context`")),
            owned => Ok(Parameter::Data(owned)),
        },
    }
}

pub(crate) fn is_context(path: &Type) -> bool {
    matches!(path, Type::Path(path) if path.path.segments.last().is_some_and(|segment| segment.ident == "Context"))
}
