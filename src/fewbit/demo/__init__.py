"""A small trained network and its data, shipped with the package: what the demo and the examples run on."""

from fewbit.demo.network import DigitsData, DigitsNet, accuracy, load, load_digits_split, train

__all__ = ["DigitsData", "DigitsNet", "accuracy", "load", "load_digits_split", "train"]
