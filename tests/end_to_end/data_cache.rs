//! Tokenised pairs that are kept between commands, and files of other trainers that become recipes.

use std::process::{Command, Stdio};

use crate::harness::*;

const CHECK: &str = "check --model base --max-length 160 --max-prompt-length 64 --json --data pairs.jsonl";

/// What standard output and standard error say.
fn said(workplace: &Workplace, arguments: &str) -> (String, String) {
    let finished = workplace.succeed(arguments);
    (finished.stdout, finished.stderr)
}

#[test]
fn check_and_train_say_and_do_the_same_with_and_without_the_cache() {
    let workplace = Workplace::new();
    let (without, _) = said(&workplace, &format!("{CHECK} --data-cache off"));
    assert!(!workplace.path("cache/pairs").exists(), "off writes nothing");
    let (written, notes) = said(&workplace, CHECK);
    assert!(notes.contains("tokenised pairs are kept in"), "{notes}");
    let (read, notes) = said(&workplace, CHECK);
    assert!(notes.contains("tokenised pairs are read from"), "{notes}");
    assert_eq!(written, without);
    assert_eq!(read, without);

    workplace.succeed(&format!("{TRAIN} --output off --max-steps 2 --data-cache off"));
    let (_, notes) = said(&workplace, &format!("{TRAIN} --output kept --max-steps 2"));
    assert!(notes.contains("tokenised pairs are read from"), "a check leaves them for training: {notes}");
    workplace.assert_same_bits("off", "kept", 2);
    let resolved = String::from_utf8(workplace.read("off/resolved.toml")).unwrap();
    assert!(resolved.contains("data_cache = \"off\""), "{resolved}");

    let kept = std::fs::read_dir(workplace.path("cache/pairs")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&kept).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&kept, bytes).unwrap();
    let (mended, notes) = said(&workplace, CHECK);
    assert!(notes.contains("its checksum differs") && notes.contains("tokenised again"), "{notes}");
    assert_eq!(mended, without);
    let (elsewhere, _) = said(&workplace, &format!("{CHECK} --data-cache mine"));
    assert_eq!(elsewhere, without);
    assert_eq!(std::fs::read_dir(workplace.path("mine")).unwrap().count(), 1);
    workplace.refuse(&format!("{CHECK} --data-cache="), 2, &["data-cache"]);
}

/// The command with files of at most `blocks` blocks of 512 or 1024 bytes, as on a full disk.
fn on_a_full_disk(workplace: &Workplace, arguments: &str, blocks: usize) -> (String, String) {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    let output = Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_mmpo-fast")])
        .args(arguments.split_whitespace())
        .current_dir(workplace.path("."))
        .env("MMPO_FAST_CACHE", workplace.path("full"))
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let (out, errors) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{errors}");
    (out, errors)
}

#[test]
fn a_full_disk_costs_the_cache_and_nothing_else() {
    let workplace = Workplace::new();
    let lines = String::from_utf8(workplace.read("pairs.jsonl")).unwrap();
    // More ids than are gathered before they are written, so that the disk is full while pairs are still read.
    let many: String = (0..80).map(|_| lines.clone()).collect();
    for text in [lines, many] {
        workplace.write("pairs.jsonl", text);
        let (without, _) = said(&workplace, &format!("{CHECK} --data-cache off"));
        let (found, notes) = on_a_full_disk(&workplace, CHECK, 1);
        assert!(notes.contains("held in memory instead"), "{notes}");
        assert_eq!(found, without);
        let left = std::fs::read_dir(workplace.path("full/pairs")).unwrap().count();
        assert_eq!(left, 0, "nothing stays of what could not be written");
    }
}

#[test]
fn a_file_of_another_trainer_becomes_a_recipe_that_trains() {
    let workplace = Workplace::new();
    let file = "model_name_or_path: base\ndatasets:\n  - path: pairs.jsonl\noutput_dir: run\nmax_length: 160\n\
                max_prompt_length: 64\nlearning_rate: 1e-4\nmax_steps: 2\nper_device_train_batch_size: 2\n\
                report_to: wandb\nbf16: true\n";
    workplace.write("dpo.yaml", file);
    let printed = workplace.succeed("import dpo.yaml");
    assert!(printed.stdout.contains("objective = \"dpo\"\n"), "{}", printed.stdout);
    for row in ["kept", "mapped", "no effect", "default", "learning_rate:7", "per_device_train_batch_size:9"]
    {
        assert!(printed.stderr.contains(row), "no {row:?} in {}", printed.stderr);
    }
    let written = workplace.succeed("import dpo.yaml --output recipe.toml");
    assert!(written.stdout.contains("recipe.toml"));
    assert_eq!(String::from_utf8(workplace.read("recipe.toml")).unwrap(), printed.stdout);
    workplace.succeed("train --recipe recipe.toml --device cpu --threads 1");
    assert_eq!(workplace.series("run", "loss").len(), 2);

    workplace.write("bad.yaml", format!("{file}load_in_4bit: true\nloss_typ: ipo\n"));
    let finished = workplace.run("import bad.yaml --output bad.toml");
    assert_eq!(finished.code, Some(2), "{}", finished.stderr);
    for part in ["2 keys are refused", "load_in_4bit", "loss_typ", "no quantised weights", "--without"] {
        assert!(finished.stderr.contains(part), "no {part:?} in {}", finished.stderr);
    }
    assert!(!workplace.path("bad.toml").exists());
    let left_out = workplace.succeed("import bad.yaml --without load_in_4bit,loss_typ");
    assert_eq!(left_out.stdout, printed.stdout);
    workplace.write("what.yaml", "a: 1\n");
    workplace.refuse("import what.yaml", 2, &["no key tells which program"]);
    workplace.refuse("import none.yaml", 5, &["none.yaml"]);
    workplace.refuse("import dpo.yaml --devices 0", 2, &["--devices"]);
}
