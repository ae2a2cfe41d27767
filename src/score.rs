//! `mmpo-fast score`: log-probs of pairs under a model, one line per pair.

mod explain;
mod output;
mod scorer;

use std::sync::Arc;

pub use explain::{ExplainedPair, ExplainedResponse, ExplainedToken, explain};
pub use scorer::{PairScore, ScoredModel, Scorer, ShardedForward, TokenLogps};
use serde::Serialize;

use crate::checkpoint::{AdapterFolder, ModelFolder};
use crate::config::ScoreConfig;
use crate::context;
use crate::data::{
    PairCache, PairDataset, PairSource, Part, TextEncoder, TokenizedPair, Treatment, load_cached,
};
use crate::device::{Device, DeviceTask, LargeBlocks, run_on};
use crate::error::{Error, Result};
use crate::foreign::hub;
use crate::interrupt;
use crate::model::Llama;
use crate::report::{Progress, print_notice, print_result};
use output::ScoreOutput;

/// A line of the output file. Log-probs and entropies are sums over the response's tokens, in nats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ScoreLine {
    /// 1-based record of the data, over all its files.
    pub record: usize,
    /// Log-prob of the chosen response.
    pub logp_chosen: f64,
    /// Log-prob of the rejected response.
    pub logp_rejected: f64,
    /// Scored tokens of the chosen response.
    pub tokens_chosen: usize,
    /// Scored tokens of the rejected response.
    pub tokens_rejected: usize,
    /// Entropy along the chosen response.
    pub entropy_chosen: f64,
    /// Entropy along the rejected response.
    pub entropy_rejected: f64,
    /// The rewards, where there is a reference.
    #[serde(flatten)]
    pub rewards: Option<Rewards>,
}

/// `beta * (logp - reference logp)`, as DPO has them; only with a reference.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rewards {
    /// The reward of the chosen response.
    pub reward_chosen: f64,
    /// The reward of the rejected response.
    pub reward_rejected: f64,
    /// The chosen response's reward less the rejected one's.
    pub margin: f64,
}

/// Scores all pairs of `config.data`; the output file appears whole or not at all.
///
/// # Errors
/// Those of model folders, data, device and output; [`Error::Numerics`] for scores that are not finite.
pub fn run(config: &ScoreConfig) -> Result<()> {
    interrupt::install()?;
    let config = &located(config)?;
    let output = ScoreOutput::check(config)?;
    let folder = ModelFolder::open(&config.model)?;
    folder.check_finite()?;
    let adapter =
        config.adapter.as_deref().map(|path| AdapterFolder::open(path, folder.config())).transpose()?;
    let reference = config.reference.as_deref().map(ModelFolder::open).transpose()?;
    let models: Vec<&ModelFolder> = std::iter::once(&folder).chain(&reference).collect();
    let limits = context::limits(config.asked_lengths, &models)?;
    let text_folder = context::text_folder(&config.model, config.adapter.as_deref());
    let encoder = TextEncoder::load(text_folder, config.chat_template.as_deref())?.at(config.template_date)?;
    let source = PairSource::open(&config.data, &config.columns, Part::All)?;
    let treatment =
        Treatment { limits, policies: config.policies, min_score_gap: config.min_score_gap, tolerant: false };
    let cache = PairCache::of(config.data_cache.as_ref())?;
    let memory = LargeBlocks::give_back();
    let dataset = load_cached(&source, &encoder, treatment, cache.as_ref(), None)?;
    drop(memory);
    dataset.check_vocabulary(folder.config().vocab_size, &config.model)?;
    dataset.log();
    if let Some(reference) = &reference {
        reference.check_finite()?;
        dataset.check_vocabulary(reference.config().vocab_size, reference.path())?;
    }
    let longest = dataset.pairs.iter().map(TokenizedPair::positions).max().unwrap_or(0);
    models.iter().try_for_each(|model| context::check_pairs(model, longest))?;
    output.check_writable()?;
    interrupt::check()?;
    let scoring = Scoring { config, folder, adapter, reference, dataset: &dataset };
    let Scored { lines, tokens } = run_on(config.device, config.precision, config.threads, scoring)?;
    write_lines(&output, &lines)?;
    match &config.explain {
        Some(how) => explain::show(&explain(&encoder, &dataset.pairs, &tokens)?, how, &output),
        None => Ok(()),
    }
}

/// Writes the scores, and their means for a person.
fn write_lines(output: &ScoreOutput, lines: &[ScoreLine]) -> Result<()> {
    let mut text = String::new();
    for line in lines {
        let json = serde_json::to_string(line)
            .map_err(|error| Error::bug(format!("a score is no JSON: {error}")))?;
        text.push_str(&json);
        text.push('\n');
    }
    output.write(&text)?;
    match output {
        ScoreOutput::StandardOutput => print_notice(summary(lines).trim_end()),
        ScoreOutput::File(path) => {
            print_result(&format!("{}scores  {}\n", summary(lines), path.display()))?;
        }
        ScoreOutput::Nowhere => {}
    }
    Ok(())
}

/// The configuration with names of the Hub replaced by folders of its cache.
fn located(config: &ScoreConfig) -> Result<ScoreConfig> {
    Ok(ScoreConfig {
        model: hub::model(&config.model)?,
        reference: config.reference.as_deref().map(hub::model).transpose()?,
        data: hub::pairs(&config.data)?,
        ..config.clone()
    })
}

struct Scoring<'a> {
    config: &'a ScoreConfig,
    folder: ModelFolder,
    adapter: Option<AdapterFolder>,
    reference: Option<ModelFolder>,
    dataset: &'a PairDataset,
}

/// What the device is asked for.
struct Scored {
    lines: Vec<ScoreLine>,
    /// The tokens of the explained pairs, under the policy and under the reference.
    tokens: Vec<[TokenLogps; 2]>,
}

/// What one model says: of all pairs where scores are asked for, and of the tokens of the explained pairs.
type Said = (Vec<PairScore>, Vec<TokenLogps>);

impl DeviceTask for Scoring<'_> {
    type Output = Scored;

    fn run<D: Device>(self, device: Arc<D>) -> Result<Scored> {
        let (policy, tokens) =
            self.scores(&device, (&self.folder, self.adapter.as_ref()), "scoring", true)?;
        let (reference, reference_tokens) = match (&self.reference, &self.config.explain) {
            (Some(folder), _) => {
                let (scores, tokens) =
                    self.scores(&device, (folder, None), "scoring the reference", false)?;
                (Some(scores), tokens)
            }
            // The model without its adapter is the reference.
            (None, Some(_)) => (None, self.tokens(&self.load(&device, (&self.folder, None))?)?),
            (None, None) => (None, Vec::new()),
        };
        let pairs = self.dataset.pairs.iter().zip(&policy).enumerate();
        let lines = pairs
            .map(|(index, (pair, score))| {
                let reference = reference.as_ref().map(|scores| &scores[index]);
                let line = score_line(pair, score, reference, self.config.beta);
                line.check_finite(self.config.beta).map(|()| line)
            })
            .collect::<Result<_>>()?;
        Ok(Scored { lines, tokens: tokens.into_iter().zip(reference_tokens).map(<[_; 2]>::from).collect() })
    }
}

impl Scoring<'_> {
    fn scores<D: Device>(
        &self,
        device: &Arc<D>,
        (folder, adapter): (&ModelFolder, Option<&AdapterFolder>),
        label: &str,
        entropy: bool,
    ) -> Result<Said> {
        let pairs = &self.dataset.pairs;
        let model = self.load(device, (folder, adapter))?;
        let tokens = self.tokens(&model)?;
        if self.config.output.is_none() {
            return Ok((Vec::new(), tokens));
        }
        let mut progress = Progress::start(label, "pairs", pairs.len(), 0);
        let mut scorer = Scorer::new(&model, pairs, self.config.tokens_per_micro_batch)?;
        let scores = scorer.run(entropy, |done| progress.advance(done, String::new))?;
        Ok((scores, tokens))
    }

    fn load<D: Device>(
        &self,
        device: &Arc<D>,
        (folder, adapter): (&ModelFolder, Option<&AdapterFolder>),
    ) -> Result<Llama<D>> {
        let longest = self.dataset.pairs.iter().map(TokenizedPair::positions).max().unwrap_or(0);
        let mut model = Llama::load_frozen(Arc::clone(device), folder, longest)?;
        if let Some(adapter) = adapter {
            adapter.attach(&mut model)?;
        }
        Ok(model)
    }

    /// Log-probs of the tokens of the explained pairs.
    fn tokens<D: Device>(&self, model: &Llama<D>) -> Result<Vec<TokenLogps>> {
        let Some(explain) = &self.config.explain else { return Ok(Vec::new()) };
        let pairs = &self.dataset.pairs[..explain.pairs.min(self.dataset.pairs.len())];
        Scorer::new(model, pairs, self.config.tokens_per_micro_batch)?.token_logps()
    }
}

impl ScoreLine {
    /// Fails for a reward that is not finite: JSON has no infinity, and would have a null in its place.
    fn check_finite(&self, beta: f64) -> Result<()> {
        match self.rewards {
            Some(rewards) if !rewards.margin.is_finite() => Err(Error::numerics(
                format!("record {}: with `--beta` = {beta} the rewards are not finite", self.record),
                "choose a smaller --beta; 0.1 is DPO's own",
            )),
            _ => Ok(()),
        }
    }
}

fn score_line(
    pair: &TokenizedPair,
    score: &PairScore,
    reference: Option<&PairScore>,
    beta: f64,
) -> ScoreLine {
    let rewards = reference.map(|reference| {
        let reward_chosen = beta * (score.logp_chosen - reference.logp_chosen);
        let reward_rejected = beta * (score.logp_rejected - reference.logp_rejected);
        Rewards { reward_chosen, reward_rejected, margin: reward_chosen - reward_rejected }
    });
    ScoreLine {
        record: pair.record + 1,
        logp_chosen: score.logp_chosen,
        logp_rejected: score.logp_rejected,
        tokens_chosen: score.tokens_chosen,
        tokens_rejected: score.tokens_rejected,
        entropy_chosen: score.entropy_chosen,
        entropy_rejected: score.entropy_rejected,
        rewards,
    }
}

/// The table that the command prints at its end.
fn summary(lines: &[ScoreLine]) -> String {
    let mean =
        |value: &dyn Fn(&ScoreLine) -> f64| lines.iter().map(value).sum::<f64>() / lines.len().max(1) as f64;
    let share = |holds: &dyn Fn(&ScoreLine) -> bool| 100.0 * mean(&|line| f64::from(u8::from(holds(line))));
    let mut rows = vec![
        ("pairs", format!("{}", lines.len()), String::new()),
        ("log-prob", number(mean(&|l| l.logp_chosen)), number(mean(&|l| l.logp_rejected))),
        (
            "log-prob a token",
            number(mean(&|l| l.logp_chosen / l.tokens_chosen.max(1) as f64)),
            number(mean(&|l| l.logp_rejected / l.tokens_rejected.max(1) as f64)),
        ),
        ("entropy", number(mean(&|l| l.entropy_chosen)), number(mean(&|l| l.entropy_rejected))),
        ("tokens", number(mean(&|l| l.tokens_chosen as f64)), number(mean(&|l| l.tokens_rejected as f64))),
        ("chosen likelier", format!("{:.1} %", share(&|l| l.logp_chosen > l.logp_rejected)), String::new()),
    ];
    if lines.iter().any(|line| line.rewards.is_some()) {
        let reward = |value: fn(&Rewards) -> f64| mean(&|line| line.rewards.as_ref().map_or(0.0, value));
        // A model beside itself gains nothing anywhere: each pair is a tie, and counts as half.
        let won = |rewards: Rewards| match rewards.margin == 0.0 {
            true => 0.5,
            false => f64::from(u8::from(rewards.margin > 0.0)),
        };
        let accuracy = 100.0 * mean(&|line| line.rewards.map_or(0.0, won));
        rows.push(("reward", number(reward(|r| r.reward_chosen)), number(reward(|r| r.reward_rejected))));
        rows.push(("reward margin", number(reward(|r| r.margin)), String::new()));
        rows.push(("reward accuracy", format!("{accuracy:.1} %"), String::new()));
    }
    let mut text = format!("{:<18} {:>12} {:>12}\n", "mean of pairs", "chosen", "rejected");
    for (name, chosen, rejected) in rows {
        text.push_str(format!("{name:<18} {chosen:>12} {rejected:>12}").trim_end());
        text.push('\n');
    }
    text
}

fn number(value: f64) -> String {
    format!("{value:.4}")
}
