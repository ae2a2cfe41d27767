//! What people give for a model folder that is none: each is named for what it is, with what to do.

use std::path::Path;

use mmpo_fast::checkpoint::ModelFolder;

use super::small_model::*;

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n";

/// A folder with these files, of one line each.
fn folder_of(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "{}\n").unwrap();
    }
    folder
}

/// Opening `path` fails with a message that contains `part`, and advice that contains `help`.
#[track_caller]
fn named(path: &Path, part: &str, help: &str) {
    let error = ModelFolder::open(path).expect_err(part);
    let message = error.to_string();
    let advice = miette::Diagnostic::help(&error).map(|help| help.to_string()).unwrap_or_default();
    assert!(message.contains(part), "no {part:?} in: {message}");
    assert!(advice.contains(help), "no {help:?} in: {advice}");
    assert_eq!(error.exit_code(), 4, "{message}");
}

#[test]
fn folders_of_other_kinds_are_named() {
    let cases: [(&[&str], &str, &str); 17] = [
        (&[], "the folder is empty", "config.json, tokenizer.json and model.safetensors"),
        (&["notes.txt"], "not a Hugging Face model folder", "give the folder that holds"),
        (
            &["adapter_config.json", "adapter_model.safetensors"],
            "this is an adapter (PEFT), not a whole model",
            "--adapter",
        ),
        (
            &["smollm2.Q4_1.gguf"],
            "GGUF file of llama.cpp (smollm2.Q4_1.gguf)",
            "gguf_file='smollm2.Q4_1.gguf'",
        ),
        (
            &["params.json", "consolidated.00.pth", "tokenizer.model"],
            "Meta's own format",
            "Hugging Face version",
        ),
        (&["onnx/model.onnx", "tokenizer.json"], "ONNX format (onnx/)", "original model"),
        (&["tf_model.h5"], "TensorFlow's format (tf_model.h5)", "safetensors version"),
        (&["state.json", "state.safetensors"], "a checkpoint of a run", "--resume --output"),
        (&["resolved.toml", "model/config.json"], "the folder of a run", "/model"),
        (
            &["resolved.toml", "checkpoints/step-000001/state.json"],
            "the folder of a run",
            "--resume --output",
        ),
        (
            &["checkpoint-900/config.json", "checkpoint-1000/config.json"],
            "2 folders inside",
            "/checkpoint-1000",
        ),
        (&["global_step500/mp_rank_00_model_states.pt", "latest"], "DeepSpeed checkpoint", "zero_to_fp32.py"),
        (&["pytorch_model_fsdp_0/.metadata"], "PyTorch's FSDP", "accelerate merge-weights"),
        (&[".metadata", "__0_0.distcp"], "PyTorch's FSDP", "accelerate merge-weights"),
        (&["iter_0001000/x", "latest_checkpointed_iteration.txt"], "Megatron", "convert it"),
        (
            &["models--org--name/snapshots/abc/config.json"],
            "the cache of the Hub",
            "models--org--name/snapshots/*",
        ),
        (&["model.safetensors"], "no config.json beside model.safetensors", "copy the model's config.json"),
    ];
    for (files, part, help) in cases {
        named(folder_of(files).path(), part, help);
    }
}

#[test]
fn folders_with_a_config_and_other_weights_are_named() {
    let cases: [(&[&str], &str, &str); 9] = [
        (&[], "neither model.safetensors nor model.safetensors.index.json", "download the model's weights"),
        (&["pytorch_model.bin"], "the weights are in pytorch_model.bin", "save_pretrained('NEW')"),
        (&["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin", "save_pretrained('NEW')"),
        (&["adapter_config.json"], "this is an adapter (PEFT), not a whole model", "--adapter"),
        (&["model.gguf"], "GGUF file", "gguf_file='model.gguf'"),
        (&["model.onnx"], "ONNX format (model.onnx)", "original model"),
        (&["model-00001-of-00002.safetensors"], "no model.safetensors.index.json", "index of the shards"),
        (&["weights.safetensors"], "there is weights.safetensors, but no model.safetensors", "rename it"),
        (&["global_step7/x", "zero_to_fp32.py"], "DeepSpeed checkpoint", "zero_to_fp32.py"),
    ];
    for (files, part, help) in cases {
        let folder = folder_of(files);
        std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
        named(folder.path(), part, help);
    }
}

#[test]
fn a_whole_model_beside_an_adapter_is_read() {
    let folder = Folder::sound();
    folder.write("adapter_config.json", r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base"}"#);
    folder.open().unwrap();
    std::fs::remove_file(folder.file("model.safetensors")).unwrap();
    named(folder.path(), "an adapter (LORA) of the model \"org/base\"", "--adapter");
}

#[test]
fn git_lfs_pointers_are_named() {
    for name in ["config.json", "model.safetensors", "generation_config.json"] {
        let folder = Folder::sound();
        folder.write(name, POINTER);
        folder.refused(name, "this is a git-lfs pointer");
        named(folder.path(), name, "git lfs pull");
    }
    let tensors = tensors(&config(), safetensors::tensor::Dtype::BF16);
    for name in ["model.safetensors.index.json", &shard_name(1)] {
        let folder = Folder::sharded(&config(), &tensors);
        folder.write(name, POINTER);
        folder.refused(name, "this is a git-lfs pointer");
    }
    let folder = folder_of(&[]);
    std::fs::write(folder.path().join("config.json"), config().to_string()).unwrap();
    std::fs::write(folder.path().join("pytorch_model.bin"), POINTER).unwrap();
    named(folder.path(), "pytorch_model.bin, which is a git-lfs pointer", "git lfs pull");
}

#[test]
fn weights_that_are_another_kind_of_file_are_named() {
    let folder = Folder::sound();
    for (content, part) in [
        (&b"<!DOCTYPE html><html><title>404</title></html>"[..], "a web page"),
        (b"PK\x03\x04archive/data.pkl", "a ZIP archive"),
        (b"\x80\x02}q\x00X\x05\x00", "a Python pickle"),
        (b"GGUF\x03\x00\x00\x00\x11\x01", "a GGUF file"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "a gzip file"),
    ] {
        folder.write("model.safetensors", content);
        folder.refused("model.safetensors", part);
    }
}

#[test]
fn files_and_names_of_the_hub_are_no_folders() {
    let folder = Folder::sound();
    named(&folder.file("model.safetensors"), "this is a file", folder.path().to_str().unwrap());
    named(&folder.file("config.json"), "this is a file", folder.path().to_str().unwrap());
    let lone = folder_of(&["a.gguf", "b.bin"]);
    named(&lone.path().join("a.gguf"), "this is a GGUF file", "gguf_file='a.gguf'");
    std::fs::write(lone.path().join("b.bin"), b"PK\x03\x04").unwrap();
    named(&lone.path().join("b.bin"), "this is a ZIP archive", "give the folder");
    std::fs::write(lone.path().join("b.bin"), b"GGUF\x03\x00\x00\x00").unwrap();
    named(&lone.path().join("b.bin"), "this is a GGUF file", "gguf_file='b.bin'");
    let hub = "a model on the Hub is fetched into the cache with `hf download HuggingFaceTB/SmolLM2-135M`";
    for name in [
        "HuggingFaceTB/SmolLM2-135M",
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "hf://HuggingFaceTB/SmolLM2-135M/",
    ] {
        named(Path::new(name), "nothing is downloaded", hub);
    }
    for name in ["absent", "../absent", "/absent/model", "a/b/c"] {
        assert_eq!(ModelFolder::open(Path::new(name)).unwrap_err().exit_code(), 5, "{name}");
    }
}

/// The cache of the Hub: blobs, and snapshots whose files are links to them.
#[cfg(unix)]
#[test]
fn the_cache_of_the_hub_is_read_by_its_snapshots() {
    let source = Folder::sound();
    let cache = tempfile::tempdir().unwrap();
    let root = cache.path().join("models--org--small-llama");
    let snapshot = root.join("snapshots/0123abcd");
    std::fs::create_dir_all(root.join("blobs")).unwrap();
    std::fs::create_dir_all(root.join("refs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(root.join("snapshots/ffff")).unwrap();
    std::fs::write(root.join("refs/main"), "0123abcd").unwrap();
    for (blob, name) in [("b1", "config.json"), ("b2", "model.safetensors")] {
        std::fs::copy(source.file(name), root.join("blobs").join(blob)).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    ModelFolder::open(&snapshot).unwrap();
    named(&root, "the Hub's cache of org/small-llama", snapshot.to_str().unwrap());
    std::fs::remove_file(root.join("blobs/b2")).unwrap();
    named(&snapshot, "a link to ../../blobs/b2, which is not there", "download the model again");
    std::fs::remove_file(root.join("blobs/b1")).unwrap();
    named(&snapshot, "a link to ../../blobs/b1, which is not there", "download the model again");
    named(&root, "without a complete snapshot", "hf download org/small-llama");
}
