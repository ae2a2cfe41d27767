"""tests/goldens/states.safetensors: what bitsandbytes makes of the same numbers.

Its maps, a block-wise quantisation with each, and a few updates of AdamW8bit beside the same updates in f64. bitsandbytes
is not in requirements.txt, as nothing else here needs it:

    pip install --no-deps bitsandbytes==0.50.2
    python tests/reference/make_state_goldens.py
"""

from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

# Seventeen blocks of 256, and bitsandbytes keeps f32 states below 4096 values.
VALUES = 17 * 256
# The quantised vector ends within a block.
QUANTIZED = 5 * 256 - 77
UPDATES = 3
SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def spread(generator, count):
    """Normal numbers over four orders of magnitude, as the gradients of one matrix have them."""
    scale = 10.0 ** (-4.0 * torch.rand(count, generator=generator))
    return torch.randn(count, generator=generator) * scale


def quantized(values, is_signed):
    code = functional.create_dynamic_map(signed=is_signed)
    codes, state = functional.quantize_blockwise(values, code=code, blocksize=256)
    return codes, state.absmax


def updated(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.to(parameter.dtype).clone()
        optimizer.step()
    return optimizer.state[parameter]


def main():
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "map_signed": functional.create_dynamic_map(signed=True),
        "map_unsigned": functional.create_dynamic_map(signed=False),
    }
    values = spread(generator, QUANTIZED)
    # A block whose values are all 0.
    values[256:512] = 0.0
    tensors["values"] = values
    tensors["codes_signed"], tensors["scales_signed"] = quantized(values, True)
    tensors["codes_unsigned"], tensors["scales_unsigned"] = quantized(values.abs(), False)

    weight = torch.randn(VALUES, generator=generator) * 0.05
    gradients = [spread(generator, VALUES) for _ in range(UPDATES)]
    tensors["weight"] = weight
    tensors["gradients"] = torch.stack(gradients)
    parameter = torch.nn.Parameter(weight.clone())
    state = updated(bitsandbytes.optim.AdamW8bit([parameter], **SETTINGS), parameter, gradients)
    tensors["weight_8bit"] = parameter.detach().clone()
    tensors["first_codes"], tensors["second_codes"] = state["state1"], state["state2"]
    tensors["first_scales"], tensors["second_scales"] = state["absmax1"], state["absmax2"]

    exact = torch.nn.Parameter(weight.double())
    state = updated(torch.optim.AdamW([exact], **SETTINGS), exact, gradients)
    tensors["weight_exact"] = exact.detach().float()
    tensors["first_exact"], tensors["second_exact"] = state["exp_avg"].float(), state["exp_avg_sq"].float()

    path = Path(__file__).parents[1] / "goldens/states.safetensors"
    made_by = {"made by": f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}"}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=made_by)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
