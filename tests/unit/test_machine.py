"""A machine is read from its own files and packages, or said to be unreadable.

Evidence: /proc as drivers write it, on GPUs that are alike, of two kinds, hidden and broken.
"""

import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpcheck import machine

VERSION = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (x)\n"
    "GCC version:  gcc version 12.2.0\n"
)


@pytest.fixture(autouse=True)
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the tests a /proc, /dev and /etc of their own, and no NVML."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(machine, "ETC", tmp_path / "nccl.conf")
    monkeypatch.setattr(machine, "user_home", lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path / "proc"


def gpus(proc: Path, *models: str) -> None:
    (proc / "gpus").mkdir(parents=True)
    (proc / "version").write_text(VERSION)
    (proc.parent / "dev").mkdir()
    for i, model in enumerate(models):
        folder = proc / "gpus" / f"0000:{i:02x}:00.0"
        folder.mkdir()
        (folder / "information").write_text(
            f"Model: \t\t {model}\nIRQ:   \t\t 36\nGPU UUID: \t GPU-{i}{i}-x\n"
            f"Device Minor: \t {i}\nGPU Excluded:\t No\n"
        )
        (proc.parent / "dev" / f"nvidia{i}").touch()


def test_gpus_and_driver_are_read(proc: Path) -> None:
    gpus(proc, "NVIDIA H200", "NVIDIA H200")
    assert machine.visible_gpus({}) == ("NVIDIA H200", "NVIDIA H200")
    assert machine.driver_version() == "570.86.15"


def test_a_machine_without_the_driver_has_no_gpu(proc: Path) -> None:
    assert machine.visible_gpus({}) == ()
    assert machine.driver_version() is None


def test_a_container_has_the_gpus_whose_devices_it_was_given(proc: Path) -> None:
    gpus(proc, "NVIDIA H200", "NVIDIA L4")
    (proc.parent / "dev" / "nvidia0").unlink()
    assert machine.visible_gpus({}) == ("NVIDIA L4",)


@pytest.mark.parametrize(
    ("wanted", "order", "expected"),
    [
        ("0", "", None),  # of two kinds: CUDA counts the fastest first
        ("0", "PCI_BUS_ID", ("NVIDIA H200",)),
        ("1,0", "PCI_BUS_ID", ("NVIDIA L4", "NVIDIA H200")),
        ("1,-1,0", "PCI_BUS_ID", ("NVIDIA L4",)),
        ("1, 7, 0", "PCI_BUS_ID", ("NVIDIA L4",)),
        ("GPU-11-x", "", ("NVIDIA L4",)),
        ("GPU-11", "", ("NVIDIA L4",)),
        ("GPU-", "", ()),  # stands for both, so CUDA takes none
        ("", "", ()),
        ("none", "", ()),
        ("MIG-11", "", None),
    ],
)
def test_only_visible_gpus_count(
    wanted: str, order: str, expected: tuple[str, ...] | None, proc: Path
) -> None:
    gpus(proc, "NVIDIA H200", "NVIDIA L4")
    environ = {"CUDA_VISIBLE_DEVICES": wanted, "CUDA_DEVICE_ORDER": order}
    assert machine.visible_gpus(environ) == expected


def test_gpus_that_are_alike_may_be_counted(proc: Path) -> None:
    gpus(proc, "NVIDIA H200", "NVIDIA H200")
    assert machine.visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}) == ("NVIDIA H200",)


@pytest.mark.parametrize("text", ["", "Model: \t NVIDIA H200\n", "Device Minor: 0\n"])
def test_what_the_driver_does_not_say_is_unknown(text: str, proc: Path) -> None:
    gpus(proc, "NVIDIA H200")
    (proc / "gpus" / "0000:00:00.0" / "information").write_text(text)
    assert machine.visible_gpus({}) is None


def test_a_driver_that_lists_no_folder_is_unknown(proc: Path) -> None:
    proc.mkdir()
    assert machine.visible_gpus({}) is None


def nvml(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[str]:
    calls: list[str] = []

    class NVMLError(Exception):
        pass

    def named(name: str, result: Any) -> Any:
        return lambda *_: (calls.append(name), result)[1]

    library: dict[str, Any] = {
        "NVMLError": NVMLError,
        "nvmlInit": named("init", None),
        "nvmlShutdown": named("shutdown", None),
        "nvmlDeviceGetCount": named("count", 2),
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": named("name", b"NVIDIA H200"),  # older bindings return bytes
        "nvmlDeviceGetUUID": lambda index: f"GPU-{index}",
    }
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**{**library, **changes}))
    return calls


def test_nvml_is_asked_first_and_closed_again(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(proc, "NVIDIA L4")
    calls = nvml(monkeypatch)
    assert machine.visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1"}) == ("NVIDIA H200",)
    assert (calls[0], calls[-1]) == ("init", "shutdown")


def test_where_nvml_fails_the_driver_is_asked(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(proc, "NVIDIA L4")
    nvml(monkeypatch)
    error = sys.modules["pynvml"].NVMLError

    def fail(*_: Any) -> None:
        raise error

    nvml(monkeypatch, NVMLError=error, nvmlDeviceGetName=fail)
    assert machine.visible_gpus({}) == ("NVIDIA L4",)


def packages(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    names = {f"nvidia-nccl-{name}": version for name, version in versions.items()}
    monkeypatch.setattr(machine, "package_version", names.get)


def test_nccl_is_that_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages(monkeypatch, cu12="2.28.9")
    assert machine.nccl_version({}) == "2.28.9"
    packages(monkeypatch, cu12="2.28.9", cu13="2.28.9")
    assert machine.nccl_version({}) == "2.28.9"
    packages(monkeypatch, cu12="2.28.9", cu13="2.30.3")
    assert machine.nccl_version({}) is None  # which of the two is loaded is not known


def test_nccl_of_the_system_is_known_by_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages(monkeypatch)
    monkeypatch.setattr(machine, "_LIBRARY_FOLDERS", (str(tmp_path),))
    assert machine.nccl_version({}) is None
    (tmp_path / "libnccl.so.2.27.3").touch()
    (tmp_path / "libnccl.so.2").symlink_to("libnccl.so.2.27.3")
    assert machine.nccl_version({}) == "2.27.3"


def test_a_library_put_in_its_place_counts_instead(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages(monkeypatch, cu12="2.28.9")
    other = tmp_path / "libnccl.so.2.19.3"
    assert machine.nccl_version({"VLLM_NCCL_SO_PATH": str(other)}) is None
    other.touch()
    assert machine.nccl_version({"VLLM_NCCL_SO_PATH": str(other)}) == "2.19.3"
    other.rename(tmp_path / "mine.so")
    assert machine.nccl_version({"VLLM_NCCL_SO_PATH": str(tmp_path / "mine.so")}) is None


def test_settings_come_from_both_files_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "user_home", lambda: tmp_path)
    machine.ETC.write_text("# NCCL_NO=1\nNCCL_ALGO=Tree\nNCCL_PROTO=LL\nNCCL_A=etc\nOTHER=1\n")
    (tmp_path / ".nccl.conf").write_text("NCCL_PROTO=Simple\nNCCL_A=home\n")
    environ = {"HOME": "/elsewhere", "NCCL_A": "variable", "PATH": "x"}
    expected = {"NCCL_A": "variable", "NCCL_ALGO": "Tree", "NCCL_PROTO": "Simple"}
    assert machine.nccl_settings(environ) == expected
    (tmp_path / "mine.conf").write_text("NCCL_PROTO=LL128\n")
    environ["NCCL_CONF_FILE"] = str(tmp_path / "mine.conf")
    assert machine.nccl_settings(environ)["NCCL_PROTO"] == "LL128"
    monkeypatch.setattr(machine, "user_home", lambda: None)
    etc = {"NCCL_A": "etc", "NCCL_ALGO": "Tree", "NCCL_PROTO": "LL"}
    assert machine.nccl_settings({}) == etc


def test_home_is_that_of_the_password_database(monkeypatch: pytest.MonkeyPatch) -> None:
    # getpwuid is what NCCL asks; a HOME that points elsewhere would hide a file from us alone
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "/elsewhere")
    assert machine.user_home() == Path(pwd.getpwuid(os.getuid()).pw_dir)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"NCCL_ALGO=Ring\nNCCL_ALGO=Tree\n", {"NCCL_ALGO": "Ring"}),  # setenv(..., 0)
        (b"# \rNCCL_ALGO=Ring\n", {}),
        (b"#\x0bNCCL_ALGO=Ring\n#\xe2\x80\xa8NCCL_PROTO=LL\n", {}),
        (b"NCCL_ALGO=Ring\r\n", {"NCCL_ALGO": "Ring"}),
        (b"NCCL_A=\xff\nNCCL_B=\xfe\n", {"NCCL_A": r"\xff", "NCCL_B": r"\xfe"}),
    ],
)
def test_a_file_of_settings_is_read_as_nccl_reads_it(
    data: bytes, found: dict[str, str], proc: Path
) -> None:
    machine.ETC.write_bytes(data)
    assert machine.nccl_settings({}) == found


def test_the_content_of_a_file_counts_and_not_its_name(
    proc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine.conf", "yours.conf"):
        Path(name).write_text("NCCL_ALGO=Tree\n")
        assert machine.nccl_settings({"NCCL_CONF_FILE": name}) == {"NCCL_ALGO": "Tree"}


@pytest.mark.parametrize("name", ["none.conf", "/dev/null", "."])
def test_a_file_that_was_not_read_keeps_its_name(name: str, proc: Path) -> None:
    # what NCCL would read of it is not known, so it cannot be said to be the same
    assert machine.nccl_settings({"NCCL_CONF_FILE": name}) == {"NCCL_CONF_FILE": name}


def test_no_secret_is_shown() -> None:
    environ = {"NCCL_API_TOKEN": "s3cret", "NCCL_IB_PKEY": "1"}
    found = {"NCCL_API_TOKEN": "(hidden)", "NCCL_IB_PKEY": "1"}
    assert machine.nccl_settings(environ) == found


def test_the_version_of_torch_is_what_torch_says_and_not_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; from tpcheck import machine; print(machine.version_here('torch'));"
    code += "assert 'torch' not in sys.modules"
    held = tmp_path / "site" / "torch"
    for file, text in {
        "torch/__init__.py": "raise SystemExit('imported')",
        "torch/version.py": "debug = False\n__version__ = '2.9.1+cu128'\n",
        "torch-2.9.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n",
    }.items():
        (held.parent / file).parent.mkdir(parents=True, exist_ok=True)
        (held.parent / file).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(held.parent))

    def said() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert said() == "2.9.1+cu128"
    (held / "version.py").write_text("cuda = '12.8'\n")
    assert said() == "None"
    assert machine.version_here("torch") == torch.__version__
    assert machine.version_here("pytest") == machine.package_version("pytest") == pytest.__version__


def test_a_package_is_known_by_its_metadata() -> None:
    assert machine.package_version("pytest") == pytest.__version__
    assert machine.package_version("no-such-package-as-this") is None
