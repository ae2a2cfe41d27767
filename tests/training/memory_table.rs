//! README's table of memory by model, against the tensors of each model.

use mmpo_fast::bench::shapes;
use mmpo_fast::model::LlamaTensors;

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
