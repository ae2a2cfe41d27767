//! Makes the built-in demo: a tokenizer, a tiny Llama trained by this project's own `sft` objective, and pairs.
//!
//!     cargo run --release --example make_demo
//!
//! writes `examples/demo/`. Everything follows from one seed; nothing comes from outside.

mod questions;
mod random_weights;

use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use mmpo_fast::cli::{self, Stop};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

const SEED: u64 = 42;
const VOCABULARY: usize = 768;
const EVALUATION_PAIRS: usize = 80;
/// Answers a question gets in the starting model's training data.
const ANSWERS: usize = 4;
/// Share of grumpy ones among them: what the demo has to turn round.
const GRUMPY_SHARE: f64 = 0.6;
const SPECIAL_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\\n' }}{% endif %}";

fn main() -> Result<(), Box<dyn Error>> {
    let target = Path::new("examples/demo");
    let work = tempfile::tempdir()?;
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);

    let mut all = questions::all_questions();
    all.shuffle(&mut rng);
    let (held_out, training) = all.split_at(EVALUATION_PAIRS);
    let pairs = questions::preference_lines(training, &mut rng);
    let evaluation = questions::preference_lines(held_out, &mut rng);
    let sft = questions::sft_lines(&all, ANSWERS, GRUMPY_SHARE, &mut rng);
    println!("{} pairs, {} held out, {} answers to learn from", pairs.len(), evaluation.len(), sft.len());
    fs::create_dir_all(target)?;
    write_lines(&target.join("pairs.jsonl"), &pairs)?;
    write_lines(&target.join("eval_pairs.jsonl"), &evaluation)?;
    let sft_file = work.path().join("sft.jsonl");
    write_lines(&sft_file, &sft)?;

    let start = work.path().join("start");
    fs::create_dir_all(&start)?;
    write_tokenizer(&start, &sft)?;
    write_random_model(&start, &mut rng)?;

    let output = work.path().join("sft");
    let flags = "--objective sft --epochs 12 --learning-rate 2e-3 --pairs-per-step 32 --weight-decay 0.01 \
                 --tokens-per-micro-batch 2048 --max-length 128 --max-prompt-length 64 --device cpu --seed 42";
    let mut command: Vec<OsString> = vec!["mmpo-fast".into(), "train".into()];
    command.extend(flags.split_whitespace().map(OsString::from));
    for (flag, path) in [("--model", &start), ("--data", &sft_file), ("--output", &output)] {
        command.extend([flag.into(), path.into()]);
    }
    match cli::parse(command) {
        Ok(invocation) => invocation.run()?,
        Err(Stop::Clap(error)) => return Err(error.into()),
        Err(Stop::Error(error)) => return Err(error.into()),
    }
    copy_model(&output.join("model"), &target.join("model"))?;
    println!("wrote {}", target.display());
    Ok(())
}

fn write_lines(path: &Path, lines: &[String]) -> Result<(), Box<dyn Error>> {
    Ok(fs::write(path, lines.join("\n") + "\n")?)
}

/// A byte-level BPE tokenizer over the demo's own text, with ChatML's special tokens.
fn write_tokenizer(folder: &Path, lines: &[String]) -> Result<(), Box<dyn Error>> {
    let special: Vec<AddedToken> = SPECIAL_TOKENS.iter().map(|&text| AddedToken::from(text, true)).collect();
    let mut alphabet = ByteLevel::alphabet().into_iter().collect::<Vec<_>>();
    alphabet.sort();
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .initial_alphabet(alphabet.into_iter().collect())
        .special_tokens(special.clone())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    > = TokenizerImpl::new(BPE::default());
    tokenizer
        .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(byte_level)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)));
    let texts = lines.iter().flat_map(|line| message_texts(line)).collect::<Vec<_>>();
    tokenizer.train(&mut trainer, texts.iter().map(String::as_str)).map_err(|error| error.to_string())?;
    tokenizer.save(folder.join("tokenizer.json"), true).map_err(|error| error.to_string())?;
    fs::write(folder.join("chat_template.jinja"), CHAT_TEMPLATE)?;
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": false,
    });
    Ok(fs::write(folder.join("tokenizer_config.json"), serde_json::to_string_pretty(&config)?)?)
}

/// Contents of the messages of a pair, role names too.
fn message_texts(line: &str) -> Vec<String> {
    let pair: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
    ["prompt", "chosen"]
        .iter()
        .flat_map(|side| pair[side].as_array().cloned().unwrap_or_default())
        .map(|message| {
            let text = |key: &str| message[key].as_str().unwrap_or_default().to_string();
            format!("{}\n{}", text("role"), text("content"))
        })
        .collect()
}

fn write_random_model(folder: &Path, rng: &mut ChaCha8Rng) -> Result<(), Box<dyn Error>> {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "attention_bias": false,
        "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
    });
    fs::write(folder.join("config.json"), serde_json::to_string_pretty(&config)?)?;
    random_weights::write_random_weights(folder, rng)
}

fn copy_model(source: &Path, target: &Path) -> Result<(), Box<dyn Error>> {
    fs::create_dir_all(target)?;
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        fs::copy(entry.path(), target.join(entry.file_name()))?;
    }
    Ok(())
}
