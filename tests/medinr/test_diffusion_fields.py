"""Conditions, autoencoder, denoiser, sampling: known answers and gradients."""

import math

import pytest
import torch
from torch import Tensor

from medinr.errors import UserError
from medinr.fields.conditions import ConditionEmbedding
from medinr.fields.diffusion import BETAS, TRAIN_STEPS, Denoiser, ddim, denoising_loss, guided, noising, sampler
from medinr.fields.latent import Autoencoder, kl_divergence, on_lattice

NAN = math.nan


def embedding() -> ConditionEmbedding:
    torch.manual_seed(0)
    made = ConditionEmbedding(8, 2)
    made.size([0, 3], [10.0, NAN], [20.0, NAN])
    return made


def test_a_missing_condition_has_one_token_whatever_else_is_known() -> None:
    with torch.no_grad():
        context = embedding()(torch.tensor([[12.0, 1.0], [NAN, 1.0], [NAN, 2.0], [12.0, NAN], [18.0, NAN]]))
    assert context.shape == (5, 2, 8)
    assert torch.equal(context[1, 0], context[2, 0]) and torch.equal(context[3, 1], context[4, 1])
    assert torch.equal(context[0, 1], context[1, 1]) and not torch.equal(context[1, 1], context[2, 1])
    assert not torch.allclose(context[3, 0], context[4, 0]) and not torch.allclose(context[0, 0], context[1, 0])


def test_conditions_are_scaled_over_their_trained_range_and_missing_ones_give_finite_gradients() -> None:
    made = embedding()
    scaled = made.scaled(torch.tensor([[10.0, 2.0], [15.0, 0.0], [22.5, NAN]]))
    assert scaled[:, 0].tolist() == [-1.0, 0.0, 1.5] and scaled[0, 1] == 2.0
    made(torch.tensor([[NAN, NAN], [12.0, 1.0]])).square().sum().backward()
    for name, p in made.named_parameters():
        assert p.grad is not None and bool(p.grad.isfinite().all()) and float(p.grad.abs().max()) > 0, name


def test_embedding_says_how_many_conditions_it_takes_and_keeps_its_weights_when_sized_again() -> None:
    made = embedding()
    before = made.missing
    made.size([0, 3], [10.0, NAN], [20.0, NAN])
    assert made.missing is before
    with pytest.raises(UserError, match="expected 2 values"):
        made(torch.zeros(1, 3))
    empty = ConditionEmbedding(4)
    empty.size([], [], [])
    assert empty(torch.zeros(2, 0)).shape == (2, 1, 4)


@pytest.mark.parametrize("shape", [(12, 10, 8), (13, 9, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_autoencoder_takes_any_size(shape: tuple[int, int, int], stride: int) -> None:
    made = Autoencoder(3, 2, [4, 8], stride, groups=4)
    x = torch.randn(2, 3, *shape)
    mean, sigma = made.encode(x)
    assert list(mean.shape[1:]) == made.latent_shape(shape) and bool((sigma > 0).all())
    assert made.decode(mean, shape).shape == x.shape


def test_autoencoder_works_in_units_of_the_spread_and_keeps_a_constant_on_its_lattice() -> None:
    made = Autoencoder(3, 2, [4, 8], 2, groups=4)
    x = torch.full((1, 3, 7, 8, 5), 3.0)
    made.spread.fill_(1.5)
    assert torch.allclose(made.coarse(x), torch.full((1, 3, 4, 4, 3), 2.0))
    assert torch.allclose(made.dense(made.coarse(x), (7, 8, 5)), x)
    with pytest.raises(UserError, match="volumes of 3 channels"):
        made.encode(x[:, :1])


@pytest.mark.parametrize("shape", [(16, 16, 12), (15, 17, 11)])
def test_what_was_interpolated_from_a_lattice_comes_back(shape: tuple[int, int, int]) -> None:
    """A bump of one control point, which means over the cells would flatten."""
    size = [-(-n // 2) for n in shape]
    bump = torch.zeros(1, 3, *size)
    bump[0, :, 3, 4, 2] = torch.tensor([1.0, -2.0, 3.0])
    dense = torch.nn.functional.interpolate(bump, size=list(shape), mode="trilinear", align_corners=False)
    again = torch.nn.functional.interpolate(
        on_lattice(dense, size), size=list(shape), mode="trilinear", align_corners=False
    )
    means = torch.nn.functional.interpolate(
        torch.nn.functional.interpolate(dense, size=size, mode="area"),
        size=list(shape), mode="trilinear", align_corners=False,
    )  # fmt: skip
    peak = dense.abs().max()
    assert (means - dense).abs().max() > 0.3 * peak
    assert (again - dense).abs().max() < 0.1 * peak
    assert on_lattice(dense, shape) is dense


def test_another_head_decodes_the_same_latents_to_zero_at_first_with_the_decoders_weights() -> None:
    made = Autoencoder(1, 2, [4, 8], 1, groups=4)
    head = made.deformation_head()
    z = torch.randn(1, 2, 3, 3, 3)
    made.teach(head)
    assert made.decode_coarse(z, (6, 6, 6), head).abs().max() == 0 and made.decode_coarse(z, (6, 6, 6)).abs().max() > 0
    assert torch.equal(head[0].conv.weight, made.network.post_quant_conv.conv.weight)  # type: ignore[index, union-attr]


def test_divergence_of_known_normals() -> None:
    one, zero = torch.ones(4), torch.zeros(4)
    assert kl_divergence(zero, one) == 0
    assert kl_divergence(2 * one, one) == pytest.approx(2.0)
    assert float(kl_divergence(zero, 3 * one)) == pytest.approx(0.5 * (9 - 1 - math.log(9)))


def denoiser() -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(2, [8, 8], [False, True], 8, 1, 8, groups=4)
    for p in made.parameters():  # MONAI starts the last layer of every block at zero
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return made


@pytest.mark.parametrize("shape", [(4, 4, 2), (5, 3, 1)])
def test_denoiser_takes_any_size_and_looks_at_time_and_conditions(shape: tuple[int, int, int]) -> None:
    made, x, t = denoiser(), torch.randn(1, 2, *shape), torch.tensor([500])
    context = torch.randn(1, 3, 8)
    with torch.no_grad():
        found = made(x, t, context)
        assert found.shape == x.shape
        assert not torch.allclose(found, made(x, t + 300, context), atol=1e-4)
        assert not torch.allclose(found, made(x, t, 3 * context), atol=1e-4)


def test_loss_of_a_denoiser_that_knows_the_answer_is_zero() -> None:
    """Data at one point: v follows from where the noisy sample is."""
    point = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1, 1)
    chain = noising()

    def knows(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a = chain.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        noise = (x - a.sqrt() * point) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * point

    z = point.expand(8, 2, 2, 2, 2)
    assert float(denoising_loss(knows, z, torch.zeros(8, 1, 4))) < 1e-6
    assert float(denoising_loss(lambda x, timesteps, context: 0 * x, z, torch.zeros(8, 1, 4))) > 0.1
    assert float(chain.betas[0]) == pytest.approx(BETAS[0]) and len(chain.betas) == TRAIN_STEPS
    found = ddim(knows, torch.randn(1, 2, 2, 2, 2), torch.zeros(1, 1, 4), torch.zeros(1, 1, 4), 20)
    assert torch.allclose(found, z[:1], atol=1e-4)


def test_sampling_converges_to_a_normal_distribution() -> None:
    """For z ~ N(m, s^2) the best v is known, and the exact flow takes noise n to m + s n (at a_T = 0)."""
    m, s, chain = 1.5, 0.5, noising()

    def best(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        a = chain.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1)
        z = m + a.sqrt() * s**2 * (x - a.sqrt() * m) / (a * s**2 + 1 - a)
        noise = (x - a.sqrt() * z) / (1 - a).sqrt()
        return a.sqrt() * noise - (1 - a).sqrt() * z

    noise, nothing = torch.linspace(-2, 2, 8).view(1, 1, 2, 2, 2), torch.zeros(1, 1, 4)
    a = chain.alphas_cumprod[-1]
    exact = m + s * (noise - a.sqrt() * m) / (a * s**2 + 1 - a).sqrt()
    errors = [float((ddim(best, noise, nothing, nothing, n) - exact).abs().max()) for n in (20, 100, 500)]
    assert errors[0] < 0.2 and errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5  # of first order


def test_sampler_ends_at_the_data_and_refuses_more_steps_than_were_trained() -> None:
    made = sampler(20)
    assert made.timesteps[0] == 999 and made.timesteps[-1] == 0 and len(made.timesteps) == 20
    assert made.final_alpha_cumprod == 1
    for steps in (0, 1001):
        with pytest.raises(UserError, match="expected 1 to 1000"):
            sampler(steps)


def test_guidance_is_linear_between_with_and_without() -> None:
    def flat(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return x + context.mean()

    x, t, one, zero = torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1)
    assert [float(guided(flat, x, t, one, zero, g)) for g in (0.0, 1.0, 2.5)] == [0.0, 1.0, 2.5]


def test_gradient_reaches_the_denoiser_through_the_last_steps_alone() -> None:
    made, noise, context = denoiser(), torch.randn(1, 2, 4, 4, 2), torch.randn(1, 2, 8, requires_grad=True)
    assert not ddim(made, noise, context, context, 5).requires_grad
    ddim(made, noise, context, context, 5, differentiable=2).square().sum().backward()
    gradients = [p.grad for p in made.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in gradients) > 0 and context.grad is not None
    assert float(context.grad.abs().max()) > 0
