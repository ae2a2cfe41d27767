//! The count of a device's bytes: how many are held, the most so far, and what they are for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::MemoryUse;

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MemoryPart {
    /// The model's weights and its table of positions.
    Weights,
    /// The weights of low-rank adapters.
    Adapters,
    /// f32 copies of the trained weights.
    MasterWeights,
    /// Moments of the optimiser.
    OptimizerStates,
    /// Gradients of the trained weights, and their norms.
    Gradients,
    /// What the forward keeps for the backward.
    Activations,
    /// Gradients of activations.
    ActivationGradients,
    /// The log-prob head: scored rows, its workspace and its results.
    Head,
    /// Token ids and positions of a packed batch, and the results of its pairs.
    Batch,
    /// Scratch memory of single operations.
    Scratch,
    /// The frozen reference, where it is another model, and what scores pairs with it.
    Reference,
    /// Key/value cache and activations of the answers that a report shows.
    Samples,
    /// Anything else.
    Other,
}

impl MemoryPart {
    /// All parts, in the order in which they are shown.
    pub const ALL: [MemoryPart; 13] = [
        MemoryPart::Weights,
        MemoryPart::Adapters,
        MemoryPart::MasterWeights,
        MemoryPart::OptimizerStates,
        MemoryPart::Gradients,
        MemoryPart::Activations,
        MemoryPart::ActivationGradients,
        MemoryPart::Head,
        MemoryPart::Batch,
        MemoryPart::Scratch,
        MemoryPart::Reference,
        MemoryPart::Samples,
        MemoryPart::Other,
    ];

    /// The name for people.
    pub fn name(self) -> &'static str {
        match self {
            MemoryPart::Weights => "weights",
            MemoryPart::Adapters => "adapters",
            MemoryPart::MasterWeights => "f32 master weights",
            MemoryPart::OptimizerStates => "optimiser states",
            MemoryPart::Gradients => "gradients",
            MemoryPart::Activations => "activations",
            MemoryPart::ActivationGradients => "gradients of activations",
            MemoryPart::Head => "log-prob head",
            MemoryPart::Batch => "batch",
            MemoryPart::Scratch => "scratch memory",
            MemoryPart::Reference => "reference",
            MemoryPart::Samples => "sample answers",
            MemoryPart::Other => "other",
        }
    }
}

/// Bytes of each part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryParts([usize; MemoryPart::ALL.len()]);

impl MemoryParts {
    /// Bytes of one part.
    pub fn of(&self, part: MemoryPart) -> usize {
        self.0[part as usize]
    }

    /// Each part that holds any bytes, with their number.
    pub fn iter(&self) -> impl Iterator<Item = (MemoryPart, usize)> {
        MemoryPart::ALL.into_iter().map(|part| (part, self.of(part))).filter(|&(_, bytes)| bytes > 0)
    }
}

/// Bytes that are held, and for what. All handles of one device share one counter.
#[derive(Debug, Default)]
pub struct MemoryCounter(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    total: MemoryUse,
    now: MemoryParts,
    at_peak: MemoryParts,
    /// What buffers are for that are made now.
    part: Option<MemoryPart>,
    limit: Option<usize>,
}

impl MemoryCounter {
    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes in use now, and the most so far.
    pub fn read(&self) -> MemoryUse {
        self.lock().total
    }

    /// The parts that made up the most bytes so far.
    pub fn parts_at_peak(&self) -> MemoryParts {
        self.lock().at_peak
    }

    /// Limits what [`MemoryCounter::left`] gives.
    pub fn set_limit(&self, bytes: Option<usize>) {
        self.lock().limit = bytes;
    }

    /// Bytes up to the limit; `None` without one.
    pub fn left(&self) -> Option<usize> {
        let counts = self.lock();
        counts.limit.map(|limit| limit.saturating_sub(counts.total.now))
    }

    /// Says what buffers are for until [`MemoryCounter::end`] gets the answer back. What was said before goes on to hold: of nested
    /// names the outermost counts.
    pub(super) fn begin(&self, part: MemoryPart) -> Option<MemoryPart> {
        let mut counts = self.lock();
        let before = counts.part;
        counts.part = before.or(Some(part));
        before
    }

    pub(super) fn end(&self, before: Option<MemoryPart>) {
        self.lock().part = before;
    }

    /// Notes that `bytes` bytes were taken at once, for `part` or else for what was said; returns what they are for.
    pub(super) fn add(&self, bytes: usize, part: Option<MemoryPart>) -> MemoryPart {
        let mut counts = self.lock();
        let part = part.or(counts.part).unwrap_or(MemoryPart::Other);
        counts.total.now += bytes;
        counts.total.allocations += 1;
        counts.now.0[part as usize] += bytes;
        if counts.total.now > counts.total.peak {
            counts.total.peak = counts.total.now;
            counts.at_peak = counts.now;
        }
        part
    }

    /// Notes that these bytes were given back.
    pub(super) fn subtract(&self, bytes: usize, part: MemoryPart) {
        let mut counts = self.lock();
        counts.total.now = counts.total.now.saturating_sub(bytes);
        let of_part = &mut counts.now.0[part as usize];
        *of_part = of_part.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_are_those_of_the_largest_moment() {
        let counter = MemoryCounter::default();
        let before = counter.begin(MemoryPart::Reference);
        let nested = counter.begin(MemoryPart::Activations);
        let part = counter.add(70, None);
        counter.end(nested);
        counter.end(before);
        assert_eq!(part, MemoryPart::Reference, "the outermost name counts");
        counter.add(10, Some(MemoryPart::Scratch));
        counter.subtract(70, part);
        assert_eq!(counter.add(60, None), MemoryPart::Other);
        assert_eq!(counter.read(), MemoryUse { now: 70, peak: 80, allocations: 3 });
        let parts = counter.parts_at_peak();
        let held: Vec<_> = parts.iter().collect();
        assert_eq!(held, [(MemoryPart::Scratch, 10), (MemoryPart::Reference, 70)]);
    }

    #[test]
    fn a_limit_says_what_is_left() {
        let counter = MemoryCounter::default();
        assert_eq!(counter.left(), None);
        counter.set_limit(Some(100));
        counter.add(30, None);
        assert_eq!(counter.left(), Some(70));
        counter.add(90, None);
        assert_eq!(counter.left(), Some(0));
    }

    #[test]
    fn every_part_has_its_own_place() {
        for (place, part) in MemoryPart::ALL.into_iter().enumerate() {
            assert_eq!(part as usize, place, "{part:?}");
        }
    }
}
