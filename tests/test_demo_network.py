"""The shipped network: what it is made of, what it was trained on, and how accurate it is."""

import numpy as np
import torch
from torch import nn

from fewbit import demo
from fewbit.demo.network import WEIGHTS


def test_shipped_network_is_accurate_on_digits_it_has_not_seen() -> None:
    model, data = demo.load()
    assert not model.training
    assert demo.accuracy(model, data.test_images, data.test_labels) >= 0.975
    seen = {image.tobytes() for image in data.train_images}
    assert not any(image.tobytes() in seen for image in data.test_images)


def test_network_has_what_the_demo_is_to_show() -> None:
    model, _ = demo.load()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.groups == m.in_channels > 1 for m in convolutions), "a depthwise convolution"
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.head, nn.Linear)
    assert 15_000 <= sum(p.numel() for p in model.parameters()) <= 40_000
    assert WEIGHTS.stat().st_size < 100_000


def test_data() -> None:
    data = demo.load_digits_split()
    assert (len(data.train_images), len(data.calibration_images), len(data.test_images)) == (1300, 256, 497)
    for images in (data.train_images, data.calibration_images, data.test_images):
        assert images.dtype == np.float32 and images.shape[1:] == (1, 8, 8)
        assert images.min() == 0.0 and images.max() == 1.0
    assert data.train_labels.dtype == np.int64
    assert np.array_equal(demo.load_digits_split().test_images, data.test_images)
    assert not np.array_equal(demo.load_digits_split(seed=1).test_images, data.test_images)


def test_training_learns_repeats_and_leaves_the_random_state() -> None:
    data = demo.load_digits_split()
    state = torch.random.get_rng_state()
    losses: list[float] = []
    first = demo.train(data, epochs=2, progress=lambda epoch, loss: losses.append(loss))
    second = demo.train(data, epochs=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert losses[1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert demo.accuracy(first, data.test_images, data.test_labels) > 0.8
