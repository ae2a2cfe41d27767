//! How the log-prob head cuts a micro-batch, and with how much memory: decided once, from the sizes and the memory at
//! hand.

use std::fmt;

use crate::device::{Device, HeadMode};
use crate::error::Result;

/// What a user may ask of the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadOptions {
    /// Which mode, or the choice left to the plan.
    pub mode: HeadChoice,
    /// Bytes that probabilities kept for the backward may take.
    pub workspace: usize,
}

impl HeadOptions {
    /// Bytes of workspace where none are given.
    pub const DEFAULT_WORKSPACE: usize = 1 << 30;
}

impl Default for HeadOptions {
    fn default() -> Self {
        HeadOptions { mode: HeadChoice::Auto, workspace: Self::DEFAULT_WORKSPACE }
    }
}

/// Which mode of the head to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadChoice {
    /// Main mode, and the recompute mode for pairs whose probabilities fit neither the workspace nor the free memory.
    Auto,
    /// Main mode for every pair, whatever it takes.
    Main,
    /// Recompute mode for every pair.
    Recompute,
}

/// How the head works on a micro-batch. `bytes` and `values` are the size of its workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeadPlan {
    /// Pairs are taken together in main mode up to this many scored tokens.
    pub chunk_rows: usize,
    /// Pairs of up to this many scored tokens run in main mode; 0 is the recompute mode for all.
    pub main_rows: usize,
    /// Scored tokens of the longest pair.
    pub longest: usize,
    /// Values of [`Memory::Compute`](crate::device::Memory::Compute) in the workspace.
    pub values: usize,
    /// Bytes of these values.
    pub bytes: usize,
}

/// Sizes from which the plan follows.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Scored tokens of the largest micro-batch, and of the longest pair.
    scored: usize,
    longest: usize,
    /// Bytes of a scored token in main mode.
    row_bytes: usize,
    /// Chunk size, in bytes, beyond which larger chunks do not speed up a step.
    chunk_bytes: usize,
    free: Option<usize>,
}

/// Bytes left free for the head's own scratch memory, which is reserved after the plan, and for the driver.
const SPARE: usize = 512 << 20;

/// Fewest scored tokens for which it pays to keep main mode for the short pairs alone: with fewer rows the head's gemms
/// wait for the vocabulary matrix.
const LEAST_MAIN_ROWS: usize = 512;

impl HeadPlan {
    /// The plan for micro-batches of up to `scored` scored tokens whose longest pair has `longest`. Call it when
    /// everything else is allocated.
    pub(super) fn training<D: Device>(
        device: &D,
        (width, vocab): (usize, usize),
        scored: usize,
        longest: usize,
        options: HeadOptions,
    ) -> Result<Self> {
        let size = size_of::<D::Compute>();
        let values = |mode, rows| device.logp_head_workspace(mode, rows, width, vocab);
        let sizes = Sizes {
            scored,
            longest,
            row_bytes: (values(HeadMode::Main, 1)? * size).max(1),
            chunk_bytes: D::HEAD_CHUNK_BYTES,
            free: device.free_memory()?,
        };
        let (chunk_rows, main_rows) = cut(sizes, options);
        let mut plan = HeadPlan { chunk_rows, main_rows, longest, values: 0, bytes: 0 };
        for (mode, rows) in plan.calls(scored) {
            plan.values = plan.values.max(values(mode, rows)?);
        }
        plan.bytes = plan.values * size;
        Ok(plan)
    }

    /// The modes that a training run calls the head in, with the most scored tokens of a call; `scored` is those of the
    /// largest micro-batch. Evaluations run in [`HeadMode::Score`].
    pub(super) fn calls(&self, scored: usize) -> impl Iterator<Item = (HeadMode, usize)> + use<> {
        let main = (self.main_rows > 0).then_some((HeadMode::Main, self.chunk_rows));
        let is_too_long = self.main_rows == 0 || self.main_rows < self.longest;
        let recompute = is_too_long.then_some((HeadMode::Recompute, scored));
        std::iter::once((HeadMode::Score, scored)).chain(main).chain(recompute)
    }

    /// The plan for log-probs without gradients.
    pub(super) fn inference<D: Device>(
        device: &D,
        (width, vocab): (usize, usize),
        scored: usize,
    ) -> Result<Self> {
        let values = device.logp_head_workspace(HeadMode::Score, scored, width, vocab)?;
        let bytes = values * size_of::<D::Compute>();
        Ok(HeadPlan { chunk_rows: 0, main_rows: 0, longest: scored, values, bytes })
    }

    /// The mode of a chunk of whole pairs.
    pub(super) fn mode(&self, rows: usize) -> HeadMode {
        if rows <= self.main_rows { HeadMode::Main } else { HeadMode::Recompute }
    }
}

/// Decides `chunk_rows` and `main_rows`.
fn cut(sizes: Sizes, options: HeadOptions) -> (usize, usize) {
    let Sizes { scored, longest, row_bytes, chunk_bytes, free } = sizes;
    let workspace_rows = options.workspace / row_bytes;
    let main_rows = match options.mode {
        HeadChoice::Recompute => 0,
        HeadChoice::Main => workspace_rows.max(longest).min(scored),
        HeadChoice::Auto => {
            let free_rows = free.map_or(usize::MAX, |free| free.saturating_sub(SPARE) / row_bytes);
            let rows = workspace_rows.min(free_rows).min(scored);
            if rows < LEAST_MAIN_ROWS.min(longest) { 0 } else { rows }
        }
    };
    let chunk_rows = (chunk_bytes / row_bytes).max(longest).min(main_rows);
    (chunk_rows, main_rows)
}

impl fmt::Display for HeadPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HeadPlan { chunk_rows, main_rows, longest, bytes, .. } = *self;
        let mib = bytes as f64 / f64::from(1 << 20);
        if main_rows == 0 {
            return write!(f, "recompute mode, {mib:.1} MiB of workspace");
        }
        write!(f, "main mode, {chunk_rows} scored tokens at a time, {mib:.1} MiB of workspace")?;
        match longest > main_rows {
            true => write!(f, "; pairs of more than {main_rows} in recompute mode"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama-3-8B's micro-batch of 8192 scored tokens on a GPU with `free` bytes left.
    fn sizes(free: Option<usize>, longest: usize) -> Sizes {
        Sizes { scored: 8192, longest, row_bytes: 284_928, chunk_bytes: usize::MAX, free }
    }

    const AUTO: HeadOptions = HeadOptions { mode: HeadChoice::Auto, workspace: 1 << 30 };

    #[test]
    fn main_mode_takes_the_stated_workspace() {
        let (chunk_rows, main_rows) = cut(sizes(Some(20 << 30), 3000), AUTO);
        assert_eq!((chunk_rows, main_rows), (3768, 3768));
        assert!(main_rows * 284_928 <= 1 << 30);
        let half = HeadOptions { workspace: 512 << 20, ..AUTO };
        assert_eq!(cut(sizes(None, 1000), half), (1884, 1884));
    }

    #[test]
    fn tight_memory_shrinks_the_chunk_and_then_recomputes() {
        let (chunk_rows, main_rows) = cut(sizes(Some(SPARE + (400 << 20)), 1000), AUTO);
        assert_eq!((chunk_rows, main_rows), (1472, 1472));
        // The longest pair does not fit, but most do.
        assert_eq!(cut(sizes(Some(SPARE + (200 << 20)), 1000), AUTO).1, 736);
        assert_eq!(cut(sizes(Some(SPARE + (100 << 20)), 1000), AUTO), (0, 0));
        assert_eq!(cut(sizes(Some(0), 1000), AUTO), (0, 0));
        // Short pairs fit even then.
        assert_eq!(cut(sizes(Some(SPARE + (100 << 20)), 300), AUTO).1, 368);
    }

    #[test]
    fn a_mode_can_be_forced() {
        let main = HeadOptions { mode: HeadChoice::Main, ..AUTO };
        assert_eq!(cut(sizes(Some(0), 5000), main), (5000, 5000));
        let recompute = HeadOptions { mode: HeadChoice::Recompute, ..AUTO };
        assert_eq!(cut(sizes(None, 5000), recompute), (0, 0));
    }

    #[test]
    fn a_device_that_likes_small_chunks_gets_them() {
        let cpu = Sizes { chunk_bytes: 64 << 20, ..sizes(None, 100) };
        assert_eq!(cut(cpu, AUTO), (235, 3768));
        assert_eq!(cut(Sizes { longest: 2000, ..cpu }, AUTO), (2000, 3768));
        assert_eq!(cut(Sizes { longest: 5000, ..cpu }, AUTO), (3768, 3768));
    }
}
