"""experts.py: the untrained branch changes nothing, dispatch is its naive loop,
equations 1 and 2 by hand, who touches which rows."""
import functools
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import config
import experts
import model
from helpers import awake, close

pytestmark = pytest.mark.quick
VOCABULARY, L, N, D = 11, 24, 3 * 2 * 5, 32
SMALL = dict(frames=3, patch_t=1, height=8, width=20, patch=4, depth=3, physical_blocks="0,2")


def build(**fields) -> experts.ProPhy:
    """A branch fresh from `init_from_backbone` beside a backbone
    that is no longer at its zero-initialisation."""
    torch.manual_seed(0)
    cfg = config.preset("debug", **{**SMALL, **fields})
    net = experts.ProPhy(model.build_backbone(cfg, VOCABULARY), cfg)
    awake(net.backbone)
    net.init_from_backbone()
    return net


def inputs(B: int = 2, seed: int = 1):
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(1, VOCABULARY, (B, L), generator=g)
    text[0, 4:] = 0
    return torch.randn(B, 3, 3, 8, 20, generator=g), torch.linspace(100, 900, B), text, (text > 0).sum(1)


# --- untrained, the branch changes nothing
PARTS = [dict(injection=i, semantic=s, refinement=r, renormalise=n, top_k=k)
         for i, s, r, n, k in itertools.product(("place", "zero"), (True, False), (True, False),
                                                (True, False), (1, 2, 4)) if r or (n, k) == (False, 2)]
LINEAGES = [dict(lineage="wan", **more)
            for more in ({}, dict(map_rank=2), dict(refinement=False), dict(semantic=False),
                         dict(physical_blocks="1"))]
PLACES = [dict(physical_blocks=p) for p in ("", "0", "1", "2", "1,2", "0,1,2")]


@pytest.mark.parametrize("fields", PARTS + PLACES + LINEAGES + [dict(map_rank=2)], ids=str)
def test_the_untrained_branch_changes_nothing_to_the_bit(fields):
    net = build(**fields)
    alone = net.backbone(*inputs())
    assert alone.std() > 0.1
    for edit in (None, experts.invert, lambda logits: logits + torch.tensor([0.0, 9.0, 0.0, 0.0])):
        assert torch.equal(net(*inputs(), edit=edit)[0], alone)


def test_plain_injection_does_change_it():
    net = build(injection="plain")
    assert net.inject[0](torch.ones(3)).tolist() == [1, 1, 1]
    assert (net(*inputs())[0] - net.backbone(*inputs())).abs().max() > 0.1


def test_the_zero_injection_can_learn_and_then_changes_it():
    net = build(injection="zero")
    prediction, _ = net(*inputs())
    (prediction - 1).square().mean().backward()
    assert all(linear.weight.grad.abs().max() > 0 and linear.bias.grad.abs().max() > 0
               for linear in net.inject)
    awake(net.inject)
    assert (net(*inputs())[0] - net.backbone(*inputs())).abs().max() > 0.1


@pytest.mark.parametrize("injection", ["place", "zero", "plain"])
def test_a_gradient_reaches_every_parameter_but_those_of_replaced_blocks(injection):
    net = awake(build(injection=injection))
    prediction, routing = net(*inputs())
    outputs = prediction - 1, routing.semantic_lift, routing.refinement_lift
    sum(output.square().mean() for output in outputs).backward()
    idle = {name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    replaced = {f"backbone.blocks.{i}.{name}" for i in (0, 2)
                for name, _ in net.backbone.blocks[i].named_parameters()}
    assert idle == (replaced if injection == "place" else set())


# --- dispatch
def naive(x, gate, chosen, weight, bias):
    """Token by token, choice by choice."""
    rows = []
    for m in range(len(x)):
        rows.append(sum(gate[m, j] * (x[m] @ weight[e] + bias[e]) for j, e in enumerate(chosen[m].tolist())))
    return torch.stack(rows)


def choices(case: str, M: int, E: int):
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(M, E, generator=g)
    if case == "an empty expert":
        scores[:, 1] = -1
    if case == "one takes all":
        return torch.full((M, 1), 2)
    return scores.topk({"k = 1": 1, "k = E_r": E}.get(case, 2)).indices


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)],
                         ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", ["k = 1", "k = 2", "k = E_r", "an empty expert", "one takes all"])
def test_dispatch_is_the_naive_loop_forward_and_backward(case, dtype, tolerance):
    M, E, dim = 23, 4, 6
    g = torch.Generator().manual_seed(1)
    chosen = choices(case, M, E)
    leaves = [torch.randn(shape, generator=g).to(dtype).requires_grad_()
              for shape in ((M, dim), chosen.shape, (E, dim, dim), (E, dim))]
    x, gate, weight, bias = leaves
    ours, reference = experts.dispatch(x, gate, chosen, weight, bias), naive(x, gate, chosen, weight, bias)
    assert ours.dtype == dtype
    close(ours, reference, tolerance)
    pull = torch.randn(M, dim, generator=g).to(dtype)
    gradients = torch.autograd.grad((ours * pull).sum(), leaves)
    for ours_grad, reference_grad in zip(gradients, torch.autograd.grad((reference * pull).sum(), leaves)):
        close(ours_grad, reference_grad, tolerance)
    idle = [e for e in range(E) if not (chosen == e).any()]
    assert idle == {"an empty expert": [1], "one takes all": [0, 1, 3]}.get(case, [])
    assert all((gradients[2][e] == 0).all() and (gradients[3][e] == 0).all() for e in idle)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ["k = 1", "k = 2", "k = E_r", "an empty expert", "one takes all"])
def test_the_kernel_of_a_gpu_is_the_loop(case, dtype, tolerance, monkeypatch):
    """What a GPU takes in place of the loop runs here as well, and gives the same, gradients included."""
    M, E, dim = 23, 4, 16
    g = torch.Generator().manual_seed(1)
    chosen = choices(case, M, E)
    leaves = [torch.randn(shape, generator=g).to(dtype).requires_grad_()
              for shape in ((M, dim), chosen.shape, (E, dim, dim), (E, dim))]
    pull = torch.randn(M, dim, generator=g).to(dtype)
    found = []
    plain = experts.grouped_product
    for gpu in (False, True):
        monkeypatch.setattr(experts, "grouped_product", lambda *args: plain(*args[:-1], gpu))
        y = experts.dispatch(leaves[0], leaves[1], chosen, *leaves[2:])
        found.append([y, *torch.autograd.grad((y * pull).sum(), leaves)])
    for loop, kernel in zip(*found):
        assert loop.dtype == kernel.dtype == dtype
        close(kernel.float() / loop.abs().max().float(), loop.float() / loop.abs().max().float(), tolerance)


# --- Eq. 2
@pytest.mark.parametrize("renormalise, k", list(itertools.product((True, False), (1, 2, 4))))
def test_eq_2(renormalise, k):
    block = awake(experts.RefinementExpertBlock(config.preset(
        dim=D, refinement_experts=4, top_k=k, renormalise=renormalise)))
    x = torch.randn(2, 7, D)
    y, rho, _, chosen = block(x)
    assert chosen.shape == (2, 7, k) and rho.shape == (2, 7, 4)
    for b in range(2):
        for n in range(7):
            z = (x[b, n] - x[b, n].mean()) / (x[b, n].var(correction=0) + 1e-5).sqrt()
            scores = torch.exp(block.router.weight @ z + block.router.bias)
            p = scores / scores.sum()
            close(rho[b, n], p)
            best = sorted(range(4), key=lambda e: -p[e].item())[:k]
            assert chosen[b, n].tolist() == best
            total = sum(p[e] for e in best) if renormalise else 1
            expected = sum(p[e] / total * (z @ block.weight[e] + block.bias[e]) for e in best)
            close(y[b, n], expected + x[b, n])


def test_large_tokens_are_routed_as_small_ones_are():
    """A softmax of the tokens as they are would be one-hot in a last block, and then learns nothing."""
    block, x = awake(experts.RefinementExpertBlock(config.preset(dim=D))), torch.randn(2, 7, D)
    y, rho, lift, chosen = block(x)
    larger = block(100 * x)
    close(larger[1], rho, 1e-3)
    close(larger[2], lift, 1e-2)
    assert torch.equal(larger[3], chosen) and rho.max() < 0.9
    close(larger[0] - 100 * x, y - x, 1e-2)


# --- Eq. 1
def maps_on(grid, **fields) -> config.Config:
    """A config whose clips have these video tokens."""
    frames, height, width = grid
    return config.preset(patch_t=1, patch=1, frames=frames, height=height, width=width, **fields)


def test_eq_1_by_hand():
    """Two experts, two tokens of width one: X + .25 (1, 2) + .75 (10, 20)."""
    block = experts.SemanticExpertBlock(maps_on((1, 1, 2), dim=1, semantic_experts=2), text_dim=4)
    with torch.no_grad():
        block.basis.maps.copy_(torch.tensor([1.0, 2.0, 10.0, 20.0]).view(2, 1, 1, 1, 2))
    x = torch.tensor([[[100.0], [200.0]], [[0.0], [0.0]]])
    out = block(x, torch.tensor([[0.25, 0.75], [1.0, 0.0]]), (1, 1, 2))
    assert out.tolist() == [[[107.75], [215.5]], [[1.0], [2.0]]]


def semantic(count: int = 1, grid=(3, 2, 5)) -> experts.SemanticExpertBlock:
    torch.manual_seed(0)
    return awake(experts.SemanticExpertBlock(maps_on(grid, dim=D, semantic_experts=count), D))


def test_a_map_lies_on_the_tokens_in_their_order():
    block = semantic()
    out = block(torch.zeros(1, N, D), torch.ones(1, 1), (3, 2, 5))
    cells = itertools.product(range(3), range(2), range(5))
    for n, (t, i, j) in enumerate(cells):
        assert torch.equal(out[0, n], block.basis.maps[0, :, t, i, j])


def test_maps_on_another_grid():
    block = semantic(grid=(3, 2, 4))
    x = torch.zeros(1, 6 * 4 * 8, D)
    with torch.no_grad():
        # constant over the grid
        block.basis.maps.copy_(torch.arange(D).view(1, D, 1, 1, 1).expand_as(block.basis.maps))
        close(block(x, torch.ones(1, 1), (6, 4, 8)), torch.arange(D).float().expand_as(x))
        # rises along the width, 1 a token; halved tokens rise by 1/2
        block.basis.maps.copy_(torch.arange(4.0).expand_as(block.basis.maps))
        row = block(x, torch.ones(1, 1), (6, 4, 8)).view(6, 4, 8, D)
        close(row, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])[:, None].expand_as(row))


def test_on_its_own_grid_a_map_is_itself():
    block, x = semantic(), torch.randn(1, N, D)
    expected = block(x, torch.ones(1, 1), (3, 2, 5))
    assert torch.equal(expected, x + block.basis.maps[0].flatten(1).T)
    assert torch.equal(block(x, torch.ones(1, 1), [3, 2, 5]), expected)  # a list is a grid too


def test_factored_maps_are_sums_of_outer_products():
    """B_e[t, i, j, c] = sum_r time[e r, t] space[e r, i, j] width[e, r, c], mixed by rho."""
    torch.manual_seed(0)
    maps = awake(experts.FactoredMaps(maps_on((3, 2, 5), dim=D, semantic_experts=2, map_rank=3)))
    rho = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    time, space = maps.time.view(2, 3, 3), maps.space.view(2, 3, 2, 5)
    by_hand = torch.einsum("be,ert,erij,erc->btijc", rho, time, space, maps.width).flatten(1, 3)
    close(maps(rho, (3, 2, 5)), by_hand)
    assert maps(rho, (6, 4, 10)).shape == (2, 240, D)
    with torch.no_grad():  # a map that is constant over the grid is so on any other
        maps.time.fill_(2), maps.space.fill_(3)
    close(maps(rho, (6, 4, 10)), (6 * rho @ maps.width.sum(1))[:, None].expand(2, 240, D))


# --- LoRA
@pytest.mark.parametrize("lineage", ["cogvideox", "wan"])
def test_untrained_lora_changes_nothing_and_trained_merges_into_the_weights(lineage):
    torch.manual_seed(0)
    cfg = config.preset("debug",
                        **SMALL | dict(physical_blocks="", lineage=lineage, lora_rank=3, lora_alpha=6.0))
    backbone = awake(model.build_backbone(cfg, VOCABULARY))
    alone = backbone(*inputs())
    net = experts.ProPhy(backbone, cfg)
    assert torch.equal(net(*inputs())[0], alone)
    attentions = 1 if lineage == "cogvideox" else 2  # Wan's cross-attention gets them too
    assert len(net.branch_state()) == 2 * 4 * attentions * cfg.depth
    assert all(name.endswith((".down", ".up")) for name in net.branch_state())
    with torch.no_grad():
        for p in net.branch_state().values():
            p.add_(0.1 * torch.randn_like(p))
    layer = net.backbone.blocks[0].attn1.to_q
    close(layer(torch.eye(D)) - layer.bias, (layer.weight + 2 * layer.up @ layer.down).T)
    trained = net(*inputs())[0]
    assert (trained - alone).abs().max() > 0.01
    experts.merge_lora(net.backbone)
    assert not any(isinstance(m, experts.LoRA) for m in net.modules()) and net.branch_state() == {}
    close(net(*inputs())[0], trained, 1e-4)


def test_lora_goes_to_the_named_layers_and_physical_blocks_stay_whole():
    net = build(lora_rank=2, lora_targets="to_v,to_out")
    assert {name.rpartition(".")[2]
            for name, m in net.backbone.named_modules() if isinstance(m, experts.LoRA)} == {"to_v", "to_out"}
    assert not any(isinstance(m, experts.LoRA) for m in net.physical.modules())
    assert torch.equal(net.physical[0].attn1.to_v.weight, net.backbone.blocks[net.at[0]].attn1.to_v.weight)
    names = set(net.branch_state())
    assert "backbone.blocks.0.attn1.to_v.up" in names and "refinement.weight" in names
    assert "backbone.blocks.0.attn1.to_v.weight" not in names


# --- the semantic router
def test_the_router_reads_the_mean_of_real_words_only():
    block, y, length = semantic(4), torch.randn(2, 6, D), torch.tensor([2, 6])
    block.temperature = 1.0
    logits, rho, lift = block.route(y, length)
    close(logits[0], block.router((y[0, 0] + y[0, 1]) / 2))
    close(logits[1], block.router(y[1].mean(0)))
    close(rho, torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True))
    block.temperature = 3.0
    close(block.route(y, length)[1], torch.exp(logits / 3) / torch.exp(logits / 3).sum(1, keepdim=True))
    block.temperature = 1.0
    close(lift, rho @ block.lift.weight.T + block.lift.bias)
    other = y.clone()
    other[0, 2:] = 1e3
    assert torch.equal(block.route(other, length)[0], logits)


def test_the_router_pools_no_padding_row():
    """Rows behind the length change the words before them (T5 has no mask either),
    but are not pooled themselves."""
    net = awake(build())
    x, t, text, length = inputs()
    y = net.backbone.embed(x, t, text, length)[1].text
    other = y.clone()
    other[0, length[0]:] = 7
    assert torch.equal(net.semantic.route(other, length)[0], net.semantic.route(y, length)[0])
    close(net.semantic.route(y, length)[0], net(x, t, text, length)[1].semantic_logits)
    assert not torch.equal(net.semantic.route(other, length + torch.tensor([1, 0]))[0],
                           net.semantic.route(y, length)[0])


def test_an_empty_text_is_finite():
    net = awake(build())
    x, t, _, _ = inputs()
    prediction, routing = net(x, t, torch.zeros(2, L, dtype=torch.long))
    close(routing.semantic_logits, net.semantic.router(torch.zeros(2, D)))
    assert prediction.isfinite().all()
    assert all(v.isfinite().all() for v in (routing.semantic, routing.semantic_lift, routing.refinement))


# --- edits
def test_inversion_flips_the_ranking():
    net = awake(build())
    as_is, flipped = net(*inputs())[1], net(*inputs(), edit=experts.invert)[1]
    assert torch.equal(flipped.semantic_logits, -as_is.semantic_logits)
    assert torch.equal(flipped.semantic.argsort(1), as_is.semantic.argsort(1).flip(1))
    close(flipped.semantic_lift, net.semantic.lift(flipped.semantic))
    # and reaches the picture
    assert (net(*inputs(), edit=experts.invert)[0] - net(*inputs())[0]).abs().max() > 1e-4


def test_one_expert_up():
    net = awake(build())
    up = net(*inputs(), edit=lambda logits: logits + torch.tensor([0.0, 0.0, 500.0, 0.0]))[1]
    close(up.semantic, torch.tensor([0.0, 0.0, 1.0, 0.0]).expand(2, 4))


# --- wiring
def test_text_rows_are_touched_by_no_expert_and_no_injection():
    net = awake(build(physical_blocks="0,1", injection="zero"))
    seen = {}
    net.backbone.blocks[0].register_forward_hook(lambda m, args, out: seen.update(tokens=args[0], out=out))
    net.backbone.blocks[1].register_forward_hook(lambda m, args, out: seen.update(injected=args[0]))
    net.physical[0].register_forward_hook(lambda m, args, out: seen.update(branch=args[0]))
    net.physical[1].register_forward_hook(lambda m, args, out: seen.update(middle=args[2]))
    net(*inputs())
    h = torch.randn(2, L + N, D)
    for before, after in ((seen["tokens"], seen["branch"]), (seen["out"], seen["injected"]),
                          (h, seen["middle"](h)[0])):
        assert torch.equal(before[:, :L], after[:, :L])
        assert ((before - after)[:, L:].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("injection", ["zero", "plain"])
def test_forward_is_the_figure_drawn_by_hand(injection):
    """Blocks 0 and 2 have a physical block beside them;
    the second, and only it, has the REB in its middle."""
    net = awake(build(injection=injection))
    x, t, text, length = inputs()
    tokens, c = net.backbone.embed(x, t, text, length)
    _, rho, _ = net.semantic.route(net.backbone.text_encoder(text), length)
    text_rows, video = tokens[:, :L], tokens[:, L:]
    branch = torch.cat([text_rows, net.semantic(video, rho, (3, 2, 5))], 1)
    video_only = lambda f, h: torch.cat([h[:, :L], f(h[:, L:])], 1)

    tokens = net.backbone.blocks[0](tokens, c)
    branch = net.physical[0](branch, c)
    tokens = tokens + video_only(net.inject[0],
                                 torch.cat([torch.zeros_like(branch[:, :L]), branch[:, L:]], 1))
    tokens = net.backbone.blocks[1](tokens, c)
    tokens = net.backbone.blocks[2](tokens, c)
    refined = lambda h: video_only(lambda v: net.refinement(v)[0], h)
    branch, _ = net.physical[1](branch, c, lambda h: (refined(h), None))
    tokens = tokens + video_only(net.inject[1],
                                 torch.cat([torch.zeros_like(branch[:, :L]), branch[:, L:]], 1))
    close(net(x, t, text, length)[0], net.backbone.head(tokens, c))


def test_in_place_a_physical_block_does_what_its_neighbour_did():
    """Blocks 0 and 2 are not run at all: the first physical block reads the tokens and the basis maps,
    the second one what comes out of block 1, and has the REB in its middle."""
    net = awake(build())
    x, t, text, length = inputs()
    tokens, c = net.backbone.embed(x, t, text, length)
    _, rho, _ = net.semantic.route(net.backbone.text_encoder(text), length)
    video_only = lambda f, h: torch.cat([h[:, :L], f(h[:, L:])], 1)

    tokens = net.physical[0](video_only(lambda v: net.semantic(v, rho, (3, 2, 5)), tokens), c)
    tokens = net.backbone.blocks[1](tokens, c)
    refined = lambda h: video_only(lambda v: net.refinement(v)[0], h)
    tokens, _ = net.physical[1](tokens, c, lambda h: (refined(h), None))
    net.backbone.blocks[0].forward = net.backbone.blocks[2].forward = None
    close(net(x, t, text, length)[0], net.backbone.head(tokens, c))


@pytest.mark.parametrize("injection", ["place", "zero"])
def test_the_first_gradient_reaches_what_starts_the_branch(injection):
    """At the very first step: in place it reaches copies, basis maps and experts; through a zero
    injection it reaches that alone."""
    net = build(injection=injection)
    (net(*inputs())[0] - 1).square().mean().backward()
    moved = {name.split(".")[0] for name, p in net.branch_state().items()
             if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == ({"physical", "semantic", "refinement"} if injection == "place" else {"inject"})


def test_init_from_backbone_copies_exactly_and_shares_nothing():
    net = build()
    awake(net)
    net.init_from_backbone()
    for i, block in zip((0, 2), net.physical):
        theirs = net.backbone.blocks[i].state_dict()
        assert block.state_dict().keys() == theirs.keys()
        assert all(torch.equal(p, theirs[name]) for name, p in block.state_dict().items())
    before = net.backbone.blocks[0].ff[0].weight.clone()
    awake(net.physical)
    assert torch.equal(net.backbone.blocks[0].ff[0].weight, before)


def test_branch_and_backbone_together_are_all():
    net = build()
    branch, backbone = {id(p) for p in net.branch_state().values()}, {id(p) for p in net.backbone.parameters()}
    assert branch and not branch & backbone and branch | backbone == {id(p) for p in net.parameters()}


def test_routing_shapes_and_sums():
    _, routing = awake(build(categories=29, top_k=3))(*inputs())
    assert routing.semantic_logits.shape == routing.semantic.shape == (2, 4)
    assert routing.semantic_lift.shape == (2, 29)
    assert routing.refinement.shape == (2, N, 4) and routing.refinement_lift.shape == (2, N, 29)
    assert routing.chosen.shape == (2, N, 3)
    close(routing.semantic.sum(-1), torch.ones(2), 1e-6)
    close(routing.refinement.sum(-1), torch.ones(2, N), 1e-6)
    assert torch.equal(routing.chosen, routing.refinement.topk(3).indices)
    assert all(len(set(row)) == 3 for row in routing.chosen.flatten(0, 1).tolist())


def test_switched_off_parts_have_no_routing_and_no_parameters():
    net = build(semantic=False, refinement=False)
    assert set(vars(net(*inputs())[1]).values()) == {None}
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"backbone", "physical"}
    assert net(*inputs(), edit=experts.invert)[1].semantic is None


def test_recomputation_writes_nothing_into_the_routing():
    """Checkpointing runs the middle a second time, in backward: the routing stays that of the forward."""
    net = awake(build())
    for block in net.physical:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    prediction, routing = net(*inputs())
    before = dict(vars(routing))
    (prediction.square().mean() + routing.refinement_lift.square().mean()).backward()
    assert len(before) == 6 and all(value is before[name] for name, value in vars(routing).items())
