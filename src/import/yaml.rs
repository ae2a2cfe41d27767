//! YAML as a small tree with lines, for configuration files of other programs.
//!
//! Those programs read YAML 1.1 with PyYAML and turn texts into numbers afterwards (`5e-7` is a text to PyYAML), so a
//! scalar stays the text that stands in the file, and whoever asks for a number or a truth value gets one. What could make
//! a small file large or deep is limited: aliases count with all that they stand for.

use std::path::Path;

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::{Error, Result};

/// Bytes of a configuration.
pub(super) const MOST_BYTES: usize = 256 << 10;
/// Values of a configuration, those that aliases repeat among them.
const MOST_NODES: usize = 20_000;
/// Lists and mappings inside one another.
const MOST_LEVELS: usize = 32;

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    /// 1-based line.
    pub line: usize,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// The text of a scalar, and whether it stands in quotes.
    Scalar {
        text: String,
        quoted: bool,
    },
    List(Vec<Node>),
    /// In the order of the file.
    Mapping(Vec<(String, Node)>),
}

impl Node {
    /// Whether nothing is said: `null`, `~`, or nothing at all.
    pub fn is_null(&self) -> bool {
        let words = ["", "~", "null", "Null", "NULL", "None"];
        matches!(&self.value, Value::Scalar { text, quoted: false } if words.contains(&text.as_str()))
    }

    /// Whether it is null or an empty list or mapping.
    pub fn says_nothing(&self) -> bool {
        match &self.value {
            Value::Scalar { .. } => self.is_null(),
            Value::List(nodes) => nodes.is_empty(),
            Value::Mapping(members) => members.is_empty(),
        }
    }

    /// The text of a scalar that is not null.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } if !self.is_null() => Some(text),
            _ => None,
        }
    }

    /// A truth value, in the words of YAML 1.1.
    pub fn truth(&self) -> Option<bool> {
        match self.text()?.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" => Some(true),
            "false" | "no" | "off" => Some(false),
            _ => None,
        }
    }

    /// A finite number.
    pub fn number(&self) -> Option<f64> {
        self.text()?.parse().ok().filter(|number: &f64| number.is_finite())
    }

    /// A list's values, or a single value as a list of one.
    pub fn list(&self) -> Vec<&Node> {
        match &self.value {
            Value::List(nodes) => nodes.iter().collect(),
            _ if self.is_null() => Vec::new(),
            _ => vec![self],
        }
    }

    /// The value on one line, for people.
    pub fn shown(&self) -> String {
        match &self.value {
            Value::Scalar { text, quoted: false } if text.is_empty() => "(nothing)".to_string(),
            Value::Scalar { text, .. } => text.clone(),
            Value::List(nodes) => {
                format!("[{}]", nodes.iter().map(Node::shown).collect::<Vec<_>>().join(", "))
            }
            Value::Mapping(members) => {
                let members = members.iter().map(|(name, node)| format!("{name}: {}", node.shown()));
                format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// The top-level mapping of a file.
///
/// # Errors
/// [`Error::Config`] naming the line of what is no YAML, or of what no configuration has.
pub(super) fn parse(text: &str, path: &Path) -> Result<Vec<(String, Node)>> {
    let wrong = |line: usize, what: String| {
        Error::config(
            format!("{}:{line}: {what}", path.display()),
            "a configuration is a YAML mapping, `key: value` on each line",
        )
    };
    let mut builder = Builder::default();
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| wrong(error.marker().line(), format!("not YAML: {}", error.info())))?;
        let line = span.start.line();
        builder.take(event, line).map_err(|what| wrong(line, what))?;
    }
    match builder.root {
        Some(Node { value: Value::Mapping(members), .. }) => Ok(members),
        Some(Node { line, .. }) => Err(wrong(line, "the file is no mapping of keys to values".to_string())),
        None => Err(wrong(1, "the file says nothing".to_string())),
    }
}

/// A list or mapping that is not yet whole.
struct Open {
    node: Node,
    anchor: usize,
    /// A mapping's key whose value comes next.
    key: Option<String>,
}

#[derive(Default)]
struct Builder {
    open: Vec<Open>,
    anchors: Vec<(usize, Node)>,
    nodes: usize,
    root: Option<Node>,
}

impl Builder {
    fn take(&mut self, event: Event, line: usize) -> std::result::Result<(), String> {
        match event {
            Event::DocumentStart(_) if self.root.is_some() => Err("a second document begins".to_string()),
            Event::Scalar(text, style, anchor, _) => {
                let quoted = style != ScalarStyle::Plain;
                self.end(Node { line, value: Value::Scalar { text: text.into_owned(), quoted } }, anchor)
            }
            Event::SequenceStart(anchor, _) => self.begin(Value::List(Vec::new()), line, anchor),
            Event::MappingStart(anchor, _) => self.begin(Value::Mapping(Vec::new()), line, anchor),
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open { node, anchor, .. }) => self.end(node, anchor),
                None => Ok(()),
            },
            Event::Alias(anchor) => {
                let found = self.anchors.iter().rev().find(|(known, _)| *known == anchor);
                let node = found.map(|(_, node)| Node { line, ..node.clone() });
                let node = node.ok_or("an alias stands for something that holds it")?;
                self.count(size(&node))?;
                self.put(node)
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, nodes: usize) -> std::result::Result<(), String> {
        self.nodes += nodes;
        match self.nodes > MOST_NODES {
            true => Err(format!("the file has more than {MOST_NODES} values")),
            false => Ok(()),
        }
    }

    fn begin(&mut self, value: Value, line: usize, anchor: usize) -> std::result::Result<(), String> {
        if self.open.len() == MOST_LEVELS {
            return Err(format!("more than {MOST_LEVELS} lists and mappings stand inside one another"));
        }
        self.open.push(Open { node: Node { line, value }, anchor, key: None });
        Ok(())
    }

    fn end(&mut self, node: Node, anchor: usize) -> std::result::Result<(), String> {
        self.count(1)?;
        if anchor != 0 {
            self.count(size(&node))?;
            self.anchors.push((anchor, node.clone()));
        }
        self.put(node)
    }

    /// Puts a whole value where it belongs.
    fn put(&mut self, node: Node) -> std::result::Result<(), String> {
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match (&mut open.node.value, open.key.take()) {
            (Value::List(nodes), _) => nodes.push(node),
            (Value::Mapping(members), Some(key)) => members.push((key, node)),
            (Value::Mapping(members), None) => {
                let Value::Scalar { text, .. } = node.value else {
                    return Err("a key is a list or a mapping".to_string());
                };
                if text == "<<" {
                    return Err("merge keys (`<<`) are not read: write the merged keys out".to_string());
                }
                if members.iter().any(|(name, _)| *name == text) {
                    return Err(format!("the key `{text}` stands twice"));
                }
                open.key = Some(text);
            }
            (Value::Scalar { .. }, _) => return Err("a value stands inside a scalar".to_string()),
        }
        Ok(())
    }
}

/// How many values a node holds, itself included.
fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::Scalar { .. } => 0,
        Value::List(nodes) => nodes.iter().map(size).sum(),
        Value::Mapping(members) => members.iter().map(|(_, node)| size(node)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> std::result::Result<Vec<(String, Node)>, String> {
        parse(text, Path::new("c.yaml")).map_err(|error| error.to_string())
    }

    fn value(text: &str) -> Node {
        read(&format!("key: {text}")).unwrap().pop().unwrap().1
    }

    #[test]
    fn scalars_are_what_their_readers_take_them_for() {
        assert_eq!(value("5e-7").number(), Some(5e-7));
        assert_eq!(value("'0.1'").number(), Some(0.1));
        assert_eq!(value(".inf").number(), None);
        for (text, truth) in [("yes", true), ("True", true), ("on", true), ("no", false), ("FALSE", false)] {
            assert_eq!(value(text).truth(), Some(truth), "{text}");
        }
        for text in ["", "~", "null"] {
            assert!(value(text).is_null(), "{text}");
        }
        assert!(!value("'null'").is_null());
        assert_eq!(value("[a, b]").list().len(), 2);
        assert_eq!(value("a").list().len(), 1);
        assert_eq!(value("{a: [1, 'x']}").shown(), "{a: [1, x]}");
        let wrapped = read("model:\n  org/name\nother: 1\n").unwrap();
        assert_eq!(wrapped[0].1.text(), Some("org/name"));
        assert_eq!(wrapped[1].1.line, 3);
    }

    #[test]
    fn aliases_are_read_and_cannot_grow_without_end() {
        let found = read("a: &x {b: 1}\nc: *x\n").unwrap();
        assert_eq!(found[0].1.value, found[1].1.value);
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_string();
        for level in 1..12 {
            let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        assert!(read(&text).unwrap_err().contains("more than 20000 values"));
        assert!(read("a: &a [*a]").is_err());
    }

    #[test]
    fn what_is_no_configuration_is_refused_with_its_line() {
        for (text, message) in [
            ("- a\n- b\n", "c.yaml:1: the file is no mapping"),
            ("", "says nothing"),
            ("a: 1\nb: [1\n", "not YAML"),
            ("a: 1\nb: 2\na: 3\n", "c.yaml:3: the key `a` stands twice"),
            ("a: 1\n---\nb: 2\n", "a second document"),
            ("a: &x {b: 1}\nc:\n  <<: *x\n", "merge keys"),
            ("? [a]\n: 1\n", "a key is a list"),
        ] {
            let found = read(text).unwrap_err();
            assert!(found.contains(message), "{text:?}: {found}");
        }
        let deep = format!("a: {}1{}", "[".repeat(40), "]".repeat(40));
        assert!(read(&deep).unwrap_err().contains("inside one another"));
    }
}
