use half::{bf16, f16};
use mmpo_fast::device::{RawValues, StorageType};

use crate::harness::*;

device_tests! {
    /// New buffers are zero; upload, copy, zero and download move exactly the ranges asked for.
    fn ranges(device, bounds) {
        let mut a = device.alloc::<f32>(8).unwrap();
        assert_eq!(read(device, &a), [0.0; 8]);
        device.upload(&mut a, 2, &[1.0, 2.0, 3.0]).unwrap();
        let mut b = unset_floats(device, 4);
        device.copy(&mut b, 1, &a, 3, 2).unwrap();
        let b = read(device, &b);
        assert_eq!(b[1..3], [2.0, 3.0]);
        assert!(b[0].is_nan() && b[3].is_nan(), "{b:?}");
        device.zero(&mut a, 3..4).unwrap();
        let mut part = [9.0; 3];
        device.download(&mut part, &a, 2).unwrap();
        assert_eq!(part, [1.0, 0.0, 3.0]);
    }

    /// All values of many buffers, with and without values, ragged, more than a table has room for, and none else's.
    fn zero_all(device, bounds) {
        let lengths = (0..500).map(|buffer| buffer % 9).chain([4096, 0, 12_289, 0, 1]);
        let mut buffers: Vec<_> = lengths.map(|len| unset_floats(device, len)).collect();
        let untouched = buffers.remove(7);
        device.zero_all(&mut buffers.iter_mut().collect::<Vec<_>>()).unwrap();
        for (number, buffer) in buffers.iter().enumerate() {
            let values = read(device, buffer);
            assert!(values.iter().all(|value| value.to_bits() == 0), "buffer {number}: {values:?}");
        }
        assert!(read(device, &untouched).iter().all(|value| value.is_nan()));
        device.zero_all(&mut []).unwrap();
    }

    /// Ranges that do not fit are errors.
    fn outside(device, bounds) {
        let mut a = device.alloc::<u32>(4).unwrap();
        let b = device.alloc::<u32>(4).unwrap();
        assert!(device.upload(&mut a, 2, &[1, 2, 3]).is_err());
        assert!(device.upload(&mut a, usize::MAX, &[1]).is_err());
        assert!(device.download(&mut [0; 3], &a, 2).is_err());
        assert!(device.zero(&mut a, 2..5).is_err());
        assert!(device.copy(&mut a, 0, &b, 1, 4).is_err());
        assert!(device.copy(&mut a, 1, &b, 0, 4).is_err());
    }

    /// The three storage types, from an odd address as a memory map may have.
    fn storage_types(device, bounds) {
        let values = [1.5_f32, -0.25, 3.0e-3, 1e4, f32::INFINITY];
        let bytes_of = |storage| -> Vec<u8> {
            values
                .iter()
                .flat_map(|&value| match storage {
                    StorageType::F32 => value.to_le_bytes().to_vec(),
                    StorageType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
                    StorageType::Bf16 => bf16::from_f32(value).to_le_bytes().to_vec(),
                })
                .collect()
        };
        for storage in [StorageType::F32, StorageType::F16, StorageType::Bf16] {
            let mut bytes = vec![0xFF];
            bytes.extend(bytes_of(storage));
            // To an address that is a multiple of 16 bytes on a GPU, and to one that is not.
            for offset in [1, 8] {
                let mut buffer = unset_compute(device, values.len() + offset);
                device.upload_values(&mut buffer, offset, RawValues { storage, bytes: &bytes[1..] }).unwrap();
                let got = read_compute(device, &buffer);
                assert!(got[..offset].iter().all(|value| value.is_nan()));
                for (&got, &value) in got[offset..].iter().zip(&values) {
                    // bf16 keeps 8 bits, f16 11.
                    let error = if value.is_infinite() { if got == value { 0.0 } else { 1.0 } } else { (got / value - 1.0).abs() };
                    let allowed = if storage == StorageType::F32 { bounds.relative as f32 } else { 4e-3 };
                    assert!(error <= allowed, "{storage:?}: {got} for {value}");
                }
            }
        }
    }

    /// Bytes are counted while a buffer lives, and the highest count is kept.
    fn counted(device, bounds) {
        let before = device.memory();
        let a = device.alloc::<f32>(1000).unwrap();
        let b = device.alloc::<u32>(500).unwrap();
        assert!(device.memory().now >= before.now + 6000, "{:?}", device.memory());
        drop(a);
        drop(b);
        assert_eq!(device.memory().now, before.now);
        assert!(device.memory().peak >= before.now + 6000);
    }
}
