"""Memory-bound steps of the layers: PyTorch's operations, and Triton kernels for GPUs that read and write data once."""

from model.kernels.moe import StepKernels, TorchKernels
from model.kernels.triton import TritonKernels
from precision.config import KernelKind


def kernels_for(kind: KernelKind) -> StepKernels:
    return {KernelKind.torch: TorchKernels, KernelKind.triton: TritonKernels}[kind]()
