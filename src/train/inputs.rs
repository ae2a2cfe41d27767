//! What a run reads before it computes anything: model folder, tokenizer and pairs, all checked.

use std::path::Path;

use super::adapter::StartingAdapter;
use crate::checkpoint::{CompanionFiles, ModelFolder};
use crate::config::{LengthLimits, PairFiles, Policy, RunConfig};
use crate::context;
use crate::data::{
    Cause, FileReport, PairCache, PairDataset, PairSource, Part, TextEncoder, TokenizedPair, Treatment,
    load_cached,
};
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
    /// The files of the former.
    pub training_source: PairSource,
    /// The files of the latter.
    pub evaluation_source: Option<PairSource>,
    /// Keeps the demo's files alive.
    demo: Option<Demo>,
}

impl Inputs {
    /// Reads and checks all that `config` names.
    ///
    /// # Errors
    /// Those of model folders, data files and limits that do not fit them.
    pub fn load(config: &RunConfig) -> Result<Self> {
        Self::read(config, true)
    }

    /// As [`Inputs::load`], without an account of the pairs: another rank of the run has given it.
    ///
    /// # Errors
    /// As [`Inputs::load`].
    pub fn load_silently(config: &RunConfig) -> Result<Self> {
        Self::read(config, false)
    }

    fn read(config: &RunConfig, is_told: bool) -> Result<Self> {
        let demo = match config.model.is_none() || config.data.is_none() {
            true => Some(Demo::unpack()?),
            false => None,
        };
        let model = match (&config.model, &demo) {
            (Some(model), _) => model.clone(),
            (None, Some(demo)) => demo.model(),
            (None, None) => return Err(Error::bug("the demo is not unpacked")),
        };
        let (training_source, evaluation_source) = pair_sources(config, demo.as_ref())?;

        let folder = ModelFolder::open(&model)?;
        folder.check_finite()?;
        let reference = config.reference.as_deref().map(|path| open_reference(path, &folder)).transpose()?;
        check_dropout(&folder)?;
        let adapter = StartingAdapter::of(config, &folder)?;
        let models: Vec<&ModelFolder> = std::iter::once(&folder).chain(&reference).collect();
        let limits = context::limits(config.asked_lengths, &models)?;
        let text_folder = context::text_folder(&model, config.adapter.as_deref());
        let encoder =
            TextEncoder::load(text_folder, config.chat_template.as_deref())?.at(config.template_date)?;
        let companions = companions(text_folder, &folder, &encoder)?;
        let treatment = Treatment {
            limits,
            policies: config.policies,
            min_score_gap: config.min_score_gap,
            tolerant: false,
        };
        let cache = PairCache::of(config.data_cache.as_ref())?;
        let load = |source: &PairSource| -> Result<PairDataset> {
            let _memory = LargeBlocks::give_back();
            let dataset = load_cached(source, &encoder, treatment, cache.as_ref(), None)?;
            for file in dataset.files.iter().filter(|_| is_told) {
                file.report.log(&name(file, source.part, false, demo.as_ref()));
            }
            dataset.check_vocabulary(folder.config().vocab_size, &model)?;
            Ok(dataset)
        };
        let training = load(&training_source)?;
        let evaluation = evaluation_source.as_ref().map(load).transpose()?;
        let inputs = Inputs {
            folder,
            adapter,
            reference,
            companions,
            encoder,
            limits,
            training,
            evaluation,
            training_source,
            evaluation_source,
            demo,
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
    pub fn data_summaries(&self) -> Vec<DataSummary> {
        let demo = self.demo.as_ref();
        let summary = |file, part, is_evaluation| summarize(name(file, part, is_evaluation, demo), file);
        let training = self.training.files.iter().map(|file| summary(file, self.training_source.part, false));
        let evaluation = self.evaluation_source.iter().zip(&self.evaluation);
        let evaluation = evaluation
            .flat_map(|(source, data)| data.files.iter().map(|file| summary(file, source.part, true)));
        training.chain(evaluation).collect()
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

/// Where the pairs to train on come from, and those to evaluate on.
///
/// # Errors
/// Those of the files.
pub fn pair_sources(config: &RunConfig, demo: Option<&Demo>) -> Result<(PairSource, Option<PairSource>)> {
    let built_in = |path: fn(&Demo) -> std::path::PathBuf| demo.map(|demo| PairFiles::from(path(demo)));
    let training = config.data.clone().or_else(|| built_in(Demo::pairs));
    let training = training.ok_or_else(|| Error::bug("the demo is not unpacked"))?;
    let open = |files: &PairFiles, part| PairSource::open(files, &config.columns, part);
    if let Some(share) = config.evaluation.split {
        let held_out = open(&training, Part::Evaluation(share))?;
        return Ok((open(&training, Part::Training(share))?, Some(held_out)));
    }
    let evaluation = match (&config.evaluation.data, &config.data) {
        (Some(files), _) => Some(files.clone()),
        (None, None) => built_in(Demo::evaluation_pairs),
        (None, Some(_)) => None,
    };
    let evaluation = evaluation.map(|files| open(&files, Part::All)).transpose()?;
    Ok((open(&training, Part::All)?, evaluation))
}

/// A data file for people, and what it is for where that is not training.
fn name(file: &FileReport, part: Part, is_evaluation: bool, demo: Option<&Demo>) -> String {
    let built_in = demo.is_some_and(|demo| file.path.starts_with(demo.folder()));
    let file = match built_in {
        true => "the built-in demo".to_string(),
        false => file.path.display().to_string(),
    };
    match part {
        Part::All if is_evaluation => format!("{file}, to evaluate on"),
        Part::All => file,
        Part::Training(share) => format!("{file} without the {share} held out"),
        Part::Evaluation(share) => format!("{file}, the {share} held out"),
    }
}

fn summarize(name: String, file: &FileReport) -> DataSummary {
    let report = &file.report;
    let struck = || Cause::ALL.into_iter().filter(|cause| report.tally(*cause).count > 0);
    let is_drop = |cause: &Cause| cause.policy(&report.policies) == Policy::Drop;
    let by_weight = ("not taken, for the file's weight".to_string(), report.left_out_by_weight);
    let copies = ("more copies of pairs, for the file's weight".to_string(), report.copies);
    let dropped = struck().filter(is_drop).map(|cause| (report.problem(cause), report.tally(cause).dropped));
    let cut = struck().filter(|cause| !is_drop(cause));
    let cut = cut.map(|cause| (report.describe(cause), report.tally(cause).count));
    let some = |(_, count): &(String, usize)| *count > 0;
    DataSummary {
        name,
        read: report.records,
        used: report.pairs + report.copies,
        dropped: dropped.chain([by_weight]).filter(some).collect(),
        cut: cut.chain([copies]).filter(some).collect(),
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
