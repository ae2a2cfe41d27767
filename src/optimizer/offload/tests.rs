use super::*;

/// Values of a piece: a whole number of blocks, and few of them.
const PIECE: usize = LEAST_VALUES + BLOCK;

/// A plan for tensors of these lengths, numbered from 3 on.
fn plan(lens: &[usize], ahead: &[usize], options: StateOptions) -> OffloadPlan {
    OffloadPlan {
        tensors: (3..).zip(lens.iter().copied()).collect(),
        ahead: ahead.to_vec(),
        options,
        needs_master: true,
        piece_values: PIECE,
    }
}

/// All pieces of the group with the most of them have a slot each, and there are two slots more for the copies. Without groups three
/// are enough, and never are there more slots than pieces: one piece in two slots would be two different states.
#[test]
fn there_are_slots_for_the_largest_group() {
    let slots = |lens: &[usize], ahead: &[usize]| plan(lens, ahead, StateOptions::default()).slots();
    assert_eq!(slots(&[PIECE; 9], &[]), 3);
    assert_eq!(slots(&[PIECE; 9], &[2, 4, 2]), 6);
    assert_eq!(slots(&[3 * PIECE + 1, PIECE, 8 * PIECE], &[1, 1]), 6);
    assert_eq!(slots(&[3 * PIECE, PIECE], &[1, 1]), 4);
    assert_eq!(slots(&[PIECE + 1], &[]), 2);
    assert_eq!(slots(&[PIECE], &[1]), 1);
    assert_eq!(slots(&[], &[]), 0);
}

#[cfg(mmpo_emulated)]
mod on_the_emulated_gpu {
    use super::*;
    use crate::device::cuda::{CudaBuffer, CudaDevice, EmulatorVariant};
    use crate::device::prelude::*;
    use crate::device::{Element, Sum};
    use crate::optimizer::{MasterWeights, MomentFormat};

    fn step(step: u32) -> AdamWStep {
        AdamWStep { learning_rate: 1e-2, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step }
    }

    fn values(len: usize, salt: usize) -> Vec<f32> {
        (0..len).map(|index| (0.1 + salt as f32 + 0.37 * index as f32).sin()).collect()
    }

    fn filled<T: Sum>(device: &CudaDevice, values: &[f32]) -> CudaBuffer<T> {
        let mut buffer = device.alloc(values.len()).unwrap();
        let narrow: Vec<T> = values.iter().map(|&value| T::round(value)).collect();
        device.upload(&mut buffer, 0, &narrow).unwrap();
        buffer
    }

    /// The bytes of a buffer on the device.
    fn bytes_of(device: &CudaDevice, buffer: StateRef<'_, CudaDevice>) -> Vec<u8> {
        fn download<T: Element>(device: &CudaDevice, buffer: &CudaBuffer<T>) -> Vec<u8> {
            let mut values = vec![T::default(); device.len(buffer)];
            device.download(&mut values, buffer, 0).unwrap();
            bytemuck::cast_slice(&values).to_vec()
        }
        match buffer {
            StateRef::<CudaDevice>::F32(buffer) => download(device, buffer),
            StateRef::<CudaDevice>::Bf16(buffer) => download(device, buffer),
            StateRef::<CudaDevice>::U16(buffer) => download(device, buffer),
            StateRef::<CudaDevice>::U8(buffer) => download(device, buffer),
        }
    }

    /// A tensor whose state is in host memory, and the same one whose state is on the device.
    struct Twins {
        number: usize,
        rounding: StochasticRounding,
        gradient: CudaBuffer<f32>,
        there: CudaBuffer<bf16>,
        here: CudaBuffer<bf16>,
        state: OptimizerState<CudaDevice>,
    }

    /// Updates tensors of these lengths a few times, and holds states in host memory against states on the device.
    fn compare(device: &CudaDevice, lens: &[usize], options: StateOptions) {
        let what = format!("{lens:?}, {options:?}");
        let plan = plan(lens, &[], options);
        let mut states = OffloadedStates::new(device, &plan).unwrap();
        let mut norm = device.alloc(2).unwrap();
        device.upload(&mut norm, 0, &[1.0, 1.0]).unwrap();
        let twins = plan.tensors.iter().map(|&(number, len)| {
            let rounding = StochasticRounding { seed: 7, tensor: number as u32 };
            let weights: Vec<f32> =
                values(len, number).into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
            if states.has(number, StateBuffer::Weight) {
                let place = (StateBuffer::Weight, 0);
                states.write(device, number, place, bytemuck::cast_slice(&weights)).unwrap();
            }
            let here = filled(device, &weights);
            let state = OptimizerState::before_first(device, &here, options, rounding).unwrap();
            let there = filled(device, &weights);
            Twins { number, rounding, gradient: filled(device, &values(len, 9)), there, here, state }
        });
        let mut twins: Vec<Twins> = twins.collect();
        for number in 1..=4 {
            for twin in &mut twins {
                let gradient = Gradient::F32(&twin.gradient);
                device
                    .adamw(&mut [twin.state.update_from(&mut twin.here, gradient)], &norm, step(number))
                    .unwrap();
                let tensor = (twin.number, twin.rounding);
                states.update(device, tensor, &mut twin.there, gradient, &norm, step(number)).unwrap();
            }
        }
        for twin in &twins {
            let [here, there] = [&twin.here, &twin.there]
                .map(|weight| bytes_of(device, StateRef::<CudaDevice>::Bf16(weight)));
            assert!(here == there, "{what}: weight {}", twin.number);
            for buffer in StateBuffer::ALL {
                let resident = twin.state.get(buffer).map(|buffer| bytes_of(device, buffer));
                assert_eq!(states.has(twin.number, buffer), resident.is_some(), "{what}: {buffer:?}");
                let Some(resident) = resident else { continue };
                let mut bytes = vec![0; resident.len()];
                states.read(device, twin.number, (buffer, 0), &mut bytes).unwrap();
                assert!(bytes == resident, "{what}: {buffer:?} of {}", twin.number);
            }
        }
    }

    /// With fewer pieces than slots fly elsewhere, and with last pieces that end inside a block of scales.
    #[test]
    fn pieces_of_any_number_and_length_have_the_bits_of_resident_states() {
        let device = CudaDevice::emulated(EmulatorVariant::Plain);
        for moments in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit] {
            for master in [MasterWeights::F32, MasterWeights::Split, MasterWeights::None] {
                for lens in [&[LEAST_VALUES][..], &[PIECE + 1], &[2 * PIECE + 300, LEAST_VALUES + 7]] {
                    compare(&device, lens, StateOptions { moments, master });
                }
            }
        }
    }
}
