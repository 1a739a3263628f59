"""Whether what runs now becomes a graph, whether a tensor was written to, and which tensors share their memory."""

import torch
from torch import Tensor
from torch._C import _functorch


def is_traced() -> bool:
    """Whether what runs becomes a graph, of torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_exporting() -> bool:
    """Whether torch.export traces, for itself or for ONNX: without Dynamo, other than torch.compile."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is active. Under torch.compile it is the compiler's business."""
    return not torch.compiler.is_compiling() and _functorch.peek_interpreter_stack() is not None


def version(tensor: Tensor) -> int:
    """Return a tensor's version counter, which writes raise; 0 for one that was made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def memory(tensor: Tensor) -> int:
    """Return a number that a tensor and its views share, and no other tensor while one of them lives.

    It is not the address, which is 0 for all tensors without data, such as those of an estimate.
    """
    return int(tensor.untyped_storage()._cdata)
