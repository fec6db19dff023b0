"""The commands as users type them: exit codes, tables, advice, help."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.commands import add_prepare_arguments, add_verify_arguments, run_prepare, run_verify
from data_prep.errors import UserError
from data_prep.shards import Manifest
from tests.data_prep.misbehaving_server import MisbehavingServer, picture

REPOSITORY = Path(__file__).resolve().parents[2]


def prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="inherclip prepare")
    add_prepare_arguments(parser)
    return run_prepare(parser.parse_args([str(item) for item in arguments]))


def check(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="inherclip verify")
    add_verify_arguments(parser)
    return run_verify(parser.parse_args([str(item) for item in arguments]))


def test_from_a_list_of_urls_to_verified_shards(
    server: MisbehavingServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = ["ok", "404", "ok", "500-once", "robots", "html"]
    lines = [f"caption {n}\t{server.url}/{case}/{n}" for n, case in enumerate(cases)]
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    command = ("cc3m", path, "--out", out, "--allow-private", f"127.0.0.1:{server.port}",
               "--rows-per-shard", 4, "--processes", 1, "--threads", 4, "--retries", 0)  # fmt: skip
    assert prepare(*command) == 0
    said = capsys.readouterr().err
    assert "2 samples of 6 rows (33.3%) in 2 shards" in said
    for advice in ("dead link", "pages that replace", "X-Robots-Tag", "--retry-failed"):
        assert advice in said
    assert prepare(*command) == 0
    assert "0 worked on now" in capsys.readouterr().err
    assert prepare(*command, "--retry-failed") == 0
    assert "3 samples of 6 rows" in capsys.readouterr().err
    assert check(out) == 0
    assert "nothing wrong" in capsys.readouterr().out

    shard = out / "cc3m-000000.tar"
    shard.write_bytes(shard.read_bytes()[:8000])
    assert check(out) == 1
    table = capsys.readouterr().out
    assert "cut short" in table
    assert "checksum" in table
    assert check(out, "--repair") == 0
    assert "dropped" in capsys.readouterr().out
    assert check(out, "--no-decode") == 0
    # What repair dropped is fetched again on request.
    assert prepare(*command, "--retry-failed") == 0
    assert Manifest.load(out / "cc3m.manifest.json").num_samples == 3
    assert check(out) == 0


def test_a_list_without_a_living_link_is_an_error_code(
    server: MisbehavingServer, tmp_path: Path
) -> None:
    path = tmp_path / "list.csv"
    path.write_text(f"url,caption\n{server.url}/404/1,x\n")
    options = ("--out", tmp_path / "o", "--allow-private", "all", "--processes", 1)
    assert prepare("urls", path, *options) == 1


def test_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(picture(number))
        (images / f"{number}.txt").write_text(f"caption {number}")
    assert prepare("folder", images, "--out", tmp_path / "o", "--processes", 1) == 0
    assert "3 samples of 3 rows (100.0%)" in capsys.readouterr().err
    assert check(tmp_path / "o") == 0
    (tmp_path / "o" / "data.manifest.json").unlink()
    assert prepare("scan", tmp_path / "o") == 0
    assert check(tmp_path / "o", "--processes", 1) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cc3m", "no.tsv", "--out", "o"), "does not exist"),
        (("cc3m", "LIST", "--out", "o", "--slice", "4/4"), "no slice"),
        (("cc3m", "LIST", "--out", "o", "--slice", "x"), "no slice"),
        (("cc3m", "LIST", "--out", "o", "--quality", "101"), "--quality"),
        (("cc3m", "LIST", "--out", "o", "--read-timeout", "0"), "--read-timeout"),
        (("cc3m", "LIST", "--out", "o", "--threads", "0"), "at least 1"),
        (("cc3m", "LIST", "--out", "o", "--allow-private", "home"), "no network"),
        (("folder", "LIST", "--out", "o"), "prepare urls"),
        (("scan", "nowhere"), "does not exist"),
        (("set", "cc3m-val", "--images", "nowhere", "--out", "o"), "only URLs"),
        (("set", "mnist", "--images", "nowhere", "--out", "o"), "no set is called"),
    ],
)
def test_faults_of_the_user_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.tsv").write_text("a caption\thttp://127.0.0.1:1/x.jpg\n")
    with pytest.raises(UserError, match=message):
        prepare(*[item.replace("LIST", "list.tsv") for item in arguments])


def test_the_help_is_quick_and_complete() -> None:
    script = (
        "import argparse, sys\n"
        "from data_prep.commands import add_prepare_arguments, add_verify_arguments\n"
        "parser = argparse.ArgumentParser(); add_prepare_arguments(parser)\n"
        "other = argparse.ArgumentParser(); add_verify_arguments(other)\n"
        "print(parser.format_help() + other.format_help())\n"
        "assert not {'torch', 'pandas', 'numpy', 'rich', 'PIL'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    for word in ("cc3m", "mirror", "scan", "--repair", "examples", "exit code"):
        assert word in done.stdout
