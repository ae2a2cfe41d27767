//! A device that is only planned for joins nothing, and counts what NCCL takes of a GPU's memory.

use mmpo_fast::device::cpu::CpuDevice;
use mmpo_fast::device::cuda::{CudaDevice, KernelPath};
use mmpo_fast::device::prelude::*;
use mmpo_fast::device::{GroupPlace, NCCL_MEMORY};

/// Bytes that a group counts on the device, now and at the peak.
fn counted<D: Device>(device: &D) -> (usize, usize) {
    let place = GroupPlace { rank: 1, ranks: 4 };
    let mut values = device.alloc::<f32>(8).unwrap();
    let (now, peak) = (device.memory().now, device.taken_at_peak());
    let id = device.new_group().unwrap();
    let group = device.join_group(&id, place).unwrap();
    assert_eq!(device.place(&group), place);
    device.grouped(&group, &mut || device.all_reduce(&group, &mut values, 0..8)).unwrap();
    device.all_gather(&group, &mut values, 0..8).unwrap();
    device.check_group(&group).unwrap();
    // Ranges are checked as on any device.
    assert_eq!(device.all_gather(&group, &mut values, 0..7).unwrap_err().exit_code(), 70);
    assert_eq!(device.all_reduce(&group, &mut values, 0..9).unwrap_err().exit_code(), 70);
    assert_eq!(device.broadcast(&group, &mut values, 0..8, 4).unwrap_err().exit_code(), 70);
    device.abort(&group)();
    let counted = (device.memory().now - now, device.taken_at_peak() - peak);
    drop(group);
    assert_eq!(device.memory().now, now);
    counted
}

#[test]
fn a_planned_gpu_counts_what_nccl_takes_and_other_devices_count_nothing() {
    let (now, peak) = counted(&CudaDevice::planned_gpu(KernelPath::Portable, true));
    assert_eq!(now, NCCL_MEMORY);
    assert!(peak >= NCCL_MEMORY, "{peak}");
    assert_eq!(counted(&CudaDevice::planned_emulated()), (0, 0));
    assert_eq!(counted(&CpuDevice::<f32>::open_planned(Some(1)).unwrap()), (0, 0));
}
