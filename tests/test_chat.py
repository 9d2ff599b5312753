"""Prompts in the turns of chat templates: positions by construction, whatever the family writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_chats import CHATML, CHATS, Chat
from made_tokenizers import Letters, gpt2, llama3
from mlx_lm.tokenizer_utils import TokenizerWrapper
from test_label_words import covering

from abft_mlx.errors import PromptError
from abft_mlx.prompts import ChatTemplate, PromptBuilder, Template, label_space

WORDS = ("positive", "negative")
SHOWN = [("the film was good", 0), (" the meal was dull ", 1), ("dull: music!\n\nbad", 1)]
QUERY = "the music was lovely, and  stays"
TEMPLATE = Template(instruction="Which? ", query_prefix="Now: ")


def builder_for(tokenizer: Any, template: Template = TEMPLATE, **options: Any) -> PromptBuilder:
    wording = ChatTemplate(tokenizer, template)
    space = label_space(tokenizer, wording, WORDS)
    return PromptBuilder(tokenizer, wording, space, **options)


def user_turns(texts: Sequence[str]) -> list[str]:
    turns = [f"text: {text} label:" for text in texts]
    turns[-1] = "Now: " + turns[-1]
    turns[0] = "Which? " + turns[0]
    return turns


def own(tokenizer: Any, shown: Sequence[tuple[str, str]], query: str, **options: Any) -> list[int]:
    """The tokens of a chat as the tokenizer itself makes them, on the day that ours are made."""
    options = {"date_string": "26 Jul 2024", "enable_thinking": False, **options}
    messages = []
    for text, word in shown:
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": word})
    messages.append({"role": "user", "content": query})
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **options
    )


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", CHATS)
def test_prompts_are_the_chats_own(name: str, count: int) -> None:
    chat = CHATS[name]
    tokenizer = chat.tokenizer()
    shown = SHOWN[:count]
    *turns, query = user_turns([*(text for text, _ in shown), QUERY])
    pairs = [(turn, WORDS[label]) for turn, (_, label) in zip(turns, shown, strict=True)]
    text = chat.text(pairs, query)
    builder = builder_for(tokenizer)
    prompt = builder.build(shown, QUERY, 1)
    assert builder.text(shown, QUERY) == text
    # Special tokens are the template's: none is put before them.
    assert list(prompt.token_ids) == tokenizer.encode(text, add_special_tokens=False)
    assert list(prompt.token_ids) == own(tokenizer, pairs, query)
    assert prompt.last == len(prompt.token_ids) - 1
    at, stretches = 0, []
    for turn, word in pairs:
        at = text.index(chat.space + word, text.index(turn, at) + len(turn)) + len(chat.space)
        stretches.append((at, at + len(word)))
    found = [covering(tokenizer, text, *one, add_special_tokens=False) for one in stretches]
    assert found == [[position] for position in prompt.label_positions]
    labels = [builder.space.first_ids[label] for _, label in shown]
    assert [prompt.token_ids[position] for position in prompt.label_positions] == labels
    # What a model that gives the right answer would say next.
    answered = tokenizer.encode(f"{text}{chat.space}negative", add_special_tokens=False)
    assert answered == [*prompt.token_ids, *prompt.target]


@pytest.mark.parametrize("name", CHATS)
def test_bos_stands_where_the_chat_template_writes_it(name: str) -> None:
    prompt = builder_for(CHATS[name].tokenizer()).build(SHOWN, QUERY, 0)
    count = {"chatml": 0, "thinking": 0, "inst": 4}.get(name, 1)
    assert prompt.token_ids.count(1) == count
    assert CHATS[name].tokenizer().bos_token_id == 1


@settings(max_examples=25)
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
        *turns, last = user_turns([*(text for text, _ in shown), query])
        pairs = [(turn, WORDS[label]) for turn, (_, label) in zip(turns, shown, strict=True)]
        assert list(prompt.token_ids) == own(chat.tokenizer(), pairs, last)
        positions = [prompt.token_ids[position] for position in prompt.label_positions]
        assert positions == [builder.space.first_ids[label] for _, label in shown]


@pytest.mark.parametrize("name", CHATS)
def test_ends_of_turns_are_bare_in_every_family(name: str) -> None:
    # Some templates trim what they are given: with spaces left there, these would refuse the text.
    template = Template(input_prefix="", label_prefix="", query_prefix="\n")
    builder = builder_for(CHATS[name].tokenizer(), template, allow_empty=True)
    made = builder.text([(" good  film\n", 0)], "\tbad ")
    assert made == CHATS[name].text([("good  film", "positive")], "bad")
    assert builder.build([(" good  film\n", 0)], "\tbad ", 0)
    assert builder.text([("good", 1)], "") == CHATS[name].text([("good", "negative")], "")
    assert builder.build([("good", 1)], "", 0)


def test_thoughts_are_left_out_also_behind_mlx_lm() -> None:
    plain = CHATS["thinking"].tokenizer()
    wrapped = TokenizerWrapper(plain)
    assert wrapped.has_thinking
    prompt = builder_for(wrapped).build(SHOWN, QUERY, 0)
    assert prompt == builder_for(plain).build(SHOWN, QUERY, 0)
    assert plain.decode(prompt.token_ids).endswith("<think>\n\n</think>\n\n")
    assert "<think>" not in plain.decode(prompt.token_ids[:-6])


def test_dates_are_the_same_tomorrow() -> None:
    tokenizer = CHATS["headers"].tokenizer()
    assert "Today: 26 Jul 2024" in builder_for(tokenizer).text([], QUERY)
    template = ChatTemplate(tokenizer, TEMPLATE)
    text = template.render([("one", "positive")], QUERY)
    pairs = [(user_turns(["one", ""])[0], "positive")]
    last = user_turns(["", QUERY])[1]
    assert tokenizer.encode(text, add_special_tokens=False) == own(tokenizer, pairs, last)
    # The same template would write another date by itself.
    assert own(tokenizer, pairs, last, date_string="27 Jul 2024") != own(tokenizer, pairs, last)
    assert template.fingerprint(2) == ChatTemplate(tokenizer, Template()).fingerprint(2)
    assert len({template.fingerprint(2), template.fingerprint(3)}) == 2


def with_template(make: Any, text: str, markers: tuple[str, ...] = ()) -> Any:
    return Chat(make, text, markers, CHATS["chatml"].text).tokenizer()


PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"


def test_a_generation_prompt_may_end_in_the_labels_space() -> None:
    tokenizer = with_template(llama3, PLAIN + "{{ 'assistant: ' }}")
    builder = builder_for(tokenizer)
    prompt = builder.build(SHOWN[:1], QUERY, 1)
    first, last = user_turns(["the film was good", QUERY])
    text = f"user: {first}\nassistant: positive\nuser: {last}\nassistant:"
    assert builder.text(SHOWN[:1], QUERY) == text
    assert list(prompt.token_ids) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(list(prompt.target)) == " negative"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('system turn\nmissing') }}",
            r"fails on user and assistant turns \(sys",
        ),
        ("{{ messages[0].nothing.here }}", "fails on user and assistant turns"),
        ("{{ messages[-1].content }}", "does not write turn 1 of 3 once and in its place"),
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
    ],
)
def test_templates_that_cannot_be_are_refused_in_one_line(template: str, said: str) -> None:
    with pytest.raises(PromptError, match=said) as caught:
        builder_for(with_template(llama3, template))
    assert "\n" not in str(caught.value)
    assert "set prompt.chat=false" in str(caught.value)


def test_no_chat_template_is_said_in_one_line() -> None:
    for tokenizer in (gpt2(), TokenizerWrapper(gpt2()), Letters(*WORDS)):
        with pytest.raises(PromptError) as caught:
            ChatTemplate(tokenizer, TEMPLATE)
        assert str(caught.value) == (
            "this model's tokenizer has no chat template, which prompt.chat=true asks for: choose "
            "an instruct model that has one, or set prompt.chat=false for plain prompts"
        )


def test_changed_contents_name_the_prompt_and_what_differs() -> None:
    tokenizer = with_template(
        llama3, PLAIN.replace("m.content", "m.content|replace('bad', 'good')")
    )
    tokenizer.chat_template += "{{ 'assistant:' }}"
    builder = builder_for(tokenizer)
    assert builder.build([("good", 0)], QUERY, 0)
    with pytest.raises(PromptError) as caught:
        builder.build([("good", 0)], "so bad", 0, where="evaluation prompt 7")
    assert str(caught.value) == (
        "evaluation prompt 7: this model's chat template changes what stands in a turn: it writes "
        "'ext: so good label:\\nassistant:' where its turns make "
        "'ext: so bad label:\\nassistant:'; set prompt.chat=false, or change the text"
    )


class _LettersInChat(Letters):
    has_chat_template = True

    def __init__(self, *joined: str) -> None:
        super().__init__(*joined, *WORDS)

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        assert options == {
            "tokenize": False, "add_generation_prompt": True, "enable_thinking": False,
        }  # fmt: skip
        made = "".join(f"<{one['role'][0]}>{one['content']}|" for one in messages)
        return f"{made}<a>"


def test_merging_across_turns_is_refused_as_in_plain_prompts() -> None:
    assert builder_for(_LettersInChat()).build(SHOWN, QUERY, 0)
    with pytest.raises(PromptError, match=r"behind an assistant header \('\|<a>'\)"):
        builder_for(_LettersInChat(">positive"))
    with pytest.raises(PromptError, match=r"behind an assistant turn \('\|<u>'\) merges with the"):
        builder_for(_LettersInChat("negative|"))
    # Only this text's beginning merges with the marker before it and the label before that.
    builder = builder_for(_LettersInChat("positive|<u>text: bad"))
    assert builder.build([("bad", 0), ("good", 1)], QUERY, 0)
    with pytest.raises(PromptError) as caught:
        builder.build([("good", 0), ("bad", 0)], QUERY, 0, where="training prompt 3")
    assert str(caught.value).startswith("training prompt 3: this model's tokenizer merges across")
    assert str(caught.value).endswith("wrong: set prompt.chat=false for plain prompts")


def test_labels_of_several_tokens_in_a_chat() -> None:
    tokenizer = CHATS["chatml"].tokenizer()
    wording = ChatTemplate(tokenizer, TEMPLATE)
    with pytest.raises(PromptError, match="same tokens, 'spam'"):
        label_space(tokenizer, wording, ["a", "b"], {"a": "spam", "b": "spam"})
    names = ("lovely", "not spam", "spam")
    space = label_space(tokenizer, wording, names)
    builder = PromptBuilder(tokenizer, wording, space)
    shown = [("good", 0), ("bad", 1), ("dull", 2)]
    prompt = builder.build(shown, QUERY, 1)
    *turns, last = user_turns([*(text for text, _ in shown), QUERY])
    pairs = [(turn, names[label]) for turn, (_, label) in zip(turns, shown, strict=True)]
    assert list(prompt.token_ids) == own(tokenizer, pairs, last)
    text = builder.text(shown, QUERY)
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


@pytest.mark.parametrize(
    ("template", "line"),
    [
        (
            "{{ raise_exception('system  turn\nmissing ' + 'x' * 200) }}",
            "this model's chat template fails on user and assistant turns (system turn missing "
            f"{'x' * 100}): set prompt.chat=false for plain prompts",
        ),
        (
            "{{ raise_exception('') }}",
            "this model's chat template fails on user and assistant turns (TemplateError): set "
            "prompt.chat=false for plain prompts",
        ),
        (
            PLAIN + "{{ messages[1].content }}",
            "this model's chat template does not write turn 2 of 3 once and in its place: set "
            "prompt.chat=false for plain prompts",
        ),
        # Of a long header and a long end, the last 32 characters are shown.
        (
            PLAIN.replace("m.role", "'-' * 40 + m.role") + "{{ '=' * 40 }}",
            f"this model's chat template ends a prompt in '{'=' * 32}', where assistant turns "
            f"begin with '{'-' * 21}assistant: ', so that a label has no place right behind a "
            "prompt: set prompt.chat=false for plain prompts",
        ),
    ],
)
def test_refusals_word_for_word(template: str, line: str) -> None:
    with pytest.raises(PromptError) as caught:
        builder_for(with_template(llama3, template))
    assert str(caught.value) == line


def test_label_words_that_merge_word_for_word() -> None:
    way_out = (
        "in this model's vocabulary: choose another with prompt.label_words, or set "
        "prompt.chat=false for plain prompts"
    )
    with pytest.raises(PromptError) as caught:
        builder_for(_LettersInChat(">positive"))
    assert str(caught.value) == (
        "the label word 'positive' is not the same tokens behind an assistant header "
        f"('|<a>') and the generation prompt ('|<a>') {way_out}"
    )
    with pytest.raises(PromptError) as caught:
        builder_for(_LettersInChat("negative|"))
    assert str(caught.value) == (
        "what the chat template writes behind an assistant turn ('|<u>') merges with the label "
        f"word 'negative' {way_out}"
    )
    # Of a long end of a turn, the first 24 characters are shown.
    long = with_template(llama3, PLAIN.replace("'\\n'", "'-' * 40") + "{{ 'assistant: ' }}")
    assert f"turn ('{'-' * 24}') merges" in ChatTemplate(long, TEMPLATE).merges_after("spam")


BEFORE = "{{ 'bad: ' if 'bad' in messages[-1].content else '' }}"
AFTER = "{{ ' well' if 'bad' in messages[-1].content else '' }}"


@pytest.mark.parametrize(
    ("template", "written", "ours"),
    [
        # From eight characters before the first that differs, 32 of them.
        (PLAIN + "{{ 'assistant:' }}" + AFTER, "sistant: well", "sistant:"),
        (
            BEFORE + PLAIN + "{{ 'assistant:' }}",
            "bad: user: Which? text: ",
            "user: Which? text: good ",
        ),
    ],
)
def test_what_a_template_adds_to_one_text_is_shown(template: str, written: str, ours: str) -> None:
    with pytest.raises(PromptError) as caught:
        builder_for(with_template(llama3, template)).build([("good", 0)], "bad", 0)
    assert str(caught.value) == (
        "prompt: this model's chat template changes what stands in a turn: it writes "
        f"{written!r} where its turns make {ours!r}; set prompt.chat=false, or change the text"
    )


def test_a_frame_is_learned_once_and_named_by_its_sum() -> None:
    tokenizer = with_template(llama3, PLAIN + "{{ 'assistant:' }}")
    template = ChatTemplate(tokenizer, TEMPLATE)
    frame = ("user: ", "\nassistant: ", "\nuser: ", "\nassistant:")
    assert template.frame(1) == frame
    assert template.frame(0) == ("user: ", "\nassistant:")
    assert (template.anchor, template.ending) == ("\nassistant:", "\nassistant:")
    assert (template.after_label, template.label("spam")) == ("\nuser: ", " spam")
    assert template.pieces(["a"], "b") == [
        "user: Which? text: a label:\nassistant:",
        "\nuser: Now: text: b label:\nassistant:",
    ]
    summed = hashlib.sha256(json.dumps(list(frame)).encode()).hexdigest()
    assert template.fingerprint(1) == f"sha256:{summed}"
    assert template.frame(1) is template.frame(1)
