//! Nothing is allocated inside a training step, and a tokenizer leaves nothing behind: a binary of its own, because its
//! allocator counts for the whole process.
//!
//! What is counted: every allocation of [`LARGE`] bytes or more, on any thread, from the first step on, with two
//! exceptions. First, memory on a cache line's boundary: only the `gemm` crate asks for that, to pack the operands of a
//! gemm, and it leaves no way to hand it memory. Second, by their size, the lists of a few bytes for each token, pair or
//! tensor that the host makes to pack a batch and to name the tensors of an update.

#![allow(unsafe_code, reason = "an allocator is unsafe by its trait")]

#[path = "training/golden.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod golden;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use golden::{Golden, OBJECTIVE, STEP};
use mmpo_fast::config::{GradientConfig, MemoryConfig};
use mmpo_fast::data::{Message, TextEncoder};
use mmpo_fast::device::Hardware;
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::prelude::*;
use mmpo_fast::model::{HeadChoice, HeadOptions, Recompute};
use mmpo_fast::objective::{Dpo, Objective};
use mmpo_fast::optimizer::{AdamWStep, MasterWeights, MomentFormat, StateOptions};
use mmpo_fast::train::Workload;

/// Bytes from which on an allocation counts. The smallest scratch memory of an operation here has 16 KiB.
const LARGE: usize = 4096;
/// Boundary of what the `gemm` crate allocates.
const CACHE_LINE: usize = 64;

static COUNTING: AtomicBool = AtomicBool::new(false);
static LARGE_ONES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
static SMALL_ONES: AtomicUsize = AtomicUsize::new(0);
/// Bytes that are allocated and not yet freed.
static LIVE: AtomicIsize = AtomicIsize::new(0);
/// Held by the test that runs, so that no other one allocates at the same time.
static ALONE: Mutex<()> = Mutex::new(());

struct Counting;

fn note(bytes: usize, boundary: usize) {
    LIVE.fetch_add(bytes as isize, Ordering::Relaxed);
    if !COUNTING.load(Ordering::Relaxed) || boundary >= CACHE_LINE {
        return;
    }
    match bytes >= LARGE {
        true => {
            LARGE_ONES.fetch_add(1, Ordering::Relaxed);
            LARGEST.fetch_max(bytes, Ordering::Relaxed);
        }
        false => _ = SMALL_ONES.fetch_add(1, Ordering::Relaxed),
    }
}

// SAFETY: every method hands its arguments to the system's allocator unchanged, and counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), layout.align());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size(), layout.align());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size, layout.align());
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of `work`: how many large ones, and the bytes of the largest.
fn large_allocations(work: impl FnOnce()) -> (usize, usize) {
    for count in [&LARGE_ONES, &LARGEST, &SMALL_ONES] {
        count.store(0, Ordering::Relaxed);
    }
    COUNTING.store(true, Ordering::Relaxed);
    work();
    COUNTING.store(false, Ordering::Relaxed);
    (LARGE_ONES.load(Ordering::Relaxed), LARGEST.load(Ordering::Relaxed))
}

/// Steps and an evaluation of a model, with and without biases, tied embeddings, entropies and kept probabilities.
#[test]
fn a_step_allocates_nothing_large() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let (large, largest) = large_allocations(|| drop(std::hint::black_box(vec![1u8; 1 << 20])));
    assert_eq!((large, largest), (1, 1 << 20), "the allocator counts");

    let recompute = HeadOptions { mode: HeadChoice::Recompute, ..HeadOptions::default() };
    let dpo = Objective::Dpo(Dpo { beta: 0.1, label_smoothing: 0.0 });
    let plain = MemoryConfig::default();
    let states = StateOptions { moments: MomentFormat::EightBit, master: MasterWeights::None };
    let by_layer =
        MemoryConfig { recompute: Recompute::Layer, gradients: GradientConfig::Layer, states, ..plain };
    let small = StateOptions { moments: MomentFormat::Bf16, master: MasterWeights::F32 };
    let selective = MemoryConfig { recompute: Recompute::Selective, states: small, ..plain };
    let bf16_sums = MemoryConfig { gradients: GradientConfig::Bf16, ..plain };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    for (name, objective, head, memory) in [
        ("tied", OBJECTIVE, HeadOptions::default(), plain),
        ("bias", dpo, HeadOptions::default(), plain),
        ("base", OBJECTIVE, recompute, plain),
        ("base", OBJECTIVE, HeadOptions::default(), selective),
        ("base", OBJECTIVE, HeadOptions::default(), by_layer),
        ("bias", OBJECTIVE, HeadOptions::default(), bf16_sums),
    ] {
        let mut golden = Golden::read(&folder.join(name));
        if memory.gradients == GradientConfig::Layer {
            // Half of the pairs, since all of them are one micro-batch, whose list of tokens would count as large.
            golden.pairs.truncate(golden.pairs.len() / 2);
        }
        let device = Arc::new(CpuDevice::new(Some(3)).expect("the CPU device starts"));
        // Gradients by layer take neither clipping nor several micro-batches.
        let max_grad_norm = (memory.gradients != GradientConfig::Layer).then_some(1.0);
        let adjust = |workload: Workload| match memory.gradients {
            GradientConfig::F32 | GradientConfig::Bf16 => Workload { head, memory, ..workload },
            GradientConfig::Layer => {
                let whole = Workload::plan(&golden.pairs, &objective, golden.pairs.len(), usize::MAX);
                Workload { head, memory, ..whole }
            }
        };
        golden.with_trainer_of(&device, objective, adjust, |trainer, pairs| {
            let before = device.memory();
            for step in 1..=3 {
                let (large, largest) = large_allocations(|| {
                    trainer.step(pairs, AdamWStep { step, ..STEP }, max_grad_norm).expect("step");
                    trainer.evaluate(pairs).expect("evaluation");
                });
                let small = SMALL_ONES.load(Ordering::Relaxed);
                let what = format!("{name} on {}, step {step}", device.describe());
                assert_eq!(large, 0, "{what}: the largest of them has {largest} bytes; {small} small ones");
                assert_eq!(device.memory(), before, "{what}: buffers and scratch memory");
            }
        });
    }
}

/// The golden's tokenizer with a layout that is left to the library, in a folder of its own.
fn whole_texts(golden: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["tokenizer_config.json", "chat_template.jinja", "config.json"] {
        std::fs::copy(golden.join(name), folder.path().join(name)).expect("a committed file");
    }
    let text = std::fs::read_to_string(golden.join("tokenizer.json")).expect("a committed tokenizer");
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    tokenizer["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).expect("a file");
    folder
}

/// Tokenizers and chat templates that are loaded, used and dropped, of which one kind is cut into words and one is not.
#[test]
fn a_tokenizer_leaves_nothing_behind() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let (golden, mut kinds) = (tests.join("goldens/base/model"), Vec::new());
    let whole = whole_texts(&golden);
    for folder in [&golden, &tests.join("data/chatml"), whole.path()] {
        let use_one = || {
            let encoder = TextEncoder::load(folder, None).expect("a committed tokenizer");
            let words: String = (0..400).map(|number| format!("word{number} caf\u{e9} ")).collect();
            let messages = [Message::new("user", words)];
            assert!(encoder.encode_chat_prompt(&messages).expect("ids").len() > 400);
            encoder.tokenizer.is_cut_into_words()
        };
        for _ in 0..3 {
            use_one();
        }
        let before = LIVE.load(Ordering::Relaxed);
        kinds.push(use_one());
        for _ in 1..20 {
            use_one();
        }
        let left = (LIVE.load(Ordering::Relaxed) - before) / 20;
        assert!(left <= 1024, "{}: {left} bytes stay for each", folder.display());
    }
    assert!(kinds.contains(&true) && kinds.contains(&false), "both kinds: {kinds:?}");
}
