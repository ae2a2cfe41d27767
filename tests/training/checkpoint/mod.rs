//! Model folders and training state: what is read, what is refused, and what survives a failure.

mod foreign;
mod model_folder;
mod run_state;
mod saving;
mod small_model;
