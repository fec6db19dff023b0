"""Run by test_embed.py in two processes: embeds a set over gloo and writes what came out."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import tiny_clip
from open_clip import SimpleTokenizer
from open_clip.transform import image_transform

from data_prep.errors import UserError
from data_prep.reader import ShardSet
from eval.embed import embed_images, embed_texts
from eval.suite import EvalSet, evaluate


def main(rank: int, folder: Path, good: str, broken: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    model, transform = tiny_clip(), image_transform(32, is_train=False)
    tokenizer = SimpleTokenizer(context_length=16)
    images = embed_images(
        model, transform, ShardSet.find(good, "test-*.tar"), batch_size=4, device="cpu"
    )
    text = embed_texts(model, tokenizer, images.texts, batch_size=4, device="cpu")
    # Fewer batches than ranks: one rank has nothing to do and must not be left behind.
    single = embed_texts(model, tokenizer, ["one text"], batch_size=4, device="cpu")
    sets = [
        EvalSet(name="pairs", kind="retrieval", root=good, shards="test-*.tar"),
        EvalSet(
            name="words", kind="zero_shot", root=good, shards="test-*.tar", classes="classes.json"
        ),
    ]
    metrics = evaluate(model, transform, tokenizer, sets, batch_size=4)
    faults = []
    for root in (broken, str(folder / f"only-on-{1 - rank}")):
        try:
            embed_set = EvalSet(name="pairs", kind="retrieval", root=root, shards="test-*.tar")
            evaluate(model, transform, tokenizer, [embed_set], batch_size=4, efficiency=False)
        except UserError as fault:
            faults.append(str(fault))
    torch.save(
        {
            "features": images.features,
            "keys": images.keys,
            "labels": images.labels,
            "captions": images.captions,
            "text": text,
            "single": single,
            "metrics": metrics,
            "faults": faults,
        },
        folder / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
