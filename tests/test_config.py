"""config.py: every knob once, flags made from the fields,
one sentence for each mistake before any work starts."""
import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
from config import Config, Stopped, UserError
from helpers import ROOT

pytestmark = pytest.mark.quick
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
NUMBERS = [name for name, f in FIELDS.items() if f.type in (int, float) and name not in config.CHOICES]


def parse(*argv):
    return config.parse([str(a) for a in argv], "test")


def refused(*argv) -> str:
    """The one sentence with which this command line is refused."""
    with pytest.raises(UserError) as e:
        parse(*argv)
    sentence = str(e.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def another(f):
    """A value of the field's type that is not its default."""
    return {bool: not f.default, int: f.default + 1 if f.type is int else 0,
            float: f.default + 0.5 if f.type is float else 0}.get(f.type, f"{f.default}x")


# --- fields and flags
@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("config", "resume")])
def test_every_field_is_a_flag(name, monkeypatch):
    monkeypatch.setattr(config, "check", lambda cfg: cfg)  # the value need not make sense here
    value = another(FIELDS[name])
    assert parse(f"--{name}", value) == config.preset(**{name: value})


def test_a_bare_boolean_flag_means_true_and_false_can_be_said():
    assert parse("--colour_cues").colour_cues is True
    assert parse("--freeze_backbone", "False").freeze_backbone is False


def test_every_field_has_a_meaning_and_help_prints_it(capsys):
    meanings = config.meanings(config.Config)
    assert set(meanings) == set(FIELDS) and all(meanings.values())
    with pytest.raises(SystemExit) as e:
        parse("--help")
    assert e.value.code == 0
    text = re.sub(r"\s", "", capsys.readouterr().out)
    for name in set(FIELDS) - {"config"}:
        assert f"--{name}" in text and re.sub(r"\s", "", meanings[name]) in text, name


def test_the_source_is_read_once_a_command_line(monkeypatch):
    """Reading meanings from the source takes a thirtieth of a second:
    for every flag anew it would be the slowest part of a typo."""
    calls, getsource = [], config.inspect.getsource
    monkeypatch.setattr(config.inspect, "getsource", lambda thing: calls.append(thing) or getsource(thing))
    parse()
    assert len(calls) <= 1


def attributes(node) -> set[str]:
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def test_every_field_is_read_outside_config():
    read = set().union(*(attributes(ast.parse(p.read_text()))
                         for p in ROOT.glob("*.py") if p.name != "config.py"))
    tree = ast.parse((ROOT / "config.py").read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    # grid, run_dir ... read for others
    for prop in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name in read):
        read |= attributes(prop)
    assert set(FIELDS) - read == set()


def test_tables_name_real_fields_and_hold_the_defaults():
    assert config.MAY_CHANGE <= set(FIELDS) and config.MAY_BE_ZERO <= set(NUMBERS)
    assert set(config.CHOICES) <= set(FIELDS)
    assert all(FIELDS[name].default in choices for name, choices in config.CHOICES.items())
    assert all(set(values) <= set(FIELDS) for values in config.PRESETS.values())


# --- presets
@pytest.mark.parametrize("name", config.PRESETS)
def test_preset_is_sound_and_flags_override_it(name):
    own = config.PRESETS[name]
    dry = ["--dry_run"] if own.get("latent") else []  # official models need --weights and --cache, or this
    cfg = parse("--config", name, *dry)
    assert cfg == dataclasses.replace(Config(), config=name, dry_run=bool(dry), **own)
    assert cfg == config.check(config.preset(name, dry_run=bool(dry)))
    # whichever comes first, the flag wins
    assert parse("--warmup", 7, "--config", name, *dry) == dataclasses.replace(cfg, warmup=7)
    assert cfg.run_dir == Path("runs") / name


def test_derived_sizes():
    cfg = config.preset(frames=6, patch_t=2, height=24, width=40, patch=8, physical_blocks=" 0, 2,5 ")
    assert cfg.grid == (3, 3, 5) and cfg.physical_at == (0, 2, 5)
    assert config.preset(physical_blocks="").physical_at == ()
    assert config.preset(out_dir="a/b").run_dir == Path("a/b")


# --- refusals
@pytest.mark.parametrize("argv, says", [
    (["--lrr", 1], "--lrr"), (["--batch", 4], "--batch"), (["stray"], "stray"), (["--lr"], "--lr"),
    (["--config", "huge"], "huge"),
    (["--lr", "fast"], "--lr"), (["--depth", 2.5], "--depth"),
    (["--freeze_backbone", "maybe"], "--freeze_backbone"),
])
def test_unknown_flags_and_wrong_types_are_refused(argv, says):
    assert says in refused(*argv)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_refused(name):
    bad = ["nan", "inf", "-inf"] if FIELDS[name].type is float else [2**64, 10**400]
    bad += [] if name == "time_mean" else [-1]  # the one number that may be negative
    bad += [] if name in config.MAY_BE_ZERO else [0]
    for value in bad:
        assert f"--{name}" in refused(f"--{name}={value}")


@pytest.mark.parametrize("name", config.CHOICES)
def test_choices(name, monkeypatch):
    wrong = 18 if FIELDS[name].type is int else "nonsense"
    sentence = refused(f"--{name}", wrong)
    assert all(str(choice) in sentence for choice in config.CHOICES[name])
    for choice in config.CHOICES[name]:
        assert getattr(parse(f"--{name}", choice), name) == choice


@pytest.mark.parametrize("argv, says", [
    ("--frames 5", "--patch_t"), ("--height 36", "--patch"), ("--width 20", "--patch"),
    ("--height 8", "16 to 128"), ("--width 256", "16 to 128"), ("--frames 300", "256 frames"),
    ("--dim 100", "multiple of 16"), ("--dim 96 --heads 4", "multiple of 16"), ("--time_dim 33", "even"),
    ("--physical_blocks 1;3", "1,3,5"), ("--physical_blocks -1", "--physical_blocks"),
    ("--physical_blocks 1,6", "--depth"), ("--physical_blocks 3,1", "rise"),
    ("--physical_blocks 1,1", "rise"), ("--physical_blocks=", "nothing to train"),
    ("--init_from runs/a --physics_steps 0", "--init_from"),
    ("--base_steps 0", "--init_from"), ("--top_k 17", "--refinement_experts"), ("--batch_size 1", "L_coarse"),
    ("--ood speed --data_dir videos", "--ood"),
    ("--decoys 1.5", "--decoys"), ("--two 2", "--two"), ("--caption_dropout 1.01", "--caption_dropout"),
    ("--ema 1", "--ema"),
    ("--process vpred --preview_steps 1001", "--preview_steps"),
])
def test_impossible_combinations_are_refused(argv, says):
    assert says in refused(*argv.split())


@pytest.mark.parametrize("argv", [
    "--physical_blocks= --physics_steps 0", "--base_steps 0 --init_from runs/a",
    "--batch_size 1 --coarse_loss bce", "--batch_size 1 --coarse_weight 0",
    "--data_dir videos --height 480 --width 720", "--top_k 8", "--time_mean -0.5", "--decoys 1 --two 0",
    "--process vpred --preview_steps 1000",
])
def test_their_possible_neighbours_are_not(argv):
    parse(*argv.split())


# --- run folders
def stored_run(folder: Path, **fields) -> Config:
    cfg = config.preset("debug", out_dir=str(folder), **fields)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg) | {"git": "abc"}))
    return cfg


def test_load_is_the_inverse_of_storing(tmp_path):
    cfg = stored_run(tmp_path, lr=0.1 + 0.2, freeze_backbone=False, ood="radius", seed=7)
    assert config.load(tmp_path / "config.json") == cfg


def test_resume_takes_stored_values_and_only_given_flags_override_them(tmp_path, monkeypatch):
    run = tmp_path / "run"
    cfg = stored_run(run, lr=0.123, seed=5, semantic=False)
    # its preset's name too
    assert parse("--out_dir", run, "--resume") == dataclasses.replace(cfg, resume=True)
    assert parse("--out_dir", run, "--resume", "--base_steps",
                 99) == dataclasses.replace(cfg, resume=True, base_steps=99)
    monkeypatch.chdir(tmp_path)
    stored_run(Path("runs/debug"), lr=0.321)
    assert parse("--config", "debug", "--resume").lr == 0.321
    assert "no run folder" in refused("--out_dir", tmp_path / "none", "--resume")


@pytest.mark.parametrize("content",
                         [b"", b"{", b"[]", b"null", b"{}", b'"text"', b"\xff\xfe\x00", "lr=fast", "lr=null",
                          "seed=Infinity", "seed=missing"])
def test_load_refuses_a_broken_config(tmp_path, content):
    stored_run(tmp_path)
    path = tmp_path / "config.json"
    if isinstance(content, str):  # one field of a good file broken
        name, value = content.split("=")
        stored = json.loads(path.read_text())
        stored[name] = {"fast": "fast", "null": None, "Infinity": float("inf")}.get(value)
        if value == "missing":
            del stored[name]
        content = json.dumps(stored).encode()
    path.write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        config.load(path)


# --- as a program
def program(code: str, *argv) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", f"import sys, config\n{code}", *argv], cwd=ROOT,
                          capture_output=True, text=True)


def test_a_wrong_flag_ends_a_program_with_one_line_and_code_2():
    done = program("config.entry(lambda: print(config.parse(sys.argv[1:], 'x')))", "--lr", "x")
    assert done.returncode == 2 and done.stdout == "" and "--lr" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_good_command_line_needs_no_torch():
    done = program("config.entry(lambda: print(config.parse(sys.argv[1:], 'x').lr, 'torch' in sys.modules))",
                   "--lr", "0.25")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.25 False\n", "")


def test_stopped_work_exits_1(capsys):
    def full():
        raise Stopped("The disk is full.")

    with pytest.raises(SystemExit) as e:
        config.entry(full)
    assert e.value.code == 1 and capsys.readouterr().err == "The disk is full.\n"
