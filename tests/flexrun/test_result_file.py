"""Facts about the output of a job: its lines, and how it survives kills and full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from flexrun.errors import FlexrunError, UsageError
from flexrun.request import CompletionOutput, RequestOutput
from flexrun.result_file import ResultFile, result_of

JOB = {"--input": "abc", "--temperature": 0.0}


def output_of(index: int, text: str = "hi", n: int = 1) -> RequestOutput:
    completions = [CompletionOutput(i, f"{text}{i}", (1, 2, i), "stop") for i in range(n)]
    return RequestOutput(f"id{index}", "p", (5, 6), completions, index=index)


@pytest.fixture
def paths(tmp_path) -> tuple[Path, Path]:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path / "out.jsonl", tmp_path / "in.jsonl"


def opened(paths: tuple[Path, Path], **changes: object) -> ResultFile:
    return ResultFile(paths[0], paths[1], JOB | changes)


def written(paths: tuple[Path, Path], *indexes: int) -> Path:
    results = opened(paths)
    for index in indexes:
        results.write(output_of(index))
    results.close()
    return paths[0]


def indexes_in(path: Path) -> list[int]:
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def test_fields_of_a_result():
    """One completion: its fields in their order, and how many tokens were used."""
    result = result_of(output_of(3))
    assert list(result) == ["id", "index", "text", "token_ids", "finish_reason", "usage"]
    assert (result["text"], result["token_ids"]) == ("hi0", [1, 2, 0])
    assert result["usage"] == {"prompt_tokens": 2, "completion_tokens": 3}


def test_several_completions():
    """With n > 1 all completions are listed in order, and the first is also at the top."""
    output = output_of(0, n=3)
    output.outputs.reverse()
    result = result_of(output)
    assert result["text"] == "hi0"
    assert [c["index"] for c in result["completions"]] == [0, 1, 2]
    assert result["usage"]["completion_tokens"] == 9


def test_a_failed_request():
    """A failed request has no text and says why."""
    error = {"code": "bad_json", "message": "m"}
    result = result_of(RequestOutput(7, None, (), index=1, error=error))
    assert (result["id"], result["text"], result["token_ids"]) == (7, "", [])
    assert (result["finish_reason"], result["error"]) == ("error", error)


def test_a_result_is_on_its_way_at_once(paths):
    """Each line can be read by others as soon as it is written; texts stay readable."""
    results = opened(paths)
    results.write(output_of(0, text="漢\u2028\ud800"))
    lines = paths[0].read_bytes().splitlines(keepends=True)
    assert len(lines) == 1
    assert "漢".encode() in lines[0]
    assert json.loads(lines[0])["text"] == "漢\u2028\ud8000"
    results.close()


def test_the_same_job_continues(paths):
    """A second run knows what is finished and appends."""
    written(paths, 0, 2)
    results = opened(paths)
    assert results.finished == {0, 2}
    results.write(output_of(1))
    results.close()
    assert indexes_in(paths[0]) == [0, 2, 1]


def test_failures_of_earlier_runs_are_counted(paths):
    """Failed requests are finished, and known as failed."""
    results = opened(paths)
    results.write(RequestOutput("a", None, (), index=0, error={"code": "c", "message": "m"}))
    results.close()
    results = opened(paths)
    assert (results.finished, results.failed_before) == ({0}, 1)
    results.close()


@pytest.mark.parametrize("torn", [b'{"id": "x", "ind', b"\0\0\0\0", b'{"id": "x", "index": 9}'])
def test_a_torn_last_line_is_cut_off(paths, torn):
    """What a kill left without line end is removed, and that request runs again."""
    with open(written(paths, 0, 1), "ab") as file:
        file.write(torn)
    results = opened(paths)
    assert results.finished == {0, 1}
    results.write(output_of(2))
    results.close()
    assert indexes_in(paths[0]) == [0, 1, 2]


def test_a_damaged_line_is_not_overwritten(paths):
    """A whole line that is no result stops the run before anything is changed."""
    with open(written(paths, 0), "ab") as file:
        file.write(b"edited by hand\n")
    before = paths[0].read_bytes()
    with pytest.raises(UsageError, match="line 2"):
        opened(paths)
    assert paths[0].read_bytes() == before


@pytest.mark.parametrize("sidecar", [None, "not json", "[]", '{"--input": "abc"}'])
def test_foreign_output_is_left_alone(paths, sidecar):
    """A non-empty output without this job's sidecar is refused and not touched."""
    path = paths[0]
    path.write_text("precious\n")
    if sidecar is not None:
        Path(f"{path}.job.json").write_text(sidecar)
    with pytest.raises(UsageError, match="choose another --output"):
        opened(paths)
    assert path.read_text() == "precious\n"
    assert not sidecar or Path(f"{path}.job.json").read_text() == sidecar


def test_what_differs_is_named(paths):
    """The error names every setting in which the jobs differ."""
    written(paths, 0)
    with pytest.raises(UsageError, match="another --temperature, --n\n"):
        opened(paths, **{"--temperature": 1.0, "--n": 2})


def test_an_empty_output_is_free(paths):
    """An existing empty file may be used, whatever sidecar is beside it, and is kept."""
    paths[0].touch()
    Path(f"{paths[0]}.job.json").write_text('{"--input": "other"}')
    opened(paths).close()
    assert paths[0].exists()
    assert indexes_in(written(paths, 0)) == [0]


def test_a_run_that_writes_nothing_leaves_nothing(paths):
    """When the model then cannot be loaded, no empty output stays behind."""
    opened(paths).close()
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["in.jsonl"]


def test_two_runs_do_not_share_an_output(paths):
    """A second run of the same job is refused while the first is at work."""
    results = opened(paths)
    results.write(output_of(0))
    with pytest.raises(UsageError, match="another run"):
        opened(paths)
    results.close()
    opened(paths).close()


def test_output_never_overwrites_the_input(paths):
    """The input is recognised through links, and when its name is the sidecar's."""
    output, source = paths
    link = output.with_name("link")
    link.symlink_to(source)
    hard = output.with_name("hard")
    hard.hardlink_to(source)
    sidecar = output.with_name("x.job.json")
    sidecar.write_bytes(source.read_bytes())
    for path, input_path in [
        (source, source),
        (link, source),
        (hard, source),
        (output.with_name("x"), sidecar),
    ]:
        with pytest.raises(UsageError, match="overwrite the input"):
            ResultFile(path, input_path, JOB)
    assert source.read_text() == '{"prompt": "a"}\n'


def test_unwritable_outputs_are_refused(paths):
    """A missing directory, a directory, a device and a name too long are usage errors."""
    directory = paths[0].parent
    for path, words in [
        (directory / "missing" / "out", "does not exist"),
        (directory, "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (directory / ("n" * 300), "File name too long"),
    ]:
        with pytest.raises(UsageError, match=words):
            ResultFile(path, paths[1], JOB)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission_is_refused(paths):
    """A directory that cannot be written to is a usage error."""
    paths[0].parent.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        opened(paths)
    paths[0].parent.chmod(0o700)


@pytest.mark.parametrize("taken", [0, 10])
def test_a_full_disk_keeps_what_is_whole(paths, monkeypatch, taken):
    """A line that the disk does not take whole is removed, and the error says what to do."""
    results = opened(paths)
    results.write(output_of(0))
    real_write, room = os.write, [taken]

    def full(fd, data):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, room[0] = data[: room[0]], 0
        return real_write(fd, part)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(FlexrunError, match="No space left on device") as caught:
            results.write(output_of(1))
    assert "the same command continues" in str(caught.value)
    results.close()
    assert indexes_in(paths[0]) == [0]
    assert indexes_in(written(paths, 1)) == [0, 1]
