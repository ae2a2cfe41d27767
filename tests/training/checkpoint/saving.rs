//! Writing model folders: what transformers expects of them, and what is left when writing fails.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use half::bf16;
use mmpo_fast::checkpoint::atomic::write_file;
use mmpo_fast::checkpoint::{CompanionFiles, ModelFolder, SHARD_BYTES, save_model};
use mmpo_fast::model::TensorSpec;
use mmpo_fast::{Error, Result};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

use super::small_model::*;

/// Set in a process that a test here started: the folder it is to write into.
const CHILD: &str = "MMPO_FAST_TEST_CHILD";

fn companions() -> CompanionFiles {
    let mut companions = CompanionFiles::default();
    companions.set("config.json", parsed(&config()).to_saved_json());
    companions
}

fn fill(spec: &TensorSpec, offset: usize, values: &mut [bf16]) -> Result<()> {
    for (index, out) in values.iter_mut().enumerate() {
        *out = bf16::from_f32(value(spec, offset + index));
    }
    Ok(())
}

fn save(target: &Path, shard_bytes: u64) -> Result<()> {
    save_model(target, &companions(), &parsed(&config()).tensors(), shard_bytes, fill)
}

/// Every weight of the model there is `constant`.
fn save_constant(target: &Path, config: &Value, constant: f32) -> Result<()> {
    let mut companions = CompanionFiles::default();
    companions.set("config.json", parsed(config).to_saved_json());
    save_model(target, &companions, &parsed(config).tensors(), SHARD_BYTES, |_, _, values| {
        values.fill(bf16::from_f32(constant));
        Ok(())
    })
}

/// The constant that [`save_constant`] wrote; panics where weights are of more than one save.
fn constant_of(target: &Path) -> f32 {
    let folder = ModelFolder::open(target).unwrap();
    let mut found = Vec::new();
    for spec in folder.config().tensors() {
        let bytes = folder.tensor(&spec.name, &spec.shape).unwrap().bytes;
        found.extend(bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()));
    }
    found.dedup();
    assert_eq!(found.len(), 1, "weights of several saves: {found:?}");
    found[0]
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[track_caller]
fn expect_saved(target: &Path) {
    let folder = ModelFolder::open(target).unwrap();
    for spec in folder.config().tensors() {
        let values = folder.tensor(&spec.name, &spec.shape).unwrap();
        let expected: Vec<u8> =
            (0..spec.values()).flat_map(|i| encode(Dtype::BF16, value(&spec, i))).collect();
        assert!(values.bytes == expected, "{}: other bytes", spec.name);
    }
}

#[test]
fn a_saved_folder_opens_with_the_same_weights() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("run/model");
    save(&target, SHARD_BYTES).unwrap();
    expect_saved(&target);
    assert_eq!(names(&target), ["config.json", "model.safetensors"]);
    assert_eq!(names(&parent.path().join("run")), ["model"]);
    let file = std::fs::read(target.join("model.safetensors")).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&file).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    // The library itself writes the same bytes.
    let library = safetensors::serialize(
        safetensors::SafeTensors::deserialize(&file).unwrap().tensors(),
        Some([("format".to_string(), "pt".to_string())].into()),
    );
    assert!(library.unwrap() == file, "not the bytes the safetensors library writes");
}

#[test]
fn a_large_model_is_cut_as_transformers_cuts_it() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    // Embedding and head (1280 bytes each) are above the limit, so each has a shard to itself. The others fill shards
    // of up to 1000 bytes.
    save(&target, 1000).unwrap();
    expect_saved(&target);
    let index: Value =
        serde_json::from_slice(&std::fs::read(target.join("model.safetensors.index.json")).unwrap()).unwrap();
    let parameters = parsed(&config()).parameters();
    assert_eq!(index["metadata"], json!({"total_parameters": parameters, "total_size": 2 * parameters}));
    let golden: Value = serde_json::from_str(include_str!("../../goldens/shards.json")).unwrap();
    assert_eq!(index["weight_map"], golden["weight_map"]);
    let shards = names(&target).iter().filter(|name| name.ends_with(".safetensors")).count();
    assert_eq!(shards as u64, golden["shards"].as_u64().unwrap());
}

#[test]
fn companions_come_along_unchanged() {
    let source = Folder::sound();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"] {
        source.write(name, format!("content of {name}\r\n"));
    }
    source.write("generation_config.json", "{\"eos_token_id\": [2, 3]}");
    source.write("README.md", "not part of the model");
    let opened = source.open().unwrap();
    let companions = CompanionFiles::read(source.path(), opened.config()).unwrap();
    let target = source.file("out");
    save_model(&target, &companions, &opened.config().tensors(), SHARD_BYTES, fill).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"] {
        assert_eq!(std::fs::read_to_string(target.join(name)).unwrap(), format!("content of {name}\r\n"));
    }
    assert!(!target.join("README.md").exists());
    let saved: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
    let mut expected = config();
    expected["torch_dtype"] = "bfloat16".into();
    expected["dtype"] = "bfloat16".into();
    assert_eq!(saved, expected);
    assert_eq!(ModelFolder::open(&target).unwrap().config().stop_token_ids, [2, 3]);
}

#[test]
fn the_source_folder_itself_may_be_replaced() {
    let source = Folder::sound();
    let opened = source.open().unwrap();
    let companions = CompanionFiles::read(source.path(), opened.config()).unwrap();
    save_model(source.path(), &companions, &opened.config().tensors(), SHARD_BYTES, fill).unwrap();
    expect_saved(source.path());
    // What was mapped before is still there to be read.
    opened.check_finite().unwrap();
}

#[test]
fn a_folder_with_other_things_in_it_is_not_replaced() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    save(&target, SHARD_BYTES).unwrap();
    std::fs::write(target.join("thesis.tex"), "years of work").unwrap();
    let error = save(&target, SHARD_BYTES).unwrap_err();
    expect_message(&error, &target.join("thesis.tex"), "it would be lost");
    std::fs::remove_file(target.join("thesis.tex")).unwrap();
    std::fs::create_dir(target.join("model-x.safetensors")).unwrap();
    assert!(matches!(save(&target, SHARD_BYTES), Err(Error::Config { .. })));
    let file = parent.path().join("file");
    std::fs::write(&file, "content").unwrap();
    expect_message(&save(&file, SHARD_BYTES).unwrap_err(), &file, "is a file");
    assert!(save(Path::new("/"), SHARD_BYTES).is_err());
    assert_eq!(names(parent.path()), ["file", "model"]);
}

#[test]
fn a_failing_fill_leaves_the_earlier_model() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    save_constant(&target, &config(), 3.0).unwrap();
    let result = save_model(&target, &companions(), &parsed(&config()).tensors(), 1000, |spec, _, _| {
        match spec.name.contains("layers.1") {
            true => Err(Error::device("the device is gone", "start again")),
            false => Ok(()),
        }
    });
    assert!(matches!(result, Err(Error::Device { .. })));
    assert_eq!(constant_of(&target), 3.0);
    assert_eq!(names(parent.path()), ["model"]);
}

#[test]
fn leftovers_of_killed_runs_go_and_those_of_live_ones_stay() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    let leftover = |suffix: &str| parent.path().join(format!("model.{suffix}"));
    // No process has this id: the largest that Linux gives out is 2^22.
    std::fs::create_dir(leftover("partial-4194305")).unwrap();
    std::fs::write(leftover("partial-4194305").join("model.safetensors"), "half").unwrap();
    std::fs::create_dir(leftover("partial-1")).unwrap();
    std::fs::create_dir(leftover("partial-notes")).unwrap();
    save_constant(&target, &config(), 1.0).unwrap();
    assert_eq!(names(parent.path()), ["model", "model.partial-1", "model.partial-notes"]);
    // A process that died between its two renames left only the old folder, under another name.
    std::fs::rename(&target, leftover("old-4194305")).unwrap();
    mmpo_fast::checkpoint::atomic::remove_leftovers(&target).unwrap();
    assert_eq!(constant_of(&target), 1.0);
}

#[test]
fn a_file_is_replaced_whole_or_not_at_all() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("report.html");
    write_file(&target, b"one").unwrap();
    write_file(&target, b"two").unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"two");
    assert_eq!(names(parent.path()), ["report.html"]);
    let error = write_file(&parent.path().join("absent/report.html"), b"x").unwrap_err();
    assert_eq!(error.exit_code(), 5);
}

/// A tmpfs of one MiB, unmounted on drop; `None` where this user may not mount.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(folder.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(SmallDisk(folder)),
            _ => {
                println!("mounting a tmpfs is not permitted here: skipped");
                None
            }
        }
    }

    fn make_read_only(&self) {
        let status = Command::new("mount").args(["-o", "remount,ro"]).arg(self.0.path()).status().unwrap();
        assert!(status.success());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// A model of about 1.6 MB in bf16.
fn larger_config() -> Value {
    let mut config = config();
    config["vocab_size"] = 24_000.into();
    config
}

#[test]
fn a_full_disk_leaves_the_earlier_model() {
    let Some(disk) = SmallDisk::mount() else { return };
    let target = disk.0.path().join("model");
    save_constant(&target, &config(), 2.0).unwrap();
    let error = save_constant(&target, &larger_config(), 4.0).unwrap_err();
    expect_message(&error, &target.join("model.safetensors"), "No space left");
    assert_eq!(error.exit_code(), 5);
    assert_eq!(constant_of(&target), 2.0);
    assert_eq!(names(disk.0.path()), ["model"]);
    // There is room again.
    save_constant(&target, &config(), 5.0).unwrap();
    assert_eq!(constant_of(&target), 5.0);
}

#[test]
fn a_read_only_disk_leaves_the_earlier_model() {
    let Some(disk) = SmallDisk::mount() else { return };
    let target = disk.0.path().join("model");
    save_constant(&target, &config(), 2.0).unwrap();
    disk.make_read_only();
    let error = save_constant(&target, &config(), 4.0).unwrap_err();
    expect_message(&error, &target, "Read-only file system");
    let error = save_constant(&disk.0.path().join("new/model"), &config(), 4.0).unwrap_err();
    expect_message(&error, &disk.0.path().join("new"), "cannot create");
    assert_eq!(constant_of(&target), 2.0);
}

/// This very test in a process of its own, which finds [`CHILD`] set to `folder`. `before` is shell, run ahead of it.
#[cfg(unix)]
fn child(test: &str, folder: &Path, before: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("{before} exec \"$0\" --exact checkpoint::saving::{test} --nocapture"))
        .arg(std::env::current_exe().unwrap())
        .env(CHILD, folder)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    command
}

#[cfg(unix)]
fn child_folder() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// As the full disk, where nothing can be mounted: files may not grow beyond 64 blocks.
#[test]
#[cfg(unix)]
fn a_file_size_limit_leaves_the_earlier_model() {
    if let Some(folder) = child_folder() {
        let target = folder.join("model");
        let error = save_constant(&target, &larger_config(), 4.0).unwrap_err();
        expect_message(&error, &target.join("model.safetensors"), "File too large");
        return;
    }
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    save_constant(&target, &config(), 2.0).unwrap();
    // Ignored signals stay ignored across exec: the write fails instead of killing the process.
    let output =
        child("a_file_size_limit_leaves_the_earlier_model", parent.path(), "trap '' XFSZ; ulimit -f 64;")
            .output()
            .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
    assert_eq!(constant_of(&target), 2.0);
    assert_eq!(names(parent.path()), ["model"]);
}

#[test]
#[cfg(unix)]
fn a_process_killed_while_saving_leaves_one_whole_model() {
    if let Some(folder) = child_folder() {
        for constant in (2..200).cycle() {
            save_constant(&folder.join("model"), &larger_config(), constant as f32).unwrap();
        }
    }
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    save_constant(&target, &larger_config(), 1.0).unwrap();
    let mut replaced = 0;
    // A few times, and on a busy machine with more time each until the child got to save something.
    for round in 0..200 {
        if round >= 12 && replaced > 0 {
            break;
        }
        let before = constant_of(&target);
        let mut child =
            child("a_process_killed_while_saving_leaves_one_whole_model", parent.path(), "").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(40 + 13 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        replaced += usize::from(constant_of(&target) != before);
    }
    assert!(replaced > 0, "the child never got to save anything");
    save_constant(&target, &config(), 1.0).unwrap();
    assert_eq!(names(parent.path()), ["model"], "leftovers of killed processes");
}

/// The companions of `source` after the templates and end tokens of a training, as files by their names.
fn trained(source: &Folder, templates: Option<&[(&str, &str)]>, ends: &[u32]) -> BTreeMap<String, String> {
    let opened = source.open().unwrap();
    let mut companions = CompanionFiles::read(source.path(), opened.config()).unwrap();
    if let Some(templates) = templates {
        companions.replace_chat_templates(source.path(), &templates.iter().copied().collect()).unwrap();
    }
    companions.stop_at(source.path(), opened.config(), ends).unwrap();
    let target = source.file("out");
    // Twice: the second replaces a folder that has a folder of templates in it.
    for _ in 0..2 {
        save_model(&target, &companions, &opened.config().tensors(), SHARD_BYTES, fill).unwrap();
    }
    let text = |name: &str| (name.to_string(), std::fs::read_to_string(target.join(name)).unwrap());
    companions.iter().map(|(name, _)| text(name)).collect()
}

#[test]
fn named_templates_come_along_and_a_chosen_one_takes_their_place() {
    let source = Folder::sound();
    std::fs::create_dir(source.file("additional_chat_templates")).unwrap();
    source.write("additional_chat_templates/tool_use.jinja", "tools");
    source.write("chat_template.jinja", "default");
    source.write("chat_template.json", "{\"chat_template\": \"legacy\"}");
    source.write(
        "tokenizer_config.json",
        "{\"bos_token\": \"<s>\", \"chat_template\": \"old\", \"legacy\": false}",
    );
    let kept = trained(&source, None, &[]);
    assert_eq!(kept["additional_chat_templates/tool_use.jinja"], "tools");
    assert_eq!(kept["chat_template.jinja"], "default");
    assert!(kept["tokenizer_config.json"].contains("old"));
    let replaced = trained(&source, Some(&[("default", "chosen"), ("rag", "other")]), &[]);
    assert_eq!(replaced["chat_template.jinja"], "chosen");
    assert_eq!(replaced["additional_chat_templates/rag.jinja"], "other");
    assert!(!replaced.contains_key("additional_chat_templates/tool_use.jinja"));
    assert!(!replaced.contains_key("chat_template.json"));
    let config: Value = serde_json::from_str(&replaced["tokenizer_config.json"]).unwrap();
    assert_eq!(config, json!({"bos_token": "<s>", "legacy": false}));
}

#[test]
fn end_tokens_are_added_to_those_of_the_base() {
    let generation = |given: Option<&str>, ends: &[u32]| {
        let source = Folder::sound();
        if let Some(given) = given {
            source.write("generation_config.json", given);
        }
        trained(&source, None, ends).remove("generation_config.json")
    };
    let parsed =
        |text: Option<String>| serde_json::from_str::<Value>(&text.expect("a generation config")).unwrap();
    assert_eq!(generation(None, &[2]), None, "config.json has it already");
    let made = parsed(generation(None, &[5]));
    assert_eq!(made["eos_token_id"], json!([2, 5]));
    assert_eq!(made["_from_model_config"], json!(true));
    let unchanged = "{\"eos_token_id\":[2,5],  \"top_p\": 0.9}";
    assert_eq!(generation(Some(unchanged), &[5]).as_deref(), Some(unchanged));
    let added = parsed(generation(Some("{\"eos_token_id\": 3, \"top_p\": 0.9}"), &[5, 3]));
    assert_eq!(added, json!({"eos_token_id": [3, 5], "top_p": 0.9}));
    let absent = parsed(generation(Some("{\"eos_token_id\": null}"), &[5]));
    assert_eq!(absent, json!({"eos_token_id": [2, 5]}));
}

#[test]
fn a_folder_of_templates_with_something_else_in_it_is_not_replaced() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    save(&target, SHARD_BYTES).unwrap();
    let templates = target.join("additional_chat_templates");
    std::fs::create_dir(&templates).unwrap();
    std::fs::write(templates.join("a.jinja"), "a").unwrap();
    save(&target, SHARD_BYTES).unwrap();
    std::fs::create_dir(&templates).unwrap();
    std::fs::write(templates.join("thesis.tex"), "years of work").unwrap();
    expect_message(&save(&target, SHARD_BYTES).unwrap_err(), &templates, "it would be lost");
}
