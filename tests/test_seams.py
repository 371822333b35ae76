"""What this project needs of other libraries:
one sentence, with library and version, for each thing that changes.

A new release that breaks something makes one of these fail beside whatever else fails, and its message
says where to look. seams.py keeps what is not public; what stands here for the rest is public, and has
changed before all the same.
"""
import inspect
from importlib.metadata import version

import pytest
import torch

from vlm import attention as vlm_attention
from vlm import qwen as vlm_qwen
from vlm import tiny as vlm_tiny
import seams
from config import UserError

transformers = pytest.importorskip("transformers",
                                   reason="the teacher needs transformers: pip install -r requirements.txt")


def holds(library: str, what: str, check) -> None:
    """Fails with a sentence unless `check()` is true; whatever it raises means that it is not."""
    try:
        found, why = check(), ""
    except Exception as e:
        found, why = False, f" ({type(e).__name__}: {e})"
    assert found, f"{library} {version(library)} has changed: {what}{why}"


def needs_diffusers() -> None:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install -r requirements-extra.txt")


# ----------------------------------------------------------------------------------------------- transformers
FAMILIES = ("Qwen2_5_VL", "Qwen3VL", "Qwen2VL", "Qwen3VLMoe")


def model_of(family: str):
    return getattr(transformers, f"{family}Model")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_arguments_of_a_vlm_keep_their_order(family):
    """`VLM.run` passes ids, mask, positions and cache by place, since the last was renamed in 5.24."""
    def check():
        names = list(inspect.signature(model_of(family).forward).parameters)[1:5]
        return names[:3] == ["input_ids", "attention_mask",
                             "position_ids"] and names[3] in ("cache", "past_key_values")
    holds("transformers", f"the order of arguments of {family}Model.forward", check)


@pytest.mark.parametrize("family", FAMILIES)
def test_get_rope_index_keeps_its_arguments(family):
    """`VLM.positions` names them;
    one that is not known would be swallowed by **kwargs and change all maps."""
    def check():
        names = list(inspect.signature(model_of(family).get_rope_index).parameters)
        needed = {"mm_token_type_ids",
                  "video_grid_thw"} | ({"second_per_grid_ts"} if family == "Qwen2_5_VL" else set())
        return names[1] == "input_ids" and needed <= set(names)
    holds("transformers", f"the arguments of {family}Model.get_rope_index", check)


def test_attention_functions_and_masks_are_registered_by_name():
    def check():
        vlm_attention.register_attention()
        functions, masks = transformers.AttentionInterface(), transformers.AttentionMaskInterface()
        ours = functions[vlm_attention.ATTENTION] is vlm_attention.watched_attention
        return ours and masks[vlm_attention.ATTENTION] is masks["sdpa"]
    holds("transformers", "AttentionInterface or AttentionMaskInterface", check)


def test_a_cache_is_cut_to_rows():
    def check():
        cache = transformers.DynamicCache()
        keys = torch.randn(3, 2, 5, 4)
        cache.update(keys, keys + 1, 0)
        cache.batch_select_indices(torch.tensor([2, 0, 2, 1]))
        grown, _ = cache.update(keys[[0, 0, 0, 0]], keys[[0, 0, 0, 0]], 0)
        return cache.get_seq_length() == 10 and torch.equal(grown[:, :, :5], keys[[2, 0, 2, 1]])
    holds("transformers", "DynamicCache.update, .batch_select_indices or .get_seq_length", check)


def test_the_resize_rule_is_where_it_was():
    holds("transformers", "smart_resize (tests/seams.py)",
          lambda: seams.resize_rule(480, 720, 28, 3136, 350_000) == (476, 728))


# -------------------------------------------------------------------------------------------------- diffusers
SEAMS = {
    "cog_rotary": lambda: seams.cog_rotary(16, (3, 5), 2, (3, 5))[0].shape == (30, 16),
    "cog_rotary_slice": lambda: seams.cog_rotary_slice(16, (3, 5), 2, (6, 6))[1].shape == (30, 16),
    "cog_block": lambda: {"hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"}
    <= set(inspect.signature(seams.cog_block().forward).parameters),
    "timestep_embedding": lambda: seams.timestep_embedding(torch.arange(3), 8).shape == (3, 8),
    "dynamic_guidance": lambda: {"guidance_scale", "num_inference_steps"}
    <= set(seams.dynamic_guidance().replace("(", " ").split()),
}


@pytest.mark.parametrize("name", SEAMS)
def test_seams_of_diffusers(name):
    needs_diffusers()
    holds("diffusers", f"what {name} in tests/seams.py reads", SEAMS[name])


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "WanPipeline"])
def test_prompts_are_encoded_by_a_public_method(name):
    needs_diffusers()
    import diffusers

    def check():
        names = inspect.signature(getattr(diffusers, name).encode_prompt).parameters
        return {"prompt", "do_classifier_free_guidance", "max_sequence_length", "device"} <= set(names)
    holds("diffusers", f"the arguments of {name}.encode_prompt", check)


# ------------------------------------------------------------------------------------------------------ torch
def test_a_storage_is_one_object_for_all_its_views():
    """`official.cost.block_cost` counts bytes a storage, on the meta device, where all addresses are zero."""
    def check():
        tensor = torch.zeros(3, 4, device="meta")
        views = {x.untyped_storage() for x in (tensor, tensor.t(), tensor[1:], tensor.detach())}
        return len(views) == 1 and torch.zeros(3, 4, device="meta").untyped_storage() not in views
    holds("torch", "views of a tensor share one storage object", check)


# -------------------------------------------------------------------- a library that changed is named at work
@pytest.fixture
def vlm(tmp_path):
    folder = tmp_path / "vlm"
    vlm_tiny.write_tiny(folder, 0)
    return vlm_qwen.VLM.from_folder(folder)


def look(vlm):
    video = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8).numpy()
    return vlm.ask([video], 6.0, [["is there melting"]], vlm_qwen.Settings(answer="yes"))


def renamed(real):
    """get_rope_index with another name for the kinds of tokens."""
    def get_rope_index(input_ids, token_kinds, video_grid_thw=None, second_per_grid_ts=None):
        return real(input_ids, token_kinds, video_grid_thw=video_grid_thw,
                    second_per_grid_ts=second_per_grid_ts)
    return get_rope_index


CHANGES = {
    "a renamed argument": lambda vlm, patch: patch.setattr(
        vlm.core, "get_rope_index", renamed(vlm.core.get_rope_index)),
    "another order of arguments": lambda vlm, patch: patch.setattr(
        vlm.core, "forward", lambda ids, mask, places, embeds=None, real=vlm.core.forward, **more:
        real(ids, mask, places, **more)),
    "arguments that do not reach the function": lambda vlm, patch: patch.setattr(
        vlm.core, "forward", lambda *args, watcher=None, real=vlm.core.forward, **more: real(*args, **more)),
    "another function is called": lambda vlm, patch:
        vlm.model.set_attn_implementation({"text_config": "sdpa"}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_library_is_one_sentence(vlm, change, monkeypatch):
    """None of these would raise by itself, but for the first: the maps would be wrong, or not there."""
    assert look(vlm)
    CHANGES[change](vlm, monkeypatch)
    with pytest.raises(UserError) as caught:
        look(vlm)
    said = str(caught.value)
    assert not isinstance(caught.value, vlm_qwen.VLMError)  # for which every clip would be skipped, one by one
    assert said.startswith(f"transformers {version('transformers')} ")
    assert "README names those that were tested" in said
