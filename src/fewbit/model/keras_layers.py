"""Which Keras layer is built by what, as one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit.model import keras_attention as attention
from fewbit.model import keras_convolutions as convolutions
from fewbit.model import keras_functions as functions
from fewbit.model import keras_merging as merging
from fewbit.model import keras_normalizations as normalizations
from fewbit.model import keras_recurrent as recurrent
from fewbit.model import keras_shapes as shapes

Rule = Callable[..., Any]

NOTHING = ("GaussianNoise", "GaussianDropout", "ActivityRegularization", "Identity", "StochasticDepth")
AUGMENTATION = tuple(f"Random{what}" for what in ("Flip", "Rotation", "Translation", "Zoom", "Shear", "Contrast", "Hue",
                                                  "Brightness", "Saturation", "Grayscale", "Sharpness"))  # fmt: skip

LAYERS: dict[str, Rule] = {
    "Dense": convolutions.dense,
    **dict.fromkeys(["Conv1D", "Conv2D", "Conv3D"], convolutions.conv),
    **dict.fromkeys(["Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"], convolutions.conv_transpose),
    **dict.fromkeys(["DepthwiseConv1D", "DepthwiseConv2D"], convolutions.depthwise_conv),
    **dict.fromkeys(["SeparableConv1D", "SeparableConv2D"], convolutions.separable_conv),
    **dict.fromkeys(["MaxPooling1D", "MaxPooling2D", "MaxPooling3D"], convolutions.max_pool),
    **dict.fromkeys(["AveragePooling1D", "AveragePooling2D", "AveragePooling3D"], convolutions.average_pool),
    **dict.fromkeys([f"Global{kind}Pooling{dims}D" for kind in ("Max", "Average") for dims in (1, 2, 3)],
                    convolutions.global_pool),
    "BatchNormalization": normalizations.batch_normalization,
    "LayerNormalization": normalizations.layer_normalization,
    "GroupNormalization": normalizations.group_normalization,
    "RMSNormalization": normalizations.rms_normalization,
    "LayerScale": normalizations.layer_scale,
    "Rescaling": normalizations.rescaling,
    "Normalization": normalizations.normalization,
    "Activation": functions.activation_layer,
    "ReLU": functions.relu,
    "LeakyReLU": functions.leaky_relu,
    "PReLU": functions.prelu,
    "ELU": functions.elu,
    "Softmax": functions.softmax,
    "Flatten": shapes.flatten,
    "Reshape": shapes.reshape,
    "Permute": shapes.permute,
    "RepeatVector": shapes.repeat_vector,
    **dict.fromkeys([f"ZeroPadding{dims}D" for dims in (1, 2, 3)], shapes.zero_padding),
    **dict.fromkeys([f"Cropping{dims}D" for dims in (1, 2, 3)], shapes.cropping),
    **dict.fromkeys([f"UpSampling{dims}D" for dims in (1, 2, 3)], shapes.up_sampling),
    "Resizing": shapes.resizing,
    "Dropout": shapes.dropout,
    **dict.fromkeys([f"SpatialDropout{dims}D" for dims in (1, 2, 3)], shapes.spatial_dropout),
    "AlphaDropout": shapes.alpha_dropout,
    **dict.fromkeys([*NOTHING, *AUGMENTATION], shapes.nothing),
    "Embedding": shapes.embedding,
    **dict.fromkeys(["LSTM", "GRU", "SimpleRNN"], recurrent.recurrent),
    "Bidirectional": recurrent.bidirectional,
    "TimeDistributed": recurrent.time_distributed,
    "MultiHeadAttention": attention.multi_head_attention,
    "Attention": attention.attention,
    "Add": merging.merge(torch.add),
    "Subtract": merging.merge(torch.sub),
    "Multiply": merging.merge(torch.mul),
    "Maximum": merging.merge(torch.maximum),
    "Minimum": merging.merge(torch.minimum),
    "Average": merging.average,
    "Concatenate": merging.concatenate,
    "Dot": merging.dot,
}  # fmt: skip
