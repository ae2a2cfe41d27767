//! Where a model folder keeps its chat templates, read as transformers reads them.
//!
//! `chat_template.jinja` and `additional_chat_templates/*.jinja` come first; where one of them is there, they are all
//! the templates there are. Else it is `chat_template` of `tokenizer_config.json`: a text, a list of named templates,
//! or an object of them. Where that is absent too, `chat_template` of `chat_template.json`, which only processors of
//! other models read in transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::{Error, Result};

/// The template that is used where nothing else is said.
pub(super) const DEFAULT: &str = "default";
/// The named template that transformers picks for conversations with tools, where there is one.
pub(super) const TOOL_USE: &str = "tool_use";
pub(crate) const TEMPLATE_FILE: &str = "chat_template.jinja";
pub(crate) const TEMPLATE_FOLDER: &str = "additional_chat_templates";
const LEGACY_FILE: &str = "chat_template.json";

const MEND: &str = "mend it, or pass --chat-template FILE";

/// A model's templates by their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sources {
    pub templates: BTreeMap<String, Source>,
    /// Whether --chat-template chose the default, which then also stands for tools.
    pub overridden: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// The file that holds the template: what errors name.
    pub path: PathBuf,
    pub text: String,
}

impl Sources {
    /// The templates of `folder`, whose `tokenizer_config.json` is given, with `chosen` (a name of theirs, or a file)
    /// as the default. `None` where there is no template.
    ///
    /// # Errors
    /// [`Error::Config`] where `chosen` is neither or both, [`Error::Model`] for a file that holds no template.
    pub fn read(folder: &Path, config: &Map<String, Value>, chosen: Option<&Path>) -> Result<Option<Self>> {
        let chosen_file = chosen.filter(|path| path.is_file());
        // A file that replaces the model's template is also the way out where that is broken.
        let templates = match (of_folder(folder, config), chosen_file) {
            (Err(_), Some(_)) => BTreeMap::new(),
            (templates, _) => templates?,
        };
        let Some(chosen) = chosen else {
            return match templates.is_empty() {
                true => Ok(None),
                false => Ok(Some(Sources { templates, overridden: false })),
            };
        };
        let default = choose(&templates, chosen, folder)?;
        let mut templates = templates;
        templates.remove(TOOL_USE);
        templates.insert(DEFAULT.to_string(), default);
        Ok(Some(Sources { templates, overridden: true }))
    }

    /// The sources of a template that stands alone.
    pub fn single(path: &Path, text: &str) -> Self {
        let source = Source { path: path.to_path_buf(), text: text.to_string() };
        Sources { templates: BTreeMap::from([(DEFAULT.to_string(), source)]), overridden: false }
    }
}

fn choose(templates: &BTreeMap<String, Source>, chosen: &Path, folder: &Path) -> Result<Source> {
    let named = chosen.to_str().and_then(|name| templates.get(name));
    let shown = chosen.display();
    match (named, chosen.is_file()) {
        (Some(source), false) => Ok(source.clone()),
        (None, true) => Ok(Source { path: chosen.to_path_buf(), text: read_template(chosen)? }),
        (Some(_), true) => Err(Error::config(
            format!("--chat-template {shown} is the name of a template of the model and a file as well"),
            format!("write ./{shown} for the file, or rename it"),
        )),
        (None, false) => {
            let what = if chosen.is_dir() { "a folder" } else { "no file" };
            let names: Vec<&str> = templates.keys().map(String::as_str).collect();
            let known = match names.is_empty() {
                true => format!("{} has no templates", folder.display()),
                false => format!("{} has {}", folder.display(), names.join(", ")),
            };
            Err(Error::config(
                format!("--chat-template {shown} is {what} and names no template of the model; {known}"),
                "name one of the model's templates, or give a Jinja file",
            ))
        }
    }
}

fn of_folder(folder: &Path, config: &Map<String, Value>) -> Result<BTreeMap<String, Source>> {
    let files = of_files(folder)?;
    if !files.is_empty() {
        return Ok(files);
    }
    let path = folder.join("tokenizer_config.json");
    let templates = of_json(&path, config.get("chat_template"))?;
    if !templates.is_empty() {
        return Ok(templates);
    }
    let path = folder.join(LEGACY_FILE);
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let legacy: Value = serde_json::from_str(&read_template(&path)?)
        .map_err(|error| Error::model(&path, format!("broken JSON: {error}"), MEND))?;
    match legacy.get("chat_template") {
        Some(template) => of_json(&path, Some(template)),
        None => Err(Error::model(&path, "it has no member `chat_template`", MEND)),
    }
}

fn of_files(folder: &Path) -> Result<BTreeMap<String, Source>> {
    let mut templates = BTreeMap::new();
    let default = folder.join(TEMPLATE_FILE);
    if default.is_file() {
        templates.insert(DEFAULT.to_string(), default);
    }
    let additional = folder.join(TEMPLATE_FOLDER);
    if additional.is_dir() {
        let failed = |error| Error::io(&additional, "read", error);
        for entry in fs::read_dir(&additional).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".jinja"));
            if let (Some(name), true) = (name, path.is_file()) {
                templates.insert(name.to_string(), path);
            }
        }
    }
    let read = |(name, path): (String, PathBuf)| Ok((name, Source { text: read_template(&path)?, path }));
    templates.into_iter().map(read).collect()
}

/// A template, a list of `{"name": ..., "template": ...}`, or an object of templates.
fn of_json(path: &Path, templates: Option<&Value>) -> Result<BTreeMap<String, Source>> {
    let source = |text: &str| -> Result<Source> {
        refuse_pointer(path, text)?;
        Ok(Source { path: path.to_path_buf(), text: text.to_string() })
    };
    let mut named = BTreeMap::new();
    match templates {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => {
            named.insert(DEFAULT.to_string(), source(text)?);
        }
        Some(Value::Array(entries)) => {
            for entry in entries {
                let text = |name: &str| entry.get(name).and_then(Value::as_str);
                let (Some(name), Some(template)) = (text("name"), text("template")) else {
                    let message =
                        "an entry of the list `chat_template` lacks a `name` or a `template` string";
                    return Err(Error::model(path, message, MEND));
                };
                named.insert(name.to_string(), source(template)?);
            }
        }
        Some(Value::Object(entries)) => {
            for (name, template) in entries {
                let Some(template) = template.as_str() else {
                    let message = format!("`chat_template` holds `{name}`, which is no string");
                    return Err(Error::model(path, message, MEND));
                };
                named.insert(name.clone(), source(template)?);
            }
        }
        Some(_) => {
            let message = "`chat_template` is neither a string nor a list nor an object of named templates";
            return Err(Error::model(path, message, MEND));
        }
    }
    Ok(named)
}

fn read_template(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, "read", error))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::model(path, format!("it is not UTF-8 text: byte {at} begins no character"), "save it as UTF-8")
    })?;
    refuse_pointer(path, &text)?;
    Ok(text)
}

fn refuse_pointer(path: &Path, text: &str) -> Result<()> {
    match text.starts_with("version https://git-lfs.github.com/spec/") {
        true => Err(Error::model(
            path,
            "it is a git-lfs pointer, which stands for the file and is not the file",
            "run `git lfs pull` in the folder it comes from, or download the file again",
        )),
        false => Ok(()),
    }
}
