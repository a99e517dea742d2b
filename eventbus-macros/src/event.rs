//! Checks that the options fit the struct, and writes the `impl Event`.

use proc_macro2::{Group, Span, TokenStream, TokenTree};
use quote::{ToTokens, quote};
use syn::{Data, DeriveInput, Fields, LitStr, Member, Result, TypePath};

use crate::mistakes::Mistakes;
use crate::options::{Named, Options};

/// Writes the impl.
///
/// # Errors
///
/// All mistakes of the struct and of its attributes, combined.
pub(crate) fn expand(input: &DeriveInput) -> Result<TokenStream> {
    let mut mistakes = Mistakes::default();
    let fields = fields(input, &mut mistakes);
    let options = Options::read(input, &mut mistakes);
    let key = match (&options.key, fields) {
        (Some(literal), Some(fields)) => key_path(literal, fields, &mut mistakes),
        _ => None,
    };
    mistakes.finish()?;
    Ok(Writer::new(input, options, key).event())
}

/// The fields of a struct; an event is nothing else.
fn fields<'a>(input: &'a DeriveInput, mistakes: &mut Mistakes) -> Option<&'a Fields> {
    if !input.generics.params.is_empty() {
        mistakes.over(
            &input.generics,
            "an event has no type parameters or lifetimes: it owns its data, and one struct is one event type",
        );
    }
    let keyword = match &input.data {
        Data::Struct(data) => return Some(&data.fields),
        Data::Enum(data) => data.enum_token.span,
        Data::Union(data) => data.union_token.span,
    };
    mistakes.at(
        keyword,
        "an event is a struct: write one struct per event type",
    );
    None
}

/// The fields from the struct down to the key, the first of which is checked here.
fn key_path(literal: &LitStr, fields: &Fields, mistakes: &mut Mistakes) -> Option<Vec<Member>> {
    let text = literal.value();
    let path: syn::Result<Vec<Member>> = text.split('.').map(syn::parse_str).collect();
    let Ok(path) = path else {
        mistakes.at(
            literal.span(),
            format_args!(
                "a key is one field, or a path of fields such as \"order.id\"; {}",
                list(fields)
            ),
        );
        return None;
    };
    if !fields.members().any(|member| member == path[0]) {
        let first = path[0].to_token_stream();
        mistakes.at(
            literal.span(),
            format_args!("there is no field `{first}`; {}", list(fields)),
        );
    }
    Some(path)
}

fn list(fields: &Fields) -> String {
    let names: Vec<_> = fields
        .members()
        .map(|member| format!("`{}`", member.to_token_stream()))
        .collect();
    if names.is_empty() {
        return "the struct has no fields".to_owned();
    }
    format!("the fields are {}", names.join(", "))
}

/// What was found free of mistakes, each part with the place at which the compiler reports what is
/// wrong with its type.
struct Writer<'a> {
    input: &'a DeriveInput,
    options: Options,
    key: Option<Vec<Member>>,
    /// Where the SDK is found.
    sdk: TokenStream,
}

impl<'a> Writer<'a> {
    fn new(input: &'a DeriveInput, options: Options, key: Option<Vec<Member>>) -> Self {
        let sdk = match &options.sdk {
            Some(path) => path.to_token_stream(),
            None => quote!(::eventbus),
        };
        Self {
            input,
            options,
            key,
            sdk,
        }
    }

    fn event(&self) -> TokenStream {
        let Self { input, sdk, .. } = self;
        let Options {
            event_type,
            topic,
            version,
            ..
        } = &self.options;
        let name = &input.ident;
        let codec = self.codec();
        let key = self.key();
        let upcast = self.upcast();
        let check = self.options.from.as_ref().map(|from| self.check(from));
        quote! {
            #[automatically_derived]
            impl #sdk::Event for #name {
                const TYPE: &'static str = #event_type;
                const TOPIC: #sdk::Topic = #sdk::Topic::from_static(#topic);
                const VERSION: u32 = #version;
                type Codec = #codec;

                fn key(&self) -> ::core::option::Option<#sdk::Key> {
                    #key
                }

                #upcast
            }
            #check
        }
    }

    /// The default is reported at the struct: that is what lacks serde's derives.
    fn codec(&self) -> TokenStream {
        match &self.options.codec {
            Some(codec) => at(codec.span, codec.path.to_token_stream()),
            None => {
                let sdk = &self.sdk;
                at(self.input.ident.span(), quote!(#sdk::Json))
            }
        }
    }

    fn key(&self) -> TokenStream {
        let sdk = &self.sdk;
        match (&self.options.key, &self.key) {
            (Some(literal), Some(path)) => at(
                literal.span(),
                quote!(::core::option::Option::Some(#sdk::Key::display(&self #(.#path)*))),
            ),
            _ => quote!(::core::option::Option::None),
        }
    }

    fn upcast(&self) -> TokenStream {
        let sdk = &self.sdk;
        match &self.options.from {
            Some(Named { path, span }) => {
                let call = at(
                    *span,
                    quote!(#sdk::upcast_from::<#path, Self>(version, data)),
                );
                quote! {
                    fn upcast(version: u32, data: &[u8]) -> #sdk::Result<Self> {
                        #call
                    }
                }
            }
            None => quote! {
                fn upcast(version: u32, _data: &[u8]) -> #sdk::Result<Self> {
                    ::core::result::Result::Err(#sdk::unknown_version::<Self>(version))
                }
            },
        }
    }

    /// A constant of its own: a check inside `upcast` would wait until a program is built.
    fn check(&self, from: &Named<TypePath>) -> TokenStream {
        let (sdk, name, path) = (&self.sdk, &self.input.ident, &from.path);
        at(
            from.span,
            quote!(const _: () = #sdk::assert_upcast::<#path, #name>();),
        )
    }
}

/// Moves what the compiler says about `tokens` to `place`; names keep their meaning, also inside
/// another macro.
fn at(place: Span, tokens: TokenStream) -> TokenStream {
    let move_token = |mut token: TokenTree| {
        if let TokenTree::Group(group) = &token {
            let mut moved = Group::new(group.delimiter(), at(place, group.stream()));
            moved.set_span(group.span());
            token = moved.into();
        }
        token.set_span(token.span().located_at(place));
        token
    };
    tokens.into_iter().map(move_token).collect()
}
