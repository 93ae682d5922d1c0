"""`ptp generate`: answers one prompt, or a file of prompts."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from prefixtune_cli.answer_file import AnswerFile
    from prefixtune_cli.data.conversation import Conversation
    from prefixtune_cli.data.lines import Row


def generate(
    run: typer_options.Run = None,
    model: str | None = None,
    adapter: typer_options.AdapterFolder = None,
    no_adapter: typer_options.NoAdapter = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One prompt; `-` reads it from stdin.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Prompts in any format of `ptp train`."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="The JSONL file for the answers to --data.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file that --out names.")
    ] = False,
    map: list[str] | None = None,
    system: typer_options.System = None,
    chat_template: str | None = None,
    bits: int | None = None,
    device: str | None = None,
    max_new_tokens: typer_options.MaxNewTokens = 256,
    temperature: typer_options.Temperature = 0.0,
    top_p: typer_options.TopP = 1.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Prompts a forward pass.")
    ] = 32,
    seed: typer_options.SamplingSeed = 0,
    samples: Annotated[
        int,
        typer.Option("--samples", min=1, metavar="N", help="Answers to each prompt of --data."),
    ] = 1,
) -> None:
    """Answer a prompt, or a file of prompts, with an adapter or with the base alone."""
    if (prompt is None) == (data is None):
        raise UsageError("Give either --prompt TEXT or --data FILE, and not both.")
    if (data is None) != (out is None):
        raise UsageError(
            "--data FILE and --out FILE belong together; the answer to --prompt goes to stdout."
        )
    if samples > 1 and (data is None or temperature == 0):
        raise UsageError(
            f"--samples {samples} takes --data FILE and a temperature, without which all answers to a prompt are the "
            "same. Type --temperature 0.8, or leave out --samples."
        )
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.data.question import questions
    from prefixtune_cli.sampling import Sampling

    prompt = arguments.stdin_text(sys.stdin.read) if prompt == "-" else prompt
    sampling = Sampling(max_new_tokens, temperature, top_p)
    who = lookup.one(run, model, adapter, chat_template=chat_template, bits=bits, device=device)
    asked: list[Conversation] = []
    answers = None
    if data is not None:
        found = questions(data, arguments.parse_map(map or []), usual=who.reading.map)
        asked, answers = _asked(
            [row for row in found for _ in range(samples)], data, str(out), overwrite
        )
    with answers or contextlib.nullcontext():
        console.quiet_libraries()
        from prefixtune_cli import generate as generation

        speaker = generation.load_speaker(
            who, no_adapter=no_adapter, seed=seed, chat_template=chat_template
        )
        if prompt is not None:
            messages = generation.conversation(prompt, system)
            for piece in generation.answer_streamed(speaker, messages, sampling=sampling):
                print(piece, end="", flush=True)
            print()
            return
        assert answers is not None
        with reporter() as shown:
            generation.answer_file(
                speaker,
                [question.with_system(system) for question in asked],
                answers,
                sampling=sampling,
                batch_size=batch_size,
                reporter=shown,
            )
    console.notice(f"{len(asked)} answers written to {out}, in the column {answers.column}.")


def _asked(
    found: list[tuple[Row, Conversation]], data: str, out: str, overwrite: bool
) -> tuple[list[Conversation], AnswerFile]:
    """The conversations that wait for an answer, and the file for the answers."""
    from prefixtune_cli.answer_file import AnswerFile
    from prefixtune_cli.data.locate import local_files

    rows, asked = [row for row, _ in found], [question for _, question in found]
    local = local_files(data)
    files = local.files if local is not None else []
    return asked, AnswerFile(Path(out), rows, files, overwrite=overwrite)
