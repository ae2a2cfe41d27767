//! A folder in which a page's commands run in a small form: the demo's model under the names that pages use, in a Hugging
//! Face cache of its own, and a few of the demo's pairs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pages::repository;

/// Models that pages name; all of them are the demo's here.
const MODELS: [&str; 2] = ["HuggingFaceTB/SmolLM2-135M-Instruct", "meta-llama/Llama-3.1-8B-Instruct"];
const DATA_SET: &str = "HuggingFaceH4/ultrafeedback_binarized";

pub struct Workplace {
    folder: tempfile::TempDir,
}

impl Workplace {
    /// With `pairs` pairs to train on, and 4 to evaluate on.
    pub fn new(pairs: usize) -> Self {
        let workplace = Workplace { folder: tempfile::tempdir().unwrap() };
        let demo = repository().join("examples/demo");
        for name in MODELS {
            let snapshots = workplace.snapshots(&format!("models--{}", name.replace('/', "--")));
            std::os::unix::fs::symlink(demo.join("model"), snapshots.join("0123")).unwrap();
        }
        std::os::unix::fs::symlink(demo.join("model"), workplace.path("model")).unwrap();
        let data_set =
            workplace.snapshots(&format!("datasets--{}", DATA_SET.replace('/', "--"))).join("0123/data");
        std::fs::create_dir_all(&data_set).unwrap();
        let train = first_lines(&demo.join("pairs.jsonl"), pairs);
        let held_out = first_lines(&demo.join("eval_pairs.jsonl"), 4);
        for folder in [workplace.folder.path(), &data_set] {
            let shards = folder == data_set;
            let name = |plain: &str, split: &str| match shards {
                true => format!("{split}-00000-of-00001.jsonl"),
                false => plain.to_string(),
            };
            std::fs::write(folder.join(name("pairs.jsonl", "train_prefs")), &train).unwrap();
            std::fs::write(folder.join(name("held-out.jsonl", "test_prefs")), &held_out).unwrap();
        }
        workplace
    }

    fn snapshots(&self, repository: &str) -> PathBuf {
        let folder = self.path("hub").join(repository).join("snapshots");
        std::fs::create_dir_all(&folder).unwrap();
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A shell in the folder, in which `mmpo-fast` is this build's, without a GPU.
    pub fn shell(&self) -> Command {
        let programs = Path::new(env!("CARGO_BIN_EXE_mmpo-fast")).parent().unwrap();
        let others = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command
            .args(["-euo", "pipefail"])
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{}:{others}", self.folder.path().display(), programs.display()))
            .env("HOME", self.folder.path())
            .env("HF_HUB_CACHE", self.path("hub"))
            .env("MMPO_FAST_CACHE", self.path("cache"))
            .env("CUDA_VISIBLE_DEVICES", "")
            .env("NO_COLOR", "1")
            .env_remove("RUST_LOG");
        command
    }

    /// The lines of every `metrics.jsonl` in a folder of this one.
    pub fn metrics(&self) -> Vec<String> {
        let folders = std::fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let texts = folders.filter_map(|folder| std::fs::read_to_string(folder.join("metrics.jsonl")).ok());
        texts.flat_map(|text| text.lines().map(String::from).collect::<Vec<_>>()).collect()
    }
}

fn first_lines(path: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().take(count).map(|line| format!("{line}\n")).collect()
}
