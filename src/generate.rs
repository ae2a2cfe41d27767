//! `mmpo-fast generate`: glue until the command itself is merged over this file.

use crate::config::GenerateConfig;
use crate::error::{Error, Result};

pub fn run(_config: &GenerateConfig) -> Result<()> {
    Err(Error::config("`generate` is not part of this build", "use a build that has it"))
}
