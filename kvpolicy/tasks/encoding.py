"""Samples in the tokens of a model: chats rendered, prompts and answers encoded, lengths measured and met."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from kvpolicy.errors import TaskError
from kvpolicy.tasks.sample import Message, Sample
from kvpolicy.words import clip

ROLES: Final = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
SLACK: Final = 100
"""A length is met once it falls short by less than this part of it."""
_PIECES = re.compile(r"[^\W\d_]{1,5}|\d{1,3}|[^\w\s]|_")
"""What a tokenizer may make of a text, roughly: where none is given, lengths are counted in these."""


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(messages: Sequence[Message], prefix: str, tokenizer: Any, template: bool) -> tuple[tuple[str, ...], bool]:
    """A chat as the text that a model reads: its parts, one for each turn of the user, and whether by the template.

    Without a template a single message stands as it is, and several as lines such as `User: ...`.

    Args:
        messages: those before the answer.
        prefix: how the answer begins.
        tokenizer: of the model, or None.
        template: whether the tokenizer's chat template is used where it has one.

    Raises:
        TaskError: the template refuses the messages.
    """
    if template and has_template(tokenizer):
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "user"] or [len(messages)]
        texts = [_templated(messages[:end], tokenizer) for end in (*ends[:-1], len(messages))]
        prefix = prefix.lstrip(" ") if texts[-1][-1:].isspace() else prefix
    elif len(messages) == 1:
        texts = [messages[0]["content"]]
    else:
        lines = [f"{ROLES.get(message['role'], message['role'])}: {message['content']}\n" for message in messages]
        users = [i for i, message in enumerate(messages) if message["role"] == "user"] or [len(messages) - 1]
        texts = ["".join(lines[: i + 1]) + "Assistant:" for i in (*users[:-1], len(messages) - 1)]
    whole, parts, done = texts[-1] + prefix, [], 0
    for text in texts[:-1]:
        if whole.startswith(text) and len(text) > done:
            parts.append(whole[done : len(text)])
            done = len(text)
    return (*parts, whole[done:]), template and has_template(tokenizer)


def _templated(messages: Sequence[Message], tokenizer: Any) -> str:
    try:
        given = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # of jinja2, which the template raises it with
        raise TaskError(
            f"the tokenizer's chat template must take the messages ({', '.join(m['role'] for m in messages)}), found: "
            f"{clip(str(error))}; change the roles, or use no template (template=false)"
        ) from error


def after(prompt: str, answer: str, rendered: bool, prefix: str = "") -> str:
    """An answer as it follows a prompt: with a space before it where words would run together."""
    bare = rendered and not prefix
    return answer if bare or prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def encode(sample: Sample, tokenizer: Any) -> tuple[list[list[int]], list[int]]:
    """The parts of the prompt, at least one, and the answer, in tokens. Together the parts are the prompt's tokens.

    Prompt and answer are encoded together where that leaves the prompt as it is: tokenizers may put a space before the
    first word. A turn ends where the tokens of the prompt up to there and those of the whole prompt part.
    """
    if sample.prompt_ids:
        return [list(sample.prompt_ids)], list(sample.answer_ids)
    plain = {"add_special_tokens": False}
    given = plain if sample.rendered else {}
    prompt = list(tokenizer(sample.prompt, verbose=False, **given)["input_ids"])
    both = list(tokenizer(sample.prompt + sample.answer, verbose=False, **given)["input_ids"])
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        answer = both[len(prompt) :]
    else:
        answer = list(tokenizer(sample.answer, verbose=False, **plain)["input_ids"])
    parts, done, text = [], 0, ""
    for turn in sample.turns[:-1]:
        text += turn
        end = _common(list(tokenizer(text, verbose=False, **given)["input_ids"]), prompt)
        if end > done:
            parts.append(prompt[done:end])
            done = end
    return [*parts, prompt[done:]], answer


def _common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def length_of(sample: Sample, tokenizer: Any) -> int:
    """Tokens of prompt and answer; without a tokenizer an estimate."""
    if tokenizer is None:
        return len(_PIECES.findall(sample.prompt)) + len(_PIECES.findall(sample.answer))
    parts, answer = encode(sample, tokenizer)
    return sum(map(len, parts)) + len(answer)


def count(text: str, tokenizer: Any) -> int:
    """Tokens of a text without special ones; without a tokenizer an estimate."""
    if tokenizer is None:
        return len(_PIECES.findall(text))
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def fit(
    build: Callable[[int], Sample], tokens: int, tokenizer: Any, least: int, guess: int, most: int | None = None
) -> tuple[Sample, int]:
    """A sample of at most `tokens` tokens, and near them, and the units of filling that it is made with.

    Args:
        build: makes a sample from a number of units; more of them are longer.
        tokens: prompt and answer together.
        tokenizer: of the model; None counts roughly.
        least: units of the shortest sample.
        guess: units to begin with.
        most: units of the longest.

    Raises:
        TaskError: the shortest sample is longer.
    """
    low, made = least, build(least)
    first = used = length_of(made, tokenizer)
    if used > tokens:
        raise TaskError(
            f"{made.task}: tokens must be at least {used} with this tokenizer and these options, found {tokens}; ask "
            "for a longer context (tokens=..., on the shell --tokens)"
        )
    high, over, units, turns = most and most + 1, None, guess, 0
    while tokens - used > tokens // SLACK and (high is None or high - low > 1):
        units = max(units, low + 1) if high is None else min(max(units, low + 1), high - 1)
        trial = build(units)
        length, turns = length_of(trial, tokenizer), turns + 1
        if length <= tokens:
            low, used, made = units, length, trial
        else:
            high, over = units, length
        # Lengths are nearly linear in units; where they are not, halving ends the search.
        if over is None or high is None:
            rate = (used - first) / (low - least) if low > least and used > first else 1.0
            units = low + max(int((tokens - used) / rate), 1)
        elif turns % 4 == 0:
            units = (low + high) // 2
        else:
            units = low + int((tokens - used) * (high - low) / max(over - used, 1))
    return made, low
