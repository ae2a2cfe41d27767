//! Where pairs come from, as a flag or a recipe says it: files with weights, names of columns, a template's date.

use std::path::PathBuf;

use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use toml::de::DeValue;

use super::value::{OptionValue, Source, toml_kind};

/// The most times that a pair may be taken in an epoch.
const LARGEST_WEIGHT: f64 = 1000.0;

/// Where tokenised pairs are kept between runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataCache {
    /// Nowhere: they are held in memory.
    Off,
    /// In this folder.
    Folder(PathBuf),
}

impl OptionValue for DataCache {
    const PLACEHOLDER: &'static str = "DIR|off";

    fn from_text(text: &str) -> Result<Self, String> {
        Ok(match text {
            "off" => DataCache::Off,
            folder => DataCache::Folder(PathBuf::from(folder)),
        })
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::from_text(text),
            other => Err(format!("must be a folder in quotes, or \"off\", not {}", toml_kind(other))),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            DataCache::Off => "\"off\"".to_string(),
            DataCache::Folder(folder) => folder.to_toml(),
        }
    }
}

/// Files of pairs, folders of them, and names of data sets on the Hugging Face Hub that are in its cache on this disk.
#[derive(Clone, Debug, PartialEq)]
pub struct PairFiles(pub Vec<PairFile>);

/// A file or folder of pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct PairFile {
    /// File, folder, or name on the Hub; with `:SPLIT` after it where a folder holds several.
    pub path: PathBuf,
    /// How many times each pair is taken: 2 is twice, 0.5 is half of the pairs.
    pub weight: f64,
}

impl From<PathBuf> for PairFiles {
    fn from(path: PathBuf) -> Self {
        PairFiles(vec![PairFile { path, weight: 1.0 }])
    }
}

impl std::fmt::Display for PairFiles {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let shown = |file: &PairFile| match file.weight {
            1.0 => file.path.display().to_string(),
            weight => format!("{}={weight}", file.path.display()),
        };
        formatter.write_str(&self.0.iter().map(shown).collect::<Vec<_>>().join(", "))
    }
}

impl PairFile {
    /// `PATH` or `PATH=WEIGHT`; what exists as it is written is a path.
    fn from_text(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        let unweighted = PairFile { path: path.clone(), weight: 1.0 };
        if text.is_empty() {
            return Err("must name a file or folder, and is empty".to_string());
        }
        if path.exists() {
            return Ok(unweighted);
        }
        match text.rsplit_once('=') {
            None => Ok(unweighted),
            Some((path, weight)) => {
                let number = weight.parse().map_err(|_| {
                    format!("must be PATH or PATH=WEIGHT; in `{text}`, `{weight}` is no number and no such file exists")
                })?;
                PairFile { path: PathBuf::from(path), weight: number }.checked()
            }
        }
    }

    fn checked(self) -> Result<Self, String> {
        if !(self.weight > 0.0 && self.weight <= LARGEST_WEIGHT) {
            return Err(format!(
                "has the weight {} for {}, which must be greater than 0 and at most {LARGEST_WEIGHT}",
                self.weight,
                self.path.display()
            ));
        }
        match self.path.as_os_str().is_empty() {
            true => Err("must name a file or folder, and is empty".to_string()),
            false => Ok(self),
        }
    }

    fn from_item(value: &DeValue<'_>) -> Result<Self, String> {
        if let Some(text) = value.as_str() {
            return Self::from_text(text);
        }
        let wanted = || {
            format!(
                "must be a path in quotes, or a list of paths and of {{ path = \"...\", weight = 0.5 }}, not {}",
                toml_kind(value)
            )
        };
        let DeValue::Table(members) = value else { return Err(wanted()) };
        let mut file = PairFile { path: PathBuf::new(), weight: 1.0 };
        for (name, member) in members.iter() {
            match name.get_ref().as_ref() {
                "path" => file.path = PathBuf::from_toml(member.get_ref())?,
                "weight" => file.weight = f64::from_toml(member.get_ref())?,
                other => return Err(format!("has a member `{other}`; a source has `path` and `weight`")),
            }
        }
        file.checked()
    }

    fn to_item(&self) -> String {
        let path = self.path.to_toml();
        // A path with `=` in a string could be taken for one with a weight.
        match self.weight == 1.0 && !path.contains('=') {
            true => path,
            false => format!("{{ path = {path}, weight = {} }}", self.weight.to_toml()),
        }
    }
}

impl OptionValue for PairFiles {
    const PLACEHOLDER: &'static str = "PATH[=WEIGHT][,...]";

    fn from_text(text: &str) -> Result<Self, String> {
        if PathBuf::from(text).exists() {
            return Ok(PathBuf::from(text).into());
        }
        text.split(',').map(PairFile::from_text).collect::<Result<_, _>>().map(PairFiles)
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::from_text(text),
            DeValue::Array(items) if !items.is_empty() => {
                let items = items.iter().map(|item| PairFile::from_item(item.get_ref()));
                items.collect::<Result<_, _>>().map(PairFiles)
            }
            DeValue::Array(_) => Err("must name a file or folder, and is an empty list".to_string()),
            other => PairFile::from_item(other).map(|file| PairFiles(vec![file])),
        }
    }

    fn to_toml(&self) -> String {
        match self.0.as_slice() {
            [file] if file.weight == 1.0 && !file.path.to_string_lossy().contains([',', '=']) => {
                file.path.to_toml()
            }
            files => format!("[{}]", files.iter().map(PairFile::to_item).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Pairs to train on: files, or those built into the program.
#[derive(Clone, Debug, PartialEq)]
pub enum PairData {
    /// Files, folders and names on the Hub.
    Files(PairFiles),
    /// Written [`Source::BUILTIN`].
    Builtin,
}

impl PairData {
    /// The files, unless the pairs are built in.
    pub fn into_files(self) -> Option<PairFiles> {
        match self {
            PairData::Files(files) => Some(files),
            PairData::Builtin => None,
        }
    }

    /// Files, or the built-in pairs where there are none.
    pub fn from_files(files: Option<&PairFiles>) -> Self {
        files.map_or(PairData::Builtin, |files| PairData::Files(files.clone()))
    }
}

impl OptionValue for PairData {
    const PLACEHOLDER: &'static str = PairFiles::PLACEHOLDER;

    fn from_text(text: &str) -> Result<Self, String> {
        match text {
            Source::BUILTIN => Ok(PairData::Builtin),
            _ => PairFiles::from_text(text).map(PairData::Files),
        }
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value.as_str() {
            Some(text) => Self::from_text(text),
            None => PairFiles::from_toml(value).map(PairData::Files),
        }
    }

    fn to_toml(&self) -> String {
        match self {
            PairData::Files(files) => files.to_toml(),
            PairData::Builtin => format!("\"{}\"", Source::BUILTIN),
        }
    }
}

/// Columns that have other names in the files: what each is read as, and its name there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnNames(pub Vec<(String, String)>);

impl ColumnNames {
    /// What the column `name` of a file is read as; `None` where another column is read as that.
    pub fn read_as<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        if let Some((ours, _)) = self.0.iter().find(|(_, theirs)| theirs == name) {
            return Some(ours);
        }
        self.0.iter().all(|(ours, _)| ours != name).then_some(name)
    }

    fn checked(self) -> Result<Self, String> {
        for (place, (ours, theirs)) in self.0.iter().enumerate() {
            if let Some(problem) = crate::data::unknown_column(ours) {
                return Err(problem);
            }
            if theirs.is_empty() {
                return Err(format!("names no column for `{ours}`"));
            }
            let before = &self.0[..place];
            if before.iter().any(|(other, _)| other == ours) {
                return Err(format!("says twice what `{ours}` is"));
            }
            if before.iter().any(|(_, other)| other == theirs) {
                return Err(format!("reads `{theirs}` as two columns"));
            }
        }
        Ok(self)
    }
}

impl OptionValue for ColumnNames {
    const PLACEHOLDER: &'static str = "NAME=COLUMN[,...]";

    fn from_text(text: &str) -> Result<Self, String> {
        let part = |part: &str| match part.split_once('=') {
            Some((ours, theirs)) => Ok((ours.trim().to_string(), theirs.to_string())),
            None => Err(format!("must be NAME=COLUMN, such as prompt=question, not `{part}`")),
        };
        text.split(',').map(part).collect::<Result<_, _>>().map(ColumnNames)?.checked()
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        if let Some(text) = value.as_str() {
            return Self::from_text(text);
        }
        let DeValue::Table(members) = value else {
            return Err(format!(
                "must be a table such as {{ prompt = \"question\" }}, not {}",
                toml_kind(value)
            ));
        };
        let member = |(name, member): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| {
            let ours: &std::borrow::Cow<'_, str> = name.get_ref();
            match member.get_ref().as_str() {
                Some(theirs) => Ok((ours.to_string(), theirs.to_string())),
                None => Err(format!(
                    "must name a column in quotes for `{ours}`, not {}",
                    toml_kind(member.get_ref())
                )),
            }
        };
        members.iter().map(member).collect::<Result<_, _>>().map(ColumnNames)?.checked()
    }

    fn to_toml(&self) -> String {
        let quoted = |text: &str| toml::Value::String(text.to_string()).to_string();
        let members = self.0.iter().map(|(ours, theirs)| format!("{ours} = {}", quoted(theirs)));
        format!("{{ {} }}", members.collect::<Vec<_>>().join(", "))
    }
}

/// The date and time that the functions of a chat template call now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TemplateDate(DateTime);

impl TemplateDate {
    /// Seconds since 1970, where the date and time are those of this machine's time zone, as `strftime_now` shows them.
    ///
    /// # Errors
    /// What is wrong with a date outside of the years that can be counted.
    pub fn unix_seconds(self) -> Result<i64, String> {
        let zoned = self.0.to_zoned(TimeZone::system()).map_err(|error| error.to_string())?;
        Ok(zoned.timestamp().as_second())
    }
}

impl OptionValue for TemplateDate {
    const PLACEHOLDER: &'static str = "YYYY-MM-DD[THH:MM:SS]";

    fn from_text(text: &str) -> Result<Self, String> {
        // A date alone is noon: no time zone's change of clocks makes another day of it.
        let date = text.parse::<Date>().map(|date| date.at(12, 0, 0, 0));
        // A date is also a time of day to jiff, at midnight; so only what has one is read as such.
        let time = || text.contains(['T', ' ']).then(|| text.parse::<DateTime>().ok()).flatten();
        let read = match time() {
            Some(time) => Some(time),
            None => date.ok().filter(|_| !text.contains(['T', ' '])),
        };
        let date = TemplateDate(read.ok_or_else(|| {
            format!("must be a date such as 2024-07-26 or 2024-07-26T09:30:00, not `{text}`")
        })?);
        date.unix_seconds().map(|_| date)
    }

    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::String(text) => Self::from_text(text),
            DeValue::Datetime(date) => Self::from_text(&date.to_string()),
            other => Err(format!("must be a date, not {}", toml_kind(other))),
        }
    }

    fn to_toml(&self) -> String {
        format!("\"{}\"", self.0)
    }
}
