"""Zero-shot classifiers against open_clip's, class lists, and labels that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from open_clip.model import CLIP

from data_prep.errors import UserError
from eval.contracts import Tokenizer
from eval.zero_shot import accuracy, class_weights, label_ranks, load_classes


def test_classifier_equals_open_clip(model: CLIP, tokenizer: Tokenizer) -> None:
    names, templates = ["cat", "red car", "dog"], OPENAI_IMAGENET_TEMPLATES[:4]
    ours = class_weights(model, tokenizer, names, templates, batch_size=5)
    with torch.no_grad():
        theirs = build_zero_shot_classifier(model, tokenizer, names, templates)
    torch.testing.assert_close(ours, theirs)


def test_accuracy_counts_the_right_class_among_the_first() -> None:
    weights = torch.eye(6)
    features = torch.tensor([[6.0, 5, 4, 3, 2, 1]]).repeat(4, 1)
    labels = torch.tensor([0, 1, 4, 5])
    assert label_ranks(features, weights, labels, chunk=3).tolist() == [1, 2, 5, 6]
    assert accuracy(features, weights, labels) == {"top1": 0.25, "top5": 0.75}
    assert accuracy(features[:3, :5], torch.eye(5), labels[:3]) == {"top1": pytest.approx(1 / 3)}


def test_only_the_subset_competes() -> None:
    weights = torch.eye(6)
    features = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    assert label_ranks(features, weights, torch.tensor([3]), subset=[5, 3]).tolist() == [1]
    with pytest.raises(UserError, match="not in the class subset, for example 2"):
        label_ranks(features, weights, torch.tensor([2]), subset=[5, 3])
    with pytest.raises(UserError, match="indices from 0 to 5"):
        label_ranks(features, weights, torch.tensor([3]), subset=[3, 6])


@pytest.mark.parametrize("label", [-1, 6])
def test_labels_out_of_range_are_refused(label: int) -> None:
    with pytest.raises(UserError, match=f"for example {label} with 6 classes"):
        accuracy(torch.eye(6), torch.eye(6), torch.tensor([0, 1, 2, 3, 4, label]))


def test_imagenet_is_open_clips_list() -> None:
    listed = load_classes("imagenet")
    assert len(listed.classes) == 1000
    assert listed.classes == tuple(IMAGENET_CLASSNAMES)
    assert len(listed.templates) == 80


def test_imagenet_order_is_that_of_the_class_file(shared_data: Path) -> None:
    listed = load_classes(str(shared_data / "imagenet-classes.json"))
    assert listed.classes == load_classes("imagenet").classes
    assert len(listed.templates) == 80
    assert {name: len(ids) for name, ids in listed.subsets.items()} == {
        "imagenet_r": 200,
        "imagenet_a": 200,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"classes": [], "templates": ["a {}."]}, "`classes` must be"),
        ({"classes": "cat", "templates": ["a {}."]}, "`classes` must be"),
        ({"classes": ["cat"]}, "`templates` must be"),
        ({"classes": ["cat"], "templates": ["a photo"]}, "no place for the class name"),
    ],
)
def test_a_wrong_class_list_is_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "classes.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as fault:
        load_classes("classes.json", tmp_path)
    assert "classes.json" in fault.value.where


def test_a_missing_class_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_classes("none.json", tmp_path)
