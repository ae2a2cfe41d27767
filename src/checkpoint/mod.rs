//! Files of weights and training state: Hugging Face folders read through memory maps, and written so that what was
//! there before stays intact until the new is complete.

mod adapter_config;
pub mod adapter_folder;
mod adapter_patterns;
pub mod atomic;
pub mod background;
pub mod checksums;
pub mod model_folder;
pub mod run_state;
pub mod save;
pub mod shared_save;
pub mod tensor_file;
mod tensor_names;
pub mod tensor_writer;

pub use adapter_config::ADAPTER_CONFIG;
pub use adapter_folder::{AdapterFolder, SavedForm, save_adapter};
pub use background::BackgroundSaves;
pub use model_folder::ModelFolder;
pub use run_state::{Checkpoint, RunState};
pub use save::{CompanionFiles, SHARD_BYTES, save_model};
pub use tensor_file::TensorFile;
pub use tensor_writer::StoredTensor;
