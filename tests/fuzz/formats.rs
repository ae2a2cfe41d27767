//! The formats: valid inputs to begin with, and what the program does with such a file.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use mmpo_fast::checkpoint::{Checkpoint, ModelFolder, run_state};
use mmpo_fast::config::options::Options;
use mmpo_fast::config::{LengthLimits, recipe};
use mmpo_fast::data::{CacheKey, Message, ReferenceCache, TextEncoder, load_pairs};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::model::Llama;
use mmpo_fast::objective::ReferencePair;
use mmpo_fast::report::{History, MetricsWriter};

type Result = mmpo_fast::Result<()>;

const LIMITS: LengthLimits = LengthLimits { max_length: 160, max_prompt_length: 64 };

/// All formats by name.
pub const ALL: [&str; 14] = [
    "config",
    "generation_config",
    "tokenizer",
    "tokenizer_config",
    "template",
    "safetensors",
    "index",
    "jsonl",
    "json",
    "gzip",
    "recipe",
    "state",
    "cache",
    "metrics",
];

/// A folder in which inputs are tried: the golden model, its pairs, and what a short run of the program leaves.
pub struct Place {
    folder: PathBuf,
    /// The encoder of the valid model, loaded when the first pairs are read.
    encoder: OnceCell<TextEncoder>,
}

fn tests() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"))
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

impl Place {
    /// Fills an empty folder.
    pub fn prepare(folder: &Path) -> Self {
        let place = Place { folder: folder.to_path_buf(), encoder: OnceCell::new() };
        for model in ["model", "sharded"] {
            std::fs::create_dir(place.path(model)).unwrap();
            for entry in std::fs::read_dir(tests().join("goldens/base/model")).unwrap() {
                let entry = entry.unwrap();
                std::fs::copy(entry.path(), place.path(model).join(entry.file_name())).unwrap();
            }
        }
        let shard = place.path("sharded/model-00001-of-00001.safetensors");
        std::fs::rename(place.path("sharded/model.safetensors"), shard).unwrap();
        std::fs::write(place.path("sharded/model.safetensors.index.json"), place.index()).unwrap();
        let run = "train --max-steps 2 --save-steps 1 --pairs-per-step 4 --max-length 160 --max-prompt-length 64 \
                   --device cpu --threads 1 --quiet";
        let status = Command::new(env!("CARGO_BIN_EXE_mmpo-fast"))
            .args(run.split_whitespace())
            .args(["--model", "model", "--output", "run", "--data"])
            .arg(tests().join("goldens/pairs.jsonl"))
            .current_dir(folder)
            .env("MMPO_FAST_CACHE", place.path("unused"))
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
        place
    }

    pub fn open(folder: &Path) -> Self {
        Place { folder: folder.to_path_buf(), encoder: OnceCell::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn index(&self) -> String {
        let weights = read(self.path("model/model.safetensors"));
        let (_, metadata) = safetensors::SafeTensors::read_metadata(&weights).unwrap();
        let names = metadata.tensors();
        let map = names.keys().map(|name| (name.clone(), "model-00001-of-00001.safetensors".into()));
        let map: serde_json::Map<String, serde_json::Value> = map.collect();
        serde_json::json!({ "metadata": { "total_size": weights.len() }, "weight_map": map }).to_string()
    }

    /// The file of the model that a format replaces.
    fn file(&self, format: &str) -> PathBuf {
        self.path(match format {
            "config" => "model/config.json",
            "generation_config" => "model/generation_config.json",
            "tokenizer" => "model/tokenizer.json",
            "tokenizer_config" => "model/tokenizer_config.json",
            "template" => "model/chat_template.jinja",
            "safetensors" => "model/model.safetensors",
            "index" => "sharded/model.safetensors.index.json",
            "jsonl" => "pairs.jsonl",
            "json" => "pairs.json",
            "gzip" => "pairs.jsonl.gz",
            "recipe" => "recipe.toml",
            "state" => "run/checkpoints/step-000002/state.json",
            "metrics" => "run/metrics.jsonl",
            other => panic!("no format `{other}`"),
        })
    }

    /// Valid inputs of a format.
    pub fn seeds(&self, format: &str) -> Vec<Vec<u8>> {
        let data = |end: &str| {
            let entries =
                std::fs::read_dir(tests().join("data/pairs")).unwrap().map(|entry| entry.unwrap().path());
            let mut paths: Vec<PathBuf> =
                entries.filter(|path| path.to_string_lossy().ends_with(end)).collect();
            paths.sort();
            paths.iter().map(read).collect::<Vec<_>>()
        };
        match format {
            "jsonl" => data(".jsonl"),
            "json" => data(".json"),
            "gzip" => data(".gz"),
            "recipe" => {
                let recipe = read(tests().join("../recipes/demo.toml"));
                vec![recipe, read(self.path("run/resolved.toml"))]
            }
            "cache" => {
                let cache = self.cache();
                cache.store(&[ReferencePair::default(); 7]).unwrap();
                vec![read(cache.path())]
            }
            "template" => {
                let entries = std::fs::read_dir(tests().join("data/templates")).unwrap();
                let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
                paths.retain(|path| path.extension().is_some_and(|end| end == "jinja"));
                paths.sort();
                paths.iter().map(read).collect()
            }
            "tokenizer" => {
                let folders = ["goldens/base/model", "data/chatml", "data/llama3"];
                folders.map(|folder| read(tests().join(folder).join("tokenizer.json"))).to_vec()
            }
            "tokenizer_config" => {
                let folders = ["goldens/base/model", "data/chatml", "data/llama3"];
                folders.map(|folder| read(tests().join(folder).join("tokenizer_config.json"))).to_vec()
            }
            _ => vec![read(self.file(format))],
        }
    }

    fn cache(&self) -> ReferenceCache {
        let key = CacheKey {
            weights: [1; 32],
            tokenizer: [2; 32],
            template: [3; 32],
            data: [4; 32],
            limits: LIMITS,
            compute: "cpu f32",
        };
        ReferenceCache::new(&self.path("cache"), &key)
    }

    /// What may follow the mutation, so that a checksum or a length does not hide what comes after it.
    pub fn mend(&self, format: &str, index: u64, mut bytes: Vec<u8>) -> Vec<u8> {
        if index.is_multiple_of(2) {
            return bytes;
        }
        match format {
            "cache" if bytes.len() >= 32 => {
                let content = bytes.len() - 32;
                let hash = *blake3::hash(&bytes[..content]).as_bytes();
                bytes[content..].copy_from_slice(&hash);
            }
            "gzip" => {
                let mut plain = Vec::new();
                let mut reader = flate2::read::MultiGzDecoder::new(bytes.as_slice());
                let _ =
                    std::io::Read::read_to_end(&mut std::io::Read::take(&mut reader, 1 << 20), &mut plain);
                let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                writer.write_all(&plain).unwrap();
                bytes = writer.finish().unwrap();
            }
            _ => {}
        }
        bytes
    }

    /// Lets the program read `bytes` as a file of this format; an error is a good answer.
    pub fn try_input(&self, format: &str, bytes: &[u8]) -> Result {
        if format == "cache" {
            std::fs::write(self.cache().path(), bytes).unwrap();
            self.cache().load(7);
            return Ok(());
        }
        std::fs::write(self.file(format), bytes).unwrap();
        match format {
            "config" | "generation_config" | "safetensors" => load_model(&self.path("model")),
            "index" => load_model(&self.path("sharded")),
            "tokenizer" | "tokenizer_config" | "template" => use_text(&self.path("model")),
            "jsonl" | "json" | "gzip" => {
                let load = || TextEncoder::load(&self.path("model"), None).unwrap();
                load_pairs(&self.file(format), self.encoder.get_or_init(load), LIMITS).map(|_| ())
            }
            "recipe" => read_recipe(&self.file(format)),
            "state" => {
                let Some(newest) = run_state::latest(&self.path("run"))? else { return Ok(()) };
                let checkpoint = Checkpoint::open(&newest)?;
                checkpoint.check_identity(&checkpoint.state().identity.clone(), &[])
            }
            "metrics" => {
                let history = History::read(&self.path("run"));
                MetricsWriter::resume(&self.path("run"), 1)?;
                history.map(|history| _ = (history.series("loss"), history.last_step()))
            }
            other => panic!("no format `{other}`"),
        }
    }
}

fn load_model(folder: &Path) -> Result {
    let folder = ModelFolder::open(folder)?;
    folder.check_finite()?;
    Llama::load(std::sync::Arc::new(CpuDevice::new(Some(1))?), &folder, 64).map(|_| ())
}

fn use_text(folder: &Path) -> Result {
    let encoder = TextEncoder::load(folder, None)?;
    let mut ids = encoder.encode_text_prompt("The quick brown fox, 123 caf\u{e9}s \u{1f980}\n")?;
    ids.extend([0, 1, 2, 77, 4_000_000_000]);
    encoder.tokenizer.decode(&ids, false)?;
    let mut stream = encoder.tokenizer.stream(true);
    for &id in &ids {
        stream.push(id)?;
    }
    stream.finish()?;
    let messages =
        [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi!"), ("user", "Name a colour.")];
    encoder.encode_chat_prompt(&messages.map(|(role, content)| Message::new(role, content))).map(|_| ())
}

fn read_recipe(path: &Path) -> Result {
    recipe::read(path)?;
    let config = mmpo_fast::config::resolve(Options::default(), Some(path), false)?;
    let again = recipe::parse(&config.to_toml(), path);
    assert!(again.is_ok(), "a resolved recipe cannot be read: {again:?}");
    let flag = OsString::from(format!("--recipe={}", path.display()));
    let _ = mmpo_fast::cli::parse(["mmpo-fast".into(), "train".into(), flag]);
    Ok(())
}
