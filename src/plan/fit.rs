//! What a run does with its account before the first step: it is refused where it cannot fit, or chooses options so that it does.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::account::Account;
use super::footprint::{Choice, Footprint};
use super::rates;
use super::search::{Tried, flags, still_chosen};
use super::size;
use crate::config::{MemoryLimit, RESOLVED_FILE, RunConfig, recipe};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::host_memory::HostMemory;

/// Bytes of a GPU's free memory that are left to the driver, which loads kernels as they are used.
const DRIVER_SPARE: usize = 256 << 20;
/// Share of the computer's free memory that `--memory auto` takes on the CPU: pairs, files and the operating system need some too.
const HOST_SHARE: f64 = 0.9;
/// Share of the computer's free memory that offloaded states may take: it cannot be swapped out.
const PINNED_SHARE: f64 = 0.8;
/// Combinations of options that a refusal names.
const NAMED: usize = 3;

/// How much memory there is, and who says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Bytes.
    pub bytes: usize,
    /// As a sentence goes on: `are free on cuda:0`.
    reason: String,
    /// Whether the head must keep to it too: the computer's main memory is not divided up so closely.
    is_strict: bool,
}

/// What `device` and `--memory` allow; `None` where neither says anything.
fn limit<D: Device>(device: &D, asked: Option<MemoryLimit>) -> Result<Option<Limit>> {
    let machine = match device.free_memory()? {
        Some(free) => Some(Limit {
            bytes: free.saturating_sub(DRIVER_SPARE),
            reason: "are free on the device".to_owned(),
            is_strict: true,
        }),
        None => HostMemory::read().map(|memory| match asked {
            Some(MemoryLimit::Auto) => Limit {
                bytes: (memory.available as f64 * HOST_SHARE) as usize,
                reason: "are free in this computer".to_owned(),
                is_strict: true,
            },
            _ => Limit {
                bytes: memory.total(),
                reason: "are all that this computer has".to_owned(),
                is_strict: false,
            },
        }),
    };
    let stated = match asked {
        Some(MemoryLimit::Bytes(bytes)) => {
            Some(Limit { bytes, reason: "are what `--memory` allows".to_owned(), is_strict: true })
        }
        _ => None,
    };
    // The statement comes first: of two equal ones it is the one that can be changed.
    Ok(stated.into_iter().chain(machine).min_by_key(|limit| limit.bytes))
}

/// Makes the run's account on `device`, before anything is loaded; the device then keeps to the limit that the account kept to.
///
/// # Errors
/// [`Error::Device`] where the run cannot fit, which says by how much, and with which options it would.
pub fn check<D: Device>(device: &D, account: &Account<'_>) -> Result<Footprint> {
    let limit = limit(device, account.config.memory_limit)?;
    let strict = limit.as_ref().filter(|limit| limit.is_strict).map(|limit| limit.bytes);
    let footprint = account.footprint(device, &account.asked(), strict)?;
    if let Some(limit) = limit.filter(|limit| footprint.taken > limit.bytes) {
        let rates = rates::find(&device.describe()).map(|kind| kind.rates);
        let tried = account.alternatives(device, rates, (limit.bytes, pinnable()), NAMED)?;
        return Err(too_large(account, &footprint, &limit, &tried));
    }
    device.memory_counter().set_limit(strict);
    tracing::info!("memory: {} of device memory at the peak ({})", size(footprint.peak), parts(&footprint));
    Ok(footprint)
}

/// The largest parts, for a message.
fn parts(footprint: &Footprint) -> String {
    let mut parts: Vec<_> = footprint.parts.iter().collect();
    parts.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
    let some = parts.into_iter().take(4).map(|(part, bytes)| format!("{} {}", part.name(), size(bytes)));
    some.collect::<Vec<_>>().join(", ")
}

fn too_large(account: &Account<'_>, footprint: &Footprint, limit: &Limit, tried: &[Tried]) -> Error {
    let message = format!(
        "this run takes {} of device memory, and {} {}: {} too much ({})",
        size(footprint.taken),
        size(limit.bytes),
        limit.reason,
        size(footprint.taken - limit.bytes),
        parts(footprint),
    );
    let asked = account.asked();
    let named = |tried: &Tried| {
        let flags = flags(&asked, &tried.candidate.choice).join(" ");
        format!("{flags} ({})", size(tried.footprint.taken))
    };
    let fitting: Vec<String> =
        tried.iter().filter(|tried| tried.footprint.taken <= limit.bytes).map(named).collect();
    let help = match (fitting.is_empty(), tried.first()) {
        (false, _) => format!("it fits with {}; --memory auto chooses by itself", fitting.join(", or with ")),
        (true, Some(least)) if least.candidate.choice != asked => {
            format!("even with {} it does not fit: {}", named(least), smaller(account))
        }
        (true, _) => format!("no option takes less: {}", smaller(account)),
    };
    Error::device(message, help)
}

/// What is left where no option of memory helps.
fn smaller(account: &Account<'_>) -> String {
    let lora = match account.job.lora {
        None => "train adapters with --lora all, ",
        Some(_) => "",
    };
    format!("{lora}shorten the pairs with --max-length, or take a smaller model")
}

/// Bytes of the computer's free memory that may be pinned, where the system says how much is free.
fn pinnable() -> Option<usize> {
    HostMemory::read().map(|memory| (memory.available as f64 * PINNED_SHARE) as usize)
}

/// The memory from which `--memory auto` chooses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreeMemory {
    /// The device's memory; `None` where the system does not say how much is free.
    limit: Option<Limit>,
    /// Bytes of the computer's memory that may be pinned; `None` as there.
    pinnable: Option<usize>,
}

impl FreeMemory {
    /// What one of `local_ranks` ranks has that share a computer: each has a device of its own, unless that computes in the
    /// computer's own memory.
    ///
    /// # Errors
    /// Those of the device.
    pub fn of_rank<D: Device>(device: &D, local_ranks: usize) -> Result<Self> {
        let ranks = local_ranks.max(1);
        let sharing = if device.free_memory()?.is_some() { 1 } else { ranks };
        let limit = limit(device, Some(MemoryLimit::Auto))?;
        Ok(FreeMemory {
            limit: limit.map(|limit| Limit { bytes: limit.bytes / sharing, ..limit }),
            pinnable: pinnable().map(|bytes| bytes / ranks),
        })
    }

    /// What each of these ranks has: all must choose the same options.
    pub fn least<'a>(ranks: impl Iterator<Item = &'a FreeMemory>) -> Self {
        let least = |one: FreeMemory, other: &FreeMemory| {
            let limits = one.limit.into_iter().chain(other.limit.clone());
            let pinnable = one.pinnable.into_iter().chain(other.pinnable);
            FreeMemory { limit: limits.min_by_key(|limit| limit.bytes), pinnable: pinnable.min() }
        };
        ranks.fold(FreeMemory { limit: None, pinnable: None }, least)
    }
}

/// What `--memory auto` chooses on `device`, of which so much is free.
///
/// # Errors
/// [`Error::Device`] where no choice fits.
pub fn choose<D: Device>(device: &D, account: &Account<'_>, free: FreeMemory) -> Result<Choice> {
    let asked = account.asked();
    let Some(limit) = free.limit else {
        tracing::warn!(
            "--memory auto: this system does not say how much memory is free, so nothing is changed"
        );
        return Ok(asked);
    };
    let rates = rates::find(&device.describe()).map(|kind| kind.rates);
    let tried = account.alternatives(device, rates, (limit.bytes, free.pinnable), 1)?;
    match tried.iter().find(|tried| tried.footprint.taken <= limit.bytes) {
        Some(found) => {
            let flags = flags(&asked, &found.candidate.choice);
            let chosen = match flags.is_empty() {
                true => "the run fits as it is".to_owned(),
                false => format!("chose {}", flags.join(" ")),
            };
            tracing::info!(
                "--memory auto: {chosen}, {} of the {} that {}",
                size(found.footprint.taken),
                size(limit.bytes),
                limit.reason
            );
            Ok(found.candidate.choice)
        }
        None => {
            let footprint = account.footprint(device, &asked, Some(limit.bytes))?;
            Err(too_large(account, &footprint, &limit, &tried))
        }
    }
}

/// What `--memory auto` chose in an earlier part of this run, where `--resume` continues one. An option with which `config` keeps less
/// memory than the earlier part did takes the place of that part's choice.
///
/// # Errors
/// Those of the recipe that it left.
pub fn chosen_before(config: &RunConfig) -> Result<Option<Choice>> {
    let saved = config.output.join(RESOLVED_FILE);
    if !config.resume || !saved.is_file() {
        return Ok(None);
    }
    let saved: &Path = &saved;
    let settled = recipe::read(saved)?.settle(config.objective.kind());
    let (memory, token_budget) = (crate::config::memory(&settled), settled.tokens_per_micro_batch);
    let asked = Choice {
        memory: config.memory,
        token_budget: config.batch.tokens_per_micro_batch,
        head: config.head,
    };
    Ok(Some(still_chosen(&asked, &Choice { memory, token_budget, head: config.head })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Memory;
    use crate::device::cpu::CpuDevice;

    #[test]
    fn the_smaller_of_statement_and_machine_holds() {
        let cpu = CpuDevice::new(Some(1)).unwrap();
        let stated = limit(&cpu, Some(MemoryLimit::Bytes(1000))).unwrap().unwrap();
        assert_eq!((stated.bytes, stated.is_strict), (1000, true));
        assert!(stated.reason.contains("--memory"), "{stated:?}");
        let endless = limit(&cpu, Some(MemoryLimit::Bytes(1 << 52))).unwrap().unwrap();
        assert!(!endless.reason.contains("--memory"), "a computer has less: {endless:?}");
        cpu.memory_counter().set_limit(Some(1 << 30));
        let free = limit(&cpu, None).unwrap().unwrap();
        assert_eq!(free.bytes, (1 << 30) - DRIVER_SPARE);
    }

    /// Ranks that choose from different memory would choose different options, and none may have less than it chose for.
    #[test]
    fn ranks_choose_from_the_least_that_one_of_them_has() {
        let free = |bytes, pinnable| {
            let limit = |bytes| Limit { bytes, reason: "are free".to_owned(), is_strict: true };
            FreeMemory { limit: Option::map(bytes, limit), pinnable }
        };
        let ranks = [free(Some(70), Some(5)), free(Some(60), None), free(None, Some(4))];
        assert_eq!(FreeMemory::least(ranks.iter()), free(Some(60), Some(4)));
        assert_eq!(FreeMemory::least([free(None, None)].iter()), free(None, None));
        // What is the computer's own is divided among its ranks.
        let cpu = CpuDevice::new(Some(1)).unwrap();
        let [alone, one_of_64] = [1, 64].map(|ranks| FreeMemory::of_rank(&cpu, ranks).unwrap());
        let bytes = |free: &FreeMemory| free.limit.as_ref().map_or(0, |limit| limit.bytes);
        assert!(bytes(&one_of_64) < bytes(&alone) / 16, "{one_of_64:?} {alone:?}");
        assert!(one_of_64.pinnable < alone.pinnable, "{one_of_64:?} {alone:?}");
    }
}
