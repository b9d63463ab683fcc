//! `#[guest_test]`: registers a function as a named case of a test guest.
#![forbid(unsafe_code)]

use proc_macro::{TokenStream, TokenTree};

/// Registers `fn name() { … }` as a case. The case passes when it returns and fails when it
/// panics.
#[proc_macro_attribute]
pub fn guest_test(_: TokenStream, item: TokenStream) -> TokenStream {
    let mut tokens = item.clone().into_iter();
    let is_fn =
        |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    let name = tokens
        .find(is_fn)
        .and_then(|_| tokens.next())
        .map(|name| name.to_string());
    let Some(name) = name else {
        return "compile_error!(\"#[guest_test] goes on a function\");"
            .parse()
            .unwrap_or_default();
    };
    let entry = format!(
        "const _: () = {{
            #[used]
            #[unsafe(link_section = \".guest_tests\")]
            static CASE: ::guest_runtime::Case =
                ::guest_runtime::Case {{ name: stringify!({name}), run: {name} }};
        }};"
    );
    let entry: TokenStream = entry.parse().unwrap_or_default();
    item.into_iter().chain(entry).collect()
}
