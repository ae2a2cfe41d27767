//! Which options take less memory, in the order of the time that they cost.

use super::footprint::{Choice, Footprint};
use crate::config::{GradientConfig, MemoryConfig, OffloadConfig};
use crate::error::Result;
use crate::model::Recompute;
use crate::optimizer::{MasterWeights, MomentFormat, StateOptions};

/// A combination of options, and what it costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The options.
    pub choice: Choice,
    /// Time of a step beside that of the run as it was asked for.
    pub time: f64,
}

/// A candidate whose memory is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tried {
    /// The options and their time.
    pub candidate: Candidate,
    /// Their memory.
    pub footprint: Footprint,
}

/// What decides which combinations there are.
#[derive(Clone, Copy, Debug)]
pub struct Room<'a> {
    /// The run as it was asked for: nothing keeps more than that.
    pub asked: Choice,
    /// Tokens of the largest pair: a smaller micro-batch saves nothing.
    pub largest_pair: usize,
    /// Tokens of the largest micro-batch that the run makes room for: a budget that is not below them saves nothing.
    pub largest_batch: usize,
    /// Whether states may be offloaded: a GPU's host has memory of its own.
    pub can_offload: bool,
    /// Budgets with which gradients may be applied layer by layer.
    pub layer_budgets: &'a [usize],
}

/// All combinations that keep no more than `room.asked`, which is among them: those that lose least time first; of those that lose
/// as much, first those whose numbers stay nearest to what was asked for.
pub fn candidates(room: Room<'_>, seconds: impl Fn(&Choice) -> f64) -> Vec<Candidate> {
    let asked = room.asked;
    let base = seconds(&asked);
    let mut found = Vec::new();
    for token_budget in budgets(room) {
        for memory in memories(asked.memory, room.can_offload) {
            let is_layer = memory.gradients == GradientConfig::Layer;
            if is_layer && asked.memory != memory && !room.layer_budgets.contains(&token_budget) {
                continue;
            }
            let choice = Choice { memory, token_budget, ..asked };
            // No choice is taken because it is faster: it would change numbers for nothing.
            let time = (seconds(&choice) / base).max(1.0);
            found.push(Candidate { choice, time });
        }
    }
    let percent = |candidate: &Candidate| (100.0 * (candidate.time - 1.0)).round() as u64;
    found.sort_by_key(|candidate| {
        let changed = changes(&asked, &candidate.choice);
        (percent(candidate), numerical_changes(&asked, &candidate.choice), changed)
    });
    found
}

/// Token budgets from the one asked for down to that of a single pair, each half of the one before.
pub fn budgets(room: Room<'_>) -> Vec<usize> {
    let asked = room.asked.token_budget;
    let halves = std::iter::successors(Some(asked / 2), |budget| Some(budget / 2));
    let smaller = halves.take_while(|&budget| budget > room.largest_pair);
    let smaller = smaller.filter(|&budget| budget < room.largest_batch);
    let mut budgets: Vec<usize> = std::iter::once(asked).chain(smaller).collect();
    if (1..room.largest_batch.min(asked)).contains(&room.largest_pair) {
        budgets.push(room.largest_pair);
    }
    budgets
}

/// The values of each option that keep no more than a run as it was asked for.
struct Values {
    moments: Vec<MomentFormat>,
    masters: Vec<MasterWeights>,
    recomputes: Vec<Recompute>,
    gradients: Vec<GradientConfig>,
    offloads: Vec<OffloadConfig>,
}

impl Values {
    fn of(asked: MemoryConfig, can_offload: bool) -> Self {
        let smaller: &[OffloadConfig] = if can_offload { &[OffloadConfig::States] } else { &[] };
        Values {
            // Moments in bf16 take twice the memory of 8-bit ones and are no more exact: see docs/memory.md.
            moments: at_least(asked.states.moments, &[MomentFormat::EightBit]),
            masters: match asked.states.master {
                MasterWeights::F32 => vec![MasterWeights::F32, MasterWeights::Split, MasterWeights::None],
                MasterWeights::Split => vec![MasterWeights::Split, MasterWeights::None],
                MasterWeights::None => vec![MasterWeights::None],
            },
            recomputes: match asked.recompute {
                Recompute::None => vec![Recompute::None, Recompute::Selective, Recompute::Layer],
                Recompute::Selective => vec![Recompute::Selective, Recompute::Layer],
                Recompute::Layer => vec![Recompute::Layer],
            },
            gradients: match asked.gradients {
                GradientConfig::F32 => vec![GradientConfig::F32, GradientConfig::Bf16, GradientConfig::Layer],
                GradientConfig::Bf16 => vec![GradientConfig::Bf16, GradientConfig::Layer],
                GradientConfig::Layer => vec![GradientConfig::Layer],
            },
            offloads: at_least(asked.offload, smaller),
        }
    }
}

fn memories(asked: MemoryConfig, can_offload: bool) -> Vec<MemoryConfig> {
    let Values { moments, masters, recomputes, gradients, offloads } = Values::of(asked, can_offload);
    let mut all = Vec::new();
    for &recompute in &recomputes {
        for &gradients in &gradients {
            for &master in &masters {
                for &moments in &moments {
                    for &offload in &offloads {
                        let states = StateOptions { moments, master };
                        all.push(MemoryConfig { states, recompute, gradients, offload, ..asked });
                    }
                }
            }
        }
    }
    all
}

/// What an earlier part of a run has, where the run is asked for now as `asked`: each option that keeps no more than that. One that
/// keeps more was not chosen for this run, but is asked for in another way, and that holds.
pub fn still_chosen(asked: &Choice, before: &Choice) -> Choice {
    fn either<T: Copy + PartialEq>(allowed: &[T], before: T, asked: T) -> T {
        if allowed.contains(&before) { before } else { asked }
    }
    let (now, then) = (asked.memory, before.memory);
    let values = Values::of(now, true);
    let states = StateOptions {
        moments: either(&values.moments, then.states.moments, now.states.moments),
        master: either(&values.masters, then.states.master, now.states.master),
    };
    let memory = MemoryConfig {
        states,
        recompute: either(&values.recomputes, then.recompute, now.recompute),
        gradients: either(&values.gradients, then.gradients, now.gradients),
        offload: either(&values.offloads, then.offload, now.offload),
        shard: now.shard,
    };
    Choice { memory, token_budget: asked.token_budget.min(before.token_budget), head: asked.head }
}

/// `asked`, and those of `smaller` that are others.
fn at_least<T: Copy + PartialEq>(asked: T, smaller: &[T]) -> Vec<T> {
    std::iter::once(asked).chain(smaller.iter().copied().filter(|&other| other != asked)).collect()
}

/// How far the numbers are from those that were asked for: a rank.
fn numerical_changes(asked: &Choice, choice: &Choice) -> usize {
    let sums =
        asked.memory.gradients != choice.memory.gradients && choice.memory.gradients == GradientConfig::Bf16;
    let (asked, choice) = (asked.memory.states, choice.memory.states);
    // A split master copy differs from a whole one in the last bit of one in 65,536 values. A bf16 sum is off by a 512th at most with
    // each micro-batch, an 8-bit moment by some hundredths; stochastic rounding moves weights further from f32's than either.
    let master = match choice.master {
        master if master == asked.master => 0,
        MasterWeights::Split => 1,
        _ => 8,
    };
    master + 2 * usize::from(sums) + 4 * usize::from(asked.moments != choice.moments)
}

/// How many options differ.
fn changes(asked: &Choice, choice: &Choice) -> usize {
    flags(asked, choice).len()
}

/// The flags of the command line that turn `asked` into `choice`.
pub fn flags(asked: &Choice, choice: &Choice) -> Vec<String> {
    let (before, after) = (asked.memory, choice.memory);
    let flag = |differs: bool, text: String| differs.then_some(text);
    [
        flag(
            before.states.moments != after.states.moments,
            format!("--optimizer-states {}", after.states.moments),
        ),
        flag(
            before.states.master != after.states.master,
            format!("--master-weights {}", after.states.master),
        ),
        flag(before.gradients != after.gradients, format!("--gradients {}", after.gradients)),
        flag(before.offload != after.offload, format!("--offload {}", after.offload)),
        flag(before.recompute != after.recompute, format!("--recompute {}", after.recompute)),
        flag(
            asked.token_budget != choice.token_budget,
            format!("--tokens-per-micro-batch {}", choice.token_budget),
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Tries candidates in their order until `wanted` of them fit into `limit` bytes; returns all that were tried. Where those that
/// keep least do not fit, none does, and the smallest alone is returned.
///
/// # Errors
/// Those of `footprint`.
pub fn try_in_order(
    candidates: &[Candidate],
    limit: usize,
    wanted: usize,
    mut footprint: impl FnMut(&Choice) -> Result<Footprint>,
) -> Result<Vec<Tried>> {
    let mut smallest: Option<Tried> = None;
    for gradients in [GradientConfig::F32, GradientConfig::Bf16, GradientConfig::Layer] {
        let Some(candidate) = least(candidates, gradients) else { continue };
        let tried = Tried { candidate, footprint: footprint(&candidate.choice)? };
        if smallest.is_none_or(|smallest| tried.footprint.taken < smallest.footprint.taken) {
            smallest = Some(tried);
        }
    }
    if let Some(smallest) = smallest.filter(|smallest| smallest.footprint.taken > limit) {
        return Ok(vec![smallest]);
    }
    let mut tried = Vec::new();
    let mut fitting = 0;
    for &candidate in candidates {
        let footprint = footprint(&candidate.choice)?;
        tried.push(Tried { candidate, footprint });
        fitting += usize::from(footprint.taken <= limit);
        if fitting == wanted {
            break;
        }
    }
    Ok(tried)
}

/// The candidate that keeps least of those with these gradients: with others, micro-batches of other sizes are possible.
fn least(candidates: &[Candidate], gradients: GradientConfig) -> Option<Candidate> {
    let kept = |candidate: &&Candidate| {
        let Choice { memory, token_budget, .. } = candidate.choice;
        let moments = memory.states.moments.bytes(1 << 20);
        let recompute = match memory.recompute {
            Recompute::None => 2,
            Recompute::Selective => 1,
            Recompute::Layer => 0,
        };
        let master = memory.states.master.bytes();
        let resident = memory.offload == OffloadConfig::None;
        (resident, master, moments, recompute, token_budget)
    };
    candidates.iter().filter(|one| one.choice.memory.gradients == gradients).min_by_key(kept).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ShardConfig;
    use crate::model::HeadOptions;

    fn asked() -> Choice {
        Choice { memory: MemoryConfig::default(), token_budget: 4096, head: HeadOptions::default() }
    }

    /// Recomputation and small batches cost time; states cost none.
    fn seconds(choice: &Choice) -> f64 {
        let recompute = match choice.memory.recompute {
            Recompute::None => 0.0,
            Recompute::Selective => 0.18,
            Recompute::Layer => 0.3,
        };
        1.0 + recompute + 100.0 / choice.token_budget as f64
    }

    #[test]
    fn the_first_candidates_are_the_run_as_asked_and_what_costs_no_time() {
        let room = Room {
            asked: asked(),
            largest_pair: 1500,
            largest_batch: 4096,
            can_offload: false,
            layer_budgets: &[4096],
        };
        let all = candidates(room, seconds);
        assert_eq!(all[0].choice, asked());
        let names: Vec<String> =
            all.iter().take(7).map(|candidate| flags(&asked(), &candidate.choice).join(" ")).collect();
        assert_eq!(
            names,
            [
                "",
                "--gradients layer",
                "--master-weights split",
                "--master-weights split --gradients layer",
                "--gradients bf16",
                "--master-weights split --gradients bf16",
                "--optimizer-states 8bit"
            ]
        );
        assert!(all.windows(2).all(|two| two[0].time <= two[1].time + 0.01), "{all:?}");
        assert_eq!(budgets(room), [4096, 2048, 1500]);
        assert_eq!(budgets(Room { largest_batch: 2048, ..room }), [4096, 1500]);
        assert_eq!(budgets(Room { largest_pair: 5000, largest_batch: 5000, ..room }), [4096]);
        // With several micro-batches in a step, gradients are not applied layer by layer.
        let layered = all.iter().filter(|one| one.choice.memory.gradients == GradientConfig::Layer);
        assert!(layered.into_iter().all(|one| one.choice.token_budget == 4096));
    }

    #[test]
    fn nothing_keeps_more_than_was_asked_for() {
        let states = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
        let gradients = GradientConfig::Bf16;
        let memory =
            MemoryConfig { states, recompute: Recompute::Layer, gradients, ..MemoryConfig::default() };
        let asked = Choice { memory, ..asked() };
        let room =
            Room { asked, largest_pair: 9000, largest_batch: 9000, can_offload: false, layer_budgets: &[] };
        let all = candidates(room, seconds);
        assert_eq!(all.len(), 1, "{all:?}");
        assert_eq!(all[0].choice, room.asked);
    }

    /// A resumed run has what was chosen for it, but for options that are asked for in a way that the choice does not meet.
    #[test]
    fn what_was_chosen_holds_as_long_as_nothing_less_is_asked_for() {
        let with = |moments, recompute, gradients, token_budget| {
            let states = StateOptions { moments, master: MasterWeights::F32 };
            let memory = MemoryConfig { states, recompute, gradients, ..MemoryConfig::default() };
            Choice { memory, token_budget, ..asked() }
        };
        let small = with(MomentFormat::EightBit, Recompute::Layer, GradientConfig::Bf16, 1024);
        assert_eq!(still_chosen(&asked(), &small), small);
        assert_eq!(still_chosen(&small, &asked()), small, "less is asked for than the run had");
        let mixed = with(MomentFormat::F32, Recompute::Selective, GradientConfig::Layer, 4096);
        let wanted = with(MomentFormat::EightBit, Recompute::Layer, GradientConfig::Layer, 1024);
        assert_eq!(still_chosen(&small, &mixed), wanted, "each option by itself");
        // bf16 moments are never chosen: who had them asked for them.
        let bf16 = with(MomentFormat::Bf16, Recompute::None, GradientConfig::F32, 4096);
        assert_eq!(still_chosen(&asked(), &bf16), asked());
        // Sharding is not auto's to choose.
        let of = |shard, offload| Choice {
            memory: MemoryConfig { shard, offload, ..MemoryConfig::default() },
            ..asked()
        };
        let sharded = of(ShardConfig::States, OffloadConfig::None);
        let offloaded = of(ShardConfig::None, OffloadConfig::States);
        assert_eq!(still_chosen(&sharded, &offloaded), of(ShardConfig::States, OffloadConfig::States));
        assert_eq!(still_chosen(&offloaded, &sharded), offloaded);
    }

    /// On a GPU states may be offloaded: where the bus is hidden that comes before what changes numbers, and otherwise by its time.
    #[test]
    fn offloading_is_tried_in_the_order_of_its_time() {
        let room = Room {
            asked: asked(),
            largest_pair: 9000,
            largest_batch: 9000,
            can_offload: true,
            layer_budgets: &[4096],
        };
        let all = |exposed: f64| {
            let is_offloaded = |choice: &Choice| choice.memory.offload == OffloadConfig::States;
            candidates(room, move |choice| seconds(choice) + if is_offloaded(choice) { exposed } else { 0.0 })
        };
        let place = |all: Vec<Candidate>, wanted: &str| {
            let names = all.iter().map(|candidate| flags(&asked(), &candidate.choice).join(" "));
            names.into_iter().position(|name| name == wanted).unwrap_or_else(|| panic!("{wanted}: {all:?}"))
        };
        assert!(place(all(0.0), "--offload states") < place(all(0.0), "--gradients bf16"));
        assert!(place(all(1.0), "--offload states") > place(all(1.0), "--recompute layer"));
        let asked =
            Choice { memory: MemoryConfig { offload: OffloadConfig::States, ..asked().memory }, ..asked() };
        let kept = candidates(Room { asked, ..room }, seconds);
        assert!(
            kept.iter().all(|one| one.choice.memory.offload == OffloadConfig::States),
            "it is not taken back"
        );
    }

    /// A footprint that only says how much is taken.
    fn taking(taken: usize) -> Footprint {
        Footprint { peak: taken, taken, parts: Default::default(), head: Default::default() }
    }

    #[test]
    fn trying_ends_with_what_fits_or_with_the_least_there_is() {
        let room = Room {
            asked: asked(),
            largest_pair: 1500,
            largest_batch: 4096,
            can_offload: false,
            layer_budgets: &[],
        };
        let all = candidates(room, seconds);
        let bytes = |choice: &Choice| {
            let saved = flags(&asked(), choice).len();
            Ok(taking(100 - 10 * saved))
        };
        let tried = try_in_order(&all, 90, 2, bytes).unwrap();
        assert_eq!(tried.len(), 3, "the run as asked, and two that fit: {tried:?}");
        let none = try_in_order(&all, 10, 2, bytes).unwrap();
        assert_eq!(none.len(), 1);
        assert_eq!(none[0].candidate.choice.memory.recompute, Recompute::Layer);
        assert_eq!(none[0].footprint.taken, 50);
    }
}
