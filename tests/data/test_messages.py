"""What messages and rows have besides role and content: weights, system prompts, tools, history, parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixtune_cli.data.inspect import example, warnings
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.question import questions
from prefixtune_cli.data.row_encoder import MASKED, RowEncoder, plain
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection

CASES = Path(__file__).parents[3] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "room", "parameters": {}}}
CALLS = [{"type": "function", "function": {"name": "room", "arguments": {"n": 12}}}]
# Prints tools, reasoning and calls, as Qwen's does.
RICH = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def done(write, make_tokenizer):
    """Tokenize rows with a template; returns the tokenized data and its tokenizer."""

    def done(rows, template: str | None = "chatml", **values):
        tokenizer, section = make_tokenizer(template), DataSection(**values)
        source = str(rows) if isinstance(rows, Path) else write("a.jsonl", rows)
        return tokenize(load_rows(source, section), tokenizer, section), tokenizer

    return done


def text(tokenized, tokenizer, i: int = 0) -> str:
    """Row `i` as `ptp inspect-data` shows it, trained text in brackets."""
    spans = example(tokenized, tokenizer, i).spans
    return "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in spans)


def weighted(value, key: str = "weight", **more) -> list:
    turns = [ASK, {**SAY, "content": "No", key: value, **more}, ASK, {**SAY, "content": "Yes"}]
    return [{"messages": turns}]


@pytest.mark.parametrize("template", ["chatml", "marked", "llama3", "bare"])
@pytest.mark.parametrize("value", [0, 0.0, False])
@pytest.mark.parametrize("key", ["weight", "train", "training", "loss", "loss_weight"])
def test_an_answer_whose_weight_is_zero_is_seen_and_not_learned(done, key, value, template) -> None:
    found, tokenizer = done(weighted(value, key), template)
    trained = [said for said, learned in example(found, tokenizer, 0).spans if learned]
    assert ["Yes" in said for said in trained] == [True]
    assert "No" in text(found, tokenizer)
    assert "1 answers are not trained, as their weight says so." in found.rows.notices


@pytest.mark.parametrize("value", [1, 1.0, True, None])
def test_an_answer_whose_weight_is_one_or_null_is_learned(done, value) -> None:
    found, tokenizer = done(weighted(value))
    assert "⟦No<|im_end|>⟧" in text(found, tokenizer)
    assert len(found.rows.notices) == 1


@pytest.mark.parametrize("value", [0.5, -1, "0", "false", [], 2])
def test_a_weight_that_is_neither_zero_nor_one_is_refused_by_line(done, value) -> None:
    with pytest.raises(DataError) as caught:
        done([*weighted(1), *weighted(value)])
    assert "a.jsonl, line 2, message 2: 'weight' must be 0 or 1" in str(caught.value)


def test_weights_that_contradict_each_other_are_refused(done) -> None:
    with pytest.raises(DataError, match="'weight' true and 'train' false contradict"):
        done(weighted(1, train=False))


def test_a_weight_masks_its_answer_where_everything_else_is_trained(done) -> None:
    found, tokenizer = done(weighted(0), train_on="all")
    shown = text(found, tokenizer)
    assert shown.startswith("⟦<|im_start|>user\nHi") and "\n⟧No<|im_end|>⟦\n" in shown


def test_a_question_that_asks_to_be_trained_is_told_of(done) -> None:
    found, _ = done([{"messages": [{**ASK, "train": True}, SAY]}])
    assert "1 messages that are not answers ask to be trained" in found.rows.notices[-1]
    found, _ = done([{"messages": [{**ASK, "train": False}, SAY]}], train_on="all")
    assert "1 messages that are not answers ask not to be trained" in found.rows.notices[-1]


def test_the_question_asked_in_evaluation_is_that_of_the_last_answer_that_is_learned(done) -> None:
    turns = [ASK, SAY, ASK, {**SAY, "content": "Never", "weight": 0}]
    found, tokenizer = done([{"messages": turns}])
    (asked,) = map(found.encoder.prompt, found.rows.dataset)
    assert asked.answer == "Hello"
    assert tokenizer.decode(asked.prompt_ids).count("<|im_start|>user") == 1


def test_a_row_of_which_no_answer_is_learned_is_left_out_and_counted(done) -> None:
    found, _ = done([{"messages": [ASK, {**SAY, "weight": 0}]}, {"messages": [ASK, SAY]}])
    assert found.dataset["row"][:] == [1]
    assert found.statistics.rows_without_trained_tokens == 1


@needs_cases
def test_the_weights_of_a_public_file_are_honoured(done) -> None:
    found, tokenizer = done(CASES / "message-weight.jsonl")
    assert "Quito, I think." in text(found, tokenizer)
    assert [text(found, tokenizer, i).count("⟦") for i in (0, 1)] == [1, 1]
    assert text(found, tokenizer, 1).endswith("⟦Santiago.<|im_end|>⟧")


@needs_cases
def test_a_thought_reaches_a_template_that_prints_it(done) -> None:
    template = (CASES / "qwen3like.jinja").read_text()
    found, tokenizer = done(CASES / "reasoning.jsonl", template)
    assert text(found, tokenizer).endswith("⟦<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>⟧")
    assert warnings(found.statistics) == []


def test_keys_reach_the_template_as_apply_chat_template_hands_them_on(done) -> None:
    turns = [
        ASK | {"name": None},
        {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "hm"},
        {"role": "tool", "content": "free", "tool_call_id": "1"},
        SAY,
    ]
    found, tokenizer = done([{"messages": turns, "tools": [TOOL]}], RICH)
    plainly = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
    plainly[1]["content"] = ""
    theirs = tokenizer.apply_chat_template(plainly, tools=[TOOL], tokenize=False)
    assert text(found, tokenizer).replace("⟦", "").replace("⟧", "") == theirs.rstrip()
    call = '<call>{"name": "room", "arguments": {"n": 12}}</call>'
    assert f"⟦<think>hm</think>{call}<|im_end|>⟧" in text(found, tokenizer)
    assert found.statistics.unprinted_keys == {"tool_call_id": 1}


def test_a_key_that_is_not_printed_changes_no_answer_where_no_token_ends_it(done) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} ##\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turns = [{"messages": [ASK, SAY]}, {"messages": [ASK, SAY | {"id": "m2"}]}]
    found, _ = done(turns, template)
    assert found.dataset["labels"][0] == found.dataset["labels"][1]


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_what_neither_template_nor_ptp_takes_is_told_with_its_rows(done, template) -> None:
    rows = [{"messages": [ASK | {"name": "bob"}, SAY | {"reasoning_content": "hm"}]}] * 2
    rows += [{"messages": [ASK, SAY], "tools": [TOOL]}]
    found, _ = done(rows, template)
    assert found.statistics.unprinted_keys == {"name": 2, "reasoning_content": 2, "tools": 1}
    told = warnings(found.statistics)
    assert "2 of 3 rows (66.7 %) have 'name', which neither the chat template nor ptp uses" in told


def test_a_key_that_the_template_prints_in_one_row_is_taken(done) -> None:
    # The first answer is not the last, so a thinking template leaves out its reasoning.
    template = RICH.replace("if m.reasoning_content", "if m.reasoning_content and loop.last")
    thinks = SAY | {"reasoning_content": "hm"}
    found, tokenizer = done(
        [{"messages": [ASK, thinks, ASK, SAY]}, {"messages": [ASK, thinks]}], template
    )
    assert found.statistics.unprinted_keys == {}
    assert text(found, tokenizer, 0).count("⟦Hello<|im_end|>⟧") == 2
    assert text(found, tokenizer, 1).endswith("⟦<think>hm</think>Hello<|im_end|>⟧")


def test_a_call_without_a_text_is_the_reference_of_its_row(done) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    found, _ = done([{"messages": [ASK, call]}], RICH)
    (asked,) = map(found.encoder.prompt, found.rows.dataset)
    assert asked.answer == '<call>{"name": "room", "arguments": {"n": 12}}</call>'


def test_a_call_that_the_template_leaves_out_is_no_answer_to_learn(done) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALLS}
    for template in ("chatml", "marked"):
        found, _ = done([{"messages": [ASK, call]}, {"messages": [ASK, SAY]}], template)
        assert found.statistics.rows_without_trained_tokens == 1
        assert found.statistics.unprinted_keys == {"tool_calls": 1}


def test_sharegpts_calls_are_calls_where_the_template_has_them_and_text_elsewhere(done) -> None:
    call = json.dumps({"name": "room", "arguments": {"n": 12}})
    turns = [("human", "Free?"), ("function_call", call), ("observation", "free"), ("gpt", "Yes")]
    row = {"conversations": [{"from": who, "value": what} for who, what in turns]}
    found, tokenizer = done([row], RICH)
    assert f"⟦<call>{call}</call><|im_end|>⟧\n<|im_start|>tool\nfree" in text(found, tokenizer)
    found, tokenizer = done([row], "chatml")
    assert f"<|im_start|>assistant\n⟦{call}<|im_end|>⟧" in text(found, tokenizer)
    row["conversations"][1]["value"] = "room(12)"  # not JSON, so it stays as it is
    found, tokenizer = done([row], RICH)
    assert "⟦room(12)<|im_end|>⟧" in text(found, tokenizer)


ENCODES, PRINTS = "{{ c.function.arguments | tojson }}", "{{ 'args: ' + c.function.arguments }}"
EACH = "{% for k, v in c.function.arguments | items %}{{ k }}: {{ v }}{% endfor %}"


@pytest.mark.parametrize(
    ("printed", "said"),
    [(ENCODES, '{"n": 12}'), (PRINTS, 'args: {"n": 12}'), (EACH, "n: 12")],
)
def test_arguments_that_are_json_text_are_encoded_once_by_every_template(
    done, printed, said
) -> None:
    calls = [{"type": "function", "function": {"name": "room", "arguments": '{"n": 12}'}}]
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    template = RICH.replace("{{ c.function | tojson }}", printed)
    found, tokenizer = done([{"messages": [ASK, call]}], template)
    assert text(found, tokenizer).endswith(f"⟦<call>{said}</call><|im_end|>⟧")


@pytest.mark.parametrize("calls", [[], "none", [3], [{"function": 3}], [{"function": {}}]])
def test_calls_of_an_odd_form_are_left_to_the_template(done, calls) -> None:
    found, tokenizer = done([{"messages": [ASK, {**SAY, "tool_calls": calls}]}])
    assert text(found, tokenizer).endswith("⟦Hello<|im_end|>⟧")


def test_a_pair_of_lists_of_messages_is_read_as_trl_reads_it(done) -> None:
    front = {"role": "system", "content": "Be terse"}
    row = {"prompt": [front, ASK, SAY, ASK], "completion": [{**SAY, "content": "Again"}]}
    for form in ("auto", "prompt-completion"):
        found, tokenizer = done([row, {"prompt": [ASK], "completion": [SAY]}], format=form)
        assert text(found, tokenizer).count("⟦") == 1
        assert text(found, tokenizer).endswith("⟦Again<|im_end|>⟧")
        assert "Be terse" in text(found, tokenizer)
        assert text(found, tokenizer, 1).endswith("⟦Hello<|im_end|>⟧")
    assert "1 answers are not trained, as they stand in a prompt." in found.rows.notices
    (asked, _) = map(found.encoder.prompt, found.rows.dataset)
    assert asked.answer == "Again"


def test_all_of_a_pair_of_lists_is_trained_where_all_is_asked_for(done) -> None:
    row = {"prompt": [ASK, SAY, ASK], "completion": [{**SAY, "content": "Again"}]}
    found, tokenizer = done([row], train_on="all")
    assert text(found, tokenizer).count("⟦") == 1 and text(found, tokenizer).startswith("⟦")


def test_a_pair_of_lists_without_an_answer_or_beside_a_text_is_refused(done) -> None:
    with pytest.raises(DataError, match="line 1: no message has the role assistant"):
        done([{"prompt": [ASK, SAY], "completion": [ASK]}])
    with pytest.raises(DataError, match="Write both prompt and completion as texts, or both as"):
        done([{"prompt": [ASK], "completion": "Hello"}])
    with pytest.raises(DataError, match="line 1, message 2: 'role' must be one of"):
        done([{"prompt": [ASK], "completion": [{"role": "bot", "content": ""}]}])


def test_a_prompt_that_is_a_list_of_messages_can_be_asked(write) -> None:
    rows = [{"prompt": [ASK, SAY, ASK]}, {"prompt": [ASK], "completion": [SAY]}]
    asked = [found.messages for _, found in questions(write("a.jsonl", rows), {})]
    assert asked == [[ASK, SAY, ASK], [ASK]]


@needs_cases
def test_system_prompts_and_tools_of_sharegpt_rows_reach_the_template(done) -> None:
    found, tokenizer = done(CASES / "system_tools.json", RICH)
    first, second = (text(found, tokenizer, i) for i in (0, 1))
    assert '"function": {"name": "find_room", "parameters": {}}' in first
    assert "<|im_start|>system\nAnswer like a hotel clerk of the Alder Inn.<|im_end|>" in first
    assert second.startswith("<|im_start|>system\nAnswer like a pirate.<|im_end|>")
    assert "not used" not in found.rows.notices[0]
    assert found.statistics.unprinted_keys == {}


@needs_cases
def test_alpacas_system_prompt_and_history_come_before_the_question(done) -> None:
    found, tokenizer = done(CASES / "alpaca-history.json")
    assert text(found, tokenizer) == (
        "<|im_start|>system\nYou know geography.<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Lima.<|im_end|>⟧\n"
        "<|im_start|>user\nAnd its population?<|im_end|>\n"
        "<|im_start|>assistant\n⟦About 10 million.<|im_end|>⟧"
    )
    found, tokenizer = done(CASES / "alpaca-history.json", None)  # no template: one line a message
    before = "You know geography.\nWhat is the capital of Peru?\nLima.\nAnd its population?"
    assert text(found, tokenizer) == f"{before}⟦ About 10 million.<|end_of_text|>⟧"


@needs_cases
def test_a_file_of_questions_is_asked_with_its_system_prompt_history_and_tools(done) -> None:
    ((_, asked),) = questions(str(CASES / "alpaca-history.json"), {})
    assert plain(asked.messages).splitlines()[:2] == [
        "You know geography.",
        "What is the capital of Peru?",
    ]
    assert asked.messages[-1] == {"role": "user", "content": "And its population?"}
    asked = [asked for _, asked in questions(str(CASES / "system_tools.json"), {})]
    assert [q.messages[0]["role"] for q in asked] == ["system", "system"]
    assert [q.tools and q.tools[0]["function"]["name"] for q in asked] == ["find_room", None]
    assert asked[0].with_system("Else").messages == asked[0].messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "output": "Hello"},
        {"messages": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ],
)
def test_every_format_takes_a_system_prompt(done, row) -> None:
    found, tokenizer = done([row | {"system": "Be kind."}, row | {"system": None}, row])
    with_it, *without = (text(found, tokenizer, i) for i in range(3))
    assert with_it.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi")
    assert [said.startswith("<|im_start|>user\nHi") for said in without] == [True, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"system": 3}, "the column 'system' must be text, got a number: '3'"),
        ({"system": "x", "messages": [{"role": "system", "content": "y"}, SAY]}, "two system pro"),
        ({"tools": "room"}, "the column 'tools' must be a list or its JSON text"),
        ({"tools": ["room"]}, "entry 1 of 'tools' must be a tool's JSON schema"),
        ({"tools": {"name": "room"}}, "the column 'tools' must be a list or its JSON text"),
        ({"history": "long"}, "the column 'history' must be a list"),
        ({"history": [["a"]]}, "entry 1 of 'history' must be a question and its answer"),
        ({"history": [["a", None]]}, "entry 1 of 'history': the column 'answer' must be text"),
    ],
)
def test_a_malformed_system_prompt_history_or_tool_is_refused_by_line(done, row, said) -> None:
    good = {"messages": [ASK, SAY]}
    if "history" in row:
        good = {"instruction": "Hi", "output": "Hello"}
    with pytest.raises(DataError) as caught:
        done([good, good | row])
    assert "a.jsonl, line 2" in str(caught.value) and said in str(caught.value)


def test_a_developer_is_the_system(done) -> None:
    found, tokenizer = done(
        [{"messages": [{"role": "developer", "content": "Be kind."}, ASK, SAY]}]
    )
    assert text(found, tokenizer).startswith("<|im_start|>system\nBe kind.<|im_end|>")


@needs_cases
def test_the_text_parts_of_a_message_are_its_text(done) -> None:
    found, tokenizer = done(CASES / "parts.jsonl")
    assert text(found, tokenizer) == (
        "<|im_start|>user\nSay hi<|im_end|>\n<|im_start|>assistant\n⟦Hi<|im_end|>⟧"
    )


def test_several_text_parts_are_joined_by_line_breaks(done) -> None:
    parts = [
        {"type": "text", "text": "one"},
        "two",
        {"text": "three", "type": "text", "image": None},
    ]
    found, tokenizer = done([{"messages": [{"role": "user", "content": parts}, SAY]}])
    assert "user\none\ntwo\nthree<|im_end|>" in text(found, tokenizer)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "is of the type 'image_url'"),
        ({"type": "image"}, "is of the type 'image'"),
        ({"type": "text", "content": "x"}, "has no 'text'; its keys are type, content"),
        ({"type": "text", "text": 3}, "the column 'text' must be text, got a number"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_name(done, part, said) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "Look:"}, part]}, SAY]
    with pytest.raises(DataError) as caught:
        done([{"messages": turns}])
    told = str(caught.value)
    assert "a.jsonl, line 1, message 1" in told and "part 2" in told and said in told


# In TEMPLATES, `mistral` refuses an answer before the first question. This template puts a system
# prompt in front, so that nothing shows where that answer begins.
FRONTED = (
    "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nx<|im_end|>\n{% endif %}"
)


@needs_cases
@pytest.mark.parametrize("template", ["chatml", "marked", "fronted", "mistral"])
def test_a_conversation_that_begins_with_an_answer_is_trained_from_its_first_question(
    done, template, make_tokenizer
) -> None:
    if template == "fronted":
        template = FRONTED + make_tokenizer("chatml").chat_template
    found, tokenizer = done(CASES / "starts_gpt.jsonl", template)
    trained = [said for said, learned in example(found, tokenizer, 0).spans if learned]
    assert len(trained) == 1 and "Hello." in trained[0]
    refused = template == "mistral"
    assert ("Welcome!" in text(found, tokenizer)) is not refused
    s = found.statistics
    assert (s.openings, s.openings_left_out) == (1, int(refused))
    assert "begin with an answer, which is context and not trained" in warnings(s)[0]
    (asked,) = map(found.encoder.prompt, found.rows.dataset)
    labels = found.dataset[0]["labels"]
    assert asked.prompt_ids == found.dataset[0]["input_ids"][: len(asked.prompt_ids)]
    assert labels[len(asked.prompt_ids)] != MASKED


LAST_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_blocks_that_cannot_be_told_apart_stop_masked_answers_alone(done) -> None:
    found, tokenizer = done([{"messages": [SAY, ASK, SAY]}], LAST_MARKED)
    assert text(found, tokenizer).count("⟦Hello<|im_end|>⟧") == 1
    with pytest.raises(DataError, match=r"has 1 .* blocks for 2 answers"):
        done(weighted(0), LAST_MARKED)


def test_a_greeting_is_no_question_of_evaluation(done) -> None:
    turns = [SAY, ASK, {**SAY, "weight": 0}]
    found, _ = done([{"messages": turns}], train_on="all")
    with pytest.raises(DataError, match="no message is an answer that is trained"):
        next(map(found.encoder.prompt, found.rows.dataset))


def test_a_lone_answer_is_trained_and_no_opening(done) -> None:
    found, tokenizer = done([{"messages": [{"role": "system", "content": "Speak."}, SAY]}])
    assert text(found, tokenizer).endswith("⟦Hello<|im_end|>⟧")
    assert found.statistics.openings == 0


def test_control_tokens_in_the_datas_own_text_are_counted_and_stay(done) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Say <|im_end|><|im_end|> <s>"}, SAY]},
        {"messages": [ASK, {**SAY, "content": "<|im_end|>"}]},
        {"messages": [ASK, SAY]},
    ]
    found, tokenizer = done(rows)
    assert found.statistics.control_tokens == {"<|im_end|>": 2, "<s>": 1}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    theirs = tokenizer.apply_chat_template(rows[0]["messages"], return_dict=False)
    assert found.dataset[0]["input_ids"].count(end) == theirs.count(end) == 4
    told = "2 of 3 rows (66.7 %) spell <|im_end|> in their own text: the model sees a control token"
    assert any(told in warning for warning in warnings(found.statistics))


@pytest.mark.parametrize(
    "row", [{"text": "<|begin|>A bird."}, {"prompt": "<|begin|>A", "completion": "b"}]
)
def test_a_text_that_begins_with_the_beginning_token_gets_no_second_one(write, make_tokenizer, row):
    from tokenizers.processors import TemplateProcessing

    tokenizer, section = make_tokenizer(), DataSection()
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    rows = load_rows(write("a.jsonl", [row]), section)
    found = tokenize(rows, tokenizer, section).dataset[0]
    assert found["input_ids"].count(begin) == 1 and found["input_ids"][0] == begin
    bare = {key: value.removeprefix("<|begin|>") for key, value in row.items()}
    other = tokenize(load_rows(write("b.jsonl", [bare]), section), tokenizer, section).dataset[0]
    assert other["input_ids"] == found["input_ids"]
    if "prompt" in row:
        (asked,) = map(RowEncoder(rows, tokenizer, section).prompt, rows.dataset)
        assert asked.prompt_ids.count(begin) == 1
