//! Reference log-probs of several ranks: each scores its share of the pairs, and all have the log-probs of all.
//!
//! A share is whole micro-batches of those that one rank would score alone, so that the log-probs have the same bits whatever the
//! number of ranks. They are exchanged by a sum in which each value comes from one rank and is 0 on all others.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::reference::STORE_INTERVAL;
use crate::data::{PairDataset, ReferenceCache};
use crate::device::{Device, MemoryPart, Queue};
use crate::error::Result;
use crate::interrupt::{self, Keeper};
use crate::objective::ReferencePair;
use crate::ranks::{RankGroup, Team, progress};
use crate::report::Progress;
use crate::score::{ScoredModel, Scorer};

/// Values that are summed at a time.
const PIECE: usize = 1 << 20;

/// The log-probs of `dataset` that some rank found in its cache, on all ranks: caches may lie on disks of single machines.
///
/// # Errors
/// Those of the device; [`crate::Error::Rank`] where another rank is lost.
pub fn known<D: Device>(
    ours: Option<Vec<ReferencePair>>,
    dataset: &PairDataset,
    team: &Team,
    group: &RankGroup<D>,
) -> Result<Option<Vec<ReferencePair>>> {
    let holder = team.agree("cached references", ours.is_some(), |all: Vec<bool>| {
        Ok((all.iter().position(|&is_there| is_there), all.into_iter().all(|is_there| is_there)))
    })?;
    match holder {
        (None, _) => Ok(None),
        (Some(_), true) => Ok(ours),
        (Some(holder), false) => {
            let pairs = dataset.pairs.len();
            let ours = ours.filter(|_| group.place().rank == holder).unwrap_or_default();
            exchange(dataset, 0..ours.len().min(pairs), &ours, group).map(Some)
        }
    }
}

/// Scores this rank's share of `dataset`, from where an earlier run of as many ranks was stopped; returns the log-probs of all
/// pairs.
///
/// # Errors
/// Those of the device; [`crate::Error::Numerics`] for log-probs that are not finite; [`crate::Error::Interrupted`].
pub fn score<D: Device>(
    mut reference: ScoredModel<'_, D>,
    (dataset, token_budget): (&PairDataset, usize),
    label: &str,
    cache: &ReferenceCache,
    (team, group): (&Team, &RankGroup<D>),
) -> Result<Vec<ReferencePair>> {
    let place = group.place();
    let (rank, pairs) = ((place.rank, place.ranks), dataset.pairs.len());
    let is_sharded = matches!(reference, ScoredModel::Sharded(_));
    let mut scorer = Scorer::new(reference.again(), &dataset.pairs, token_budget)?;
    let share = scorer.shares(place.ranks).swap_remove(place.rank);
    let earlier = cache.load_share(rank, share.len(), pairs);
    let mut shown = Progress::start(format!("{label}, of rank 0"), "pairs", share.len(), earlier.len());
    let first = share.start + earlier.len();
    let forwards = scorer.forwards(&(first..share.end));
    // A layer is brought together by all ranks or by none: each runs as many forwards as the one that runs most.
    let most = match is_sharded {
        true => team.agree("forwards of the reference", forwards, |all: Vec<usize>| {
            Ok(all.into_iter().max().unwrap_or(0))
        })?,
        false => forwards,
    };
    let done = Arc::new(Mutex::new(earlier));
    let keeper = keep_share(cache.clone(), Arc::clone(&done), rank, pairs);
    let mut stored = Instant::now();
    interrupt::check()?;
    scorer.run_within(first..share.end, false, |start, scores| {
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        let before = done.len();
        // The micro-batch at the border is scored as a whole, as in a run that was not stopped.
        done.truncate(start.saturating_sub(share.start));
        done.extend(scores.iter().map(|score| score.reference()));
        shown.advance(done.len().saturating_sub(before), String::new);
        progress::tick();
        if stored.elapsed() >= STORE_INTERVAL {
            stored = Instant::now();
            if let Err(error) = cache.store_share(rank, &done, pairs) {
                tracing::debug!("{error}");
            }
        }
        drop(done);
        interrupt::check()
    })?;
    scorer.idle(most - forwards)?;
    let ours = done.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let all = exchange(dataset, share, &ours, group)?;
    drop(keeper);
    cache.remove_share(rank);
    Ok(all)
}

/// On a signal, keeps the share that is scored by then.
fn keep_share(
    cache: ReferenceCache,
    done: Arc<Mutex<Vec<ReferencePair>>>,
    rank: (usize, usize),
    pairs: usize,
) -> Keeper {
    interrupt::keep_before_end(move || {
        let done = done.lock().unwrap_or_else(PoisonError::into_inner);
        if done.is_empty() {
            return None;
        }
        let count = done.len();
        Some(match cache.store_share(rank, &done, pairs) {
            Ok(()) => format!(
                "{count} reference log-probs of rank {} are kept, and as many ranks go on from them",
                rank.0
            ),
            Err(error) => format!("{count} reference log-probs of rank {} are lost: {error}", rank.0),
        })
    })
}

/// The log-probs of all pairs, of which this rank has those of `share`, and each other rank has another part.
fn exchange<D: Device>(
    dataset: &PairDataset,
    share: Range<usize>,
    ours: &[ReferencePair],
    group: &RankGroup<D>,
) -> Result<Vec<ReferencePair>> {
    let mut logps = vec![0.0f32; 2 * dataset.pairs.len()];
    for (pair, known) in share.zip(ours) {
        [logps[2 * pair], logps[2 * pair + 1]] = [known.logp_chosen, known.logp_rejected];
    }
    sum(&mut logps, group)?;
    let pairs = dataset.pairs.iter().zip(logps.chunks_exact(2));
    Ok(pairs
        .map(|(pair, logps)| {
            let [tokens_chosen, tokens_rejected] = pair.scored_tokens().map(|tokens| tokens as u32);
            ReferencePair { logp_chosen: logps[0], logp_rejected: logps[1], tokens_chosen, tokens_rejected }
        })
        .collect())
}

/// Sums `values` over all ranks.
fn sum<D: Device>(values: &mut [f32], group: &RankGroup<D>) -> Result<()> {
    let (device, communicator) = (&*group.device, &group.communicator);
    let mut buffer =
        device.as_part(MemoryPart::Reference, || device.alloc::<f32>(values.len().clamp(1, PIECE)))?;
    let (mut ready, mut done) = (device.new_event()?, device.new_event()?);
    for piece in values.chunks_mut(PIECE) {
        let _waiting = progress::wait();
        device.upload(&mut buffer, 0, piece)?;
        device.record(&mut ready, Queue::Compute)?;
        device.wait(Queue::Collectives, &ready)?;
        device.all_reduce(communicator, &mut buffer, 0..piece.len())?;
        device.record(&mut done, Queue::Collectives)?;
        device.wait(Queue::Compute, &done)?;
        device.download(piece, &buffer, 0)?;
    }
    Ok(())
}
