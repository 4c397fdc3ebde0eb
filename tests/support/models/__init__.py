"""Whole models in plain torch: ``name(size) -> (model in eval mode, example_inputs)``.

``size="full"`` is the shape the benchmarks time; ``size="tiny"`` keeps the same operators and compiles in seconds.
Everything is seeded, so two calls give equal weights and inputs. No trained weights are downloaded; instead the
initialisation copies what matters to quantization in trained ones: activations keep their scale through the depth,
layer-norm gains are log-normal (some channels are several times larger than others), and batch-norm statistics come
from forwards in training mode.
"""

from .build import MODELS, Built, Inputs, Size, fresh_inputs
from .convolutional import audio_conv, mobilenet_v2, resnet50
from .decoders import gpt2, llama
from .encoders import bert, vit
from .perceptron import mlp

__all__ = [
    "MODELS",
    "Built",
    "Inputs",
    "Size",
    "audio_conv",
    "bert",
    "fresh_inputs",
    "gpt2",
    "llama",
    "mlp",
    "mobilenet_v2",
    "resnet50",
    "vit",
]  # fmt: skip
