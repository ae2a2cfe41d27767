//! Pages from templates: each is one file, with no script and nothing fetched from anywhere.

use minijinja::syntax::SyntaxConfig;
use minijinja::{
    AutoEscape, Environment, Error as TemplateError, ErrorKind, Output, State, UndefinedBehavior, Value,
};
use serde::Serialize;

use super::escape::escaped;
use crate::error::{Error, Result};

/// The style of every page.
const STYLE: &str = include_str!("style.css");

/// What several pages have in common, as macros: the beginning of a page, tables, charts. It stands in front of each
/// template.
const PARTS: &str = include_str!("parts.html");

/// Makes a page from the template `source`, to which `page` is what `view` says. `name` is for messages.
///
/// # Errors
/// A bug of this program: the template does not fit the view.
pub(crate) fn render(name: &'static str, source: &'static str, view: &impl Serialize) -> Result<String> {
    let failed = |error: TemplateError| Error::bug(format!("the page {name} cannot be written: {error:#}"));
    let source = [PARTS, source].concat();
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_formatter(write_value);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(failed)?);
    // Characters that command a terminal are shown, as they are on a terminal.
    environment.add_filter("shown", |text: &str| escaped(text).into_owned());
    environment.add_filter("code", |text: &str| Value::from_safe_string(with_code(text)));
    environment.add_filter("percent", |share: f64| format!("{:.1} %", 100.0 * share));
    environment.add_filter("tenth", |number: f64| format!("{number:.1}"));
    environment.add_filter("thousandth", |number: f64| format!("{number:.3}"));
    environment.add_filter("nats", |number: f64| format!("{number:+.3} nats"));
    environment.add_global("style", STYLE);
    environment.add_global("version", env!("CARGO_PKG_VERSION"));
    environment.add_template(name, &source).map_err(failed)?;
    let page = Value::from(minijinja::value::Serde(view));
    environment
        .get_template(name)
        .and_then(|template| template.render(minijinja::context! { page }))
        .map(|page| page.trim_start().to_string())
        .map_err(failed)
}

/// Writes a value of `{{ }}`: everything is escaped but what a macro has made.
fn write_value(
    out: &mut Output<'_>,
    _: &mut State<'_, '_>,
    value: &Value,
) -> std::result::Result<(), TemplateError> {
    if value.is_undefined() || value.is_none() {
        return Err(TemplateError::new(ErrorKind::UndefinedError, "a value that is not there"));
    }
    let text = value.to_string();
    let text = if value.is_safe() { text } else { escape(&text) };
    out.write_str(&text).map_err(|_| TemplateError::new(ErrorKind::WriteFailure, "cannot write"))
}

/// Text for HTML content in which what stands in backquotes is code.
fn with_code(text: &str) -> String {
    let pieces: Vec<String> = text.split('`').map(escape).collect();
    // Without its second backquote the last piece is no code.
    let whole = pieces.len() - (pieces.len() + 1) % 2;
    let mut out = String::with_capacity(text.len() + 16);
    for (at, piece) in pieces.iter().enumerate() {
        match (at % 2 == 1, at < whole) {
            (true, true) => out.push_str(&format!("<code>{piece}</code>")),
            (_, true) => out.push_str(piece),
            (_, false) => out.push_str(&format!("`{piece}")),
        }
    }
    out
}

/// Text for HTML content and attributes.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Characters that HTML forbids, as a model may well produce them.
            control if control.is_control() && !control.is_whitespace() => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_in_backquotes_is_code() {
        for (text, html) in [
            ("try `a = <b>`; or `c`", "try <code>a = &lt;b&gt;</code>; or <code>c</code>"),
            ("`a`", "<code>a</code>"),
            ("a ` b", "a ` b"),
            ("`a` b ` c", "<code>a</code> b ` c"),
            ("plain & simple", "plain &amp; simple"),
            ("", ""),
        ] {
            assert_eq!(with_code(text), html, "{text}");
        }
    }

    #[test]
    fn values_are_escaped_and_absent_ones_are_a_fault() {
        let text = std::collections::BTreeMap::from([("text", "<b>\"it's\" & \u{7}</b>")]);
        let page = render("test.html", "<p title=\"{{ page.text }}\">", &text).unwrap();
        assert_eq!(page, "<p title=\"&lt;b&gt;&quot;it&#39;s&quot; &amp; \u{fffd}&lt;/b&gt;\">");
        let error = render("test.html", "{{ page.other }}", &text).unwrap_err();
        assert!(error.to_string().contains("test.html"), "{error}");
    }
}
