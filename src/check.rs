//! `mmpo-fast check`: what a model's tokenizer makes of pairs, told before anything is trained. No weights are read and
//! no device is used.

mod account;
mod page;
mod shown;
mod survey;
mod terminal;

use std::path::Path;

pub use account::Account;

use crate::checkpoint::atomic;
use crate::config::{AskedLengths, CheckConfig, LengthLimits};
use crate::data::{
    EncodedRecord, PairCache, PairSource, Part, TextEncoder, TokenizedPair, Treatment, load_cached,
};
use crate::device::LargeBlocks;
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::model::LlamaConfig;
use crate::report::{print_result, print_styled, wants_color_on};
use survey::Survey;

/// Prints the account of `config`'s pairs, and writes the page where one is asked for.
///
/// # Errors
/// Those of the model's config and tokenizer; [`Error::Data`] after the account where a training run would end, or
/// where no pair is left.
pub fn run(config: &CheckConfig) -> Result<()> {
    interrupt::install()?;
    let account = match config.threads {
        None => survey(config)?,
        Some(threads) => {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
                Error::device(format!("cannot start {threads} threads: {error}"), "lower --threads")
            })?;
            pool.install(|| survey(config))?
        }
    };
    if let Some(path) = &config.html {
        atomic::write_file(path, page::write(&account)?.as_bytes())?;
    }
    match config.json {
        true => print_result(&account.to_json()?)?,
        false => print_styled(&terminal::write(
            &account,
            config.color.unwrap_or_else(|| wants_color_on(&std::io::stdout())),
        ))?,
    };
    if let (Some(path), false) = (&config.html, config.json) {
        print_result(&format!("page    {}\n", path.display()))?;
    }
    account.verdict()
}

/// Reads everything and makes the account.
fn survey(config: &CheckConfig) -> Result<Account> {
    let folder = hub::model(&config.model)?;
    let files = hub::pairs(&config.data)?;
    let model = LlamaConfig::from_folder(&folder)?;
    let limits = limits(config.asked_lengths, &model, &folder)?;
    let encoder = TextEncoder::load(&folder, config.chat_template.as_deref())?.at(config.template_date)?;
    let source = PairSource::open(&files, &config.columns, Part::All)?;
    let treatment =
        Treatment { limits, policies: config.policies, min_score_gap: config.min_score_gap, tolerant: true };
    let cache = PairCache::of(config.data_cache.as_ref())?;
    let mut survey = Survey::new(&encoder, config.shown)?;
    let memory = LargeBlocks::give_back();
    let mut observe = |record: &EncodedRecord| survey.add(record);
    let dataset = load_cached(&source, &encoder, treatment, cache.as_ref(), Some(&mut observe))?;
    drop(memory);
    interrupt::check()?;
    dataset.check_vocabulary(model.vocab_size, &folder)?;
    let account = Account::new(&folder, &model, &encoder, &dataset, &survey, config)?;
    let longest = dataset.pairs.iter().map(TokenizedPair::positions).max().unwrap_or(0);
    if let Some(positions) = model.rope.positions().filter(|positions| longest > *positions) {
        return Err(Error::model(
            &folder,
            format!(
                "the longest pair has {longest} positions, and the rope of this model holds for {positions}"
            ),
            format!("give --max-length {positions} or less"),
        ));
    }
    Ok(account)
}

fn limits(asked: AskedLengths, model: &LlamaConfig, folder: &Path) -> Result<LengthLimits> {
    let limits = asked.limits(Some(model.context()))?;
    if limits.max_length > model.context().max(AskedLengths::LEAST) {
        tracing::warn!(
            "max_length {} is beyond the context of {}, {} positions: the model was not trained for longer sequences",
            limits.max_length,
            folder.display(),
            model.context()
        );
    }
    Ok(limits)
}
