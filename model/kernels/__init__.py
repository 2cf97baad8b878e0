"""Memory-bound steps of the layers and of the loss: PyTorch's operations, and Triton kernels for GPUs that read and
write data once.
"""

from model.kernels.loss import LossKernels
from model.kernels.moe import StepKernels, TorchKernels
from model.kernels.triton import TritonKernels
from model.kernels.triton_loss import TritonLossKernels
from precision.config import KernelKind


def kernels_for(kind: KernelKind) -> StepKernels:
    return {KernelKind.torch: TorchKernels, KernelKind.triton: TritonKernels}[kind]()


def loss_kernels_for(kind: KernelKind) -> LossKernels:
    return {KernelKind.torch: LossKernels, KernelKind.triton: TritonLossKernels}[kind]()
