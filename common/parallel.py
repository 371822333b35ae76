"""One model on many processes: what they agree on, and how the model is divided among them.

    torchrun --standalone --nproc_per_node 8 -- train.py --config full ...

torchrun starts the processes and tells each its rank and their number. `together` makes them a
group. `distribute` divides the model by PyTorch's FSDP2: each process keeps a slice of every weight,
and with it of gradient, average and moments, and has a block's weights whole only while it uses
them. Without torchrun there is one process: nothing is divided, and the functions give back what
they were given, so that train.py has one path.

All but `slice_like` and `restarted` must be called by every process, in the same order, or the
others wait for ever: never under a condition that may differ between them.
"""
import contextlib
import functools
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (
    CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts)

import align
import config
from config import Config, Stopped, UserError


# --- the group ------------------------------------------------------------------------------------
@contextlib.contextmanager
def together() -> Iterator[dict]:
    """The processes of torchrun are a group while the block lasts, and only the first one prints.

    Raises Stopped where another one has ended, or keeps the others waiting for too long. The block
    is given a dict, in which it notes the "step" that such a sentence names.
    """
    rank, world = config.rank()
    now = {"step": 0}
    if world == 1:
        yield now
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=fresh_store(), rank=rank, world_size=world)
    try:
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere if rank else sys.stdout):
                yield now
    except RuntimeError as e:
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        reason = "another one is too slow" if "imed out" in str(e) else "another one has ended"
        raise Stopped(f"Process {rank} of {world} cannot go on at step {now['step']}, because {reason}: "
                      "see what the others say, and go on with --resume.") from None
    finally:
        dist.destroy_process_group()


def fresh_store() -> dist.Store | None:
    """Where the processes find each other. None is torch's own choice.

    torchrun keeps one store for all of its restarts. A process that is started again would read
    there the address of one that is dead (pytorch issue 135712), so each attempt has keys of its
    own. On several hosts the counts of attempts may differ: docs/scale.md says what to do there.
    """
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if not one_host or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def check_share(cfg: Config) -> None:
    """Raises UserError where the clips of a step do not divide among the processes of torchrun, or
    a process's share into --micro_batch."""
    world = config.rank()[1]
    share = cfg.batch_size / world
    if share % 1 or (cfg.micro_batch and share % cfg.micro_batch):
        parts = f" and parts of --micro_batch {cfg.micro_batch}" if cfg.micro_batch else ""
        raise UserError(f"--batch_size {cfg.batch_size} does not divide into {world} processes"
                        f"{parts}: every step takes as many clips, in parts of equal size.")


def restarted() -> bool:
    """Has torchrun started this process again, after one of them was killed?"""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


# --- what all processes know ----------------------------------------------------------------------
def first(function: Callable, *args):
    """function(*args), called by the first process alone, such as a write to disk. What it returns,
    or the UserError or Stopped that it raises, every process gets."""
    rank, world = config.rank()
    if world == 1:
        return function(*args)
    outcome = [None, None]
    if rank == 0:
        try:
            outcome[0] = function(*args)
        except (UserError, Stopped) as e:
            e.said = True  # by the first process: the others end without a word
            outcome[1] = e
    dist.broadcast_object_list(outcome)
    if outcome[1]:
        outcome[1].said &= rank > 0
        raise outcome[1]
    return outcome[0]


def any_of(flag: bool) -> bool:
    """Is it so in any process?"""
    if not dist.is_initialized():
        return flag
    answer = torch.tensor(int(flag))
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, those of the first one first, without a gradient."""
    if not dist.is_initialized():
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def total(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each of these float tensors summed over all processes, by one message."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors.values()]
    return {name: part.view_as(tensor)
            for (name, tensor), part in zip(tensors.items(), flat.split(sizes))}


# --- a batch in parts -----------------------------------------------------------------------------
@dataclass
class Whole:
    """What the losses of some clips must know of the batch that they are a part of. It may be spread
    over processes, each of which may take its share in several parts."""
    clips: int  # in the batch
    first: int  # where the part stands in it
    mask: Tensor  # total of the masks of L_fine_align
    labelled: Tensor  # (clips,) bool: which enter L_coarse
    categories: Tensor  # (clips, E_cat)
    routed: tuple | None  # rho_s (clips, E_s) and its lift (clips, E_cat); None: the part is all

    def rows(self, own: Tensor, which: int) -> Tensor:
        """What was `routed` for the whole batch, with the part's own rows in their place. These
        alone carry a gradient, and the gradients of all parts add up to that of the batch."""
        if self.routed is None:
            return own
        known = self.routed[which]
        return torch.cat([known[:self.first], own.float(), known[self.first + len(own):]])


def look_over(model: nn.Module, batch, size: int, alone: bool) -> Whole:
    """The batch that these clips, in parts of `size`, make up with those of all other processes, or
    `alone`. Routers read words only, so that this costs next to nothing."""
    rank, world = (0, 1) if alone else config.rank()
    collect = Tensor.detach if alone else gather
    n = len(batch.index)
    routed = None
    if (size < n or world > 1) and getattr(model, "semantic", None) is not None:
        with torch.no_grad():
            routed = model.route(batch.text, batch.text_length)
        routed = tuple(collect(rows.float()) for rows in routed)
    categories = collect(batch.categories)
    labelled = align.labelled(collect(batch.text_length), categories)
    mask = collect(batch.target_mask.sum((1, 2))).sum()
    return Whole(world * n, rank * n, mask, labelled, categories, routed)


def parts(batch, size: int, whole: Whole) -> Iterator:
    """-> (a slice of so many of the batch's clips, (they, and the Whole as they need it))."""
    for start in range(0, len(batch.index), size):
        part = slice(start, start + size)
        some = {name: value[part] for name, value in vars(batch).items() if value is not None}
        yield part, (replace(batch, **some), replace(whole, first=whole.first + start))


OF_PAIRS = ("coarse", "semantic_balance")  # every part of a batch has these of all of its clips


def add_up(sums: dict[str, Tensor], losses: dict[str, Tensor], world: int) -> None:
    """Add the terms of a part to the sums of this process, of which there are `world`."""
    for name, loss in losses.items():
        if name in OF_PAIRS:
            sums[name] = loss.detach() / world
        else:
            sums[name] = sums.get(name, 0) + loss.detach()


# --- the divided model ----------------------------------------------------------------------------
def distribute(model: nn.Module, cfg: Config, divide: bool) -> None:
    """Make a model ready for a stage, in a fixed order: checkpointing, compile, and, with `divide`
    and more than one process, its division.

    All of it wraps `forward` alone, so that the names in a saved file stay. Each stage starts from
    the class's own `forward`, because the branch's blocks are copies of some that were wrapped.
    """
    backbone = getattr(model, "backbone", model)  # stage one has a bare one
    blocks = [*backbone.blocks, *getattr(model, "physical", ())]
    if cfg.checkpointing:  # keep a block's input, and compute the rest again in the backward pass
        how = {"context_fn": attention_kept} if cfg.keep_attention else {}
        for block in blocks:
            forward = types.MethodType(type(block).forward, block)
            block.forward = functools.partial(checkpoint, forward, use_reentrant=False, **how)
    if cfg.compile == "on":
        words = backbone.text_encoder.blocks if backbone.text_encoder else []
        for block in [*words, *blocks]:
            block.compile(dynamic=False)

    world = config.rank()[1]
    if world == 1 or not divide:
        return
    # Weights travel in the dtype that they are used in, and gradients are added up in float32. The
    # inputs stay as they are: times and angles would lose digits that they need.
    half = torch.bfloat16 if cfg.precision == "bf16" else None
    policy = MixedPrecisionPolicy(half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(cfg.device).type, (world,))
    # It warns of every block whose output is a view. Nothing here changes one in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in [*blocks, model]:  # what stands outside of the blocks is gathered once a step
        fully_shard(module, mesh=mesh, mp_policy=policy)
    if hasattr(model, "route"):  # only `forward` gathers weights by itself
        register_fsdp_forward_method(model, "route")


def attention_kept() -> tuple:
    """For checkpointing: what fused attention returns is kept, as it is half of a block's work and little
    of its memory, and so is the choice of experts, which must not be another one the second time."""
    def policy(context, operation, *args, **kwargs) -> CheckpointPolicy:
        kept = any(name in str(operation) for name in ("scaled_dot_product", "topk"))
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
    return create_selective_checkpoint_contexts(policy)


def settle(model: nn.Module) -> None:
    """Give up the weights that a forward pass without a backward pass has left whole. Whatever
    changes the slices must call it: the next pass would use the whole ones as they were."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(nest, everywhere: bool = False):
    """The same dicts, lists and numbers with every divided tensor in one piece: for the first
    process alone, in the CPU's memory, or `everywhere`, where it is."""
    if isinstance(nest, dict):
        return {name: whole(value, everywhere) for name, value in nest.items()}
    if isinstance(nest, list):
        return [whole(value, everywhere) for value in nest]
    if not isinstance(nest, DTensor):
        return nest
    tensor = nest.full_tensor()
    if everywhere:
        return tensor
    return None if config.rank()[0] else tensor.cpu()


def slice_like(tensor: Tensor, p: Tensor) -> Tensor:
    """What this process keeps of a whole tensor, if p (of the same shape) is divided."""
    if not isinstance(p, DTensor) or isinstance(tensor, DTensor) or tensor.shape != p.shape:
        return tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
