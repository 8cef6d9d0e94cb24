"""What stands in the context word for word: passages to copy, facts of an earlier turn, arguments of a tool call."""

from __future__ import annotations

import json
import random
from typing import Any, ClassVar

from pydantic import Field

from kvpolicy.tasks.haystack import filling, hide
from kvpolicy.tasks.sample import Message, Sample
from kvpolicy.tasks.task import Chat, Fitted, spread
from kvpolicy.tasks.vocabulary import ADJECTIVES, NOUNS, WORDS, distinct

_DEPTH = "Where in the context what is asked for stands, from 0 to 1; default: spread evenly over the samples."


class Copying(Fitted):
    """A passage of drawn words to be copied, given its first words.

    The text is lines of eight words drawn at random, so that a passage can only be copied, not guessed. The score is
    the share of the passage's words that the output has in the same order.
    """

    name: ClassVar[str] = "copying"
    words: int = Field(24, ge=1, le=10_000, description="Words of the passage.")
    depth: float | None = Field(None, ge=0, le=1, description=_DEPTH)

    @property
    def cue(self) -> int:
        """Words that the passage is found by."""
        return 8

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Units are words before and after the passage."""
        drawn = [rng.choice(WORDS) for _ in range(units + self.cue + self.words)]
        start = round((depth if self.depth is None else self.depth) * units)
        passage = drawn[start + self.cue : start + self.cue + self.words]
        text = "\n".join(" ".join(drawn[i : i + 8]) for i in range(0, len(drawn), 8))
        prompt = (
            f"Text:\n{text}\n\nThe same text again, from a place within:\n{' '.join(drawn[start : start + self.cue])}"
        )
        facts = {**spread([start / len(drawn)]), "length": self.tokens}
        return Sample(self.name, prompt, f" {' '.join(passage)}", facts=facts, scorer="copied")


class Turns(Fitted, Chat):
    """A fact told in the first turn of a conversation and asked for in the last, all on one cache.

    The turns are fed one after another: each is read through what the cache has kept of those before it. Between them
    the user shares passages of text, each with a code of its own, and the assistant takes note. The score is 1 if the
    output contains the code of the first turn.
    """

    name: ClassVar[str] = "turns"
    turns: int = Field(4, ge=2, le=1000, description="Turns of the user; the last one asks.")
    haystack: str = Field("prose", description="What the turns between are filled with: `prose`, `noise`, or a path.")

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Filling is shared evenly among the turns before the last."""
        told = self.turns - 1
        names, codes = distinct(rng, "words", told), distinct(rng, "numbers", told)
        pieces, between = filling(self.haystack, self.name, units, rng)
        messages: list[Message] = []
        for turn in range(told):
            part = between.join(pieces[turn * units // told : (turn + 1) * units // told])
            text = f"The code of the {names[turn]} is {codes[turn]}. Keep it in mind. {part}".strip()
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": f"I will remember the code of the {names[turn]}."})
        messages.append({"role": "user", "content": f"What is the code of the {names[0]}?"})
        prefix = f" The code of the {names[0]} is"
        return self.chat(
            messages,
            codes[0],
            tokenizer,
            prefix,
            turns=True,
            task=self.name,
            facts={**spread([0.0]), "turns": self.turns, "length": self.tokens},
            scorer="contains",
        )


class ToolCall(Fitted, Chat):
    """A call of a function as JSON, whose arguments stand in an order among others in the context.

    The score is the share of arguments that are right as parsed JSON, of all that the answer or the output names; 0
    where the output has no JSON call of the function.
    """

    name: ClassVar[str] = "tool_call"
    depth: float | None = Field(None, ge=0, le=1, description=_DEPTH)

    def build(self, units: int, rng: random.Random, depth: float, tokenizer: Any) -> Sample:
        """Units are other orders."""
        numbers = distinct(rng, "numbers", units + 1)
        orders = [_order(rng, number) for number in numbers]
        wanted = orders[0]
        place = depth if self.depth is None else self.depth
        context, places = hide([_told(order) for order in orders[1:]], [_told(wanted)], [place], "\n")
        question = (
            "You can call this function, by a JSON object with its name and arguments:\n"
            f"{json.dumps(SCHEMA)}\nThese orders have come in:\n{context}\n"
            f"Ship order {wanted['order_id']}. Write the call and nothing else."
        )
        call = json.dumps({"name": SCHEMA["name"], "arguments": wanted})
        return self.chat(
            question,
            call,
            tokenizer,
            task=self.name,
            answers=(call,),
            facts={**spread(places), "length": self.tokens},
            scorer="call",
        )


SCHEMA: dict[str, Any] = {
    "name": "ship_order",
    "parameters": {
        "type": "object",
        "properties": {
            "order_id": {"type": "string"},
            "recipient": {"type": "string"},
            "street": {"type": "string"},
            "items": {"type": "integer"},
            "weight_kg": {"type": "number"},
            "express": {"type": "boolean"},
        },
        "required": ["order_id", "recipient", "street", "items", "weight_kg", "express"],
    },
}
"""The function that is called."""


def _order(rng: random.Random, number: str) -> dict[str, Any]:
    return {
        "order_id": number,
        "recipient": f"{rng.choice(ADJECTIVES).title()} {rng.choice(NOUNS).title()}",
        "street": f"{rng.randrange(1, 400)} {rng.choice(NOUNS).title()} Street",
        "items": rng.randrange(2, 100),
        "weight_kg": rng.randrange(1, 400) / 4 + 0.25,
        "express": rng.random() < 0.5,
    }


def _told(order: dict[str, Any]) -> str:
    speed = "by express" if order["express"] else "by ordinary mail"
    return (
        f"Order {order['order_id']}: {order['items']} items of {order['weight_kg']} kg together for "
        f"{order['recipient']}, {order['street']}, {speed}."
    )
