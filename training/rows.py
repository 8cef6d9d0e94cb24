"""The tokenizer of the bundled model, and the rows that it is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvpolicy.tasks.lines import ARITHMETIC_HEADER, KEYS, LINES_HEADER, OPERATORS, QUERIES, STEPS, VALUES
from kvpolicy.tasks.source import stdlib_files

VOCABULARY = 3072
CONTEXT = 2048
END = "<|endoftext|>"
COPYING = 256
"""Length of the rows of repeated random segments."""
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SHORTEST = 64
"""Length from which lines have header, requests and answers."""
# Words with underscores, single digits, runs of punctuation, line breaks, indentation.
PIECES = r" ?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|\n+|[^\S\n]+(?!\S)|\s+"


def train_tokenizer(root: Path | None) -> Any:
    """Byte-level BPE of the training split, with keys and values as single tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [f"<k{key}>" for key in range(KEYS)]
    added += [f" <v{value}>" for value in range(VALUES)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(added),
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in stdlib_files("train", root)), trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def prepare(directory: Path, root: Path | None) -> None:
    """Write the tokenizer and the token ids of the training split."""
    tokenizer = train_tokenizer(root)
    tokenizer.save_pretrained(directory)
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for _, text in stdlib_files("train", root):
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, end]
    save_file({"ids": torch.tensor(ids, dtype=torch.int16)}, str(directory / "corpus.safetensors"))
    print(f"{len(tokenizer):,} tokens in the vocabulary, {len(ids):,} in the corpus", flush=True)


@dataclass
class Batch:
    """Rows of equal layout, the columns the loss covers and those accuracy is taken of."""

    rows: torch.Tensor
    targets: list[int]
    graded: list[int]


class Rows:
    """Training rows as token ids, in the layout of the generators in `kvpolicy.tasks`."""

    def __init__(self, tokenizer: Any, device: str, seed: int) -> None:
        self.tokenizer = tokenizer
        self.device = device
        self.random = torch.Generator(device).manual_seed(seed)
        self.choices = torch.Generator().manual_seed(seed + 1)
        self.key = tokenizer.convert_tokens_to_ids("<k0>")
        self.value = tokenizer.convert_tokens_to_ids(" <v0>")
        self.newline, self.space, self.question, self.equals = (self.ids(text)[0] for text in ("\n", " ", "?", "="))
        self.digits = self.tensor([self.ids(str(digit))[0] for digit in range(10)])
        self.operators = self.tensor([self.ids(text)[0] for text in OPERATORS])

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.choices))

    def draw(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.random, device=self.device)

    def permutation(self, rows: int, size: int, count: int) -> torch.Tensor:
        noise = torch.rand(rows, size, generator=self.random, device=self.device)
        return noise.argsort(-1)[:, :count]

    def full(self, like: torch.Tensor, token: int) -> torch.Tensor:
        return torch.full_like(like, token)

    def assemble(self, header: str, context: torch.Tensor, asked: torch.Tensor, answers: torch.Tensor) -> Batch:
        """Header and context, then rounds of a request and its answer.

        `asked` is (rows, rounds, keys); `answers` is (rows, rounds, keys, tokens per key).
        """
        rows, rounds, keys, width = answers.shape
        head = self.tensor(self.ids(header)).expand(rows, -1)
        request = torch.stack([self.full(asked, self.space), asked], -1).flatten(2)
        mark = asked[..., :1]
        answer = answers.flatten(2)
        answer[..., -1] = self.tokenizer.eos_token_id
        parts = [self.full(mark, self.question), request, self.full(mark, self.newline), answer]
        data = torch.cat([head, context, torch.cat(parts, -1).flatten(1)], 1)
        stride = 2 + 2 * keys + width * keys
        starts = [data.shape[1] - stride * later - width * keys for later in reversed(range(rounds))]
        targets = [start + column for start in starts for column in range(width * keys)]
        graded = [start + width * key + width - 2 for start in starts for key in range(keys)]
        return Batch(data, targets, graded)

    def rounds(self, length: int, stride: int, least: int) -> int:
        """Number of rounds of a request: up to 16, in at most half of the length."""
        return self.integer(1, max(1, min(16, length // 2 // stride, (length - least) // stride)))

    def pairs(self, rows: int, count: int, length: int) -> torch.Tensor:
        """Lines as (rows, count, 3); short contexts draw from fewer keys and values."""
        keys = self.permutation(rows, min(KEYS, length), count) + self.key
        values = self.draw(min(VALUES, length), rows, count) + self.value
        return torch.stack([keys, values, self.full(keys, self.newline)], -1)

    def recall(self, rows: int, length: int) -> Batch:
        """Pairs followed by the same pairs in another order; the values are predicted.

        With or without the header and the line breaks of `lines`.
        """
        text = LINES_HEADER if length >= SHORTEST and self.integer(0, 1) else ""
        width = self.integer(2, 3)
        head = self.tensor(self.ids(text)).long().expand(rows, -1)
        count = (length - head.shape[1]) // (2 * width)
        pairs = self.pairs(rows, count, length)[..., :width]
        order = self.permutation(rows, count, count)[..., None].expand(-1, -1, width)
        data = torch.cat([head, pairs.flatten(1), pairs.gather(1, order).flatten(1)], 1)
        values = list(range(head.shape[1] + width * count + 1, data.shape[1], width))
        return Batch(data, values, values)

    def lines(self, rows: int, length: int) -> Batch:
        header, queries = len(self.ids(LINES_HEADER)), QUERIES
        stride = 2 + 5 * queries
        rounds = self.rounds(length, stride, header + 3 * queries)
        count = (length - header - stride * rounds) // 3
        pairs = self.pairs(rows, count, length)
        keys = pairs[..., 0]
        chosen = torch.stack([self.permutation(rows, count, queries) for _ in range(rounds)], 1).flatten(1)
        asked = keys.gather(1, chosen).view(rows, rounds, queries)
        answers = pairs.gather(1, chosen[..., None].expand(-1, -1, 3))
        answers = answers.view(rows, rounds, queries, 3)
        return self.assemble(LINES_HEADER, pairs.flatten(1), asked, answers)

    def arithmetic(self, rows: int, length: int) -> Batch:
        header, steps = len(self.ids(ARITHMETIC_HEADER)), STEPS
        stride = 2 + 10 * steps
        rounds = self.rounds(length, stride, header + 6 * steps)
        chains = (length - header - stride * rounds) // (6 * steps)
        rounds = min(rounds, chains)
        shape = (rows, chains, steps)
        keys = self.permutation(rows, KEYS, chains * steps).view(shape) + self.key
        first, right = self.draw(10, rows, chains), self.draw(10, *shape)
        operator = self.draw(3, *shape)
        results, left = [], first
        for step in range(steps):
            r, o = right[..., step], operator[..., step]
            left = torch.where(o == 0, left + r, torch.where(o == 1, left - r, left * r)) % 10
            results.append(self.digits[left])
        operand = torch.cat([self.digits[first][..., None], keys[..., :-1]], -1)
        equals = self.full(keys, self.equals)
        newline = self.full(keys, self.newline)
        definition = [keys, equals, operand, self.operators[operator], self.digits[right]]
        noise = torch.rand(shape, generator=self.random, device=self.device)
        order = noise.sort(-1).values.flatten(1).argsort(-1)[..., None]
        context = torch.stack([*definition, newline], -1).flatten(1, 2)
        context = context.gather(1, order.expand(-1, -1, 6)).flatten(1)
        answer = torch.stack([*definition, equals, torch.stack(results, -1), newline], -1)
        chosen = self.permutation(rows, chains, rounds)
        asked = keys.gather(1, chosen[..., None].expand(-1, -1, steps))
        answers = answer.gather(1, chosen[..., None, None].expand(-1, -1, steps, 8))
        return self.assemble(ARITHMETIC_HEADER, context, asked, answers)

    def copying(self, rows: int, length: int) -> Batch:
        """A random segment of distinct tokens, over and over, from one of four pools."""
        keys, values, everything = (
            (self.key, KEYS),
            (self.value, VALUES),
            (0, len(self.tokenizer)),
        )
        pools = ((everything,), (keys,), (values,), (keys, values))[self.integer(0, 3)]
        period = self.integer(4, min(length // 2, min(size for _, size in pools) // 4))
        parts = [self.permutation(rows, size, period) + first for first, size in pools]
        segment = torch.stack(parts, -1).flatten(1)
        period = segment.shape[1]
        data = segment.repeat(1, length // period + 1)[:, :length]
        return Batch(data, list(range(period + 1, length)), list(range(period + 1, length)))

    def make(self, name: str, rows: int, length: int | None, corpus: torch.Tensor) -> Batch:
        if length is not None:
            if name == "arithmetic":
                return self.arithmetic(rows, length)
            if name == "copying":
                return self.copying(rows, length)
            return self.recall(rows, length) if length < SHORTEST or self.integer(0, 1) else self.lines(rows, length)
        return self.code(rows, corpus)

    def code(self, rows: int, corpus: torch.Tensor) -> Batch:
        starts = self.draw(len(corpus) - CONTEXT, rows)
        offsets = torch.arange(CONTEXT, device=self.device)
        return Batch(corpus[starts[:, None] + offsets].long(), list(range(1, CONTEXT)), [])


class Curriculum:
    """Context length of one generated task: it doubles once the longest is answered."""

    def __init__(self, first: int, enough: float) -> None:
        self.first, self.enough, self.reach = first, enough, first
        self.accuracy = 0.0
        self.tally: list[torch.Tensor] = []

    def length(self, rows: Rows) -> int:
        options = [length for length in LENGTHS if self.first <= length <= self.reach]
        longest = options[-1]
        if rows.integer(0, 2) == 0:
            longest = options[rows.integer(0, len(options) - 1)]
        return rows.integer(max(self.first, longest // 2), longest)

    def record(self, length: int, accuracy: torch.Tensor) -> None:
        if length >= self.reach // 2:
            self.tally.append(accuracy)

    def advance(self) -> None:
        if self.tally:
            self.accuracy, self.tally = float(torch.stack(self.tally).mean()), []
        if self.accuracy >= self.enough and self.reach < CONTEXT:
            self.reach, self.accuracy = self.reach * 2, 0.0
