"""Every place where tests or benchmarks go behind the public interface of another library, in one file.

Each is here for a reason that stands beside it, and each may change with any release: requirements*.txt
bound the library from above, and tests/test_seams.py says in one sentence which library broke which seam.
"""


def cog_rotary(dim: int, size: tuple[int, int], frames: int, base: tuple[int, int]):
    """cos and sin (N, dim) of CogVideoX 1.0 on a grid of `frames` x size,
    fitted to the grid it was trained on.

    The pipeline makes them in a private method out of these two functions;
    the transformer takes them as an argument.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
    crop = get_resize_crop_region_for_grid(size, base[1], base[0])
    return get_3d_rotary_pos_embed(dim, crop, size, frames)


def cog_rotary_slice(dim: int, size: tuple[int, int], frames: int, most: tuple[int, int]):
    """The same of CogVideoX 1.5, whose grid is cut out of a larger one."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    return get_3d_rotary_pos_embed(dim, None, size, frames, grid_type="slice", max_size=most)


def cog_block():
    """The class of one CogVideoX block:
    only whole transformers are public, and a block says where they differ."""
    from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
    return CogVideoXBlock


def timestep_embedding(t, dim: int):
    """The sinusoid (N, dim) of diffusion time before any layer:
    to the bit, which no whole model would show."""
    from diffusers.models.embeddings import get_timestep_embedding
    return get_timestep_embedding(t, dim, flip_sin_to_cos=True, downscale_freq_shift=0)


def resize_rule(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """The size that Qwen's processors give a frame:
    for hundreds of sizes, without making a picture of each."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    return smart_resize(height, width, factor, least, most)


def positions_of(model, inputs: dict) -> list:
    """The position ids (3, B, S) that a Qwen-VL makes for its language model, as it runs:
    they are not returned."""
    seen = []
    handle = model.base_model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    outputs = model.base_model(**inputs, use_cache=False, output_attentions=True)
    handle.remove()
    return seen[0][-3:], outputs


def dynamic_guidance() -> str:
    """The expression that CogVideoXPipeline has for its guidance in a step, from its source:
    it stands inside the loop."""
    import ast
    import inspect
    import textwrap
    from diffusers import CogVideoXPipeline
    tree = ast.parse(textwrap.dedent(inspect.getsource(CogVideoXPipeline.__call__)))
    branch = next(node for node in ast.walk(tree)
                  if isinstance(node, ast.If) and ast.unparse(node.test) == "use_dynamic_cfg")
    return ast.unparse(branch.body[0].value)
