//! Collectives over processes of the CPU and the emulated device, on the library that stands in for NCCL, and that library's own rules.
//!
//! A rank is this program again: `ranks.rs` starts it with the name of a scenario, which `rank_of_a_group` runs there.

mod alone;
mod collectives;
mod faults;
mod interface;
mod loading;
mod planned;
mod ranks;
#[path = "../support/mod.rs"]
mod support;
mod waits;

use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::cuda::CudaDevice;
#[cfg(mmpo_emulated)]
use mmpo_fast::device::cuda::EmulatorVariant;
use mmpo_fast::device::prelude::*;

use ranks::{On, Rank};

/// What a rank of a test does; nothing where no test started this process.
#[test]
fn rank_of_a_group() {
    let Some((scenario, on, rank)) = ranks::this_process() else { return };
    match on {
        On::Cpu => run(&scenario, &CpuDevice::new(Some(1)).unwrap(), &rank),
        On::CpuBf16 => run(&scenario, &CpuDevice::<half::bf16>::open(Some(1)).unwrap(), &rank),
        #[cfg(mmpo_emulated)]
        On::Emulated => run(&scenario, &CudaDevice::emulated(EmulatorVariant::Plain), &rank),
        #[cfg(mmpo_emulated)]
        On::Checked => run(&scenario, &CudaDevice::emulated(EmulatorVariant::Checked), &rank),
        On::Gpu => run(&scenario, &CudaDevice::open(rank.place.rank).unwrap(), &rank),
        #[cfg(not(mmpo_emulated))]
        On::Emulated | On::Checked => unreachable!("tests of the emulated device are left out with it"),
    }
}

fn run<D: Device>(scenario: &str, device: &D, rank: &Rank) {
    match scenario {
        "every_collective" => collectives::every_collective(device, rank),
        "alone" => alone::alone(device, rank),
        "counted" => collectives::counted(device, rank),
        "missing_wait" => waits::step(device, rank),
        "disagreement" => faults::disagreement(device, rank),
        "aborted" => faults::aborted(device, rank),
        "killed" => faults::killed(device, rank),
        "injected" => faults::injected(device, rank),
        "never_joined" => faults::never_joined(device, rank),
        "loading" => loading::report(device),
        other => panic!("no scenario {other}"),
    }
}
