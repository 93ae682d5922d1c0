"""A million rows: rows a second and peak memory, each measured in its own process.

`PTP_SCALE_ROWS` sets the number of rows; the figures are printed (`pytest -m slow -s`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.chat_templates import SENTENCES, TEMPLATES

ROWS = int(os.environ.get("PTP_SCALE_ROWS", "1000000"))

WORK = r"""
import json, re, sys, threading, time
import datasets
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.recipe.schema import DataSection

def memory_gib(kind):
    status = Path("/proc/self/status").read_text()
    return int(re.search(kind + r":\s+(\d+)", status)[1]) / 2**20

# Pages of the mapped files count as VmHWM while there is room for them; what is the process's own
# is RssAnon, which has no high-water mark and is sampled.
own = [0.0]
def watch():
    while True:
        own[0] = max(own[0], memory_gib("RssAnon"))
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()

file, backend, cache, template = sys.argv[1:]
datasets.config.HF_DATASETS_CACHE = Path(cache)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=backend, eos_token="<|end_of_text|>")
tokenizer.chat_template = template or None
section = DataSection()
start = time.perf_counter()
rows = load_rows(file, section)
loaded = time.perf_counter()
tokenized = tokenize(rows, tokenizer, section)
done = time.perf_counter()
again = load_rows(file, section)
tokenize(again, tokenizer, section)
cached = time.perf_counter()
texts = [row["prompt"] + " " + row["completion"] for row in rows.dataset.select(range(min(len(rows), 20_000)))]
raw = time.perf_counter()
for i in range(0, len(texts), 1000):
    tokenizer(texts[i : i + 1000], add_special_tokens=False, return_attention_mask=False)
raw_done = time.perf_counter()
print(json.dumps({
    "rows": len(tokenized.dataset),
    "tokens_a_row": round(tokenized.statistics.tokens / len(rows), 1),
    "load_rows_a_second": round(len(rows) / (loaded - start)),
    "tokenize_rows_a_second": round(len(rows) / (done - loaded)),
    "both_rows_a_second": round(len(rows) / (done - start)),
    "again_from_the_cache_seconds": round(cached - done, 2),
    "raw_tokenizer_rows_a_second": round(len(texts) / (raw_done - raw)),
    "peak_memory_gib": round(memory_gib("VmHWM"), 3),  # not ru_maxrss: a child inherits it
    "peak_own_memory_gib": round(own[0], 3),
}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("template", ["", "chatml"])
def test_a_million_rows_do_not_stay_in_memory(tmp_path: Path, backend: str, template: str) -> None:
    (tmp_path / "tokenizer.json").write_text(backend)
    peaks = []
    for rows in (ROWS // 20, ROWS):
        file = tmp_path / f"{rows}.jsonl"
        with open(file, "w", encoding="utf-8") as out:
            for i in range(rows):
                prompt = f"{i}: {SENTENCES[i % 4]} {SENTENCES[(i + 1) % 4]} {SENTENCES[i // 4 % 4]}"
                out.write(json.dumps({"prompt": prompt, "completion": SENTENCES[i % 3]}) + "\n")
        ran = subprocess.run(
            [
                sys.executable, "-c", WORK, str(file), str(tmp_path / "tokenizer.json"),
                str(tmp_path / "cache"), TEMPLATES.get(template, ""),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr[-2000:]
        measured = json.loads(ran.stdout)
        print(template or "no template", measured)
        assert measured["rows"] == rows
        assert measured["peak_memory_gib"] < 1.5
        peaks.append(measured["peak_own_memory_gib"])
    assert peaks[1] < peaks[0] + 0.2, "memory grows with the rows"
