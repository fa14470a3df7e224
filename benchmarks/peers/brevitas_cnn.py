"""Brevitas: layerwise post-training quantization of a CNN to few bits, GPTQ or learned rounding, bias correction."""

import contextlib
import sys
from argparse import Namespace
from typing import Any

import harness

ITERATIONS = 1000  # Brevitas' own default for each layer


def quantize(request: harness.Request) -> harness.Answer:
    """MSE scales, per channel and asymmetric for weights; the calls and their order are those of Brevitas' script.

    Options: "gptq" (act order), "learned" (AdaRound, layer by layer), "equalize" (across layers).
    """
    import torch
    from brevitas.export.inference import quant_inference_mode
    from brevitas_examples.imagenet_classification.ptq import ptq_common

    torch.manual_seed(request.seed)
    model = _inserted(_prepared(request.module(), "equalize" in request.options), *request.bits)
    loader = [(torch.from_numpy(batch), None) for batch in harness.batches(request.calibration)]
    with torch.no_grad():
        model(loader[0][0])
    ptq_common.calibrate(loader, model)
    if "gptq" in request.options:
        ptq_common.apply_gptq(loader, model, act_order=True, use_quant_activations=True)
    if "learned" in request.options:
        _learned(model, loader, request.iterations or ITERATIONS)
    ptq_common.apply_bias_correction(loader, model)
    with torch.no_grad(), quant_inference_mode(model):
        model(loader[0][0])
        outputs = harness.run_module(model, request.inputs)
    return harness.Answer(None, "its simulation", outputs)


def _prepared(module: Any, equalize: bool) -> Any:
    """Batch norms merged, layers equalized: preprocess_for_quantize without what fails on F.avg_pool2d."""
    from brevitas.fx.brevitas_tracer import symbolic_trace
    from brevitas.graph.equalize import EqualizeGraph
    from brevitas.graph.fixed_point import MergeBatchNorm

    model = MergeBatchNorm().apply(symbolic_trace(module))
    return EqualizeGraph(iterations=20).apply(model) if equalize else model


def _inserted(model: Any, weight_bits: int, activation_bits: int) -> Any:
    """The model with quantizers at the inputs and weights of its layers, 8 bits at the first and the last."""
    import torch
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    ends = [layers[0], layers[-1]]
    for bits, left_out in (((weight_bits, activation_bits), ends), ((8, 8), layers[1:-1])):
        maps = create_quant_maps(
            dtype=torch.float32, bias_bit_width=32, weight_bit_width=bits[0], weight_param_method="mse",
            weight_scale_type="float_scale", weight_quant_type="asym", weight_quant_granularity="per_channel",
            weight_narrow_range=False, weight_quant_format="int", act_quant_format="int", act_bit_width=bits[1],
            act_scale_type="float_scale", act_scale_computation_type="static", act_param_method="mse",
            act_quant_type="asym", act_quant_granularity="per_tensor", act_quant_percentile=99.999,
        )  # fmt: skip
        model = layerwise_quantize(model, compute_layer_map=maps[1], name_blacklist=left_out)
    return model


def _learned(model: Any, loader: list[Any], iterations: int) -> None:
    """AdaRound as in Brevitas' script, with batches of 32 and a learning rate that gets there in `iterations`."""
    from brevitas_examples.common.learned_round.learned_round_trainer import LearnedRoundTrainer, get_blocks
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as own

    config = own.parse_args_to_dataclass(
        Namespace(
            learned_round="hard_sigmoid", learned_round_loss="regularised_mse", learned_round_iters=iterations,
            learned_round_lr=1e-2, learned_round_lr_scheduler=None, learned_round_batch_size=32,
        )
    )  # fmt: skip
    config.training_args.use_amp = False  # half precision is for a GPU
    config.training_args.losses_args[0].kwargs = {"max_count": iterations}
    LearnedRoundTrainer(config=config).train(
        model=model, model_forward=own.vision_forward, block_forward=own.vision_block_forward,
        data_loader=loader, cache=own.CacheVision(), keep_gpu=True,
        get_blocks_fn=lambda m: get_blocks(m, own.is_layer),
    )  # fmt: skip


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints one line, Brevitas many
        harness.serve(quantize, ["brevitas", "torch"])
