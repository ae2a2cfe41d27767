//! The command line as a user meets it: messages, suggestions, exit codes.

use std::process::{Command, Output};

use crate::harness::Workplace;

fn mmpo_fast(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mmpo-fast"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .env("NO_COLOR", "1")
        .output()
        .unwrap()
}

/// Runs what must fail, and gives its exit code and standard error.
fn failure(arguments: &[&str]) -> (i32, String) {
    let output = mmpo_fast(arguments);
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(output.stdout.is_empty(), "{arguments:?} wrote to standard output");
    assert!(!message.contains("panicked"), "{message}");
    (output.status.code().unwrap(), message)
}

/// Suggestions are the flags of the command, whatever the program's file is called.
#[test]
fn a_program_under_another_name_suggests_the_flags_of_its_command() {
    let workplace = Workplace::new();
    let renamed = workplace.path("trainer");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mmpo-fast"), &renamed).unwrap();
    let output = Command::new(renamed).args(["score", "--modle", "m"]).env("NO_COLOR", "1").output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert!(message.contains("did you mean `--model`?"), "{message}");
}

#[test]
fn mistakes_on_the_command_line_exit_with_2_and_say_what_helps() {
    for (arguments, expected) in [
        (
            &["train", "--leraning-rate", "1"][..],
            "unknown flag `--leraning-rate`; did you mean `--learning-rate`?",
        ),
        (&["train", "--lr", "1"], "did you mean `--learning-rate`?"),
        (&["train", "--per_device_train_batch_size=4"], "did you mean `--tokens-per-micro-batch`?"),
        (&["train", "--zzzz"], "did you mean `--"),
        (&["score", "--modle", "m"], "did you mean `--model`?"),
        (&["generate", "--max-tokens", "5"], "did you mean `--max-new-tokens`?"),
        (&["--versoin"], "did you mean `--version`?"),
        (&["trian"], "unknown command `trian`; did you mean `train`?"),
        (&["train", "pairs.jsonl"], "unexpected argument `pairs.jsonl`"),
        (&["train", "--model", "m"], "--data and --output missing"),
        (
            &["train", "--model", "m", "--data", "d", "--output", "o", "--label-smoothing", "0.1"],
            "belongs to dpo",
        ),
        (&["train", "--beta", "-1"], "`--beta` = -1.0 must be finite and greater than 0"),
        (&["train", "--beta", "much"], "`--beta` must be a number, not `much`"),
        (&["train", "--beta"], "a value is required"),
        (&["train", "--beta", "1", "--beta", "2"], "cannot be used multiple times"),
        (&["train", "--reward-normalize", "maybe"], "must be true or false"),
        (&["train", "--device", "gpu"], "auto, cpu, cuda"),
        (&["train", "--quiet", "--verbose"], "cannot be used with"),
        (&["train", "--warmup-steps", "3", "--warmup-ratio", "0.1"], "cannot be given together"),
        (&["score", "--model", "m", "--data", "d"], "--output"),
        (&["score", "--model", "m", "--data", "d", "--output", "o", "--beta", "1"], "--reference"),
        (
            &[
                "score",
                "--model",
                "m",
                "--data",
                "d",
                "--output",
                "o",
                "--max-length",
                "8",
                "--max-prompt-length",
                "8",
            ],
            "leaves no room",
        ),
        (&["generate", "--model", "m", "--prompt", "p", "--top-p", "0.9"], "no effect on greedy"),
        (
            &["generate", "--model", "m", "--prompt", "p", "--temperature", "-1"],
            "must be finite and at least 0",
        ),
        (&["generate", "--model", "m", "--prompt", "p", "--raw", "--system", "s"], "cannot be used with"),
        (&["generate", "--model", "", "--prompt", "p"], "must name a folder"),
        (&["--quiet"], "a command is missing"),
    ] {
        let (code, message) = failure(arguments);
        assert_eq!(code, 2, "{arguments:?}: {message}");
        assert!(message.contains(expected), "{arguments:?}: {message}");
    }
}

#[test]
fn a_recipe_with_a_mistake_is_named_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("mine.toml");
    std::fs::write(&recipe, "beta = 0.1\nmax_lenght = 512\n").unwrap();
    let (code, message) = failure(&["train", "--recipe", recipe.to_str().unwrap()]);
    assert_eq!(code, 2);
    assert!(
        message.contains("mine.toml:2: unknown key `max_lenght`; did you mean `max_length`?"),
        "{message}"
    );
}

#[test]
fn a_recipe_that_is_not_there_exits_with_5() {
    let (code, message) = failure(&["train", "--recipe", "no/such/recipe.toml"]);
    assert_eq!(code, 5);
    assert!(message.contains("cannot read no/such/recipe.toml"), "{message}");
}

#[test]
fn version_in_short_and_in_full() {
    let short = mmpo_fast(&["--version"]);
    assert!(short.status.success());
    let expected = format!("mmpo-fast {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(short.stdout).unwrap(), expected);
    let full = String::from_utf8(mmpo_fast(&["--version", "--verbose"]).stdout).unwrap();
    assert!(full.starts_with(&expected) && full.contains("devices") && full.contains("target"), "{full}");
    assert_eq!(mmpo_fast(&["-V"]).stdout, expected.as_bytes());
}

#[test]
fn help_goes_to_standard_output_and_lists_every_option_with_its_default() {
    let help = mmpo_fast(&["train", "--help"]);
    assert!(help.status.success());
    let text = String::from_utf8(help.stdout).unwrap();
    for row in mmpo_fast::config::options::rows() {
        let flag = mmpo_fast::config::options::flag_name(row.name);
        assert!(text.contains(&flag), "{flag} is not in the help");
    }
    let words: Vec<&str> = text.split_whitespace().collect();
    let text = words.join(" ");
    assert!(text.contains("[default: mmpo 0.05, dpo 0.1, simpo 2.0"), "{text}");
    assert_eq!(mmpo_fast(&[]).status.code(), Some(2));
    assert!(mmpo_fast(&["--help"]).status.success());
}

#[test]
fn no_color_is_kept() {
    let (_, message) = failure(&["train", "--zzzz"]);
    assert!(!message.contains('\u{1b}'), "{message:?}");
}

#[test]
fn a_log_filter_that_is_none_is_an_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"))
        .args(["--version"])
        .env("RUST_LOG", "mmpo_fast=loud")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8(output.stderr).unwrap().contains("RUST_LOG"), "the variable is not named");
}

#[test]
fn shells_complete_every_command_and_flag() {
    let work = Workplace::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = work.succeed(&format!("completions {shell}")).stdout;
        for word in ["train", "score", "generate", "bench", "length-normalize", "max-new-tokens"] {
            assert!(text.contains(word), "{shell}: no {word:?}");
        }
    }
    let refused = work.run("completions tcsh");
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("[possible values: bash, elvish, fish, powershell, zsh]"),
        "{}",
        refused.stderr
    );
}

#[test]
fn man_pages_are_written_for_every_command() {
    let work = Workplace::new();
    work.succeed("man pages/man1");
    for (page, words) in [
        ("mmpo-fast.1", ["mmpo\\-fast\\-train(1)", "\\-\\-quiet"]),
        ("mmpo-fast-train.1", ["\\-\\-length\\-normalize", "Examples"]),
        ("mmpo-fast-generate.1", ["\\-\\-max\\-new\\-tokens", "Example"]),
    ] {
        let text = String::from_utf8(work.read(&format!("pages/man1/{page}"))).unwrap();
        for word in words {
            assert!(text.contains(word), "{page}: no {word:?} in {text}");
        }
    }
    work.write("file", "mine");
    work.refuse("man file", 5, &["cannot create file"]);
}
