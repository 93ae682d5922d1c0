"""Recipes and flags of TRL, LLaMA-Factory and Axolotl get an answer for every key."""

from pathlib import Path

import pytest

from prefixtune_cli.errors import RecipeError
from prefixtune_cli.recipe.explain import METHODS, keys
from prefixtune_cli.recipe.foreign import COUNTERPARTS, NEEDLESS, NOTES
from prefixtune_cli.recipe.load import resolve

LLAMA_FACTORY = """\
### model
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
resume_from_checkpoint: null
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: qlora
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
wandb_project:
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
bf16: auto
tf32: false
flash_attention: true
special_tokens:
  pad_token: "<|end_of_text|>"
"""
TRL = """\
model_name_or_path: Qwen/Qwen2-0.5B
dataset_name: trl-lib/Capybara
learning_rate: 2.0e-4
max_steps: 100
packing: true
use_peft: true
eval_strategy: steps
warmup_steps: 10
torch_dtype: bfloat16
"""


@pytest.mark.parametrize("text", [LLAMA_FACTORY, AXOLOTL, TRL], ids=["llama", "axolotl", "trl"])
def test_every_key_of_theirs_is_answered_by_name_at_its_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        resolve(str(file))
    told = {line.strip().partition(": ")[0]: line for line in str(caught.value).splitlines()[1:]}
    given = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line[0] not in "# "]
    for number, line in given:
        answer = told[f"{file}:{number}"]
        assert line.partition(":")[0] in answer
        assert " here" in answer or "Did you mean " in answer or "adapter: {method: " in answer


def test_an_answer_says_the_value_and_what_is_not_the_same(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("load_in_4bit: true\nwarmup_steps: 10\ndo_train: true\noutput_dir: x\n")
    with pytest.raises(RecipeError) as caught:
        resolve(str(file))
    said = str(caught.value)
    assert "load_in_4bit is model.bits: 4 here, if it is true; otherwise leave it out" in said
    assert "warmup_steps is train.warmup_ratio here, a fraction of all steps" in said
    assert "do_train has no counterpart here: `ptp train` always fine-tunes" in said
    assert "output_dir is out here" in said


def test_every_counterpart_is_a_setting_or_a_flag() -> None:
    known = {key for method in METHODS for key in keys(method)}
    settings = {ours.partition("=")[0] for ours in COUNTERPARTS.values() if ours[0] != "-"}
    assert {key for key in settings if not key.startswith("adapter.config.")} <= known
    assert not COUNTERPARTS.keys() & NEEDLESS.keys()
    assert NOTES.keys() <= COUNTERPARTS.keys()
