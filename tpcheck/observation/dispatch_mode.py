"""A torch dispatch mode that costs an op no more than the call of `__torch_dispatch__`."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class PlainMode(TorchDispatchMode):
    """What every mode here starts from; it takes no arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps every op in a lazily imported, slow dynamo guard
