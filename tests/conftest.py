"""For every test: the modules are importable, torch keeps to one thread, and what is dear is made once.

Fixtures of the session are not to be written into: who spoils a folder copies it first.
"""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
pytest.register_assert_rewrite("helpers", "runs", "scenes", "tiny_vlm", "tiny_weights", "videos")
torch.set_num_threads(1)  # so that results do not wander


def pytest_ignore_collect(collection_path, config):
    """`-m quick` opens only files that have such tests: imports of the others take as long as the tests."""
    if config.getoption("markexpr").startswith("quick") and collection_path.name.startswith("test_"):
        return "mark.quick" not in collection_path.read_text() or None


# ------------------------------------------------------------------------------------------ runs of ten steps
@pytest.fixture(scope="session")
def pools(tmp_path_factory):
    """Where clips of the world are kept, for whoever trains on them."""
    return tmp_path_factory.mktemp("pools")


@pytest.fixture(scope="module")
def physics(pools):
    """A state at the beginning of stage two, and a batch of four clips with captions and categories."""
    import data
    import runs
    import state
    cfg = runs.settings("", pools, caption_dropout=0.0)
    pool = data.open_pool(cfg, progress=False)
    tokenizer = data.Tokenizer.from_captions(pool.captions)
    fresh = state.State(cfg, len(tokenizer))
    fresh.attach_branch()
    return fresh, data.Clips(cfg, pool, tokenizer).batch(range(4))


@pytest.fixture(scope="module")
def no_previews():
    """For a whole file: runs make no previews."""
    import runs
    with pytest.MonkeyPatch.context() as patch:
        runs.without_previews(patch)
        yield


@pytest.fixture
def go(tmp_path, pools):
    """Start a run of ten steps, some fields replaced; returns its folder."""
    import runs

    def start(name="run", **overrides):
        return runs.launch(tmp_path / name, pools, **overrides)
    return start


@pytest.fixture(scope="session")
def whole(tmp_path_factory, pools):
    """Ten steps in one go, and what they were fed."""
    import runs
    with pytest.MonkeyPatch.context() as patch:
        runs.without_previews(patch)
        fed = runs.recorded(patch)
        return runs.launch(tmp_path_factory.mktemp("whole") / "run", pools), fed


@pytest.fixture(scope="session")
def six(tmp_path_factory, pools):
    """Four steps and two: what the switches are held against."""
    import runs
    with pytest.MonkeyPatch.context() as patch:
        runs.without_previews(patch)
        return runs.launch(tmp_path_factory.mktemp("six") / "run", pools, **runs.SIX)


# ------------------------------------------------------------------------------------------- official weights
@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """{lineage, or "1.5": a whole folder of tiny weights}."""
    import tiny_weights
    made = tmp_path_factory.mktemp("weights")
    return {name: tiny_weights.make_weights(made / name, name) for name in tiny_weights.FOLDERS}


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """Five videos for encode.py, one that is none, and their annotations."""
    import helpers
    import tiny_weights
    folder = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("a", "b", "c", "long", "e")):
        helpers.drifting(folder / f"{name}.mp4", seed, frames=28 if name == "long" else 12)
    (folder / "broken.mp4").write_bytes(b"this is no video")
    (folder / "captions.json").write_text(json.dumps(tiny_weights.RECORDS))
    return folder


@pytest.fixture(scope="session")
def caches(weights, videos, tmp_path_factory):
    """{lineage: the cache that encode.py made of them}."""
    import tiny_weights
    folder = tmp_path_factory.mktemp("caches")
    return {name: tiny_weights.fill_cache(videos, weights[name], folder / name)
            for name in tiny_weights.LINEAGES}


@pytest.fixture
def cache_copy(caches, tmp_path):
    """Wan's, to be written into."""
    return Path(shutil.copytree(caches["wan"], tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------- VLMs
@pytest.fixture(scope="session")
def vlm_folders(tmp_path_factory):
    """{family: a folder with a VLM of five layers}."""
    import tiny_vlm
    return {family: tiny_vlm.make_vlm(tmp_path_factory.mktemp(family), family)
            for family in tiny_vlm.FAMILIES}


@pytest.fixture(scope="session")
def eager(vlm_folders):
    """The reference: the same weights, every matrix of attention."""
    import transformers
    kind = transformers.AutoModelForImageTextToText
    return {family: kind.from_pretrained(folder, attn_implementation="eager").eval()
            for family, folder in vlm_folders.items()}


@pytest.fixture(scope="session")
def small_vlm(tmp_path_factory):
    """A VLM of three layers, for maps of whole folders."""
    import tiny_vlm
    return tiny_vlm.make_vlm(tmp_path_factory.mktemp("vlm"), "qwen2_5_vl", layers=3)


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Four videos for teacher.py, one that is none, and their annotations."""
    import helpers
    import tiny_vlm
    folder = tmp_path_factory.mktemp("films")
    for seed, name in enumerate(("a", "b", "long", "quiet")):
        helpers.drifting(folder / f"{name}.mp4", seed, frames=28 if name == "long" else 12, **tiny_vlm.FILM)
    (folder / "text.mp4").write_text("this is no video")
    (folder / "captions.json").write_text(json.dumps(tiny_vlm.FILM_RECORDS))
    return folder


@pytest.fixture(scope="session")
def maps(small_vlm, films, tmp_path_factory):
    """The folder of maps that teacher.py made of them."""
    import tiny_vlm
    return tiny_vlm.make_maps(films, small_vlm, tmp_path_factory.mktemp("out") / "maps")


@pytest.fixture
def maps_copy(maps, tmp_path):
    """The same, to be written into."""
    return Path(shutil.copytree(maps, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The tiny teacher, untrained. Not to be trained, either."""
    from vlm import qwen, tiny
    folder = tmp_path_factory.mktemp("tiny") / "vlm"
    tiny.write_tiny(folder, seed=0)
    return qwen.VLM.from_folder(folder)
