"""report.py: the page says what the run folder and the model say, fits in 5 MB, and works in a real browser
without a word to the network; figures are drawn; what is no run is refused."""
import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

import common.page
import common.run
import config
import data
import report
import sample
import train
from common import ablation
from common.files import sealed
from helpers import PRESENT, ROOT, sentence, write_run
from physics import laws
from runs import launch

# Clips that laws can be measured on, with room for maps of more than one token.
CFG = config.preset("debug", frames=8, height=32, width=32, patch=8, preview_steps=3, guidance=1.5)
PROMPTS = ["a red ball bounces", "a candle burns on the left"]
LINES = {"small": {"equal steps": {
    "default": {"row": "all parts", "seeds": 3, "steps": 300, "trained": 5, "ratio": 1., "paper": "65.0",
                "values": {"law error": [.5, .1], "found": [.9, None]}, "differences": {"law error": [0., 0.]}},
    "lora": {"row": "LoRA </script> of equal parameters", "seeds": 3, "steps": 300, "trained": 5, "ratio": 1.7, "paper": "",
             "values": {"law error": [.7, .1], "found": [.8, .1]}, "differences": {"law error": [.2, .05]}}},
    "equal time": {}}}


def log_line(step, **values):
    return json.dumps(sealed({"step": step, "stage": "base", "seconds": 2. * step, **values})) + "\n"


def training_line(step, loss, **more):
    return log_line(step, loss=loss, diffusion=loss, lr=.1, by_noise=[loss, None], waited=.5, skipped=False, **more)


def make_run(folder, cfg=CFG, branch=True):
    """A run as train.py leaves it, with a log, previews, and law errors that somebody measured."""
    run = write_run(folder, cfg, [*PROMPTS, "red green on the left right"], branch)
    lines = [training_line(step, 1 / (step + 1)) for step in range(0, 50, 10)]
    (run / "log.jsonl").write_text("".join(lines) + log_line(50, held_out={"diffusion": .2}))
    (run / "samples").mkdir()
    for step in (10, 20, 30):
        Image.fromarray(np.full((8, 8, 3), step, np.uint8)).save(run / "samples" / f"step{step:06d}.gif")
    errors = {law.__name__: .1 for law in laws.LAWS.values()}
    rows = {name: {"found": 1., "all": .1, "two": .2, **errors, "se": .01}
            for name in ("simulator", "frozen", "backbone alone", "with the branch")}
    (run / "evaluation.json").write_text(json.dumps(sealed({"laws": {
        "rows": rows, "settings": {"checkpoint": "best.pt", "step": 40, "n": 16}}})))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "ablation.json"
    path.write_text(json.dumps(sealed({name: {"lines": lines} for name, lines in LINES.items()})))
    return path


@pytest.fixture(scope="module")
def pages(run, table, tmp_path_factory):
    """The page of one run, and that of two runs with an ablation."""
    folder = tmp_path_factory.mktemp("pages")
    other = make_run(folder / "second", dataclasses.replace(CFG, lr=.25))
    report.main(["--run", str(run), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--out", str(folder / "one.html")])
    report.main(["--run", str(run), "--run", str(other), "--ablation", str(table), "--out", str(folder / "two.html")])
    return folder / "one.html", folder / "two.html"


def told(page):
    """The data of a page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


def pixels_of(film):
    kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", film["src"]).groups()
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    return kind, image.reshape(film["frames"], film["height"], film["width"], 3)


# ---------------------------------------------------------------------------------------------------- its data
def test_curves_are_means_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr(common.page, "POINTS", 2)
    lines = [training_line(0, 4.), training_line(10, 2.), "half a li\n", training_line(20, 1.),
             log_line(20, held_out={"diffusion": .3}, held_out_base=.4), training_line(30, None)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    found = report.curves(common.run.read_log(tmp_path / "log.jsonl"), config.preset("debug", batch_size=6, base_steps=20))
    assert found["steps"] == [5, 25] and found["border"] == 20
    assert found["values"]["loss"] == [3, 1]  # a loss that was not finite is left out
    assert found["values"]["speed"] == [3, 3]  # six clips a step, two seconds each
    assert found["values"]["waited"] == [500, 500] and "skipped" not in found["values"]
    assert found["by_noise"] == [[3, 1], [None, None]]
    assert found["held_out"] == {"steps": [20], "values": {"diffusion": [.3], "diffusion, stage one's clips": [.4]}}


def test_a_run_without_a_log_or_an_evaluation_has_a_page_still(tmp_path):
    run = write_run(tmp_path / "run", CFG, PROMPTS)
    report.main(["--run", str(run)])
    shown, = told(run / "report.html")["runs"]
    assert shown["curves"]["steps"] == [] and shown["samples"] == [] and "laws" not in shown
    assert shown["physics_world"] and len(shown["films"]) == 4


def test_files_of_another_version_are_passed_over(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "loss": .5}) + "\n" + training_line(2, .3) + "[1]\n\0\n")
    (run / "evaluation.json").write_text(json.dumps({"laws": {"table": [1]}, "localisation": {"rows": {"AUC": {}}}}))
    report.main(["--run", str(run), "--prompt", "a ball"])
    shown, = told(run / "report.html")["runs"]
    assert shown["curves"]["values"]["loss"] == [.5, .3] and shown["curves"]["by_noise"][0] == [None, .3]
    assert "laws" not in shown and "localisation" not in shown


def test_previews_are_chosen_evenly_move_and_fit(tmp_path):
    rng = np.random.default_rng(0)
    for step in range(1, 21):
        frames = [Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)) for _ in range(3)]
        frames[0].save(tmp_path / f"step{step:06d}.gif", save_all=True, append_images=frames[1:], duration=80)
    (tmp_path / "mine.gif").write_bytes(bytes(10))
    shown = report.previews(tmp_path, 10**6)
    assert [one["step"] for one in shown] == [3, 7, 10, 13, 17, 20]
    for scale, most in ((1, 10**6), (2, 20_000)):
        for one in report.previews(tmp_path, most):
            content = base64.b64decode(one["src"].removeprefix("data:image/webp;base64,"))
            image = Image.open(io.BytesIO(content))
            assert len(content) <= most / 6 and image.size == (60 // scale, 40 // scale) and image.n_frames == 3
    assert report.previews(tmp_path, 600) == [] == report.previews(tmp_path / "none", 10**6)
    (tmp_path / "step000020.gif").write_bytes((tmp_path / "step000020.gif").read_bytes()[:2000])
    (tmp_path / "step000017.gif").write_bytes(b"no picture")
    assert [one["step"] for one in report.previews(tmp_path, 10**6)] == [3, 7, 10, 13]


def test_odd_entries_of_a_log_count_as_not_said():
    lines = [{"step": "0", "loss": 1.}, {"step": 0, "loss": 1., "waited": None, "seconds": "x"}, {"step": 1, "held_out": None},
             {"step": 2, "loss": "low", "by_noise": 3}, {"step": 3, "held_out": {"diffusion": "low"}, "held_out_base": None}]
    found = common.page.curves(lines, CFG)
    assert found["steps"] == [0, 2] and found["values"]["loss"] == [1, None] and found["by_noise"] == []
    assert found["held_out"]["values"] == {"diffusion": [None], "diffusion, stage one's clips": [None]}


def test_what_cannot_be_shown_of_a_run_is_said(tmp_path, capsys):
    run = make_run(tmp_path / "run", config.preset("debug", semantic_experts=2, preview_steps=1))
    (run / "samples" / "step000040.gif").mkdir()
    (run / "samples" / "step\u00b2.gif").write_bytes(b"")
    (run / "evaluation.json").unlink()
    report.main(["--run", str(run), "--prompt", "a zebra"])
    shown, = told(run / "report.html")["runs"]
    assert [one["step"] for one in shown["samples"]] == [10, 20, 30] and shown["previews"] == 5
    assert "correlation" not in shown  # of two experts, each is 1 or -1
    assert "to_measure" not in shown  # laws need larger clips than these
    assert "zebra" in capsys.readouterr().err


def test_a_second_run_that_is_none_is_refused_before_the_first_ones_films(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_run", None)
    bad = tmp_path / "bad"
    bad.mkdir()
    argv = ["--run", str(run), "--run", str(bad), "--out", str(tmp_path / "new" / "page.html")]
    assert "is no run folder" in sentence(report.main, argv)
    (bad / "config.json").write_text("{}")
    assert "it names no preset" in sentence(report.main, argv) and not (tmp_path / "new").exists()


def test_films_are_the_clips_of_sample_with_and_without_the_branch(run, pages):
    cfg, net, process, tokenizer, info = sample.load_run(run)
    model = sample.RunModel(cfg, net, process, tokenizer)
    how = dict(seed=cfg.seed, steps=cfg.preview_steps, guidance=cfg.guidance)
    for name, one in (("with", model), ("without", sample.bare(model))):
        for film, (clip, _) in zip(told(pages[0])["runs"][0]["films"], sample.generate(one, PROMPTS, **how), strict=True):
            kind, shown = pixels_of(film[name])
            assert kind == "png" and (shown == clip).all()


def test_maps_are_those_of_every_step_of_sampling(run, pages):
    cfg, net, process, tokenizer, info = sample.load_run(run)
    made = sample.generate(sample.RunModel(cfg, net, process, tokenizer), PROMPTS, seed=cfg.seed,
                           steps=cfg.preview_steps, guidance=cfg.guidance)
    for film, (_, routing) in zip(told(pages[0])["runs"][0]["films"], made, strict=True):
        maps = film["maps"]
        assert len(maps["times"]) == len(maps["bytes"]) == cfg.preview_steps
        assert maps["times"] == sorted(maps["times"], reverse=True)
        assert maps["names"] == [data.category_names(cfg)[i] for i in PRESENT]
        middle = min(range(3), key=lambda i: abs(maps["times"][i] - .5))
        shown = np.frombuffer(base64.b64decode(maps["bytes"][middle]), np.uint8).reshape(*maps["grid"], -1)
        expected = routing.lift[..., PRESENT].clip(0, 1) * 255
        assert np.abs(shown - expected).max() <= .5 and np.ptp(shown) > 0
        assert film["semantic"] == pytest.approx(routing.semantic.tolist(), abs=1e-4)


def test_a_base_has_clips_and_no_maps(tmp_path):
    run = make_run(tmp_path / "base", branch=False)
    report.main(["--run", str(run)])
    for film in told(run / "report.html")["runs"][0]["films"]:
        assert film.keys() == {"prompt", "with"}


def test_a_large_film_loses_quality_before_pixels_and_never_exceeds_its_share():
    noise = np.random.default_rng(0).integers(0, 256, (6, 40, 60, 3), dtype=np.uint8)
    kinds = {}
    for most in (10**6, 30_000, 9_000, 1_500):
        film = common.page.film(noise, most)
        kind, shown = pixels_of(film)
        assert len(film["src"]) * 3 / 4 <= most + 100 and len(shown) == 6
        kinds[most] = kind, shown.shape[1:3]
    assert kinds[10**6] == ("png", (40, 60)) and kinds[30_000] == ("jpeg", (40, 60))
    assert kinds[1_500][1] < kinds[9_000][1] <= (40, 60)


def test_large_maps_are_thinned_to_their_share():
    maps = [np.random.default_rng(i).random((2, 20, 30, 5)) * 2 - .5 for i in range(3)]
    text, grid = common.page.as_bytes(maps, 10**6)
    assert grid == [2, 20, 30]
    shown = np.frombuffer(base64.b64decode(text[1]), np.uint8).reshape(maps[1].shape)
    assert np.abs(shown - maps[1].clip(0, 1) * 255).max() <= .5
    text, grid = common.page.as_bytes(maps, 5000)  # squares of two by two tokens: peaks stay
    shown = np.frombuffer(base64.b64decode(text[1]), np.uint8).reshape(2, 10, 15, 5)
    assert grid == [2, 10, 15]
    assert np.abs(shown - maps[1].clip(0, 1).reshape(2, 10, 2, 15, 2, 5).max((2, 4)) * 255).max() <= .5
    assert common.page.as_bytes([one[:, :19, :29] for one in maps], 5000)[1] == grid


def test_experts_that_two_phenomena_share_are_seen(run, monkeypatch):
    """A planted router: combustion and explosion alike, collision their opposite, the others noise."""
    rng = np.random.default_rng(0)
    planted = {name: rng.normal(size=30) for name in laws.LAWS}
    planted["explosion"] = planted["combustion"] + 7
    planted["collision"] = -planted["combustion"]
    names = iter(laws.LAWS)
    monkeypatch.setattr(report, "semantic_logits", lambda model, captions: planted[next(names)][None])
    found = report.correlation(None)
    at = {name: i for i, name in enumerate(found["names"])}
    values = np.array(found["values"])
    assert sorted(found["names"]) == sorted(laws.LAWS) and (values == values.T).all() and (np.diag(values) == 1).all()
    assert values[at["combustion"], at["explosion"]] == 1 and values[at["combustion"], at["collision"]] == -1
    assert abs(at["combustion"] - at["explosion"]) == 1


def test_semantic_logits_are_those_of_the_whole_network(run):
    cfg, net, process, tokenizer, info = sample.load_run(run)
    model = sample.RunModel(cfg, net, process, tokenizer)
    words = model.read(PROMPTS)
    x = torch.randn(2, 3, cfg.frames, cfg.height, cfg.width)
    with torch.no_grad():
        _, routing = net(x, torch.full((2,), .3), *words)
    np.testing.assert_allclose(report.semantic_logits(model, PROMPTS), routing.semantic_logits.numpy(), atol=1e-5)


def test_text_cannot_end_the_data_and_nan_is_no_json(pages):
    page = common.page.page({"text": "</script><script>alert(1)</script>", "odd": [float("nan"), {"x": float("inf")}, 1.5]})
    assert "alert(1)</script>" not in page and page.count("<script") == 2
    data_of = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data_of == {"text": "</script><script>alert(1)</script>", "odd": [None, {"x": None}, 1.5]}
    assert told(pages[1])["ablation"] == LINES


def test_a_page_stays_below_five_megabytes(tmp_path, monkeypatch):
    """Clips and previews of noise, which hardly compress, of two runs."""
    cfg = config.preset("debug", frames=16, height=64, width=64, patch=8, preview_steps=1, guidance=1.)
    monkeypatch.setattr(report, "CAPTIONS", 1)
    runs = [make_run(tmp_path / str(i), cfg) for i in range(2)]
    for run in runs:
        for path in (run / "samples").iterdir():
            noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    out = tmp_path / "page.html"
    report.main([*(word for run in runs for word in ("--run", str(run))), "--out", str(out)])
    assert 10**5 < out.stat().st_size < 5_000_000


def test_what_differs_between_runs_is_told_and_like_names_are_kept_apart(pages, tmp_path):
    first, second = told(pages[1])["runs"]
    assert [first["name"], second["name"]] == ["first", "second"]
    assert first["settings"]["lr"] != second["settings"]["lr"] == .25 and "digest" not in first["settings"]
    runs = [make_run(tmp_path / name / "same") for name in ("a", "b")]
    report.main(["--run", str(runs[0]), "--run", str(runs[1]), "--out", str(tmp_path / "page.html")])
    assert [run["name"] for run in told(tmp_path / "page.html")["runs"]] == list(map(str, runs))


# ------------------------------------------------------------------------------------------- train.py, ablate.py
def test_a_run_that_is_done_has_its_page_and_one_that_was_stopped_has_none(tmp_path, capsys):
    launch(tmp_path / "run", tmp_path / "pools", report=True, stop_at=5)
    assert not (tmp_path / "run" / "report.html").exists()
    train.main(config.parse(["--out_dir", str(tmp_path / "run"), "--resume", "--stop_at", "0"], ""))
    assert f"Look at {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
    shown, = told(tmp_path / "run" / "report.html")["runs"]
    assert len(shown["films"]) == 4 and shown["curves"]["values"]["waited"] and shown["samples"]
    launch(tmp_path / "off", tmp_path / "pools")  # which switches it off
    assert not (tmp_path / "off" / "report.html").exists()


def test_a_page_that_fails_costs_a_warning(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(report, "write_text", full)
    launch(tmp_path / "run", tmp_path / "pools", report=True)
    said = capsys.readouterr()
    assert "Warning: The report failed" in said.err and "Done:" in said.out and "Next:" in said.out


def test_ablate_leaves_the_rows_that_the_page_shows(tmp_path):
    stored = {"small": {"asked": {}, "shared": {}, "ratios": {}, "runs": {}}}
    ablation.write_table(tmp_path / "t.md", stored, {"small": {}})
    assert report.ablation_data(str(tmp_path / "t.json")) == {"small": {}}


def test_the_table_that_is_shipped_can_be_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report.main(["--ablation", str(ROOT / "docs/ablation_short.json")])
    rows = told(tmp_path / "report.html")["ablation"]["small"]["equal steps"]
    assert rows["default"]["row"] == "all parts" and rows["inverted"]["differences"]["law error"][0] > 0


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("argv, words", [
    ([], "Say --run DIR"), (["--run", "nowhere"], "nowhere"), (["--ablation", "nowhere.json"], "There is no file nowhere.json"),
    (["--run", "RUN", "--out", "page.pdf"], "--out must end in .html"),
    (["--run", "RUN", "--prompt", " "], "no word"), (["--run", "RUN", "--figures", "--run", "RUN"], "one --run"),
    (["--run", "RUN", "--vlm", "vlm"], "--vlm"), (["--run", "RUN", "--n", "3"], "--n"),
    (["--run", "RUN", *["--prompt", "a ball"] * 9], "8 times"), (["--ablation", "a.json", "--prompt", "a ball"], "--prompt"),
    (["--ablation", "."], "There is no file"), (["--run", "nowhere"], "nowhere is no run folder"), (["--run", "RUN", "--out", "RUN/config.json/x.html"], "cannot be made")])
def test_bad_commands(argv, words, run):
    assert words in sentence(report.main, [word.replace("RUN", str(run)) for word in argv])


def test_an_older_or_damaged_table_is_refused(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(sealed({"small": {"runs": {}}})))
    assert "start the same ablate.py command again" in sentence(report.ablation_data, str(path))
    path.write_text(path.read_text().replace("runs", "rums"))
    assert "is damaged" in sentence(report.ablation_data, str(path))


def test_a_run_beside_official_weights_has_curves_and_a_sentence(tmp_path):
    cfg = config.preset("wan-1.3b", device="cpu")
    run = write_run(tmp_path / "run", CFG, PROMPTS)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    (run / "log.jsonl").write_text(training_line(0, 1.))
    report.main(["--run", str(run)])
    shown, = told(run / "report.html")["runs"]
    assert shown["why"].startswith("No films: ") and "films" not in shown and shown["curves"]["steps"] == [0]


def test_a_run_of_videos_needs_prompts(tmp_path):
    run = make_run(tmp_path / "run", dataclasses.replace(CFG, data_dir="films"))
    report.main(["--run", str(run)])
    assert "say --prompt" in told(run / "report.html")["runs"][0]["why"]
    report.main(["--run", str(run), "--prompt", PROMPTS[0]])
    shown, = told(run / "report.html")["runs"]
    assert len(shown["films"]) == 1 and "correlation" not in shown and not shown["physics_world"]


# --------------------------------------------------------------------------------------------------- in a browser
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
in_browser = pytest.mark.skipif(not BROWSER, reason="needs a browser: chromium or google-chrome on the PATH")
WATCH = """<script>
const odd = [];
addEventListener("error", e => odd.push("error: " + e.message));
addEventListener("unhandledrejection", e => odd.push("rejection: " + e.reason));
document.addEventListener("securitypolicyviolation", e => odd.push("asked for " + e.blockedURI));
for (const name of ["error", "warn"]) console[name] = (...said) => odd.push("console: " + said.join(" "));
</script>"""
ACT = """<script>
const one = id => document.getElementById(id);
const set = (id, value, kind = "input") => { one(id).value = value; one(id).dispatchEvent(new Event(kind)); };
const mean = id => {
  const {width, height} = one(id), values = one(id).getContext("2d").getImageData(0, 0, width, height).data;
  const sums = [0, 0, 0];
  values.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; });
  return sums.map(sum => sum / (width * height));
};
const drawn = () => document.querySelector("svg[role=img]") && [...document.images].every(image => image.complete);
const waiting = setInterval(() => {  // pictures are drawn when they are read, and charts when they have a width
  if (!drawn()) return;
  clearInterval(waiting);
  const result = {};
  try { result.seen = (() => { ACTION })(); } catch (e) { odd.push("act: " + e.stack); }
  result.odd = odd;
  result.asked = performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:"));
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify(result);
  document.body.append(pre);
}, 500);
</script>"""


def browse(page, act, width=1280):
    """What `act`, the body of a function, returns in the page, where nothing went wrong."""
    copy = page.with_name(f"{page.stem}-{width}.html")
    text = page.read_text().replace("<head>", "<head>" + WATCH, 1).replace("</body>", ACT.replace("ACTION", act) + "</body>", 1)
    copy.write_text(text)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
               "--virtual-time-budget=20000", "--dump-dom", f"file://{copy}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', shown, re.S)
    assert found, shown[-500:]
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["odd"] == [] and result["asked"] == []
    return result["seen"]


@in_browser
@pytest.mark.slow
def test_sliders_switches_and_choices_work(pages):
    films = told(pages[0])["runs"][0]["films"]
    seen = browse(pages[0], """
      if (one("film-play").textContent === "Pause") one("film-play").click();
      const frames = [];
      for (let f = 0; f <= Number(one("film-frame").max); f++) {
        set("film-frame", f);
        frames.push([mean("film-without"), mean("film-with")]);
      }
      const boxes = [...document.querySelectorAll("[data-phenomenon]")];
      const turn = (box, on) => { box.checked = on; box.dispatchEvent(new Event("change")); };
      boxes.forEach(box => turn(box, false));
      const off = mean("film-maps");
      const on = boxes.map(box => { turn(box, true); const seen = mean("film-maps"); turn(box, false); return seen; });
      boxes.forEach(box => turn(box, true));
      const times = [], peaks = [];
      for (let t = 0; t <= Number(one("film-time").max); t++) {
        set("film-time", t);
        times.push(document.querySelector("output[for=film-time]").textContent);
        peaks.push([...document.querySelectorAll("[data-peak]")].map(span => Number(span.textContent)));
      }
      const alts = [0, 1, 2].map(i => { set("samples-0", i); return document.querySelector(".samples img").alt; });
      return {frames, off, on, times, peaks, alts, prompts: one("film-prompt").options.length};""")
    for name, column in (("without", 0), ("with", 1)):
        expected = pixels_of(films[0][name])[1].mean((1, 2))
        np.testing.assert_allclose([frame[column] for frame in seen["frames"]], expected, atol=.1)
    assert seen["prompts"] == 2
    maps = films[0]["maps"]
    assert max(seen["off"]) - min(seen["off"]) < .01  # grey
    assert len(seen["on"]) == len(maps["names"]), seen["on"]
    assert seen["times"] == [f"{t:.2f}" for t in maps["times"]]
    values = [np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, len(maps["names"])) for text in maps["bytes"]]
    np.testing.assert_allclose(seen["peaks"], [one.max(0) / 255 for one in values], atol=.006)
    middle = min(range(3), key=lambda i: abs(maps["times"][i] - .5))  # at which it opens
    last = values[middle].reshape(*maps["grid"], -1)[-1].max((0, 1))  # of the frame that is shown
    assert [max(one) - min(one) > .01 for one in seen["on"]] == (last > 5).tolist() and last.max() > 5
    assert seen["alts"] == [f"Clips that first drew at step {step}" for step in (10, 20, 30)]


@in_browser
@pytest.mark.slow
def test_a_run_without_a_branch_beside_one_and_scores_that_are_missing(run, tmp_path):
    """What a fresh pair of eyes found: another run's switches that stay, null drawn as lawful, axes without figures."""
    base = make_run(tmp_path / "base", branch=False)
    stored = json.loads((base / "evaluation.json").read_text())
    stored["laws"]["rows"]["with the branch"]["two"] = None
    stored["laws"]["rows"]["frozen"]["all"] = 0
    (base / "evaluation.json").write_text(json.dumps(sealed(stored)))
    (base / "log.jsonl").write_text("".join(training_line(step, .97 - .01 * step) for step in range(0, 50, 10)))
    report.main(["--run", str(run), "--run", str(base), "--out", str(tmp_path / "page.html")])
    seen = browse(tmp_path / "page.html", """
      const shown = () => one("phenomena").offsetHeight > 0 && one("film-time").offsetHeight > 0;
      const first = shown();
      set("film-run", 1, "change");
      const titles = [...document.querySelectorAll("#laws svg title")].map(e => e.textContent);
      return {first, second: shown(), weights: one("weights").offsetHeight, null: titles.filter(t => t.includes("none")),
              two: titles.filter(t => t.startsWith("two phenomena, with the branch")).length,
              bands: [...document.querySelectorAll("#laws rect")].filter(e => Number(e.getAttribute("width")) < 0).length,
              axes: [...document.querySelectorAll("#curves svg[role=img]")].map(e => e.querySelectorAll("text[text-anchor=end]").length),
              dashes: document.querySelectorAll("#curves .keys line[stroke-dasharray]").length};""")
    assert seen["first"] and not seen["second"] and seen["weights"] == 0
    assert seen["null"] == [] and seen["two"] == 1 and seen["bands"] == 0  # the other run's
    assert min(seen["axes"]) >= 3 and seen["dashes"] > 0  # two figures or more, and the word "step"


@in_browser
@pytest.mark.slow
def test_two_runs_and_an_ablation_work(pages):
    seen = browse(pages[1], """
      const label = () => document.querySelector("#ablation-chart svg, #ablation-chart p");
      const first = document.querySelector("#ablation-chart table").textContent;
      set("ablation-what", 1, "change");
      const values = document.querySelector("#ablation-chart table").textContent;
      set("ablation-measure", "found", "change");
      const found = document.querySelector("#ablation-chart table").textContent;
      set("ablation-kind", 1, "change");
      const none = document.querySelector("#ablation-chart p").textContent;
      set("film-run", 1, "change");
      const laws = [...document.querySelectorAll("#laws figcaption")].map(e => e.textContent);
      return {first, values, found, none, laws, prompts: one("film-prompt").options.length,
              differ: document.querySelector("#settings table").textContent,
              images: document.querySelectorAll(".samples img").length};""")
    assert seen["laws"] == ["first, best.pt of step 40, 16 clips a law: law errors",
                            "second, best.pt of step 40, 16 clips a law: law errors"]
    assert "0.2 ± 0.05" in seen["first"] and "0.7 ± 0.1" in seen["values"] and "LoRA </script>" in seen["first"]
    assert "0.9" in seen["found"] and seen["none"] == "No row has this." and seen["prompts"] == 4
    assert "lr" in seen["differ"] and "0.25" in seen["differ"] and seen["images"] == 2


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1280])
@pytest.mark.parametrize("which", [0, 1])
def test_it_fits_any_width_and_everything_has_a_name(pages, which, width):
    seen = browse(pages[which], """
      const named = e => e.ariaHidden === "true" || e.alt || e.ariaLabel || e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim();
      const nameless = [...document.querySelectorAll("input, select, button, canvas, svg, main img")]
        .filter(e => !named(e)).map(e => e.outerHTML.slice(0, 80));
      const stuck = [...document.querySelectorAll("input, select, button, a")].filter(e => e.tabIndex < 0).length;
      const fits = [document.documentElement.scrollWidth, innerWidth];
      document.body.style.width = "340px";  // a browser without a window is never narrower than 500
      const narrow = document.body.scrollWidth;
      return {nameless, stuck, fits, narrow, svgs: document.querySelectorAll("svg").length};""", width)
    assert seen["nameless"] == [] and seen["stuck"] == 0 and seen["svgs"] > 8
    assert seen["fits"][0] <= seen["fits"][1] == width and seen["narrow"] <= 342


# -------------------------------------------------------------------------------------------------------- figures
@pytest.mark.slow
def test_figures_are_drawn_and_say_what_they_measured(run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -r requirements-extra.txt")
    report.main(["--figures", "--run", str(run), "--out", str(tmp_path / "figures"), "--n", "1"])
    said = capsys.readouterr().out
    assert [line[:9] for line in said.splitlines()[:3]] == ["Figure 6:", "Figure 7:", "Figure 8:"]
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "correlation.png", "inversion_clips.png", "inversion_laws.png", "router_maps.png"]
    for path in (tmp_path / "figures").iterdir():
        assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 20 and path.stat().st_size < 300_000


def test_figures_need_a_branch_with_both_routers(tmp_path):
    run = make_run(tmp_path / "base", branch=False)
    assert "no branch with both routers" in sentence(report.main, ["--figures", "--run", str(run)])
