//! A two-layer Llama of a few kilobytes, and its folder with whatever is wrong in it that a test wants.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use mmpo_fast::Error;
use mmpo_fast::checkpoint::ModelFolder;
use mmpo_fast::model::{LlamaConfig, TensorSpec};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": false,
        "torch_dtype": "float32"
    })
}

/// Name to dtype, shape and little-endian bytes.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn parsed(config: &Value) -> LlamaConfig {
    LlamaConfig::parse(Path::new("config.json"), &config.to_string()).unwrap()
}

/// The value at a row-major index of a tensor; exact in bf16 and f16, and another for each tensor.
pub fn value(spec: &TensorSpec, index: usize) -> f32 {
    let salt: usize = spec.name.bytes().map(usize::from).sum();
    ((index * 7 + salt) % 255) as f32 / 64.0 - 2.0
}

pub fn encode(dtype: Dtype, value: f32) -> Vec<u8> {
    match dtype {
        Dtype::F32 => value.to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        Dtype::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        other => panic!("{other:?}"),
    }
}

pub fn tensors(config: &Value, dtype: Dtype) -> Tensors {
    let fill = |spec: &TensorSpec| (0..spec.values()).flat_map(|i| encode(dtype, value(spec, i))).collect();
    parsed(config)
        .tensors()
        .iter()
        .map(|spec| (spec.name.clone(), (dtype, spec.shape.clone(), fill(spec))))
        .collect()
}

pub fn serialize(tensors: &Tensors) -> Vec<u8> {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

pub struct Folder {
    pub folder: tempfile::TempDir,
}

impl Folder {
    /// A sound folder of f32 weights.
    pub fn sound() -> Self {
        Self::with(&config(), &tensors(&config(), Dtype::F32))
    }

    pub fn with(config: &Value, tensors: &Tensors) -> Self {
        let folder = Folder { folder: tempfile::tempdir().unwrap() };
        folder.write("config.json", config.to_string());
        folder.write("model.safetensors", serialize(tensors));
        folder
    }

    /// The weights dealt over two shards by turns, with their index.
    pub fn sharded(config: &Value, tensors: &Tensors) -> Self {
        let folder = Folder { folder: tempfile::tempdir().unwrap() };
        folder.write("config.json", config.to_string());
        let mut shards = [Tensors::new(), Tensors::new()];
        let mut weight_map = BTreeMap::new();
        for (turn, (name, tensor)) in tensors.iter().enumerate() {
            shards[turn % 2].insert(name.clone(), tensor.clone());
            weight_map.insert(name.clone(), shard_name(turn % 2));
        }
        for (number, shard) in shards.iter().enumerate() {
            folder.write(&shard_name(number), serialize(shard));
        }
        let index = json!({"metadata": {"total_size": 0}, "weight_map": weight_map});
        folder.write("model.safetensors.index.json", index.to_string());
        folder
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.file(name), content).unwrap();
    }

    pub fn open(&self) -> mmpo_fast::Result<ModelFolder> {
        ModelFolder::open(self.path())
    }

    /// Opening fails; the message names `file` (the folder where empty) and contains `part`; there is advice, and the exit code of a model.
    #[track_caller]
    pub fn refused(&self, file: &str, part: &str) {
        let error = self.open().expect_err(part);
        let named = if file.is_empty() { self.path().to_path_buf() } else { self.file(file) };
        expect_message(&error, &named, part);
        assert_eq!(error.exit_code(), 4, "{error:?}");
    }
}

pub fn shard_name(number: usize) -> String {
    format!("model-{:05}-of-00002.safetensors", number + 1)
}

#[track_caller]
pub fn expect_message(error: &Error, path: &Path, part: &str) {
    let message = error.to_string();
    assert!(message.contains(path.to_str().unwrap()), "no {} in: {message}", path.display());
    assert!(message.contains(part), "no {part:?} in: {message}");
    let help = miette::Diagnostic::help(error).map(|help| help.to_string()).unwrap_or_default();
    assert!(!help.is_empty(), "no advice: {error:?}");
}
