import pytest
import torch

import prefixtune_cli.adapter  # noqa: F401  (registers the method)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
