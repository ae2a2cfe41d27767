//! `mmpo-fast train`: glue until the command itself is merged over this file.

use crate::config::RunConfig;
use crate::error::{Error, Result};

pub fn run(_config: &RunConfig) -> Result<()> {
    Err(Error::config("`train` is not part of this build", "use a build that has it"))
}
