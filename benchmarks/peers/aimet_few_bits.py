"""AIMET's simulation of an ONNX model at few bits, with SeqMSE or AdaRound; accuracy is that of its own session."""

import harness
import numpy as np

BATCH = 32
ITERATIONS = 10_000  # AIMET's own default for each layer


def quantize(request: harness.Request) -> harness.Answer:
    """Weights per channel, symmetric; activations asymmetric with the tf_enhanced (SQNR) range search.

    Options: "seqmse" (scales searched for each layer's output error), "adaround" (after SeqMSE).
    """
    import aimet_onnx
    import onnx
    from aimet_onnx.common.defs import QuantScheme

    np.random.seed(request.seed)
    model = onnx.load(str(request.float_onnx))
    weights = {i.name for i in model.graph.initializer}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    ends = {name for n in (layers[0], layers[-1]) for name in n.input[:2]} | set(layers[-1].output)
    sim = aimet_onnx.QuantizationSimModel(
        model, param_type="int8", activation_type="int8", quant_scheme="min_max"
    )
    for name, quantizer in sim.qc_quantize_op_dict.items():
        if name not in weights:  # those of weights are min-max before SeqMSE, which asks for it
            quantizer.set_quant_scheme(QuantScheme.post_training_tf_enhanced)
        if name not in ends and quantizer.bitwidth == 8:  # biases have 32 bits
            quantizer.set_bitwidth(request.bits[0] if name in weights else request.bits[1])
    data = [{"input": batch} for batch in harness.batches(request.calibration, BATCH)]
    if request.options & {"seqmse", "adaround"}:
        aimet_onnx.apply_seq_mse(sim, data)
    if "adaround" in request.options:
        aimet_onnx.apply_adaround(sim, data, num_iterations=request.iterations or ITERATIONS)
    sim.compute_encodings(data)
    outputs = [sim.session.run(None, {"input": b})[0] for b in harness.batches(request.inputs)]
    return harness.Answer(None, "its simulation", np.concatenate(outputs))


if __name__ == "__main__":
    harness.serve(quantize, ["aimet-onnx", "onnxruntime"])
