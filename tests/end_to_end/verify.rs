//! `mmpo-fast verify`: damage is found and named, whatever the folder, and what cannot be known is said.

use serde_json::Value;

use crate::harness::{TRAIN, Workplace};

const DAMAGED: i32 = 8;

impl Workplace {
    /// The account of a folder as JSON, and the exit code.
    fn account(&self, folder: &str) -> (Value, Option<i32>) {
        let finished = self.run(&format!("verify {folder} --json"));
        let account = serde_json::from_str(&finished.stdout);
        (account.unwrap_or_else(|error| panic!("{error}: {}", finished.stderr)), finished.code)
    }

    /// The status of one file of a folder.
    fn status(&self, folder: &str, file: &str) -> String {
        let (account, _) = self.account(folder);
        let files = account["files"].as_array().unwrap();
        let found = files.iter().find(|found| found["path"] == file);
        found.unwrap_or_else(|| panic!("no {file} in {account}"))["status"].as_str().unwrap().to_string()
    }

    /// Verifying `folder` finds nothing wrong, then `file` damaged once `damage` is done to it, then nothing again.
    #[track_caller]
    fn finds(&self, folder: &str, file: &str, damage: impl Fn(&mut Vec<u8>), parts: &[&str]) {
        let path = format!("{folder}/{file}");
        let whole = self.read(&path);
        self.succeed(&format!("verify {folder}"));
        let mut bytes = whole.clone();
        damage(&mut bytes);
        self.write(&path, bytes);
        let finished = self.run(&format!("verify {folder}"));
        assert_eq!(finished.code, Some(DAMAGED), "{path}: {}", finished.stdout);
        for part in parts.iter().chain(&[file]) {
            assert!(finished.stdout.contains(part), "{path}: no {part:?} in {}", finished.stdout);
        }
        assert!(finished.stderr.contains(file), "{path}: {}", finished.stderr);
        assert!(finished.stderr.contains("help: "), "{}", finished.stderr);
        self.write(&path, whole);
    }
}

#[expect(clippy::ptr_arg, reason = "of the same type as damage that changes the length")]
fn flip(bytes: &mut Vec<u8>) {
    let at = bytes.len() - 2;
    bytes[at] ^= 1;
}

fn cut(bytes: &mut Vec<u8>) {
    bytes.truncate(bytes.len() - 3);
}

#[test]
fn a_run_is_compared_with_its_checksums() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 2 --save-steps 1 --output run"));
    let text = work.succeed("verify run").stdout;
    assert!(text.contains("matches    checkpoints/step-000001/state.safetensors\n"), "{text}");
    assert!(text.contains("matches    model/model.safetensors\n"), "{text}");
    assert!(text.contains("matches    metrics.jsonl\n") && text.contains("unchecked  report.html"), "{text}");
    for file in ["model/model.safetensors", "model/config.json", "metrics.jsonl", "resolved.toml"] {
        work.finds("run", file, flip, &["ALTERED"]);
    }
    for file in ["state.safetensors", "state.json"] {
        let file = format!("checkpoints/step-000002/{file}");
        work.finds("run", &file, flip, &["ALTERED"]);
        work.finds("run", &file, cut, &["ALTERED"]);
    }
    work.finds(
        "run",
        "model/model.safetensors",
        cut,
        &["ALTERED", "its checksum differs, and it is truncated"],
    );
    work.finds("run", "checkpoints/step-000001/B3SUMS", |sums| sums[3] = b'z', &["DAMAGED"]);
    // One of the folders by itself.
    work.finds("run/model", "model.safetensors", flip, &["ALTERED", "the checksums are those of the run"]);
    work.finds("run/checkpoints/step-000002", "state.safetensors", flip, &["ALTERED"]);
    // What is gone.
    for file in
        ["model/tokenizer.json", "checkpoints/step-000002/state.json", "checkpoints/step-000001/B3SUMS"]
    {
        let bytes = work.read(&format!("run/{file}"));
        std::fs::remove_file(work.path(&format!("run/{file}"))).unwrap();
        assert_eq!(work.status("run", file), "missing");
        assert_eq!(work.account("run").1, Some(DAMAGED));
        work.write(&format!("run/{file}"), bytes);
    }
    // What a link leads to is not looked at: it may be another run, or a folder that holds this one.
    std::os::unix::fs::symlink(work.path("run"), work.path("run/model/around")).unwrap();
    let text = work.succeed("verify run").stdout;
    assert!(text.contains("note       folder model/around is left out\n"), "{text}");
    assert!(!text.contains("around/"), "{text}");
    std::fs::remove_file(work.path("run/model/around")).unwrap();
    // The checksums of the whole run may be gone too.
    let sums = work.read("run/B3SUMS");
    std::fs::remove_file(work.path("run/B3SUMS")).unwrap();
    let text = work.succeed("verify run").stdout;
    assert!(text.contains("note       there is no B3SUMS, which a run writes at its end"), "{text}");
    work.write("run/B3SUMS", sums);
    // What is half written is left out too.
    for name in ["run/checkpoints/step-000003.partial-1/state.json", "run/model/model.safetensors.partial-2"]
    {
        std::fs::create_dir_all(work.path(name).parent().unwrap()).unwrap();
        work.write(name, "{");
    }
    let text = work.succeed("verify run").stdout;
    for name in ["checkpoints/step-000003.partial-1", "model/model.safetensors.partial-2"] {
        let note = format!("note       {name} is left out: a process that was killed left it half written");
        assert!(text.contains(&note), "no {note:?} in {text}");
        assert_eq!(text.matches(name).count(), 1, "{text}");
    }
    let (account, code) = work.account("run");
    assert_eq!(
        (account["is_damaged"].as_bool(), account["kind"].as_str(), code),
        (Some(false), Some("run"), Some(0))
    );
}

/// A folder of a run's checkpoints is known by its name where both of its files are gone.
#[test]
fn an_emptied_checkpoint_is_missing_its_files() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 1 --output run"));
    let checkpoint = "run/checkpoints/step-000001";
    for file in ["state.json", "state.safetensors"] {
        std::fs::remove_file(work.path(&format!("{checkpoint}/{file}"))).unwrap();
    }
    let (account, code) = work.account(checkpoint);
    assert_eq!((account["kind"].as_str(), code), (Some("checkpoint"), Some(DAMAGED)), "{account}");
    assert_eq!(work.status(checkpoint, "state.json"), "missing");
    std::fs::remove_file(work.path(&format!("{checkpoint}/B3SUMS"))).unwrap();
    assert_eq!(work.status(checkpoint, "B3SUMS"), "missing");
}

#[test]
fn an_adapter_has_the_checksums_of_its_run() {
    let work = Workplace::new();
    work.succeed(&format!("{TRAIN} --max-steps 1 --lora q,v --lora-rank 4 --output run"));
    work.finds("run", "adapter/adapter_model.safetensors", flip, &["ALTERED"]);
    work.finds("run/adapter", "adapter_config.json", flip, &["ALTERED"]);
    // Moved away from its run it has none, and its structure is all that can be told.
    std::fs::rename(work.path("run/adapter"), work.path("moved")).unwrap();
    assert_eq!(work.status("moved", "adapter_model.safetensors"), "sound");
    assert_eq!(work.status("run", "adapter/adapter_model.safetensors"), "missing");
}

#[test]
fn a_folder_from_elsewhere_is_checked_in_its_structure() {
    let work = Workplace::new();
    let text = work.succeed("verify base").stdout;
    assert!(text.contains("sound      model.safetensors: the header's"), "{text}");
    assert!(text.contains("have no checksum and are sound in structure"), "{text}");
    work.finds("base", "model.safetensors", cut, &["DAMAGED", "truncated or damaged"]);
    work.finds("base", "model.safetensors", |bytes| bytes[9] = 0xff, &["DAMAGED", "damaged header"]);
    work.finds("base", "config.json", cut, &["DAMAGED", "not JSON"]);
    // A flipped value cannot be found without a checksum: the account says that there is none.
    let mut bytes = work.read("base/model.safetensors");
    flip(&mut bytes);
    work.write("base/model.safetensors", bytes);
    assert_eq!(work.status("base", "model.safetensors"), "sound");
    // A download that broke off before the weights.
    std::fs::remove_file(work.path("base/model.safetensors")).unwrap();
    assert_eq!(work.status("base", "model.safetensors"), "missing");
    let finished = work.run("verify base");
    assert_eq!(finished.code, Some(DAMAGED), "{}", finished.stdout);
    assert!(finished.stdout.contains("MISSING    model.safetensors: no weights"), "{}", finished.stdout);
    assert!(finished.stderr.contains("model.safetensors is missing"), "{}", finished.stderr);
}

#[test]
fn an_index_is_compared_with_its_shards() {
    let work = Workplace::new();
    let shard = "model-00001-of-00001.safetensors";
    std::fs::rename(work.path("base/model.safetensors"), work.path(&format!("base/{shard}"))).unwrap();
    let file = mmpo_fast::checkpoint::TensorFile::open(&work.path(&format!("base/{shard}"))).unwrap();
    let places = file.tensors().map(|(name, _)| (name.to_string(), Value::from(shard)));
    let index = serde_json::json!({ "weight_map": places.collect::<serde_json::Map<_, _>>() });
    let write = |index: &Value| work.write("base/model.safetensors.index.json", index.to_string());
    write(&index);
    work.succeed("verify base");
    let mut more = index.clone();
    more["weight_map"]["lost.weight"] = shard.into();
    let mut missing = index.clone();
    missing["weight_map"]["lost.weight"] = "model-00002-of-00001.safetensors".into();
    let mut fewer = index.clone();
    fewer["weight_map"].as_object_mut().unwrap().shift_remove("model.norm.weight");
    let mut outside = index.clone();
    outside["weight_map"]["lost.weight"] = "../base.safetensors".into();
    for (index, part) in [
        (more, "the index has tensor `lost.weight` in this shard, and it is not there"),
        (missing, "MISSING    model-00002-of-00001.safetensors"),
        (fewer, "holds tensor `model.norm.weight`, which the index has not in this shard"),
        (outside, "the index names a shard outside the folder"),
    ] {
        write(&index);
        let finished = work.run("verify base");
        assert_eq!(finished.code, Some(DAMAGED), "{}", finished.stdout);
        assert!(finished.stdout.contains(part), "no {part:?} in {}", finished.stdout);
    }
    // A shard that is looked at after the index, and is sound by itself: what the index says of it stays.
    std::fs::rename(work.path(&format!("base/{shard}")), work.path("base/weights.safetensors")).unwrap();
    let moved = index.to_string().replace(shard, "weights.safetensors");
    work.write("base/model.safetensors.index.json", &moved);
    work.succeed("verify base");
    let lost =
        moved.replacen("{\"weight_map\":{", "{\"weight_map\":{\"lost.weight\":\"weights.safetensors\",", 1);
    assert_ne!(lost, moved);
    work.write("base/model.safetensors.index.json", &lost);
    assert_eq!(work.status("base", "weights.safetensors"), "damaged");
}

#[test]
fn what_is_no_run_and_no_model_is_refused() {
    let work = Workplace::new();
    std::fs::create_dir(work.path("empty")).unwrap();
    work.refuse("verify empty", 4, &["there is no run, model or adapter here"]);
    work.refuse("verify absent", 5, &["cannot read absent"]);
    work.refuse("verify pairs.jsonl", 4, &["this is a file; whole folders are verified"]);
    // Checksums of somebody else's, which name a file outside the folder.
    let sums = format!("{}  ../pairs.jsonl\n", blake3::hash(&work.read("pairs.jsonl")).to_hex());
    work.write("empty/B3SUMS", sums);
    let finished = work.run("verify empty");
    assert_eq!(finished.code, Some(DAMAGED), "{}", finished.stderr);
    assert!(finished.stdout.contains("names no file of its folder"), "{}", finished.stdout);
}
