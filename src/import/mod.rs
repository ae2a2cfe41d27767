//! `mmpo-fast import`: the configuration file of another trainer as a recipe of this one, with an account of each key.
//!
//! Every key is kept, becomes something else, is known to have no effect on what is trained, or is refused with a reason;
//! and the defaults of the other program that differ are written out. A value that `train` would refuse is refused with the
//! reason that `train` gives. Where a key is refused there is no recipe, unless the user leaves the key out by its name.

mod axolotl;
mod draft;
mod llama_factory;
mod machines;
mod pairs;
mod table;
mod training;
mod trl;
mod yaml;

use std::path::{Path, PathBuf};

pub use draft::{Fate, Row};

use crate::checkpoint::atomic;
use crate::config::value::OptionValue;
use crate::config::{PairData, options, recipe, resolve_text};
use crate::error::{Error, Result};
use crate::report::{print_notice, print_result};
use draft::Draft;

/// A program whose configuration files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// TRL's `trl dpo --config`.
    Trl,
    /// A recipe of the alignment handbook, which are TRL's with mixtures of data sets.
    AlignmentHandbook,
    /// LLaMA-Factory.
    LlamaFactory,
    /// Axolotl.
    Axolotl,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Dialect; 4] =
        [Dialect::Trl, Dialect::AlignmentHandbook, Dialect::LlamaFactory, Dialect::Axolotl];

    /// The word of `--from`.
    pub fn word(self) -> &'static str {
        match self {
            Dialect::Trl => "trl",
            Dialect::AlignmentHandbook => "alignment-handbook",
            Dialect::LlamaFactory => "llama-factory",
            Dialect::Axolotl => "axolotl",
        }
    }

    /// The program whose file this is, by keys that only its files have.
    fn detect(draft: &Draft) -> Option<Self> {
        const MARKS: [(Dialect, &[&str]); 4] = [
            (Dialect::Axolotl, &["base_model", "micro_batch_size", "sequence_len", "num_epochs"]),
            (Dialect::LlamaFactory, &["stage", "finetuning_type", "cutoff_len", "pref_loss", "pref_beta"]),
            (Dialect::AlignmentHandbook, &["dataset_mixture", "dataset_mixer"]),
            (
                Dialect::Trl,
                &["model_name_or_path", "dataset_name", "per_device_train_batch_size", "loss_type"],
            ),
        ];
        let has = |keys: &[&str]| keys.iter().any(|key| draft.has(key));
        MARKS.iter().find(|(_, keys)| has(keys)).map(|(dialect, _)| *dialect)
    }
}

/// Everything `import` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportConfig {
    /// The file of the other program.
    pub file: PathBuf,
    /// Whose file it is; `None` is told by its keys.
    pub from: Option<Dialect>,
    /// Where the recipe goes; `None` is standard output.
    pub output: Option<PathBuf>,
    /// Pairs in place of those that the file names.
    pub data: Option<PairData>,
    /// How many devices the other program trained on, each with its own batch.
    pub devices: usize,
    /// Keys that are left out where they would be refused.
    pub without: Vec<String>,
}

/// A recipe made of another program's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Whose file it is.
    pub dialect: Dialect,
    /// What became of each key.
    pub rows: Vec<Row>,
    /// The recipe, unless a key was refused.
    pub recipe: Option<String>,
}

/// Prints the recipe of `config.file`, or writes it, and the account of its keys to standard error.
///
/// # Errors
/// [`Error::Io`] where the file cannot be read or the recipe written; [`Error::Config`] for what is no YAML, for a file of
/// an unknown program, and where a key is refused.
pub fn run(config: &ImportConfig) -> Result<()> {
    let text = recipe::read_text(&config.file, yaml::MOST_BYTES)?;
    if let Some(output) = &config.output {
        let real = |path: &Path| std::fs::canonicalize(path).ok();
        if real(output).is_some() && real(output) == real(&config.file) {
            return Err(Error::config(
                format!("`--output` = {} is the file that is imported", output.display()),
                "choose another file for the recipe; nothing was changed",
            ));
        }
    }
    let imported = convert(&text, config)?;
    print_notice(table::write(&imported, &config.file).trim_end());
    let refused: Vec<&str> =
        imported.rows.iter().filter(|row| row.fate == Fate::Refused).map(|row| row.key.as_str()).collect();
    let Some(recipe) = &imported.recipe else {
        return Err(Error::config(
            format!(
                "{}: no recipe, because {} refused: {}",
                config.file.display(),
                if refused.len() == 1 {
                    "a key is".to_string()
                } else {
                    format!("{} keys are", refused.len())
                },
                refused.join(", ")
            ),
            "the table says why; mend the file, or leave keys out that may go, such as --without KEY,KEY",
        ));
    };
    match &config.output {
        None => print_result(recipe).map(drop),
        Some(path) => {
            atomic::write_file(path, recipe.as_bytes())?;
            print_result(&format!("recipe  {}\n", path.display())).map(drop)
        }
    }
}

/// The recipe that `text` becomes, without reading or writing anything but LLaMA-Factory's list of data sets.
///
/// # Errors
/// [`Error::Config`] for what is no YAML, for a file of an unknown program, and for a `without` that is not refused.
pub fn convert(text: &str, config: &ImportConfig) -> Result<Imported> {
    let members = yaml::parse(text, &config.file)?;
    let mut draft = Draft::new(members, &config.without);
    let dialect = config.from.or_else(|| Dialect::detect(&draft)).ok_or_else(|| {
        let known = Dialect::ALL.map(Dialect::word).join(", ");
        Error::config(
            format!("{}: no key tells which program the file is for", config.file.display()),
            format!("say it with --from, one of {known}"),
        )
    })?;
    if let Some(data) = &config.data {
        draft.lines.push(("data", data.to_toml()));
    }
    match dialect {
        Dialect::Trl | Dialect::AlignmentHandbook => trl::read(&mut draft, config.devices),
        Dialect::LlamaFactory => llama_factory::read(&mut draft, config.devices),
        Dialect::Axolotl => axolotl::read(&mut draft, config.devices),
    }
    let recipe = accepted(&mut draft, dialect, config)?;
    if let Some(idle) = config
        .without
        .iter()
        .find(|name| !draft.rows.iter().any(|row| row.fate == Fate::LeftOut && row.key == **name))
    {
        return Err(Error::config(
            format!("--without {idle}: no such key is refused"),
            "it takes the names in the table's first column whose outcome is `refused`",
        ));
    }
    Ok(Imported { dialect, rows: draft.rows, recipe })
}

/// The recipe, which `train` accepts; `None` where a key is refused, be it for a rule between options that `train` has.
fn accepted(draft: &mut Draft, dialect: Dialect, config: &ImportConfig) -> Result<Option<String>> {
    loop {
        if draft.rows.iter().any(|row| row.fate == Fate::Refused) {
            return Ok(None);
        }
        let text = written(draft, dialect);
        let Err(error) = resolve_text(&text, Path::new(draft::UNWRITTEN)) else { return Ok(Some(text)) };
        // Each turn refuses a key, or leaves one of the recipe's lines out.
        let problem = draft::reason(error);
        if !draft.refuse_together(&problem) {
            return Err(Error::config(
                format!("{}: its values make no recipe: {problem}", config.file.display()),
                "mend the value in the file",
            ));
        }
    }
}

/// The recipe's text, in the order of the options.
fn written(draft: &Draft, dialect: Dialect) -> String {
    let mut text = format!(
        "# Made by `mmpo-fast import` from a configuration of {}. `mmpo-fast train --recipe FILE` runs it.\n",
        dialect.word()
    );
    let mut heading = "";
    for row in options::rows() {
        let Some((name, toml)) = draft.lines.iter().find(|(name, _)| *name == row.name) else { continue };
        if row.heading != heading {
            heading = row.heading;
            text.push_str(&format!("\n# {heading}\n"));
        }
        text.push_str(&format!("{name} = {toml}\n"));
    }
    text
}
