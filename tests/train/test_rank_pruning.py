"""AdaLoRA prunes ranks to its budget, and a run that is resumed prunes the same ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefixtune_cli.errors import RecipeError
from prefixtune_cli.model import check_fits, load_adapter, load_base
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import train
from tests.train.test_run import Listener, recipe

STEPS = 12
PLACES = 2 * 7  # layers, linear modules


def adalora(base: Path, source: Path, out: Path, **config: Any) -> Recipe:
    config = {"init_r": 4, "target_r": 2, "target_modules": "all-linear", **config}
    return recipe(
        base,
        source,
        out,
        adapter={"method": "adalora", "config": config},
        train={"max_steps": STEPS, "save_steps": 1, "keep_checkpoints": STEPS},
        evaluate={"max_rows": 4, "max_new_tokens": 4},
    )


@pytest.fixture(scope="module")
def finished(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Recipe]:
    chosen = adalora(random_base, colours, tmp_path_factory.mktemp("adalora") / "whole")
    train(chosen, reporter=Listener())
    return RunDir(str(chosen.out)), chosen


def weights(run_dir: RunDir) -> dict[str, Any]:
    return load_file(run_dir.adapter / "adapter_model.safetensors")


def test_ranks_are_pruned_to_the_budget_and_dropped_from_the_file(
    finished: tuple[RunDir, Recipe],
) -> None:
    ranks = [tensor.shape[0] for key, tensor in weights(finished[0]).items() if "lora_E" in key]
    assert len(ranks) == PLACES
    assert sum(ranks) == 2 * PLACES
    assert len(set(ranks)) > 1
    written = json.loads((finished[0].adapter / "adapter_config.json").read_text())
    assert (written["total_step"], written["tinit"], written["tfinal"]) == (12, 2, 2)


def test_a_pruned_adapter_is_loaded_again(finished: tuple[RunDir, Recipe]) -> None:
    run_dir, chosen = finished
    check_fits(chosen.model, run_dir.adapter)
    model = load_adapter(load_base(chosen.model), run_dir.adapter)
    ranks = [p.shape[0] for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(ranks) == 2 * PLACES
    whole = load_adapter(load_base(chosen.model), run_dir.checkpoint(STEPS))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        found = [m.eval()(input_ids=ids).logits for m in (model, whole)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [6, 11, STEPS], ids=["while pruning", "after", "at the end"])
def test_a_run_that_is_resumed_ends_with_the_same_bytes(
    step: int, finished: tuple[RunDir, Recipe], tmp_path: Path
) -> None:
    whole, chosen = finished
    broken = RunDir(tmp_path / "broken")
    shutil.copytree(whole.path, broken.path)
    broken.summary.unlink()
    shutil.rmtree(broken.adapter)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(broken.checkpoint(later))
    train(chosen.model_copy(update={"out": str(broken.path)}), resume=True, reporter=Listener())
    name = "adapter_model.safetensors"
    assert (broken.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_are_pruned_as_well(
    steps: int, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = adalora(random_base, colours, tmp_path / "run")
    short = chosen.model_copy(
        update={"train": chosen.train.model_copy(update={"max_steps": steps})}
    )
    train(short, reporter=Listener())
    found = weights(RunDir(tmp_path / "run"))
    assert sum(t.shape[0] for key, t in found.items() if "lora_E" in key) == 2 * PLACES


def test_phases_that_leave_no_step_to_prune_are_refused(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = adalora(random_base, colours, tmp_path / "run", tinit=8, tfinal=4)
    with pytest.raises(RecipeError, match=r"tinit 8 and tfinal 4 leave no step .* the run has 12"):
        train(chosen, reporter=Listener())
