"""NNCF's post-training quantization of a torch module at W4A4 or W4A8; it has no rounding that learns."""

import os

import harness


def quantize(request: harness.Request) -> harness.Answer:
    """Min-max and bias correction for its NPU target, the only one that admits 4 bits, and those alone.

    Bits are one choice for all layers: the first, the last and the pooling stay float.
    """
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")  # it compiles an extension when it runs first
    import nncf
    import torch
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        OverflowFix,
        QuantizationParameters,
    )

    torch.manual_seed(request.seed)
    module = request.module()
    layers = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    weights, activations = (QuantizationParameters(num_bits=bits) for bits in request.bits)
    pieces = [torch.from_numpy(batch) for batch in harness.batches(request.calibration)]
    quantized = nncf.quantize(
        module,
        nncf.Dataset(pieces),
        subset_size=len(pieces),
        target_device=nncf.TargetDevice.NPU,
        ignored_scope=nncf.IgnoredScope(
            patterns=[f"{layers[0]}/.*", f"{layers[-1]}/.*", ".*/avg_pool2d/.*"], validate=False
        ),
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE,
            weights_quantization_params=weights,
            activations_quantization_params=activations,
        ),
    )
    outputs = harness.run_module(quantized, request.inputs)
    return harness.Answer(None, "its simulation", outputs, notes=["first and last layer float"])


if __name__ == "__main__":
    harness.serve(quantize, ["nncf", "torch"])
