"""Whether a model generates what it computes. This is checked before its answers are trusted.

`generate` keeps keys and values and prepares its own inputs, and peft hooks into that. A new version of a library can
therefore lose the adapter only in `generate`, while its loss stays right. Every comparison would be unfair, and nobody
would notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.data.row_encoder import start_ids, with_start
from prefixtune_cli.errors import ModelError, PtpError
from prefixtune_cli.parallel.sharding import is_sharded
from prefixtune_cli.recipe.schema import canonical

LIBRARIES = ("peft", "transformers", "torch")
TOKENS = 8  # to generate
PROMPT_TOKENS = 32  # of the prompt, at most
# If logits are further apart than this many units of the precision, rounding is measured (see `_rounding`). With a
# 30-layer base in bfloat16 they were 2 to 6 units apart.
UNITS = 8
# GPUs may multiply float32 with as few bits as TF32 has.
FEWEST_UNIT = 2.0**-10
# Passes of one token, as in `generate`, may differ by up to four times the rounding between passes of several tokens.
ROUNDINGS = 4


def check_generation(
    model: PreTrainedModel | PeftModel, prompt: Sequence[int], *, then: str
) -> str | None:
    """Check that the logits of `generate`, token by token, are those of a plain forward pass over the same tokens.

    Decoding is greedy, and uses no random numbers. If there are several processes, each checks its own model.

    Args:
        model: a causal language model, its adapter active.
        prompt: token ids; only the first few are used.
        then: what to do after the libraries are changed, for the error.

    Returns:
        None if all is well; else why the check is not possible.

    Raises:
        ModelError: the logits differ by more than rounding, or `generate` fails only with the adapter.
    """
    if is_sharded(model):
        return "the weights are spread over several processes"
    with torch.no_grad(), models.evaluating(model):
        return _verdict(model, list(prompt)[:PROMPT_TOKENS], then)


def any_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids of a sentence, for adapters that come without data."""
    ids = tokenizer("Say what you have learned about this.", add_special_tokens=False)["input_ids"]
    return with_start(start_ids(tokenizer), ids)


def _verdict(model: Any, prompt: list[int], then: str) -> str | None:
    try:
        apart, rounding = _apart(model, prompt)
    except (PtpError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if not isinstance(model, PeftModel) or not _base_generates(model, prompt):
            return f"this base cannot generate: {type(error).__name__}: {error}"
        raise ModelError(
            f"Method {_method(model)} cannot generate on this base, although the base alone can: "
            f"{type(error).__name__}: {error} {_remedy(then)}"
        ) from error
    if apart <= rounding:
        return None
    base_too = ""
    if isinstance(model, PeftModel):
        with models.without_adapter(model):
            its, allowed = _apart(model, prompt)
        base_too = "" if its <= allowed else " So do those of the base alone."
    raise ModelError(
        f"With method {_method(model)} this model does not generate what it computes: the logits of `generate` differ "
        f"by {apart:.1%} from those of a forward pass over the same tokens, and rounding explains {rounding:.1%}."
        f"{base_too} Its answers would not come from the trained weights. {_remedy(then)}"
    )


def _apart(model: Any, prompt: list[int]) -> tuple[float, float]:
    """How far the logits of `generate` are from a forward pass's, and how far rounding may take them."""
    ids = torch.tensor([prompt], device=model.device)
    output: Any = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        min_new_tokens=TOKENS,
        pad_token_id=0,
        num_beams=1,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    made = torch.cat(output.logits).float()
    read = output.sequences[:, :-1]
    with _multiplied_in(model) as precisions:
        computed = _logits(model, read)[-TOKENS:]
    apart = _distance(made, computed)
    unit = max(FEWEST_UNIT, *(torch.finfo(precision).eps for precision in precisions))
    allowed = UNITS * unit
    if not apart <= allowed:
        allowed += ROUNDINGS * _rounding(model, read, computed)
    return apart, allowed


@contextmanager
def _multiplied_in(model: Any) -> Iterator[set[torch.dtype]]:
    """The precisions in which a pass within the block multiplies: that of the weights, and autocast's.

    Method full keeps float32 weights, and training leaves its autocast to bfloat16 around the model.
    """
    found, kind = {model.dtype}, model.device.type

    def look(*_: Any) -> None:
        if torch.is_autocast_enabled(kind):
            found.add(torch.get_autocast_dtype(kind))

    hook = model.get_input_embeddings().register_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def _rounding(model: Any, read: torch.Tensor, computed: torch.Tensor) -> float:
    """How far the last logits of shorter passes are from those of the whole pass. They differ only by rounding.

    The distance depends on the weights, on outliers (8 bits) and on kernels, so no table can give it.
    """
    shorter = [_logits(model, read[:, : read.shape[1] - i])[-1] for i in reversed(range(TOKENS))]
    return _distance(torch.stack(shorter), computed)


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits, [positions, vocabulary], in float32. Virtual tokens come first."""
    found: torch.Tensor = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).logits
    return found[0].float()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative distance of logits `a` from `b`, both [positions, vocabulary]. Shifts of all tokens do not count."""
    tokens = b.isfinite().all(0)  # some models mask what pads their vocabulary
    a, b = a[:, tokens], b[:, tokens]
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny))


def _base_generates(model: PeftModel, prompt: list[int]) -> bool:
    try:
        with models.without_adapter(model):
            _apart(model, prompt)
    except Exception:
        return False
    return True


def _method(model: Any) -> str:
    return canonical(model.peft_type.value.lower()) if isinstance(model, PeftModel) else "full"


def _remedy(then: str) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return (
        f"These libraries do not work together: {versions}. Type pip install --upgrade peft transformers, or install "
        f"versions that have worked here; then {then}"
    )
