//! The CPU computes in the host's memory: there is nothing to offload, and no buffer of this kind is ever made.

use super::storage::Storage;
use super::{CpuBuffer, CpuDevice};
use crate::device::{Checked, Element, MemoryUse, Offload};
use crate::error::{Error, Result};

/// What the CPU device never makes.
#[derive(Clone, Copy, Debug)]
pub enum Never {}

impl<C: Storage> CpuDevice<C> {
    fn no_offload() -> Error {
        Error::config(
            "`offload` = states moves optimiser states from a GPU's memory into the host's, and on the CPU they are there \
             already",
            "leave --offload out, or train on a GPU",
        )
    }
}

impl<C: Storage> Offload for CpuDevice<C> {
    type HostBuffer = Never;

    fn check_offload(&self) -> Result<()> {
        Err(Self::no_offload())
    }

    fn host_memory(&self) -> MemoryUse {
        MemoryUse::default()
    }

    fn alloc_host(&self, _: usize) -> Result<Never> {
        Err(Self::no_offload())
    }

    fn host_len(&self, buffer: &Never) -> usize {
        match *buffer {}
    }

    fn run_write_host(&self, out: &mut Never, _: usize, _: &[u8], _: Checked) -> Result<()> {
        match *out {}
    }

    fn run_read_host(&self, _: &mut [u8], source: &Never, _: usize, _: Checked) -> Result<()> {
        match *source {}
    }

    fn run_fetch<T: Element>(
        &self,
        _: &mut CpuBuffer<T>,
        source: &Never,
        _: usize,
        _: usize,
        _: Checked,
    ) -> Result<()> {
        match *source {}
    }

    fn run_store<T: Element>(
        &self,
        out: &mut Never,
        _: usize,
        _: &CpuBuffer<T>,
        _: usize,
        _: Checked,
    ) -> Result<()> {
        match *out {}
    }
}
