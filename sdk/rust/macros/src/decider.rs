//! `#[decider]`.

use proc_macro2::TokenStream;
use quote::{ToTokens, quote};
use syn::{Error, FnArg, ImplItem, ImplItemFn, ItemImpl, Result, Type};

use crate::handler::is_context;

const UNEXPECTED: &str = "unexpected_error_raised";
const FORMS: &str = "a decision takes `&self`, then its options, a `&Context`, both in this order, or nothing more: \
                     `fn out_of_stock(&self, options: Options, context: &Context) -> Result<Outcome>`";

pub(crate) fn expand(arguments: &TokenStream, implementation: ItemImpl) -> Result<TokenStream> {
    if !arguments.is_empty() {
        return Err(Error::new_spanned(arguments, "#[decider] takes no arguments"));
    }
    if let Some((_, path, _)) = &implementation.trait_ {
        return Err(Error::new_spanned(path, "#[decider] belongs on an inherent `impl` block: its methods become the decisions"));
    }
    let methods = implementation.items.iter().filter_map(|item| match item {
        ImplItem::Fn(method) => Some(method),
        _ => None,
    });
    let (unexpected, decisions): (Vec<&ImplItemFn>, Vec<&ImplItemFn>) =
        methods.filter(|method| is_decision(method)).partition(|method| method.sig.ident == UNEXPECTED);
    let names: Vec<String> = decisions.iter().map(|method| method.sig.ident.to_string()).collect();
    let answers = decisions.iter().map(|method| answer(method)).collect::<Result<Vec<_>>>()?;
    let unexpected = unexpected.into_iter().map(unexpected_error).collect::<Result<TokenStream>>()?;
    let (generics, _, clause) = implementation.generics.split_for_impl();
    let decider = &implementation.self_ty;
    Ok(quote! {
        #implementation

        impl #generics ::laelaps_plugin::Decider for #decider #clause {
            fn decide(
                &self,
                name: &str,
                options: ::laelaps_plugin::serde_json::Value,
                context: &::laelaps_plugin::Context,
            ) -> ::laelaps_plugin::Result<::laelaps_plugin::Outcome> {
                let _ = context;
                match name {
                    #(#names => #answers,)*
                    _ => ::core::result::Result::Err(::laelaps_plugin::undefined_decision(name, &options, &[#(#names),*])),
                }
            }

            #unexpected
        }
    })
}

/// Whether it is a method: a function without `self`, such as a constructor, is no decision.
fn is_decision(method: &ImplItemFn) -> bool {
    method.sig.inputs.first().is_some_and(|argument| matches!(argument, FnArg::Receiver(_)))
}

/// The call of one decision, an expression of `self`, `name`, `options` and `context`.
fn answer(method: &ImplItemFn) -> Result<TokenStream> {
    let name = &method.sig.ident;
    let options = |ty: &Type| quote!(::laelaps_plugin::__private::read_options::<#ty>(name, &options)?);
    Ok(match types(method)?.as_slice() {
        [] => quote!(self.#name()),
        [only] if is_context_reference(only) => quote!(self.#name(context)),
        [data] if is_owned(data) => {
            let options = options(data);
            quote!(self.#name(#options))
        }
        [data, last] if is_owned(data) && is_context_reference(last) => {
            let options = options(data);
            quote!(self.#name(#options, context))
        }
        _ => return Err(Error::new_spanned(&method.sig.inputs, FORMS)),
    })
}

fn unexpected_error(method: &ImplItemFn) -> Result<TokenStream> {
    let call = match types(method)?.as_slice() {
        [error] if is_owned(error) => quote!(Self::unexpected_error_raised(self, error)),
        [error, last] if is_owned(error) && is_context_reference(last) => {
            quote!(Self::unexpected_error_raised(self, error, context))
        }
        _ => {
            let message = "this decision takes the error, and the context if it likes: \
                           `fn unexpected_error_raised(&self, error: Error, context: &Context) -> Result<Outcome>`";
            return Err(Error::new_spanned(&method.sig.inputs, message));
        }
    };
    Ok(quote! {
        fn unexpected_error_raised(
            &self,
            error: ::laelaps_plugin::Error,
            context: &::laelaps_plugin::Context,
        ) -> ::laelaps_plugin::Result<::laelaps_plugin::Outcome> {
            let _ = context;
            #call
        }
    })
}

/// The types of a method's parameters after `&self`.
fn types(method: &ImplItemFn) -> Result<Vec<&Type>> {
    let signature = &method.sig;
    if let Some(FnArg::Receiver(receiver)) = signature.inputs.first()
        && (receiver.reference.is_none() || receiver.mutability.is_some())
    {
        return Err(Error::new_spanned(receiver.to_token_stream(), "a decision takes `&self`"));
    }
    if let Some(token) = &signature.asyncness {
        return Err(Error::new_spanned(token, "a decision is not async"));
    }
    let typed = signature.inputs.iter().filter_map(|argument| match argument {
        FnArg::Typed(typed) => Some(typed.ty.as_ref()),
        FnArg::Receiver(_) => None,
    });
    Ok(typed.collect())
}

fn is_context_reference(ty: &Type) -> bool {
    matches!(ty, Type::Reference(reference) if is_context(&reference.elem))
}

fn is_owned(ty: &Type) -> bool {
    !matches!(ty, Type::Reference(_)) && !is_context(ty)
}
