import math

import pytest
import torch
from torch import Tensor, nn

from headwise.training import OptimiserSpec, constant, fit, fit_seeds, trapezoid, warmup_cosine


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(step: int, generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randn(16, 3, generator=generator)
    return {"x": x, "y": x.sum(-1, keepdim=True).sin()}


def loss(model, batch):
    value = (model(batch["x"]) - batch["y"]).square().mean()
    return value, {"rmse": value.detach().sqrt()}


def fresh(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def test_a_run_repeats_bit_for_bit_and_lowers_the_loss():
    one, two = fresh(), fresh()
    first = fit(one, batches, loss, steps=60, seed=3, optimiser=OptimiserSpec(lr=1e-2))
    second = fit(two, batches, loss, steps=60, seed=3, optimiser=OptimiserSpec(lr=1e-2))
    assert first.losses == second.losses
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert sum(first.losses[-10:]) < sum(first.losses[:10])
    assert [record["step"] for record in first.records] == [0, 59] and "rmse" in first.records[0]


def test_the_global_generator_is_left_alone():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    fit(fresh(), batches, loss, steps=2, seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("spec", [OptimiserSpec(lr=1e-2, weight_decay=0.1), OptimiserSpec("sgd", 0.05, momentum=0.9)])
def test_seeds_in_one_loop_equal_seeds_alone(spec):
    schedule = warmup_cosine(5)
    together, history = fit_seeds(
        build, batches, loss, steps=30, seeds=[0, 4], optimiser=spec, schedule=schedule, clip=0.1
    )
    for index, seed in enumerate([0, 4]):
        alone = fresh(seed)
        losses = fit(alone, batches, loss, steps=30, seed=seed, optimiser=spec, schedule=schedule, clip=0.1).losses
        torch.testing.assert_close(torch.tensor(losses), torch.tensor([row[index] for row in history.losses]))
        for a, b in zip(alone.parameters(), together[index].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masked_entries_stay_bit_identical_under_decay_and_momentum():
    model = fresh()
    before = model.get_parameter("0.weight").detach().clone()
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])[:, None]
    fit(model, batches, loss, steps=20, optimiser=OptimiserSpec(lr=1e-2, weight_decay=0.5), masks={"0.weight": mask})
    after = model.get_parameter("0.weight")
    assert torch.equal(after[[1, 4]], before[[1, 4]])
    assert not torch.isclose(after[[0, 2]], before[[0, 2]]).any()


def test_checkpoints_come_at_their_steps_and_zero_is_the_start():
    seen: dict[int, Tensor] = {}
    model = fresh()
    start = model.get_parameter("0.weight").detach().clone()
    fit(
        model,
        batches,
        loss,
        steps=4,
        checkpoints=[0, 2, 4],
        on_checkpoint=lambda step, m: seen.update({step: m.get_parameter("0.weight").detach().clone()}),
    )
    assert list(seen) == [0, 2, 4] and torch.equal(seen[0], start)
    assert torch.equal(seen[4], model.get_parameter("0.weight"))


def test_schedules_have_the_stated_shape():
    assert constant(7, 10) == 1.0
    cosine = warmup_cosine(10, final=0.1)
    assert cosine(0, 110) == pytest.approx(0.1) and cosine(9, 110) == 1.0
    assert cosine(60, 110) == pytest.approx(0.55) and cosine(110, 110) == pytest.approx(0.1)
    ramp = trapezoid(10, decay=0.5)
    assert ramp(0, 100) == pytest.approx(0.1) and ramp(30, 100) == 1.0 and ramp(75, 100) == pytest.approx(0.5)


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"masks names 'nope'"):
        fit(fresh(), batches, loss, steps=1, masks={"nope": torch.ones(1)})
    with pytest.raises(ValueError, match="ran out before step 3"):
        fit(fresh(), [batches(0, torch.Generator())], loss, steps=3)
    with pytest.raises(ValueError, match=r"loss is .*nan.* at step 0"):
        fit(fresh(), batches, lambda model, batch: model(batch["x"]).mean() * math.nan, steps=2)
    with pytest.raises(ValueError, match="expected 'adamw' or 'sgd'"):
        fit(fresh(), batches, loss, steps=1, optimiser=OptimiserSpec("adam"))
    with pytest.raises(TypeError, match="each seed has its own"):
        fit_seeds(build, [], loss, steps=1, seeds=[0])


def test_autocast_runs_the_loss_in_the_low_precision():
    seen = []

    def spy(model, batch):
        out = model(batch["x"])
        seen.append(out.dtype)
        return out.float().square().mean()

    fit(fresh(), batches, spy, steps=1, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16]
