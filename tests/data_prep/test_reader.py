"""The reader: order, exactly-once, resuming, layouts it takes and what it refuses."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import reader as reader_module
from data_prep.errors import UserError
from data_prep.reader import BatchSchedule, CorruptionBudget, CorruptSampleError, ShardSet
from data_prep.shards import Manifest, ShardEntry, write_shards
from tests.data_prep.conftest import samples

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def shard_set(sizes: list[int]) -> ShardSet:
    entries = [ShardEntry(name=f"x-{i}.tar", samples=n, bytes=1) for i, n in enumerate(sizes)]
    return ShardSet([entry.name for entry in entries], entries)


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.integers(0, 1000), st.integers(1, 10))
def test_an_epoch_is_a_permutation_that_seed_and_epoch_determine(
    sizes: list[int], seed: int, epoch: int, window: int
) -> None:
    shards = shard_set(sizes)
    order = shards.epoch_order(seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    assert np.array_equal(order, shard_set(sizes).epoch_order(seed, epoch, window))
    # A window of shards is finished before the next begins: few files are open at a time.
    owner = [shards.locate(int(index))[0] for index in order]
    changes = [owner[i] for i in range(len(owner)) if i == 0 or owner[i] != owner[i - 1]]
    if window == 1:
        assert len(changes) == len(sizes)


@settings(deadline=None, max_examples=150)
@given(
    SIZES, st.integers(1, 6), st.integers(1, 5), st.sampled_from(["drop", "pad"]), st.booleans(),
    st.integers(0, 3),
)  # fmt: skip
def test_every_sample_exactly_once_over_all_ranks_or_exactly_the_reported_tail(
    sizes: list[int], batch: int, world: int, tail: str, shuffle: bool, epoch: int
) -> None:
    shards, total = shard_set(sizes), sum(sizes)
    if tail == "drop" and total < batch * world:
        with pytest.raises(UserError, match="do not fill"):
            BatchSchedule(shards, batch, 0, world, 7, shuffle, "drop")
        return
    seen: Counter[int] = Counter()
    lengths = set()
    for rank in range(world):
        plan = BatchSchedule(shards, batch, rank, world, 7, shuffle, tail)  # type: ignore[arg-type]
        mine = list(islice(plan.batches(epoch * plan.batches_per_epoch), plan.batches_per_epoch))
        lengths.add((len(mine), *{len(part) for part in mine}))
        seen.update(index for part in mine for index in part)
    assert len(lengths) == 1, "a rank would wait for another"
    assert sum(seen.values()) == plan.batches_per_epoch * batch * world
    assert set(seen) <= set(range(total))
    assert total - len(seen) == plan.dropped_per_epoch
    assert sum(seen.values()) - len(seen) == plan.padded_per_epoch


@settings(deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(0, 60), st.data())
def test_resuming_at_any_step_equals_no_interruption_at_any_equal_global_batch(
    sizes: list[int], batch: int, world: int, stop: int, data: st.DataObject
) -> None:
    shards = shard_set(sizes)
    whole = [BatchSchedule(shards, batch, r, world, 3, tail="pad").batches() for r in range(world)]
    steps = [[index for rank in whole for index in next(rank)] for _ in range(stop + 5)]
    divisors = [n for n in range(1, batch * world + 1) if batch * world % n == 0]
    other = data.draw(st.sampled_from(divisors))
    resumed = [
        BatchSchedule(shards, batch * world // other, r, other, 3, tail="pad").batches(stop)
        for r in range(other)
    ]
    for step in range(stop, stop + 5):
        assert [index for rank in resumed for index in next(rank)] == steps[step]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_loader_resumes_mid_epoch_with_other_worker_counts(tmp_path: Path, workers: int) -> None:
    from torch.utils.data import DataLoader, Dataset

    write_shards(samples(50), tmp_path, "x", samples_per_shard=7)
    shards = ShardSet.find(tmp_path, "x-*.tar")

    class Keys(Dataset[str]):
        def __getitem__(self, index: int) -> str:
            return shards.read(index).key

        def __len__(self) -> int:
            return len(shards)

    plan = BatchSchedule(shards, 4, 0, 1, seed=5)
    expected = [[shards.read(i).key for i in part] for part in islice(plan.batches(), 30)]
    for start in (0, 7, 17):  # within the first epoch, and in the second (12 steps each)
        loader = DataLoader(
            Keys(), batch_sampler=list(islice(plan.batches(start), 10)), num_workers=workers,
            collate_fn=list,
        )  # fmt: skip
        assert list(loader) == expected[start : start + 10]


def test_reads_every_sample_and_pickles(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    shards = pickle.loads(pickle.dumps(ShardSet.find(folder, "set-{000000..000002}.tar")))
    assert len(shards) == 20
    for index, expected in enumerate(samples(20)):
        sample = shards.read(index)
        assert (sample.key, sample.label) == (expected.key, index % 7)
        assert sample.captions == [f"picture {index}", f"noise number {index}"]
        assert sample.image_bytes == expected.files["jpg"]
    with pytest.raises(IndexError):
        shards.read(20)


def test_counts_with_and_without_manifest_agree(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    with_manifest = ShardSet.find(folder, "set-*.tar")
    (folder / "set.manifest.json").unlink()
    without = ShardSet.find(folder, "set-*.tar")
    assert [e.samples for e in without.shards] == [e.samples for e in with_manifest.shards]
    assert without.fingerprint != with_manifest.fingerprint  # hashes are known only to one
    assert without.fingerprint == ShardSet.find(folder, "set-*.tar").fingerprint


def test_many_shards_need_few_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN", 3)
    write_shards(samples(20), tmp_path, "x", samples_per_shard=2)
    shards = ShardSet.find(tmp_path, "x-*.tar")
    rng = np.random.default_rng(0)
    for index in rng.integers(0, 20, 60).tolist():
        assert shards.read(index).key == f"s{index:05d}"
    assert len(shards._files) <= 3


def test_threads_share_a_set(small_set: tuple[Path, Manifest]) -> None:
    shards = ShardSet.find(small_set[0], "set-*.tar")
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.extend(shards.read(i).key for i in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(found) == {f"s{i:05d}": 8 for i in range(20)}


# ------------------------------------------------------------------------------------- layouts


def tar_of(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_other_tar_dialects_long_and_foreign_names(tmp_path: Path, form: int) -> None:
    folder = "deep" * 20 if form == tarfile.USTAR_FORMAT else "deep" * 40
    name = f"{folder}/picture-{'n' * 60}"
    if form != tarfile.USTAR_FORMAT:
        name += "ü"
    tar_of(tmp_path / "a.tar", [(f"{name}.jpg", b"img"), (f"{name}.txt", b"one"),
                                ("./b.JPG", b"B"), ("./b.txt", b"two")], form)  # fmt: skip
    shards = ShardSet.find(tmp_path, "a.tar")
    assert [shards.read(i).captions for i in range(2)] == [["one"], ["two"]]
    assert [shards.read(i).key for i in range(2)] == [name, "b"]
    assert shards.read(1).image_bytes == b"B"


def test_img2dataset_and_class_layouts(tmp_path: Path) -> None:
    record = b'{"caption": "from json", "status": "success", "width": 1}'
    tar_of(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.json", record), ("1.webp", b"y"),
                                ("1.cls", b"17\n"), ("1.txt", "ünï".encode())])  # fmt: skip
    shards = ShardSet.find(tmp_path, "a.tar")
    assert shards.read(0).captions == ["from json"]
    assert shards.read(0).label is None
    assert (shards.read(1).label, shards.read(1).captions) == (17, ["ünï"])


@pytest.mark.parametrize(
    ("members", "attribute", "message"),
    [
        ([("a.txt", b"x")], "image_bytes", "no image"),
        ([("a.jpg", b"")], "image_bytes", "no image"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "captions", "unreadable json"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "captions", "no object"),
        ([("a.jpg", b"x"), ("a.txt", b" \n")], "captions", "no caption"),
        ([("a.jpg", b"x"), ("a.txt", b"\xff")], "captions", "UTF-8"),
        ([("a.jpg", b"x"), ("a.json", b'{"label": 3.5}')], "label", "no whole number"),
    ],
)
def test_corrupt_samples_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], attribute: str, message: str
) -> None:
    tar_of(tmp_path / "a.tar", members)
    sample = ShardSet.find(tmp_path, "a.tar").read(0)
    with pytest.raises(CorruptSampleError, match=f"a.tar, sample 'a'.*{message}"):
        getattr(sample, attribute)


def test_a_tar_whose_members_are_not_neighbours_is_refused(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("0.jpg", b"x"), ("1.jpg", b"x"), ("0.txt", b"x")])
    with pytest.raises(UserError, match="not neighbours"):
        ShardSet.find(tmp_path, "a.tar")


def test_damage_and_compression_are_refused_by_name(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    (folder / "set.manifest.json").unlink()
    data = (folder / "set-000000.tar").read_bytes()
    cases = {
        "compressed with gzip": gzip.compress(data),
        "not a tar": b"<html>" * 1000,
        "cut short": data[: len(data) // 2],
        "end-of-archive": data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512),
        "damaged header at byte": data[:512] + b"x" * (len(data) - 512),
        "holds no samples": bytes(10240),
    }
    for message, content in cases.items():
        (folder / "bad.tar").write_bytes(content)
        with pytest.raises(UserError, match=message):
            ShardSet.find(folder, "bad.tar")


def test_missing_things_are_named(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    with pytest.raises(UserError, match="folder does not exist"):
        ShardSet.find(folder / "nowhere", "x-*.tar")
    with pytest.raises(UserError, match=r"no shard matches(.|\n)*set-000000.tar"):
        ShardSet.find(folder, "set-{000000..000007}.tar")
    with pytest.raises(UserError, match="no shard matches"):
        ShardSet.find(folder, "other-*.tar")


def test_a_shard_that_is_not_its_manifests_is_refused(small_set: tuple[Path, Manifest]) -> None:
    folder, _ = small_set
    shards = ShardSet.find(folder, "set-*.tar")
    path = folder / "set-000001.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(UserError, match="manifest says"):
        ShardSet.find(folder, "set-*.tar")
    with pytest.raises(UserError, match="expected were"):
        shards.read(9)


def test_shards_without_a_living_link_are_left_out(tmp_path: Path) -> None:
    manifest = write_shards(samples(6), tmp_path, "x", samples_per_shard=3)
    (tmp_path / "x-000002.tar").write_bytes(bytes(10240))
    manifest.shards.append(ShardEntry(name="x-000002.tar", samples=0, bytes=10240))
    manifest.save(tmp_path / "x.manifest.json")
    assert len(ShardSet.find(tmp_path, "x-*.tar").shards) == 2


# -------------------------------------------------------------------------------------- remote


def test_http_shards_come_through_the_cache_once(
    small_set: tuple[Path, Manifest], tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp", reason="fsspec reads http:// with aiohttp")
    folder, _ = small_set
    asked: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)  # type: ignore[arg-type]

        def do_GET(self) -> None:
            asked[self.path] += 1
            super().do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True, args=(0.05,)).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        shards = ShardSet.find(url, "set-{000000..000002}.tar", cache=tmp_path / "cache")
        assert len(shards) == 20, "counted by the manifest, no shard fetched yet"
        assert not [path for path in asked if path.endswith(".tar")]
        assert [shards.read(i).key for i in (0, 1, 19)] == ["s00000", "s00001", "s00019"]
        again = ShardSet.find(url, "set-{000000..000002}.tar", cache=tmp_path / "cache")
        assert again.read(0).key == "s00000"
        assert asked["/set-000000.tar"] == 1
        assert asked["/set-000001.tar"] == 0
        with pytest.raises(UserError, match="cannot fetch"):
            ShardSet.find(url, "nothing.tar", cache=tmp_path / "cache")
    finally:
        server.shutdown()
        server.server_close()


def test_any_fsspec_store_and_globs_on_it(small_set: tuple[Path, Manifest], tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in small_set[0].glob("set*"):
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    shards = ShardSet.find("memory://bucket", "set-*.tar", cache=tmp_path / "cache")
    assert len(shards) == 20
    assert shards.read(12).key == "s00012"
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


def test_pipes_run_only_where_allowed(small_set: tuple[Path, Manifest], tmp_path: Path) -> None:
    folder, _ = small_set
    mark = tmp_path / "ran"
    command = f"pipe:touch {mark}; cat {folder}/set-000000.tar"
    with pytest.raises(UserError, match="not allowed"):
        ShardSet.find(folder, command)
    assert not mark.exists()
    shards = ShardSet.find(folder, command, allow_pipe=True, cache=tmp_path / "cache")
    assert len(shards) == 8
    with pytest.raises(UserError, match="ended with code"):
        ShardSet.find(folder, "pipe:false", allow_pipe=True, cache=tmp_path / "cache")


def test_an_unknown_protocol_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot open this kind of URL"):
        ShardSet.find("nosuch://bucket", "x-*.tar")


# ---------------------------------------------------------------------------- corruption budget


def test_the_budget_stops_above_its_share_only() -> None:
    budget = CorruptionBudget(share=0.1, grace=100)
    budget.count(50, [f"bad {i}" for i in range(10)])
    budget.count(50)
    with pytest.raises(UserError, match="11 of 101 samples are corrupt"):
        budget.count(1, ["bad"])
    other = CorruptionBudget(share=0.1, grace=100)
    other.load_state_dict(budget.state_dict())
    assert (other.seen, other.corrupt) == (101, 11)
    with pytest.raises(UserError, match=r"0\.00%"):
        CorruptionBudget(share=0).count(1, ["bad"])


def test_real_shards_read_whole(shared_data: Path) -> None:
    shards = ShardSet.find(shared_data, "flickr8k-{train-{000000..000005},test-000000}.tar")
    assert len(shards) == 7000
    order = shards.epoch_order(0, 0)[:700].tolist()
    read = [shards.read(index) for index in order]
    assert all(len(sample.captions) == 5 for sample in read)
    assert len({sample.key for sample in read}) == 700
