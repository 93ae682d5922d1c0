"""Where data is: a file, a folder, a sample that ships with ptp, or a hub data set id."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path

from prefixtune_cli.data import folders
from prefixtune_cli.data.folders import LocalFiles
from prefixtune_cli.data.lines import Rows, start_of
from prefixtune_cli.data.read import READERS
from prefixtune_cli.data.stored import dataset_rows
from prefixtune_cli.errors import DataError, ResourceError, UsageError, first_line

SUFFIXES = ", ".join(READERS)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")
HUB_TIMEOUT_SECONDS = 10.0


def samples_folder() -> Path:
    return Path(str(resources.files("prefixtune_cli"))) / "assets" / "samples"


def near_names(path: Path) -> str:
    """What the folder holds instead: files with similar names, or a few of its data files."""
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
    data = [name for name in names if Path(name).suffix.lower() in READERS][:5]
    return f"The data files in {folder} are: {', '.join(data) or 'none'}."


def local_files(source: str) -> LocalFiles | None:
    """The files that `source` stands for, or None if it is a hub data set id.

    Raises:
        DataError: there is no such file, folder or sample, or it has no data of a known type.
    """
    if source.startswith("sample:"):
        return _sample(source.removeprefix("sample:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return folders.in_folder(path, None)
    if path.exists():
        suffix = path.suffix.lower()
        if suffix not in READERS:
            packed = suffix in (".gz", ".zst", ".bz2", ".xz", ".zip")
            raise DataError(
                f"{path}: the type {suffix or '(no suffix)'!r} is not known; the types are {SUFFIXES}. "
                + (
                    "Unpack it first."
                    if packed
                    else "Convert it, or rename it if it is one of these."
                )
            )
        return LocalFiles([path])
    folders.refuse_dangling(path)
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return folders.in_folder(Path(folder).expanduser(), split)
    looks_like_a_path = (
        path.suffix.lower() in READERS
        or not HUB_ID.fullmatch(source)
        or (path.parent != Path(".") and path.parent.is_dir())
        or source.startswith((".", "~"))
    )
    if looks_like_a_path:
        raise DataError(f"The data file {source} does not exist. {near_names(path)}")
    return None


def _sample(name: str) -> LocalFiles:
    known = sorted(p.stem for p in samples_folder().glob("*.jsonl"))
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean sample:{near[0]}?" if near else ""
        raise DataError(
            f"There is no sample {name!r}; the samples are {', '.join(known) or 'none'}.{hint}"
        )
    return LocalFiles([samples_folder() / f"{name}.jsonl"])


def check_sources(*sources: str | None) -> None:
    """Raise DataError if a local source is missing, or not of a known type. A source of None is skipped."""
    for source in sources:
        if source is not None:
            local_files(source)


def check_exists(what: str, file: str) -> None:
    """Raise DataError if a file is missing. `what` it is begins the message."""
    path = Path(file).expanduser()
    if not path.exists():
        raise DataError(f"{what} {file} does not exist. {near_names(path)}")


def named(train: str | None) -> str:
    """The training data; raises UsageError if none is given."""
    if train is None:
        raise UsageError(
            "No data is given. Type --data FILE, or --recipe quickstart for an example."
        )
    return train


def check_text(source: str) -> bool:
    """Whether `source` is a plain text; if not, it is data like any other.

    Raises:
        DataError: a local file is missing, or not of a known type.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt" or (path.is_file() and path.suffix.lower() not in READERS):
        check_exists("The text", source)
        return True
    local_files(source)
    return False


def hub_rows(source: str) -> Rows:
    """Rows of a hub data set: `ID`, `ID:SPLIT` or `ID:CONFIG:SPLIT`; the split is `train` if unnamed.

    Raises:
        ResourceError: the hub cannot be reached, or access is refused.
        DataError: there is no such data set, configuration or split.
    """
    import datasets

    name, _, rest = source.partition(":")
    config, _, split = rest.rpartition(":")
    local = f"Give a local file. If you mean one, it does not exist. {near_names(Path(name))}"
    offline = bool(datasets.config.HF_HUB_OFFLINE)
    ask_hub(name, local)
    try:
        data = datasets.load_dataset(name, config or None, split=split or "train")
    except ConnectionError as error:
        raise ResourceError(
            f"The hub data set {name} is not in the cache"
            + (", and HF_HUB_OFFLINE is set. Unset it to download." if offline else f": {error}")
            + f" {local}"
        ) from error
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"The hub data set {source} cannot be loaded: {_first_line(error)} "
            "The form is ID, ID:SPLIT or ID:CONFIG:SPLIT."
        ) from error
    return dataset_rows(data)


def ask_hub(name: str, instead: str) -> None:
    """Ask the hub for the data set `name`, once.

    One request shows whether the hub answers, so a machine without network neither hangs nor retries. With
    HF_HUB_OFFLINE=1 nothing is asked, and the copy in the cache is used.

    Args:
        name: the data set's id.
        instead: what to do without the hub, for the end of the error.

    Raises:
        ResourceError: the hub cannot be reached, or access is refused.
        DataError: there is no such data set.
    """
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if datasets.config.HF_HUB_OFFLINE:
        return
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise ResourceError(
            f"The hub data set {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
            "then type: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise DataError(f"The hub has no data set {name!r}. {instead}") from error
    except Exception as error:  # each HTTP library has its own tree of network errors
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            raise ResourceError(
                f"The hub refused the data set {name}: {_first_line(error)}"
            ) from error
        raise ResourceError(
            f"The hub data set {name} cannot be fetched: no network ({_first_line(error)}). Set "
            f"HF_HUB_OFFLINE=1 to use a copy in the cache. {instead}"
        ) from error


def _first_line(error: Exception) -> str:
    return start_of(first_line(error), 200).strip("'\"")
