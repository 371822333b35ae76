"""config.py: every knob once, flags made from the fields,
one sentence for each mistake before any work starts."""
import ast
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import config
import encode
import sample
import teacher
from common import files
from config import Config, Stopped, UserError, flag, marked
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
    monkeypatch.setattr(config, "check_given", lambda cfg, given: None)
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
    files = [p for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))
             if p.name not in ("config.py", "rules.py") and p.parent.name != "tests"]
    read = set().union(*(attributes(ast.parse(p.read_text())) for p in files))
    tree = ast.parse((ROOT / "config.py").read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config")
    # grid, run_dir ... read for others
    for prop in (n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name in read):
        read |= attributes(prop)
    assert set(FIELDS) - read == set()


def test_marks_fit_their_fields_and_choices_hold_the_defaults():
    every = {mark for name in FIELDS for mark in FIELDS[name].metadata.get("marks", ())}
    of_numbers = {config.MAY_BE_ZERO, config.SHARE, config.SIGNED}
    assert every == {config.NETWORK, config.INIT, config.BRANCH, config.CACHE, config.MAY_CHANGE} | of_numbers | {mark for mark in every if type(mark) is int}
    assert all(name in NUMBERS for mark in of_numbers for name in marked(mark))
    assert all(FIELDS[name].default in choices for name, choices in config.CHOICES.items())
    assert all(set(values) <= set(FIELDS) for values in config.PRESETS.values())


def test_what_must_agree_is_listed_in_a_fixed_order():
    """Messages name the first field that differs, so the one that explains the others comes first; a branch's card keeps its rows."""
    assert marked(config.NETWORK) == ("lineage", "dim", "depth", "heads", "ffn", "time_dim", "text_dim", "text_len", "channels", "patch_t", "patch", "positions")
    assert marked(config.BRANCH) == (
        "physical_blocks", "semantic", "refinement", "injection", "semantic_experts", "refinement_experts", "top_k", "map_rank", "semantic_temperature",
        "renormalise",
        "categories", "lora_rank", "lora_alpha", "lora_targets", "frames", "height", "width", "fps")
    assert marked(config.CACHE) == ("lineage", "text_dim", "text_len", "channels", "frames", "height", "width")
    assert marked(config.INIT) == ("text_depth", "process", "predict")
    assert set(marked(config.MAY_CHANGE)) == {
        "out_dir", "resume", "dry_run", "stop_at", "log_every", "eval_every", "save_every", "preview_every", "preview_steps", "guidance", "base_steps",
        "physics_steps", "pool_dir", "report", "micro_batch",
        "keep_attention"}


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
    bad = ["nan", "inf", "-inf"] if FIELDS[name].type is float else []
    bad += [] if name in marked(config.SIGNED) else [-1]
    zero = FIELDS[name].default == 0 or name in marked(config.MAY_BE_ZERO) + marked(config.SHARE)
    bad += [1.01] if name in marked(config.SHARE) else [] if zero else [0]
    for value in bad:
        assert f"--{name}" in refused(f"--{name}={value}")


@pytest.mark.parametrize("name", config.CHOICES)
def test_choices(name, monkeypatch):
    monkeypatch.setattr(config, "check_given", lambda cfg, given: None)
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
    ("--train_physical false --semantic false --refinement false", "nothing to train"),
    ("--config wan-1.3b --weights w --cache c --train_physical false", "--train_physical"),
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
    "--physical_blocks= --freeze_backbone false",
    "--data_dir videos --height 480 --width 720", "--top_k 8", "--time_mean -0.5", "--decoys 1 --two 0",
    "--process vpred --preview_steps 1000",
])
def test_their_possible_neighbours_are_not(argv):
    parse(*argv.split())


# --- limits
@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_most_and_one_more_is_refused(name):
    most = 2**63 - 1 if "seed" in name else next((m for m in FIELDS[name].metadata.get("marks", ()) if type(m) is int), 10**6)
    if name in marked(config.SIGNED):
        assert "a finite number within 1,000,000" in refused(f"--{name}=-1e7")
    elif name not in marked(config.SHARE):
        assert f"--{name} must be {most:,} or less" in refused(f"--{name}", most + 1)
    if "seed" in name:  # torch and numpy read the largest
        assert getattr(parse(f"--{name}", most), name) == most


@pytest.mark.parametrize("argv", [
    "--dim 1048576", "--depth 1000000", "--threads 100000", "--world_clips 100000000", "--val_clips 100000000", "--semantic_experts 100000000",
    "--batch_size 100000000", "--text_len 1000000000", "--seed 36893488147419103232", "--world_seed 36893488147419103232", "--base_steps 100000000000",
    "--preview_steps 100000000000", "--fps 1e300 --data_dir films", "--time_mean=-1e300", "--base_steps 999000 --physics_steps 1000"])
def test_what_cannot_be_is_refused_by_name(argv):
    assert argv.split()[0].split("=")[0] in refused(*argv.split())


# --- every given flag is used, or refused
@pytest.mark.parametrize("argv", [
    "--annotations half.json", "--windows 2", "--cache latents", "--weights wan", "--fps 9", "--data_dir films --world_clips 10",
    "--data_dir films --colour_cues", "--data_dir films --negatives 0.1", "--lora_alpha 8", "--lora_targets to_q", "--snr_shift 3",
    "--process vpred --shift 2", "--process vpred --predict v", "--background divide", "--lineage wan --time_dim 16", "--freq_dim 64",
    "--fit_height 20", "--init_from runs/a --lr 0.1", "--init_from runs/a --base_steps 9",
    "--semantic false --semantic_experts 4", "--semantic false --map_rank 4", "--refinement false --top_k 1", "--refinement false --teacher maps",
    "--config wan-1.3b --weights w --cache c --guidance 3", "--config wan-1.3b --weights w --cache c --pool_dir p",
    "--config wan-1.3b --weights w --cache c --annotations a.json",
    "--base_data_dir films", "--data_dir films --physics still", "--init_from runs/a --physics true",
    "--data_dir films --init_from runs/a --base_data_dir others", "--config wan-1.3b --weights w --cache c --physics true",
    "--config wan-1.3b --weights w --cache c --base_data_dir films",
    "--physical_blocks= --freeze_backbone false --top_k 2"])
def test_a_flag_that_changes_nothing_is_refused_by_name(argv):
    assert f"{argv.split()[-2] if not argv.endswith('cues') else '--colour_cues'} changes something only" in refused(*argv.split())


@pytest.mark.parametrize("argv", [
    "--data_dir films --annotations a.json --windows 2 --fps 9", "--negatives 0.5", "--teacher maps --negatives 0.5 --background divide",
    "--data_dir films --teacher maps --negatives 0.1", "--lora_rank 4 --lora_alpha 8", "--process vpred --snr_shift 3",
    "--lineage wan --freq_dim 64", "--positions fitted --fit_height 20", "--init_from runs/a --base_steps 0 --physics_lr 0.1",
    "--refinement false --map_rank 4", "--physics_steps 0 --lora_rank 2 --physics_lr 0.1", "--physics_steps 0 --physics still",
    "--data_dir films --base_data_dir others",
    "--config wan-1.3b --dry_run --lr 0.1 --guidance 2", "--data_dir films --colour_cues false --ood="])
def test_a_flag_that_is_used_or_says_nothing_is_not(argv):
    parse(*argv.split())


def test_the_table_of_idle_flags_names_fields_alone():
    named = {name for names, *_ in config.rules.IDLE for name in names.split()}
    assert named <= set(FIELDS)


def test_a_run_is_resumed_by_its_own_command_line_again(tmp_path):
    """Also where it has a flag that an earlier version let pass."""
    stored_run(tmp_path, snr_shift=3.0)
    assert parse("--out_dir", tmp_path, "--resume", "--snr_shift", 3).snr_shift == 3


def test_what_is_printed_survives_half_a_character_and_a_name_that_is_not_utf_8():
    done = program(r"config.entry(lambda: print('\ud800', sys.argv[1]))", b"caf\xe9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\ud800 caf\\udce9\n", "")


# --- the flags of other commands
@dataclass(frozen=True)
class Flags:
    """As a command has them."""
    videos: str = ""  # folder of videos
    to: str = "clip.gif"  # file to write: 100 % of it
    n: int | None = None  # clips a prompt; None = 4
    rate: float = 8.0  # frames a second
    scale: int = 0  # screen pixels a pixel; 0 = so that a clip is large
    tiled: bool = False  # in tiles
    whole: bool = True  # all of it
    dtype: str = flag("auto", choices=("auto", "bf16"))  # auto = bf16 on cuda
    only: str | None = flag(None, choices=("laws", "where"))  # one table; None = both
    prompt: list[str] = flag([])  # what the clip shows; may be given several times

    def check(self):
        if self.tiled and self.to.endswith(".mp4"):
            raise UserError("--tiled and --to *.mp4 exclude each other.")


@dataclass(frozen=True)
class Beside:
    """Flags beside those of Config, of which one has a name of Config's."""
    seed: int = 3  # of the noise
    frames_shown: int = 49  # frames of a video


def flags(*argv):
    return config.parse_flags(Flags, [str(a) for a in argv], "A command.")


def refused_flags(*argv) -> str:
    with pytest.raises(UserError) as e:
        flags(*argv)
    sentence = str(e.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    return sentence


def test_a_command_has_the_flags_of_its_dataclass():
    assert flags("--videos", "v") == Flags("v")
    given = flags("--videos", "v", "--to", "a.mp4", "--n", 3, "--rate", 12, "--scale", 2, "--dtype", "bf16", "--only", "laws", "--prompt", "a ball",
                  "--prompt", "smoke")
    assert given == Flags("v", "a.mp4", 3, 12.0, 2, dtype="bf16", only="laws", prompt=["a ball", "smoke"]) and type(given.rate) is float
    assert flags("--videos", "v").prompt is not flags("--videos", "v").prompt


@pytest.mark.parametrize("argv, value", [(["--tiled"], True), (["--tiled", "true"], True), (["--tiled", "False"], False), (["--tiled=false"], False), ([], False)])
def test_a_boolean_flag_may_say_its_value(argv, value):
    assert flags("--videos", "v", *argv).tiled is value and flags("--videos", "v", "--whole", str(value)).whole is value


@pytest.mark.parametrize("argv, says", [
    (["--videos"], "--videos"), (["--out", "x"], "--out"), (["--n", "1.5"], "--n"), (["--n", "None"], "--n"), (["--rate", "fast"], "--rate"),
    (["--rate", "0"], "--rate must be more than zero, not 0.0."), (["--rate", "nan"], "--rate must be more than zero"), (["--rate=inf"], "--rate"),
    (["--scale", "-1"], "--scale must be 0 or more, not -1."), (["--n", "-1"], "--n must be 0 or more"), (["--tiled", "maybe"], "--tiled"),
    (["--dtype", "fp8"], "--dtype must be one of auto, bf16, not 'fp8'."), (["--only", "all"], "--only must be one of laws, where, not 'all'."),
    (["--prompt"], "--prompt"), (["stray"], "stray"), (["--tiled", "--to", "a.mp4"], "exclude each other"), (["--vid", "v"], "--vid"), (["--lr", "1"], "--lr"),
])
def test_a_command_refuses_with_one_sentence(argv, says):
    assert says in refused_flags(*argv)


def test_help_has_one_style_in_every_command(capsys):
    with pytest.raises(SystemExit) as e:
        flags("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and text.startswith("usage: ") and "[flags] A command." in text
    for line in ("--videos STR folder of videos []", "--to STR file to write: 100 % of it [clip.gif]", "--n INT clips a prompt; None = 4 [None]",
                 "--rate FLOAT frames a second [8.0]", "--tiled [true|false] in tiles [False]", "--dtype auto|bf16 auto = bf16 on cuda [auto]",
                 "--only laws|where one table; None = both [None]", "--prompt STR what the clip shows; may be given several times []"):
        assert line in text, line
    with pytest.raises(SystemExit):
        config.parse_with(Beside, ["--help"], "A command.")
    text = " ".join(capsys.readouterr().out.split())
    assert "--ood speed|radius|gravity" in text and "--device auto|cuda|mps|cpu" in text and "--frames_shown INT frames of a video [49]" in text
    assert all(name in text.split("Presets for --config:")[1] for name in config.PRESETS) and text.count("--seed INT") == 1


def test_a_command_may_have_flags_beside_those_of_config():
    own, cfg = config.parse_with(Beside, ["--seed", "5", "--frames", "24", "--frames_shown", "9", "--config", "debug"], "A command.")
    assert own == Beside(5, 9) and cfg == config.preset("debug", frames=24) and cfg.seed == 0
    own, cfg = config.parse_with(Beside, [], "A command.")
    assert own == Beside() and cfg == config.preset()
    with pytest.raises(UserError, match="--frames_shown must be 1 or more, not 0"):
        config.parse_with(Beside, ["--frames_shown", "0"], "A command.")
    with pytest.raises(UserError, match="--dim / --heads"):
        config.parse_with(Beside, ["--dim", "100"], "A command.")


def test_meanings_are_found_on_either_line_and_inside_a_function():
    @dataclass(frozen=True)
    class Inner:
        a: int = flag(  # on the first of two lines
            1, choices=(1, 2))
        b: str = "x  y"  # with # inside
        c: str  = ""  # last

        def method(self):
            d: int = 1  # no field
            return d
    assert config.meanings(Inner) == {"a": "on the first of two lines", "b": "with # inside", "c": "last"}


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


def change_stored(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def test_a_field_that_a_run_lacks_has_its_default(tmp_path):
    """The field was added to this program after the run was started."""
    cfg = stored_run(tmp_path, seed=7, lr=0.5)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["seed"]
    path.write_text(json.dumps(stored))
    assert config.load(path) == dataclasses.replace(cfg, seed=0)


def test_a_whole_number_is_a_float_too(tmp_path):
    stored_run(tmp_path)
    assert config.load(change_stored(tmp_path, lr=1)).lr == 1.0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'"text"', b"\xff\xfe\x00", b"[" * 100_000])
def test_load_refuses_what_is_no_config(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config.json is not a config of this version: .*[^.]\.$"):
        config.load(path)


@pytest.mark.parametrize("name, value", [
    ("lr", "fast"), ("lr", None), ("lr", True), ("lr", -1.0), ("lr", float("nan")), ("seed", float("inf")), ("seed", 1.5), ("seed", True), ("seed", "7"),
    ("semantic", "false"), ("semantic", 1), ("teacher", 3), ("teacher", ["maps"]), ("optimizer", "sgd"), ("categories", 18), ("decoys", 1.5), ("dim", 0),
])
def test_load_names_the_field_that_has_a_wrong_value(tmp_path, name, value):
    stored_run(tmp_path)
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path))}/config.json is not a config of this version: --{name} must be [^\n]*[^.]\.$"):
        config.load(change_stored(tmp_path, **{name: value}))


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


# --- torchrun
def test_what_processes_cannot_share_is_refused_under_torchrun(monkeypatch, capsys):
    assert config.rank() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert config.rank() == (1, 4) == files.shard_of("") and files.shard_of("3/8") == (2, 8)
    assert config.entry(lambda: "done", ranks=True) == "done"
    with pytest.raises(SystemExit) as e:
        config.entry(lambda: "done")
    assert e.value.code == 2 and "start it with python, not with torchrun" in capsys.readouterr().err
    for main, argv in ((encode.main, ["--export", "run", "--out", "new"]), (teacher.main, ["--report"]),
                       (teacher.main, ["--train_tiny"]), (sample.main, ["--run", "run", "--prompt", "a ball"])):
        with pytest.raises(UserError, match="not with torchrun"):
            main(argv)
