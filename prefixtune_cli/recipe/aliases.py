"""Short names of base models, and what `model.name` may be.

Sizes and licences are from the models' hub pages. "gated" means that the hub gives the weights only to
an account that has accepted the licence there (`hf auth login` on this machine, once).
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from prefixtune_cli.errors import ModelError
from prefixtune_cli.recipe.gguf_header import is_gguf
from prefixtune_cli.run_dir import RunDir

HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


@dataclass(frozen=True)
class KnownModel:
    """A row of `ptp models`."""

    alias: str
    hub_id: str
    parameters: str
    licence: str
    gated: bool = False


LLAMA_2 = "Llama 2 Community"
LLAMA_3_1 = "Llama 3.1 Community"
LLAMA_3_2 = "Llama 3.2 Community"

MODELS = (
    KnownModel("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", "0.13B", "Apache-2.0"),
    KnownModel(
        "smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "0.13B", "Apache-2.0"
    ),
    KnownModel("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", "0.36B", "Apache-2.0"),
    KnownModel(
        "smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", "0.36B", "Apache-2.0"
    ),
    KnownModel("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", "1.7B", "Apache-2.0"),
    KnownModel(
        "smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "1.7B", "Apache-2.0"
    ),
    KnownModel("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "1.1B", "Apache-2.0"),
    KnownModel("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", "0.49B", "Apache-2.0"),
    KnownModel("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", "0.49B", "Apache-2.0"),
    KnownModel("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "1.5B", "Apache-2.0"),
    KnownModel("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", "1.5B", "Apache-2.0"),
    KnownModel("qwen2.5-3b", "Qwen/Qwen2.5-3B", "3.1B", "Qwen Research"),
    KnownModel("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", "3.1B", "Qwen Research"),
    KnownModel("qwen2.5-7b", "Qwen/Qwen2.5-7B", "7.6B", "Apache-2.0"),
    KnownModel("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", "7.6B", "Apache-2.0"),
    KnownModel("qwen2.5-math-7b", "Qwen/Qwen2.5-Math-7B", "7.6B", "Apache-2.0"),
    KnownModel("qwen3-0.6b", "Qwen/Qwen3-0.6B", "0.6B", "Apache-2.0"),
    KnownModel("qwen3-1.7b", "Qwen/Qwen3-1.7B", "1.7B", "Apache-2.0"),
    KnownModel("qwen3-4b", "Qwen/Qwen3-4B", "4.0B", "Apache-2.0"),
    KnownModel("qwen3-8b", "Qwen/Qwen3-8B", "8.2B", "Apache-2.0"),
    KnownModel("qwen3-14b", "Qwen/Qwen3-14B", "14.8B", "Apache-2.0"),
    KnownModel("qwen3-32b", "Qwen/Qwen3-32B", "32.8B", "Apache-2.0"),
    KnownModel("mistral-7b", "mistralai/Mistral-7B-v0.3", "7.2B", "Apache-2.0"),
    KnownModel("mistral-7b-instruct", "mistralai/Mistral-7B-Instruct-v0.3", "7.2B", "Apache-2.0"),
    KnownModel("llama2-7b", "meta-llama/Llama-2-7b-hf", "6.7B", LLAMA_2, gated=True),
    KnownModel("llama2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", "6.7B", LLAMA_2, gated=True),
    KnownModel("llama3.1-8b", "meta-llama/Llama-3.1-8B", "8.0B", LLAMA_3_1, gated=True),
    KnownModel(
        "llama3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", "8.0B", LLAMA_3_1, gated=True
    ),
    KnownModel("llama3.2-1b", "meta-llama/Llama-3.2-1B", "1.2B", LLAMA_3_2, gated=True),
    KnownModel(
        "llama3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", "1.2B", LLAMA_3_2, gated=True
    ),
    KnownModel("llama3.2-3b", "meta-llama/Llama-3.2-3B", "3.2B", LLAMA_3_2, gated=True),
    KnownModel(
        "llama3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", "3.2B", LLAMA_3_2, gated=True
    ),
    KnownModel("gemma2-2b", "google/gemma-2-2b", "2.6B", "Gemma", gated=True),
    KnownModel("gemma2-2b-instruct", "google/gemma-2-2b-it", "2.6B", "Gemma", gated=True),
    KnownModel("gemma2-9b", "google/gemma-2-9b", "9.2B", "Gemma", gated=True),
    KnownModel("gemma2-9b-instruct", "google/gemma-2-9b-it", "9.2B", "Gemma", gated=True),
    KnownModel("gemma3-1b", "google/gemma-3-1b-pt", "1.0B", "Gemma", gated=True),
    KnownModel("gemma3-1b-instruct", "google/gemma-3-1b-it", "1.0B", "Gemma", gated=True),
    KnownModel("gemma3-4b", "google/gemma-3-4b-pt", "4.3B", "Gemma", gated=True),
    KnownModel("gemma3-4b-instruct", "google/gemma-3-4b-it", "4.3B", "Gemma", gated=True),
    KnownModel("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct", "3.8B", "MIT"),
    KnownModel("phi-4-mini", "microsoft/Phi-4-mini-instruct", "3.8B", "MIT"),
    KnownModel("phi-4", "microsoft/phi-4", "14.7B", "MIT"),
    KnownModel("olmo2-1b", "allenai/OLMo-2-0425-1B", "1.5B", "Apache-2.0"),
    KnownModel("olmo2-1b-instruct", "allenai/OLMo-2-0425-1B-Instruct", "1.5B", "Apache-2.0"),
    KnownModel("olmo2-7b", "allenai/OLMo-2-1124-7B", "7.3B", "Apache-2.0"),
    KnownModel("olmo2-7b-instruct", "allenai/OLMo-2-1124-7B-Instruct", "7.3B", "Apache-2.0"),
)
ALIASES = {model.alias: model.hub_id for model in MODELS}


def packaged_model() -> Path:
    """The folder of `tiny`, the model that comes inside the package."""
    return Path(str(files("prefixtune_cli"))) / "assets" / "tiny"


def resolve(name: str) -> str:
    """What to load for `model.name`: a folder, a GGUF file or a hub id.

    Args:
        name: `tiny`, an alias, a local folder or GGUF file, or a hub id. An alias wins over a folder of the same
            name; `./name` is the folder.

    Raises:
        ModelError: it is none of these.
    """
    if name == "tiny":
        return str(packaged_model())
    if name.lower() in ALIASES:
        return ALIASES[name.lower()]
    path = Path(name).expanduser()
    if name and path.exists():
        return str(path)
    if name.lower().endswith(".gguf"):
        raise ModelError(
            f"There is no file {name} here. Check its name, or, if it is on the hub, type: "
            "hf download ORGANISATION/NAME FILE.gguf --local-dir ."
        )
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    near = get_close_matches(name.lower(), ["tiny", *ALIASES], n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ModelError(
        f"There is no model {name!r}: it is not a folder or GGUF file on this machine, not an alias of "
        f"`ptp models`, and not a hub id of the form organisation/name.{hint}"
    )


def check_local_model(path: str | Path) -> None:
    """Refuse a path that holds no base model, before anything is loaded from it.

    Args:
        path: a folder, or a GGUF file; only the beginning of the file is read.

    Raises:
        ModelError: it is another file, an adapter, a run or a folder of GGUF files, or lacks its config or its weights.
    """
    folder = Path(path)
    if is_gguf(folder):
        return
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is a file, but not a GGUF file; a base model is a folder with config.json and weights, or one "
            "GGUF file."
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is an adapter, not a base model. Its base is {_base_of(folder)}."
            )
        if (run := RunDir(folder)).recipe.is_file():
            raise ModelError(
                f"{folder} is a run of `ptp train`, not a base model. To go on with it, type: {run.resume_command}; to "
                f"train its adapter on, --from {folder} in place of --model; to train again, give its base with "
                "--model (`ptp runs` lists it)."
            )
        _check_no_gguf(folder)
        raise ModelError(f"{folder} is not a model: it has no config.json.")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        _check_no_gguf(folder)
        raise ModelError(
            f"{folder} has a config.json but no weights (*.safetensors or *.bin): is the download whole?"
        )


def _check_no_gguf(folder: Path) -> None:
    """Refuse a folder of GGUF files: several of them are one model at several precisions."""
    if files := sorted(folder.glob("*.gguf")):
        which = "one of them" if len(files) > 1 else "the file itself"
        more = f" (and {len(files) - 3} more)" if len(files) > 3 else ""
        lines = ", or ".join(f"--model {shlex.quote(str(file))}" for file in files[:3])
        raise ModelError(f"{folder} holds GGUF files; give {which}: {lines}{more}")


def _base_of(adapter: Path) -> str:
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError):
        return "named in its adapter_config.json"
