//! A plan as text and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::command::{Exchanges, Planned};
use super::exchange::hiding_tokens;
use super::offload::Copies;
use super::rates::Rates;
use super::search::{Tried, flags};
use super::size;
use super::work::{Volume, Work};
use crate::config::value::OptionValue as _;
use crate::config::{GradientConfig, OffloadConfig};

/// The account for people.
pub(super) fn text(planned: &Planned) -> String {
    let mut text = heading(planned);
    text += &memory(planned);
    if let Some((volume, work)) = &planned.step {
        text += &step(planned, volume, work);
    }
    match (&planned.exchanges, planned.links) {
        (Some(exchanges), _) => text += &ranks(planned, exchanges),
        (None, Some(links)) => {
            let _ = writeln!(
                text,
                "\na step on {} ranks: give the machine's rates with --tflops and --bandwidth, or name a GPU with --gpu, to be told what \
                 they send",
                links.ranks
            );
        }
        (None, None) => {}
    }
    text + &alternatives(planned)
}

fn heading(planned: &Planned) -> String {
    let [all, trained] = planned.parameters;
    let what = match planned.run.lora.is_some() || planned.run.adapter.is_some() {
        true => format!("{:.1} M parameters in adapters of {:.1} M", trained / 1e6, (all - trained) / 1e6),
        false => format!("all {:.1} M parameters", all / 1e6),
    };
    format!(
        "{} trains {what} on {}: {} of {} pairs, micro-batches of up to {} tokens\n",
        planned.run.objective.kind(),
        planned.target.name,
        match (&planned.step, planned.total_steps) {
            // Without pairs, the number of steps is not known.
            (None, _) => "steps".to_owned(),
            (Some(_), 1) => "1 step".to_owned(),
            (Some(_), steps) => format!("{steps} steps"),
        },
        planned.pairs_per_step,
        planned.asked.token_budget,
    )
}

fn memory(planned: &Planned) -> String {
    let (footprint, capacity) = (&planned.footprint, planned.capacity);
    let mut text = format!(
        "\ndevice memory, with room for {} tokens, {} pairs and {} scored tokens at once\n",
        capacity.tokens, capacity.pairs, capacity.scored
    );
    for (part, bytes) in footprint.parts.iter() {
        let _ = writeln!(text, "  {:<28}{:>12}", part.name(), size(bytes));
    }
    let _ = writeln!(text, "  {:<28}{:>12}", "at the peak", size(footprint.peak));
    if footprint.taken > footprint.peak {
        let _ = writeln!(text, "  {:<28}{:>12}", "taken in the driver's pieces", size(footprint.taken));
    }
    let _ = writeln!(text, "  log-prob head: {}", footprint.head);
    if let Some(memory) = planned.target.memory {
        let verdict = match footprint.taken.checked_sub(memory) {
            None | Some(0) => "it fits".to_owned(),
            Some(over) => format!("{} too much", size(over)),
        };
        let _ = writeln!(text, "  {} has {}: {verdict}", planned.target.name, size(memory));
    }
    text
}

fn step(planned: &Planned, volume: &Volume, work: &Work) -> String {
    let mut text = format!(
        "\na step of {:.0} pairs: {:.0} tokens, {:.0} of them scored, {:.1} micro-batches\n",
        volume.pairs, volume.tokens, volume.scored, volume.micro_batches
    );
    for (name, flops) in [
        ("gemms", work.gemm),
        ("attention", work.attention),
        ("log-prob head", work.head),
        ("computed again", work.recomputed),
    ] {
        let _ = writeln!(text, "  {name:<28}{:>12} TFLOP", format!("{:.3}", flops / 1e12));
    }
    match planned.target.rates {
        Some(rates) => text += &time(planned, volume, work, &rates),
        None => {
            text += "  no expected time: give the machine's rates with --tflops and --bandwidth, or name a GPU with --gpu\n"
        }
    }
    text
}

fn time(planned: &Planned, volume: &Volume, work: &Work, rates: &Rates) -> String {
    let seconds = seconds(planned, work, rates);
    let text = format!(
        "  expected {:.3} s: {:.1} pairs/s, {:.0} tokens/s, MFU {:.1} %; {:.2} h for the run\n  \
         (peak {:.0} TFLOPS and {:.0} GB/s, of which gemms reach {:.0} %, attention {:.0} %, copies {:.0} %)\n",
        seconds,
        volume.pairs / seconds,
        volume.tokens / seconds,
        100.0 * mfu(planned, seconds, rates),
        seconds * planned.total_steps as f64 / 3600.0,
        rates.tflops,
        rates.bandwidth,
        100.0 * Rates::GEMM_SHARE,
        100.0 * Rates::ATTENTION_SHARE,
        100.0 * Rates::BANDWIDTH_SHARE,
    );
    match &planned.copies {
        Some(copies) => text + &offload(planned, copies, rates),
        None => text,
    }
}

/// Seconds of a step, with those in which it waits for the bus.
fn seconds(planned: &Planned, work: &Work, rates: &Rates) -> f64 {
    work.seconds(rates) + planned.copies.map_or(0.0, |copies| copies.exposed())
}

/// What the bus moves, and whether that is hidden.
fn offload(planned: &Planned, copies: &Copies, rates: &Rates) -> String {
    let beside = match planned.asked.memory.gradients {
        GradientConfig::Layer => "backward and update",
        GradientConfig::F32 | GradientConfig::Bf16 => "the update",
    };
    let verdict = match copies.exposed() {
        0.0 => "the bus is hidden".to_owned(),
        exposed => format!("{exposed:.3} s are waited for"),
    };
    format!(
        "  offloaded states: {} of pinned host memory, over the bus each way in {:.3} s ({:.0} GB/s, of which copies reach {:.0} %); \
         {beside} of {:.3} s run beside that: {verdict}\n",
        size(copies.host_bytes),
        copies.seconds,
        rates.bus,
        100.0 * Rates::BUS_SHARE,
        copies.beside,
    )
}

fn mfu(planned: &Planned, seconds: f64, rates: &Rates) -> f64 {
    planned.model_flops / (seconds * rates.tflops * 1e12)
}

/// What the ranks exchange in a step, one line for each way to shard.
fn ranks(planned: &Planned, exchanges: &Exchanges) -> String {
    let Exchanges { links, rates, step, all } = exchanges;
    let trained = share_trained(planned);
    let mut text = format!(
        "\na step on {} ranks, {} to a machine: {:.0} tokens and {:.1} micro-batches each; {:.0} GB/s inside a machine, {:.0} GB/s \
         between them\n  --shard     a rank takes   and sends     in   not hidden   the step   hidden from\n",
        links.ranks,
        links.ranks_per_machine,
        step.volume.tokens,
        step.volume.micro_batches,
        links.inside,
        links.between,
    );
    for (exchange, taken) in all {
        let _ = writeln!(
            text,
            "  {:<10}{:>14}{:>12}{:>7} s{:>11} s{:>9} s{:>8} tokens{}",
            exchange.shard.to_toml().trim_matches('"'),
            size(*taken),
            size((exchange.reduced + exchange.gathered) as usize),
            format!("{:.3}", exchange.seconds),
            format!("{:.3}", exchange.exposed),
            format!("{:.3}", step.seconds(exchange, links)),
            format!("{:.0}", hiding_tokens(exchange.shard, trained, rates, links)),
            if exchange.shard == planned.asked.memory.shard { "  as asked" } else { "" },
        );
    }
    if planned.asked.memory.offload == OffloadConfig::States {
        text += "  (--offload states keeps whole states on each rank: every other --shard needs --offload none)\n";
    }
    text + "  (a rank's micro-batch of that many tokens takes as long as the exchange beside it)\n"
}

/// The share of the model's values that is trained.
fn share_trained(planned: &Planned) -> f64 {
    let [all, trained] = planned.parameters;
    trained / all
}

fn alternatives(planned: &Planned) -> String {
    let Some(limit) = planned.limit else { return String::new() };
    let mut text = format!("\nwithin {}, in the order of the time that a step takes\n", size(limit));
    let mut least = usize::MAX;
    for tried in &planned.tried {
        // What takes no less than something that is faster only matters where it fits.
        let taken = tried.footprint.taken;
        if taken >= least && taken > limit {
            continue;
        }
        least = least.min(taken);
        let verdict = match tried.footprint.taken.checked_sub(limit) {
            None | Some(0) => "fits".to_owned(),
            Some(over) => format!("{} too much", size(over)),
        };
        let _ = writeln!(
            text,
            "  {:>10}  {:>6.2} x  {:<20}{}",
            size(tried.footprint.taken),
            tried.candidate.time,
            verdict,
            options(planned, tried)
        );
    }
    if planned.tried.iter().all(|tried| tried.footprint.taken > limit) {
        text += "  nothing fits: this is the least that there is; --lora all, a shorter --max-length or a smaller model takes less\n";
    }
    text
}

fn options(planned: &Planned, tried: &Tried) -> String {
    let flags = flags(&planned.asked, &tried.candidate.choice);
    if flags.is_empty() { "as asked".to_owned() } else { flags.join(" ") }
}

/// The account for programs. Bytes are bytes, operations are operations, seconds are seconds.
pub(super) fn json(planned: &Planned) -> Value {
    let Planned { footprint, capacity, target, .. } = planned;
    let parts: serde_json::Map<String, Value> = footprint
        .parts
        .iter()
        .map(|(part, bytes)| (part.name().replace([' ', '-'], "_"), json!(bytes)))
        .collect();
    let step = planned.step.as_ref().map(|(volume, work)| {
        let seconds = target.rates.as_ref().map(|rates| seconds(planned, work, rates));
        let mfu = target.rates.as_ref().zip(seconds).map(|(rates, seconds)| mfu(planned, seconds, rates));
        json!({
            "pairs": volume.pairs,
            "tokens": volume.tokens,
            "scored_tokens": volume.scored,
            "micro_batches": volume.micro_batches,
            "flops": { "gemm": work.gemm, "attention": work.attention, "head": work.head, "recomputed": work.recomputed },
            "model_flops": planned.model_flops,
            "seconds": seconds,
            "mfu": mfu,
            "offload": planned.copies.map(|copies| json!({
                "host_bytes": copies.host_bytes,
                "copy_seconds": copies.seconds,
                "beside_seconds": copies.beside,
                "exposed_seconds": copies.exposed(),
            })),
        })
    });
    let tried: Vec<Value> = planned
        .tried
        .iter()
        .map(|tried| {
            json!({
                "options": flags(&planned.asked, &tried.candidate.choice),
                "peak_bytes": tried.footprint.peak,
                "taken_bytes": tried.footprint.taken,
                "time": tried.candidate.time,
                "fits": planned.limit.is_some_and(|limit| tried.footprint.taken <= limit),
            })
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "device": target.name,
        "rates": target.rates,
        "pairs": planned.pairs,
        "steps": planned.total_steps,
        "parameters": planned.parameters[0],
        "trained_parameters": planned.parameters[1],
        "micro_batch": { "tokens": capacity.tokens, "pairs": capacity.pairs, "scored_tokens": capacity.scored },
        "memory": {
            "peak_bytes": footprint.peak,
            "taken_bytes": footprint.taken,
            "parts": parts,
            "head": footprint.head.to_string(),
        },
        "step": step,
        "ranks": planned.exchanges.as_ref().map(|exchanges| ranks_json(planned, exchanges)),
        "limit_bytes": planned.limit,
        "alternatives": tried,
    })
}

fn ranks_json(planned: &Planned, exchanges: &Exchanges) -> Value {
    let Exchanges { links, rates, step, all } = exchanges;
    let trained = share_trained(planned);
    let of = |(exchange, taken): &(super::exchange::Exchange, usize)| {
        let mut value = json!(exchange);
        value["taken_bytes"] = json!(taken);
        value["shard"] = json!(exchange.shard.to_toml().trim_matches('"'));
        value["step_seconds"] = json!(step.seconds(exchange, links));
        value["hidden_from_tokens"] = json!(hiding_tokens(exchange.shard, trained, rates, links));
        value
    };
    json!({
        "links": links,
        "tokens": step.volume.tokens,
        "micro_batches": step.volume.micro_batches,
        "shardings": all.iter().map(of).collect::<Vec<_>>(),
    })
}
