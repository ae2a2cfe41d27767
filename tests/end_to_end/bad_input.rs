//! Bad input and a disk that refuses: one message that names the place, an exit code of its own, and nothing lost.

use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use crate::harness::{CommandLine, TRAIN, Workplace};

const CONFIG: i32 = 2;
const DATA: i32 = 3;
const MODEL: i32 = 4;
const IO: i32 = 5;
const NUMERICS: i32 = 7;

const NORM: &str = "model.layers.1.input_layernorm.weight";

/// An earlier result of `score`, which a failure must leave alone.
const EARLIER: &str = "earlier scores\n";

impl Workplace {
    /// `train` and `score` both refuse `model` and `data`; neither leaves a file.
    #[track_caller]
    fn refused(&self, model: &str, data: &str, code: i32, parts: &[&str]) {
        self.write("scores.jsonl", EARLIER);
        self.refuse(&format!("train --model {model} --data {data} --output new"), code, parts);
        self.refuse(&format!("score --model {model} --data {data} --output scores.jsonl"), code, parts);
        assert!(!self.path("new").exists() || self.contents("new").is_empty(), "{parts:?}: output is left");
        assert_eq!(self.read("scores.jsonl"), EARLIER.as_bytes());
        assert!(self.references().is_empty(), "{parts:?}: a cache is left");
    }

    /// Rewrites the weights of `base`; `change` gets the name, dtype, shape and bytes of every tensor.
    fn change_weights(&self, change: impl Fn(&str, &mut Dtype, &mut Vec<usize>, &mut Vec<u8>)) {
        let file = self.read("base/model.safetensors");
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&file)
            .unwrap()
            .iter()
            .map(|(name, view)| (name.to_string(), view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            .collect();
        for (name, dtype, shape, bytes) in &mut tensors {
            change(name, dtype, shape, bytes);
        }
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        self.write("base/model.safetensors", safetensors::serialize(views, None).unwrap());
    }

    /// The golden pairs with line `line` (1-based) changed.
    fn change_line(&self, to: &str, line: usize, change: impl Fn(&str) -> String) {
        let text = String::from_utf8(self.read("pairs.jsonl")).unwrap();
        let changed: Vec<String> = text
            .lines()
            .enumerate()
            .map(|(index, text)| if index + 1 == line { change(text) } else { text.to_string() })
            .collect();
        self.write(to, changed.join("\n"));
    }
}

#[test]
fn files_that_are_missing() {
    let work = Workplace::new();
    work.refused("absent", "pairs.jsonl", IO, &["cannot read absent: ", "No such file"]);
    work.refused("base", "absent.jsonl", IO, &["cannot read absent.jsonl", "No such file"]);
    work.refuse(&format!("{TRAIN} --output new --eval-data absent.jsonl"), IO, &["cannot read absent.jsonl"]);
    work.refuse(&format!("{TRAIN} --output new --reference absent"), IO, &["cannot read absent: "]);
    work.refuse(
        &format!("{TRAIN} --output new --chat-template absent.jinja"),
        CONFIG,
        &["absent.jinja is no file and names no template"],
    );
    work.refuse("generate --model absent --prompt hello", IO, &["cannot read absent: "]);
    std::fs::remove_file(work.path("base/model.safetensors")).unwrap();
    work.refused("base", "pairs.jsonl", MODEL, &["base: neither model.safetensors nor"]);
}

#[test]
fn weights_that_are_truncated() {
    let work = Workplace::new();
    let whole = work.read("base/model.safetensors");
    work.write("base/model.safetensors", &whole[..100_000]);
    work.refused("base", "pairs.jsonl", MODEL, &["base/model.safetensors: truncated"]);
    work.refuse("generate --model base --prompt hello", MODEL, &["base/model.safetensors: truncated"]);
    work.write("base/model.safetensors", &whole[..5]);
    work.refused("base", "pairs.jsonl", MODEL, &["base/model.safetensors"]);
}

#[test]
fn weights_of_a_wrong_shape() {
    let work = Workplace::new();
    work.change_weights(|name, _, shape, bytes| {
        if name == NORM {
            *shape = vec![63];
            bytes.truncate(126);
        }
    });
    let parts = ["base/model.safetensors", NORM, "has shape [63]; config.json asks for [64]"];
    work.refused("base", "pairs.jsonl", MODEL, &parts);
}

#[test]
fn weights_of_a_wrong_dtype() {
    let work = Workplace::new();
    work.change_weights(|name, dtype, _, _| {
        if name == NORM {
            *dtype = Dtype::I16;
        }
    });
    work.refused("base", "pairs.jsonl", MODEL, &["base/model.safetensors", NORM, "stored as I16"]);
}

#[test]
fn weights_that_hold_nan() {
    let work = Workplace::new();
    work.change_weights(|name, _, _, bytes| {
        if name == NORM {
            bytes[14..16].copy_from_slice(&0x7fc0u16.to_le_bytes());
        }
    });
    let parts = ["base/model.safetensors", NORM, "holds NaN or infinity at index 7"];
    work.refused("base", "pairs.jsonl", MODEL, &parts);
    work.refuse("generate --model base --prompt hello", MODEL, &parts);
    work.copy_model("base", "sound");
    let train = CommandLine::new(TRAIN).set("--model", "sound");
    work.refuse(&format!("{train} --output new --reference base"), MODEL, &parts);
    work.refuse("score --model sound --reference base --data pairs.jsonl --output s.jsonl", MODEL, &parts);
}

#[test]
fn weights_that_overflow() {
    let work = Workplace::new();
    work.change_weights(|name, _, _, bytes| {
        if name == NORM {
            // 1.7e38, finite in itself.
            bytes.as_chunks_mut().0.fill(0x7f00u16.to_le_bytes());
        }
    });
    work.refused("base", "pairs.jsonl", NUMERICS, &["record 1 of the data", "not all finite"]);
}

#[test]
fn a_config_of_another_model() {
    let work = Workplace::new();
    let config = String::from_utf8(work.read("base/config.json")).unwrap();
    let other = config.replace("\"llama\"", "\"gemma\"");
    work.write("base/config.json", other);
    let parts = ["base/config.json", "unknown architecture", "gemma"];
    work.refused("base", "pairs.jsonl", MODEL, &parts);
    let asks = config.replace("\"default\"", "\"yarn\"");
    work.write("base/config.json", asks);
    work.refused("base", "pairs.jsonl", MODEL, &["base/config.json", "yarn"]);
    work.write("base/config.json", "{\"architectures\":");
    work.refused("base", "pairs.jsonl", MODEL, &["base/config.json: is not valid JSON"]);
    work.write("base/config.json", config);
    work.write("base/tokenizer.json", "{");
    work.refused("base", "pairs.jsonl", MODEL, &["base/tokenizer.json: not a tokenizer"]);
}

#[test]
fn pairs_that_are_broken_or_incomplete() {
    let work = Workplace::new();
    work.change_line("broken.jsonl", 5, |_| "{\"prompt\": [".into());
    work.refused("base", "broken.jsonl", DATA, &["broken.jsonl:5: broken JSON"]);
    work.change_line("column.jsonl", 3, |line| line.replace("\"rejected\"", "\"refused\""));
    work.refused("base", "column.jsonl", DATA, &["column.jsonl:3: no column `rejected`", "`refused`"]);
    work.change_line("type.jsonl", 2, |_| "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":3}".into());
    work.refused(
        "base",
        "type.jsonl",
        DATA,
        &["type.jsonl:2: ", "column `rejected` is a number, not a string or a list of messages"],
    );
    for (name, content) in [("empty.jsonl", ""), ("blank.jsonl", "\n \n"), ("none.json", "[]")] {
        work.write(name, content);
        work.refused("base", name, DATA, &[name]);
    }
    work.write("dropped.jsonl", "{\"prompt\":\"a\",\"chosen\":\"\",\"rejected\":\"\"}\n");
    work.refused("base", "dropped.jsonl", DATA, &["dropped.jsonl"]);
    work.refuse(&format!("{TRAIN} --output new --eval-data broken.jsonl"), DATA, &["broken.jsonl:5: "]);
    assert!(!work.path("new").exists());
}

#[test]
fn a_template_that_raises() {
    let work = Workplace::new();
    let template = String::from_utf8(work.read("base/chat_template.jinja")).unwrap();
    let raises = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}";
    work.write("base/chat_template.jinja", raises.to_string() + &template);
    // The second pair is the first with a system message.
    let parts = ["pairs.jsonl:2: the chat template refuses this conversation: no system role"];
    work.refused("base", "pairs.jsonl", DATA, &parts);
    let mut generate = work.command("generate --model base --system s --prompt p");
    generate.arg("--device=cpu");
    let finished = crate::harness::finish(generate);
    assert_eq!(finished.code, Some(MODEL), "{}", finished.stderr);
    assert!(
        finished.stderr.contains("base/chat_template.jinja") && finished.stderr.contains("no system role")
    );
    work.write("base/chat_template.jinja", "{% for message in messages %}");
    work.refused("base", "pairs.jsonl", MODEL, &["base/chat_template.jinja"]);
}

#[test]
fn an_output_that_cannot_be_made() {
    let work = Workplace::new();
    work.write("file", "somebody's");
    for output in ["/proc/mmpo-fast", "file", "file/deeper"] {
        let finished = work.refuse(&format!("{TRAIN} --output {output}"), IO, &[output]);
        assert!(
            !finished.stderr.contains("reference log-probs"),
            "found only after work: {}",
            finished.stderr
        );
    }
    for output in ["/proc/mmpo-fast/scores.jsonl", "file/scores.jsonl"] {
        let score = format!("score --model base --data pairs.jsonl --output {output}");
        let finished = work.refuse(&score, IO, &[Path::new(output).parent().unwrap().to_str().unwrap()]);
        assert!(!finished.stderr.contains("scoring"), "found only after work: {}", finished.stderr);
    }
    assert_eq!(work.read("file"), b"somebody's");
}

/// A small file system in memory, mounted while this value lives.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// `None`, and a line that says so, where this process may not mount.
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path);
        match command.output() {
            Ok(output) if output.status.success() => Some(SmallDisk { path }),
            refusal => {
                println!("skipped: cannot mount a tmpfs: {refusal:?}");
                None
            }
        }
    }

    fn make_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(&self.path).status().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Fills the disk up to about `free` bytes.
    fn fill(&self, free: usize) {
        use std::io::Write;
        let mut file = std::fs::File::create(self.path.join("filler")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        let length = file.metadata().unwrap().len();
        file.set_len(length.saturating_sub(free as u64)).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What stays mounted keeps the temporary folder from being removed; a test must not panic in a drop.
        let unmounted = Command::new("umount").arg(&self.path).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.path.display());
        }
    }
}

#[test]
fn a_disk_that_is_full() {
    let work = Workplace::new();
    let Some(disk) = SmallDisk::mount(work.path("disk"), "6m") else { return };
    let run = format!("{TRAIN} --epochs 1 --output");
    work.succeed(&format!("{run} disk/first"));
    work.succeed("score --model base --data pairs.jsonl --output disk/scores.jsonl");
    let earlier = (work.contents("disk/first"), work.read("disk/scores.jsonl"));

    // Room for the beginning of a checkpoint.
    disk.fill(600 << 10);
    work.refuse(
        &format!("{run} disk/second"),
        IO,
        &["disk/second/checkpoints/step-000003", "the disk is full"],
    );
    assert!(!work.path("disk/second/model").exists());
    assert!(
        !work.path("disk/second/checkpoints/step-000003").exists(),
        "half a checkpoint has the name of one"
    );

    disk.fill(0);
    let score = "score --model base --data pairs.jsonl --max-length 99 --output disk/scores.jsonl";
    work.refuse(score, IO, &["disk/scores.jsonl", "the disk is full"]);
    assert_eq!((work.contents("disk/first"), work.read("disk/scores.jsonl")), earlier);

    // With room again, the run goes through.
    std::fs::remove_file(work.path("disk/filler")).unwrap();
    work.succeed(&format!("{run} disk/second --resume"));
    work.assert_same_bits("disk/first", "disk/second", 3);
    let left: Vec<PathBuf> = work.contents("disk").into_keys().collect();
    assert!(!left.iter().any(|path| path.to_string_lossy().contains(".partial-")), "{left:?}");
}

#[test]
fn an_output_that_is_read_only() {
    let work = Workplace::new();
    let Some(disk) = SmallDisk::mount(work.path("disk"), "6m") else { return };
    let run = format!("{TRAIN} --epochs 1 --output");
    work.succeed(&format!("{run} disk/first"));
    work.succeed("score --model base --data pairs.jsonl --output disk/scores.jsonl");
    disk.make_read_only();
    let before = work.contents("disk");
    work.refuse(&format!("{run} disk/second"), IO, &["disk/second", "read-only: choose another --output"]);
    work.refuse(&format!("{run} disk/first --resume"), IO, &["disk/first", "read-only"]);
    let score = "score --model base --data pairs.jsonl --output disk/scores.jsonl";
    work.refuse(score, IO, &["cannot write in disk", "read-only"]);
    assert_eq!(work.contents("disk"), before);
}
