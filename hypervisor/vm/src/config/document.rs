//! A TOML 1.1 document as a tree of values that know their places.
//!
//! `toml_parser` checks the grammar and gives events; here they become tables by the rules for
//! headers, dotted keys and redefinition ("Table" and "Keys" in the specification). The `toml`
//! crate does the same on the same parser, with maps, dates and serde that a configuration has no
//! use for and that would be a tenth of the hypervisor.

use alloc::{
    borrow::Cow,
    string::{String, ToString},
    vec::Vec,
};

use toml_parser::{
    ErrorSink, ParseError, Source, Span,
    decoder::ScalarKind,
    parser::{Event, EventKind, RecursionGuard, ValidateWhitespace, parse_document},
};

/// Deepest nesting of arrays and inline tables.
const DEPTH: u32 = 16;

/// What is wrong with a document's syntax.
#[derive(Debug)]
pub struct SyntaxError {
    /// Offset of its first byte.
    pub at: usize,
    /// In words.
    pub message: String,
}

/// A value and where it stands.
#[derive(Debug)]
pub struct Node<'a> {
    /// Offset of its first byte.
    pub at: usize,
    /// The value.
    pub data: Data<'a>,
}

impl Node<'_> {
    /// The text of a string.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        match &self.data {
            Data::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// A value.
#[derive(Debug)]
pub enum Data<'a> {
    /// A string.
    Text(Cow<'a, str>),
    /// An integer: its digits without separators, with the sign, and their radix.
    Integer(Cow<'a, str>, u32),
    /// A boolean.
    Boolean(bool),
    /// A number or date that no configuration has; how it is called.
    Other(&'static str),
    /// An array.
    Array(Vec<Node<'a>>),
    /// An array that is written as `[[…]]`.
    Tables(Vec<Node<'a>>),
    /// A table.
    Table(Table<'a>),
}

/// How a table came to be, which decides what may be added to it later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// By a header: complete but for tables in it.
    Header,
    /// As a part of some header's path: a header of its own may follow.
    Implied,
    /// As a part of a dotted key.
    Dotted,
    /// `{…}`: complete.
    Inline,
}

/// A table: keys in the order of the text.
#[derive(Debug)]
pub struct Table<'a> {
    entries: Vec<(Key<'a>, Node<'a>)>,
    origin: Origin,
}

/// A key and where it stands.
#[derive(Debug)]
pub struct Key<'a> {
    /// Offset of its first byte.
    pub at: usize,
    /// Its name, without quotes.
    pub name: Cow<'a, str>,
}

impl<'a> Table<'a> {
    const fn new(origin: Origin) -> Self {
        Self {
            entries: Vec::new(),
            origin,
        }
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Node<'a>> {
        let entry = self.entries.iter().find(|(found, _)| found.name == key);
        entry.map(|(_, value)| value)
    }

    /// All keys.
    pub fn keys(&self) -> impl Iterator<Item = &Key<'a>> {
        self.entries.iter().map(|(key, _)| key)
    }

    /// The place of a key's value: there already, or new with what `make` gives.
    fn slot(&mut self, key: Key<'a>, make: Data<'a>) -> (bool, Option<&mut Node<'a>>) {
        let found = self.entries.iter().position(|(k, _)| k.name == key.name);
        let index = found.unwrap_or(self.entries.len());
        if found.is_none() {
            let at = key.at;
            self.entries.push((key, Node { at, data: make }));
        }
        let slot = self.entries.get_mut(index).map(|(_, node)| node);
        (found.is_none(), slot)
    }

    /// The table that a path leads to; tables that are missing on the way are made. `dotted`: the
    /// path is of a key, not of a header.
    fn descend(
        &mut self,
        path: Vec<Key<'a>>,
        dotted: bool,
        errors: &mut dyn ErrorSink,
    ) -> Option<&mut Self> {
        let mut table = self;
        for key in path {
            let at = key.at;
            let origin = if dotted {
                Origin::Dotted
            } else {
                Origin::Implied
            };
            let (_, slot) = table.slot(key, Data::Table(Self::new(origin)));
            let next = match &mut slot?.data {
                Data::Table(table) => Some(table),
                Data::Tables(list) if !dotted => match list.last_mut() {
                    Some(Node {
                        data: Data::Table(table),
                        ..
                    }) => Some(table),
                    _ => None,
                },
                _ => None,
            };
            let open = |table: &&mut Self| match table.origin {
                Origin::Inline => false,
                Origin::Header => !dotted,
                Origin::Implied | Origin::Dotted => true,
            };
            let Some(next) = next.filter(open) else {
                report(errors, at, "this table cannot be extended here");
                return None;
            };
            if dotted && next.origin == Origin::Implied {
                next.origin = Origin::Dotted;
            }
            table = next;
        }
        Some(table)
    }

    fn insert(&mut self, (path, key): Path<'a>, value: Node<'a>, errors: &mut dyn ErrorSink) {
        let at = key.at;
        if let Some(table) = self.descend(path, true, errors)
            && let (new, Some(slot)) = table.slot(key, Data::Boolean(false))
        {
            if new {
                *slot = value;
            } else {
                report(errors, at, "duplicate key");
            }
        }
    }

    /// Makes the table of a header at `at`, and gives it.
    fn open(
        &mut self,
        (path, key): Path<'a>,
        at: usize,
        many: bool,
        errors: &mut dyn ErrorSink,
    ) -> Option<&mut Self> {
        let key_at = key.at;
        let make = if many {
            Data::Tables(Vec::new())
        } else {
            Data::Table(Self::new(Origin::Implied))
        };
        let (new, slot) = self.descend(path, false, errors)?.slot(key, make);
        let slot = slot?;
        if new {
            slot.at = at;
        }
        match &mut slot.data {
            Data::Tables(list) if many => {
                let data = Data::Table(Self::new(Origin::Header));
                list.push(Node { at, data });
                match &mut list.last_mut()?.data {
                    Data::Table(table) => Some(table),
                    _ => None,
                }
            }
            Data::Table(table) if !many && table.origin == Origin::Implied => {
                table.origin = Origin::Header;
                slot.at = at;
                Some(table)
            }
            _ => {
                report(errors, key_at, "duplicate key");
                None
            }
        }
    }
}

/// A dotted key: what comes before the last dot, and what after it.
type Path<'a> = (Vec<Key<'a>>, Key<'a>);

fn report(errors: &mut dyn ErrorSink, at: usize, what: &'static str) {
    errors.report_error(ParseError::new(what).with_unexpected(Span::new_unchecked(at, at + 1)));
}

/// Parses a whole document.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn parse(text: &str) -> Result<Table<'_>, SyntaxError> {
    let mut first = None;
    let source = Source::new(text);
    let mut events: Vec<Event> = Vec::new();
    let mut checked = ValidateWhitespace::new(&mut events, source);
    let mut bounded = RecursionGuard::new(&mut checked, DEPTH);
    parse_document(&source.lex().into_vec(), &mut bounded, &mut first);
    let mut root = Table::new(Origin::Header);
    if first.is_none() {
        let mut walk = Walk {
            source,
            events: events.iter(),
            errors: &mut first,
        };
        walk.document(&mut root);
    }
    let Some(error) = first else {
        return Ok(root);
    };
    let span = error.unexpected().or(error.context());
    Err(SyntaxError {
        at: span.map_or(text.len(), |span| span.start()),
        message: error.description().to_string(),
    })
}

/// A walk through the events of a document whose grammar is right.
struct Walk<'a, 'e> {
    source: Source<'a>,
    events: core::slice::Iter<'e, Event>,
    errors: &'e mut dyn ErrorSink,
}

impl<'a, 'e> Walk<'a, 'e> {
    fn next(&mut self) -> Option<&'e Event> {
        self.events.by_ref().find(|event| {
            !matches!(
                event.kind(),
                EventKind::Whitespace | EventKind::Comment | EventKind::Newline
            )
        })
    }

    fn document(&mut self, root: &mut Table<'a>) {
        let mut header = self.pairs(root);
        while let Some(event) = header {
            let many = event.kind() == EventKind::ArrayTableOpen;
            let path = self.next().and_then(|key| self.path(key));
            let table =
                path.and_then(|path| root.open(path, event.span().start(), many, self.errors));
            header = match table {
                Some(table) => self.pairs(table),
                // Reported: what it holds is checked, and forgotten.
                None => self.pairs(&mut Table::new(Origin::Header)),
            };
        }
    }

    /// The lines up to the next header, which is given.
    fn pairs(&mut self, table: &mut Table<'a>) -> Option<&'e Event> {
        loop {
            let event = self.next()?;
            if event.kind() != EventKind::SimpleKey {
                return Some(event);
            }
            self.pair(event, table)?;
        }
    }

    fn pair(&mut self, key: &Event, table: &mut Table<'a>) -> Option<()> {
        let path = self.path(key)?;
        let event = self.next()?;
        let value = self.value(event)?;
        table.insert(path, value, self.errors);
        Some(())
    }

    /// A dotted key, and the one event after it.
    fn path(&mut self, first: &Event) -> Option<Path<'a>> {
        let mut path = Vec::new();
        let mut event = first;
        loop {
            let mut name = Cow::Borrowed("");
            let raw = self.source.get(event)?;
            raw.decode_key(&mut name, self.errors);
            let at = event.span().start();
            let key = Key { at, name };
            if self.next()?.kind() != EventKind::KeySep {
                return Some((path, key));
            }
            path.push(key);
            event = self.next()?;
        }
    }

    fn value(&mut self, event: &Event) -> Option<Node<'a>> {
        let data = match event.kind() {
            EventKind::ArrayOpen => {
                let mut list = Vec::new();
                loop {
                    let event = self.next()?;
                    match event.kind() {
                        EventKind::ArrayClose => break Data::Array(list),
                        EventKind::ValueSep => {}
                        _ => list.push(self.value(event)?),
                    }
                }
            }
            EventKind::InlineTableOpen => {
                let mut table = Table::new(Origin::Header);
                loop {
                    let event = self.next()?;
                    match event.kind() {
                        EventKind::InlineTableClose => break,
                        EventKind::ValueSep => {}
                        _ => self.pair(event, &mut table)?,
                    }
                }
                table.origin = Origin::Inline;
                Data::Table(table)
            }
            _ => {
                let mut text = Cow::Borrowed("");
                let raw = self.source.get(event)?;
                match raw.decode_scalar(&mut text, self.errors) {
                    ScalarKind::String => Data::Text(text),
                    ScalarKind::Boolean(value) => Data::Boolean(value),
                    ScalarKind::Integer(radix) => Data::Integer(text, radix.value()),
                    ScalarKind::Float => Data::Other("float"),
                    ScalarKind::DateTime => Data::Other("datetime"),
                }
            }
        };
        let at = event.span().start();
        Some(Node { at, data })
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use super::*;

    /// A document in one line.
    fn flat(data: &Data<'_>) -> String {
        let list = |nodes: &[Node<'_>]| {
            let all: Vec<_> = nodes.iter().map(|node| flat(&node.data)).collect();
            all.join(" ")
        };
        match data {
            Data::Text(text) => format!("{text:?}"),
            Data::Integer(digits, radix) => format!("{digits}/{radix}"),
            Data::Boolean(value) => value.to_string(),
            Data::Other(kind) => (*kind).to_string(),
            Data::Array(nodes) => format!("[{}]", list(nodes)),
            Data::Tables(nodes) => format!("[[{}]]", list(nodes)),
            Data::Table(table) => {
                let all = table.entries.iter();
                let all = all.map(|(key, node)| format!("{}={}", key.name, flat(&node.data)));
                format!("{{{}}}", all.collect::<Vec<_>>().join(" "))
            }
        }
    }

    #[test]
    fn the_forms_of_toml() {
        for (text, expected) in [
            ("", "{}"),
            ("a = 1 # one\n'b c' = 'x'\n", "{a=1/10 b c=\"x\"}"),
            (
                "a = [0x1F, 1_000, -3, 1.5, 1979-05-27, [true,],]",
                "{a=[1F/16 1000/10 -3/10 float datetime [true]]}",
            ),
            ("a.b = 1\na.c.d = 2", "{a={b=1/10 c={d=2/10}}}"),
            ("a = { b.c = 1, d = '' }", "{a={b={c=1/10} d=\"\"}}"),
            ("[a]\nb = 1\n[a.c]\nd = 2", "{a={b=1/10 c={d=2/10}}}"),
            ("[a.c]\nd = 2\n[a]\nb = 1", "{a={c={d=2/10} b=1/10}}"),
            ("[a]\nb.c = 1\n[a.b.d]\n", "{a={b={c=1/10 d={}}}}"),
            (
                "[[v]]\nn = 1\n[v.d]\ne = 2\n[[v]]\nn = 3\n[v.d]",
                "{v=[[{n=1/10 d={e=2/10}} {n=3/10 d={}}]]}",
            ),
            ("a = \"\"\"x\n\\u00e4\"\"\"", "{a=\"x\\nä\"}"),
        ] {
            let root = parse(text).unwrap_or_else(|error| panic!("{text}: {error:?}"));
            assert_eq!(flat(&Data::Table(root)), expected, "{text}");
        }
    }

    #[test]
    fn what_toml_forbids_has_a_place() {
        for (text, at) in [
            ("a = 1\na = 2", 6),
            ("a = 1\na.b = 2", 6),
            ("a = 1\n[a]", 7),
            ("[a]\n[a]", 5),
            ("[a]\n[[a]]", 6),
            ("a = []\n[[a]]", 9),
            ("[[a]]\n[a]", 7),
            ("a = { b = 1 }\na.c = 2", 14),
            ("a = { b = 1 }\n[a.c]", 15),
            ("a = { b = 1, b = 2 }", 13),
            ("[a.b]\n[a]\nb.c = 1", 10),
            ("a.b = 1\n[a]", 9),
            ("[[v]]\n[x]\nv.n = 1\n[v.d]\n[v.d]", 27),
            ("a = ", 4),
            ("a = 01", 4),
            ("a = \"\\q\"", 6),
            ("= 1", 0),
            ("[a", 2),
        ] {
            let error = parse(text).expect_err(text);
            assert_eq!(error.at, at, "{text}: {error:?}");
        }
        let deep = format!("a = {}{}", "[".repeat(1000), "]".repeat(1000));
        assert!(parse(&deep).is_err());
    }
}
