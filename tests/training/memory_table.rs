//! README's table of memory by model, against the tensors of each model.

use mmpo_fast::bench::shapes;
use mmpo_fast::model::LlamaTensors;
use mmpo_fast::optimizer::{MasterWeights, MomentFormat};

/// Bytes per parameter of full training on a GPU: bf16 weight, f32 master copy, gradient and two moments.
const GPU_BYTES: usize = 2 + 4 * 4;
/// And on the CPU, where the weight is f32 and its own master copy.
const CPU_BYTES: usize = 4 * 4;

#[test]
fn readme_states_the_memory_of_each_model() {
    let readme = include_str!("../../README.md");
    for (name, shown) in
        [("smollm2-135m", "SmolLM2-135M"), ("llama-3.2-1b", "Llama-3.2-1B"), ("llama-3-8b", "Llama-3-8B")]
    {
        let layout = LlamaTensors::layout(&shapes::model(name, None).unwrap());
        let parameters: usize =
            layout.iter().flat_map(|fused| &fused.parts).map(|tensor| tensor.values()).sum();
        let gigabytes = |bytes: usize| format!("{:.1} GB", (parameters * bytes) as f64 / 1e9);
        let row = format!(
            "| {shown} | {:.1} M | {} | {} |",
            parameters as f64 / 1e6,
            gigabytes(GPU_BYTES),
            gigabytes(CPU_BYTES)
        );
        assert!(readme.contains(&row), "README.md has no row {row:?}");
    }
}

/// The table of docs/memory.md, from what a state of a large tensor takes.
#[test]
fn the_document_states_the_bytes_of_each_choice() {
    const VALUES: usize = 1 << 20;
    let document = include_str!("../../docs/memory.md");
    let per_value = |bytes: usize| {
        let text = format!("{:.2}", bytes as f64 / VALUES as f64);
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    };
    for (options, moments, master) in [
        ("none", MomentFormat::F32, MasterWeights::F32),
        ("`--optimizer-states bf16`", MomentFormat::Bf16, MasterWeights::F32),
        ("`--optimizer-states 8bit`", MomentFormat::EightBit, MasterWeights::F32),
        ("`--master-weights split`", MomentFormat::F32, MasterWeights::Split),
        ("`--optimizer-states 8bit` `--master-weights split`", MomentFormat::EightBit, MasterWeights::Split),
        ("`--master-weights none`", MomentFormat::F32, MasterWeights::None),
        ("`--optimizer-states bf16` `--master-weights none`", MomentFormat::Bf16, MasterWeights::None),
        ("`--optimizer-states 8bit` `--master-weights none`", MomentFormat::EightBit, MasterWeights::None),
    ] {
        let moments = moments.bytes(VALUES);
        let master = master.bytes();
        let (cuda, cpu) = (VALUES * (2 + master + 4) + moments, VALUES * (4 + 4) + moments);
        let (moments, cuda, cpu) = (per_value(moments), per_value(cuda), per_value(cpu));
        let row = format!("| {options} | 2 | {master} | {moments} | 4 | {cuda} | {cpu} |");
        assert!(document.contains(&row), "docs/memory.md has no row {row:?}");
    }
}
