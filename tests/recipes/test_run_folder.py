"""The folder of a run: what is refused, who may write, and that nothing of others is deleted."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import wait_for_output
from safetensors import SafetensorError

from pretraining.recipe import UsageError
from pretraining.run_folder import check_run_dir, is_run, locked, remove_run

SHORT = ["--steps", "26", "--eval_every", "0"]
HOLD = "import sys, time; from pretraining.run_folder import locked\n"
HOLD += "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def everything(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


def error_line(result):
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_overwrite_deletes_what_a_run_wrote_and_only_that(in_process, workshop):
    run_dir = workshop.folder / "tiny"
    first = in_process(*SHORT, "--trackers", "tensorboard")
    assert first.returncode == 0, first.stderr
    written = everything(run_dir)
    assert any("events.out.tfevents" in name for name in written)
    theirs = {"notes.md", "longzoo/notes", "checkpoint-20/eval.json", "notes.unfinished/a"}
    theirs |= {"checkpoint-7/weights", "checkpoint-7.damaged/x", "model.pt", "vocab.txt"}
    for name in theirs:
        (run_dir / name).parent.mkdir(exist_ok=True)
        (run_dir / name).write_text("mine")
    remove_run(run_dir)
    left = {name for name in everything(run_dir) if (run_dir / name).is_file()}
    assert left == theirs | {"run.lock"}
    again = in_process(*SHORT, "--overwrite")
    assert again.returncode == 0, again.stderr
    # The folder that stands in the way of a checkpoint gets another name.
    theirs = theirs - {"checkpoint-20/eval.json"} | {"checkpoint-20.replaced/eval.json"}
    assert all((run_dir / name).read_text() == "mine" for name in theirs)
    assert "it is now checkpoint-20.replaced" in again.stdout
    assert (run_dir / "checkpoint-20/model.safetensors").is_file()


def test_runs_from_before_are_recognised(in_process, workshop):
    run_dir = workshop.folder / "tiny"
    assert in_process(*SHORT).returncode == 0
    record = json.loads((run_dir / "run.json").read_text())
    assert "model.safetensors" in record.pop("files")
    (run_dir / "run.json").write_text(json.dumps(record))
    (run_dir / "run.lock").unlink()
    (run_dir / "notes.md").write_text("mine")
    assert is_run(run_dir)
    remove_run(run_dir)
    assert everything(run_dir) == {"notes.md"}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b", ".corpus", "a\0b"])
def test_names_that_are_no_folder_of_their_own(in_process, workshop, name):
    (workshop.folder / "precious").write_text("mine")
    line = error_line(in_process(f"--name={name}", "--overwrite"))
    assert "name is the name of a folder" in line
    assert (workshop.folder / "precious").read_text() == "mine"


def test_a_folder_that_is_no_run_is_refused(in_process, workshop):
    other = workshop.folder / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("mine")
    line = error_line(in_process("--name", "thesis", "--overwrite"))
    assert "holds chapter.tex but no run, so --overwrite does not touch it" in line
    (other / "config.json").write_text("{}")  # a model of somebody else
    assert "its config.json would be replaced" in error_line(in_process("--name", "thesis"))
    assert everything(other) == {"chapter.tex", "config.json"}


def test_through_links_nothing_is_deleted(in_process, workshop):
    """The run's folder is a link, and so is one of its checkpoints."""
    disk = workshop.folder / "disk"
    disk.mkdir()
    (workshop.folder / "tiny").symlink_to(disk)
    assert in_process(*SHORT).returncode == 0
    os.rename(disk / "checkpoint-20", workshop.folder / "archive")
    (disk / "checkpoint-20").symlink_to(workshop.folder / "archive")
    remove_run(workshop.folder / "tiny")
    assert (workshop.folder / "tiny").is_symlink() and everything(disk) == {"run.lock"}
    assert (workshop.folder / "archive/model.safetensors").is_file()


def test_a_run_is_not_overwritten_by_accident(in_process, workshop):
    """Not even one that was killed before its first checkpoint."""
    run_dir = workshop.folder / "tiny"
    assert check_run_dir(run_dir) is False
    run_dir.mkdir()
    (run_dir / "run.json").write_text('{"recipe": {}}')
    (run_dir / "metrics.jsonl").write_text("")
    assert check_run_dir(run_dir) is False
    (run_dir / "metrics.jsonl").write_text("{}\n")
    assert "continue it with --resume" in error_line(in_process())
    assert check_run_dir(run_dir, resume=True, start=False) is True


def test_two_processes_on_one_folder(in_process, workshop, forks):
    """The second is refused in one line; the lock of one that was killed is none."""
    script = workshop.folder / "hold.py"
    script.write_text(HOLD)
    holder = forks().start(script, "tiny", cwd=workshop.folder)
    try:
        wait_for_output(holder, "held\n")
        line = error_line(in_process(*SHORT))
        assert f"is being written by process {holder.pid} on {os.uname().nodename}" in line
        assert everything(workshop.folder / "tiny") == {"run.lock"}
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert in_process(*SHORT).returncode == 0


def test_the_lock_is_held_while_training(in_process, monkeypatch):
    from pretraining import training

    refused = []

    def try_again(run, signals):
        with pytest.raises(UsageError) as error, locked(run.recipe.run_dir):
            pass
        refused.append(str(error.value))
        return signal.SIGTERM

    monkeypatch.setattr(training.Run, "train", try_again)
    assert in_process(*SHORT).returncode == 128 + signal.SIGTERM
    assert "is being written by" in refused[0]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    import errno

    import filelock

    def no_locks(lock, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    said = []
    monkeypatch.setattr(filelock.FileLock, "acquire", no_locks)
    with locked(tmp_path / "run", said.append):
        assert (tmp_path / "run").is_dir()
    assert "without locks: see to it that no second process writes this run" in said[0]


def test_a_start_that_came_to_nothing_leaves_nothing(in_process, workshop):
    line = error_line(in_process("--tokenizer", "nowhere"))
    assert "no tokenizer at nowhere" in line
    assert not (workshop.folder / "tiny").exists()


@pytest.mark.parametrize("writer", ["torch", "safetensors", "python"])
def test_a_full_disk_is_one_line(in_process, workshop, monkeypatch, writer):
    """The run stands where its last checkpoint is, and nothing of the next one takes up room."""
    from pretraining import saving

    def safetensors():  # it would put a file in the place of /dev/full
        text = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(text)

    write = {
        "torch": lambda: torch.save({"a": torch.zeros(9999)}, "/dev/full"),
        "safetensors": safetensors,
        "python": lambda: open("/dev/full", "w").write("a" * 9999),
    }[writer]
    if not Path("/dev/full").exists():
        pytest.skip("this system has no disk that is always full")
    save = saving.Saver._save_whole

    def fills_up(saver, step, facts, say, write_beside):
        if step > 10:  # what is written last finds no room
            write_beside = lambda folder: write()  # noqa: E731
        save(saver, step, facts, say, write_beside)

    with monkeypatch.context() as patch:
        patch.setattr(saving.Saver, "_save_whole", fills_up)
        line = error_line(in_process(*SHORT, "--checkpoint_every", "10"))
    run_dir = workshop.folder / "tiny"
    reason = "No space left on device"
    if writer == "torch":  # whose words for it are none
        reason = "a file could not be written whole, perhaps for want of space"
    expected = f"error: cannot write to {run_dir}: {reason}; make room and go on with --resume."
    assert line == expected
    assert [path.name for path in run_dir.glob("checkpoint-*")] == ["checkpoint-10"]
    result = in_process(*SHORT, "--checkpoint_every", "10", "--resume")
    assert result.returncode == 0 and "after step 10" in result.stdout
