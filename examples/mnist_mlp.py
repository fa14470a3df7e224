"""A Keras network 784-128-10 for digits, the whole way: 8 bits as .tflite; pruned, shared and coded; evaluated."""

import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # no TensorFlow needed

import keras
import numpy as np
import torch
from pictures import arguments, load

import fewbit
from fewbit.deploy import runner


def trained(x: np.ndarray, y: np.ndarray, epochs: int) -> keras.Model:
    """Dense layers with logits at the end; 784 inputs for MNIST."""
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            keras.layers.Dense(128, activation="relu", name="hidden"),
            keras.layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=64, epochs=epochs, verbose=0)
    return model


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    options = arguments(__doc__ or "", argv)
    keras.utils.set_random_seed(0)
    train, test = load("mnist", options.data)
    (x, y), (test_x, test_y) = ((i.reshape(len(i), -1).astype(np.float32) / 255, n) for i, n in (train, test))
    limit = 1000 if options.quick else len(x)
    model = trained(x[:limit], y[:limit], epochs=2 if options.quick else 5)
    loss, accuracy = model.evaluate(test_x, test_y, batch_size=500, verbose=0)

    quantized = fewbit.quantize(model, x[:1000], weights="int8", activations="int8", target="litert")
    artifact = fewbit.export(quantized, options.output / "mnist.int8.tflite", io="int8")

    # Five of six weights leave, the others share sixteen values a layer; the file holds gaps and codes.
    compressed = fewbit.compress(model, (x[:limit], y[:limit]), recipe=Path(__file__).with_suffix(".toml"))
    coded = fewbit.save(compressed, options.output / "mnist.fewbit")
    size, floats = coded.stat().st_size, 4 * model.count_params()

    def figures(answer: torch.Tensor) -> tuple[float, float]:
        labels = torch.from_numpy(test_y)
        right = (answer.argmax(1) == labels).double().mean()
        return float(torch.nn.functional.cross_entropy(answer, labels)), float(right)

    inputs = torch.from_numpy(test_x)
    with torch.no_grad():
        rows = {
            "Keras, float": (loss, accuracy),
            "fewbit, 8 bits": figures(quantized(inputs)),
            "the .tflite file": figures(runner(artifact.path)(inputs)),
            "the .fewbit file": figures(fewbit.load(coded)(inputs)),
        }
    print(artifact)
    for name, (its_loss, its_accuracy) in rows.items():
        print(f"{name:<17} loss {its_loss:.4f}   accuracy {100 * its_accuracy:.2f} %")
    print(
        f"{coded.name}: {size:,} bytes, {floats / size:.1f} times smaller than the {floats:,} of its float weights"
    )
    lost = 100 * (accuracy - rows["the .tflite file"][1])
    lost_coded = 100 * (accuracy - rows["the .fewbit file"][1])
    print(
        f"lost by 8 bits: {lost:.2f}, by pruning and sharing: {lost_coded:.2f} points ({len(test_y)} pictures)"
    )
    assert lost <= 0.3, "8 bits should cost at most 0.3 points"
    assert options.quick or lost_coded <= 0.3, "and so should what comes after"
    return {"lost": lost, "bytes": artifact.size, "lost_coded": lost_coded, "times": floats / size}


if __name__ == "__main__":
    main()
