//! Training state: back to the bit, and refused where it does not fit.

use std::path::Path;

use half::bf16;
use mmpo_fast::checkpoint::run_state::{
    RngPosition, RunIdentity, latest, newest_first, prune, save_checkpoint, set_aside,
};
use mmpo_fast::checkpoint::{Checkpoint, RunState, StoredTensor, checksums};
use mmpo_fast::{Error, Result};
use proptest::prelude::*;
use safetensors::tensor::Dtype;

use super::small_model::expect_message;

const CONFIG: &str = "seed = 42\noutput = \"runs/a\"\n[objective]\nname = \"mmpo\"\nbeta = 0.1\n";

fn state(step: u64) -> RunState {
    RunState {
        step,
        epoch: 1,
        pairs_seen: u64::MAX,
        rng: RngPosition { seed: 0xfedc_ba98_7654_3210, stream: 3, word: 1 << 60 },
        identity: RunIdentity {
            config: CONFIG.into(),
            model: "ab".into(),
            data: "cd".into(),
            reference: "ef".into(),
        },
    }
}

/// Bit patterns that any detour through arithmetic or text would lose.
const FLOATS: [u32; 6] = [0x7fc0_1234, 0xff80_0000, 0x0000_0001, 0x8000_0000, 0x3f80_0001, 0x7f7f_ffff];

fn tensors() -> Vec<StoredTensor> {
    vec![
        StoredTensor::new("quantized", Dtype::U8, &[5]),
        StoredTensor::new("weights", Dtype::BF16, &[3]),
        StoredTensor::new("first_moment", Dtype::F32, &[2, 3]),
        StoredTensor::new("counters", Dtype::U32, &[2]),
        StoredTensor::new("empty", Dtype::F32, &[0, 4]),
    ]
}

fn fill(tensor: &StoredTensor, offset: usize, bytes: &mut [u8]) -> Result<()> {
    assert_eq!(offset, 0, "small tensors come in one piece");
    match tensor.name.as_str() {
        "quantized" => bytes.copy_from_slice(&[0, 255, 3, 4, 5]),
        "weights" => bytemuck::cast_slice_mut(bytes).copy_from_slice(&[bf16::NAN, bf16::ONE, bf16::MIN]),
        "first_moment" => bytemuck::cast_slice_mut(bytes).copy_from_slice(&FLOATS),
        "counters" => bytemuck::cast_slice_mut(bytes).copy_from_slice(&[7u32, u32::MAX]),
        other => panic!("{other} has no values to fill"),
    }
    Ok(())
}

fn save(run: &Path, step: u64) -> Checkpoint {
    Checkpoint::open(&save_checkpoint(run, &state(step), &tensors(), fill).unwrap()).unwrap()
}

fn steps(run: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(run.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn state_comes_back_to_the_bit() {
    let run = tempfile::tempdir().unwrap();
    let checkpoint = save(run.path(), 123);
    assert_eq!(checkpoint.path(), run.path().join("checkpoints/step-000123"));
    assert_eq!(checkpoint.state(), &state(123));
    checkpoint.check_tensors(&tensors()).unwrap();
    let floats = checkpoint.values::<f32>("first_moment", &[2, 3]).unwrap();
    assert_eq!(floats.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), FLOATS);
    assert_eq!(checkpoint.values::<u32>("counters", &[2]).unwrap(), [7, u32::MAX]);
    assert_eq!(checkpoint.values::<u8>("quantized", &[5]).unwrap(), [0, 255, 3, 4, 5]);
    let weights = checkpoint.values::<bf16>("weights", &[3]).unwrap();
    assert_eq!(
        bytemuck::cast_slice::<bf16, u16>(weights),
        [bf16::NAN, bf16::ONE, bf16::MIN].map(bf16::to_bits)
    );
    assert!(checkpoint.values::<f32>("empty", &[0, 4]).unwrap().is_empty());
}

#[test]
fn large_tensors_come_in_pieces() {
    let run = tempfile::tempdir().unwrap();
    let values = (9 << 20) + 3;
    let tensors = [StoredTensor::new("w", Dtype::U32, &[values])];
    let mut pieces = 0;
    let path = save_checkpoint(run.path(), &state(1), &tensors, |_, offset, bytes| {
        pieces += 1;
        for (index, out) in bytemuck::cast_slice_mut::<u8, u32>(bytes).iter_mut().enumerate() {
            *out = (offset + index) as u32;
        }
        Ok(())
    })
    .unwrap();
    assert_eq!(pieces, 3);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let back = checkpoint.values::<u32>("w", &[values]).unwrap();
    assert!(back.iter().enumerate().all(|(index, &value)| value == index as u32));
}

#[test]
fn the_newest_is_found_and_old_ones_are_pruned() {
    let run = tempfile::tempdir().unwrap();
    assert_eq!(latest(run.path()).unwrap(), None);
    for step in [90, 200, 1_000_000, 999_999] {
        save(run.path(), step);
    }
    let folder = run.path().join("checkpoints");
    std::fs::create_dir(folder.join("step-2000000.partial-4194305")).unwrap();
    std::fs::write(folder.join("notes.txt"), "").unwrap();
    assert_eq!(latest(run.path()).unwrap(), Some(folder.join("step-1000000")));
    save(run.path(), 200);
    assert_eq!(steps(run.path()), ["notes.txt", "step-000090", "step-000200", "step-1000000", "step-999999"]);
    prune(run.path(), 2, &[]).unwrap();
    assert_eq!(steps(run.path()), ["notes.txt", "step-1000000", "step-999999"]);
    prune(run.path(), 0, &[]).unwrap();
    assert_eq!(steps(run.path()), ["notes.txt", "step-1000000"]);
}

#[test]
fn a_failed_save_leaves_the_earlier_checkpoint_of_that_step() {
    let run = tempfile::tempdir().unwrap();
    save(run.path(), 5);
    let broken = save_checkpoint(run.path(), &state(5), &tensors(), |tensor, _, _| match tensor.dtype {
        Dtype::U8 => Err(Error::device("gone", "start again")),
        _ => Ok(()),
    });
    assert!(matches!(broken, Err(Error::Device { .. })));
    assert_eq!(steps(run.path()), ["step-000005"]);
    let checkpoint = Checkpoint::open(&latest(run.path()).unwrap().unwrap()).unwrap();
    assert_eq!(checkpoint.values::<u32>("counters", &[2]).unwrap(), [7, u32::MAX]);
    let twice = [tensors(), tensors()].concat();
    assert!(save_checkpoint(run.path(), &state(6), &twice, fill).is_err(), "two tensors of one name");
}

#[test]
fn a_changed_run_is_refused_with_what_changed() {
    let run = tempfile::tempdir().unwrap();
    let checkpoint = save(run.path(), 5);
    let now = state(5).identity;
    checkpoint.check_identity(&now, &[]).unwrap();
    let changed = RunIdentity {
        config: CONFIG.replace("0.1", "0.05").replace("runs/a", "runs/b").replace("seed = 42\n", ""),
        ..now.clone()
    };
    let error = checkpoint.check_identity(&changed, &["output"]).unwrap_err();
    assert_eq!(error.exit_code(), 2);
    expect_message(
        &error,
        checkpoint.path(),
        "`objective.beta` was 0.1 and is 0.05; `seed` was 42 and is absent",
    );
    assert!(!error.to_string().contains("runs/b"), "{error}");
    checkpoint.check_identity(&changed, &["output", "objective", "seed"]).unwrap();
    assert!(checkpoint.check_identity(&changed, &["output", "object", "seed"]).is_err());
    let error =
        checkpoint.check_identity(&RunIdentity { data: "ce".into(), ..now.clone() }, &[]).unwrap_err();
    expect_message(&error, checkpoint.path(), "the pairs are not the same");
    let error =
        checkpoint.check_identity(&RunIdentity { reference: "".into(), ..now.clone() }, &[]).unwrap_err();
    expect_message(&error, checkpoint.path(), "the reference model's weights are not the same");
    let with = |states: &str, masters: &str| RunIdentity {
        config: format!("optimizer_states = \"{states}\"\nmaster_weights = \"{masters}\"\n{CONFIG}"),
        ..now.clone()
    };
    checkpoint.check_identity(&with("f32", "f32"), &[]).expect("what runs did before there was a choice");
    let error = checkpoint.check_identity(&with("8bit", "f32"), &[]).unwrap_err();
    expect_message(&error, checkpoint.path(), "`optimizer_states` was \"f32\" and is \"8bit\"");
    let error = checkpoint.check_identity(&with("f32", "none"), &[]).unwrap_err();
    expect_message(&error, checkpoint.path(), "`master_weights` was \"f32\" and is \"none\"");
    let error = checkpoint.check_identity(&RunIdentity { model: "aa".into(), ..now }, &[]).unwrap_err();
    expect_message(&error, checkpoint.path(), "the starting model's weights are not the same");
}

#[test]
fn tensors_of_another_model_are_refused_by_name() {
    let run = tempfile::tempdir().unwrap();
    let checkpoint = save(run.path(), 5);
    let file = checkpoint.path().join("state.safetensors");
    let refused = |change: fn(&mut Vec<StoredTensor>), part: &str| {
        let mut tensors = tensors();
        change(&mut tensors);
        let error = checkpoint.check_tensors(&tensors).unwrap_err();
        expect_message(&error, &file, part);
    };
    refused(
        |tensors| tensors[2].shape = vec![3, 2],
        "`first_moment` is F32 [2, 3]; the model being trained has F32 [3, 2]",
    );
    refused(|tensors| tensors[2].dtype = Dtype::U8, "`first_moment` is F32 [2, 3]");
    refused(|tensors| _ = tensors.pop(), "`empty` is not part of the model");
    refused(|tensors| tensors[0].name = "other".into(), "tensor `other` is missing");
    assert!(checkpoint.values::<f32>("counters", &[2]).is_err());
}

#[test]
fn damaged_state_is_refused() {
    let run = tempfile::tempdir().unwrap();
    let path = save(run.path(), 5).path().to_path_buf();
    let json = path.join("state.json");
    let sound = std::fs::read_to_string(&json).unwrap();
    let format = |number: &str| sound.replace("\"format\": 2", &format!("\"format\": {number}"));
    for (text, part) in [
        (&sound[..sound.len() / 2], "damaged"),
        (
            &format("1"),
            "has format 1, which has no checksums and other learning rates; this version reads format 2",
        ),
        (&format("3"), "has format 3; this version reads format 2"),
        (&sound.replace("\"epoch\"", "\"epok\""), "damaged"),
        (&sound.replace("\"step\": 5", "\"step\": 7"), "damaged"),
        ("", "damaged"),
    ] {
        std::fs::write(&json, text).unwrap();
        expect_message(&Checkpoint::open(&path).unwrap_err(), &json, part);
    }
    // With checksums to match, what it says is looked at.
    for (text, part) in [
        (sound.replace("\"epoch\"", "\"epok\""), "damaged: unknown field `epok`"),
        (sound.replace("\"epoch\"", "\"more\": 1, \"epoch\""), "damaged: unknown field `more`"),
        (sound.replace("\"step\": 5", "\"step\": 7"), "says that 7 steps are done"),
    ] {
        std::fs::write(&json, text).unwrap();
        write_sums(&path);
        expect_message(&Checkpoint::open(&path).unwrap_err(), &json, part);
    }
    std::fs::write(&json, sound).unwrap();
    write_sums(&path);
    Checkpoint::open(&path).unwrap();
    for name in ["state.safetensors", "B3SUMS", "state.json"] {
        let file = path.join(name);
        std::fs::remove_file(&file).unwrap();
        expect_message(&Checkpoint::open(&path).unwrap_err(), &file, "cannot read");
    }
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let run = tempfile::tempdir().unwrap();
    let path = save(run.path(), 5).path().to_path_buf();
    for name in ["state.json", "state.safetensors", "B3SUMS"] {
        let file = path.join(name);
        let sound = std::fs::read(&file).unwrap();
        for bit in (0..8 * sound.len()).step_by(37).chain([8 * sound.len() - 1]) {
            let mut damaged = sound.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&file, damaged).unwrap();
            let error = Checkpoint::open(&path).unwrap_err();
            assert!(error.to_string().contains(name), "bit {bit} of {name}: {error}");
        }
        std::fs::write(&file, sound).unwrap();
    }
    Checkpoint::open(&path).unwrap();
}

#[test]
fn a_checkpoint_set_aside_is_none_and_stands_in_nobodys_way() {
    let run = tempfile::tempdir().unwrap();
    let first = save(run.path(), 5).path().to_path_buf();
    for _ in 0..2 {
        let second = save(run.path(), 9).path().to_path_buf();
        assert_eq!(newest_first(run.path()).unwrap(), [second.clone(), first.clone()]);
        assert_eq!(set_aside(&second).unwrap(), run.path().join("checkpoints/step-000009.damaged"));
        assert_eq!(newest_first(run.path()).unwrap(), std::slice::from_ref(&first));
    }
    prune(run.path(), 1, &[]).unwrap();
    assert_eq!(steps(run.path()), ["step-000005", "step-000009.damaged"]);
}

/// Makes the checksums of a checkpoint those of its files as they are now.
fn write_sums(checkpoint: &Path) {
    let hash = |name| (name, blake3::hash(&std::fs::read(checkpoint.join(name)).unwrap()));
    let sums = checksums::text(&[hash("state.json"), hash("state.safetensors")]);
    std::fs::write(checkpoint.join("B3SUMS"), sums).unwrap();
}

/// Tensors and state of a sound checkpoint, saved once.
fn sound_files() -> &'static [Vec<u8>; 2] {
    static FILES: std::sync::LazyLock<[Vec<u8>; 2]> = std::sync::LazyLock::new(|| {
        let run = tempfile::tempdir().unwrap();
        let path = save(run.path(), 5).path().to_path_buf();
        ["state.safetensors", "state.json"].map(|name| std::fs::read(path.join(name)).unwrap())
    });
    &FILES
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_damage_makes_resuming_panic(
        length in 0usize..600,
        damage in prop::collection::vec((0usize..500, any::<u8>()), 0..6),
    ) {
        let path = tempfile::tempdir().unwrap();
        let path = path.path();
        for (name, sound) in ["state.safetensors", "state.json"].into_iter().zip(sound_files()) {
            let mut bytes = sound.clone();
            for &(at, byte) in &damage {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            if length % 2 == 0 {
                bytes.truncate(length);
            }
            std::fs::write(path.join(name), &bytes).unwrap();
            // Past the checksums, so that what is read after them is tried too.
            if path.join("state.json").exists() && path.join("state.safetensors").exists() {
                write_sums(path);
            }
            if let Ok(checkpoint) = Checkpoint::open(path) {
                let _ = checkpoint.check_tensors(&tensors());
                let _ = checkpoint.check_identity(&state(5).identity, &[]);
                let _ = checkpoint.values::<f32>("first_moment", &[2, 3]);
            }
        }
    }
}
