"""How transformers is run on tpcheck's ranks: imported late, kept quiet, offline, on their device.

Requirement: the library under test is not changed in anything that computes, and what has to be
set around it (environment, log level, progress bars, its choice of device) is put back.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tpcheck.errors import SubjectError

if TYPE_CHECKING:
    from tpcheck.groups.base import TPGroup


def import_transformers() -> Any:
    """Return the transformers module.

    Raises:
        SubjectError: it is not installed, or too old; says what to install.
    """
    try:
        import transformers
    except ImportError as error:
        raise SubjectError(
            "hf: transformers is not installed; pip install 'tpcheck[hf]'"
        ) from error
    if not hasattr(transformers, "DistributedConfig"):
        raise SubjectError(
            f"hf: transformers {transformers.__version__} has no DistributedConfig; its plan can be"
            " run from a version that has it: pip install -U 'tpcheck[hf]'"
        )
    return transformers


@contextlib.contextmanager
def quiet_and_offline() -> Iterator[None]:
    """Keep transformers off the network, and its progress bars and advice off stderr."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    log = logging.getLogger("transformers")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _without_progress_bars():
                level = log.level
                log.setLevel(logging.ERROR)
                try:
                    yield
                finally:
                    log.setLevel(level)
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    try:
        hf_logging: Any = importlib.import_module("transformers.utils.logging")
    except ImportError:
        yield
        return
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def ranks_of(tp: TPGroup) -> Iterator[None]:
    """Make transformers use this group's device instead of the one it would pick by LOCAL_RANK.

    It builds its mesh on any accelerator it finds and has no argument for another one, so Gloo
    ranks on a GPU machine, or two ranks on one GPU, need this one function replaced. Naming a
    device costs the accelerate package, so on CPU, where it changes nothing, none is named.
    """
    if tp.size == 1:
        yield
        return
    mixin: Any = importlib.import_module("transformers.distributed.mixin")
    device = None if tp.device.type == "cpu" else tp.device
    meshes = _meshes(tp)
    original = mixin.initialize_distributed_mesh
    mixin.initialize_distributed_mesh = lambda config: (device, meshes)
    try:
        yield
    finally:
        mixin.initialize_distributed_mesh = original


_latest: list[tuple[Any, Any]] = []
"""The last (process group, meshes): meshes make groups of their own, and a rank builds often."""


def _meshes(tp: TPGroup) -> Any:
    group = tp.process_group
    if not _latest or _latest[0][0] is not group:
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.distributed.utils import TransformersDeviceMesh

        shape = (1, 1, 1, tp.size)
        dims = ("pp", "dp_replicate", "fsdp", "tp")
        dense = init_device_mesh(tp.device.type, shape, mesh_dim_names=dims)
        # Experts are tensor-parallel here, never expert-parallel: that view is not used.
        _latest[:] = [(group, TransformersDeviceMesh(dense, dense))]
    return _latest[0][1]
