//! Checkpoints that are damaged or contradict themselves, runs that are resumed from elsewhere, and outputs that vanish.

use std::path::Path;

use mmpo_fast::checkpoint::checksums;

use crate::harness::{CommandLine, Finished, TRAIN, Workplace, finish};
use crate::resume::wait_for_lines;

const CONFIG: i32 = 2;
const MODEL: i32 = 4;
const IO: i32 = 5;

const RUN: &str = "--max-steps 4 --save-steps 1 --keep-checkpoints 4";

impl Workplace {
    /// A run of four steps whose end was lost: its last checkpoint, model and report are gone.
    fn cut_run(&self, output: &str) {
        self.succeed(&format!("{TRAIN} {RUN} --output {output}"));
        for name in ["model", "checkpoints/step-000004"] {
            std::fs::remove_dir_all(self.path(&format!("{output}/{name}"))).unwrap();
        }
        std::fs::remove_file(self.path(&format!("{output}/report.html"))).unwrap();
    }

    fn copy_run(&self, from: &str, to: &str) {
        for (path, bytes) in self.contents(from) {
            let target = self.path(to).join(path.strip_prefix(self.path(from)).unwrap());
            std::fs::create_dir_all(target.parent().unwrap()).unwrap();
            std::fs::write(target, bytes).unwrap();
        }
    }

    fn flip(&self, name: &str, bit: usize) {
        let mut bytes = self.read(name);
        let at = bit / 8 % bytes.len();
        bytes[at] ^= 1 << (bit % 8);
        self.write(name, bytes);
    }

    /// Changes `state.json` of a checkpoint, and its checksums with it.
    fn change_state(&self, checkpoint: &str, from: &str, to: &str) {
        let text = String::from_utf8(self.read(&format!("{checkpoint}/state.json"))).unwrap();
        assert!(text.contains(from), "no {from} in {text}");
        self.write(&format!("{checkpoint}/state.json"), text.replace(from, to));
        let hash = |name| (name, blake3::hash(&self.read(&format!("{checkpoint}/{name}"))));
        let sums = checksums::text(&[hash("state.json"), hash("state.safetensors")]);
        self.write(&format!("{checkpoint}/B3SUMS"), sums);
    }

    #[track_caller]
    fn resume(&self, output: &str) -> Finished {
        self.succeed(&format!("{TRAIN} {RUN} --output {output} --resume"))
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_the_one_before() {
    let work = Workplace::new();
    work.cut_run("cut");
    work.succeed(&format!("{TRAIN} {RUN} --output whole"));
    for (name, bit) in [("state.safetensors", 99_999), ("state.json", 800), ("B3SUMS", 3)] {
        let run = name.replace('.', "");
        work.copy_run("cut", &run);
        work.flip(&format!("{run}/checkpoints/step-000003/{name}"), bit);
        let log = work.resume(&run).stderr;
        let about_pairs = |line: &str| line.contains("WARN pairs.jsonl: ");
        let warnings: Vec<&str> =
            log.lines().filter(|line| line.contains("WARN") && !about_pairs(line)).collect();
        assert_eq!(warnings.len(), 1, "{log}");
        for part in [name, "step-000003.damaged", "goes on from step 2", "done again"] {
            assert!(warnings[0].contains(part), "no {part:?} in {}", warnings[0]);
        }
        assert!(log.contains("resuming after step 2 of 4"), "{log}");
        work.assert_same_bits("whole", &run, 4);
    }
    // Files that are missing, cut short, or not there at all.
    work.copy_run("cut", "short");
    let weights = work.read("short/checkpoints/step-000003/state.safetensors");
    work.write("short/checkpoints/step-000003/state.safetensors", &weights[..weights.len() - 4]);
    std::fs::remove_file(work.path("short/checkpoints/step-000002/B3SUMS")).unwrap();
    let log = work.resume("short").stderr;
    assert!(log.contains("resuming after step 1 of 4"), "{log}");
    work.assert_same_bits("whole", "short", 4);
}

#[test]
fn where_all_checkpoints_are_damaged_one_message_says_so() {
    let work = Workplace::new();
    work.cut_run("cut");
    for step in 1..=3 {
        work.flip(&format!("cut/checkpoints/step-{step:06}/state.safetensors"), 70_000 + step);
    }
    let before = work.contents("cut");
    let parts = ["none of the 3 checkpoints can be resumed", "step-000003", "step-000001", "damaged"];
    work.refuse(&format!("{TRAIN} {RUN} --output cut --resume"), MODEL, &parts);
    for step in 1..=2 {
        std::fs::remove_dir_all(work.path(&format!("cut/checkpoints/step-{step:06}"))).unwrap();
    }
    let parts = ["step-000003/state.safetensors: damaged"];
    work.refuse(&format!("{TRAIN} {RUN} --output cut --resume"), MODEL, &parts);
    assert!(
        before
            .iter()
            .filter(|(path, _)| path.exists())
            .all(|(path, bytes)| &std::fs::read(path).unwrap() == bytes)
    );
}

#[test]
fn a_state_that_contradicts_its_folder_or_its_run_is_noticed() {
    let work = Workplace::new();
    work.cut_run("cut");
    let newest = "checkpoints/step-000003";
    for (name, from, to, part) in [
        ("step", "\"step\": 3", "\"step\": 2", "says that 2 steps are done"),
        ("epoch", "\"epoch\": 1", "\"epoch\": 7", "contradicts its run: after step 3 the epoch is 1"),
        ("pairs", "\"pairs_seen\": 11", "\"pairs_seen\": 12", "it says 1, 12 and 42"),
        ("seed", "\"seed\": 42", "\"seed\": 43", "it says 1, 11 and 43"),
    ] {
        work.copy_run("cut", name);
        work.change_state(&format!("{name}/{newest}"), from, to);
        let log = work.resume(name).stderr;
        assert!(log.contains(part) && log.contains("resuming after step 2 of 4"), "{name}: {log}");
    }
    work.copy_run("cut", "beyond");
    let beyond = "beyond/checkpoints/step-000009";
    std::fs::rename(work.path("beyond/checkpoints/step-000003"), work.path(beyond)).unwrap();
    work.change_state(beyond, "\"step\": 3", "\"step\": 9");
    let log = work.resume("beyond").stderr;
    assert!(log.contains("is of step 9, beyond the 4 steps of the run"), "{log}");
    // Tensors of another dtype, as of another model.
    work.copy_run("cut", "dtype");
    let mut weights = work.read("dtype/checkpoints/step-000003/state.safetensors");
    let at = weights.windows(3).position(|three| three == b"F32").expect("a dtype");
    weights[at] = b'I';
    work.write("dtype/checkpoints/step-000003/state.safetensors", weights);
    work.change_state("dtype/checkpoints/step-000003", "\"step\": 3", "\"step\": 3");
    let log = work.resume("dtype").stderr;
    assert!(log.contains("` is I32 [") && log.contains("resuming after step 2 of 4"), "{log}");
}

#[test]
fn metrics_that_are_shorter_than_the_checkpoint_are_noticed() {
    let work = Workplace::new();
    work.cut_run("cut");
    let text = String::from_utf8(work.read("cut/metrics.jsonl")).unwrap();
    work.write("cut/metrics.jsonl", text.lines().take(1).map(|line| format!("{line}\n")).collect::<String>());
    let log = work.resume("cut").stderr;
    assert!(log.contains("has no lines of 2 of the 3 steps before the checkpoint (steps 2 to 3)"), "{log}");
    assert!(work.path("cut/model").exists() && work.path("cut/report.html").exists());
}

#[test]
fn a_run_is_resumed_from_anywhere_and_by_any_spelling_of_its_files() {
    let work = Workplace::new();
    work.cut_run("cut");
    std::os::unix::fs::symlink(work.path("base"), work.path("link")).unwrap();
    work.copy_run("base", "copy");
    let absolute = work.path("base");
    for (name, model) in [
        ("slash", "base/"),
        ("dot", "./base"),
        ("link", "link"),
        ("copy", "copy"),
        ("absolute", absolute.to_str().unwrap()),
    ] {
        let output = format!("run-{name}");
        work.copy_run("cut", &output);
        let run = CommandLine::new(TRAIN).set("--model", model);
        let log = work.succeed(&format!("{run} {RUN} --output ./{output}/ --resume")).stderr;
        assert!(log.contains("resuming after step 3 of 4"), "{name}: {log}");
    }
    // From another folder, by the recipe that the run left.
    let elsewhere = tempfile::tempdir().unwrap();
    let from = |folder: &Path, arguments: &str| {
        let mut command = work.command(arguments);
        command.current_dir(folder);
        finish(command)
    };
    let recipe = work.path("cut/resolved.toml");
    let resume = format!("train --recipe {} --resume", recipe.display());
    let finished = from(elsewhere.path(), &resume);
    assert_eq!(finished.code, Some(0), "{}", finished.stderr);
    assert!(finished.stderr.contains("resuming after step 3 of 4"), "{}", finished.stderr);
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0, "it resumed somewhere else");
    // A run that was moved: its recipe names the folder where it was.
    std::fs::rename(work.path("cut"), work.path("moved")).unwrap();
    let moved = format!("train --recipe {} --resume", work.path("moved/resolved.toml").display());
    work.refuse(&moved, CONFIG, &["this recipe's run is in", "/moved", "`output` names", "give --output"]);
    let finished = work.succeed(&format!("{moved} --output moved"));
    assert!(finished.stderr.contains("is finished, all 4 steps"), "{}", finished.stderr);
    // Another model is another run.
    work.bring("tied");
    let run = CommandLine::new(TRAIN).set("--model", "tied");
    work.refuse(
        &format!("{run} {RUN} --output moved --resume"),
        CONFIG,
        &["the starting model's weights are not the same"],
    );
}

#[test]
fn resuming_what_has_not_begun_begins_it() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} {RUN} --output whole"));
    std::fs::create_dir(work.path("empty")).unwrap();
    for output in ["absent", "empty", "deep/absent"] {
        let log = work.resume(output).stderr;
        assert!(log.contains(&format!("{output} is empty: the run starts at its first step")), "{log}");
        work.assert_same_bits("whole", output, 4);
    }
    std::fs::create_dir(work.path("other")).unwrap();
    for name in ["notes.txt", "report.html", "model"] {
        work.write(&format!("other/{name}"), "somebody's");
        let parts = ["other has no checkpoint to resume from, and is not empty", name];
        work.refuse(&format!("{TRAIN} {RUN} --output other --resume"), CONFIG, &parts);
        assert_eq!(work.read(&format!("other/{name}")), b"somebody's");
        std::fs::remove_file(work.path(&format!("other/{name}"))).unwrap();
    }
}

#[test]
fn an_output_that_is_removed_or_renamed_in_mid_run_ends_it_with_one_message() {
    let work = Workplace::new();
    for (name, remove) in [
        ("removed", (|path| std::fs::remove_dir_all(path).unwrap()) as fn(&Path)),
        ("renamed", |path| std::fs::rename(path, path.with_extension("away")).unwrap()),
        ("emptied", |path| std::fs::remove_file(path.join("metrics.jsonl")).unwrap()),
        ("replaced", |path| {
            std::fs::rename(path, path.with_extension("away")).unwrap();
            std::fs::create_dir(path).unwrap();
        }),
    ] {
        let run = format!("{TRAIN} --max-steps 4000 --output {name}");
        let mut child = work.command(&run).spawn().unwrap();
        wait_for_lines(&work.path(&format!("{name}/metrics.jsonl")), 3, &mut child);
        remove(&work.path(name));
        let output = child.wait_with_output().unwrap();
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(IO), "{name}: {message}");
        assert_eq!(message.matches('×').count(), 1, "{name}: {message}");
        for part in [&format!("cannot go on in {name}"), "was removed, renamed or replaced", "help: "] {
            assert!(message.contains(part), "{name}: no {part:?} in {message}");
        }
        assert!(!work.path(name).join("checkpoints").exists(), "{name}: written elsewhere");
    }
    assert!(work.path("renamed.away/metrics.jsonl").exists());
}
