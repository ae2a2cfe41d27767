"""Makes PyTorch's CUDA wheel load on a machine without its CUDA libraries.

PyPI's Linux wheel of torch links cuBLAS, cuDNN, NCCL and others (3 GB of downloads) and refuses to be imported
without them, although a run on the CPU calls none of their functions. This script puts a tiny shared library in the
place of each: the symbols that torch asks for, each a function that returns an error code. libcudart alone is the
real one (nvidia-cuda-runtime), because it is called while torch is being loaded.

Needs `cc` and binutils. Usage: python cuda_stubs.py
"""

import importlib.util
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

# Loaded on the first CUDA call alone, so never here.
LOADED_LATE = {"libtorch_cuda_linalg.so", "libcaffe2_nvrtc.so"}
CUDA_LIBRARY = re.compile(r"lib(cu|nccl|nv)\w*\.so\.\d+")
CUDA_SYMBOL = re.compile(r"(cu|nccl|nv)\w+")
REAL = {"libcudart.so.13"}
# Any value but 0 is an error to every one of these libraries.
BODY = "int %s(void) { return 999; }\n"


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed_libraries(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library)))


def undefined_symbols(library):
    """`(name, version or None)` of each symbol that `library` takes from another one."""
    for line in output("nm", "-D", "--undefined-only", str(library)).splitlines():
        name, _, version = line.split()[-1].partition("@")
        yield name, version or None


def build_stub(folder, soname, versions):
    """`versions`: symbol version (None: unversioned) -> names."""
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stub.c"), Path(scratch, "stub.map")
        source.write_text("".join(BODY % name for names in versions.values() for name in sorted(names)))
        nodes = [
            f"{version} {{ global: {' '.join(name + ';' for name in sorted(names))} }};\n"
            for version, names in versions.items()
            if version is not None
        ]
        script.write_text("".join(nodes))
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
        if nodes:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, str(source)], check=True)


def main():
    # find_spec does not import torch, which would fail as yet.
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    libraries = [path for path in folder.glob("lib*.so") if path.name not in LOADED_LATE]
    sonames = sorted({name for path in libraries for name in needed_libraries(path) if CUDA_LIBRARY.fullmatch(name)} - REAL)
    if not sonames:
        print("this torch links no CUDA library: nothing to do")
        return
    own = {
        line.split()[-1].partition("@")[0]
        for path in libraries
        for line in output("nm", "-D", "--defined-only", str(path)).splitlines()
    }
    stubs = {soname: defaultdict(set) for soname in sonames}
    for path in libraries:
        for name, version in undefined_symbols(path):
            if version in stubs:
                stubs[version][version].add(name)
            elif version == "NVSHMEM":
                stubs["libnvshmem_host.so.3"][version].add(name)
            elif version is None and CUDA_SYMBOL.fullmatch(name) and name not in own:
                # The loader looks through all libraries, so one place serves for the unversioned names of all.
                stubs["libnccl.so.2"][None].add(name)
    for soname, versions in stubs.items():
        build_stub(folder, soname, versions)
    print(f"{len(stubs)} stand-ins for CUDA libraries in {folder}")


if __name__ == "__main__":
    main()
