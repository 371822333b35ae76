"""align.py against numbers worked out by hand."""
import math

import pytest
import torch

import align

pytestmark = pytest.mark.quick


def near(value, expected):
    torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected, dtype=torch.float32),
                               atol=1e-6, rtol=1e-6)


# --- L_coarse
# Cosines of P are .7071, 0, .7071 and of Q are 1, 0, 0, so the errors are (1 - .7071)^2 = .0858, 0 and .5.
P = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
Q = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def test_relative_coarse_loss_by_hand():
    near(align.coarse_loss(P, Q, reduction="sum"), 0.5857864)  # 2 - sqrt 2
    near(align.coarse_loss(P, Q), 0.5857864 / 3)  # three pairs
    near(align.coarse_loss(Q, Q), 0.0)


def test_relative_coarse_loss_knows_directions_only():
    lengths = torch.tensor([[0.1], [7.0], [3.0]])
    near(align.coarse_loss(lengths * P, Q), 0.5857864 / 3)
    near(align.coarse_loss(P, lengths * Q), 0.5857864 / 3)
    near(align.coarse_loss(P.flip(1), Q), 0.5857864 / 3)  # it names no class


def test_relative_coarse_loss_has_a_gradient_for_every_clip():
    p = P.clone().requires_grad_()
    align.coarse_loss(p, Q).backward()
    assert (p.grad.abs().sum(1) > 0).all()


def test_a_batch_of_one_has_no_pair_and_says_so():
    with pytest.raises(ValueError, match="pair"):
        align.coarse_loss(P[:1], Q[:1])


def test_bce_coarse_loss_by_hand():
    """-log sigmoid(0) = log 2; for logit ln 3 and label 0: -log(1 - 3/4) = log 4.
    It names classes, so a batch of one will do."""
    p, q = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])
    near(align.coarse_loss(p, q, kind="bce", reduction="sum"), math.log(2) + math.log(4))
    near(align.coarse_loss(p, q, kind="bce"), (math.log(2) + math.log(4)) / 2)


# --- L_fine_align
# One clip, two tokens, two phenomena; errors .5 .2 / .4 0, so .25 + .5 * .16 + 0 where the mask is not 0.
P_R = torch.tensor([[[0.5, 0.2], [0.9, 0.4]]])
Q_R = torch.tensor([[[1.0, 0.0], [0.5, 0.4]]])
MASK = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]])


def test_fine_align_loss_by_hand():
    near(align.fine_align_loss(P_R, Q_R, MASK, "sum"), 0.33)
    near(align.fine_align_loss(P_R, Q_R, MASK), 0.33 / 2.5)  # over the mask's total
    near(align.fine_align_loss(P_R, Q_R, torch.ones(1, 2, 2)), (0.25 + 0.04 + 0.16) / 4)
    near(align.fine_align_loss(P_R, Q_R, torch.ones(1, 2, 2, dtype=torch.bool)), (0.25 + 0.04 + 0.16) / 4)


@pytest.mark.parametrize("reduction, total", [("mean", 2.5), ("sum", 1.0)])
def test_masked_entries_have_exactly_no_gradient(reduction, total):
    p = P_R.clone().requires_grad_()
    align.fine_align_loss(p, Q_R, MASK, reduction).backward()
    near(p.grad, (torch.tensor([[[-1.0, 0.0], [0.4, 0.0]]]) / total).tolist())  # 2 m (p - q)
    assert p.grad[0, 0, 1] == 0
    p = P_R.clone().requires_grad_()
    target = torch.where(MASK > 0, Q_R, 1e6)  # whatever stands under the mask
    align.fine_align_loss(p, target, MASK, reduction).backward()
    assert p.grad[0, 0, 1] == 0


def test_an_empty_mask_gives_zero_and_no_gradient():
    p = P_R.clone().requires_grad_()
    loss = align.fine_align_loss(p, Q_R, torch.zeros(1, 2, 2))
    loss.backward()
    assert loss == 0 and torch.equal(p.grad, torch.zeros_like(p))


# --- L_fine_balance
def test_balance_is_1_when_even_and_E_r_when_collapsed():
    even = torch.full((2, 6, 3), 1 / 3)
    near(align.balance_loss(even, torch.arange(12).view(2, 6, 1) % 3), 1.0)
    near(align.balance_loss(even, torch.tensor([[0, 1], [1, 2], [2, 0]]).expand(2, 3, 2)), 1.0)  # top 2 of 3
    collapsed = torch.zeros(2, 6, 3)
    collapsed[..., 1] = 1
    near(align.balance_loss(collapsed, torch.full((2, 6, 1), 1)), 3.0)


def test_balance_by_hand():
    """f = (1, 0), p = (5/8, 3/8): 2 (5/8). And f = (3/4, 1/4) with four choices: 2 (15/32 + 3/32)."""
    rho = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    near(align.balance_loss(rho, torch.tensor([[[0], [0]]])), 1.25)
    near(align.balance_loss(rho.repeat(2, 1, 1), torch.tensor([[[0], [0]], [[1], [0]]])), 1.125)


def test_balance_has_a_gradient_through_p_alone():
    """d/d rho = E_r f_i / (B N): the counts f are constants."""
    rho = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]], requires_grad=True)
    chosen = torch.tensor([[[0], [0]]])
    align.balance_loss(rho, chosen).backward()
    near(rho.grad, [[[1.0, 0.0], [1.0, 0.0]]])


# --- targets from a teacher's maps: three tokens; combustion is present, melting is not
MAPS = torch.tensor([[[3.0, 9.0], [2.0, 9.0], [0.0, 9.0]]])
BACKGROUND = torch.tensor([[1.0, 1.0, 1.0]])
PRESENT = torch.tensor([[1.0, 0.0]])


def test_semantic_balance_is_1_when_clips_use_all_experts_evenly_and_E_s_when_one_takes_all():
    near(align.semantic_balance_loss(torch.eye(4)), 1.0)  # sharp, and even over the clips
    near(align.semantic_balance_loss(torch.full((3, 4), 0.25)), 1.0)
    near(align.semantic_balance_loss(torch.eye(4)[[2, 2, 2]]), 4.0)
    near(align.semantic_balance_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]])), 2 * (0.75**2 + 0.25**2))


def test_map_target_follows_the_papers_rule():
    """Differences 2, 1, -1 of a present phenomenon: targets 1, .5, 0 and only the positive ones count."""
    target, mask = align.map_target(MAPS, BACKGROUND, PRESENT)
    near(target, [[[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    near(mask.float(), [[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])


def test_negatives_pull_the_other_tokens_of_present_phenomena_to_zero():
    target, mask = align.map_target(MAPS, BACKGROUND, PRESENT, negatives=0.25)
    near(target, [[[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]]])
    near(mask, [[[1.0, 0.0], [1.0, 0.0], [0.25, 0.0]]])
    near(align.fine_align_loss(torch.full((1, 3, 2), 0.5), target, mask), (0.25 + 0 + 0.25 * 0.25) / 2.25)


def test_each_clip_and_phenomenon_is_scaled_by_its_own_largest_difference():
    maps = torch.tensor([[[5.0, 1.5], [3.0, 2.0]], [[1.0, 0.5], [0.5, 1.0]]])
    background = torch.tensor([[1.0, 1.0], [1.0, 0.75]])
    target, mask = align.map_target(maps, background, torch.ones(2, 2))
    near(target, [[[1.0, 0.5], [0.5, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])
    # equal to the background is not positive
    near(mask.float(), [[[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 1.0]]])


def test_only_clips_with_a_caption_and_a_label_are_compared():
    """The second lost its caption for guidance, the third has no label, the fourth neither."""
    length = torch.tensor([3, 0, 5, 0])
    categories = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    assert align.labelled(length, categories).tolist() == [True, False, False, False]
