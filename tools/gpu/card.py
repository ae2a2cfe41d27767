"""What the driver says of the GPU. Nothing else in these scripts knows how large or how fast one is."""

import ctypes
import subprocess

# Numbers of CUdevice_attribute.
CLOCK_KHZ, MULTIPROCESSORS, MEMORY_CLOCK_KHZ, BUS_BITS, L2_BYTES, MAJOR, MINOR = 13, 16, 36, 37, 38, 75, 76


def gpus(library="libcuda.so.1"):
    """How many there are; none without a driver."""
    try:
        cuda, count = ctypes.CDLL(library), ctypes.c_int()
        return count.value if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0
    except (OSError, AttributeError):
        return 0


def describe(library="libcuda.so.1"):
    """One line, for people and for the summary."""
    try:
        cuda = ctypes.CDLL(library)
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(100), ctypes.c_size_t()
        for code in (
            cuda.cuInit(0),
            cuda.cuDeviceGet(ctypes.byref(device), 0),
            cuda.cuDeviceGetName(name, len(name), device),
            cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        ):
            if code != 0:
                return f"the driver answers with error {code}"

        def attribute(number):
            value = ctypes.c_int()
            cuda.cuDeviceGetAttribute(ctypes.byref(value), number, device)
            return value.value

        return (
            f"{name.value.decode()}; {attribute(MULTIPROCESSORS)} multiprocessors; compute capability {attribute(MAJOR)}.{attribute(MINOR)}; "
            f"{memory.value / 2**30:.0f} GiB; {attribute(L2_BYTES) / 2**20:.0f} MiB of L2; {attribute(CLOCK_KHZ) / 1e3:.0f} MHz; "
            f"memory {attribute(MEMORY_CLOCK_KHZ) / 1e3:.0f} MHz of {attribute(BUS_BITS)} bits"
        )
    except (OSError, AttributeError) as error:
        return f"no driver ({error})"


def clocks():
    """What it does at the moment."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi does not say"
