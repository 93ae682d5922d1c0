"""What the method needs from PEFT and transformers; each claim names the internals that it depends on."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefixtune_cli.adapter import PrefixTuningPlusConfig, PrefixTuningPlusModel
from prefixtune_cli.adapter.register import register

BEFORE_AND_AFTER = """
import inspect, json, pickle, sys
import torch
torch.set_num_threads(1)
from peft import PeftType, get_peft_model
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

facts = {"names_before": [member.value for member in PeftType]}
facts["get_interface"] = list(inspect.signature(AttentionInterface.get_interface).parameters)
original = AttentionInterface.get_interface

def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )).eval()

def logits(model):
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits

bystander = llama()
before = logits(bystander)

import prefixtune_cli.adapter as adapter
facts["hook_waits_for_a_model"] = AttentionInterface.get_interface is original
facts["names_after"] = [member.value for member in PeftType]
sent = pickle.loads(bytes.fromhex(sys.argv[1]))
facts["pickle_is_the_member"] = sent["type"] is PeftType.PREFIX_TUNING_PLUS
facts["pickled_config"] = [type(sent["config"]).__name__, sent["config"].layers]

adapted = get_peft_model(llama(), adapter.PrefixTuningPlusConfig(init_weights=False))
facts["hook_is_installed"] = AttentionInterface.get_interface is not original
facts["adapted_differs"] = not torch.equal(logits(adapted), before)
facts["bystander_is_unchanged"] = torch.equal(logits(bystander), before)
facts["new_base_is_unchanged"] = torch.equal(logits(llama()), before)
print("FACTS" + json.dumps(facts))
"""


@pytest.fixture(scope="module")
def fresh_process() -> dict[str, object]:
    """What a process sees that imports PEFT first, and then this method."""
    sent = pickle.dumps(
        {"type": PeftType.PREFIX_TUNING_PLUS, "config": PrefixTuningPlusConfig(layers="last:2")}
    )
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_AND_AFTER, sent.hex()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FACTS")[1])


def test_peft_has_no_method_of_this_name_itself(fresh_process):
    assert "PREFIX_TUNING_PLUS" not in fresh_process["names_before"]
    assert "LORA" in fresh_process["names_before"]


def test_import_adds_one_member_to_pefts_enum_and_changes_no_other(fresh_process):
    assert fresh_process["names_after"] == [*fresh_process["names_before"], "PREFIX_TUNING_PLUS"]


def test_type_and_config_can_be_unpickled_in_another_process(fresh_process):
    assert fresh_process["pickle_is_the_member"]
    assert fresh_process["pickled_config"] == ["PrefixTuningPlusConfig", "last:2"]


def test_hook_leaves_models_without_an_adapter_bit_identical(fresh_process):
    assert fresh_process["hook_waits_for_a_model"]
    assert fresh_process["hook_is_installed"]
    assert fresh_process["adapted_differs"]
    assert fresh_process["bystander_is_unchanged"]
    assert fresh_process["new_base_is_unchanged"]


def test_attention_interface_has_the_one_method_that_the_hook_wraps(fresh_process):
    expected = ["self", "attn_implementation", "default"]
    assert fresh_process["get_interface"] == expected
    assert list(inspect.signature(AttentionInterface.get_interface).parameters) == expected
    assert isinstance(ALL_ATTENTION_FUNCTIONS, AttentionInterface)
    assert type(ALL_ATTENTION_FUNCTIONS).get_interface is AttentionInterface.get_interface


def test_enum_member_behaves_like_one_that_peft_defines_itself():
    member = PeftType.PREFIX_TUNING_PLUS
    assert PeftType("PREFIX_TUNING_PLUS") is member
    assert PeftType["PREFIX_TUNING_PLUS"] is member
    assert isinstance(member, PeftType)
    assert vars(member).keys() == vars(PeftType.LORA).keys()
    assert member._sort_order_ == list(PeftType).index(member)
    assert (member.name, member.value) == ("PREFIX_TUNING_PLUS", "PREFIX_TUNING_PLUS")
    assert member in PeftType
    assert member in list(PeftType)
    assert "PREFIX_TUNING_PLUS" in list(PeftType)
    assert member == "PREFIX_TUNING_PLUS"
    assert hash(member) == hash("PREFIX_TUNING_PLUS")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "PREFIX_TUNING_PLUS")
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"PREFIX_TUNING_PLUS"'


def test_enum_stays_closed_to_other_names():
    with pytest.raises(ValueError, match="PREFIX_TUNING_MINUS"):
        PeftType("PREFIX_TUNING_MINUS")


def test_peft_maps_the_type_to_this_config_tuner_and_prefix():
    member = PeftType.PREFIX_TUNING_PLUS
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is PrefixTuningPlusConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is PrefixTuningPlusModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == PrefixTuningPlusModel.prefix


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register(PrefixTuningPlusConfig, PrefixTuningPlusModel)
    assert list(PeftType) == before
