"""Commands that cannot work, of the list in drills/bad_commands.txt those that are quick: each is refused in one
sentence with exit code 2 and writes nothing. The drill runs the others too, and in processes of their own."""
import contextlib
import gc

import pytest
import torch

from drills import bad_commands

ALL = bad_commands.read_list()
PROGRAMS = {"train.py", "sample.py", "evaluate.py", "teacher.py", "encode.py", "world.py", "bench.py",
            "ablate.py", "report.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that these commands are given, as the current folder."""
    folder = tmp_path_factory.mktemp("bad_commands")
    with contextlib.chdir(folder):
        bad_commands.plain_files(folder)
        bad_commands.runs(folder)
        gc.freeze()  # each command looks for destructors that print
        yield folder
    gc.unfreeze()
    torch.set_num_threads(1)  # commands give torch the threads that they are asked for


@pytest.mark.slow
def test_a_command_that_cannot_work_is_refused_in_one_sentence_and_writes_nothing(folder):
    quick = [bad for bad in ALL if bad.section in ("plain", "runs") and not bad.later]
    wrong, before = {}, bad_commands.state_of(folder)
    for bad in quick:
        code, said = bad_commands.here(bad.argv)
        after = bad_commands.state_of(folder)
        found = bad_commands.faults(bad, code, said, bad_commands.changes(before, after))
        before = after
        if found:
            wrong[bad.command] = found, said
    assert not wrong
    assert len(quick) > 150


def test_the_list_has_commands_for_every_program_and_says_none_twice():
    assert {bad.argv[0] for bad in ALL} == PROGRAMS
    assert len({bad.command for bad in ALL}) == len(ALL)


def test_the_drill_notices_what_a_good_refusal_must_not_do():
    bad = bad_commands.Bad("plain", "train.py --x", False, "", "unknown")

    def faults(code=2, said="--x is unknown.\n", changed=()):
        return bad_commands.faults(bad, code, said, set(changed))
    assert faults() == faults(said="reading: 1it [00:00, 5it/s]\r    \r--x is unknown.\n") == []
    assert faults(code=0) == ["exit code 0"]
    assert faults(said="--x is unknown\n") == faults(said="First.\n--x is unknown.\n") == ["not one sentence"]
    assert "traceback" in faults(said="Traceback (most recent call last):\n--x is unknown.\n")
    assert faults(said="Bad flag.") == ["not the sentence with 'unknown'"]
    assert faults(changed=["runs/log.jsonl", "new/cache.json"]) == ["wrote runs/log.jsonl"]
    assert bad_commands.changes({"a": 1, "b": 2}, {"b": 3, "c": 4}) == {"a", "b", "c"}
