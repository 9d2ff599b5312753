"""Prompts in the turns of chat templates: positions by construction, whatever the family writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_task
from cli_support import document, invoke
from hypothesis import given, settings
from hypothesis import strategies as st
from made_chats import CHATML, CHATS, Chat
from made_tokenizers import Letters, gpt2, llama3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_cli_eval import SMALL
from test_prompts import covering

from abft_mlx import facts
from abft_mlx.errors import PromptError
from abft_mlx.evaluation import methods, protocols
from abft_mlx.loading import find
from abft_mlx.prompts import ChatTemplate, Prompt, PromptBuilder, Template, label_space
from abft_mlx.task import Task

WORDS = ("positive", "negative")
SHOWN = [("the film was good", 0), (" the meal was dull ", 1), ("dull: music!\n\nbad", 1)]
QUERY = "the music was lovely, and  stays"
TEMPLATE = Template(instruction="Which? ", query_prefix="Now: ")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
CHAT = "prompt.chat=true"
SECTION = tiny_task.recipe("evaluation.queries=4").evaluation


def builder_for(tokenizer: Any, template: Template = TEMPLATE, **options: Any) -> PromptBuilder:
    wording = ChatTemplate(tokenizer, template)
    space = label_space(tokenizer, wording, WORDS)
    return PromptBuilder(tokenizer, wording, space, **options)


def with_template(make: Any, text: str, markers: tuple[str, ...] = ()) -> Any:
    return Chat(make, text, markers).tokenizer()


def turns_of(texts: Sequence[str]) -> list[str]:
    turns = [f"text: {text} label:" for text in texts]
    turns[-1] = "Now: " + turns[-1]
    turns[0] = "Which? " + turns[0]
    return turns


def own(tokenizer: Any, shown: Sequence[tuple[str, str]], query: str, **options: Any) -> Any:
    """A chat's tokens, or text, as the tokenizer itself makes them, on the day of ours."""
    options = {"date_string": "26 Jul 2024", "enable_thinking": False, **options}
    messages = []
    for text, word in shown:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": word})
    messages.append({"role": "user", "content": query})
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **options
    )


def pairs_of(shown: Sequence[tuple[str, int]], query: str) -> tuple[list[tuple[str, str]], str]:
    *turns, last = turns_of([*(text for text, _ in shown), query])
    return [(turn, WORDS[label]) for turn, (_, label) in zip(turns, shown, strict=True)], last


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_the_chats_own(name: str, count: int) -> None:
    chat, shown = CHATS[name], SHOWN[:count]
    tokenizer = chat.tokenizer()
    pairs, last = pairs_of(shown, QUERY)
    text = own(tokenizer, pairs, last, tokenize=False)
    builder = builder_for(tokenizer)
    prompt = builder.build(shown, QUERY, 1)
    assert builder.text(shown, QUERY) == text
    # Special tokens are the template's: none is put before them.
    assert list(prompt.token_ids) == tokenizer.encode(text, add_special_tokens=False)
    assert list(prompt.token_ids) == own(tokenizer, pairs, last)
    at, found = 0, []
    for turn, word in pairs:
        at = text.index(chat.space + word, text.index(turn, at) + len(turn)) + len(chat.space)
        found += covering(tokenizer, text, at, at + len(word), add_special_tokens=False)
    assert found == list(prompt.label_positions)
    labels = [builder.space.first_ids[label] for _, label in shown]
    assert [prompt.token_ids[position] for position in prompt.label_positions] == labels
    # What a model that gives the right answer would say next.
    answered = tokenizer.encode(f"{text}{chat.space}negative", add_special_tokens=False)
    assert answered == [*prompt.token_ids, *prompt.target]


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=12), st.integers(0, 1)), min_size=1, max_size=3
    ),
    st.text(min_size=1, max_size=12),
)
def test_any_text_makes_a_prompt_equal_to_its_chat(
    shown: list[tuple[str, int]], query: str
) -> None:
    for chat in CHATS.values():
        builder = builder_for(chat.tokenizer(), allow_empty=True)
        prompt = builder.build(shown, query, 0)
        assert list(prompt.token_ids) == own(chat.tokenizer(), *pairs_of(shown, query))
        positions = [prompt.token_ids[position] for position in prompt.label_positions]
        assert positions == [builder.space.first_ids[label] for _, label in shown]


@pytest.mark.parametrize("name", CHATS)
def test_ends_of_turns_are_bare_in_every_family(name: str) -> None:
    # Some templates trim what they are given: with spaces left there, these would refuse the text.
    template = Template(input_prefix="", label_prefix="", query_prefix="\n")
    builder = builder_for(CHATS[name].tokenizer(), template, allow_empty=True)
    for shown, query in ((" good  film\n", "\tbad "), ("good", "")):
        text = builder.text([(shown, 0)], query)
        pairs = [(shown.strip(), "positive")]
        assert text == own(CHATS[name].tokenizer(), pairs, query.strip(), tokenize=False)
        assert builder.build([(shown, 0)], query, 0)


def test_thoughts_are_left_out_also_behind_mlx_lm() -> None:
    plain = CHATS["thinking"].tokenizer()
    wrapped = TokenizerWrapper(plain)
    assert wrapped.has_thinking
    prompt = builder_for(wrapped).build(SHOWN, QUERY, 0)
    assert prompt == builder_for(plain).build(SHOWN, QUERY, 0)
    assert plain.decode(prompt.token_ids).endswith("<think>\n\n</think>\n\n")


def test_dates_are_the_same_tomorrow() -> None:
    tokenizer = CHATS["headers"].tokenizer()
    template = ChatTemplate(tokenizer, TEMPLATE)
    text = template.render([("one", "positive")], QUERY)
    pairs, last = pairs_of([("one", 0)], QUERY)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == own(tokenizer, pairs, last)
    # The same template would write another date by itself.
    assert ids != own(tokenizer, pairs, last, date_string="27 Jul 2024")
    assert template.fingerprint(2) == ChatTemplate(tokenizer, Template()).fingerprint(2)
    assert len({template.fingerprint(2), template.fingerprint(3)}) == 2


def test_a_generation_prompt_may_end_in_the_labels_space() -> None:
    tokenizer = with_template(llama3, PLAIN + "{{ 'assistant: ' }}")
    builder = builder_for(tokenizer)
    prompt = builder.build(SHOWN[:1], QUERY, 1)
    first, last = turns_of(["the film was good", QUERY])
    text = f"user: {first}\nassistant: positive\nuser: {last}\nassistant:"
    assert builder.text(SHOWN[:1], QUERY) == text
    assert list(prompt.token_ids) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(list(prompt.target)) == " negative"


REFUSED = [
    ("{{ raise_exception('system turn\nmissing') }}", r"fails on user and .* \(system turn miss"),
    ("{{ messages[0].nothing.here }}", "fails on user and assistant turns"),
    (PLAIN + "{{ messages[1].content }}", "does not write turn 2 of 3 once"),
    (
        "{% for m in messages|reverse %}{{ m.role + m.content }}{% endfor %}",
        "does not write turn 2 of 3 once and in its place",
    ),
    # A header that the model itself is to write first, as in gpt-oss.
    (
        "{% for m in messages %}{{ '<' + m.role + '>' + ('final:' if m.role[0] == 'a' else '') "
        "+ m.content }}{% endfor %}{{ '<assistant>' }}",
        "ends a prompt in '<assistant>', where assistant turns begin with '<assistant>final:'",
    ),
    # No generation prompt where there ought to be one.
    (PLAIN, r"ends a prompt in '\\n', where assistant turns begin with '\\nassistant: '"),
    # The answer would be " positive" in demonstrations and "positive" at the end.
    (
        PLAIN.replace("': '", "':'") + "{{ 'assistant: ' }}",
        "'positive' is not the same tokens behind an assistant header",
    ),
    # Hostile ones: without end, or out of Jinja's sandbox.
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "chat template"),
    ("{% for i in range(10**12) %}{% endfor %}", "chat template"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template"),
    ("{{ cycler.__init__.__globals__.os.popen('touch ran') }}", "chat template"),
    ("{% include '/etc/passwd' %}", "chat template"),
    ("{{ raise_exception.__globals__ }}", "chat template"),
]


@pytest.mark.parametrize(("template", "said"), REFUSED)
def test_templates_that_cannot_be_are_refused_in_one_line(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match=said) as caught:
        builder_for(with_template(llama3, template))
    assert "\n" not in str(caught.value)
    assert "set prompt.chat=false" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_chat_template_and_changed_contents_are_refused() -> None:
    for tokenizer in (gpt2(), TokenizerWrapper(gpt2()), Letters(*WORDS)):
        with pytest.raises(PromptError, match="no chat template, which prompt"):
            ChatTemplate(tokenizer, TEMPLATE)
    changing = PLAIN.replace("m.content", "m.content|replace('bad', 'good')")
    builder = builder_for(with_template(llama3, changing + "{{ 'assistant:' }}"))
    assert builder.build([("good", 0)], QUERY, 0)
    with pytest.raises(PromptError, match=r"^prompt 7: .* changes what stands in a turn: .*so bad"):
        builder.build([("good", 0)], "so bad", 0, where="prompt 7")
    refused = invoke("eval", "demo", "--set", CHAT)
    assert refused.exit_code == 2
    assert "set prompt.chat=false" in refused.stderr.splitlines()[-1]


class _LettersInChat(Letters):
    has_chat_template = True

    def __init__(self, *joined: str) -> None:
        super().__init__(*joined, *WORDS)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {
            "tokenize": False, "add_generation_prompt": True, "enable_thinking": False,
        }  # fmt: skip
        return "".join(f"<{one['role'][0]}>{one['content']}|" for one in messages) + "<a>"


def test_merging_across_turns_is_refused_as_in_plain_prompts() -> None:
    assert builder_for(_LettersInChat()).build(SHOWN, QUERY, 0)
    with pytest.raises(PromptError, match=r"behind an assistant header \('\|<a>'\)"):
        builder_for(_LettersInChat(">positive"))
    with pytest.raises(PromptError, match=r"behind an assistant turn \('\|<u>'\) merges with the"):
        builder_for(_LettersInChat("negative|"))
    # Only this text's beginning merges with the marker before it and the label before that.
    builder = builder_for(_LettersInChat("positive|<u>text: bad"))
    assert builder.build([("bad", 0), ("good", 1)], QUERY, 0)
    with pytest.raises(PromptError, match=r"merges across.*set prompt.chat=false"):
        builder.build([("good", 0), ("bad", 0)], QUERY, 0)


def test_labels_of_several_tokens_in_a_chat() -> None:
    tokenizer = CHATS["chatml"].tokenizer()
    wording, names = ChatTemplate(tokenizer, TEMPLATE), ("lovely", "not spam", "spam")
    space = label_space(tokenizer, wording, names)
    builder = PromptBuilder(tokenizer, wording, space)
    shown = [("good", 0), ("bad", 1), ("dull", 2)]
    prompt, text = builder.build(shown, QUERY, 1), builder.text(shown, QUERY)
    *turns, last = turns_of([*(text for text, _ in shown), QUERY])
    pairs = [(turn, names[label]) for turn, (_, label) in zip(turns, shown, strict=True)]
    assert list(prompt.token_ids) == own(tokenizer, pairs, last)
    for (turn, word), position in zip(pairs, prompt.label_positions, strict=True):
        at = text.index(word, text.index(turn) + len(turn))
        places = covering(tokenizer, text, at, at + len(word), add_special_tokens=False)
        assert position == places[-1]
    assert max(map(len, space.token_ids)) > 1
    # Found behind a line break, not behind a space: other tokens than in plain prompts.
    assert label_space(tokenizer, TEMPLATE, names).token_ids[2] != space.token_ids[2]


def test_label_affix_has_no_place_in_a_chat() -> None:
    tokenizer = with_template(llama3, CHATML, ("<|im_start|>", "<|im_end|>"))
    one, other = (builder_for(tokenizer, Template(label_affix=affix)) for affix in ("\n", " ;"))
    assert one.build(SHOWN, QUERY, 0) == other.build(SHOWN, QUERY, 0)


MAKERS: dict[str, tuple[int, Callable[[Task], Sequence[Prompt]]]] = {
    "training": (3, lambda task: task.training_prompts(tiny_task.recipe().training)),
    "test": (3, lambda task: task.test_prompts(SECTION)),
    "zero-shot": (0, lambda task: methods.zero_shot_prompts(task, SECTION)),
    "contextual": (3, lambda task: methods.contextual_prompts(task, 4)),
    "anchors": (3, lambda task: methods.anchor_prompts(task, 4)),
    "priors": (3, lambda task: [*chain(*protocols.prior_prompts(task, SECTION))]),
    "wrong labels": (3, lambda task: [*chain(*protocols.wrong_label_prompts(task, SECTION))]),
    "unseen": (3, lambda task: protocols.unseen_prompts(task, SECTION)),
    "variants": (
        3,
        lambda task: [*chain(*(m for _, m in protocols.variant_prompts(task, SECTION)))],
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_prompt_is_a_chat(name: str) -> None:
    (k, make), tokenizer = MAKERS[name], CHATS["chatml"].tokenizer()
    prompts = make(tiny_task.task(CHAT, tokenizer=tokenizer))
    for prompt in prompts:
        system, *turns = tokenizer.decode(prompt.token_ids).split("<|im_start|>")[1:]
        assert system == "system\nYou are a helpful machine.<|im_end|>\n"
        roles = [turn.partition("\n")[0] for turn in turns]
        assert roles == ["user", "assistant"] * (k + 1)
        words = [tiny_task.NAMES[label] for label in prompt.demonstration_labels]
        answers = [turn.removeprefix("assistant\n") for turn in turns[1:-1:2]]
        assert answers == [f"{word}<|im_end|>\n" for word in words]
        shown = [tokenizer.decode([prompt.token_ids[at]]) for at in prompt.label_positions]
        assert shown == words
    if name == "variants":
        assert len({one.token_ids for one in prompts[::4]}) == 9


def test_a_chat_template_is_part_of_what_a_checkpoint_belongs_to() -> None:
    model = SimpleNamespace(fingerprint="sha256:0")
    tasks = [
        tiny_task.task(change, tokenizer=CHATS[name].tokenizer())
        for name in ("chatml", "thinking")
        for change in (CHAT, "prompt.chat=false")
    ]
    made = [facts.made_with(tiny_task.recipe(CHAT), model, [task]) for task in tasks]
    assert len(set(map(facts.digest, made))) == 3


def test_commands_speak_in_turns_and_write_it_down(tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(find("demo"), model)
    # In plain words, so that the bundled model's vocabulary has them.
    (model / "chat_template.jinja").write_text(PLAIN + "{{ 'assistant:' }}", encoding="utf-8")
    trained = invoke(
        "finetune", "demo", "--model", model, "--output", run, "--set", CHAT, "--set",
        "training.updates=1", "--set", "training.prompts_per_update=4", "--set",
        "training.validate_every=1", "--set", "training.validation_prompts=8", "--set",
        "data.validation_rows=8",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert "4 demonstrations in chat turns" in trained.stderr + trained.stdout
    template = json.loads((run / "run.json").read_text())["chat_template"]
    measured = document(invoke("eval", "--adapter", run, *SMALL, "--json"))
    assert measured["chat_template"] == template
    plain = document(
        invoke("eval", "--adapter", run, "--set", "prompt.chat=false", *SMALL, "--json")
    )
    assert plain["chat_template"] is None
    assert plain["methods"]["vanilla"] != measured["methods"]["vanilla"]
