"""Record what a rank issues, on a CPU: operations on streams, and collectives in their order.

FSDP2 takes streams and events from `torch.cpu` where a GPU run takes them from `torch.cuda`. While a recorder is
active, `torch.cpu` gives those of `streams.Machine`, and each operation that torch dispatches is attributed to the
current one. Nothing is computed differently. A collective runs on the current stream, as NCCL's do (torch 2.13,
ProcessGroupNCCL.cpp); an asynchronous one runs on a stream of its process group, until something waits for its work.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup, Work
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPCommContext
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from parallel.checks.streams import Block, Event, Machine, Stream

_INPUTS = {"input", "inputs", "input_tensor", "input_tensors", "input_list"}
_OUTPUTS = {"output", "outputs", "output_tensor", "output_tensors", "output_lists"}
_ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class Issued:
    """What a rank issued: a collective, a wait for an asynchronous one, a synchronisation of the host, or the beginning
    of what FSDP2 calls `label`.

    `operation`: torch's name, "send", "receive", "wait", "synchronise" or "begin". `group`: the name of the process
    group, which is the same on all its `ranks`. `peer`: the rank of the world at the other end of a send or receive.
    `shapes` and `dtypes`: those of the tensors, unless ranks may differ in them. `label`: what FSDP2 was doing. `work`:
    the number of the asynchronous collective, or of the one that is waited for; -1 for a synchronous one. `batch`: the
    number of the batch of sends and receives that start as one, or -1. `bytes`: those that this rank hands over or, for
    a receive, gets.
    """

    operation: str
    group: str = ""
    ranks: tuple[int, ...] = ()
    peer: int = -1
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()
    label: str = ""
    work: int = -1
    batch: int = -1
    bytes: int = 0

    @property
    def is_collective(self) -> bool:
        return bool(self.group) and self.peer < 0

    def __str__(self) -> str:
        what = [self.operation, *self.dtypes[:1], *([f"{[*self.shapes]}"] if self.shapes else [])]
        what += [f"{'to' if self.operation == 'send' else 'from'} rank {self.peer}"] if self.peer >= 0 else []
        label = f" ({self.label})" if self.label else ""
        return f"{' '.join(what)} of ranks {', '.join(map(str, self.ranks))}{label}"


class Recorder(TorchDispatchMode):
    """Records one rank's operations from its first step on: `with recording() as recorder`.

    `device`: the type of the tensors that stand for those of a GPU. On a CPU, so do those of the host: a tensor counts
    as on the device if it comes from parameters or collectives.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.machine = device, Machine()
        self.issued: list[Issued] = []
        self._labels: list[str] = []
        self._blocks: dict[int, tuple[Block, Any]] = {}
        self._works: dict[int, tuple[Work, int, Event, list[Tensor]]] = {}
        self._streams: dict[str, Stream] = {}
        self._members: dict[str, tuple[int, ...]] = {}
        self._batch = self._batches = -1
        self.is_reading = False

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls the same operation on its local tensors
        options = kwargs or {}
        if operation.namespace == "c10d":
            return self._collective(operation, args, options)
        if operation.namespace == "aten" and operation.is_view:
            return operation(*args, **options)
        if operation is torch.ops.aten.record_stream.default:
            raise TypeError("call Tensor.record_stream, which the recorder replaces")
        read, written = self._uses(operation, args, options)
        known = {x.untyped_storage()._cdata for x in (*read, *written)}
        blocks = [self._block(x) for x in (*read, *written)]
        on_device = any(block.on_device for block in blocks) or any(x.requires_grad for x in (*read, *written))
        result = operation(*args, **options)
        self.machine.launch()
        plain = operation.overloadpacket.__name__
        name = f"{self.label}: {plain}" if self.label else plain
        for block in blocks[: len(read)]:
            self.machine.read(block, name)
        for block in blocks[len(read) :]:
            self.machine.write(block, name)
            block.on_device |= on_device
        for x in tree_leaves(result):
            if self._is_here(x) and x.untyped_storage()._cdata not in known:
                block = self._allocated(x)
                block.on_device = on_device
                if plain not in _ALLOCATES:
                    self.machine.write(block, name)
        return result

    @property
    def label(self) -> str:
        """What FSDP2 is doing, innermost first."""
        return self._labels[-1] if self._labels else ""

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        self._labels.append(label)
        self.issued.append(Issued("begin", label=label))
        try:
            yield
        finally:
            self._labels.pop()

    def record_stream(self, x: Tensor, stream: Stream) -> None:
        """Stand in for `Tensor.record_stream`."""
        self._block(x).shared.add(stream)

    def resize(self, storage: torch.UntypedStorage, size: int) -> None:
        """Note that FSDP2 frees or allocates the storage of a gathered parameter."""
        if (known := self._blocks.pop(storage._cdata, None)) is not None:
            self.machine.free(known[0])
        if size:
            self._keep(storage, self.machine.allocate())

    def waited(self, work: Work) -> None:
        """Note that the current stream waits for an asynchronous collective, and that its tensors may be freed."""
        if (known := self._works.pop(id(work), None)) is not None:
            _, number, event, _ = known
            self.machine.current.wait_event(event)
            self.issued.append(Issued("wait", work=number))

    def synchronise(self, x: Tensor) -> None:
        """Note that the host waits for the current stream, to read a tensor of the device."""
        if not self._is_here(x) or not self._block(x).on_device:
            return
        self.machine.current.synchronize()
        self.issued.append(Issued("synchronise", label=self.label))

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Note that sends and receives start as one."""
        self._batches += 1
        self._batch = self._batches
        try:
            yield
        finally:
            self._batch = -1

    def _is_here(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.device.type == self.device

    def _uses(self, operation: Any, args: Any, options: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors that an operation reads, and those that it writes, besides new ones."""
        read: list[Tensor] = []
        written: list[Tensor] = []
        arguments = operation._schema.arguments
        values = [*zip(arguments, args, strict=False), *((a, options[a.name]) for a in arguments if a.name in options)]
        for argument, value in values:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            writes |= argument.name == "all_gather_output" and "copy_in" in operation.__name__
            (written if writes else read).extend(x for x in tree_leaves(value) if self._is_here(x))
        return read, written

    def _block(self, x: Tensor) -> Block:
        """Return the memory of a tensor. What is older than the recorder belongs to the default stream."""
        storage = x.untyped_storage()
        known = self._blocks.get(storage._cdata)
        return known[0] if known is not None else self._keep(storage, Block(self.machine.default))

    def _allocated(self, x: Tensor) -> Block:
        storage = x.untyped_storage()
        known = self._blocks.get(storage._cdata)
        return known[0] if known is not None else self._keep(storage, self.machine.allocate())

    def _keep(self, storage: torch.UntypedStorage, block: Block) -> Block:
        key = storage._cdata

        def freed(_: Any) -> None:
            if (known := self._blocks.get(key)) is not None and known[0] is block:
                del self._blocks[key]
                self.machine.free(block)

        self._blocks[key] = block, weakref.ref(storage, freed)
        return block

    def _collective(self, operation: Any, args: Any, options: Any) -> Any:
        named = {a.name: value for a, value in zip(operation._schema.arguments, args, strict=False)} | options
        name = operation.overloadpacket.__name__.strip("_")
        read, written = handed(name, named)
        touched = list({id(x): x for x in (*read, *written)}.values())
        result = operation(*args, **options)
        work = next((x for x in tree_leaves(result) if isinstance(x, torch.ScriptObject)), None)
        group = ProcessGroup.unbox(named["process_group"])
        sends = name in ("send", "recv", "recv_any_source")
        is_async = sends or bool(named.get("async_op", True))
        number = len(self.issued) if is_async else -1
        self._note(name, named, group, touched, number, sum(x.nbytes for x in read or written))
        stream, caller = self.machine.current, self.machine.current
        if is_async:
            stream = self._streams.setdefault(
                group.group_name, Stream(self.machine, f"the stream of {group.group_desc}")
            )
            stream.wait_stream(caller)
        with self.machine.on(stream):
            self.machine.launch()
            for x in read:
                self.machine.read(self._block(x), name)
            for x in written:
                self.machine.write(self._block(x), name)
                self._block(x).on_device = True
        if is_async and work is not None:
            held = Work.unbox(work)
            self._works[id(held)] = held, number, stream.record_event(), touched
        return result

    def _note(
        self, name: str, named: dict[str, Any], group: ProcessGroup, tensors: list[Tensor], work: int, size: int
    ) -> None:
        ranks = self._ranks(group)
        peer = named.get("dst", named.get("src", -1))
        uneven = name.startswith(("alltoall", "gather", "scatter"))  # ranks may send one another different sizes
        shapes = () if uneven else tuple(tuple(x.shape) for x in tensors)
        dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in tensors)
        kind = "receive" if name == "recv" else name
        if "reduce_op" in named:
            kind = f"{kind} {reduction(named)}"
        end = ranks[peer] if peer >= 0 else -1
        made = Issued(kind, group.group_name, ranks, end, shapes, dtypes, self.label, work, self._batch, size)
        self.issued.append(made)

    def _ranks(self, group: ProcessGroup) -> tuple[int, ...]:
        """Return the ranks of a group. Records share them: a world may have thousands of ranks."""
        if group.group_name not in self._members:
            self._members[group.group_name] = tuple(dist.get_process_group_ranks(group))
        return self._members[group.group_name]


def reduction(named: dict[str, Any]) -> str:
    return dist.ReduceOp.RedOpType(named["reduce_op"].op()).name.lower()


def handed(name: str, named: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors that a collective reads, and those that it writes."""
    tensors = {key: [x for x in tree_leaves(value) if isinstance(x, Tensor)] for key, value in named.items()}
    read = [x for key, some in tensors.items() if key in _INPUTS for x in some]
    written = [x for key, some in tensors.items() if key in _OUTPUTS for x in some]
    both = tensors.get("tensors", [])
    if name != "recv" and name != "recv_any_source":
        read += both
    if name != "send":
        written += both
    return read, written


@contextmanager
def recording(device: str = "cpu") -> Iterator[Recorder]:
    """Record until the end of the block. FSDP2 makes its streams at the first forward pass: begin before that."""
    recorder = Recorder(device)
    machine = recorder.machine
    resize = torch.UntypedStorage.resize_
    batch, make, profile = dist.batch_isend_irecv, FSDPCommContext.lazy_init, torch.profiler.record_function

    def resized(storage: torch.UntypedStorage, size: int) -> None:
        recorder.resize(storage, size)
        resize(storage, size)

    def waiting(kind: Any) -> Any:
        honest = vars(kind)["wait"]

        def wait(work: Work, *arguments: Any) -> Any:
            with _disable_current_modes():  # gloo copies its results here
                result = honest(work, *arguments)
            recorder.waited(work)
            return result

        return wait

    def batched(operations: Any) -> Any:
        with recorder.batch():
            return batch(operations)

    def named(context: FSDPCommContext, device: torch.device) -> None:
        make(context, device)
        for name, stream in vars(context).items():
            if isinstance(stream, Stream):
                stream.name = name

    def profiled(name: str, *rest: Any) -> Any:
        return recorder.labelled(name) if name == "FSDP::root_pre_forward" else profile(name, *rest)

    def to_host(name: str) -> Any:
        honest = getattr(Tensor, name)

        def read(x: Tensor) -> Any:
            if not recorder.is_reading:  # a mode that sees functions calls this one again
                recorder.is_reading = True
                try:
                    recorder.synchronise(x)
                    return honest(x)
                finally:
                    recorder.is_reading = False
            return honest(x)

        return read

    replaced: list[tuple[Any, str, Any]] = [
        (torch.cpu, "Stream", lambda *_, **options: Stream(machine, "a side stream")),
        (torch.cpu, "Event", lambda *_, **options: Event(machine)),
        (torch.cpu, "stream", machine.on),
        (torch.cpu, "current_stream", lambda device=None: machine.current),
        (torch.accelerator, "current_stream", lambda device=None: machine.current),
        (torch.UntypedStorage, "resize_", resized),
        *((kind, "wait", waiting(kind)) for kind in (Work, *Work.__subclasses__()) if "wait" in vars(kind)),
        (dist, "batch_isend_irecv", batched),
        (_fsdp_param_group, "record_function", recorder.labelled),
        (torch.profiler, "record_function", profiled),
        (FSDPCommContext, "lazy_init", named),
        (Tensor, "record_stream", lambda x, stream: recorder.record_stream(x, stream)),
        *((Tensor, name, to_host(name)) for name in ("tolist", "item", "cpu")),
    ]
    with ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(patch.object(owner, name, instead))
        stack.enter_context(recorder)
        yield recorder
