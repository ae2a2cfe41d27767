//! A recipe in the making: the keys that are not yet accounted for, what became of the others, and the lines so far.

use std::path::Path;

use super::yaml::Node;
use crate::Error;
use crate::config::recipe;
use crate::config::value::OptionValue;

/// What messages call the recipe while it is made. Its lines are not the user's, so [`reason`] takes them off again.
pub(super) const UNWRITTEN: &str = "recipe";

/// What became of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It means the same here.
    Kept,
    /// It becomes something else with the same effect, or with the effect that the reason tells.
    Mapped,
    /// It cannot change what is trained.
    NoEffect,
    /// It stands for something that is not done here.
    Refused,
    /// It is refused, and was left out because the user asked for that.
    LeftOut,
    /// The file does not have it, and the other program's default is written out.
    Default,
}

impl Fate {
    /// A word for the table.
    pub fn word(self) -> &'static str {
        match self {
            Fate::Kept => "kept",
            Fate::Mapped => "mapped",
            Fate::NoEffect => "no effect",
            Fate::Refused => "refused",
            Fate::LeftOut => "left out",
            Fate::Default => "default",
        }
    }
}

/// What became of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The key, with those that it stands in before it.
    pub key: String,
    /// Its 1-based line; `None` for a default.
    pub line: Option<usize>,
    /// Its value on one line.
    pub value: String,
    /// What became of it.
    pub fate: Fate,
    /// The recipe's lines that it became, or why it became none.
    pub outcome: String,
    /// The option of the recipe that it gave a value, if any.
    pub option: Option<&'static str>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Draft {
    members: Vec<(String, Node)>,
    /// Keys that are left out where they would be refused.
    without: Vec<String>,
    pub rows: Vec<Row>,
    /// Keys of the recipe with their TOML.
    pub lines: Vec<(&'static str, String)>,
}

impl Draft {
    /// A draft in which nothing is accounted for yet; `without` are the keys that the user leaves out.
    pub fn new(members: Vec<(String, Node)>, without: &[String]) -> Self {
        Draft { members, without: without.to_vec(), rows: Vec::new(), lines: Vec::new() }
    }

    /// Whether the file has the key, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.members.iter().any(|(name, _)| name == key)
    }

    /// Takes a key out to account for it; one that says nothing is accounted for at once.
    pub fn take(&mut self, key: &str) -> Option<Node> {
        let at = self.members.iter().position(|(name, _)| name == key)?;
        let (_, node) = self.members.remove(at);
        if node.says_nothing() {
            self.no_effect(key, &node, "it says nothing");
            return None;
        }
        Some(node)
    }

    /// Takes the first of several names of the same thing.
    pub fn take_any(&mut self, keys: &[&'static str]) -> Option<(&'static str, Node)> {
        keys.iter().find_map(|key| Some((*key, self.take(key)?)))
    }

    /// All keys that are left.
    pub fn take_rest(&mut self) -> Vec<(String, Node)> {
        std::mem::take(&mut self.members)
    }

    fn row(&mut self, key: &str, node: Option<&Node>, fate: Fate, outcome: impl Into<String>) {
        self.rows.push(Row {
            key: key.to_string(),
            line: node.map(|node| node.line),
            value: node.map(Node::shown).unwrap_or_default(),
            fate,
            outcome: outcome.into(),
            option: None,
        });
    }

    /// Adds a line to the recipe. Where `train` would refuse its value there is no line, and its reason is the error.
    fn line<T: OptionValue>(&mut self, name: &'static str, value: &T) -> std::result::Result<String, String> {
        let toml = value.to_toml();
        let text = format!("{name} = {toml}");
        recipe::parse(&text, Path::new(UNWRITTEN)).map_err(reason)?;
        self.lines.push((name, toml));
        Ok(text)
    }

    /// Notes which option the last row gave a value.
    fn sets(&mut self, name: &'static str) {
        if let Some(row) = self.rows.last_mut() {
            row.option = Some(name);
        }
    }

    /// The recipe has this value because `key` says so, in the same sense; it is refused where `train` would refuse it.
    pub fn keep<T: OptionValue>(&mut self, key: &str, node: &Node, name: &'static str, value: &T) {
        match self.line(name, value) {
            Ok(line) => {
                self.row(key, Some(node), Fate::Kept, line);
                self.sets(name);
            }
            Err(problem) => self.refuse(key, node, problem),
        }
    }

    /// The recipe has this value because of `key`, with a reason; it is refused where `train` would refuse it.
    pub fn map<T: OptionValue>(&mut self, key: &str, node: &Node, name: &'static str, value: &T, why: &str) {
        match self.line(name, value) {
            Ok(line) => {
                self.row(key, Some(node), Fate::Mapped, format!("{line}: {why}"));
                self.sets(name);
            }
            Err(problem) => self.refuse(key, node, format!("{problem} ({why})")),
        }
    }

    /// `key` is accounted for by other lines.
    pub fn say(&mut self, key: &str, node: &Node, why: impl Into<String>) {
        self.row(key, Some(node), Fate::Mapped, why);
    }

    /// The recipe has the other program's default.
    pub fn default<T: OptionValue>(&mut self, key: &str, name: &'static str, value: &T) {
        match self.line(name, value) {
            Ok(line) => {
                self.row(key, None, Fate::Default, line);
                self.sets(name);
            }
            Err(problem) => self.lack(key, &problem),
        }
    }

    /// Refuses a key for a rule between options, which `problem` tells: the key of the file that gave a value to the option
    /// named first in it, or else the default that did. Whether there is such a key.
    pub fn refuse_together(&mut self, problem: &str) -> bool {
        let named = |row: &Row| {
            let option = row.option.filter(|option| self.lines.iter().any(|(name, _)| name == option))?;
            Some((row.line.is_none(), problem.find(&format!("`{option}`"))?))
        };
        let rows = self.rows.iter().enumerate();
        let first = rows.filter_map(|(at, row)| Some((named(row)?, at))).min().map(|(_, at)| at);
        let Some(row) = first.and_then(|at| self.rows.get_mut(at)) else { return false };
        row.fate = if self.without.contains(&row.key) { Fate::LeftOut } else { Fate::Refused };
        row.outcome = problem.to_string();
        let option = row.option.take();
        self.lines.retain(|(name, _)| Some(*name) != option);
        true
    }

    /// Accounts for a key that cannot change what is trained.
    pub fn no_effect(&mut self, key: &str, node: &Node, why: &str) {
        self.row(key, Some(node), Fate::NoEffect, why);
    }

    /// Accounts for a key that stands for something that is not done here: refused, unless the user leaves it out.
    pub fn refuse(&mut self, key: &str, node: &Node, why: impl Into<String>) {
        let fate = if self.without.iter().any(|name| name == key) { Fate::LeftOut } else { Fate::Refused };
        self.row(key, Some(node), fate, why);
    }

    /// Something that the recipe needs and nobody says.
    pub fn lack(&mut self, key: &str, why: &str) {
        self.row(key, None, Fate::Refused, why);
    }

    /// The number of a key, which is refused if it is none.
    pub fn number(&mut self, key: &str) -> Option<(Node, f64)> {
        let node = self.take(key)?;
        match node.number() {
            Some(number) => Some((node, number)),
            None => {
                self.refuse(key, &node, "it is no number");
                None
            }
        }
    }

    /// The count of a key, which is refused if it is none.
    pub fn count(&mut self, key: &str) -> Option<(Node, usize)> {
        let (node, number) = self.number(key)?;
        if number.fract() == 0.0 && (0.0..=2_147_483_647.0).contains(&number) {
            return Some((node, number as usize));
        }
        self.refuse(key, &node, "it is no count");
        None
    }

    /// The truth value of a key, which is refused if it is none.
    pub fn truth(&mut self, key: &str) -> Option<(Node, bool)> {
        let node = self.take(key)?;
        match node.truth() {
            Some(truth) => Some((node, truth)),
            None => {
                self.refuse(key, &node, "it is neither true nor false");
                None
            }
        }
    }

    /// A number that means the same here; without it, or where it is left out, the other program's default.
    pub fn keep_number(&mut self, key: &str, name: &'static str, default: Option<f64>) {
        if let Some((node, number)) = self.number(key) {
            self.keep(key, &node, name, &number);
        }
        let is_settled = |row: &Row| row.key == key && matches!(row.fate, Fate::Kept | Fate::Refused);
        if let (Some(default), false) = (default, self.rows.iter().any(is_settled)) {
            self.default(key, name, &default);
        }
    }

    /// Refuses each of these keys unless it has one of the values at which it does nothing.
    pub fn only(&mut self, rules: &[(&str, &[&str], &str)]) {
        for (key, idle, why) in rules {
            let Some(node) = self.take(key) else { continue };
            let matches = |value: &&str| match value.parse::<f64>() {
                Ok(number) => node.number() == Some(number),
                Err(_) if *value == "false" => node.truth() == Some(false),
                Err(_) if *value == "true" => node.truth() == Some(true),
                Err(_) => node.text() == Some(*value),
            };
            match idle.iter().any(matches) {
                true => self.no_effect(key, &node, "the same as here"),
                false => self.refuse(key, &node, *why),
            }
        }
    }

    /// Accounts for keys that cannot change what is trained.
    pub fn idle(&mut self, keys: &[&str], why: &str) {
        for key in keys {
            if let Some(node) = self.take(key) {
                self.no_effect(key, &node, why);
            }
        }
    }
}

/// An error's message without its place in the recipe in the making.
pub(super) fn reason(error: Error) -> String {
    let message = match error {
        Error::Config { message, .. } => message,
        other => other.to_string(),
    };
    let after_line = |rest: &str| Some(rest.strip_prefix(':')?.split_once(": ")?.1.to_string());
    message.strip_prefix(UNWRITTEN).and_then(after_line).unwrap_or(message)
}
