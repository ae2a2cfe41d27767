use half::bf16;
use mmpo_fast::device::{ComputeBuffer, Device, Floats, Gradient};
use mmpo_fast::error::Result;
use mmpo_fast::optimizer::{
    AdamWStep, BLOCK, DynamicMap, MasterWeights, MomentFormat, OptimizerState, StateBuffer, StateOptions,
    StateValues, StochasticRounding, quantize_block,
};

use crate::harness::*;
use crate::naive::Precision;

const STEP: AdamWStep =
    AdamWStep { learning_rate: 5e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01, step: 1 };

/// Every kind of state that a tensor may have.
fn all_options() -> Vec<StateOptions> {
    let moments = [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit];
    let masters = [MasterWeights::F32, MasterWeights::Split, MasterWeights::None];
    moments.into_iter().flat_map(|moments| masters.map(|master| StateOptions { moments, master })).collect()
}

const ROUNDING: StochasticRounding = StochasticRounding { seed: 0x1234_5678_9abc_def0, tensor: 3 };

/// A state that begins with the weight's values.
fn state_of<D: Device>(device: &D, weight: &ComputeBuffer<D>, options: StateOptions) -> OptimizerState<D> {
    OptimizerState::before_first(device, weight, options, ROUNDING).unwrap()
}

/// A buffer of a state as f32: codes as numbers. Empty where there is none.
fn read_state<D: Device>(device: &D, state: &OptimizerState<D>, buffer: StateBuffer) -> Vec<f32> {
    match state.get(buffer) {
        Some(StateValues::F32(values)) => read(device, values),
        Some(StateValues::Bf16(values)) => {
            let mut found = vec![bf16::ZERO; device.len(values)];
            device.download(&mut found, values, 0).unwrap();
            found.into_iter().map(bf16::to_f32).collect()
        }
        Some(StateValues::U16(values)) => {
            let mut found = vec![0u16; device.len(values)];
            device.download(&mut found, values, 0).unwrap();
            found.into_iter().map(f32::from).collect()
        }
        Some(StateValues::U8(codes)) => read_codes(device, codes).into_iter().map(f32::from).collect(),
        None => Vec::new(),
    }
}

fn read_codes<D: Device>(device: &D, codes: &D::Buffer<u8>) -> Vec<u8> {
    let mut found = vec![0; device.len(codes)];
    device.download(&mut found, codes, 0).unwrap();
    found
}

/// The master copy of a weight; the weight where there is none.
fn read_master<D: Device>(device: &D, weight: &ComputeBuffer<D>, state: &OptimizerState<D>) -> Vec<f32> {
    let Some(master) = &state.master else { return read_compute(device, weight) };
    let mut values = vec![0.0; device.len(weight)];
    master.download(device, (weight, 0), 0, &mut values).unwrap();
    values
}

/// An update of one tensor.
fn update<D: Device>(
    device: &D,
    weight: &mut ComputeBuffer<D>,
    state: &mut OptimizerState<D>,
    gradient: &Floats<D>,
    norm: &Floats<D>,
    step: AdamWStep,
) -> Result<()> {
    device.adamw(&mut [state.update(weight, gradient)], norm, step)
}

/// Weights, states and gradients of these lengths, after two updates: of all tensors in one call, or of one in each. What
/// comes out, as bits.
fn two_updates<D: Device>(device: &D, lengths: &[usize], options: StateOptions, together: bool) -> Vec<u32> {
    let mut weights: Vec<ComputeBuffer<D>> =
        lengths.iter().zip(1..).map(|(&len, seed)| random_compute(device, seed, len, 1.0).0).collect();
    let mut states: Vec<OptimizerState<D>> =
        weights.iter().map(|weight| state_of(device, weight, options)).collect();
    for (state, tensor) in states.iter_mut().zip(0..) {
        state.rounding.tensor = tensor;
    }
    let norm = floats(device, &[8.0, 0.125]);
    for number in 1..=2 {
        let step = AdamWStep { step: number, ..STEP };
        let gradients: Vec<Floats<D>> = lengths
            .iter()
            .zip(u64::from(number) * 1000..)
            .map(|(&len, seed)| floats(device, &random(seed, len, 3.0)))
            .collect();
        let tensors = weights.iter_mut().zip(&mut states).zip(&gradients);
        let mut updates: Vec<_> =
            tensors.map(|((weight, state), gradient)| state.update(weight, gradient)).collect();
        if together {
            device.adamw(&mut updates, &norm, step).unwrap();
        } else {
            for update in updates.chunks_mut(1) {
                device.adamw(update, &norm, step).unwrap();
            }
        }
    }
    let weights = weights.iter().flat_map(|weight| read_compute(device, weight));
    let states = states
        .iter()
        .flat_map(|state| StateBuffer::ALL.into_iter().flat_map(|buffer| read_state(device, state, buffer)));
    weights.chain(states).map(f32::to_bits).collect()
}

/// What a moment of this format keeps of exact values, a tensor at a time.
fn kept(values: &[f64], format: MomentFormat, map: DynamicMap) -> Vec<f64> {
    match format {
        MomentFormat::F32 => values.to_vec(),
        MomentFormat::Bf16 => values.iter().map(|&value| bf16::from_f32(value as f32).to_f64()).collect(),
        MomentFormat::EightBit => {
            let narrow: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            let mut kept = Vec::new();
            for block in narrow.chunks(BLOCK) {
                let mut codes = vec![0; block.len()];
                let scale = quantize_block(&mut codes, block, map);
                kept.extend(codes.iter().map(|&code| f64::from(map.decode(code)) * f64::from(scale)));
            }
            kept
        }
    }
}

/// Three updates in f64, whose moments are rounded to their format after each: weights, then both moments.
fn three_updates_in_f64(weights: &[f64], gradients: &[Vec<f32>; 3], format: MomentFormat) -> [Vec<f64>; 3] {
    let mut now: Vec<(f64, f64, f64)> = weights.iter().map(|&weight| (weight, 0.0, 0.0)).collect();
    for (gradient, number) in gradients.iter().zip(1..) {
        let step = AdamWStep { step: number, ..STEP };
        for (values, &gradient) in now.iter_mut().zip(gradient) {
            *values = Precision::Exact.adamw(*values, 0.125 * f64::from(gradient), step, (0.9, 0.999));
        }
        let column = |pick: fn(&(f64, f64, f64)) -> f64| now.iter().map(pick).collect::<Vec<f64>>();
        let firsts = kept(&column(|v| v.1), format, DynamicMap::Signed);
        let seconds = kept(&column(|v| v.2), format, DynamicMap::Unsigned);
        for (values, (first, second)) in now.iter_mut().zip(firsts.into_iter().zip(seconds)) {
            (values.1, values.2) = (first, second);
        }
    }
    [0, 1, 2].map(|column| now.iter().map(|values| [values.0, values.1, values.2][column]).collect())
}

/// Moments as numbers.
fn moments<D: Device>(device: &D, state: &OptimizerState<D>) -> [Vec<f32>; 2] {
    let read = |buffer| read_state(device, state, buffer);
    let of_codes = |codes: Vec<f32>, scales: Vec<f32>, map: DynamicMap| -> Vec<f32> {
        let codes = codes.chunks(BLOCK).zip(scales);
        codes
            .flat_map(|(codes, scale)| codes.iter().map(move |&code| map.decode(code as u8) * scale))
            .collect()
    };
    match state.moments.format() {
        MomentFormat::EightBit => [
            of_codes(read(StateBuffer::FirstMoment), read(StateBuffer::FirstScales), DynamicMap::Signed),
            of_codes(read(StateBuffer::SecondMoment), read(StateBuffer::SecondScales), DynamicMap::Unsigned),
        ],
        _ => [read(StateBuffer::FirstMoment), read(StateBuffer::SecondMoment)],
    }
}

/// Asserts that all values but one in 500 are within `bounds` of what is wanted. A moment that lies on the boundary between two numbers
/// of its format may go either way, and the updates after it differ.
#[track_caller]
fn assert_mostly_close(what: &str, got: &[f32], wanted: &[f64], bounds: Tolerance) {
    assert_eq!(got.len(), wanted.len(), "{what}: lengths");
    let mean_square = wanted.iter().map(|value| value * value).sum::<f64>() / wanted.len() as f64;
    let allowed = |wanted: f64| bounds.relative * wanted.abs() + bounds.absolute * mean_square.sqrt();
    let is_close = |(got, wanted): (&f32, &f64)| (f64::from(*got) - wanted).abs() <= allowed(*wanted);
    let wrong = got.len() - got.iter().zip(wanted).filter(|&pair| is_close(pair)).count();
    let first = got.iter().zip(wanted).position(|pair| !is_close(pair)).unwrap_or(0);
    assert!(
        wrong * 500 <= got.len(),
        "{what}: {wrong} of {} values are wrong; first [{first}] = {:e}, wanted {:e}",
        got.len(),
        got[first],
        wanted[first]
    );
}

device_tests! {
    /// Many tensors in one call, with and without values, ragged, more than a table has room for: what a call each gives.
    fn together_as_one_by_one(device, bounds) {
        let mut lengths = vec![0, 5, 1024, 1025, 0, 3, 4099, 8];
        lengths.extend((0..200).map(|tensor| tensor % 7));
        lengths.extend([2048, 0, 1, 0, 4096, 6000]);
        for options in all_options() {
            trying("options", options);
            let together = two_updates(device, &lengths, options, true);
            assert!(together.len() > 2 * lengths.iter().sum::<usize>());
            assert!(together == two_updates(device, &lengths, options, false));
        }
        assert!(two_updates(device, &[0, 0], StateOptions::default(), true).is_empty());
    }

    /// bf16 gradients give the bits that the same values in f32 give, of whole tensors and of parts, in one call with f32 ones.
    fn bf16_gradients(device, bounds) {
        for options in all_options() {
            trying("options", options);
            let lengths = [1, 100, 4096, 4613, 0, 9000];
            let after = |is_bf16: fn(usize) -> bool| -> Vec<f32> {
                let mut weights: Vec<ComputeBuffer<D>> =
                    lengths.iter().zip(1..).map(|(&len, seed)| random_compute(device, seed, len, 1.0).0).collect();
                let mut states: Vec<_> = weights.iter().map(|weight| state_of(device, weight, options)).collect();
                let norm = floats(device, &[8.0, 0.125]);
                for number in 1..=2 {
                    let gradients: Vec<_> = lengths
                        .iter()
                        .zip(u64::from(number) * 1000..)
                        .map(|(&len, seed)| {
                            let (sum, wide) = narrow(device, &random(seed, len, 3.0));
                            (sum, floats(device, &wide))
                        })
                        .collect();
                    let tensors = weights.iter_mut().zip(&mut states).zip(&gradients).enumerate();
                    let mut updates: Vec<_> = tensors
                        .map(|(tensor, ((weight, state), (sum, wide)))| {
                            let gradient = if is_bf16(tensor) { Gradient::Bf16(sum) } else { Gradient::F32(wide) };
                            let mut update = state.update_from(weight, gradient);
                            // The last one is updated in part: its state begins with the part.
                            update.part = (tensor + 1 == lengths.len()).then(|| 2 * BLOCK..lengths[tensor] - 100);
                            update
                        })
                        .collect();
                    device.adamw(&mut updates, &norm, AdamWStep { step: number, ..STEP }).unwrap();
                }
                let weights = weights.iter().flat_map(|weight| read_compute(device, weight));
                let states = states.iter().flat_map(|state| {
                    StateBuffer::ALL.into_iter().flat_map(|buffer| read_state(device, state, buffer))
                });
                weights.chain(states).collect()
            };
            let wanted = after(|_| false);
            assert_same_bits("all of them bf16", &after(|_| true), &wanted);
            assert_same_bits("every other one", &after(|tensor| tensor % 2 == 0), &wanted);
        }
    }

    /// Moments of every format, with a master copy: three updates against f64 ones whose moments are rounded in the same way.
    fn moments_of_every_format(device, bounds) {
        for moments_format in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit] {
            for len in [1, 100, 4096, 4613, 9000] {
                trying("format and values", (moments_format, len));
                let (mut weight, weight64) = random_compute(device, 1, len, 1.0);
                let options = StateOptions { moments: moments_format, master: MasterWeights::F32 };
                let mut state = state_of(device, &weight, options);
                let gradients = [11, 12, 13].map(|seed| random(seed, len, 3.0));
                let norm = floats(device, &[8.0, 0.125]);
                for (gradient, number) in gradients.iter().zip(1..) {
                    let step = AdamWStep { step: number, ..STEP };
                    update(device, &mut weight, &mut state, &floats(device, gradient), &norm, step).unwrap();
                }
                let format = moments_format.of_tensor(len);
                assert_eq!(state.moments.format(), format);
                let [weights, firsts, seconds] = three_updates_in_f64(&weight64, &gradients, format);
                let [first, second] = moments(device, &state);
                assert_mostly_close("first moment", &first, &firsts, Tolerance::F32);
                assert_mostly_close("second moment", &second, &seconds, Tolerance::F32);
                assert_mostly_close("weight", &read_compute(device, &weight), &weights, bounds);
                if state.master.is_some() {
                    let master = read_master(device, &weight, &state);
                    assert_mostly_close("master", &master, &weights, Tolerance::F32);
                }
            }
        }
    }

    /// A master copy that is split between the weight and its remainder has the bits of a whole one, but that it lies beside the middle
    /// between two weights where a whole one lies on it.
    fn split_master_copy(device, bounds) {
        let mut middles = 0;
        for (format, len) in [(MomentFormat::F32, 40_001), (MomentFormat::Bf16, 4097), (MomentFormat::EightBit, 40_000)] {
            trying("format and values", (format, len));
            let (mut weight, values) = random_compute(device, 1, len, 1.0);
            let (mut twin, _) = compute(device, &values.iter().map(|&value| value as f32).collect::<Vec<_>>());
            let options = |master| StateOptions { moments: format, master };
            let mut state = state_of(device, &weight, options(MasterWeights::Split));
            let mut twins = state_of(device, &twin, options(MasterWeights::F32));
            let norm = floats(device, &[8.0, 0.125]);
            for number in 1..=5 {
                let (gradient, step) = (floats(device, &random(10 + u64::from(number), len, 3.0)), AdamWStep { step: number, ..STEP });
                update(device, &mut weight, &mut state, &gradient, &norm, step).unwrap();
                update(device, &mut twin, &mut twins, &gradient, &norm, step).unwrap();
                assert_same_bits("weight", &read_compute(device, &weight), &read_compute(device, &twin));
                let mut wanted = read_master(device, &twin, &twins);
                if let Some(master) = &mut twins.master {
                    let on_middle = |value: &&mut f32| value.to_bits() & 0xffff == 0x8000;
                    for value in wanted.iter_mut().filter(on_middle) {
                        let is_odd = value.to_bits() >> 16 & 1 == 1;
                        *value = f32::from_bits(if is_odd { value.to_bits() + 1 } else { value.to_bits() - 1 });
                        middles += 1;
                    }
                    master.upload(device, 0, &wanted).unwrap();
                }
                assert_same_bits("master", &read_master(device, &weight, &state), &wanted);
                for buffer in [StateBuffer::FirstMoment, StateBuffer::SecondMoment, StateBuffer::SecondScales] {
                    let wanted = read_state(device, &twins, buffer);
                    assert_same_bits(buffer.name(), &read_state(device, &state, buffer), &wanted);
                }
            }
        }
        assert!(middles > 0 || !device.needs_master(), "no value lay in the middle");
    }

    /// Without a master copy the weight is what a master copy with its values would become, rounded by the known random bits;
    /// an f32 weight is not rounded at all.
    fn no_master_copy(device, bounds) {
        for format in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::EightBit] {
            for len in [3, 4096, 5001] {
                trying("format and values", (format, len));
                let (mut weight, values) = random_compute(device, 1, len, 1.0);
                let (mut twin, _) = compute(device, &values.iter().map(|&value| value as f32).collect::<Vec<_>>());
                let options = |master| StateOptions { moments: format, master };
                let mut state = state_of(device, &weight, options(MasterWeights::None));
                let mut twins = state_of(device, &twin, options(MasterWeights::F32));
                assert!(state.master.is_none());
                let (gradient, norm) = (floats(device, &random(2, len, 3.0)), floats(device, &[8.0, 0.125]));
                let step = AdamWStep { step: 7, ..STEP };
                update(device, &mut weight, &mut state, &gradient, &norm, step).unwrap();
                update(device, &mut twin, &mut twins, &gradient, &norm, step).unwrap();
                let mut wanted = read_master(device, &twin, &twins);
                if twins.master.is_some() {
                    for (value, element) in wanted.iter_mut().zip(0..) {
                        *value = ROUNDING.round(*value, 7, element).to_f32();
                    }
                }
                assert_same_bits("weight", &read_compute(device, &weight), &wanted);
                for buffer in [StateBuffer::FirstMoment, StateBuffer::SecondMoment, StateBuffer::SecondScales] {
                    let wanted = read_state(device, &twins, buffer);
                    assert_same_bits(buffer.name(), &read_state(device, &state, buffer), &wanted);
                }
            }
        }
    }

    /// Updates too small for bf16: twenty of them move the mean of the weights as far as they should, where each alone
    /// rounded to nearest would move nothing.
    fn small_updates_add_up_without_a_master_copy(device, bounds) {
        const LEN: usize = 4096;
        const UPDATES: u32 = 20;
        let (mut weight, _) = compute(device, &[1.0; LEN]);
        let options = StateOptions { moments: MomentFormat::F32, master: MasterWeights::None };
        let mut state = state_of(device, &weight, options);
        let (gradient, norm) = (floats(device, &[1.0; LEN]), floats(device, &[0.0, 1.0]));
        for number in 1..=UPDATES {
            let step = AdamWStep { learning_rate: 1e-4, weight_decay: 0.0, step: number, ..STEP };
            update(device, &mut weight, &mut state, &gradient, &norm, step).unwrap();
        }
        let weights = read_compute(device, &weight);
        let mean = weights.iter().map(|&weight| f64::from(weight)).sum::<f64>() / LEN as f64;
        // A constant gradient moves a weight by the learning rate in every update. Below 1 bf16 has steps of 2^-8: the variance
        // of a rounding is at most a quarter of a step squared; five standard deviations of the mean are allowed.
        let wanted = 1.0 - 1e-4 * f64::from(UPDATES);
        let deviation = f64::from(UPDATES).sqrt() / 512.0 / (LEN as f64).sqrt();
        assert!((mean - wanted).abs() <= 5.0 * deviation + 1e-6, "mean {mean}, wanted {wanted}");
    }

    /// No tensors: nothing to do.
    fn none(device, bounds) {
        device.adamw(&mut [], &floats(device, &[0.0, 1.0]), STEP).unwrap();
    }

    /// Five updates, with decay and a clipping factor, against the formulas of PyTorch's documentation.
    fn five_updates(device, bounds) {
        for len in [1, 50, 4095, 40_000] {
            trying("values", len);
            let (mut weight_buffer, weight64) = random_compute(device, 1, len, 1.0);
            let mut state = OptimizerState::new(device, len).unwrap();
            if let Some(master) = &mut state.master {
                let values: Vec<f32> = weight64.iter().map(|&value| value as f32).collect();
                master.upload(device, 0, &values).unwrap();
            }
            let mut wanted: Vec<_> = weight64.iter().map(|&weight| (weight, 0.0, 0.0)).collect();
            let mut eager = wanted.clone();
            let norm = floats(device, &[8.0, 0.125]);
            for number in 1..=5 {
                let gradient = random(10 + u64::from(number), len, 3.0);
                let step = AdamWStep { step: number, ..STEP };
                update(device, &mut weight_buffer, &mut state, &floats(device, &gradient), &norm, step).unwrap();
                for (precision, values) in [(Precision::Exact, &mut wanted), (Precision::Bf16, &mut eager)] {
                    for (values, gradient) in values.iter_mut().zip(&gradient) {
                        let gradient = 0.125 * f64::from(*gradient);
                        *values = precision.adamw(*values, gradient, step, (0.9, 0.999));
                    }
                }
            }
            let column = |pick: fn(&(f64, f64, f64)) -> f64| wanted.iter().map(pick).collect::<Vec<f64>>();
            assert_close("first moment", &read_state(device, &state, StateBuffer::FirstMoment), &column(|v| v.1), Tolerance::F32);
            assert_close("second moment", &read_state(device, &state, StateBuffer::SecondMoment), &column(|v| v.2), Tolerance::F32);
            let weight = read_compute(device, &weight_buffer);
            assert_close("weight", &weight, &column(|v| v.0), bounds);
            let eager: Vec<f64> = eager.iter().map(|values| values.0).collect();
            assert_no_worse("weight", &weight, Stored::Bf16, &column(|v| v.0), &eager);
            if state.master.is_some() {
                let master = read_master(device, &weight_buffer, &state);
                assert_close("master", &master, &column(|v| v.0), Tolerance::F32);
            }
        }
    }

    /// The first update moves every weight by the learning rate against its gradient's sign, whatever the gradient's
    /// size: the bias correction is exact.
    fn first_update_is_the_learning_rate(device, bounds) {
        let (mut weight, _) = compute(device, &[0.0; 4]);
        let mut state = OptimizerState::new(device, 4).unwrap();
        let gradient = floats(device, &[1e-3, -1e-3, 10.0, -1e3]);
        let norm = floats(device, &[0.0, 1.0]);
        let step = AdamWStep { weight_decay: 0.0, ..STEP };
        update(device, &mut weight, &mut state, &gradient, &norm, step).unwrap();
        // Epsilon is 1e-5 of the smallest gradient.
        let wanted = [-5e-4 / (1.0 + 1e-5), 5e-4 / (1.0 + 1e-5), -5e-4, 5e-4];
        assert_close("weight", &read_compute(device, &weight), &wanted, bounds);
    }

    /// Update number 0 has no bias correction, and a short gradient is refused.
    fn refused(device, bounds) {
        let (mut weight, _) = compute(device, &[0.0; 4]);
        let mut state = OptimizerState::new(device, 4).unwrap();
        let (gradient, norm) = (floats(device, &[0.0; 4]), floats(device, &[0.0, 1.0]));
        let step = AdamWStep { step: 0, ..STEP };
        assert!(update(device, &mut weight, &mut state, &gradient, &norm, step).is_err());
        let error = update(device, &mut weight, &mut state, &floats(device, &[0.0; 3]), &norm, STEP);
        let error = error.unwrap_err().to_string();
        assert!(error.contains("adamw") && error.contains("`gradient` holds 3"), "{error}");
    }
}
