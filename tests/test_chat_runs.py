"""Everything that makes prompts makes them in chat turns when asked, and whole commands do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_task
from cli_support import document, invoke
from made_chats import CHATS
from test_cli_eval import SMALL

from abft_mlx import facts, recipe
from abft_mlx.evaluation import bias, methods, robustness, unseen
from abft_mlx.loading import find
from abft_mlx.prompts import Prompt
from abft_mlx.task import Task

CHAT = "prompt.chat=true"
# In plain words, so that the bundled model's vocabulary has them; answers stand behind a space.
WORDED = """\
{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}
"""
SECTION = tiny_task.recipe("evaluation.queries=4").evaluation
MAKERS: dict[str, tuple[int, Callable[[Task], list[Prompt]]]] = {
    "training": (3, lambda task: task.training_prompts(tiny_task.recipe().training)),
    "test": (3, lambda task: task.test_prompts(SECTION)),
    "zero-shot": (0, lambda task: methods.zero_shot_prompts(task, SECTION)),
    "contextual": (3, lambda task: methods.contextual_prompts(task, 4)),
    "domain": (3, lambda task: methods.domain_prompts(task, 4)),
    "anchors": (3, lambda task: methods.anchor_prompts(task, 4)),
    "redrawn": (3, lambda task: robustness.redrawn_prompts(task, SECTION)),
    "priors": (3, lambda task: [*chain(*bias.prior_prompts(task, SECTION))]),
    "wrong labels": (3, lambda task: [*chain(*bias.wrong_label_prompts(task, SECTION))]),
    "unseen": (3, lambda task: unseen.unseen_prompts(task, SECTION)),
    "variants": (
        3,
        lambda task: [*chain(*(m for _, m in robustness.variant_prompts(task, SECTION)))],
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_every_prompt_is_a_chat(name: str) -> None:
    k, make = MAKERS[name]
    tokenizer = CHATS["chatml"].tokenizer()
    task = tiny_task.task(CHAT, tokenizer=tokenizer)
    made = make(task)
    assert made
    for prompt in made:
        system, *turns = tokenizer.decode(prompt.token_ids).split("<|im_start|>")[1:]
        assert system == "system\nYou are a helpful machine.<|im_end|>\n"
        roles = [turn.partition("\n")[0] for turn in turns]
        assert roles == ["user", "assistant"] * (k + 1)
        assert turns.pop() == "assistant\n"
        answers = [turn.removeprefix("assistant\n") for turn in turns[1::2]]
        words = [tiny_task.NAMES[label] for label in prompt.demonstration_labels]
        assert answers == [f"{word}<|im_end|>\n" for word in words]
        assert len(prompt.label_positions) == k
        shown = [tokenizer.decode([prompt.token_ids[at]]) for at in prompt.label_positions]
        assert shown == words
        assert tokenizer.decode(list(prompt.target)) == tiny_task.NAMES[prompt.gold]


def test_nine_wordings_stay_nine() -> None:
    task = tiny_task.task(CHAT, tokenizer=CHATS["chatml"].tokenizer())
    made = robustness.variant_prompts(task, SECTION)
    assert len({prompts[0].token_ids for _, prompts in made}) == 9


def test_a_chat_template_is_part_of_what_a_checkpoint_belongs_to() -> None:
    one = tiny_task.recipe(CHAT)
    model = SimpleNamespace(fingerprint="sha256:0")
    tasks = [
        tiny_task.task(change, tokenizer=CHATS[name].tokenizer())
        for name in ("chatml", "thinking")
        for change in (CHAT, "prompt.chat=false")
    ]
    found = {facts.digest(facts.made_with(one, model, [task])) for task in tasks}
    assert len(found) == 3


def test_chat_holds_for_all_tasks_of_a_recipe() -> None:
    changes = ['mixture=["trec", "sst2"]', 'evaluation.transfer=["subjective"]']
    plain = recipe.resolve(recipe.default(changes))
    chat = recipe.resolve(recipe.default([*changes, CHAT]))
    for one, wanted in ((plain, False), (chat, True)):
        tasks = [recipe.task(one), *one.mixture, *one.evaluation.transfer]
        assert [task.prompt.chat for task in tasks] == [wanted] * 4
        assert [task.prompt.label_prefix for task in tasks[1:]] == [
            recipe.load(name).prompt.label_prefix for name in ("trec", "sst2", "subjective")
        ]
    assert recipe.loads(recipe.dumps(chat)) == chat
    # A task of its own may be a chat where the recipe is none.
    mixed = recipe.default(['mixture=[{"data": {"source": "a"}, "prompt": {"chat": true}}]'])
    assert recipe.resolve(mixed).mixture[0].prompt.chat
    assert not recipe.resolve(mixed).prompt.chat


def test_commands_speak_in_turns_and_write_it_down(tmp_path: Path) -> None:
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(find("demo"), model)
    (model / "chat_template.jinja").write_text(WORDED, encoding="utf-8")
    trained = invoke(
        "finetune", "demo", "--model", model, "--output", run, "--set", CHAT, "--set",
        "training.updates=1", "--set", "training.prompts_per_update=4", "--set",
        "training.validate_every=1", "--set", "training.validation_prompts=8", "--set",
        "data.validation_rows=8",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert "4 demonstrations in chat turns" in trained.stderr + trained.stdout
    assert recipe.load(run).prompt.chat
    template = json.loads((run / "run.json").read_text())["chat_template"]
    assert template.startswith("sha256:")
    measured = invoke(
        "eval", "--adapter", run, "--protocol", "all", "--methods", "all", "--transfer",
        "generated/urgency", *SMALL, "--json",
    )  # fmt: skip
    assert measured.exit_code == 0, measured.stderr
    found = document(measured)
    assert found["chat_template"] == template
    assert found["transfer"]["tasks"]["generated/urgency"]["prompts"]
    plain = document(
        invoke("eval", "--adapter", run, "--set", "prompt.chat=false", *SMALL, "--json")
    )
    assert plain["chat_template"] is None
    chat, other = (one["methods"]["vanilla"]["true_label_probability"] for one in (found, plain))
    assert chat != other


def test_a_model_without_a_chat_template_is_told_in_one_line() -> None:
    result = invoke("eval", "demo", "--set", CHAT)
    assert result.exit_code == 2
    assert (
        result.stderr.splitlines()[-1].count("no chat template, which prompt.chat=true asks") == 1
    )
    assert "set prompt.chat=false" in result.stderr
