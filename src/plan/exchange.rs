//! What ranks send each other in a step, by formula, and how much of it computing hides.
//!
//! `R` ranks, `W` trained values, of which `O` lie outside the layers, `A` values of all layers, `L` layers, `M` micro-batches of a
//! rank, `w` bytes of a weight. Gradients travel in f32. A rank sends `(R - 1) / R` of what it reduces or gathers, and twice that to
//! have the sum of everything.
//!
//! | `--shard` | reduced | gathered | beside |
//! |---|---|---|---|
//! | `none` | `2 * 4 W` | | the last backward |
//! | `states` | `4 W` | `w W`, after the update | the last backward |
//! | `gradients` | `4 (W - O) M + 4 O` | `w W`, after the update | every backward |
//! | `weights` | `4 (W - O) M + 4 O` | `w A (2 M - (4 M - 2) / L)`; `w O`, after the update | every forward and backward |
//!
//! With `weights` a layer is gathered for the forward and again for the backward, but for the two that are still there where one
//! turns into the other. A collective takes its bytes at the slowest link on its way, and a latency for each of its steps: trees sum
//! everything in `2 log2 R` steps, and rings reduce or gather pieces in `R - 1`.

use super::rates::Rates;
use super::work::{Trained, Volume, Work};
use crate::config::{MemoryConfig, OffloadConfig, ShardConfig};

/// All ways to shard, in the order in which they keep less.
const SHARDINGS: [ShardConfig; 4] =
    [ShardConfig::None, ShardConfig::States, ShardConfig::Gradients, ShardConfig::Weights];

/// The ways to shard that a run with these options may have, in the order in which they keep less: offloaded states are whole on
/// every rank.
pub fn shardings(memory: &MemoryConfig) -> impl Iterator<Item = ShardConfig> {
    let is_offloaded = memory.offload == OffloadConfig::States;
    SHARDINGS.into_iter().filter(move |&shard| shard == ShardConfig::None || !is_offloaded)
}

/// Bytes of a gradient on its way.
const GRADIENT_BYTES: f64 = 4.0;
/// Share of a link's rate that collectives of many MiB are expected to reach.
const LINK_SHARE: f64 = 0.8;
/// Seconds of one step of a collective inside a machine and between machines: an expectation, as the shares of [`Rates`] are.
const LATENCY: [f64; 2] = [2e-6, 6e-6];

/// How ranks are connected.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Links {
    /// How many ranks there are.
    pub ranks: usize,
    /// Ranks of one machine.
    pub ranks_per_machine: usize,
    /// 10^9 bytes per second and direction of a GPU inside its machine.
    pub inside: f64,
    /// 10^9 bytes per second and direction of a GPU between machines.
    pub between: f64,
}

impl Links {
    /// NVLink of H100 and H200: 900 * 10^9 bytes per second in both directions together.
    pub const NVLINK: f64 = 450.0;
    /// An adapter of 400 Gb/s for each GPU.
    pub const NETWORK: f64 = 50.0;
    /// GPUs of a machine.
    pub const PER_MACHINE: usize = 8;

    fn is_one_machine(&self) -> bool {
        self.ranks <= self.ranks_per_machine
    }

    /// Bytes per second of the slowest link.
    fn rate(&self) -> f64 {
        let slowest = if self.is_one_machine() { self.inside } else { self.inside.min(self.between) };
        slowest * 1e9 * LINK_SHARE
    }

    fn latency(&self) -> f64 {
        LATENCY[usize::from(!self.is_one_machine())]
    }

    /// Seconds of `count` collectives that cut what they move among the ranks, of which each rank sends `bytes` in all.
    fn ring_seconds(&self, bytes: f64, count: f64) -> f64 {
        bytes / self.rate() + count * (self.ranks - 1) as f64 * self.latency()
    }

    /// As [`Links::ring_seconds`], of collectives that give every rank the whole sum.
    fn tree_seconds(&self, bytes: f64, count: f64) -> f64 {
        bytes / self.rate() + count * 2.0 * (self.ranks as f64).log2().ceil() * self.latency()
    }
}

/// What one rank sends in a step, and what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Exchange {
    /// What is cut among the ranks.
    #[serde(skip)]
    pub shard: ShardConfig,
    /// Bytes of gradients that a rank sends.
    pub reduced: f64,
    /// Bytes of weights that a rank sends.
    pub gathered: f64,
    /// Seconds that all of it takes.
    pub seconds: f64,
    /// The part of them that computing does not hide.
    pub exposed: f64,
}

/// A rank's step: what it computes, and how long that takes alone.
#[derive(Clone, Copy, Debug)]
pub struct RankStep {
    /// What the rank's own pairs hold.
    pub volume: Volume,
    /// Seconds of forward and backward.
    pub computing: f64,
    /// Seconds of an update of all trained values.
    pub updating: f64,
}

impl RankStep {
    /// One rank's part of a step of `volume`. `work` gives the work of a volume.
    pub fn of(volume: &Volume, work: impl Fn(&Volume) -> Work, rates: &Rates, links: &Links) -> Self {
        let share = 1.0 / links.ranks as f64;
        let volume = volume.share(share, (volume.micro_batches * share).max(1.0));
        let work = work(&volume);
        let computing = Work { update_bytes: 0.0, ..work }.seconds(rates);
        RankStep { volume, computing, updating: work.seconds(rates) - computing }
    }

    /// Seconds of the step with this exchange: states that are cut among the ranks are updated by each in its part.
    pub fn seconds(&self, exchange: &Exchange, links: &Links) -> f64 {
        let ranks = if exchange.shard == ShardConfig::None { 1.0 } else { links.ranks as f64 };
        self.computing + self.updating / ranks + exchange.exposed
    }
}

impl Exchange {
    /// The exchange of a rank's step. `size` is the bytes of a weight, `layers` the model's layers, each of which is a
    /// collective of its own.
    pub fn of(
        shard: ShardConfig,
        trained: &Trained,
        (size, layers): (usize, usize),
        step: &RankStep,
        links: &Links,
    ) -> Self {
        let sent = (links.ranks - 1) as f64 / links.ranks as f64;
        let gradients = |values: f64| sent * GRADIENT_BYTES * values;
        let weights = |values: f64| sent * size as f64 * values;
        let (batches, layers) = (step.volume.micro_batches, layers as f64);
        let (in_layers, outside) = (trained.layer_parameters(), trained.trained_outside_layers());
        let backward = trained.backward_share() * step.computing;
        let trained = trained.trained_parameters();
        // Layers that are gathered in a step.
        let passes = if layers > 2.0 { 2.0 * layers * batches - 4.0 * batches + 2.0 } else { layers };
        let reduced = match shard {
            ShardConfig::None => 2.0 * gradients(trained),
            ShardConfig::States => gradients(trained),
            ShardConfig::Gradients | ShardConfig::Weights => {
                gradients(trained - outside) * batches + gradients(outside)
            }
        };
        let gathered = match shard {
            ShardConfig::None => 0.0,
            ShardConfig::States | ShardConfig::Gradients => weights(trained),
            ShardConfig::Weights => weights(in_layers / layers) * passes + weights(outside),
        };
        let reducing = match shard {
            ShardConfig::None => links.tree_seconds(reduced, layers),
            ShardConfig::States => links.ring_seconds(reduced, layers),
            ShardConfig::Gradients | ShardConfig::Weights => links.ring_seconds(reduced, layers * batches),
        };
        let gathering = match shard {
            ShardConfig::None => 0.0,
            ShardConfig::States | ShardConfig::Gradients => links.ring_seconds(gathered, layers),
            ShardConfig::Weights => links.ring_seconds(gathered, passes),
        };
        let exposed = match shard {
            ShardConfig::None => reducing - backward / batches,
            ShardConfig::States => (reducing - backward / batches).max(0.0) + gathering,
            ShardConfig::Gradients => (reducing - backward).max(0.0) + gathering,
            ShardConfig::Weights => reducing + gathering - step.computing,
        };
        Exchange { shard, reduced, gathered, seconds: reducing + gathering, exposed: exposed.max(0.0) }
    }
}

/// Tokens that a rank must compute in a micro-batch for its backward to last as long as the exchange beside it, whatever the size of the
/// model. `trained` is the share of the model's values that is trained. Each value costs 2 operations a token for the gradient of its
/// input, and a trained one 2 more for its own gradient, of 4 bytes, which are sent twice where everything is summed everywhere.
pub fn hiding_tokens(shard: ShardConfig, trained: f64, rates: &Rates, links: &Links) -> f64 {
    let sent = (links.ranks - 1) as f64 / links.ranks as f64;
    let gradients = trained * GRADIENT_BYTES;
    let bytes = match shard {
        ShardConfig::None => 2.0 * gradients,
        ShardConfig::States | ShardConfig::Gradients => gradients,
        // The weights too, in bf16.
        ShardConfig::Weights => gradients + 2.0,
    };
    let operations = 2.0 + 2.0 * trained;
    let operations_per_second = rates.tflops * 1e12 * Rates::GEMM_SHARE;
    sent * bytes / links.rate() * operations_per_second / operations
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::shapes;

    fn links(ranks: usize) -> Links {
        Links { ranks, ranks_per_machine: Links::PER_MACHINE, inside: Links::NVLINK, between: Links::NETWORK }
    }

    fn exchange(shard: ShardConfig, ranks: usize, micro_batches: f64, seconds: f64) -> Exchange {
        let trained = Trained::new(&shapes::model("llama-3-8b", None).unwrap(), None);
        let volume = Volume { micro_batches, ..Volume::default() };
        let step = RankStep { volume, computing: seconds, updating: 0.0 };
        Exchange::of(shard, &trained, (2, 32), &step, &links(ranks))
    }

    /// The volumes that Rajbhandari et al., ZeRO (2020), state in section 7, there with two bytes for a gradient and one
    /// micro-batch: stages 1 and 2 move no more than data parallelism, stage 3 half as much again.
    #[test]
    fn the_volumes_are_those_of_the_zero_paper() {
        let values = Trained::new(&shapes::model("llama-3-8b", None).unwrap(), None).parameters();
        let sent = |shard| {
            let exchange = exchange(shard, 1 << 20, 1.0, 1.0);
            // Gradients of four bytes count as of two.
            (exchange.reduced / 2.0 + exchange.gathered) / (2.0 * values)
        };
        for (shard, wanted) in SHARDINGS.into_iter().zip([2.0, 2.0, 2.0]) {
            assert!((sent(shard) - wanted).abs() <= 1e-4, "{shard:?}: {}", sent(shard));
        }
        // Less by the two layers that are gathered once, and by embedding and head, which are never cut.
        assert!((2.7..3.0).contains(&sent(ShardConfig::Weights)), "{}", sent(ShardConfig::Weights));
    }

    #[test]
    fn long_computing_hides_what_runs_beside_it_and_nothing_else() {
        let at = |shard| exchange(shard, 8, 1.0, 1e3);
        assert_eq!(at(ShardConfig::None).exposed, 0.0);
        assert_eq!(at(ShardConfig::Weights).exposed, 0.0);
        let states = at(ShardConfig::States);
        assert!(states.exposed > 0.0 && states.exposed < states.seconds, "the gathering is seen: {states:?}");
        let short = exchange(ShardConfig::None, 8, 1.0, 0.0);
        assert_eq!(short.exposed, short.seconds);
    }

    /// With as many tokens as are said to hide it, the reduction takes as long as the backward, but for latency.
    #[test]
    fn the_tokens_that_hide_the_exchange_do() {
        let (rates, links) = (Rates { tflops: 989.4, bandwidth: 3350.0, bus: Rates::PCIE_5 }, links(64));
        let tokens = hiding_tokens(ShardConfig::None, 1.0, &rates, &links);
        let trained = Trained::new(&shapes::model("llama-3-8b", None).unwrap(), None);
        let backward = 4.0 * tokens * trained.parameters() / (rates.tflops * 1e12 * Rates::GEMM_SHARE);
        let seconds = 3.0 * backward / 2.0;
        let volume = Volume { micro_batches: 1.0, ..Volume::default() };
        let step = RankStep { volume, computing: seconds, updating: 0.0 };
        let exchange = Exchange::of(ShardConfig::None, &trained, (2, 32), &step, &links);
        let ratio = exchange.seconds / backward;
        assert!((ratio - 1.0).abs() <= 0.02, "{ratio}");
    }

    /// Adapters send a hundredth of what full training sends, and their backward takes half of a micro-batch: the tokens that hide it
    /// are those of this small part alone.
    #[test]
    fn the_exchange_of_adapters_is_hidden_by_fewer_tokens() {
        use crate::model::{AdaptedModule, AdaptedModules, LoraSettings};
        let (rates, links) = (Rates { tflops: 989.4, bandwidth: 3350.0, bus: Rates::PCIE_5 }, links(64));
        let modules = AdaptedModules::of(AdaptedModule::ALL);
        let lora = LoraSettings { modules, rank: 16, alpha: 16.0, dropout: 0.0, rslora: false };
        let trained = Trained::new(&shapes::model("llama-3-8b", None).unwrap(), Some(&lora));
        let share = trained.trained_parameters() / trained.parameters();
        let tokens = hiding_tokens(ShardConfig::States, share, &rates, &links);
        let all = hiding_tokens(ShardConfig::States, 1.0, &rates, &links);
        assert!(tokens < all / 50.0, "{tokens} of {all}");
        let operations = (2.0 + 2.0 * share) * tokens * trained.parameters();
        let backward = operations / (rates.tflops * 1e12 * Rates::GEMM_SHARE);
        let volume = Volume { micro_batches: 1.0, ..Volume::default() };
        let step = RankStep { volume, computing: 2.0 * backward, updating: 0.0 };
        let sent = Exchange::of(ShardConfig::States, &trained, (2, 32), &step, &links);
        let seconds = sent.reduced / links.rate();
        assert!((seconds / backward - 1.0).abs() <= 0.02, "{seconds} {backward}");
        assert_eq!(trained.backward_share(), 0.5);
    }

    #[test]
    fn the_network_counts_where_ranks_do_not_fit_into_one_machine() {
        let (one, two) =
            (exchange(ShardConfig::None, 8, 1.0, 0.0), exchange(ShardConfig::None, 16, 1.0, 0.0));
        assert!(two.seconds > 8.0 * one.seconds, "{one:?} {two:?}");
    }
}
