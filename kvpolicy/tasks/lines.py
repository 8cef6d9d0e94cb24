"""Line retrieval and chained arithmetic, in the form that the bundled model was trained on.

Without a tokenizer lengths are those of the bundled model's; the text itself suits any tokenizer.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Any, ClassVar, Final

from pydantic import Field

from kvpolicy.errors import TaskError
from kvpolicy.tasks.encoding import fit
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.task import MAX_TOKENS, Generated, spread

KEYS: Final = 704
"""Keys `<k0>` to `<k703>` are single tokens of the bundled tokenizer."""
VALUES: Final = 128
"""Values ` <v0>` to ` <v127>`, with their space, are single tokens of the bundled tokenizer."""
QUERIES: Final = 4
"""Keys asked for in one sample of `lines`."""
STEPS: Final = 4
"""Definitions in one chain of `arithmetic`."""
MODULUS: Final = 10
OPERATORS: Final = "+-*"
LINES_HEADER: Final = "Keys and values:\n"
ARITHMETIC_HEADER: Final = "Arithmetic modulo 10:\n"
_HEADER_TOKENS: Final = 8
_TOKENS: Final = "Tokens of prompt and answer together, of the model's tokenizer."


class _Rows(Generated):
    """Samples of rows that are drawn from one stream, whose number follows from the length."""

    least: ClassVar[int]

    def samples(self, n: int, seed: int, tokenizer: Any = None) -> list[Sample]:
        """Without a tokenizer lengths are those of the bundled model's."""
        self.check(n)
        rng, found, units = random.Random(seed), [], self.expected
        for _ in range(n):
            if tokenizer is None:
                found.append(self.build(rng, units))
                continue
            state = rng.getstate()

            def build(units: int, state: Any = state) -> Sample:
                rng.setstate(state)
                return self.build(rng, units)

            _, units = fit(build, self.tokens, tokenizer, self.least, max(units, self.least))
            found.append(build(units))
        return found

    @property
    @abstractmethod
    def expected(self) -> int:
        """Rows, or chains of them, of a sample in the tokens of the bundled tokenizer."""

    @abstractmethod
    def build(self, rng: random.Random, units: int) -> Sample:
        """A sample of so many rows or chains."""


class Lines(_Rows):
    """Key-value line retrieval: distinct keys with values, then a request for four of them.

    The prompt holds lines such as `<k17> <v93>` and ends with the request `? <k17> <k5> <k99> <k3>`; the answer repeats
    the four lines in the order asked. The requested lines are drawn uniformly from the whole context. Above about 2,130
    tokens the keys no longer are single tokens of the bundled tokenizer.
    """

    name: ClassVar[str] = "lines"
    least: ClassVar[int] = QUERIES

    @property
    def expected(self) -> int:
        """Lines."""
        overhead = _HEADER_TOKENS + 2 + 2 * QUERIES + 3 * QUERIES
        count = (self.tokens - overhead) // 3
        if count < QUERIES:
            raise TaskError(
                f"lines: tokens must be at least {overhead + 3 * QUERIES} to hold {QUERIES} lines, "
                f"found {self.tokens}; ask for a longer context"
            )
        return count

    def build(self, rng: random.Random, units: int) -> Sample:
        """A sample of so many lines."""
        keys = rng.sample(range(max(KEYS, units)), units)
        pairs = {f"<k{key}>": f"<v{rng.randrange(VALUES)}>" for key in keys}
        asked = rng.sample(sorted(pairs), QUERIES)
        context = "".join(f"{key} {value}\n" for key, value in pairs.items())
        prompt = f"{LINES_HEADER}{context}? {' '.join(asked)}\n"
        answer = "\n".join(f"{key} {pairs[key]}" for key in asked)
        places = {key: place / units for place, key in enumerate(pairs)}
        facts = {**spread([places[key] for key in asked]), "length": self.tokens}
        return Sample("lines", prompt, answer, facts=facts, scorer="pairs")


class Arithmetic(_Rows):
    """Chained arithmetic modulo 10 with the intermediate results stated in the answer.

    The prompt interleaves the definitions of several chains: `<k3>=4+3` opens one and `<k9>=<k3>*5` continues it. It
    ends with a request for one chain's four variables, in order; the answer repeats each definition followed by its
    value, such as `<k9>=<k3>*5=5`.
    """

    name: ClassVar[str] = "arithmetic"
    least: ClassVar[int] = 1
    tokens: int = Field(512, ge=1, le=MAX_TOKENS, description=_TOKENS)

    @property
    def expected(self) -> int:
        """Chains."""
        overhead = _HEADER_TOKENS + 2 + 2 * STEPS + 8 * STEPS
        chains = (self.tokens - overhead) // (6 * STEPS)
        if chains < 1:
            raise TaskError(
                f"arithmetic: tokens must be at least {overhead + 6 * STEPS} to hold one chain of "
                f"{STEPS} definitions, found {self.tokens}; ask for a longer context"
            )
        return chains

    def build(self, rng: random.Random, units: int) -> Sample:
        """A sample of so many chains."""
        count = units * STEPS
        keys = rng.sample(range(max(KEYS, count)), count)
        variables = [f"<k{key}>" for key in keys]
        definitions, results = _definitions(rng, variables, units)
        chosen = rng.randrange(units)
        asked = variables[chosen * STEPS : (chosen + 1) * STEPS]
        context = "".join(f"{name}={text}\n" for name, text in definitions.items())
        prompt = f"{ARITHMETIC_HEADER}{context}? {' '.join(asked)}\n"
        answer = "\n".join(f"{name}={definitions[name]}={results[name]}" for name in asked)
        places = {name: place / count for place, name in enumerate(definitions)}
        facts = {**spread([places[name] for name in asked]), "length": self.tokens}
        return Sample("arithmetic", prompt, answer, facts=facts, scorer="pairs")


def _definitions(rng: random.Random, variables: list[str], chains: int) -> tuple[dict[str, str], dict[str, int]]:
    """The definitions of all variables in a mixed order, and their results."""
    definitions: dict[str, str] = {}
    results: dict[str, int] = {}
    order = [chain for chain in range(chains) for _ in range(STEPS)]
    rng.shuffle(order)
    done = [0] * chains
    for chain in order:
        variable = variables[chain * STEPS + done[chain]]
        if done[chain]:
            operand = variables[chain * STEPS + done[chain] - 1]
            left = results[operand]
        else:
            left = rng.randrange(MODULUS)
            operand = str(left)
        operator, right = rng.choice(OPERATORS), rng.randrange(MODULUS)
        definitions[variable] = f"{operand}{operator}{right}"
        results[variable] = _apply(operator, left, right)
        done[chain] += 1
    return definitions, results


def _apply(operator: str, left: int, right: int) -> int:
    results = {"+": left + right, "-": left - right, "*": left * right}
    return results[operator] % MODULUS
