"""Held-out loss and a sample of an exported model, with nothing of talkoot's in the way.

``python -m talkoot.sims.evaluate --corpus DIR MODEL…``: a fresh process loads each export with
plain ``AutoModelForCausalLM.from_pretrained`` and prints one line of JSON for it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talkoot.protocol.corpus import load_heldout, read_manifest
from talkoot.protocol.errors import TalkootError

MAX_TOKENS = 32_768
"""Held-out tokens that are looked at: spread evenly over the whole held-out text."""
BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """What a fresh process found."""

    loss: float
    """Mean cross-entropy, nats per token."""
    tokens: int
    sample_prompt: str
    sample_text: str


def evaluate_in_child(
    models: Sequence[Path], corpus: Path, *, sequence_length: int, prompt: str
) -> list[Evaluation]:
    """Run this module in a process of its own; one result for each model."""
    command = [sys.executable, "-m", "talkoot.sims.evaluate", "--corpus", str(corpus)]
    command += ["--sequence-length", str(sequence_length), "--prompt", prompt]
    command += [str(model) for model in models]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TalkootError(f"The exported model could not be evaluated:\n{done.stderr[-2000:]}")
    lines = done.stdout.splitlines()[-len(models) :]
    return [Evaluation(**json.loads(line)) for line in lines]


def evaluate(model_dir: Path, corpus_dir: Path, sequence_length: int, prompt: str) -> Evaluation:
    """Load, measure, write a sample; in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model.eval()
    manifest = read_manifest(corpus_dir)
    tokens = load_heldout(corpus_dir, manifest)
    sequences = len(tokens) // sequence_length
    wanted = max(1, min(sequences, MAX_TOKENS // sequence_length))
    picked = [i * sequences // wanted for i in range(wanted)] if sequences else [0]
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(picked), BATCH):
            rows = [
                torch.from_numpy(
                    tokens[i * sequence_length : (i + 1) * sequence_length].astype("int64")
                )
                for i in picked[start : start + BATCH]
            ]
            batch = torch.stack(rows)  # (sequences, tokens)
            loss = model(input_ids=batch, labels=batch).loss
            total += float(loss) * len(rows)
            count += len(rows)
        # Marks that a sequence begins are for chat models; these continue text.
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        written = model.generate(
            ids,
            max_new_tokens=200,
            do_sample=True,
            temperature=0.7,
            top_k=40,
            pad_token_id=manifest.tokenizer.eos_id,
        )
    return Evaluation(
        loss=total / count,
        tokens=count * sequence_length,
        sample_prompt=prompt,
        sample_text=tokenizer.decode(written[0][ids.shape[1] :], skip_special_tokens=True),
    )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="talkoot.sims.evaluate")
    parser.add_argument("model", type=Path, nargs="+")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--prompt", default="def ")
    args = parser.parse_args()
    for model in args.model:
        found = evaluate(model, args.corpus, args.sequence_length, args.prompt)
        print(json.dumps(found.__dict__))
    return 0


if __name__ == "__main__":
    sys.exit(main())
