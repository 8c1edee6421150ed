"""Every operation that the executor knows, one file a family. A new one is a decorated function in its family's file."""

from runtimes.coreml.operations import (  # noqa: F401  (importing a family registers its operations)
    activation,
    attention,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resizing,
    shaping,
    spatial,
    tensor,
)
from runtimes.coreml.operations.registry import OPERATIONS, Implementation, Parameter

__all__ = ["OPERATIONS", "Implementation", "Parameter"]
