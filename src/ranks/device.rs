//! The device of a rank.

use super::Ranks;
use crate::device::{DeviceChoice, cuda};
use crate::error::{Error, Result};

/// The device on which one of `ranks` computes where `choice` was asked for: each rank of a machine has a GPU of its own, and all
/// share the CPU or have the emulated device.
///
/// # Errors
/// [`Error::Config`] where one GPU is named for all; [`Error::Device`] where this rank has none.
pub fn device_of(ranks: &Ranks, choice: DeviceChoice) -> Result<DeviceChoice> {
    if ranks.is_alone() {
        return Ok(choice);
    }
    let gpus = match choice {
        DeviceChoice::Cpu | DeviceChoice::Emulated => return Ok(choice),
        DeviceChoice::Cuda(0) => cuda::gpus()?,
        DeviceChoice::Cuda(ordinal) => {
            return Err(Error::config(
                format!(
                    "`--device` = cuda:{ordinal} names one GPU, and each of {} ranks needs its own",
                    ranks.place.ranks
                ),
                "give --device cuda: each rank takes the GPU of its number on its machine",
            ));
        }
        // That all ranks take the same kind of device is checked once they have.
        DeviceChoice::Auto => match cuda::gpus() {
            Ok(gpus) if !gpus.is_empty() => gpus,
            _ => return Ok(DeviceChoice::Auto),
        },
    };
    let ordinals: Vec<usize> = gpus.iter().map(|gpu| gpu.ordinal).collect();
    ordinal_of(&ordinals, ranks.local_rank).map(DeviceChoice::Cuda).ok_or_else(|| {
        Error::device(
            format!(
                "this is rank {} of {} on this machine, and the driver lists {} GPUs",
                ranks.local_rank,
                ranks.local_ranks,
                ordinals.len()
            ),
            "start no more ranks on a machine than it has GPUs; CUDA_VISIBLE_DEVICES may hide some",
        )
    })
}

/// Slurm may show each task its own GPU alone.
fn ordinal_of(gpus: &[usize], local_rank: usize) -> Option<usize> {
    match gpus {
        [only] => Some(*only),
        several => several.get(local_rank).copied(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::GroupPlace;

    fn second_of_two() -> Ranks {
        Ranks { place: GroupPlace { rank: 1, ranks: 2 }, local_rank: 1, local_ranks: 2, ..Ranks::alone() }
    }

    #[test]
    fn each_rank_has_the_gpu_of_its_number() {
        assert_eq!(ordinal_of(&[0, 1, 2], 1), Some(1));
        assert_eq!(ordinal_of(&[0, 1], 2), None);
        assert_eq!(ordinal_of(&[0], 3), Some(0));
        assert_eq!(ordinal_of(&[], 0), None);
    }

    #[test]
    fn a_gpu_that_is_named_is_for_one_rank_alone() {
        let one = DeviceChoice::Cuda(1);
        assert_eq!(device_of(&Ranks::alone(), one).unwrap(), one);
        let error = device_of(&second_of_two(), one).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("cuda:1"), "{error}");
        assert_eq!(device_of(&second_of_two(), DeviceChoice::Cpu).unwrap(), DeviceChoice::Cpu);
    }
}
