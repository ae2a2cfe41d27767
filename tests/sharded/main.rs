//! A trainer among several ranks beside the trainer of one: losses, norms and weights for every way to shard, checkpoints that another
//! number of ranks goes on from, and saved models.
//!
//! A rank is this program again, as in `tests/nccl`.

#[path = "../training/golden.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod golden;
#[path = "../nccl/ranks.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod ranks;
#[path = "../support/mod.rs"]
mod support;
mod work;

use std::path::Path;
use std::sync::Arc;

use mmpo_fast::config::ShardConfig::{self, Gradients, None as Whole, States, Weights};
use mmpo_fast::device::Device;
use mmpo_fast::device::cpu::CpuDevice;
#[cfg(mmpo_emulated)]
use mmpo_fast::device::cuda::{CudaDevice, EmulatorVariant};

use ranks::On;
use work::{Case, CheckpointUse, Goal, Results, STATES};

const CASE: &str = "TEST_SHARDED_CASE";
const RESULTS: &str = "TEST_SHARDED_RESULTS";
const RUN: &str = "TEST_SHARDED_RUN";
/// The scenario in which a rank's own gradients are not finite.
const BROKEN: &str = "broken";

/// What a rank of a test does; nothing where no test started this process.
#[test]
fn rank_of_a_group() {
    let Some((scenario, on, rank)) = ranks::this_process() else { return };
    let variable = |name: &str| std::env::var(name).unwrap();
    let case = Case::parse(&variable(CASE));
    if scenario == BROKEN {
        return work::break_gradients(&Arc::new(cpu::<f32>()), &case, &rank);
    }
    let run = std::env::var(RUN).ok();
    let run = run.as_ref().map(|run| (Path::new(run), CheckpointUse::parse(&scenario)));
    let results = match on {
        On::Cpu => work::train(&Arc::new(cpu::<f32>()), &case, Some(&rank), run),
        On::CpuBf16 => work::train(&Arc::new(cpu::<half::bf16>()), &case, Some(&rank), run),
        #[cfg(mmpo_emulated)]
        On::Emulated => work::train(&Arc::new(emulated()), &case, Some(&rank), run),
        #[cfg(not(mmpo_emulated))]
        On::Emulated => unreachable!("tests of the emulated device are left out with it"),
        On::Checked | On::Gpu => unreachable!("the tests of collectives alone run there"),
    };
    results.write(Path::new(&variable(RESULTS)), rank.place.rank);
}

fn cpu<C: mmpo_fast::device::cpu::Storage>() -> CpuDevice<C> {
    CpuDevice::<C>::open(Some(1)).expect("the CPU device starts")
}

#[cfg(mmpo_emulated)]
fn emulated() -> CudaDevice {
    CudaDevice::emulated(EmulatorVariant::Plain)
}

fn alone(on: On, case: &Case) -> Results {
    fn on_device<D: Device>(device: D, case: &Case) -> Results {
        work::train(&Arc::new(device), case, None, None)
    }
    match on {
        On::Cpu => on_device(cpu::<f32>(), case),
        On::CpuBf16 => on_device(cpu::<half::bf16>(), case),
        #[cfg(mmpo_emulated)]
        On::Emulated => on_device(emulated(), case),
        #[cfg(not(mmpo_emulated))]
        On::Emulated => unreachable!(),
        On::Checked | On::Gpu => unreachable!(),
    }
}

/// The results of all ranks of a case.
fn among(on: On, case: &Case, count: usize, run: Option<(&Path, CheckpointUse)>) -> Vec<Results> {
    let folder = tempfile::tempdir().unwrap();
    let (text, results) = (case.text(), folder.path().display().to_string());
    let mut environment = vec![(CASE, text.as_str()), (RESULTS, results.as_str())];
    let path = run.map(|(path, _)| path.display().to_string());
    environment.extend(path.as_deref().map(|path| (RUN, path)));
    let scenario = run.map_or("plain", |(_, how)| how.name());
    ranks::succeed(scenario, on, count, &environment);
    (0..count).map(|rank| Results::read(folder.path(), rank)).collect()
}

/// Compares each rank with the others, to the bit, and with the run of one rank.
fn compare(on: On, case: &Case, count: usize) {
    let one = alone(on, case);
    let all = among(on, case, count, None);
    let what = format!("{} on {on:?}, {count} ranks", case.text());
    for results in &all {
        assert_eq!(results.numbers, all[0].numbers, "{what}: ranks decide by different numbers");
        assert!(results.weights == all[0].weights, "{what}: ranks have different weights");
    }
    one.assert_close(&all[0], on, &what);
}

#[test]
fn every_sharding_gives_the_losses_and_weights_of_one_rank() {
    for (shard, counts) in [(Whole, [2, 3]), (States, [2, 4]), (Gradients, [2, 3]), (Weights, [2, 3])] {
        for count in counts {
            compare(On::Cpu, &Case::new(shard, Goal::Mmpo), count);
        }
    }
}

/// The token mean of SFT is that of the whole batch, however its pairs are dealt; five ranks have fewer pairs than ranks.
#[test]
fn means_over_tokens_and_idle_ranks() {
    for shard in [Whole, Gradients, Weights] {
        compare(On::Cpu, &Case { pairs: 3, ..Case::new(shard, Goal::Sft) }, 4);
    }
}

#[test]
fn adapters_of_a_frozen_base() {
    for shard in [Whole, States, Gradients, Weights] {
        compare(On::Cpu, &Case { lora: true, ..Case::new(shard, Goal::Dpo) }, 2);
    }
}

/// A micro-batch has a mask of its own on whichever rank it is: the same pair has other losses on each of them.
#[test]
fn ranks_drop_other_values() {
    let case = Case { lora: true, dropout: true, pairs: 4, ..Case::new(Whole, Goal::Sft) };
    let all = among(On::Cpu, &case, 2, None);
    assert_eq!(all[0].numbers, all[1].numbers);
    // Loss, norm and tokens of the first step, and then the losses of its pairs.
    let losses = &all[0].numbers[3..7];
    for (place, loss) in losses.iter().enumerate() {
        assert!(!losses[..place].contains(loss), "two pairs have one mask: {losses:?}");
    }
}

#[test]
fn bf16_with_eight_bit_moments_and_split_master_copies_or_none() {
    for states in [STATES[1], STATES[2]] {
        for shard in [States, Gradients, Weights] {
            compare(On::CpuBf16, &Case { states, ..Case::new(shard, Goal::Dpo) }, 2);
        }
    }
    let case = Case { lora: true, states: STATES[2], ..Case::new(States, Goal::Dpo) };
    compare(On::CpuBf16, &case, 2);
}

#[cfg(mmpo_emulated)]
#[test]
fn every_sharding_on_the_emulated_device() {
    for shard in [Whole, States, Gradients, Weights] {
        compare(On::Emulated, &Case { pairs: 4, ..Case::new(shard, Goal::Dpo) }, 2);
    }
}

/// A checkpoint of `from` is gone on from with `to`; the results of the steps after it, and those of the run in one piece.
fn continued(
    (from, from_count): (ShardConfig, usize),
    (to, to_count): (ShardConfig, usize),
) -> (Vec<Results>, Vec<Results>) {
    let run = tempfile::tempdir().unwrap();
    let case = |shard| Case::new(shard, Goal::Dpo);
    let whole = among(On::Cpu, &case(from), from_count, Some((run.path(), CheckpointUse::Save)));
    let rest = among(On::Cpu, &case(to), to_count, Some((run.path(), CheckpointUse::Resume)));
    (whole, rest)
}

#[test]
fn a_checkpoint_goes_on_with_the_same_ranks_to_the_bit() {
    for shard in [Whole, States, Gradients, Weights] {
        let (whole, rest) = continued((shard, 2), (shard, 2));
        assert!(whole[0].weights == rest[0].weights, "{shard:?}");
        assert_eq!(whole[0].numbers.last(), rest[0].numbers.last());
    }
}

#[test]
fn a_checkpoint_goes_on_with_other_ranks_and_another_sharding() {
    for (from, to) in [
        ((Gradients, 3), (Whole, 1)),
        ((Whole, 1), (Weights, 2)),
        ((States, 2), (Gradients, 3)),
        ((Weights, 3), (States, 2)),
    ] {
        let (whole, rest) = continued(from, to);
        whole[0].assert_weights_close(&rest[0], On::Cpu, &format!("{from:?} and {to:?}"));
    }
}

/// In the sums nobody sees any more whose number it was: each rank looks at its own gradients before.
#[test]
fn all_ranks_know_whose_gradients_are_not_finite() {
    for shard in [Whole, States, Gradients, Weights] {
        let case = Case::new(shard, Goal::Dpo).text();
        ranks::succeed(BROKEN, On::Cpu, 3, &[(CASE, case.as_str())]);
    }
}
