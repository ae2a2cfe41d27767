//! `generate` against what transformers says, and the rules of sampling.

use crate::harness::{Workplace, finish, golden};

impl Workplace {
    /// The answer to `prompt`, without its line end.
    fn answer(&self, model: &str, prompt: &str, flags: &str) -> String {
        let mut command = self.command(&format!("generate --model {model} --device cpu {flags}"));
        command.args(["--prompt", prompt]);
        let finished = finish(command);
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        finished.stdout.strip_suffix('\n').expect("a line end").to_string()
    }
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let work = Workplace::new();
    for name in ["tied", "bias", "rope_linear", "rope_llama3", "qwen2", "mistral"] {
        work.bring(name);
    }
    for name in ["base", "tied", "bias", "rope_linear", "rope_llama3", "qwen2", "mistral"] {
        for entry in golden(name)["generate"].as_array().unwrap() {
            let prompt = entry["prompt"].as_str().unwrap();
            let answer = work.answer(name, prompt, "--max-new-tokens 12");
            assert_eq!(answer, entry["new_text"].as_str().unwrap(), "{name}: {prompt}");
        }
    }
}

#[test]
fn an_answer_ends_at_an_end_token() {
    let work = Workplace::new();
    let prompt = "Name three colours.";
    assert_eq!(work.answer("base", prompt, "--max-new-tokens 200"), "Red, green and blue.");
    // Another end token: the comma.
    let golden = golden("base");
    let comma = golden["generate"][1]["new_ids"][1].as_u64().unwrap();
    let config = String::from_utf8(work.read("base/config.json")).unwrap();
    let config = config.replace("\"eos_token_id\": 2", &format!("\"eos_token_id\": [2, {comma}]"));
    work.write("base/config.json", config);
    if work.path("base/generation_config.json").exists() {
        std::fs::remove_file(work.path("base/generation_config.json")).unwrap();
    }
    let cut = work.answer("base", prompt, "--max-new-tokens 200");
    assert!(!cut.is_empty() && cut.len() < 20 && "Red, green and blue.".starts_with(&cut), "{cut:?}");
}

#[test]
fn an_answer_that_cannot_be_written_is_an_error() {
    let work = Workplace::new();
    let mut command = work.command("generate --model base --prompt hello --device cpu");
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = command.stdout(full).spawn().unwrap().wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(5), "{message}");
    assert!(message.contains("cannot write to standard output"), "{message}");
}

#[test]
fn sampling_repeats_with_its_seed() {
    let work = Workplace::new();
    work.bring("tied");
    let sample =
        |flags: &str| work.answer("tied", "Why is the sky blue?", &format!("--max-new-tokens 24 {flags}"));
    let one = sample("--temperature 1 --seed 1");
    assert_eq!(one, sample("--temperature 1 --seed 1"));
    assert_ne!(one, sample("--temperature 1 --seed 2"));
    // The likeliest token alone is the greedy one, whatever the temperature.
    assert_eq!(sample("--temperature 2 --top-p 1e-9"), sample(""));
}

#[test]
fn a_prompt_is_a_chat_unless_it_is_raw() {
    let work = Workplace::new();
    let prompt = "What is the capital of France?";
    let chat = format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(work.answer("base", &chat, "--raw"), work.answer("base", prompt, ""));
    assert_ne!(
        work.answer("base", prompt, "--raw --max-new-tokens 12"),
        work.answer("base", prompt, "--max-new-tokens 12")
    );
}
