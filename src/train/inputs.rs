//! What a run reads before it computes anything: model folder, tokenizer and pairs, all checked.

use std::path::{Path, PathBuf};

use super::adapter::StartingAdapter;
use crate::checkpoint::{CompanionFiles, ModelFolder};
use crate::config::{LengthLimits, RunConfig};
use crate::context;
use crate::data::{Cause, PairDataset, TextEncoder, TokenizedPair, load_pairs};
use crate::demo::Demo;
use crate::device::LargeBlocks;
use crate::error::{Error, Result};
use crate::report::DataSummary;

/// What a run reads: model, reference and pairs, all checked.
#[derive(Debug)]
pub struct Inputs {
    /// The model that training starts from.
    pub folder: ModelFolder,
    /// The adapters that are trained in place of the weights, where they are.
    pub adapter: Option<StartingAdapter>,
    /// The frozen reference, where it is another model than `folder`.
    pub reference: Option<ModelFolder>,
    /// The files that are saved beside the trained weights.
    pub companions: CompanionFiles,
    /// The model's tokenizer and chat template.
    pub encoder: TextEncoder,
    /// The lengths asked for, within the models' context.
    pub limits: LengthLimits,
    /// Pairs to train on.
    pub training: PairDataset,
    /// Pairs to evaluate on.
    pub evaluation: Option<PairDataset>,
    /// The file of the training pairs.
    pub training_path: PathBuf,
    /// The file of the evaluation pairs.
    pub evaluation_path: Option<PathBuf>,
    /// Keeps the demo's files alive.
    _demo: Option<Demo>,
}

impl Inputs {
    /// Reads and checks all that `config` names.
    ///
    /// # Errors
    /// Those of model folders, data files and limits that do not fit them.
    pub fn load(config: &RunConfig) -> Result<Self> {
        let demo = match config.model.is_none() || config.data.is_none() {
            true => Some(Demo::unpack()?),
            false => None,
        };
        let built_in = |path: fn(&Demo) -> PathBuf| demo.as_ref().map(path).unwrap_or_default();
        let model = config.model.clone().unwrap_or_else(|| built_in(Demo::model));
        let training_path = config.data.clone().unwrap_or_else(|| built_in(Demo::pairs));
        let evaluation_path = match (&config.evaluation.data, &config.data) {
            (Some(path), _) => Some(path.clone()),
            (None, None) => Some(built_in(Demo::evaluation_pairs)),
            (None, Some(_)) => None,
        };

        let folder = ModelFolder::open(&model)?;
        folder.check_finite()?;
        let reference = config.reference.as_deref().map(|path| open_reference(path, &folder)).transpose()?;
        check_dropout(&folder)?;
        let adapter = StartingAdapter::of(config, &folder)?;
        let models: Vec<&ModelFolder> = std::iter::once(&folder).chain(&reference).collect();
        let limits = context::limits(config.asked_lengths, &models)?;
        let text_folder = context::text_folder(&model, config.adapter.as_deref());
        let encoder = TextEncoder::load(text_folder, config.chat_template.as_deref())?;
        let companions = companions(text_folder, &folder, &encoder)?;
        let load = |path: &Path, given: &Option<PathBuf>| -> Result<PairDataset> {
            let _memory = LargeBlocks::give_back();
            let dataset = load_pairs(path, &encoder, limits)?;
            dataset.report.log(&name(given));
            dataset.check_vocabulary(folder.config().vocab_size, &model)?;
            Ok(dataset)
        };
        let training = load(&training_path, &config.data)?;
        let evaluation =
            evaluation_path.as_deref().map(|path| load(path, &config.evaluation.data)).transpose()?;
        let inputs = Inputs {
            folder,
            adapter,
            reference,
            companions,
            encoder,
            limits,
            training,
            evaluation,
            training_path,
            evaluation_path,
            _demo: demo,
        };
        let longest = inputs.positions();
        std::iter::once(&inputs.folder)
            .chain(&inputs.reference)
            .try_for_each(|model| context::check_pairs(model, longest))?;
        Ok(inputs)
    }

    /// Tokens of the longest sequence that any pair makes: the number of positions that RoPE needs.
    pub fn positions(&self) -> usize {
        let evaluation = self.evaluation.iter().flat_map(|dataset| &dataset.pairs);
        let pairs = self.training.pairs.iter().chain(evaluation);
        pairs.map(TokenizedPair::positions).max().unwrap_or(0)
    }

    /// What became of the records of each file, for the report.
    pub fn data_summaries(&self, config: &RunConfig) -> Vec<DataSummary> {
        let evaluation = self.evaluation.as_ref().map(|data| summarize(name(&config.evaluation.data), data));
        std::iter::once(summarize(name(&config.data), &self.training)).chain(evaluation).collect()
    }
}

/// Refuses attention dropout: transformers would drop attention weights in training, and a run without that is another
/// run.
fn check_dropout(model: &ModelFolder) -> Result<()> {
    match model.config().attention_dropout {
        0.0 => Ok(()),
        rate => Err(Error::model(
            &model.path().join("config.json"),
            format!("`attention_dropout` is {rate}; training with attention dropout is not supported"),
            "set `attention_dropout` to 0: nearly every Llama is trained without it",
        )),
    }
}

fn open_reference(path: &Path, model: &ModelFolder) -> Result<ModelFolder> {
    let reference = ModelFolder::open(path)?;
    let (theirs, ours) = (reference.config().vocab_size, model.config().vocab_size);
    if theirs != ours {
        return Err(Error::model(
            path,
            format!("the reference has a vocabulary of {theirs}, the model one of {ours}"),
            "both must share one tokenizer: use the checkpoint that the model started from",
        ));
    }
    reference.check_finite()?;
    Ok(reference)
}

/// The name of a data file, for people.
fn name(given: &Option<PathBuf>) -> String {
    match given {
        Some(path) => path.display().to_string(),
        None => "the built-in demo".to_string(),
    }
}

fn summarize(name: String, dataset: &PairDataset) -> DataSummary {
    let report = &dataset.report;
    let counted = |drops: bool| {
        Cause::ALL
            .into_iter()
            .filter(|cause| cause.drops() == drops)
            .map(|cause| (report.describe(cause), report.tally(cause).count))
            .filter(|(_, count)| *count > 0)
            .collect()
    };
    DataSummary {
        name,
        read: report.records,
        used: report.pairs,
        dropped: counted(true),
        cut: counted(false),
    }
}

/// The files that are saved beside the weights: the model's, with the chat template and the end tokens that the model
/// is trained with.
fn companions(model: &Path, folder: &ModelFolder, encoder: &TextEncoder) -> Result<CompanionFiles> {
    let mut companions = CompanionFiles::read(model, folder.config())?;
    let mut ends: Vec<u32> = encoder.tokenizer.eos().into_iter().collect();
    if let Some(template) = &encoder.template {
        if let Some(templates) = template.replaced() {
            companions.replace_chat_templates(model, &templates)?;
        }
        ends.extend(template.end_of_turn(&encoder.tokenizer)?);
    }
    companions.stop_at(model, folder.config(), &ends)?;
    Ok(companions)
}
