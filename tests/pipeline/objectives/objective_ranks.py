"""One rank of the comparison with one process: `objective_ranks.py RANK WORLD FOLDER`.

Two linear towers and a scale are trained by averaged gradients, as the engine does it. Every rank
runs the same cases and rank 0 writes `WORLD.pt`: per case the mean terms and the averaged
gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.objectives import REGISTRY, Features, build, gather

BATCH, STUDENT, INPUTS = 8, 5, 6
ON_EMBEDDINGS = [name for name, entry in REGISTRY.items() if not entry.inside]
CASES: dict[str, tuple[Any, int]] = {
    **{name: ({name: 1}, 5) for name in ON_EMBEDDINGS},
    **{f"{name}, other width": ({name: 1}, 7) for name in ON_EMBEDDINGS},
    "unequal terms": ({"task": 0.3, "crd": 2, "icl": 0.7, "fd": 2000, "gd": 1e4, "afd": 5}, 7),
}


def mean_over_ranks(tensor: Tensor, size: int) -> Tensor:
    tensor = tensor.detach().clone()
    if size > 1:
        dist.all_reduce(tensor)
    return tensor / size


def run_case(config: Any, teacher_dim: int, rank: int, size: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    towers = [normal(INPUTS, STUDENT).requires_grad_() for _ in range(2)]
    log_scale = torch.tensor(2.0, requires_grad=True)
    inputs = [normal(BATCH, INPUTS) for _ in range(3)]
    teacher = [F.normalize(normal(BATCH, teacher_dim), dim=1) for _ in range(2)]
    here = slice(rank * BATCH // size, (rank + 1) * BATCH // size)

    def encode(rows: Tensor, tower: Tensor) -> Tensor:
        return F.normalize(rows[here] @ tower, dim=1)

    objective = build(config, STUDENT, teacher_dim)
    terms = objective(
        Features(encode(inputs[0], towers[0]), encode(inputs[1], towers[1]), log_scale.exp()),
        Features(teacher[0][here], teacher[1][here], torch.tensor(12.0)),
        masked_image=encode(inputs[2], towers[0]),
    )
    sum(terms.values()).backward()
    result = {f"loss/{name}": mean_over_ranks(term, size) for name, term in terms.items()}
    trained = {"image": towers[0], "text": towers[1], "log_scale": log_scale}
    for name, parameter in (trained | dict(objective.named_parameters())).items():
        assert parameter.grad is not None
        result[f"grad/{name}"] = mean_over_ranks(parameter.grad, size)
    return result


def faults(rank: int) -> None:
    """Ranks with unequal rows are told, not left hanging; half precision arrives in float32."""
    uneven = Features(torch.ones(2 + rank, 3), torch.ones(2 + rank, 3), torch.tensor(1.0))
    with pytest.raises(ValueError, match="between 2 and 3"):
        build("task", 3)(uneven)
    gathered = gather(torch.full((1, 2), float(rank), dtype=torch.bfloat16))
    assert gathered.dtype == torch.float32
    assert gathered[:, 0].tolist() == [0.0, 1.0]


def main(rank: int, size: int, folder: Path) -> None:
    if size > 1:
        store = f"file://{folder}/meeting-{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        faults(rank)
    results = {name: run_case(*case, rank, size) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, folder / f"{size}.pt")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
