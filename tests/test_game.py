"""The alternating game: few-step generators, guidance, critics, gates, settling, pairs; and what equals what."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import test_score_family
import test_uni_instruct
import torch
from test_uni_instruct import HAS_PULL, TABLE
from torch import Tensor, nn

from limbeck import unification
from limbeck.critic import (
    R1_STEP,
    Adversarial,
    Critic,
    RatioScale,
    critic_loss,
    generator_loss,
    nudged,
    r1_penalty,
)
from limbeck.denoiser import Denoiser, Guided, Preconditioned
from limbeck.divergence import DIVERGENCES
from limbeck.exact import Gaussian, Mixture
from limbeck.game import Game, Guidance, Settling
from limbeck.generator import Dirac, FewStep, OneStep
from limbeck.losses import denoising
from limbeck.methods import METHODS
from limbeck.methods.diff_instruct import DiffInstruct, diff_instruct_loss
from limbeck.methods.dmd import DMD
from limbeck.methods.dmd2 import DMD2
from limbeck.methods.f_distill import FDistill
from limbeck.methods.sds import SDS
from limbeck.methods.sid import SiD
from limbeck.methods.sida import SiDA
from limbeck.methods.sim import SIM
from limbeck.methods.uni_instruct import UniInstruct, released_ratio
from limbeck.networks.mlp import MLP
from limbeck.noise import LogNormal
from limbeck.objective import Batch, Pairs, Turn, perturb
from limbeck.source import NoiseSource, RealSource
from limbeck.train import NonFinite, Trainer

LAW = Mixture([0.4, 0.6], torch.tensor([[-1.0, 0.4], [0.5, -0.3]], dtype=torch.float64), [0.2, 0.3])
N = 24


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def template(classes: int = 0, seed: int = 0) -> Preconditioned:
    """A denoiser in float64 with no layer left at its zero start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP((2,), classes, width=16, depth=1).double()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return Preconditioned(network, (2,), classes, LAW.sigma_data)


def batch(latent: tuple[int, ...] = (2,), classes: int = 0) -> Batch:
    cond = None
    if classes:
        cond = torch.nn.functional.one_hot(torch.arange(N) % classes, classes).double()
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    coin = (7 * torch.arange(N, dtype=torch.float64) % N + 0.5) / N
    real = LAW.sample(N, torch.Generator().manual_seed(3))
    pairs = Pairs(normal(N, 2, seed=6), LAW.sample(N, torch.Generator().manual_seed(7)), cond)
    return Batch(normal(N, *latent, seed=1), u, normal(N, 2, seed=2), cond, real, coin, normal(N, 2, seed=4), pairs)


def players(method: Any, start: Denoiser) -> nn.ModuleDict:
    """Players in float64 whose fake score and critic are not where they started."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        nets = nn.ModuleDict(method.players(start)).double()
        for name in ("fake", "critic"):
            if name in nets:
                with torch.no_grad():
                    for p in nets[name].parameters():
                        p += 0.1 * torch.randn_like(p)
    nets.eval().requires_grad_(False)
    nets["generator"].requires_grad_(True)
    return nets


def slope(method: Any, nets: nn.ModuleDict, feed: Batch, teacher: Denoiser = LAW, **keys: Any) -> Tensor:
    """Gradient of the generator's loss, summed over samples."""
    loss = method.loss(nets, teacher, feed, **keys).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(nets["generator"].parameters()))])


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    assert a.norm() > 1e-6
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


# What equals what -----------------------------------------------------------------------------------------------------


def test_special_cases_have_equal_gradients() -> None:
    feed, start, matching = batch(), template(), DiffInstruct(weight="dmd")
    nets = players(matching, start)
    truth = slope(matching, nets, feed)
    same(slope(DMD2(game=Game()), nets, feed), truth)
    same(slope(DMD(regression=0.0), nets, feed), truth)
    idle = FDistill(divergence="reverse_kl", game=Game(adversarial=Adversarial(weight=0.0)))
    judged = players(idle, start)
    judged["fake"].load_state_dict(nets["fake"].state_dict())
    same(slope(idle, judged, feed), truth)
    judged["ratio"].mean.mul_(3)  # the ratio does not matter to reverse KL
    same(slope(idle, judged, feed), truth)
    plain = FDistill(divergence="reverse_kl", weight="uniform", game=idle.game)
    same(slope(plain, judged, feed), slope(DiffInstruct(), nets, feed))
    # and a divergence with a ratio is something else
    other = FDistill(game=idle.game)
    assert (slope(other, judged, feed) - truth).norm() > 1e-3 * truth.norm()


def test_sida_without_its_critic_is_sid() -> None:
    feed, start = batch(), template()
    nets = players(SiDA(), start)
    for alpha in (0.5, 1.0, 1.2):
        sid = slope(SiD(alpha=alpha), nets, feed)
        off = SiDA(alpha=alpha, game=Game(adversarial=Adversarial(weight=0.0)))
        same(slope(off, nets, feed), sid)
        on = SiDA(alpha=alpha, game=Game(adversarial=Adversarial(weight=0.1)))
        assert (slope(on, nets, feed) - sid).norm() > 1e-3 * sid.norm()
        same(slope(on, nets, feed, judged=False), sid)  # before its gate
    # both losses share the normaliser, and the critic is to be convinced
    view = on.game.view(nets, LAW, feed, on.levels)
    weight = 1 / ((view.x - view.real).detach() / LAW.unit).abs().mean(1)
    judged = weight * 0.1 * 2 * nn.functional.softplus(-view.logits)
    unjudged = on.loss(nets, LAW, feed, judged=False)
    torch.testing.assert_close(on.loss(nets, LAW, feed) - unjudged, judged)


def test_squared_sim_is_twice_sid() -> None:
    feed, nets = batch(), players(SiD(), template())
    same(slope(SIM(distance="squared"), nets, feed), 2 * slope(SiD(alpha=1.0, normalizer="none"), nets, feed))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_before_its_gate_uni_instruct_is_the_reverse_kl(name: str) -> None:
    """h is a constant then, whose gradient has no third term."""
    feed, start = batch(), template()
    method = UniInstruct(divergence=name, game=Game(adversarial=Adversarial(weight=0.1, after=10)))
    nets = players(method, start)
    h = float(DIVERGENCES[name].h(torch.ones(())))
    same(slope(method, nets, feed, judged=False), h * slope(UniInstruct(divergence="reverse_kl"), nets, feed))


def shown(method: UniInstruct | FDistill, game: Game, nets: nn.ModuleDict, feed: Batch) -> dict[str, Tensor]:
    """What a step shows a loss with a critic; r = exp(logit) with its graph, over its mean (or 1)."""
    view = game.view(nets, LAW, feed, method.levels)
    assert view.logits is not None
    mean = nets["ratio"].mean[(feed.u * method.ratio_bins).long()].clamp(min=0 if method.ratio_raised else 1)
    normalizer = 1 / ((view.x - view.real) / LAW.unit).abs().mean(1).detach()
    adversarial = 0.3 * 2 * nn.functional.softplus(-view.logits)
    return {
        "x": view.x, "noisy": view.noisy, "sigma": view.sigma, "fake": view.fake, "real": view.real, "w": normalizer,
        "r": view.logits.exp() / mean, "adversarial": adversarial, "logits": view.logits,
    }  # fmt: skip


def in_parameters(loss: Tensor, nets: nn.ModuleDict) -> Tensor:
    grads = torch.autograd.grad(loss.sum(), list(nets["generator"].parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def with_ratio(method: Any) -> nn.ModuleDict:
    nets = players(method, template())
    nets["ratio"].mean.copy_(torch.linspace(0.4, 2.5, method.ratio_bins, dtype=torch.float64))
    return nets


@pytest.mark.parametrize(("limit", "raised"), [(0.02, False), (math.inf, False), (math.inf, True)])
@pytest.mark.parametrize("name", TABLE)
def test_a_step_of_uni_instruct_has_the_exact_terms(name: str, limit: float, raised: bool) -> None:
    """Past its gate: h with the critic's graph, the path term, the pull up to its limit, SiD's normaliser over all."""
    game, row, feed = Game(adversarial=Adversarial(weight=0.3)), TABLE[name], batch()
    method = UniInstruct(divergence=name, pull_limit=limit, ratio_raised=raised, game=game)
    nets = with_ratio(method)
    v = shown(method, game, nets, feed)
    delta = v["fake"] - v["real"]
    squares = (delta**2).sum(1)
    force = ((row.pull(v["r"]) * (squares / v["sigma"] ** 2).clamp(max=limit))[:, None] * delta).detach()

    def loss(r: Tensor, force: Tensor) -> Tensor:
        first = -row.score(r) * (delta * (v["fake"] - v["x"])).sum(1)
        terms = first + row.path(r).detach() * squares + (force * v["noisy"]).sum(1)
        return v["w"] * (terms / LAW.unit**2 + v["adversarial"])

    torch.testing.assert_close(method.loss(nets, LAW, feed), loss(v["r"], force), rtol=1e-12, atol=1e-12)
    truth = slope(method, nets, feed)
    same(in_parameters(loss(v["r"], force), nets), truth, 1e-11)
    for wrong, matters in (
        (loss(v["r"].detach(), force), name != "reverse_kl"),
        (loss(v["r"], 0 * force), name in HAS_PULL),
        (loss(v["r"], force) + (1 - v["w"]) * v["adversarial"], True),
    ):
        assert ((in_parameters(wrong, nets) - truth).norm() > 1e-5 * truth.norm()) == matters
    steep = (squares > limit * v["sigma"] ** 2).sum() * 2  # two calls
    assert nets["pull"].told()["limited"] == (steep if name in HAS_PULL else 0)


@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_a_step_of_f_distill_is_weighted_by_h(name: str, raised: bool) -> None:
    game, feed = Game(adversarial=Adversarial(weight=0.3)), batch()
    method = FDistill(divergence=name, ratio_raised=raised, game=game)
    nets = with_ratio(method)
    v = shown(method, game, nets, feed)
    h = TABLE[name].score(v["r"]) / 2
    pull = ((v["w"] * h)[:, None] * (v["fake"] - v["real"])).detach()
    loss = (pull * v["x"]).sum(1) / LAW.unit**2 + v["adversarial"]
    torch.testing.assert_close(method.loss(nets, LAW, feed), loss, rtol=1e-12, atol=1e-12)
    same(in_parameters(loss, nets), slope(method, nets, feed), 1e-11)


@pytest.mark.parametrize(("name", "h"), [("forward_kl", lambda r: r), ("jeffreys", lambda r: 1 + r)])
def test_the_released_uni_instruct_is_sid_with_a_constant_ratio(name: str, h: Any) -> None:
    """r = L / (L - 1), L = w d softplus(-logit), a constant like h(r); 1 before the gate: SiD at alpha = 1."""
    game, feed = Game(adversarial=Adversarial(weight=0.0)), batch()
    method = UniInstruct(divergence=name, as_released=True, game=game)
    nets = with_ratio(method)
    sid = SiD(alpha=1.0, levels=method.levels)
    same(slope(method, nets, feed, judged=False), 2 * float(h(1)) * slope(sid, nets, feed))
    v = shown(method, game, nets, feed)
    released = v["w"] * 2 * nn.functional.softplus(-v["logits"])
    ratio = (released / (released - 1)).detach()
    same(in_parameters(2 * h(ratio) * sid.loss(nets, LAW, feed), nets), slope(method, nets, feed), 1e-11)
    # on images L is in the hundreds, and the ratio 1 whatever the critic says
    logits = torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64)
    assert (released_ratio(logits, torch.tensor(3072 / 0.3)) - 1).abs().max() < 0.006


def test_any_method_takes_a_critic() -> None:
    feed, start = batch(), template()
    for kind in (DiffInstruct, SiD, SIM, DMD, DMD2):
        weak, strong = (kind(game=Game(adversarial=Adversarial(weight=w))) for w in (0.0, 0.3))
        nets = players(strong, start)
        view = strong.game.view(nets, LAW, feed, strong.levels)
        extra = 0.3 * 2 * nn.functional.softplus(-view.logits)
        torch.testing.assert_close(strong.loss(nets, LAW, feed), weak.loss(nets, LAW, feed) + extra)
        assert strong.needs_real and not kind(game=Game()).needs_real


def test_every_printed_special_case_has_its_proof() -> None:
    """A new row of `limbeck methods --unification` needs a test here; so does one whose wording changes."""
    family, terms = test_score_family, test_uni_instruct
    proofs: dict[str, tuple[Any, ...]] = {
        "f_distill(reverse_kl)": (test_special_cases_have_equal_gradients,),
        "dmd2 without its critic": (test_special_cases_have_equal_gradients,),
        "dmd with regression = 0": (test_special_cases_have_equal_gradients,),
        "sid with both estimates detached": (family.test_c3_without_the_networks_graphs_every_alpha_is_diff_instruct,),
        "sida with adversarial.weight = 0": (test_sida_without_its_critic_is_sid,),
        "sim(distance = squared)": (test_squared_sim_is_twice_sid,),
        "sds": (test_sds_is_diff_instruct_of_one_point,),
        "sid with game.calls = 1, guidance 1": (
            test_one_call_of_a_few_step_generator_is_one_step,
            test_guidance_of_one_changes_nothing_and_others_are_guided_denoisers,
        ),
        "integral KL": (terms.test_integral_kl_is_uni_instruct_with_an_integrated_weight,),
    }
    assert list(proofs) == [left for left, _, _ in unification.EQUAL]
    recovered: dict[str, tuple[Any, ...]] = {
        "2 SiD(alpha = 1/2); path weight 2 (1 - alpha): 2 SiD(alpha), 0: SIM": (
            terms.test_reverse_kl_is_twice_sid_at_one_half,
            terms.test_reverse_kl_with_another_path_term_is_sid,
            terms.test_reverse_kl_without_path_term_is_sim,
        ),
        "at r = 1: 2 SiD(alpha = 1)": (terms.test_forward_kl_at_ratio_one_is_twice_sid_at_one,),
        "reverse_kl + forward_kl": (terms.test_jeffreys_is_forward_plus_reverse,),
    }
    integrated = {"f_distill": terms.test_f_distill_expands_in_uni_instruct}  # of every divergence
    rest = [row for row in unification.ROWS if not row.recovers.startswith(f"f_distill({row.divergence}), integrated")]
    assert integrated and [row.recovers for row in rest] == list(recovered)


def test_the_printed_table_is_that_of_the_divergences() -> None:
    r = torch.linspace(0.2, 5, 50, dtype=torch.float64)
    assert [row.divergence for row in unification.ROWS] == list(DIVERGENCES)
    known = {"r": r, "ln": torch.log, "sqrt": torch.sqrt}
    for row in unification.ROWS:

        def value(text: str) -> Tensor:
            for old, new in (
                ("^", "**"),
                ("ln r", "ln(r)"),
                ("ln 2", "ln(two)"),
                (") ln", ") * ln"),
                ("r ln", "r * ln"),
            ):
                text = text.replace(old, new)
            for old, new in (("2 r", "2 * r"), ("4 r", "4 * r"), ("2 (", "2 * ("), ("4 (", "4 * (")):
                text = text.replace(old, new)
            got = eval(text, {"two": torch.tensor(2.0, dtype=torch.float64), **known})  # text of our own module
            return got + torch.zeros_like(r)

        d = DIVERGENCES[row.divergence]
        for printed, exact in (
            (row.f, d.f(r)),
            (row.score, 2 * d.h(r)),
            (row.path, d.h(r) - d.h1(r)),
            (row.pull, d.h2(r)),
        ):
            torch.testing.assert_close(value(printed), exact, rtol=1e-12, atol=1e-13)
    assert len(unification.table()) > 15


# Few steps ------------------------------------------------------------------------------------------------------------


def test_one_call_of_a_few_step_generator_is_one_step() -> None:
    start = template()
    one, few = OneStep(start, 3.0), FewStep(start, [3.0])
    z = normal(N, 1, 2, seed=1)
    assert few.nfe == 1 and few.latent_shape == (1, 2)
    assert torch.equal(few(z), one(z[:, 0]))
    # and in the game
    feed, wide = batch(), batch((1, 2))
    nets = players(SiD(), start)
    few_nets = nn.ModuleDict(dict(nets.items()))
    few_nets["generator"] = FewStep(nets["generator"].denoiser, [nets["generator"].sigma])
    same(slope(SiD(), few_nets, replace(wide, z=feed.z[:, None]), call=1), slope(SiD(), nets, feed))


def test_the_levels_of_few_steps_are_the_samplers() -> None:
    made = Game(calls=4).players(template(), None)["generator"]
    assert isinstance(made, FewStep) and made.nfe == 4 and made.latent_shape == (4, 2)
    u = 0.49932  # where EDM's levels pass 2.5
    for i, sigma in enumerate(made.sigmas):
        low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
        assert sigma == pytest.approx(LAW.unit * (low + u * (1 - i / 4) * (high - low)) ** 7, rel=1e-3)
    assert made.sigmas[0] == pytest.approx(2.5 * LAW.unit, rel=1e-12)
    with pytest.raises(ValueError, match=r"^sigmas: "):
        FewStep(template(), [1.0, 2.0])


def test_only_the_last_call_is_differentiated() -> None:
    start = template()
    few, z = FewStep(start, [3.0, 1.0, 0.5]), normal(N, 3, 2, seed=1)
    for calls in (1, 2, 3):
        x = few.roll(z, None, calls)
        got = torch.autograd.grad(x.sum(), list(start.parameters()))
        with torch.no_grad():
            before = few.roll(z, None, calls - 1) if calls > 1 else torch.zeros(N, 2, dtype=torch.float64)
        sigma = few.sigmas[calls - 1]
        last = start(before + sigma * z[:, calls - 1], torch.tensor(sigma))
        for a, b in zip(got, torch.autograd.grad(last.sum(), list(start.parameters())), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(few(z), few.roll(z, None, 3))
    # the fake score learns the samples that the generator is judged by
    game, feed = Game(calls=3), batch((3, 2))
    nets = players(SiD(game=game), start)
    sigma = game.fake_levels.scaled(LAW.unit).quantile(feed.u)
    for calls in (1, 2, 3):
        with torch.no_grad():
            x = cast(FewStep, nets["generator"]).roll(feed.z, None, calls)
            estimate = nets["fake"](perturb(x, sigma, feed.eps), sigma)
            turn = next(iter(game.turns(SiD(game=game).loss, calls - 1, 0)))
            expected = denoising(estimate, x, sigma, LAW.sigma_data)
            torch.testing.assert_close(turn.loss(nets, LAW, feed), expected)
    # every call takes its turn
    turns = [list(SiD(game=Game(calls=3)).turns(step, 0))[-1] for step in range(6)]
    seen = [cast(Any, turn.loss).keywords["call"] for turn in turns]
    assert seen == [1, 2, 3, 1, 2, 3]


# Guidance -------------------------------------------------------------------------------------------------------------


def test_guidance_of_one_changes_nothing_and_others_are_guided_denoisers() -> None:
    start, feed, teacher = template(3), batch(classes=3), template(3, seed=9)
    plain = SiD()
    nets = players(plain, start)
    truth = slope(plain, nets, feed, teacher)
    same(slope(SiD(game=Game(guidance=Guidance(1.0, 1.0, 1.0))), nets, feed, teacher), truth)
    guided = SiD(game=Game(guidance=Guidance(fake=1.5, teacher=2.0)))
    by_hand = nn.ModuleDict(dict(nets.items()))
    by_hand["fake"] = Guided(nets["fake"], 1.5)
    same(slope(guided, nets, feed, teacher), slope(plain, by_hand, feed, Guided(teacher, 2.0)))
    assert (slope(guided, nets, feed, teacher) - truth).norm() > 1e-3 * truth.norm()
    with_critic = replace(guided, game=replace(guided.game, adversarial=Adversarial(weight=0.0)))
    judged = players(with_critic, start)
    same(slope(with_critic, judged, feed, teacher), slope(guided, judged, feed, teacher))


def test_the_fake_scores_turn_drops_labels_only_under_guidance() -> None:
    seen: list[Tensor] = []

    class Spy(Denoiser):
        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            assert cond is not None
            seen.append(cond)
            return x

    feed = batch(classes=3)
    assert feed.coin is not None and feed.cond is not None
    generator = OneStep(template(3), 2.5)
    # the generator's turn reads D_none too where `fake` is not 1
    for scale, later, dropped in ((1.0, 1.0, 0), (1.5, 1.0, round(0.25 * N)), (1.0, 2.0, round(0.25 * N))):
        seen.clear()
        game = Game(guidance=Guidance(fake_turn=scale, fake=later, dropout=0.25))
        nets = nn.ModuleDict({"generator": generator, "fake": Spy((2,), 3, 1.0)})
        game.fake_turn().loss(nets, LAW, feed)
        rows = seen[0][:N]
        assert len(seen[0]) == (N if scale == 1 else 2 * N) and torch.equal(seen[0][N:], torch.zeros_like(seen[0][N:]))
        assert int((rows.sum(1) == 0).sum()) == dropped
        assert torch.equal(rows[feed.coin >= 0.25], feed.cond[feed.coin >= 0.25])


def test_a_critic_sees_labels_dropped_of_real_samples_too() -> None:
    """Else a sample without a label were a generated one."""
    seen: list[Tensor | None] = []

    class Spy(Preconditioned):
        def features(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            seen.append(cond)
            return super().features(x, sigma, cond)

    feed, start = batch(classes=3), template(3)
    game = Game(guidance=Guidance(fake_turn=1.5, dropout=0.25), adversarial=Adversarial(features="teacher", r1=0.1))
    nets = players(SiD(game=game), start)
    game.fake_turn().loss(nets, Spy(start.network, (2,), 3, LAW.sigma_data), feed)
    assert feed.cond is not None and feed.coin is not None
    wanted = feed.cond * (feed.coin >= 0.25)[:, None]
    assert len(seen) == 3 and all(cond is not None and torch.equal(cond, wanted) for cond in seen)


def test_guidance_of_the_fake_scores_own_turn() -> None:
    """What learns is the guided estimate (k1 of SiD-LSG)."""
    start, feed = template(3), batch(classes=3)
    game = Game(guidance=Guidance(fake_turn=1.5, dropout=0.0))
    nets = players(SiD(game=game), start)
    x = nets["generator"](feed.z, feed.cond).detach()
    sigma = game.fake_levels.scaled(LAW.unit).quantile(feed.u)
    estimate = Guided(nets["fake"], 1.5)(perturb(x, sigma, feed.eps), sigma, feed.cond)
    expected = denoising(estimate, x, sigma, LAW.sigma_data)
    torch.testing.assert_close(game.fake_turn().loss(nets, LAW, feed), expected)
    critical = replace(game, adversarial=Adversarial(critic=0.0))
    judged = players(SiD(game=critical), start)
    judged["fake"].load_state_dict(nets["fake"].state_dict())
    torch.testing.assert_close(critical.fake_turn().loss(judged, LAW, feed), expected)


def players_with_critic(method: Any, nets: nn.ModuleDict, start: Denoiser) -> nn.ModuleDict:
    return nn.ModuleDict({**nets, "critic": method.players(start)["critic"].double()}).eval()


def test_replayed_dropout_has_equal_masks() -> None:
    """A fake score that is the teacher gives no gradient, whatever is dropped; without equal masks it would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = template()
        noisy = Preconditioned(MLP((2,), 0, 16, 1, 0.5).double(), (2,), 0, LAW.sigma_data)
        noisy.network.load_state_dict(start.network.state_dict())
        feed, nets = batch(), nn.ModuleDict({"generator": OneStep(start, 2.5), "fake": copy.deepcopy(noisy)}).eval()
        assert slope(DiffInstruct(dropout_replay=True), nets, feed, noisy.eval()).norm() == 0
        nets["fake"].train()
        noisy.train()
        assert slope(DiffInstruct(), nets, feed, noisy).norm() > 1e-3
        # a critic on the teacher's features leaves the masks equal; one on the fake score's would not
        judged = DiffInstruct(dropout_replay=True, game=Game(adversarial=Adversarial(features="teacher")))
        assert slope(judged, players_with_critic(judged, nets, noisy), feed, noisy.eval()).norm() == 0
    with pytest.raises(ValueError, match=r"^dropout_replay: a critic on the fake score's features"):
        DiffInstruct(dropout_replay=True, game=Game(adversarial=Adversarial()))


# Critics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FDistill, UniInstruct])
def test_a_hinge_critic_gives_no_ratio(method: Any) -> None:
    hinge = Game(adversarial=Adversarial(loss="hinge", weight=0.1))
    method(divergence="reverse_kl", game=hinge)
    for name in set(DIVERGENCES) - {"reverse_kl"}:
        with pytest.raises(ValueError, match=rf"^game\.adversarial\.loss: {name} needs a density ratio"):
            method(divergence=name, game=hinge)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_before_its_gate_f_distill_weighs_as_at_a_ratio_of_one(name: str) -> None:
    method = FDistill(divergence=name, game=Game(adversarial=Adversarial()))
    nets, feed = players(method, template()), batch()
    with torch.no_grad():
        for parameter in nets["critic"].outer.parameters():  # ln r = 0
            parameter.zero_()
    same(slope(method, nets, feed, judged=False), slope(method, nets, feed))


def test_losses_of_critics() -> None:
    on_real, on_fake = normal(N, seed=1), normal(N, seed=2)
    p, q = on_real.sigmoid(), on_fake.sigmoid()
    entropy = -(p.log() + (1 - q).log())
    torch.testing.assert_close(critic_loss(on_real, on_fake, "softplus"), entropy)
    torch.testing.assert_close(critic_loss(on_real, on_fake, "bce"), entropy / 2)
    hinge = (1 - on_real).clamp(min=0) + (1 + on_fake).clamp(min=0)
    torch.testing.assert_close(critic_loss(on_real, on_fake, "hinge"), hinge)
    torch.testing.assert_close(generator_loss(on_fake, "softplus"), -q.log())
    torch.testing.assert_close(generator_loss(on_fake, "bce"), -q.log())
    assert torch.equal(generator_loss(on_fake, "hinge"), -on_fake)


def test_r1_is_the_squared_gradient() -> None:
    """In the mean over directions, here exact: +-sqrt(d) along each axis have the second moments of N(0, I)."""
    sd, sigma, x = 0.7, torch.full((4,), 1.3, dtype=torch.float64), normal(1, 2, seed=1).expand(4, 2)
    directions = math.sqrt(2) * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)

    def logit(x: Tensor) -> Tensor:
        return torch.sin(x[:, 0]) + x[:, 0] * x[:, 1] ** 2

    got = r1_penalty(logit(x), logit(nudged(x, sigma, directions, sd))).mean()
    point = x[:1].clone().requires_grad_()
    (g,) = torch.autograd.grad(logit(point).sum(), point)
    exact = float(g.square().sum()) * (1.3**2 + sd**2)  # the gradient in c_in x
    assert got.item() == pytest.approx(exact, rel=20 * R1_STEP**2 * 5)


def test_the_critics_part_in_the_fake_scores_turn() -> None:
    """Its loss on real and generated samples of equal levels, with R1 and with the weight of the levels."""
    feed, start = batch(), template()
    assert feed.real is not None and feed.direction is not None
    for weighting in ("uniform", "edm"):
        game = Game(adversarial=Adversarial(critic=0.3, loss="bce", weighting=weighting, r1=0.7))  # type: ignore[arg-type]
        nets = players(SiD(game=game), start)
        sigma = game.fake_levels.scaled(LAW.unit).quantile(feed.u)
        x = nets["generator"](feed.z).detach()
        noisy, real = perturb(x, sigma, feed.eps), perturb(feed.real, sigma, feed.eps)
        near = real + R1_STEP * torch.sqrt(sigma**2 + LAW.sigma_data**2)[:, None] * feed.direction
        on_fake, on_real, on_near = (nets["critic"](nets["fake"].trace(y, sigma)[1]) for y in (noisy, real, near))
        game_loss = (nn.functional.softplus(on_fake) + nn.functional.softplus(-on_real)) / 2
        game_loss = game_loss + 0.7 * ((on_near - on_real) / R1_STEP) ** 2
        if weighting == "edm":
            sd = LAW.sigma_data
            game_loss = game_loss * (sigma**2 + sd**2) / (sigma * sd) ** 2 * (sd / 0.5) ** 2
        expected = denoising(nets["fake"](noisy, sigma), x, sigma, LAW.sigma_data) + 0.3 * game_loss
        torch.testing.assert_close(game.fake_turn().loss(nets, LAW, feed), expected)


def test_a_critic_learns_the_density_ratio() -> None:
    """On two Gaussians, whose log ratio at every noise level is known."""
    torch.manual_seed(0)
    here, there = Gaussian(torch.zeros(1), 1.0), Gaussian(torch.full((1,), 0.8), 1.0)
    game = Game(adversarial=Adversarial(critic=1.0))
    start = Preconditioned(MLP((1,), 0, 32, 2), (1,), 0, 1.0)

    class Given(Dirac):
        def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
            return z

    given = Given((1,))
    method = DiffInstruct(game=game)
    run = Trainer(CriticOnly(method, given), here, start, steps=600, seed=1)
    source = RealSource(NoiseSource((1,), (1,), 256, 0), lambda n, rng, labels: there.sample(n, rng).float())
    for _ in range(600):
        run.advance(source)
    x = torch.linspace(-1, 1.5, 6)[:, None]
    for s in (0.2, 0.6):
        sigma = torch.full((6,), s)
        with torch.no_grad():
            _, features = run.nets["fake"].trace(x, sigma)
            logit = run.nets["critic"](features)
        exact = there.log_prob(x.double(), s) - here.log_prob(x.double(), s)
        assert (logit - exact).abs().max() < 0.25
        # E_fake[r] = 1, within what the critic's own error adds
        z = here.sample(20_000, torch.Generator().manual_seed(2)).float()
        level = torch.full((len(z),), s)
        noisy = perturb(z, level, torch.randn(z.shape, generator=torch.Generator().manual_seed(3)))
        with torch.no_grad():
            ratio = run.nets["critic"](run.nets["fake"].trace(noisy, level)[1]).exp()
        assert ratio.mean().item() == pytest.approx(1, abs=0.1)


class CriticOnly:
    """The fake score's turn of a method, against a given generator."""

    product, needs_real = "generator", True

    def __init__(self, method: Any, given: nn.Module) -> None:
        self.method, self.given = method, given

    def players(self, start: Denoiser, generator: Any = None) -> dict[str, nn.Module]:
        return {**self.method.players(start), "generator": self.given}

    def optimizers(self) -> Any:
        return {k: v for k, v in self.method.optimizers().items() if k != "generator"}

    def turns(self, step: int, images: int) -> Any:
        yield self.method.game.fake_turn()


def test_teacher_features_leave_the_fake_score_to_its_own_loss() -> None:
    feed, start, teacher = batch(), template(), template(seed=9).requires_grad_(False)
    for features, reached in (("fake", True), ("teacher", False)):
        game = Game(adversarial=Adversarial(critic=1.0, features=features))  # type: ignore[arg-type]
        nets = players(DiffInstruct(game=game), start)
        nets["fake"].requires_grad_(True)
        nets["critic"].requires_grad_(True)
        turn = game.fake_turn()
        assert turn.players == ("fake", "critic")
        turn.loss(nets, teacher, feed).sum().backward()
        with_critic = torch.cat([p.grad.flatten() for p in nets["fake"].parameters() if p.grad is not None])
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in nets["critic"].parameters())
        nets.zero_grad(set_to_none=True)
        Game().fake_turn().loss(nets, teacher, feed).sum().backward()
        alone = torch.cat([p.grad.flatten() for p in nets["fake"].parameters() if p.grad is not None])
        assert torch.allclose(with_critic, alone) != reached


def test_a_critic_needs_features() -> None:
    with pytest.raises(ValueError, match=r"^template: a critic reads"):
        Game(adversarial=Adversarial()).players(LAW, None)


def test_the_ratio_is_brought_down_to_mean_one_and_clipping_is_counted() -> None:
    scale, u = RatioScale(bins=4, decay=0.0), (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    logits = 3 * normal(400, seed=1)
    logits[7] = 50.0
    scale.ratio(logits, u)
    scale.commit()
    r = scale.ratio(logits, u)
    for k in range(4):
        assert r[100 * k : 100 * (k + 1)].mean().item() == pytest.approx(1, rel=1e-12)
    assert scale.told()["clipped_logits"].item() == 2 * (logits.abs() > 10).sum().item() > 0


@pytest.mark.parametrize("raised", [False, True])
def test_samples_that_have_strayed_keep_their_small_ratio(raised: bool) -> None:
    """All of them far from the data: a mean of 1 would make them look as if they were where they should be."""
    scale, u = RatioScale(bins=2, decay=0.0, raised=raised), (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    logits = torch.full((8,), -5.0, dtype=torch.float64)
    for turn in range(3):
        told = torch.ones(8, dtype=torch.float64) if raised and turn else logits.exp()
        assert torch.allclose(scale.ratio(logits, u), told, rtol=1e-12, atol=0)
        scale.commit()


# Gates and settling ---------------------------------------------------------------------------------------------------


def test_gates_open_at_their_images() -> None:
    method = SiDA(game=Game(fake_first=100, adversarial=Adversarial(weight=1.0, after=200)))

    def played(images: int) -> tuple[int, Any]:
        turns = list(method.turns(0, images))
        return len(turns), cast(Any, turns[-1].loss).keywords["judged"] if len(turns) > 1 else None

    assert [played(i) for i in (0, 99, 100, 199, 200)] == [(1, None), (1, None), (2, False), (2, False), (2, True)]


def test_settling_waits_for_a_level_loss() -> None:
    watch, played = Settling(window=3), []
    for turn in range(15):
        watch.commit()  # a turn of somebody else counts for nothing
        for part in (0.25, 0.75):  # two micro-batches
            watch.add(torch.full((int(8 * part),), max(1.0, 2.0 - 0.2 * turn)))
        watch.commit()
        played.append(bool(watch.settled))
    # windows: 1.8, 1.2, 1.0 (a sixth), 1.0 (nothing): settled after the fourth
    assert played == [False] * 11 + [True] * 4


def test_a_generator_waits_until_the_fake_score_has_settled() -> None:
    run = Trainer(DiffInstruct(game=Game(settle=2)), LAW, template(), steps=50, seed=0)
    before = [p.clone() for p in run.nets["generator"].parameters()]
    source = NoiseSource((2,), (2,), 64, 0, dtype=torch.float64)
    while not run.nets["settling"].settled:
        told = run.advance(source)
        if run.nets["settling"].settled:  # the generator plays from this very step
            break
        assert "loss/generator" not in told and told["settling/settled"] == 0
        assert all(torch.equal(a, b) for a, b in zip(before, run.nets["generator"].parameters(), strict=True))
        assert run.step <= 49
    assert run.step >= 4 and run.images == 64 * run.step
    assert "loss/generator" in told and told["settling/settled"] == 1


# One turn for both ----------------------------------------------------------------------------------------------------


def joined(method: Any) -> Any:
    return replace(method, game=replace(method.game, joint=True))


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if hasattr(cls(), "game") and name != "sds"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_joint_turn_has_the_gradients_of_both(name: str, dropout: float) -> None:
    """On one sample, and no more than these: the generator's loss reaches no other player, nor meets its dropout."""
    method, feed, start = METHODS[name](), batch(), template()
    cast(MLP, start.network).dropout = dropout
    nets = players(method, start)
    *_, fakes, generators = method.turns(0, 10**9)
    *_, both = joined(method).turns(0, 10**9)
    assert both.players == (*generators.players, *fakes.players)

    def gradients(turn: Turn, feed: Batch) -> dict[str, Tensor]:
        nets.zero_grad()
        for player in turn.players:
            nets[player].train().requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            turn.loss(nets, LAW, feed).sum().backward()
        nets.eval().requires_grad_(False)
        return {key: p.grad for key, p in nets.named_parameters() if p.grad is not None}

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        x = nets["generator"].train()(feed.z)
    told, first = gradients(both, feed), gradients(generators, feed)
    assert all(torch.equal(told[key], value) for key, value in first.items()) and first
    assert {key.split(".")[0] for key in told} == set(both.players)
    if not dropout:  # whose masks come from a stream that the generator's call has moved
        second = gradients(fakes, replace(feed, x=x))
        assert all(torch.equal(told[key], value) for key, value in second.items()) and second
    else:
        cast(MLP, nets["fake"].network).dropout = 0.0
        without = gradients(both, feed)
        assert all(torch.equal(told[key], value) for key, value in without.items() if key.startswith("generator."))
        assert not any(torch.equal(told[key], value) for key, value in without.items() if key.startswith("fake."))


def test_joint_turns_are_the_last_of_a_step() -> None:
    def of(images: int, **fields: Any) -> list[tuple[str, ...]]:
        return [turn.players for turn in SiD(game=Game(joint=True, **fields)).turns(0, images)]

    assert of(0) == [("generator", "fake")]
    assert of(0, fake_steps=3) == [("fake",), ("fake",), ("generator", "fake")]
    assert of(9, fake_steps=2, fake_first=10) == [("fake",), ("fake",)]
    run = Trainer(SiD(game=Game(joint=True, settle=2)), LAW, template(), steps=50, seed=0)
    source = NoiseSource((2,), (2,), 64, 0, dtype=torch.float64)
    while not run.nets["settling"].settled:
        told = run.advance(source)
        waits = not run.nets["settling"].settled
        assert "loss/fake" in told and ("loss/generator+fake" not in told) == waits
        assert run.step <= 49
    assert run.advance(source).keys() & {"loss/fake", "loss/generator+fake"} == {"loss/generator+fake"}


# Points, pairs and NaN ------------------------------------------------------------------------------------------------


def test_sds_is_diff_instruct_of_one_point() -> None:
    point = Dirac((2,), scale=2.0).double()
    feed = batch((1,))
    nets, plain = nn.ModuleDict({"generator": point}), SDS(levels=LogNormal(), weight="uniform")
    same(
        slope(plain, nets, feed),
        torch.autograd.grad(by_hand(point, feed).sum(), point.points)[0].flatten(),
    )
    # in closed form: for N(0, sd^2) the pull is (1 - b) x, b = sd^2 / (sd^2 + sigma^2), in the mean over +-eps
    law = Gaussian(torch.zeros(2), 0.5)
    mirrored = replace(feed, z=feed.z.repeat(2, 1), u=feed.u.repeat(2), eps=torch.cat([feed.eps, -feed.eps]))
    sigma = LogNormal().scaled(law.unit).quantile(mirrored.u)
    exact = ((sigma**2 / (sigma**2 + 0.25)).sum() * 2.0 * point.points * 2.0).flatten()
    same(slope(plain, nets, mirrored, law), exact.detach() / law.unit**2)


def by_hand(point: Dirac, feed: Batch) -> Tensor:
    x = point(feed.z)
    sigma = LogNormal().scaled(LAW.unit).quantile(feed.u)
    real = LAW(x.detach() + sigma[:, None] * feed.eps, sigma)
    return diff_instruct_loss(x, x.detach(), real) / LAW.unit**2


def test_sds_reaches_a_mode() -> None:
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    ring = Mixture([1.0] * 8, 2 * torch.stack([angles.cos(), angles.sin()], 1), [0.1] * 8)
    start = Preconditioned(MLP((2,), 0, 8, 1), (2,), 0, ring.sigma_data)
    run = Trainer(SDS(), ring, start, steps=800, seed=4)
    for _ in range(800):
        run.advance(NoiseSource((2,), (1,), 64, 4))
    end = run.ema.module(torch.zeros(1, 1))
    assert (end - 2 * torch.stack([angles.cos(), angles.sin()], 1)).norm(dim=1).min() < 0.1


def test_points_have_classes() -> None:
    points = Dirac((2,), classes=3)
    rows = torch.eye(3)[[2, 0, 2]]
    assert torch.equal(points(torch.zeros(3, 1), rows), points.points[[2, 0, 2]] * points.scale)
    assert points(torch.zeros(4, 1)).shape == (4, 2)


def test_dmd_regresses_on_its_pairs() -> None:
    feed, nets = batch(), players(DMD(), template())
    assert feed.pairs is not None
    gap = (nets["generator"](feed.pairs.z) - feed.pairs.x) / LAW.unit
    method = DMD(regression=0.7)
    extra = method.loss(nets, LAW, feed) - DMD(regression=0.0).loss(nets, LAW, feed)
    torch.testing.assert_close(extra, 0.7 * gap.square().sum(1))


def test_dmds_huber_pulls_every_coordinate_alike_in_any_dimension() -> None:
    for d in (2, 64, 3072):
        x = torch.zeros(1, d, dtype=torch.float64, requires_grad=True)
        feed = Batch(x, torch.zeros(1), x, pairs=Pairs(x, torch.full_like(x, 0.3 * LAW.unit), None))
        value = DMD(distance="huber").regress(nn.ModuleDict({"generator": Echo()}), LAW, feed).sum()
        (pull,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(pull * LAW.unit, -torch.ones_like(pull), rtol=1e-4, atol=0)


class Echo(nn.Module):
    """A generator that gives its latents."""

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return z


def test_one_bad_sample_stops_the_update_and_is_named() -> None:
    class Broken(Denoiser):
        """NaN for one sample, of which the trainer must know the number over all micro-batches."""

        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            self.calls += 1
            bad = torch.arange(len(x))[:, None] == (self.sick if self.calls == self.at else -1)
            return torch.where(bad, math.nan, LAW(x, sigma))

        def __init__(self, at: int, sick: int) -> None:
            super().__init__((2,), 0, LAW.sigma_data)
            self.calls, self.at, self.sick = 0, at, sick

    for parts, at, sick, index in ((1, 0, 0, None), (1, 1, 4, 4), (2, 1, 0, 0), (2, 2, 1, 4), (3, 3, 0, 4)):
        run = Trainer(SiD(), Broken(at, sick), template(), steps=9, seed=0)
        source = NoiseSource((2,), (2,), 6, 0, micro_batches=parts, dtype=torch.float64)
        if index is None:
            run.advance(source)  # the batch is healthy
            continue
        before = [p.clone() for p in run.nets["generator"].parameters()]
        with pytest.raises(NonFinite, match=rf"turn of generator at step 0 \(seed 0\).*first bad sample: {index} of 6"):
            run.advance(source)
        assert all(torch.equal(a, b) for a, b in zip(before, run.nets["generator"].parameters(), strict=True))


def test_dropping_nan_is_leaving_samples_out_at_an_unchanged_divisor() -> None:
    """The bad sample's NaN is born within a network, teacher or fake score: a gradient of 0 through it is NaN."""
    feed, bad = batch(), 5

    class Broken(Denoiser):
        def __init__(self, inner: Denoiser) -> None:
            super().__init__((2,), 0, LAW.sigma_data)
            self.inner = inner

        def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
            root = torch.where(sigma == levels[bad], -1.0, 1.0).sqrt()
            return self.inner(x * root[:, None], sigma)

    kept = torch.arange(N) != bad
    rest = feed.mapped(lambda tensor: tensor[kept])
    for game in (Game(), Game(adversarial=Adversarial(weight=0.1, features="teacher"))):
        method = SiD(game=game)
        levels = method.levels.scaled(LAW.unit).quantile(feed.u)
        sound, start = template(seed=9), template()
        nets = players(method, start)
        broken = Broken(sound) if game.adversarial is None else sound
        spoiled = nn.ModuleDict({**nets, "fake": nets["fake"] if game.adversarial is None else Broken(nets["fake"])})
        dropping = replace(method, nan="drop")
        assert dropping.loss(spoiled, broken, feed)[bad] == 0
        same(slope(dropping, spoiled, feed, broken), slope(method, nets, rest, sound))
        assert not torch.isfinite(slope(method, spoiled, feed, broken)).all()
        assert torch.equal(slope(dropping, nets, feed, sound), slope(method, nets, feed, sound))


# Theory ---------------------------------------------------------------------------------------------------------------


def test_the_integral_kl_tells_disjoint_laws_apart() -> None:
    """KL(N(a, s^2 I) || N(0, s^2 I)) = a^2 / (2 s^2) is infinite for points, s = 0. IKL = E w KL of the noised laws is
    finite, grows with the distance, and its slope is what the method computes.
    """
    feed, method, grid = batch(), DiffInstruct(levels=LogNormal(0.0, 1.0)), (torch.arange(N).double() + 0.5) / N
    for width in (1e-9, 0.3):
        origin = Gaussian(torch.zeros(2, dtype=torch.float64), width)
        sigma = method.levels.scaled(origin.unit).quantile(grid)

        def integral(a: float, sigma: Tensor = sigma, width: float = width) -> float:
            """E[sigma^2 KL(N(a, (s^2 + sigma^2) I) || N(0, ...))], on the batch's levels."""
            return float((sigma**2 * a**2 / (2 * (sigma**2 + width**2))).mean())

        slopes = []
        for distance in (3.0, 30.0):
            point = Dirac((2,), scale=1.0).double()
            with torch.no_grad():
                point.points.copy_(torch.tensor([[distance, 0.0]]))
            # the exact fake score of a student N(point, s^2 I)
            fake = Gaussian(torch.tensor([distance, 0.0], dtype=torch.float64), width)
            nets = nn.ModuleDict({"generator": Shaken(point, width), "fake": fake})
            (g,) = torch.autograd.grad(method.loss(nets, origin, feed).mean() * origin.unit**2, point.points)
            step = 1e-4 * distance
            numeric = (integral(distance + step) - integral(distance - step)) / (2 * step)
            assert g[0, 0].item() == pytest.approx(numeric, rel=1e-6) and abs(g[0, 1].item()) < 1e-6 * numeric
            slopes.append(g[0, 0].item())
        assert math.isfinite(integral(30.0)) and integral(30.0) > 99 * integral(3.0) > 0
        assert slopes[1] == pytest.approx(10 * slopes[0], rel=1e-6)
    kl = torch.distributions.kl_divergence(*(torch.distributions.Normal(torch.tensor(a), 1e-9) for a in (3.0, 0.0)))
    assert kl > 1e18


class Shaken(nn.Module):
    """A point with Gaussian noise of a width, as a generator."""

    def __init__(self, point: nn.Module, width: float) -> None:
        super().__init__()
        self.point, self.width = point, width

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.point(z, cond)) + self.width * z


def test_diff_instruct_at_sigma_0_is_the_kl_gan_update() -> None:
    """With exact scores, (s_p - s_q) at sigma -> 0 is -grad ln r, what a GAN on KL takes from a perfect critic."""
    student = Mixture([0.5, 0.5], torch.tensor([[-0.8, 0.0], [0.7, 0.2]], dtype=torch.float64), [0.4, 0.5])
    x = student.sample(200, torch.Generator().manual_seed(0)).requires_grad_()
    log_ratio = LAW.log_prob(x) - student.log_prob(x)
    (gan,) = torch.autograd.grad(-log_ratio.sum(), x)
    for s, tolerance in ((1e-2, 1e-2), (1e-3, 1e-4), (1e-4, 1e-6)):
        sigma = torch.tensor(s, dtype=torch.float64)
        with torch.no_grad():
            fake, real = student(x, sigma), LAW(x, sigma)
        (di,) = torch.autograd.grad(diff_instruct_loss(x, fake, real).sum() / s**2, x)
        assert (di - gan).norm() <= tolerance * gan.norm()


def test_health_is_measured_by_level() -> None:
    method = SiD()
    nets, feed = players(method, template()), batch()
    told = method.health(nets, LAW, feed)
    gaps = {key: value for key, value in told.items() if key.startswith("gap/")}
    assert len(gaps) == 6 and "fake_loss" in told
    view = method.game.view(nets, LAW, feed, method.levels)
    squares = (view.fake - view.real).square().mean(1) / LAW.sigma_data**2
    for (key, value), rows in zip(gaps.items(), torch.arange(N).chunk(6), strict=True):
        assert value.item() == pytest.approx(squares[rows].mean().log().item(), rel=1e-9)
        middle = LogNormal().quantile(feed.u[rows].mean())
        assert float(key[4:]) == pytest.approx(middle.item(), rel=0.02)
    equal = nn.ModuleDict({"generator": nets["generator"], "fake": LAW})
    assert all(v == -math.inf for k, v in method.health(equal, LAW, feed).items() if k.startswith("gap/"))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: SiDA(game=Game()), "game.adversarial: "),
        (lambda: FDistill(game=Game()), "game.adversarial: "),
        (lambda: METHODS["uni_instruct"](game=Game()), "divergence: jensen_shannon needs the density ratio"),
        (lambda: DMD(game=Game(calls=2)), "game.calls: "),
        (lambda: DMD(pairs=0), "pairs: "),
        (lambda: DMD(regression=math.nan), "regression: "),
        (lambda: SDS(weight="none"), "weight: "),  # type: ignore[arg-type]
        (lambda: SDS().players(LAW, OneStep(template(), 1.0)), "generator: "),
        (lambda: Adversarial(weight=-1), "weight: "),
        (lambda: Adversarial(after=-1), "after: "),
        (lambda: Guidance(teacher=math.inf), "teacher: "),
        (lambda: Guidance(dropout=1.0), "dropout: "),
        (lambda: Game(settle=-1), "settle: "),
        (lambda: DiffInstruct(updated_at=0.0, game=Game(joint=True)), "game.joint: "),
        (lambda: SiD(nan="repair"), "nan: "),  # type: ignore[arg-type]
        (lambda: UniInstruct(as_released=True), "as_released: the public code runs for forward_kl and jeffreys"),
    ],
)  # fmt: skip
def test_bad_fields(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}") as error:
        make()
    assert "\n" not in str(error.value)


def test_a_critic_starts_undecided() -> None:
    assert torch.equal(Critic(8)(torch.randn(5, 8)), torch.zeros(5))
