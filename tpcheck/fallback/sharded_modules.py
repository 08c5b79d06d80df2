"""A module with DTensor parameters under a remedy: parallelize_module's, or transformers' own plan.

Requirement: at TP=1 it is the module's own classes without what tensor parallelism installed on
them (hooks; with transformers a forward), so its bits are those of the model that was never split.
What a class computes must therefore not hang on attributes that the split changed: where it does,
say what the model is at TP=1 with `alone=`.

[Units] Weights are gathered for one unit at a time, when its forward begins, and go when it ends: a
block of a ModuleList, any other module that owns parameters; where that is more than `max_bytes`,
the module's children instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tpcheck.errors import SubjectError
from tpcheck.fallback.cloning import cloned, with_forward, without_wrapping
from tpcheck.fallback.gathering import Collectives, MeshGroup, Meter
from tpcheck.fallback.models import Forward, Products, WholeHead, no_rows_is_an_error
from tpcheck.fallback.products import LEAVES, Row, block_width, require_blocks
from tpcheck.outputs import whole


class ShardedModule:
    """An nn.Module with DTensor parameters on this rank; `head` is the FQN of its output layer.

    Raises:
        SubjectError: it has no DTensor parameter, or their mesh is not of one axis.
    """

    def __init__(self, module: nn.Module, head: str = "lm_head") -> None:
        self.module, self.head = module, head
        self.name = type(module).__name__
        sharded = [p for p in module.parameters() if _is_dtensor(p)]
        if not sharded:
            raise SubjectError(
                f"{self.name}: no parameter is a DTensor and there is no shards(), but one of them"
                " should say what each rank holds; see CONTRACT: the subject"
            )
        local: Any = sharded[0]
        if any(p.device_mesh.ndim != 1 or len(p.placements) != 1 for p in sharded):  # type: ignore[attr-defined]
            raise SubjectError(
                f"{self.name}: parameters lie on a mesh of {local.device_mesh.ndim} axes,"
                " but should lie on one"
            )
        self.tp: Collectives = MeshGroup(local.device_mesh)
        self.dtype: torch.dtype = local.dtype
        self.device: torch.device = local.to_local().device

    def run(self, *arguments: Any, **options: Any) -> Any:
        """Run the model as deployed; its logits are whole."""
        return whole(self.module(*arguments, **options))

    def alone(self, meter: Meter, dtype: torch.dtype | None = None) -> Forward:
        """Return the forward at TP=1; see [Units]."""
        units = list(_units(self.module, meter.max_bytes, dtype))
        for fqn, members in units:
            with meter.holding(fqn, _whole_bytes(members, dtype)):
                pass  # too small a bound is an error now, not at the first request
        twin = _bare(self.module, dtype)
        modules = dict(twin.named_modules(remove_duplicate=False))
        for fqn, members in units:
            unit = _Unit(fqn, members, meter, dtype)
            modules[fqn].register_forward_pre_hook(unit.enter)
            modules[fqn].register_forward_hook(unit.leave, always_call=True)
        return partial(_logits_of, twin)

    def with_products(self, products: Products, meter: Meter) -> Forward:
        """Return the model with its Linear layers' products made otherwise.

        Raises:
            SubjectError: other modules have sharded matrices, experts for one, or transformers'
                column-parallel forwards would have to be taken apart.
        """
        with no_rows_is_an_error(self.name) as found:

            def replace(fqn: str, module: nn.Module) -> nn.Module | None:
                self._refuse_unknown(fqn, module)
                if not isinstance(module, nn.Linear) or not _is_dtensor(module.weight):
                    return None
                dim = _shard_dim(module.weight)
                if dim == 1:
                    found.append(fqn)
                    row = self._row(fqn, module, meter)
                    if products.column is not None:
                        block_width(row)  # refused now, not at the first request
                    return with_forward(module, partial(_row_linear, module, row, products))
                if dim == 0 and products.column is not None:
                    if "forward" in module.__dict__:
                        raise SubjectError(
                            f"fixed_tree: {fqn}: transformers' plan put a forward of its own there,"
                            " which cannot be cut into blocks; take level full"
                        )
                    weight: Any = module.weight
                    require_blocks(len(weight.to_local()), fqn, weight.shape[0] // LEAVES)
                    return with_forward(module, partial(_column_linear, module, fqn, products))
                return None

            clone = cloned(self.module, replace)
        return partial(_logits_of, clone)

    def with_head(self, meter: Meter) -> Forward:
        """Return the model with a head that is whole, in float32."""
        head = dict(self.module.named_modules()).get(self.head)
        weight = getattr(head, "weight", None)
        if head is None or not isinstance(weight, torch.Tensor):
            raise SubjectError(
                f"head: {self.name} has no module {self.head!r} with a weight; name it with head="
            )

        def gather() -> tuple[torch.Tensor, torch.Tensor | None]:
            bias = getattr(head, "bias", None)
            with meter.holding(self.head, weight.numel() * weight.element_size()):
                return _gathered(weight, meter), None if bias is None else _gathered(bias, meter)

        def replace(_fqn: str, module: nn.Module) -> nn.Module | None:
            return WholeHead(gather) if module is head else None

        return partial(_logits_of, cloned(self.module, replace))

    def _refuse_unknown(self, fqn: str, module: nn.Module) -> None:
        """Raise where products would be left as they are: half a remedy is none."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            return
        for name, parameter in module._parameters.items():
            if _is_dtensor(parameter) and parameter.ndim > 1 and _shard_dim(parameter) is not None:  # type: ignore[union-attr]
                raise SubjectError(
                    f"{fqn}.{name}: {type(module).__name__} shares it between ranks and is no"
                    " Linear, so its products cannot be replaced; take level full"
                )

    def _row(self, fqn: str, module: nn.Linear, meter: Meter) -> Row:
        total, size = module.weight.shape[1], self.tp.size
        step = -(-total // size)
        widths = [max(0, min(step, total - rank * step)) for rank in range(size)]
        bias: Any = module.bias  # replicated, so that whole is what lies here
        return Row(fqn, tuple(widths), self.tp, meter, _local(bias))


class _Unit:
    """The parameters of one unit: whole while its forward runs, on no device otherwise."""

    def __init__(
        self, fqn: str, members: dict[str, nn.Module], meter: Meter, dtype: torch.dtype | None
    ) -> None:
        self._fqn, self._sources, self._meter, self._dtype = fqn, members, meter, dtype
        self._size = _whole_bytes(members, dtype)

    def enter(self, module: nn.Module, _arguments: Any) -> None:
        self._meter.hold(self._fqn, self._size)
        for path, source in self._sources.items():
            target = module.get_submodule(path)
            for name, parameter in source._parameters.items():
                if parameter is not None:
                    value = _gathered(parameter, self._meter)
                    value = value if self._dtype is None else value.to(self._dtype)
                    target._parameters[name] = nn.Parameter(value, requires_grad=False)

    def leave(self, module: nn.Module, _arguments: Any, _output: Any) -> None:
        for path, source in self._sources.items():
            target = module.get_submodule(path)
            target._parameters.update(_absent(source))
        self._meter.release(self._size)


def _units(
    module: nn.Module, max_bytes: int | None, dtype: torch.dtype | None
) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Yield (fqn, {path below it: module that owns parameters}) of every unit; see [Units]."""

    def visit(
        fqn: str, one: nn.Module, is_block: bool
    ) -> Iterator[tuple[str, dict[str, nn.Module]]]:
        owners = {path: m for path, m in one.named_modules() if _own(m)}
        if not owners:
            return
        fits = max_bytes is None or _whole_bytes(owners, dtype) <= max_bytes
        if (is_block and fits) or list(owners) == [""]:
            yield fqn, owners
            return
        if "" in owners:
            yield fqn, {"": one}
        for name, child in one._modules.items():
            if child is not None:
                path = f"{fqn}.{name}" if fqn else name
                yield from visit(path, child, isinstance(one, nn.ModuleList))

    yield from visit("", module, False)


def _bare(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return the tree without its parallel wrapping, its parameters not there yet."""

    def copied(one: nn.Module) -> Any:
        copy = without_wrapping(one)
        copy._parameters.update(_absent(one))
        for name, buffer in one._buffers.items():
            if dtype is not None and buffer is not None and buffer.is_floating_point():
                copy._buffers[name] = buffer.to(dtype)
        return copy

    return cloned(module, lambda _fqn, _module: None, copied)


def _absent(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own parameters as empty ones on the meta device."""
    return {
        name: None
        if parameter is None
        else nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
        )
        for name, parameter in module._parameters.items()
    }


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _whole_bytes(members: dict[str, nn.Module], dtype: torch.dtype | None) -> int:
    """Return the bytes of whole weights, which lie here already where they are replicated."""
    return sum(
        parameter.numel() * (dtype or parameter.dtype).itemsize
        for module in members.values()
        for parameter in _own(module)
    )


def _gathered(parameter: Any, meter: Meter) -> torch.Tensor:
    if not _is_dtensor(parameter):
        plain: torch.Tensor = parameter.detach()
        return plain
    full: torch.Tensor = parameter.detach().full_tensor()
    meter.received(full.nbytes, parameter.to_local().nbytes)
    return full


def _row_linear(module: nn.Linear, row: Row, products: Products, x: Any) -> Any:
    """Run a row-parallel Linear; the input is this rank's slice, or whole and cut here."""
    from torch.distributed.tensor import DTensor, Replicate

    weight: Any = module.weight
    x_f = _local(x)
    mine = row.widths[row.tp.rank]
    if x_f.shape[-1] != mine:
        start = sum(row.widths[: row.tp.rank])
        x_f = x_f[..., start : start + mine]
    y_D = products.row(x_f, weight.to_local(), row)
    if not _is_dtensor(x):
        return y_D
    return DTensor.from_local(y_D, x.device_mesh, [Replicate()], run_check=False)


def _column_linear(module: nn.Linear, fqn: str, products: Products, x: Any) -> Any:
    """Run a column-parallel Linear in blocks of its outputs."""
    from torch.distributed.tensor import DTensor, Shard

    assert products.column is not None
    weight, bias = module.weight, module.bias
    local: Any = weight
    block = weight.shape[0] // LEAVES
    y_f = products.column(_local(x), local.to_local(), _local(bias), fqn, block)
    return DTensor.from_local(y_f, local.device_mesh, [Shard(-1)], run_check=False)


def _logits_of(module: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return whole(module(*arguments, **options))


def _shard_dim(parameter: Any) -> int | None:
    placement = parameter.placements[0]
    return placement.dim % parameter.ndim if placement.is_shard() else None


def _local(value: Any) -> Any:
    return value.to_local() if _is_dtensor(value) else value


def _is_dtensor(value: Any) -> bool:
    return hasattr(value, "full_tensor")
