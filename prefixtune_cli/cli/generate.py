"""`ptp generate`: answers to one prompt, or to a file of them."""

from __future__ import annotations

from typing import Annotated

import typer

from prefixtune_cli.cli import options, typed
from prefixtune_cli.errors import UsageError


def generate(
    run: options.Run = None,
    model: options.Model = None,
    adapter: options.AdapterFolder = None,
    no_adapter: options.NoAdapter = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="One prompt; `-` reads it from stdin.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "-d", help="Prompts in any format of `ptp train`."),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Where the answers to --data go, as JSONL.")
    ] = None,
    map: options.Map = None,
    system: options.System = None,
    bits: options.Bits = None,
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, metavar="N", help="Prompts a forward pass.")
    ] = 32,
    seed: options.SamplingSeed = 0,
) -> None:
    """Answer a prompt, or a file of prompts, with an adapter or with the base alone."""
    if (prompt is None) == (data is None):
        raise UsageError("Give either --prompt TEXT or --data FILE, and not both.")
    if (data is None) != (out is None):
        raise UsageError(
            "--data FILE and --out FILE belong together; one prompt's answer goes to stdout."
        )
    import sys
    from pathlib import Path

    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.data.question import questions

    asked = list(questions(data, typed.parse_map(map or []))) if data is not None else []
    console.quiet_libraries()
    from prefixtune_cli import generate as generation

    sampling = generation.Sampling(max_new_tokens, temperature, top_p)
    speaker = generation.load_speaker(
        run=run,
        model=model,
        adapter=adapter,
        no_adapter=no_adapter,
        bits=bits,
        device=device,
        seed=seed,
    )
    if prompt is not None:
        text = sys.stdin.read() if prompt == "-" else prompt
        messages = generation.conversation(text, system)
        for piece in generation.answer_streamed(speaker, messages, sampling=sampling):
            print(piece, end="", flush=True)
        print()
        return
    if system is not None:
        asked = [(row, [*generation.conversation(None, system), *m]) for row, m in asked]
    with reporter() as shown:
        generation.answer_file(
            speaker,
            asked,
            Path(str(out)),
            sampling=sampling,
            batch_size=batch_size,
            reporter=shown,
        )
        shown.notice(f"{len(asked)} answers written to {out}.")
