//! Tokenised pairs that are kept between commands, and files of other trainers that become recipes.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use crate::harness::*;
use crate::reliability::wait_until;

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

impl Workplace {
    /// `many.jsonl`: other pairs for each `kind`, enough that a command tokenises for a while.
    fn many_pairs_of(&self, kind: usize) {
        let pairs = String::from_utf8(self.read("pairs.jsonl")).unwrap();
        let other = |number: usize| pairs.replace("Paris", &format!("Paris {kind} {number}"));
        self.write("many.jsonl", (0..200).map(other).collect::<String>());
    }

    /// The files in the cache of pairs whose names begin or end so.
    fn cached(&self, part: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path("cache/pairs")) else { return Vec::new() };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.to_string_lossy().contains(part)).collect()
    }
}

const MANY: &str = "check --model base --max-length 160 --max-prompt-length 64 --json --data many.jsonl";

/// Processes that write and read the same file of pairs at once say what one alone says, also where another process beside
/// them is killed while it writes: what that one leaves is no file of pairs, and stops nobody.
#[test]
fn processes_share_the_cache_and_one_that_is_killed_while_it_writes_costs_the_others_nothing() {
    let workplace = Workplace::new();
    let finish = |child: Child| {
        let output = child.wait_with_output().unwrap();
        let notes = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{notes}");
        (String::from_utf8(output.stdout).unwrap(), notes)
    };
    let start = || workplace.command(MANY).spawn().unwrap();
    let mut killed_while_writing = 0;
    // A few times, and on a busy machine until one was killed in time.
    for kind in 0..40 {
        if kind >= 4 && killed_while_writing > 0 {
            break;
        }
        workplace.many_pairs_of(kind);
        let (alone, _) = said(&workplace, &format!("{MANY} --data-cache off"));
        let before = workplace.cached(".partial-").len();
        let mut killed = start();
        wait_until("a file that is being written", || {
            workplace.cached(".partial-").len() > before || killed.try_wait().unwrap().is_some()
        });
        let others = [start(), start()];
        killed.kill().unwrap();
        // It may have been faster than the signal.
        let has_ended = killed.wait().unwrap().success() || workplace.cached(".pairs").len() > kind;
        killed_while_writing += usize::from(!has_ended);
        let left = workplace.cached(".partial-");
        let mut written = 0;
        for other in others {
            let (found, notes) = finish(other);
            assert_eq!(found, alone);
            assert!(!notes.contains("tokenised again"), "no file was damaged: {notes}");
            written += usize::from(notes.contains("tokenised pairs are kept in"));
        }
        assert!(written > 0 || has_ended, "somebody wrote the pairs");
        assert_eq!(workplace.cached(".pairs").len(), kind + 1, "both have one file");
        let (found, notes) = finish(start());
        assert!(notes.contains("tokenised pairs are read from"), "{notes}");
        assert_eq!(found, alone);
        // It may be that of a process that writes: only an old one is removed.
        let now = workplace.cached(".partial-");
        assert!(now.len() > before || has_ended, "the killed process left its file");
        assert!(now.iter().all(|path| left.contains(path)), "and nobody else did");
    }
    assert!(killed_while_writing > 0, "none was killed while it wrote");
}

#[test]
fn a_cache_beyond_its_limit_loses_the_files_that_were_unused_for_the_longest() {
    let workplace = Workplace::new();
    let check = |kind: usize, limit: &str| {
        workplace.many_pairs_of(kind);
        let mut command = workplace.command(MANY);
        command.env("MMPO_FAST_CACHE_LIMIT", limit);
        finish(command)
    };
    let size = |path: &PathBuf| path.metadata().unwrap().len();
    assert_eq!(check(0, "off").code, Some(0));
    let first = workplace.cached(".pairs");
    assert_eq!(check(1, "off").code, Some(0));
    let second: Vec<PathBuf> =
        workplace.cached(".pairs").into_iter().filter(|path| !first.contains(path)).collect();
    // Used again, the first is no longer the one that was unused for the longest.
    assert!(check(0, "1MB").stderr.contains("tokenised pairs are read from"));
    assert_eq!(workplace.cached(".pairs").len(), 2, "reading removes nothing");
    let room = format!("{}B", size(&first[0]) + size(&second[0]) + 1000);
    let finished = check(2, &room);
    for part in ["1 file of tokenised pairs", "unused for the longest, removed", "MMPO_FAST_CACHE_LIMIT"] {
        assert!(finished.stderr.contains(part), "no {part:?} in {}", finished.stderr);
    }
    let left = workplace.cached(".pairs");
    assert!(left.contains(&first[0]) && !left.contains(&second[0]) && left.len() == 2, "{left:?}");
    let finished = workplace.command(CHECK).env("MMPO_FAST_CACHE_LIMIT", "20 apples").output().unwrap();
    let message = String::from_utf8(finished.stderr).unwrap();
    assert_eq!(finished.status.code(), Some(2), "{message}");
    for part in ["`MMPO_FAST_CACHE_LIMIT` is no size: `20 apples`", "50GiB"] {
        assert!(message.contains(part), "no {part:?} in {message}");
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
    workplace.refuse("import dpo.yaml --output ./dpo.yaml", 2, &["is the file that is imported"]);
    assert_eq!(String::from_utf8(workplace.read("dpo.yaml")).unwrap(), file);
    workplace.refuse("import none.yaml", 5, &["none.yaml"]);
    workplace.refuse("import base", 5, &["this is a folder, and a file is wanted"]);
    workplace.write("long.yaml", format!("{file}# {}\n", "x".repeat(256 << 10)));
    workplace.refuse("import long.yaml", 2, &["long.yaml: ", "bytes are too many for a configuration"]);
    workplace.write("binary.yaml", b"a: \xff");
    workplace.refuse("import binary.yaml", 2, &["binary.yaml: not UTF-8 text, from byte 3 on"]);
    workplace.refuse("import dpo.yaml --devices 0", 2, &["--devices"]);
}
