"""Which tokens are trained and which are masked, and where each example ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from prefixtune_cli.data.inspect import check, example, spans, warnings
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.row_encoder import MASKED, RowEncoder
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection
from tests.data.chat_templates import END_OF_TURN, TEMPLATES

PAIR = {"prompt": "What is the capital of France?", "completion": "Paris ☃."}
CHAT = [
    {"role": "user", "content": "Hi 😀"},
    {"role": "assistant", "content": "Hello world."},
    {"role": "user", "content": "How are you today?"},
    {"role": "assistant", "content": "Fine, thanks"},
]


def done(write, tokenizer, rows, **values):
    settings = DataSection(**values)
    return tokenize(load_rows(write("a.jsonl", rows), settings), tokenizer, settings)


def trained_texts(tokenized, tokenizer, i=0) -> list[str]:
    return [text for text, trained in example(tokenized, tokenizer, i).spans if trained]


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_answers_and_their_end_of_turn_are_trained(write, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    tokenized = done(write, tokenizer, [{"messages": CHAT}])
    texts = [text.lstrip() for text in trained_texts(tokenized, tokenizer)]
    assert texts == [f"Hello world.{END_OF_TURN[name]}", f"Fine, thanks{END_OF_TURN[name]}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_last_trained_token_is_the_end_of_turn(write, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    tokenized = done(write, tokenizer, [{"messages": CHAT}, {"messages": CHAT[:2]}])
    for row in tokenized.dataset:
        last = [label for label in row["labels"] if label != MASKED][-1]
        assert tokenizer.convert_ids_to_tokens(last) == END_OF_TURN[name]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("first", [1, 3, 6, 1000])
def test_a_row_ends_with_the_first_answer_tokens(write, make_tokenizer, name, first):
    """Whole rows are the reference; 6 tokens lie in the second answer of most tokenizers."""
    tokenizer = make_tokenizer(name)
    rows, section = [{"messages": CHAT}, {"messages": CHAT[:2]}], DataSection()
    loaded = load_rows(write("a.jsonl", rows), section)
    whole = tokenize(loaded, tokenizer, section).dataset
    cut = tokenize(loaded, tokenizer, section, first)
    for row, of in zip(cut.dataset, whole, strict=True):
        trained = [i for i, label in enumerate(of["labels"]) if label != MASKED]
        end = trained[first - 1] + 1 if first < len(trained) else None
        if end is None:  # what follows the last answer is not trained, and costs nothing more
            assert row["labels"] == of["labels"][: len(row["labels"])]
            assert sum(label != MASKED for label in row["labels"]) == len(trained)
        else:
            assert row["input_ids"] == of["input_ids"][:end]
            assert row["labels"] == of["labels"][:end]
    found = cut.statistics
    assert found.tokens == sum(len(row["input_ids"]) for row in cut.dataset)
    assert found.trained_tokens == sum(
        sum(label != MASKED for label in row["labels"]) for row in cut.dataset
    )
    assert found.rows_without_end_of_turn == 0
    assert any(f"The first {first} answer tokens of a row are learned" in n for n in cut.notices)
    assert not any("are learned" in n for n in tokenize(loaded, tokenizer, section).notices)


def test_a_long_answer_of_which_the_first_tokens_are_learned_makes_no_row_long(
    write, make_tokenizer
):
    tokenizer = make_tokenizer("chatml")
    rows = [{"prompt": "Count.", "completion": "one two three four five " * 20}]
    section = DataSection(max_length=40, on_long="error")
    loaded = load_rows(write("a.jsonl", rows), section)
    with pytest.raises(DataError, match="1 of 1 rows are longer than 40 tokens"):
        tokenize(loaded, tokenizer, section)
    found = tokenize(loaded, tokenizer, section, 8).statistics
    assert (found.kept, found.trained_tokens, found.truncated) == (1, 8, 0)
    assert found.length_percentiles["max"] == found.tokens < 40
    assert warnings(found) == []
    # One that is long with its prompt is truncated as ever.
    short = DataSection(max_length=found.tokens - 3)
    cut = tokenize(loaded, tokenizer, short, 8).statistics
    assert (cut.trained_tokens, cut.truncated, cut.rows_without_end_of_turn) == (5, 1, 1)


def test_a_text_has_no_first_answer_tokens(write, make_tokenizer):
    section = DataSection()
    loaded = load_rows(write("a.jsonl", [{"text": "Once upon a time"}]), section)
    with pytest.raises(DataError, match=r"train\.first_tokens counts tokens of answers, and texts"):
        tokenize(loaded, make_tokenizer("chatml"), section, 8)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "bare"])
def test_the_tokens_are_those_of_the_template(write, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    tokenized = done(write, tokenizer, [{"messages": CHAT}])
    text = tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip()
    assert tokenized.dataset[0]["input_ids"] == tokenizer(text)["input_ids"]


def test_the_mask_of_a_marked_template_is_the_one_that_transformers_gives(write, make_tokenizer):
    tokenizer = make_tokenizer("marked")
    row = done(write, tokenizer, [{"messages": CHAT}]).dataset[0]
    theirs = tokenizer.apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    # TRL also trains the line breaks after end-of-turn tokens, which a model never needs to generate.
    newline = tokenizer("\n")["input_ids"][0]
    pairs = zip(theirs["assistant_masks"], theirs["input_ids"], strict=True)
    mask = [trained and token != newline for trained, token in pairs]
    assert [label != MASKED for label in row["labels"]] == mask[: len(row["labels"])]
    assert not any(mask[len(row["labels"]) :])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_rendered_as_user_and_assistant(write, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    turns = [
        {"role": "user", "content": PAIR["prompt"]},
        {"role": "assistant", "content": PAIR["completion"]},
    ]
    pair = done(write, tokenizer, [PAIR]).dataset[0]
    assert pair == done(write, tokenizer, [{"messages": turns}]).dataset[0]


@pytest.mark.parametrize("name", [None, *TEMPLATES])
def test_the_question_is_the_masked_beginning_of_the_training_example(write, make_tokenizer, name):
    tokenizer = make_tokenizer(name)
    tokenized = done(write, tokenizer, [PAIR])
    (found,) = map(tokenized.encoder.prompt, tokenized.rows.dataset)
    labels = tokenized.dataset[0]["labels"]
    masked = next(i for i, label in enumerate(labels) if label != MASKED)
    assert found.prompt_ids == tokenized.dataset[0]["input_ids"][:masked]
    assert found.answer == PAIR["completion"]


def test_the_question_of_a_chat_ends_before_its_last_answer(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    rows = load_rows(write("a.jsonl", [{"messages": [*CHAT, CHAT[0]]}]), DataSection())
    (found,) = map(RowEncoder(rows, tokenizer, DataSection()).prompt, rows.dataset)
    assert tokenizer.decode(found.prompt_ids).endswith("today?<|im_end|>\n<|im_start|>assistant\n")
    assert found.answer == "Fine, thanks"


@pytest.mark.parametrize(
    ("prompt", "completion", "masked", "trained"),
    [
        ("capital:", "Paris", "capital:", " Paris<|end_of_text|>"),
        ("capital: ", "Paris", "capital: ", "Paris<|end_of_text|>"),
        ("capital:\n", "Paris", "capital:\n", "Paris<|end_of_text|>"),
        ("capital:", " Paris", "capital:", " Paris<|end_of_text|>"),
        ("capital:", "Paris<|end_of_text|>", "capital:", " Paris<|end_of_text|>"),
        ("☃", "☃", "☃", " ☃<|end_of_text|>"),
    ],
)
def test_without_a_template_the_boundary_is_exact(
    write, make_tokenizer, prompt, completion, masked, trained
):
    tokenizer = make_tokenizer()
    tokenized = done(write, tokenizer, [{"prompt": prompt, "completion": completion}])
    assert example(tokenized, tokenizer, 0).spans == ((masked, False), (trained, True))
    assert "joined as they are" in tokenized.notices[0]


def test_a_prompt_of_plain_text_starts_as_the_tokenizer_starts_a_text(write, make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    row = done(write, tokenizer, [PAIR]).dataset[0]
    assert row["input_ids"].count(begin) == 1
    assert (row["input_ids"][0], row["labels"][0]) == (begin, MASKED)


def test_a_tokenizer_that_puts_a_space_before_each_text_puts_none_inside_an_example(write):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    backend.train_from_iterator(
        ["capital: Paris\n"] * 9,
        trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=list("capitl: Prs\nab▁")),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenized = done(write, tokenizer, [{"prompt": "capital:\n", "completion": "Paris"}])
    assert tokenizer.decode(tokenized.dataset[0]["input_ids"]) == "capital:\nParis</s>"


def test_text_is_trained_whole_and_ended(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenized = done(write, tokenizer, [{"text": "Paris is a capital."}])
    assert trained_texts(tokenized, tokenizer) == ["Paris is a capital.<|end_of_text|>"]
    assert tokenized.dataset[0]["labels"] == tokenized.dataset[0]["input_ids"]


@pytest.mark.parametrize("row", [PAIR, {"messages": CHAT}, {"messages": CHAT[:1]}])
def test_train_on_all_trains_every_token(write, make_tokenizer, row):
    tokenized = done(write, make_tokenizer("chatml"), [row], train_on="all")
    assert tokenized.dataset[0]["labels"] == tokenized.dataset[0]["input_ids"]


def test_ids_and_labels_are_int32(write, make_tokenizer):
    tokenized = done(write, make_tokenizer("chatml"), [PAIR])
    features = tokenized.dataset.features
    assert list(features) == ["input_ids", "labels", "row"]
    assert {features[name].feature.dtype for name in ("input_ids", "labels")} == {"int32"}


def test_chats_without_a_template_list_the_options(write, make_tokenizer):
    with pytest.raises(DataError) as caught:
        done(write, make_tokenizer(), [{"messages": CHAT}])
    told = str(caught.value)
    assert "no chat template" in told
    assert "--chat-template FILE.jinja" in told and "columns prompt and completion" in told


def test_a_template_file_wins_over_the_tokenizers(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    file = write("t.jinja", TEMPLATES["llama3"])
    tokenized = done(write, tokenizer, [PAIR], chat_template=file)
    assert trained_texts(tokenized, tokenizer) == ["Paris ☃.<|eot_id|>"]
    assert tokenizer.chat_template == TEMPLATES["chatml"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}", "the chat template refuses the conversation"),
        ("{{ messages[0].content }}", "leaves out the answer"),
        (
            "{% for m in messages %}{{ m.content | replace('world', 'W') }}<|end|>{% endfor %}",
            "renders this answer differently",
        ),
        (
            "{% for m in messages %}[{{ m.role }}{{ messages | length }}]{{ m.content }}<|end|>{% endfor %}",
            "renders this answer differently",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|end|>{% endfor %}",
            "leaves out the end-of-turn token '<|end|>'",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_options(
    write, make_tokenizer, template, expected
):
    file = write("t.jinja", template)
    with pytest.raises(DataError, match=expected.replace("|", r"\|")):
        done(write, make_tokenizer(), [{"messages": CHAT}], chat_template=file)


def test_a_conversation_that_the_template_refuses_names_its_line(write, make_tokenizer):
    with pytest.raises(DataError) as caught:
        done(
            write,
            make_tokenizer("mistral"),
            [{"messages": CHAT}, {"messages": [{"role": "system", "content": "x"}, *CHAT]}],
        )
    assert "a.jsonl, line 2: the chat template refuses" in str(caught.value)
    assert "no such role" in str(caught.value)


def test_an_end_of_turn_that_the_tokenizer_merges_is_refused(write, make_tokenizer, backend):
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(backend)
    made.add_tokens([AddedToken("Paris<|end|>", normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end_of_text|>")
    tokenizer.chat_template = TEMPLATES["phi"]
    with pytest.raises(DataError, match="line 1: the last trained token is not the end-of-turn"):
        done(write, tokenizer, [{"prompt": "Where?", "completion": "Paris"}])


def test_content_that_spells_the_end_of_turn_does_not_end_the_mask(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    turns = [
        {"role": "user", "content": "Say <|im_end|> and Paris"},
        {"role": "assistant", "content": "I say <|im_end|> and Paris"},
    ]
    tokenized = done(write, tokenizer, [{"messages": turns}])
    assert trained_texts(tokenized, tokenizer) == ["I say <|im_end|> and Paris<|im_end|>"]


def test_an_answer_that_repeats_the_question_is_found_in_its_place(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    tokenized = done(write, tokenizer, [{"prompt": "Paris", "completion": "Paris"}])
    shown = example(tokenized, tokenizer, 0).spans
    assert [text for text, trained in shown if trained] == ["Paris<|im_end|>"]
    assert shown[0][0].startswith("<|im_start|>user\nParis<|im_end|>")


def test_an_answer_that_the_template_leaves_out_is_not_looked_for_in_a_later_turn(
    write, make_tokenizer
):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Paris"},
    ]
    for end in ("<|end|>", "\n"):  # with and without an end-of-turn token
        template = (
            "{% for m in messages %}{{ m.role }}: {% if loop.last or m.role == 'user' %}"
            "{{ m.content }}{% endif %}END{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ).replace("END", end)
        with pytest.raises(DataError, match="message 2: the chat template renders this answer"):
            done(write, make_tokenizer(template), [{"messages": turns}])


def test_a_template_that_puts_thoughts_before_the_last_answer_is_understood(write, make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [*CHAT[:3], {"role": "assistant", "content": "think"}]
    tokenized = done(write, tokenizer, [{"messages": turns}])
    assert trained_texts(tokenized, tokenizer) == [
        "Hello world.<|im_end|>",
        "<think>\n\n</think>\n\nthink<|im_end|>",
    ]


def test_truncation_is_from_the_right_and_counted(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    long = PAIR | {"completion": "Paris " * 50}
    tokenized = done(write, tokenizer, [PAIR, long], max_length=60)
    s = tokenized.statistics
    assert (s.rows, s.kept, s.truncated, s.dropped) == (2, 2, 1, 0)
    assert s.rows_without_end_of_turn == 1
    assert len(tokenized.dataset[1]["input_ids"]) == 60
    whole = done(write, tokenizer, [PAIR, long], max_length=5000).dataset[1]
    assert tokenized.dataset[1]["input_ids"] == whole["input_ids"][:60]
    assert tokenized.dataset[1]["labels"] == whole["labels"][:60]
    assert any("1 of 2 rows (50.0 %) are truncated to 60" in x for x in warnings(s))


def test_long_rows_can_be_dropped_or_refused(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    data = [PAIR, PAIR | {"completion": "Paris " * 50}, PAIR]
    tokenized = done(write, tokenizer, data, max_length=60, on_long="drop")
    assert len(tokenized.dataset) == tokenized.statistics.kept == 2
    assert tokenized.dataset["row"][:] == [0, 2]
    assert (tokenized.statistics.dropped, tokenized.statistics.truncated) == (1, 0)
    with pytest.raises(DataError, match=r"1 of 3 rows are longer than 60 tokens; .*line 2 with"):
        done(write, tokenizer, data, max_length=60, on_long="error")


def test_statistics_agree_with_the_rows(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    data = [{"prompt": "a " * i, "completion": "b " * (i % 7)} for i in range(1, 200)]
    tokenized = done(write, tokenizer, data, max_length=64)
    kept, s = list(tokenized.dataset), tokenized.statistics
    assert s.kept == len(kept) < s.rows == 199
    assert s.tokens == sum(len(row["input_ids"]) for row in kept)
    assert s.trained_tokens == sum(x != MASKED for row in kept for x in row["labels"])
    lengths = [len(row["input_ids"]) for row in tokenized.every_row]
    assert s.truncated == sum(tokenized.every_row["length"][i] > 64 for i in range(199))
    assert max(lengths) == 64 < s.length_percentiles["max"]
    assert s.length_percentiles["p50"] == int(np.median(tokenized.every_row["length"][:]))
    assert s.rows_without_trained_tokens == 199 - s.kept
    assert json.loads(json.dumps(s.__dict__)) == s.__dict__


def test_rows_without_an_answer_are_left_out_and_counted(write, make_tokenizer):
    for name in (None, "chatml", "marked"):
        tokenized = done(write, make_tokenizer(name), [PAIR, PAIR | {"completion": " \n"}, PAIR])
        assert len(tokenized.dataset) == 2
        assert tokenized.statistics.rows_without_trained_tokens == 1


@pytest.mark.parametrize(
    ("row", "values", "hint"),
    [
        (PAIR | {"completion": ""}, {}, "Every answer is blank"),
        (PAIR | {"prompt": "long " * 99}, {"max_length": 20}, "leaves only the prompt"),
        (PAIR, {"max_length": 8, "on_long": "drop"}, "All are longer than 8 tokens"),
    ],
)
def test_nothing_to_train_on_is_an_error_that_shows_an_example(
    write, make_tokenizer, row, values, hint
):
    tokenizer = make_tokenizer("chatml")
    tokenized = done(write, tokenizer, [row], **values)
    with pytest.raises(DataError) as caught:
        check(tokenized, tokenizer)
    told = str(caught.value)
    assert hint in told and "a.jsonl, line 1" in told and "<|im_start|>user\\n" in told
    check(done(write, tokenizer, [PAIR]), tokenizer)


def test_spans_join_to_the_whole_text_even_where_a_character_is_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    ids = tokenizer("Köln 😀 ☃")["input_ids"]
    whole = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        trained = [i >= cut for i in range(len(ids))]
        pieces = spans(ids, trained, tokenizer)
        assert "".join(text for text, _ in pieces) == whole == "Köln 😀 ☃"
        assert all("\ufffd" not in text for text, _ in pieces)
    foxes = tokenizer("Köln 🦊")["input_ids"]  # no single token is the whole fox
    within = len(foxes) - 1
    assert tokenizer.decode(foxes[:within]).endswith("\ufffd")
    trained = [i >= within for i in range(len(foxes))]
    assert spans(foxes, trained, tokenizer) == (("Köln ", False), ("🦊", True))


def test_another_tokenizer_template_or_length_is_not_served_from_the_cache(write, make_tokenizer):
    tokenizer = make_tokenizer("chatml")
    first = done(write, tokenizer, [PAIR])
    assert done(write, tokenizer, [PAIR]).every_row.cache_files == first.every_row.cache_files
    others = [
        done(write, make_tokenizer("llama3"), [PAIR]),
        done(write, tokenizer, [PAIR], max_length=9),
        done(write, tokenizer, [PAIR], train_on="all"),
    ]
    files = [found.every_row.cache_files[0]["filename"] for found in [first, *others]]
    assert len(set(files)) == 4


def test_tokens_are_cached_by_content_and_not_by_path_and_time(write, make_tokenizer, tmp_path):
    tokenizer, settings = make_tokenizer("chatml"), DataSection()

    def tokens(path):
        found = tokenize(load_rows(path, settings), tokenizer, settings)
        cache = Path(found.every_row.cache_files[0]["filename"])
        return found.dataset[:]["input_ids"], cache, cache.stat().st_mtime_ns

    path = write("a.jsonl", [PAIR])
    os.utime(path, ns=(10**18, 10**18))
    first = tokens(path)
    copy = write("elsewhere/b.jsonl", [PAIR])
    os.utime(copy, ns=(2 * 10**18, 2 * 10**18))
    assert tokens(copy) == first, "the same content is read from the same file, not written anew"
    size = os.path.getsize(path)
    assert write("a.jsonl", [PAIR | {"completion": "Paros ☃."}]) == path
    os.utime(path, ns=(10**18, 10**18))
    assert os.path.getsize(path) == size
    changed = tokens(path)
    assert changed[0] != first[0] and changed[1] != first[1]
