//! The built-in demo: a tiny Llama and preference pairs inside the program. `examples/make_demo` made them.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::error::{Error, Result};

const MODEL_FILES: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("../examples/demo/model/config.json")),
    ("tokenizer.json", include_bytes!("../examples/demo/model/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../examples/demo/model/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("../examples/demo/model/chat_template.jinja")),
    ("model.safetensors", include_bytes!("../examples/demo/model/model.safetensors")),
];
const PAIRS: &[u8] = include_bytes!("../examples/demo/pairs.jsonl");
const EVALUATION_PAIRS: &[u8] = include_bytes!("../examples/demo/eval_pairs.jsonl");

/// The demo's files, laid out in a temporary folder that lives as long as this value.
#[derive(Debug)]
pub struct Demo {
    folder: TempDir,
}

impl Demo {
    /// Writes the demo's files into a temporary folder.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be written.
    pub fn unpack() -> Result<Self> {
        let temporary = std::env::temp_dir();
        let folder = TempDir::with_prefix("mmpo-fast-demo-")
            .map_err(|error| Error::io(&temporary, "write to", error))?;
        let demo = Demo { folder };
        std::fs::create_dir(demo.model()).map_err(|error| Error::io(&demo.model(), "create", error))?;
        for (name, bytes) in MODEL_FILES {
            write(&demo.model().join(name), bytes)?;
        }
        write(&demo.pairs(), PAIRS)?;
        write(&demo.evaluation_pairs(), EVALUATION_PAIRS)?;
        Ok(demo)
    }

    /// The folder of all of them.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of the model.
    pub fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    /// The pairs to train on.
    pub fn pairs(&self) -> PathBuf {
        self.folder.path().join("pairs.jsonl")
    }

    /// The pairs held out for evaluation.
    pub fn evaluation_pairs(&self) -> PathBuf {
        self.folder.path().join("eval_pairs.jsonl")
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|error| Error::io(path, "write", error))
}
