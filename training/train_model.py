"""Train, resume and evaluate the bundled language model; see training/README.md."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import CONTEXT, COPYING, LENGTHS, Batch, Curriculum, Rows, prepare
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from kvpolicy.tasks.load import load_task
from kvpolicy.tasks.sample import Sample
from kvpolicy.tasks.scorers import score
from kvpolicy.tasks.source import stdlib_files

FIRST_BATCH, FIRST_RATE = 16_384, 1e-3
FIRST_MIX = {"copying": 0.25, "lines": 0.75}
"""Retrieval is trained first and alone: with code beside it, it takes far longer to appear."""
FIRST_REACH = 512
"""Context length of lines at which the other tasks join."""
FIRST_SHARE = 0.4
"""Share of the run after which they join in any case."""


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


def first_model(options: argparse.Namespace, tokenizer: Any) -> Any:
    """The model to go on with, or a new one."""
    resumed = options.resume and LlamaForCausalLM.from_pretrained(options.resume, dtype=torch.float32)
    model: Any = (resumed or new_model(tokenizer)).to(options.device)
    parameters = sum(tensor.numel() for tensor in model.parameters())
    print(f"{parameters:,} parameters, torch {torch.__version__}, {options.device}", flush=True)
    return model.train()


def optimizer_of(model: Any, options: argparse.Namespace) -> Any:
    """AdamW, which lets matrices decay."""
    decayed = [tensor for tensor in model.parameters() if tensor.ndim > 1]
    plain = [tensor for tensor in model.parameters() if tensor.ndim == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.rate,
        betas=(0.9, 0.95),
        fused=options.device == "cuda",
    )


def differentiate(model: Any, batches: dict[str, Batch], device: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Add up the gradients of a step; gives loss and accuracy of each task."""
    report = {}
    for name, batch in batches.items():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, accuracy = loss_of(model, batch)
        loss.backward()
        report[name] = (loss.detach(), accuracy)
    return report


def advance(curricula: dict[str, Curriculum], lengths: dict[str, int], report: Any, step: int) -> None:
    """Note how a step was answered; every tenth may make tasks longer."""
    for name, curriculum in curricula.items():
        if name in report:
            curriculum.record(lengths[name], report[name][1])
        if step % 10 == 0:
            curriculum.advance()


def shown(report: Any, curricula: dict[str, Curriculum]) -> str:
    """What is printed of a step."""
    losses = " ".join(f"{name} {loss.item():.3f}" for name, (loss, _) in report.items())
    reached = " ".join(f"{name} {found.accuracy:.3f} to {found.reach}" for name, found in curricula.items())
    return f"loss {losses} | {reached}"


def train(options: argparse.Namespace) -> None:
    """Train until the steps or the minutes are used up, whichever comes first."""
    torch.manual_seed(options.seed)
    # cuDNN plans attention anew for every shape, and here the lengths vary from step to step.
    torch.backends.cuda.enable_cudnn_sdp(False)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.data)
    corpus = load_file(str(options.data / "corpus.safetensors"), device=options.device)["ids"]
    model = first_model(options, tokenizer)
    optimizer = optimizer_of(model, options)
    rows = Rows(tokenizer, options.device, options.seed)
    check_layout(rows)
    curricula = {"lines": Curriculum(LENGTHS[0], 0.95), "arithmetic": Curriculum(128, 0.9)}
    mix = dict(zip(("code", "copying", "lines", "arithmetic"), options.mix, strict=True))
    first, joined = options.resume is None and mix["lines"] > 0, 0
    start, step, tokens, last = time.monotonic(), 0, 0, 0.0
    while True:
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / options.steps, elapsed / options.minutes)
        if progress >= 1:
            break
        if first and (curricula["lines"].reach >= FIRST_REACH or progress >= FIRST_SHARE):
            first, joined = False, step
            print(f"all tasks from step {step}, {60 * elapsed:.0f} s, {tokens:,} tokens", flush=True)
        share, size = (FIRST_MIX, FIRST_BATCH) if first else (mix, options.batch)
        highest = min(FIRST_RATE, options.rate) if first else options.rate * max(0.01, 1.02 * (1 - progress))
        rate = min(options.rate, highest) * min(1.0, (step - joined + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate
        lengths = {name: curriculum.length(rows) for name, curriculum in curricula.items()} | {"copying": COPYING}
        counts = {name: max(1, round(size * part / lengths.get(name, CONTEXT))) for name, part in share.items() if part}
        batches = {name: rows.make(name, count, lengths.get(name), corpus) for name, count in counts.items()}
        tokens += sum(batch.rows.numel() for batch in batches.values())
        report = differentiate(model, batches, options.device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        advance(curricula, lengths, report, step)
        now = time.monotonic() - start
        if step == 1 or now - last > options.log_seconds:
            last = now
            print(f"{now:6.0f} s step {step:6d} tokens {tokens / 1e6:8.2f} M rate {rate:.1e}", end=" ")
            print(shown(report, curricula), flush=True)
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
