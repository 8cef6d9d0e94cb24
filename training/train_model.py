"""Train, resume and evaluate the bundled language model; see training/README.md."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvpolicy.tasks.lines import ARITHMETIC_HEADER, KEYS, LINES_HEADER, OPERATORS, QUERIES, STEPS, VALUES
from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score
from kvpolicy.tasks.source import stdlib_files

VOCABULARY = 3072
CONTEXT = 2048
END = "<|endoftext|>"
COPYING = 256
"""Length of the rows of repeated random segments."""
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
SHORTEST = 64
"""Length from which lines have header, requests and answers."""
FIRST_BATCH, FIRST_RATE = 16_384, 1e-3
FIRST_MIX = {"copying": 0.25, "lines": 0.75}
"""Retrieval is trained first and alone: with code beside it, it takes far longer to appear."""
FIRST_REACH = 512
"""Context length of lines at which the other tasks join."""
FIRST_SHARE = 0.4
"""Share of the run after which they join in any case."""
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


def loss_of(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss over the targets, and accuracy over the graded ones."""
    hidden = model.model(input_ids=batch.rows[:, :-1], use_cache=False).last_hidden_state
    first, last = batch.targets[0], batch.targets[-1]
    # Whole ranges are sliced; the gradient of indexing by a list is slow, of index_select it is not.
    if len(batch.targets) == last + 1 - first:
        hidden, expected = hidden[:, first - 1 : last], batch.rows[:, first : last + 1]
    else:
        targets = torch.tensor(batch.targets, device=hidden.device)
        hidden, expected = hidden.index_select(1, targets - 1), batch.rows.index_select(1, targets)
    logits = model.lm_head(hidden).float()
    loss = cross_entropy(logits.flatten(0, 1), expected.flatten())
    if not batch.graded:
        return loss, loss.new_zeros(())
    with torch.no_grad():
        right = logits.argmax(-1) == expected
        if batch.graded != batch.targets:
            place = {target: column for column, target in enumerate(batch.targets)}
            graded = torch.tensor([place[target] for target in batch.graded], device=hidden.device)
            right = right.index_select(1, graded)
    return loss, right.float().mean()


def new_model(tokenizer: Any) -> Any:
    """Six layers, 4 query heads over 2 key-value heads of dimension 64, untied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Weights as float16 on disk; the configuration asks for float32 in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    partial = directory / "model.safetensors.partial"
    save_file(state, str(partial), metadata={"format": "pt"})
    partial.replace(directory / "model.safetensors")
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.dtype = "float32"
    model.config.save_pretrained(directory)
    end = tokenizer.eos_token_id
    generation = GenerationConfig(eos_token_id=end, pad_token_id=end, do_sample=False)
    generation.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train(options: argparse.Namespace) -> None:
    """Train until the steps or the minutes are used up, whichever comes first."""
    torch.manual_seed(options.seed)
    # cuDNN plans attention anew for every shape, and here the lengths vary from step to step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.data)
    device = options.device
    corpus = load_file(str(options.data / "corpus.safetensors"), device=device)["ids"]
    model = (
        LlamaForCausalLM.from_pretrained(options.resume, dtype=torch.float32)
        if options.resume
        else new_model(tokenizer)
    ).to(device)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    print(f"{parameters:,} parameters, torch {torch.__version__}, {device}", flush=True)
    decayed = [tensor for tensor in model.parameters() if tensor.ndim > 1]
    plain = [tensor for tensor in model.parameters() if tensor.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    rows = Rows(tokenizer, device, options.seed)
    check_layout(rows)
    lines, chains = Curriculum(LENGTHS[0], 0.95), Curriculum(128, 0.9)
    mix = dict(zip(("code", "copying", "lines", "arithmetic"), options.mix, strict=True))
    first, joined = options.resume is None and mix["lines"] > 0, 0
    start, step, tokens, last = time.monotonic(), 0, 0, 0.0
    model.train()
    while True:
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / options.steps, elapsed / options.minutes)
        if progress >= 1:
            break
        if first and (lines.reach >= FIRST_REACH or progress >= FIRST_SHARE):
            first, joined = False, step
            print(f"all tasks from step {step}, {60 * elapsed:.0f} s, {tokens:,} tokens", flush=True)
        share, batch = (FIRST_MIX, FIRST_BATCH) if first else (mix, options.batch)
        highest = min(FIRST_RATE, options.rate) if first else options.rate * max(0.01, 1.02 * (1 - progress))
        rate = min(options.rate, highest) * min(1.0, (step - joined + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        lengths = {"lines": lines.length(rows), "arithmetic": chains.length(rows)}
        lengths["copying"] = COPYING
        rows_of = {
            name: max(1, round(batch * part / lengths.get(name, CONTEXT))) for name, part in share.items() if part
        }
        report: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, count in rows_of.items():
            data = rows.make(name, count, lengths.get(name), corpus)
            tokens += data.rows.numel()
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss, accuracy = loss_of(model, data)
            loss.backward()
            report[name] = (loss.detach(), accuracy)
        for name, curriculum in (("lines", lines), ("arithmetic", chains)):
            if name in report:
                curriculum.record(lengths[name], report[name][1])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0:
            lines.advance()
            chains.advance()
        now = time.monotonic() - start
        if step == 1 or now - last > options.log_seconds:
            last = now
            shown = " ".join(f"{name} {loss.item():.3f}" for name, (loss, _) in report.items())
            print(
                f"{now:6.0f} s step {step:6d} tokens {tokens / 1e6:8.2f} M rate {rate:.1e} "
                f"loss {shown} | lines {lines.accuracy:.3f} to {lines.reach} "
                f"arithmetic {chains.accuracy:.3f} to {chains.reach}",
                flush=True,
            )
            save(model, tokenizer, options.out)
    save(model, tokenizer, options.out)
    print(f"{step} steps, {tokens:,} tokens, {time.monotonic() - start:.0f} s", flush=True)


def check_layout(rows: Rows) -> None:
    """The rows made of token ids must be what the tokenizer makes of their text."""
    for make in (rows.lines, rows.arithmetic):
        row = make(1, 512).rows[0].tolist()
        if rows.ids(rows.tokenizer.decode(row)) != row:
            raise SystemExit(f"{make.__name__}: rows must be tokenized as generated; found others")


def greedy(model: Any, tokenizer: Any, samples: list[Sample]) -> list[float]:
    """Scores of greedy decoding with the exact cache; all samples are of equal length."""
    prompts = [tokenizer(sample.prompt, add_special_tokens=False).input_ids for sample in samples]
    answers = [tokenizer(sample.answer, add_special_tokens=False).input_ids for sample in samples]
    ids = torch.tensor(prompts, device=model.device)
    new = max(len(answer) for answer in answers)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [score(sample, text) for sample, text in zip(samples, texts, strict=True)]


def windows(tokenizer: Any, root: Path | None, context: int) -> Iterator[tuple[list[int], int]]:
    """Windows of the held-out files, each with one token of context before it."""
    for _, text in stdlib_files("test", root):
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        before = [tokenizer.eos_token_id, *ids]
        for first in range(0, len(ids), context - 1):
            piece = ids[first : first + context - 1]
            yield before[first : first + 1] + piece, len(tokenizer.decode(piece).encode())


def evaluate(options: argparse.Namespace) -> None:
    """Print accuracy with the exact cache and perplexity on the held-out files, as JSON lines."""
    tokenizer: Any = AutoTokenizer.from_pretrained(options.evaluate)
    model: Any = AutoModelForCausalLM.from_pretrained(options.evaluate).to(options.device).eval()
    for task, lengths in (("lines", (256, 512, 1024, 2000)), ("arithmetic", (256, 512, 1024))):
        for length in lengths:
            samples = load_task(task, options.samples, options.seed, length)
            scores = [
                score
                for first in range(0, len(samples), 10)
                for score in greedy(model, tokenizer, samples[first : first + 10])
            ]
            accuracy = sum(scores) / len(scores)
            row = {"task": task, "tokens": length, "samples": len(scores), "accuracy": accuracy}
            print(json.dumps(row), flush=True)
    total, count, size = 0.0, 0, 0
    for ids, length in windows(tokenizer, options.stdlib, CONTEXT):
        data = torch.tensor([ids], device=options.device)
        with torch.no_grad():
            logits = model(data).logits[0, :-1].float()
        total += float(cross_entropy(logits, data[0, 1:], reduction="sum"))
        count, size = count + len(ids) - 1, size + length
    row = {
        "task": "held-out code",
        "tokens": count,
        "perplexity": math.exp(total / count),
        "bits_per_byte": total / math.log(2) / size,
        "python": sys.version.split()[0],
    }
    print(json.dumps(row), flush=True)


def main() -> None:
    """Run the step asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--prepare", action="store_true", help="write tokenizer and corpus to --data")
    step.add_argument("--evaluate", type=Path, metavar="DIR", help="measure the model in DIR")
    parser.add_argument("--data", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("build/model"))
    parser.add_argument("--resume", type=Path, help="continue from the weights of this model")
    parser.add_argument("--stdlib", type=Path, help="standard library to read, default this one")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=1e9, help="end by then at the latest")
    parser.add_argument("--batch", type=int, default=131_072, help="tokens per step with all tasks")
    parser.add_argument(
        "--mix",
        type=float,
        nargs=4,
        default=(0.5, 0.05, 0.25, 0.2),
        metavar=("CODE", "COPYING", "LINES", "ARITHMETIC"),
        help="shares of the tokens of a step with all tasks",
    )
    parser.add_argument("--rate", type=float, default=1.5e-3, help="highest learning rate")
    parser.add_argument("--log-seconds", type=float, default=10)
    parser.add_argument("--samples", type=int, default=50, help="samples per task and length")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.prepare:
        prepare(options.data, options.stdlib)
    elif options.evaluate:
        evaluate(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
