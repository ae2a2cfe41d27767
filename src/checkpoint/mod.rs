//! Files of weights and training state: Hugging Face folders read through memory maps, and written so that what was
//! there before stays intact until the new is complete.

pub mod model_folder;
pub mod tensor_file;

pub use model_folder::ModelFolder;
pub use tensor_file::TensorFile;
