"""Chat templates in the manner of the well-known families, on tokenizers that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from made_tokenizers import gemma, llama2_bytes, llama3, qwen, tekken
from tokenizers import AddedToken

# Turns between markers, and a system turn of its own where nobody gives one.
CHATML = """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful machine.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Answers after the last question keep their thoughts, earlier ones lose them; without thinking the
# generation prompt holds an empty thought.
THINKING = """\
{%- set found = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set found.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- if message.role == 'assistant' and loop.index0 > found.last %}
        {%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# A BOS, a date in a system turn, contents trimmed, two line breaks behind headers.
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# No generation prompt of its own; every answer stands between spaces; a BOS for every question.
INST = """\
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""

# One BOS, control tokens, no spaces, no system role.
TEKKEN = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- else %}
        {{- raise_exception('only user and assistant roles are supported') }}
    {%- endif %}
{%- endfor %}
"""

# The assistant is called model; a system role is refused; contents are trimmed.
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}\
{% endif %}{% for message in messages %}\
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}\
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}\
"""


@dataclass(frozen=True)
class Chat:
    """A family.

    Attributes:
        make: its kind of tokenizer.
        template: its chat template.
        markers: its own special tokens.
        space: what stands between a header and a label.
    """

    make: Callable[..., Any]
    template: str
    markers: tuple[str, ...]
    space: str = ""

    @cache  # noqa: B019  (six families, kept as long as the tests)
    def tokenizer(self) -> Any:
        """A tokenizer of its own, with markers and chat template."""
        tokenizer = self.make.__wrapped__(answers=True)
        given = [AddedToken(marker, special=True, normalized=False) for marker in self.markers]
        tokenizer.add_tokens(given, special_tokens=True)
        tokenizer.chat_template = self.template
        return tokenizer


IM = ("<|im_start|>", "<|im_end|>")
CHATS = {
    "chatml": Chat(qwen, CHATML, IM),
    "thinking": Chat(qwen, THINKING, (*IM, "<think>", "</think>")),
    "headers": Chat(
        llama3,
        HEADERS,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "inst": Chat(llama2_bytes, INST, (), " "),
    "tekken": Chat(tekken, TEKKEN, ()),
    "turns": Chat(gemma, TURNS, ("<start_of_turn>", "<end_of_turn>")),
}
