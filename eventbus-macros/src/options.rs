//! The options of `#[event(…)]`: which there are, and what each may be by itself. Whether they fit
//! the struct is checked in `event.rs`.

use proc_macro2::{Span, TokenStream, TokenTree};
use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::{Attribute, DeriveInput, Error, Ident, LitInt, LitStr, Path, Result, Token, TypePath};

use crate::mistakes::Mistakes;

const NAMES: [&str; 7] = ["type", "topic", "key", "version", "from", "codec", "crate"];

/// Most characters a topic's name may have; `NAME_LENGTH_MAX` of eventbus-core.
const TOPIC_LENGTH_MAX: usize = 200;

/// What the attributes of one struct say. An option that is wrong reads as absent; its mistake is
/// recorded.
pub(crate) struct Options {
    pub(crate) event_type: Option<LitStr>,
    pub(crate) topic: Option<LitStr>,
    pub(crate) key: Option<LitStr>,
    pub(crate) version: u32,
    pub(crate) from: Option<Named<TypePath>>,
    pub(crate) codec: Option<Named<TypePath>>,
    /// Where the SDK is found, if not at `::eventbus`.
    pub(crate) sdk: Option<Path>,
}

/// A path and the literal in which it stands.
pub(crate) struct Named<P> {
    pub(crate) path: P,
    pub(crate) span: Span,
}

impl Options {
    /// Reads all `#[event(…)]` attributes of `input`.
    pub(crate) fn read(input: &DeriveInput, mistakes: &mut Mistakes) -> Self {
        let mut written = Written::read(input, mistakes);
        Self {
            event_type: written.event_type(),
            topic: written.topic(),
            key: written.text("key", "order_id"),
            version: written.version().unwrap_or(1),
            from: written.type_path("from", "v1::OrderCreated"),
            codec: written.type_path("codec", "codecs::Avro"),
            sdk: written.sdk(),
        }
    }
}

/// One option as written: its name, and everything up to the next comma.
struct EventOption {
    name: Ident,
    rest: TokenStream,
}

impl Parse for EventOption {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        // `type` and `crate` are keywords.
        let name = input.call(Ident::parse_any).map_err(|error| {
            Error::new(
                error.span(),
                "an option is `name = value`, such as `type = \"OrderCreated\"`",
            )
        })?;
        let mut rest = TokenStream::new();
        while !input.is_empty() && !input.peek(Token![,]) {
            let token = input.parse()?;
            let is_literal = matches!(token, TokenTree::Literal(_));
            rest.extend([token]);
            if is_literal && !input.is_empty() && !input.peek(Token![,]) {
                return Err(input.error("a comma is missing before this option"));
            }
        }
        Ok(Self { name, rest })
    }
}

impl EventOption {
    /// Parses `= value`.
    fn value<T: Parse>(&self) -> Result<T> {
        let value = |input: ParseStream<'_>| {
            input.parse::<Token![=]>()?;
            input.parse::<T>()
        };
        value.parse2(self.rest.clone())
    }

    fn version(&self) -> Option<u32> {
        let literal: LitInt = self.value().ok()?;
        literal.base10_parse().ok().filter(|version| *version > 0)
    }

    /// Reports `message` at the value, or at the name when nothing follows it.
    fn refuse(&self, message: String, mistakes: &mut Mistakes) {
        let value: TokenStream = self.rest.clone().into_iter().skip(1).collect();
        if value.is_empty() {
            mistakes.at(self.name.span(), message);
        } else {
            mistakes.over(value, message);
        }
    }
}

/// The known options, each once, before their values are read.
struct Written<'a> {
    options: Vec<EventOption>,
    mistakes: &'a mut Mistakes,
    /// Where a missing option is reported; nowhere when a part of the attributes is unreadable.
    whole: Option<&'a Attribute>,
}

impl<'a> Written<'a> {
    fn read(input: &'a DeriveInput, mistakes: &'a mut Mistakes) -> Self {
        let is_event = |attribute: &&Attribute| attribute.path().is_ident("event");
        let attributes: Vec<_> = input.attrs.iter().filter(is_event).collect();
        let mut written = Self {
            options: Vec::new(),
            mistakes,
            whole: attributes.first().copied(),
        };
        if attributes.is_empty() {
            let name = input.ident.unraw();
            written.mistakes.at(
                input.ident.span(),
                format_args!("an event needs `#[event(type = \"{name}\", topic = \"…\")]`"),
            );
        }
        for attribute in attributes {
            written.add(attribute);
        }
        written
    }

    fn add(&mut self, attribute: &Attribute) {
        let parser = Punctuated::<EventOption, Token![,]>::parse_terminated;
        match attribute.parse_args_with(parser) {
            Ok(options) => options
                .into_iter()
                .for_each(|option| self.add_option(option)),
            Err(error) => {
                self.whole = None;
                self.mistakes.push(error);
            }
        }
    }

    fn add_option(&mut self, option: EventOption) {
        let name = &option.name;
        if !NAMES.iter().any(|known| name == known) {
            self.mistakes.at(
                name.span(),
                format_args!(
                    "there is no option `{name}`; the options are `{}`",
                    NAMES.join("`, `")
                ),
            );
        } else if find(&self.options, &name.to_string()).is_some() {
            self.mistakes
                .at(name.span(), format_args!("`{name}` is given twice"));
        } else {
            self.options.push(option);
        }
    }

    /// The literal of an option that takes text.
    fn text(&mut self, name: &str, example: &str) -> Option<LitStr> {
        let option = find(&self.options, name)?;
        let value = option.value().ok();
        if value.is_none() {
            let message = format!("`{name}` takes text: `{name} = \"{example}\"`");
            option.refuse(message, self.mistakes);
        }
        value
    }

    /// The literal of an option that must be there.
    fn needed_text(&mut self, name: &str, example: &str) -> Option<LitStr> {
        if let (None, Some(whole)) = (find(&self.options, name), self.whole) {
            self.mistakes.over(
                whole,
                format_args!("`{name}` is missing: add `{name} = \"{example}\"`"),
            );
        }
        self.text(name, example)
    }

    fn event_type(&mut self) -> Option<LitStr> {
        let event_type = self.needed_text("type", "OrderCreated")?;
        if event_type.value().trim().is_empty() {
            self.mistakes.at(
                event_type.span(),
                "`type` is the event's name on the wire and cannot be empty",
            );
        }
        Some(event_type)
    }

    fn topic(&mut self) -> Option<LitStr> {
        let topic = self.needed_text("topic", "order-events")?;
        if !is_topic(&topic.value()) {
            self.mistakes.at(
                topic.span(),
                format_args!(
                    "a topic's name has 1 to {TOPIC_LENGTH_MAX} characters of A-Z a-z 0-9 . _ -"
                ),
            );
        }
        Some(topic)
    }

    /// Also checks that a version before it can be named at all.
    fn version(&mut self) -> Option<u32> {
        let version = match find(&self.options, "version") {
            Some(option) => {
                let version = option.version();
                if version.is_none() {
                    let message = "a version is an integer from 1 on: `version = 2`".to_owned();
                    option.refuse(message, self.mistakes);
                }
                version?
            }
            None => 1,
        };
        if let (1, Some(from)) = (version, find(&self.options, "from")) {
            self.mistakes.at(
                from.name.span(),
                "`from` names the version before: it needs `version = 2` or higher",
            );
        }
        Some(version)
    }

    fn type_path(&mut self, name: &str, example: &str) -> Option<Named<TypePath>> {
        let literal = self.text(name, example)?;
        let path = literal.parse().ok();
        if path.is_none() {
            self.mistakes.at(
                literal.span(),
                format_args!("`{name}` is the path of a type, such as `{name} = \"{example}\"`"),
            );
        }
        path.map(|path| Named {
            path,
            span: literal.span(),
        })
    }

    fn sdk(&mut self) -> Option<Path> {
        let literal = self.text("crate", "eventbus")?;
        let path = literal.parse_with(Path::parse_mod_style).ok();
        if path.is_none() {
            self.mistakes.at(
                literal.span(),
                "`crate` is the path at which the SDK is found, such as `crate = \"eventbus\"`",
            );
        }
        path
    }
}

fn find<'a>(options: &'a [EventOption], name: &str) -> Option<&'a EventOption> {
    options.iter().find(|option| option.name == name)
}

/// Whether `Topic` of eventbus-core takes the name; a test keeps the two rules equal.
fn is_topic(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=TOPIC_LENGTH_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

#[cfg(test)]
mod tests {
    use eventbus_core::Topic;

    use super::is_topic;

    #[test]
    fn the_rule_for_topics_is_that_of_core() {
        let characters = (0..=0x17f).filter_map(char::from_u32).map(String::from);
        let lengths = [0, 1, 199, 200, 201].map(|length| "x".repeat(length));
        for name in characters.chain(lengths) {
            assert_eq!(is_topic(&name), Topic::new(&name).is_ok(), "{name:?}");
        }
    }
}
