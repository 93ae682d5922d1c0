"""Several adapters: difference, cosine and sign conflict of known matrices, and the prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.merge_info.matrices import TrainedMatrix
from prefixtune_cli.merge_info.one_adapter import gather
from prefixtune_cli.merge_info.pairs import (
    Likeness,
    Pair,
    distinct_names,
    likeness,
    pairs,
    predict,
)
from prefixtune_cli.model import load_base
from prefixtune_cli.pointed import point
from prefixtune_cli.recipe.schema import ModelSection

from .conftest import MEMORY, Make, change, dense, lora, memory, prefix


def compared(*folders: Path) -> Pair:
    (pair,) = pairs([gather(point(folder)) for folder in folders])
    return pair


def matrices(*by_layer: Tensor) -> dict[str, TrainedMatrix]:
    return {
        str(layer): TrainedMatrix(layer, "attention", values[None])
        for layer, values in enumerate(by_layer)
    }


def test_cosine_and_sign_conflict_are_those_of_the_entries() -> None:
    a = matrices(torch.tensor([[3.0, 0], [0, 4]]), torch.tensor([[1.0, 2], [2, 1]]))
    b = matrices(torch.tensor([[4.0, 0], [0, 3]]), torch.tensor([[1.0, -1], [-4, 4]]))
    (first, second), whole = likeness(a, b)
    assert (first.cosine, first.sign_conflict) == pytest.approx((24 / 25, 0))
    assert first.norm_ratio == pytest.approx(1)
    # products 1, -2, -8, 4; the smaller of each pair 1, 1, 2, 1; the second and the third conflict
    assert second.cosine == pytest.approx(-5 / (10 * 34) ** 0.5)
    assert second.sign_conflict == pytest.approx(3 / 5)
    assert second.norm_ratio == pytest.approx((34 / 10) ** 0.5)
    assert whole is not None
    assert whole.cosine == pytest.approx(19 / (35 * 59) ** 0.5)


def test_products_are_compared_as_if_they_were_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "prefixtune_cli.merge_info.pairs._ENTRIES_AT_ONCE", 20
    )  # a few rows at a time
    torch.manual_seed(0)
    a, b = (
        TrainedMatrix(0, "q_proj", torch.randn(1, 9, rank), torch.randn(1, rank, 7))
        for rank in (2, 3)
    )
    _, products = likeness({"q": a}, {"q": b})
    _, stored_dense = likeness(
        {"q": TrainedMatrix(0, "q_proj", dense(a))}, {"q": TrainedMatrix(0, "q_proj", dense(b))}
    )
    assert products is not None
    assert stored_dense is not None
    assert products.cosine == pytest.approx(stored_dense.cosine, rel=1e-5)
    assert products.sign_conflict == pytest.approx(stored_dense.sign_conflict, rel=1e-5)
    expected = torch.nn.functional.cosine_similarity(dense(a).flatten(), dense(b).flatten(), dim=0)
    assert products.cosine == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("cosine", "conflict", "word"),
    [
        (0.02, 0.49, "near orthogonal"),
        (-0.2, 0.55, "cancel"),
        (0.05, 0.7, "cancel"),
        (0.8, 0.1, "nearly the same"),
        (0.3, 0.4, "share a part"),
        (float("nan"), float("nan"), "one of them is zero"),
    ],
)
def test_the_prediction_follows_its_rule(cosine: float, conflict: float, word: str) -> None:
    assert word in predict(Likeness(None, cosine, conflict, 1.0))


def test_layers_that_cancel_are_named_where_the_whole_does_not() -> None:
    layers = [Likeness(0, 0.2, 0.4, 1.0), Likeness(1, -0.5, 0.8, 1.0)]
    assert predict(Likeness(None, 0.0, 0.5, 1.0), layers).endswith("But they cancel in layers 1.")


def test_independent_adapters_of_one_kind_can_be_merged_and_are_near_orthogonal(make: Make) -> None:
    pair = compared(make("a", memory()), make("b", memory(), seed=1))
    assert pair.difference is None
    assert pair.bridged == ()
    assert pair.whole is not None
    assert abs(pair.whole.cosine) < 0.1
    assert pair.whole.sign_conflict == pytest.approx(0.5, abs=0.05)
    assert "near orthogonal" in pair.prediction
    assert [found.layer for found in pair.by_layer] == [0, 1]


def test_an_adapter_and_its_negative_cancel(make: Make) -> None:
    a, b = make("a", memory()), make("b", memory())
    change(b, lambda tensors: [tensor.neg_() for tensor in tensors.values()])
    pair = compared(a, b)
    assert pair.whole is not None
    assert (pair.whole.cosine, pair.whole.sign_conflict) == pytest.approx((-1, 1))
    assert "cancel" in pair.prediction


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (memory(), lora(), "method: prefix-tuning-plus against lora"),
        (memory(), memory(feature_map="gelu"), "feature_map: elu against gelu"),
        (memory(), memory(normalize_query=True), "normalize_query: False against True"),
        (memory(share_heads="kv"), memory(), "share_heads: kv against query"),
        (memory(), memory(sites="ffn"), "sites: attention against ffn"),
        (lora(), lora(use_dora=True), "use_dora, which has no sum: False against True"),
        (lora(bias="all"), lora(bias="all"), "bias, which has no sum: all against all"),
    ],
    ids=["method", "map", "normalize", "heads", "sites", "dora", "bias"],
)
def test_the_first_difference_is_named(make: Make, a, b, difference: str) -> None:
    assert str(compared(make("a", a), make("b", b)).difference) == difference


def test_another_base_and_another_revision_are_named_before_all_else(make: Make) -> None:
    a, b = make("a", memory()), make("b", memory(feature_map="gelu"))

    def rebased(**changes: str) -> str:
        config = json.loads((b / "adapter_config.json").read_text())
        (b / "adapter_config.json").write_text(json.dumps(config | changes))
        return str(compared(a, b).difference)

    assert rebased(revision="v2") == "revision of the base: main against v2"
    assert rebased(base_model_name_or_path="some-org/other").endswith("against some-org/other")


@pytest.mark.parametrize("other", ["pissa", True])
def test_a_lora_that_has_changed_its_base_is_not_said_to_be_mergeable(make: Make, other) -> None:
    """`ptp merge` refuses it by the same rule."""
    a, b = make("a", lora()), make("b", lora())
    for folder, drawn in ((a, "pissa"), (b, other)):
        settings = folder / "adapter_config.json"
        config = json.loads(settings.read_text())
        settings.write_text(json.dumps(config | {"init_lora_weights": drawn}))
    told = f"init_lora_weights, which has changed the base's weights: pissa against {other}"
    assert str(compared(a, b).difference) == told


def test_prefixes_cannot_be_added(make: Make) -> None:
    pair = compared(make("a", prefix()), make("b", prefix()))
    assert str(pair.difference) == "adapters of prefix-tuning have no sum"
    assert pair.whole is None


@pytest.mark.parametrize(
    ("a", "b", "bridged"),
    [
        (memory(), memory(layers=[1]), "layers: 0, 1 against 1"),
        (lora(), lora(r=4), "rank of model.layers.0.self_attn.q_proj: 2 against 4"),
        (
            lora(),
            lora(target_modules=["v_proj"]),
            "model.layers.0.self_attn.q_proj: adapted against not adapted",
        ),
    ],
    ids=["layers", "rank", "modules"],
)
def test_differences_that_a_merge_can_bridge_are_named_and_do_not_stop_it(
    make: Make, a, b, bridged: str
) -> None:
    pair = compared(make("a", a), make("b", b))
    assert pair.difference is None
    assert str(pair.bridged[0]) == bridged


def test_m_under_trained_maps_is_compared_only_where_the_maps_are_equal(make: Make) -> None:
    mlp = {"feature_map": "mlp", "feature_dim": 6}
    a, b = make("a", memory(**mlp)), make("b", memory(**mlp))
    same = compared(a, b)
    assert same.whole is not None
    assert same.whole.cosine == pytest.approx(1)
    key = MEMORY.format(1, "self_attn", "b_phi")
    change(b, lambda tensors: tensors[key].add_(1))
    pair = compared(a, b)
    assert pair.whole is None
    assert "comparable only where W_phi and b_phi are equal" in pair.incomparable
    assert "layers.1.self_attn.b_phi" in pair.incomparable
    assert pair.difference is None
    assert "side by side" in pair.bridged[0].merged_by


def test_entries_that_other_heads_read_are_not_compared(make: Make) -> None:
    a = make("a", memory(sites="attention+ffn", share_heads="kv"))
    pair = compared(a, make("b", memory(), seed=1))
    assert str(pair.difference) == "share_heads: kv against query"
    assert pair.incomparable.startswith("share_heads differs")
    assert pair.whole is None


def test_low_rank_m_is_compared_with_a_dense_one(make: Make) -> None:
    pair = compared(make("a", memory(rank=4)), make("b", memory(), seed=1))
    assert pair.difference is None
    assert pair.whole is not None


def test_what_is_said_to_merge_is_merged_and_what_is_not_is_refused(
    make: Make, random_base: Path
) -> None:
    """The verdict is the merge's own."""
    base = ModelSection(name=str(random_base), bits=32, device="cpu")
    a = make("a", memory())
    for name, config, seed in (
        ("b", memory(layers=[1], rank=2), 1),
        ("c", memory(feature_map="gelu"), 2),
    ):
        other = make(name, config, seed=seed)
        model = load_adapter(load_base(base), a)
        model.load_adapter(str(other), "other")
        if compared(a, other).difference is None:
            model.base_model.add_weighted_adapter(["default", "other"], [1, 1], "both")
            assert "both" in model.peft_config
        else:
            with pytest.raises(ValueError, match="feature_map"):
                model.base_model.add_weighted_adapter(["default", "other"], [1, 1], "both")


def test_every_two_of_three_are_compared_and_equal_names_are_told_apart(
    make: Make, tmp_path: Path
) -> None:
    folders = [make(name, memory(), seed=i) for i, name in enumerate(("a/x", "b/x/adapter", "z"))]
    facts = [gather(point(folder)) for folder in folders]
    assert distinct_names(facts) == ["1-x", "2-x", "3-z"]
    found = [(pair.first, pair.second) for pair in pairs(facts)]
    assert found == [("1-x", "2-x"), ("1-x", "3-z"), ("2-x", "3-z")]
    assert distinct_names(facts[1:]) == ["x", "z"]
