"""The clipping bounds that minimise the mean squared quantization error, on the scheme's own grid.

Nagel et al., "A White Paper on Neural Network Quantization" (arXiv 2106.08295), section 3.1;
Banner et al., "Post training 4-bit quantization of convolutional networks" (arXiv 1810.05723).
"""

from fewbit.observers._squared_error import SquaredErrorObserver


class Observer(SquaredErrorObserver):
    """Saturating range: least sum of (x - Q(x))**2; Q is the quantizer."""
