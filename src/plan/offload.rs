//! What the bus has to move in a step where optimiser states lie in the host's memory, and what hides it.
//!
//! Each step moves all of the offloaded states to the GPU and back, in both directions at once. The copies run beside the
//! updates, and with gradients by layer beside the backward too, from which the log-prob head is left out: it runs before the first
//! layer. Forward and head hide the first pieces alone, for which there are slots; they are not counted.

use super::rates::Rates;
use super::work::Work;
use crate::config::{GradientConfig, MemoryConfig};
use crate::model::{FusedTensor, LlamaTensors};
use crate::train::offload_plan;

/// Share of the layers' time that their backward takes: two of three passes where weights are trained.
const BACKWARD_SHARE: f64 = 2.0 / 3.0;
/// The same where weights are frozen, and have no gradients.
const FROZEN_BACKWARD_SHARE: f64 = 0.5;

/// The copies of a step.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Copies {
    /// Bytes of pinned host memory, and of what goes over the bus each way in a step.
    pub host_bytes: usize,
    /// Seconds that the bus takes for them, both ways at once.
    pub seconds: f64,
    /// Seconds of the work that runs beside them.
    pub beside: f64,
}

impl Copies {
    /// The copies of a step with this work; none where nothing is offloaded. `size` is the bytes of a weight.
    pub fn of(
        layout: &LlamaTensors<FusedTensor>,
        memory: &MemoryConfig,
        (work, size): (&Work, usize),
        rates: &Rates,
    ) -> Option<Self> {
        let host_bytes = offload_plan(layout, memory, size < size_of::<f32>()).host_bytes();
        if host_bytes == 0 {
            return None;
        }
        let updating = Work { update_bytes: work.update_bytes, ..Work::default() }.seconds(rates);
        let layers = Work { head: 0.0, update_bytes: 0.0, ..*work }.seconds(rates);
        let is_frozen = layout.iter().any(|tensor| !tensor.trained);
        let share = if is_frozen { FROZEN_BACKWARD_SHARE } else { BACKWARD_SHARE };
        let backward = match memory.gradients {
            GradientConfig::Layer => share * layers,
            GradientConfig::F32 | GradientConfig::Bf16 => 0.0,
        };
        let seconds = host_bytes as f64 / (rates.bus * 1e9 * Rates::BUS_SHARE);
        Some(Copies { host_bytes, seconds, beside: updating + backward })
    }

    /// Seconds of a step in which nothing runs but the copies.
    pub fn exposed(&self) -> f64 {
        (self.seconds - self.beside).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::work::{Trained, Volume};
    use super::*;
    use crate::bench::shapes;
    use crate::config::OffloadConfig;
    use crate::optimizer::{MasterWeights, MomentFormat, StateOptions};

    const RATES: Rates = Rates { tflops: 989.4, bandwidth: 3350.0, bus: 62.5 };

    fn copies(memory: MemoryConfig, tokens: f64) -> Option<Copies> {
        let config = shapes::model("llama-3-8b", None).unwrap();
        let volume = Volume { pairs: 1.0, tokens, scored: tokens, visible: 0.0, micro_batches: 1.0 };
        let work = Trained::new(&config, None).work(&volume, &memory, false, 2);
        Copies::of(&LlamaTensors::layout(&config), &memory, (&work, 2), &RATES)
    }

    fn offloaded(gradients: GradientConfig) -> MemoryConfig {
        MemoryConfig { gradients, offload: OffloadConfig::States, ..MemoryConfig::default() }
    }

    /// The figures of docs/memory.md: 50 GB/s each way move the states of Llama-3-8B in 1.9 s.
    #[test]
    fn the_bus_takes_what_the_document_says() {
        let all = copies(offloaded(GradientConfig::F32), 1000.0).unwrap();
        assert!((all.host_bytes as f64 / 1e9 - 96.4).abs() <= 0.05, "{all:?}");
        assert!((all.seconds - 1.93).abs() <= 0.01, "{all:?}");
        let states = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
        let small = copies(MemoryConfig { states, ..offloaded(GradientConfig::F32) }, 1000.0).unwrap();
        assert!((small.seconds - 0.33).abs() <= 0.01, "{small:?}");
        assert!(copies(MemoryConfig::default(), 1000.0).is_none());
    }

    /// Updates alone hide little; a backward that is long enough hides everything.
    #[test]
    fn the_backward_hides_what_the_update_does_not() {
        let whole = copies(offloaded(GradientConfig::F32), 1e5).unwrap();
        assert!(whole.exposed() > 1.5, "{whole:?}");
        assert_eq!(copies(offloaded(GradientConfig::F32), 10.0).unwrap().exposed(), whole.exposed());
        let short = copies(offloaded(GradientConfig::Layer), 1e3).unwrap();
        let long = copies(offloaded(GradientConfig::Layer), 1e5).unwrap();
        assert!(short.exposed() > 1.0 && short.exposed() < whole.exposed(), "{short:?}");
        assert_eq!(long.exposed(), 0.0, "{long:?}");
    }
}
