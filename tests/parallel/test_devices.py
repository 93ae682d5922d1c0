"""Which GPUs, and how many processes, a recipe asks for."""

import os
from typing import Any

import pytest
import torch

from prefixtune_cli.errors import ResourceError, UsageError
from prefixtune_cli.model import tell_loading
from prefixtune_cli.parallel import devices
from prefixtune_cli.parallel.devices import device, multiplies_bfloat16, processes_here, show_only
from prefixtune_cli.recipe.schema import ModelSection
from tests.heard import Heard

HERE = torch.cuda.device_count()


@pytest.mark.parametrize(("gpus", "count"), [(None, 1), (3, 3), ("auto", 1), (1, 1)])
def test_on_the_cpu_gpus_are_processes(gpus: int | str | None, count: int) -> None:
    assert processes_here(gpus, "cpu") == count


def test_all_gpus_are_as_many_processes_and_one_without_any() -> None:
    assert processes_here("auto", "auto") == max(1, HERE)
    assert processes_here(None, "auto") == 1


@pytest.mark.parametrize("gpus", [HERE + 1, [HERE], [0, HERE + 3]])
def test_gpus_that_are_not_there_are_refused_with_what_to_type(gpus: int | list[int]) -> None:
    with pytest.raises(ResourceError, match=f"this machine has {HERE} CUDA GPUs.*--") as told:
        processes_here(gpus, "auto")
    assert ("--device cpu" in str(told.value)) == (HERE == 0)


def test_a_list_of_gpus_does_not_go_with_the_cpu() -> None:
    with pytest.raises(UsageError, match=r"names GPUs.*Type --gpus 2"):
        processes_here([0, 1], "cpu")


@pytest.mark.parametrize(
    ("visible", "gpus", "shown"),
    [
        (None, [2, 0], "2,0"),
        ("4,5,6", [2, 0], "6,4"),
        ("4,5,6", 2, "4,5,6"),
        ("4,5,6", "auto", "4,5,6"),
        ("4,5,6", None, "4,5,6"),
    ],
)
def test_a_list_counts_the_gpus_that_are_visible(
    visible: str | None, gpus: object, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    show_only(gpus)  # type: ignore[arg-type]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown


@pytest.mark.gpu
def test_each_local_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(HERE):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert device() == torch.device("cuda", rank)
    # A scheduler that shows each process only one GPU.
    monkeypatch.setenv("LOCAL_RANK", str(HERE))
    assert device() == torch.device("cuda", 0)
    assert device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("place", "capabilities", "fast"),
    [
        ("cpu", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ("cpu", {"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ("cpu", {"architecture": "aarch64"}, True),
        ("cpu", {}, True),  # an older torch, which does not say
        ("cuda", {"architecture": "x86_64"}, True),
    ],
)
def test_cpus_that_are_slow_in_bfloat16_are_known(
    place: str, capabilities: dict[str, object], fast: bool
) -> None:
    assert multiplies_bfloat16(torch.device(place), capabilities) is fast


@pytest.mark.parametrize(
    ("bits", "fast", "told"), [(16, False, True), (4, False, True), (32, False, False), (16, True, False)]
)  # fmt: skip
def test_a_slow_precision_is_told_where_the_base_loads(
    bits: Any, fast: bool, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: fast)
    heard = Heard()
    tell_loading(ModelSection(name="tiny", bits=bits, device="cpu"), heard)
    assert heard.notices[0] == "Loading tiny."
    assert ["--bits 32" in notice for notice in heard.notices[1:]] == [True] * told
