//! candle 0.11.1 beside mmpo-fast, on the CPU and, built with the feature `cuda`, on a GPU: `ops` times its attention and cross
//! entropy one by one, `step` a training step of a Llama, `generate` greedy text by candle's own Llama.
//!
//! candle's fused softmax, RMSNorm and RoPE have no backward: gradients stop there without a word. So its differentiable
//! operations are used (`ops::softmax`, `ops::rms_norm_slow`, `rotary_emb::rope_slow`), which is what training in candle means
//! today, and the first step checks that every weight gets a gradient.

mod bench;
mod generate;
mod llama;
mod ops;
mod step;

use std::env;
use std::process::Command;

use candle_core::{Device, Result};

use bench::Arguments;

fn main() -> Result<()> {
    let arguments = Arguments::from_process()?;
    // candle reads its thread count from the environment alone, so this process starts itself again with it set.
    let threads = arguments.threads.to_string();
    if matches!(arguments.device, Device::Cpu) && env::var("RAYON_NUM_THREADS").as_ref() != Ok(&threads) {
        let mut again = Command::new(env::current_exe()?);
        let status = again.args(env::args_os().skip(1)).env("RAYON_NUM_THREADS", &threads).status()?;
        std::process::exit(status.code().unwrap_or(1));
    }
    match arguments.part.as_str() {
        "ops" => ops::run(&arguments),
        "generate" => generate::run(&arguments),
        _ => step::run(&arguments),
    }
}
