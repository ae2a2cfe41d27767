//! `mmpo-fast score`: glue until the command itself is merged over this file.

use crate::config::ScoreConfig;
use crate::error::{Error, Result};

pub fn run(_config: &ScoreConfig) -> Result<()> {
    Err(Error::config("`score` is not part of this build", "use a build that has it"))
}
