//! The formats: valid inputs to begin with, and what the program does with such a file.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mmpo_fast::checkpoint::{AdapterFolder, Checkpoint, ModelFolder, run_state};
use mmpo_fast::config::options::Options;
use mmpo_fast::config::value::OptionValue;
use mmpo_fast::config::{LengthLimits, PairData, PairFiles, recipe};
use mmpo_fast::data::{
    CacheKey, Message, PairCache, PairSource, ReferenceCache, TextEncoder, Treatment, load_cached, load_pairs,
};
use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::foreign::hub;
use mmpo_fast::import::{self, ImportConfig};
use mmpo_fast::model::{Llama, LlamaConfig};
use mmpo_fast::objective::ReferencePair;
use mmpo_fast::report::{History, MetricsWriter};

type Result = mmpo_fast::Result<()>;

/// Bytes of the valid model's file of weights.
const WEIGHTS: usize = 362_400;

const LIMITS: LengthLimits = LengthLimits { max_length: 160, max_prompt_length: 64 };

/// All formats by name.
pub const ALL: [&str; 21] = [
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
    "parquet",
    "csv",
    "adapter_config",
    "adapter",
    "hub",
    "import",
    "pair_cache",
];

/// A folder in which inputs are tried: the golden model, its pairs, and what a short run of the program leaves.
pub struct Place {
    folder: PathBuf,
    /// The encoder of the valid model, loaded when the first pairs are read.
    encoder: OnceCell<TextEncoder>,
    /// The device on which models are loaded: its threads are started once.
    device: OnceCell<Arc<CpuDevice>>,
}

fn tests() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests"))
}

fn read(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.as_ref().display()))
}

impl Place {
    /// Fills an empty folder for inputs of `formats`; what a run leaves behind is made by `program`, where one needs it.
    pub fn prepare(folder: &Path, program: &Path, formats: &[&str]) -> Self {
        let place = Place { folder: folder.to_path_buf(), encoder: OnceCell::new(), device: OnceCell::new() };
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
        let pairs = String::from_utf8(read(tests().join("goldens/pairs.jsonl"))).unwrap();
        std::fs::write(place.path("valid.jsonl"), &pairs).unwrap();
        // What is wrong with a cache is made up for by reading all pairs: a few are enough.
        let few: Vec<&str> = pairs.lines().take(3).collect();
        std::fs::write(place.path("few.jsonl"), few.join("\n")).unwrap();
        let wants = |names: &[&str]| names.iter().any(|name| formats.contains(name));
        if wants(&["recipe", "state", "metrics"]) {
            // Adapters have a small state, which is hashed for each input.
            place.train(program, "run", &["--lora", "q", "--lora-rank", "1"]);
        }
        if wants(&["adapter_config", "adapter"]) {
            place.train(program, "adapted", &["--lora", "q,v", "--lora-rank", "2"]);
        }
        place
    }

    /// A short run of the program.
    fn train(&self, program: &Path, output: &str, more: &[&str]) {
        let run = "train --max-steps 2 --save-steps 1 --pairs-per-step 4 --max-length 160 --max-prompt-length 64 \
                   --device cpu --threads 1 --quiet --model model --data valid.jsonl --output";
        let status = Command::new(program)
            .args(run.split_whitespace())
            .arg(output)
            .args(more)
            .current_dir(&self.folder)
            .env("MMPO_FAST_CACHE", self.path("unused"))
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    }

    pub fn open(folder: &Path) -> Self {
        Place { folder: folder.to_path_buf(), encoder: OnceCell::new(), device: OnceCell::new() }
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
            "parquet" => "pairs.parquet",
            "csv" => "pairs.csv",
            "adapter_config" => "adapted/adapter/adapter_config.json",
            "adapter" => "adapted/adapter/adapter_model.safetensors",
            "import" => "import.yaml",
            other => panic!("no format `{other}`"),
        })
    }

    /// Valid inputs of a format.
    pub fn seeds(&self, format: &str) -> Vec<Vec<u8>> {
        let found = |folder: &str, end: &str| {
            let entries = std::fs::read_dir(tests().join(folder)).unwrap().map(|entry| entry.unwrap().path());
            let mut paths: Vec<PathBuf> =
                entries.filter(|path| path.to_string_lossy().ends_with(end)).collect();
            paths.sort();
            paths.iter().map(read).collect::<Vec<_>>()
        };
        let data = |end: &str| found("data/pairs", end);
        match format {
            "parquet" => found("data/tables", ".parquet"),
            "csv" => [found("data/tables", ".csv"), found("data/tables", ".tsv")].concat(),
            "import" => [found("data/imports", ".yaml"), found("data/imports", ".yml")].concat(),
            "hub" => vec![
                b"abc123\nabc123 train-00000-of-00001.parquet\nabc123 data/test.jsonl".to_vec(),
                b"main\nmain a.json\nother b.csv.gz\nother default/train/0000.parquet".to_vec(),
            ],
            "pair_cache" => {
                self.load_through_cache().unwrap();
                vec![read(self.cached_pairs())]
            }
            // With a header the rest of which is filled up, and whole.
            "safetensors" => {
                let whole = read(self.file(format));
                let length = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
                vec![whole[..8 + length + 64].to_vec(), whole]
            }
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
            "cache" | "pair_cache" if bytes.len() >= 32 => {
                let content = bytes.len() - 32;
                let hash = *blake3::hash(&bytes[..content]).as_bytes();
                bytes[content..].copy_from_slice(&hash);
            }
            // Zeros in place of values: the header is what is read closely.
            "safetensors" if bytes.len() < WEIGHTS => bytes.resize(WEIGHTS, 0),
            "gzip" => {
                let mut plain = Vec::new();
                let mut reader = flate2::read::MultiGzDecoder::new(bytes.as_slice());
                let _ =
                    std::io::Read::read_to_end(&mut std::io::Read::take(&mut reader, 1 << 20), &mut plain);
                if plain.is_empty() {
                    plain = bytes;
                }
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
        match format {
            "hub" => return self.look_in_hub(bytes),
            "pair_cache" => {
                std::fs::write(self.cached_pairs(), bytes).unwrap();
                return self.load_through_cache();
            }
            _ => {}
        }
        std::fs::write(self.file(format), bytes).unwrap();
        match format {
            "config" | "safetensors" => self.load_model("model"),
            // The weights do not depend on it.
            "generation_config" => LlamaConfig::from_folder(&self.path("model")).map(|_| ()),
            "index" => self.load_model("sharded"),
            "tokenizer" | "tokenizer_config" | "template" => use_text(&self.path("model")),
            "jsonl" | "json" | "gzip" | "parquet" | "csv" => {
                load_pairs(&self.file(format), self.valid_encoder(), LIMITS).map(|_| ())
            }
            "adapter_config" | "adapter" => {
                let model = LlamaConfig::from_folder(&self.path("model"))?;
                AdapterFolder::open(&self.path("adapted/adapter"), &model).map(|_| ())
            }
            "import" => import_file(&self.file(format)),
            "recipe" => read_recipe(&self.file(format)),
            "state" => {
                self.mend_sums(bytes);
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

impl Place {
    /// Writes the checksum of a `state.json` beside it: with another one, nothing in it is looked at.
    fn mend_sums(&self, state: &[u8]) {
        let path = self.path("run/checkpoints/step-000002/B3SUMS");
        let sums = String::from_utf8(read(&path)).unwrap();
        let name = "state.json";
        let others: String =
            sums.lines().filter(|line| !line.ends_with(name)).map(|line| format!("{line}\n")).collect();
        std::fs::write(path, format!("{others}{}  {name}\n", blake3::hash(state).to_hex())).unwrap();
    }

    fn valid_encoder(&self) -> &TextEncoder {
        self.encoder.get_or_init(|| TextEncoder::load(&self.path("model"), None).unwrap())
    }

    fn load_model(&self, name: &str) -> Result {
        let folder = ModelFolder::open(&self.path(name))?;
        folder.check_finite()?;
        let device = self.device.get_or_init(|| Arc::new(CpuDevice::new(Some(1)).unwrap()));
        Llama::load(device.clone(), &folder, 64).map(|_| ())
    }

    /// Loads pairs with a cache, which holds one file.
    fn load_through_cache(&self) -> Result {
        let cache = PairCache::new(&self.path("cached"));
        let source = PairSource::file(&self.path("few.jsonl"));
        let mut seen = 0;
        let mut observe = |_: &_| seen += 1;
        let treatment = Treatment::new(LIMITS);
        let dataset =
            load_cached(&source, self.valid_encoder(), treatment, Some(&cache), Some(&mut observe))?;
        assert_eq!(seen, dataset.report.records);
        Ok(())
    }

    fn cached_pairs(&self) -> PathBuf {
        let files = std::fs::read_dir(self.path("cached")).unwrap().map(|entry| entry.unwrap().path());
        files.into_iter().find(|path| path.extension().is_some_and(|end| end == "pairs")).unwrap()
    }

    /// Lays out a cache of the Hugging Face Hub, `HF_HUB_CACHE`, as the input says, and looks for a model and pairs in
    /// it: the first line is what `refs/main` holds, each other one a revision and a file in it.
    fn look_in_hub(&self, bytes: &[u8]) -> Result {
        let hub = self.path("hub");
        let _ = std::fs::remove_dir_all(&hub);
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.lines();
        let main = lines.next().unwrap_or_default();
        let files: Vec<(&str, &str)> = lines.filter_map(|line| line.split_once(' ')).take(8).collect();
        for kind in ["models--org--name", "datasets--org--name"] {
            let folder = hub.join(kind);
            std::fs::create_dir_all(folder.join("refs")).unwrap();
            std::fs::write(folder.join("refs/main"), main).unwrap();
            for (revision, file) in &files {
                let path =
                    folder.join("snapshots").join(revision.trim_matches('/')).join(file.trim_matches('/'));
                let is_inside = !path.components().any(|part| part.as_os_str() == "..");
                if is_inside && std::fs::create_dir_all(path.parent().unwrap()).is_ok() {
                    let _ = std::fs::copy(self.path("valid.jsonl"), path);
                }
            }
        }
        let model = hub::model(Path::new("org/name"));
        let files = hub::pairs(&PairFiles::from(PathBuf::from("org/name")))?;
        PairSource::open(&files, &Default::default(), mmpo_fast::data::Part::All)?;
        model.map(|_| ())
    }
}

/// Reads a configuration of another program; the recipe that it becomes must load.
fn import_file(path: &Path) -> Result {
    let text = String::from_utf8_lossy(&read(path)).into_owned();
    let config = ImportConfig {
        file: path.to_path_buf(),
        from: None,
        output: None,
        data: PairData::from_text("pairs.jsonl").ok(),
        devices: 1,
        without: Vec::new(),
    };
    let imported = import::convert(&text, &config)?;
    if let Some(text) = imported.recipe {
        recipe::parse(&text, path)?;
    }
    Ok(())
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
