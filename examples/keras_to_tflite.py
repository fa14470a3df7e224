"""A Keras .h5 model becomes a .tflite that computes on 8-bit integers throughout, and another with float16 weights.

python examples/keras_to_tflite.py --model resnet8.h5      # or without a model: it trains a small one
"""

import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # no TensorFlow needed

import keras
import numpy as np
from pictures import arguments, load

import fewbit


def trained(path: Path, images: np.ndarray, labels: np.ndarray, epochs: int) -> Path:
    """A small network for pictures of 0 to 255, in the .h5 format."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(images.shape[1:]),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.SeparableConv2D(32, 3, strides=2, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)
    model.save(path)
    return path


def main(argv: Sequence[str] | None = None) -> dict[str, int]:
    options = arguments(
        __doc__ or "", argv, model={"type": Path, "help": ".h5 or .keras for 32x32x3 pictures"}
    )
    (images, labels), (test_images, test_labels) = load("cifar10", options.data)
    images = images.astype(np.float32)
    limit = 500 if options.quick else 10000
    path = options.model or trained(
        options.output / "small.h5", images[:limit], labels[:limit], 1 if options.quick else 5
    )

    # ---- full int8, in three lines ----
    model = fewbit.load(path)
    quantized = fewbit.quantize(model, images[:500], target="litert")
    full = fewbit.export(quantized, options.output / "model.int8.tflite", io="int8")

    # ---- float16 weights ----
    half = fewbit.export(
        fewbit.quantize(model, recipe="float16", target="litert"), options.output / "model.float16.tflite"
    )

    floating = fewbit.export(model, options.output / "model.tflite")
    print(full)
    test = test_images[: limit // 4].astype(np.float32), test_labels[: limit // 4]
    print(
        fewbit.benchmark(
            [floating.path, half.path, full.path],
            test,
            metrics=["accuracy"],
            rounds=5 if options.quick else 30,
        )
    )
    return {"float": floating.size, "float16": half.size, "int8": full.size}


if __name__ == "__main__":
    main()
