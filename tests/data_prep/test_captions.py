"""Caption lists of every form become one frame; what is dropped is counted."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from data_prep.captions import CaptionTable, read_captions
from data_prep.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def rows(table: CaptionTable) -> list[tuple[str, str, list[str]]]:
    frame = table.frame
    places = frame[table.location].tolist()
    lists = [list(texts) for texts in frame["captions"]]
    return list(zip(frame["key"].tolist(), places, lists, strict=True))


def test_cc3m_and_cc12m(tmp_path: Path) -> None:
    lines = [
        'a "quoted word\thttp://x/1.jpg',  # a lone quotation mark is only a character
        "cafÃ© &amp; bar\thttp://x/2.jpg",
        "  \thttp://x/3.jpg",
        "no url\t",
        'a "quoted word\thttp://x/1.jpg',
        "another caption\thttp://x/1.jpg",
        "three\tcells\thttp://x/9.jpg",
        "bell\x07 and\u00a0blank\thttp://x/4.jpg",
    ]
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    table = read_captions(path)
    assert rows(table) == [
        ("000000000", "http://x/1.jpg", ['a "quoted word', "another caption"]),
        ("000000001", "http://x/2.jpg", ["café & bar"]),
        ("000000006", "http://x/4.jpg", ["bell and blank"]),
    ]
    assert table.dropped == {
        "empty caption": 1, "empty location": 1, "exact duplicate": 1, "malformed row": 1
    }  # fmt: skip
    swapped = tmp_path / "cc12m.tsv.gz"
    text = "\n".join("\t".join(reversed(line.split("\t"))) for line in (lines[0], lines[5]))
    swapped.write_bytes(gzip.compress(text.encode()))
    assert rows(read_captions(swapped))[0][2] == ['a "quoted word', "another caption"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "csv.gz"])
def test_tables_by_usual_or_named_columns(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(
        {"title": ['say "hi", you', "two\nlines"], "filepath": ["a/1.jpg", "a/2.jpg"], "n": [1, 2]}
    )
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    found = rows(read_captions(path, images="/images"))
    assert found == [
        ("000000000", "/images/a/1.jpg", ['say "hi", you']),
        ("000000001", "/images/a/2.jpg", ["two lines"]),
    ]
    assert read_captions(path, "table", location="filepath", caption="title", limit=1).frame.shape
    with pytest.raises(UserError, match=r"no column 'link'(.|\n)*title"):
        read_captions(path, "table", location="link")


def test_folder(tmp_path: Path) -> None:
    for name in ("b/two.png", "one.jpg", "alone.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "one.txt").write_text("first\nsecond\nfirst\n\n")
    (tmp_path / "b" / "two.txt").write_text("only")
    table = read_captions(tmp_path)
    assert rows(table) == [
        ("two", str(tmp_path / "b/two.png"), ["only"]),
        ("one", str(tmp_path / "one.jpg"), ["first", "second"]),
    ]
    assert table.dropped == {"empty caption": 1, "exact duplicate": 1, "image without caption": 1}


def test_karpathy_coco_and_flickr_tokens(tmp_path: Path) -> None:
    sentences = [{"raw": "a dog ."}, {"raw": "a dog ."}, {"raw": "it runs ."}]
    karpathy = {
        "images": [
            {"filepath": "val2014", "filename": "C_1.jpg", "split": "test", "sentences": sentences},
            {"filename": "C_2.jpg", "split": "restval", "sentences": sentences[:1]},
        ],
        "dataset": "coco",
    }
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps(karpathy))
    test = read_captions(path, split="test", images="/coco")
    # Published protocols keep all captions of an image, repeated ones too.
    assert rows(test) == [("C_1", "/coco/val2014/C_1.jpg", ["a dog .", "a dog .", "it runs ."])]
    assert [row[0] for row in rows(read_captions(path, split="train"))] == ["C_2"]
    with pytest.raises(UserError, match=r"no image of split(.|\n)*test"):
        read_captions(path, split="val")

    coco = {"images": [{"id": 4, "file_name": "4.jpg"}],
            "annotations": [{"id": 2, "image_id": 4, "caption": "second"},
                            {"id": 1, "image_id": 4, "caption": "first"}]}  # fmt: skip
    (tmp_path / "captions_val2017.json").write_text(json.dumps(coco))
    assert rows(read_captions(tmp_path / "captions_val2017.json"))[0][2] == ["first", "second"]

    (tmp_path / "Flickr8k.token.txt").write_text("1.jpg#0\tone\n1.jpg#1\ttwo\n2.jpg.1#0\tthree\n")
    found = rows(read_captions(tmp_path / "Flickr8k.token.txt"))
    assert [(row[0], row[2]) for row in found] == [("1", ["one", "two"]), ("2", ["three"])]
    (tmp_path / "captions.txt").write_text('image,caption\n1.jpg,"a, b"\n1.jpg,c\n')
    assert rows(read_captions(tmp_path / "captions.txt", "flickr-token"))[0][2] == ["a, b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", b"", "cannot tell"),
        ("x.tsv", b"just a line of text\n", "cannot tell"),
        ("x.json", b"{", "no coco file"),
        ("x.json", b'{"images": [{"sentences": 1}]}', "no karpathy file"),
        ("x.parquet", b"PAR1 but not really", "no parquet file"),
        ("x.tsv.gz", gzip.compress(b"a\thttp://x\n" * 20000)[:300], "read|end"),
        ("x.tsv", b" \thttp://x\n", "no usable row"),
    ],
)
def test_unusable_lists_are_explained(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / name)


def test_missing_list(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_captions(tmp_path / "nothing.tsv")


def test_colliding_names_get_different_keys(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "c/1.5.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text(name)
    assert [row[0] for row in rows(read_captions(tmp_path))] == ["1", "1-1", "1_5"]


def test_the_real_validation_list(shared_data: Path) -> None:
    table = read_captions(shared_data / "cc3m-validation.tsv.gz")
    assert len(table) + sum(table.dropped.values()) == 15833
    assert table.frame["key"].is_unique


def test_three_million_rows_stay_below_one_and_a_half_gigabytes(tmp_path: Path) -> None:
    """A third of them, held against a third of the room beside what the imports take."""
    path = tmp_path / "big.tsv"
    with path.open("w") as handle:
        handle.writelines(
            f"caption number {n} of a person who walks along the beach at sunset\t"
            f"https://images.example.com/photos/{n % 997}/{n * 7919:012d}/original-{n}.jpg\n"
            for n in range(1_100_000)
        )
    script = (
        "import resource, sys\nfrom data_prep.captions import read_captions\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); table = read_captions(sys.argv[1]); print(len(table), before, peak())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    count, before, after = map(int, done.stdout.split())
    assert count == 1_100_000
    assert before + 3 * (after - before) < 1.5e6, "kilobytes"
