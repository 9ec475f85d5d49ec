"""Options of training stages that would end well and do something else than was meant are refused."""

import pytest
from mambabench.distillers.plugin import DpoConfig, ProgressiveConfig, SftConfig, TrainTeacherConfig
from mambabench.harness.config import plain

STAGES = {
    ProgressiveConfig: {"data": "text", "tokens": 100},
    SftConfig: {"data": "text", "tokens": 100},
    DpoConfig: {"data": "pairs"},
    TrainTeacherConfig: {"data": "text", "tokens": 100},
}


@pytest.mark.parametrize("stage", STAGES)
def test_warmup_is_a_share_of_all_steps(stage: type) -> None:
    for share in (0, 0.33, 0.999):
        assert stage(**STAGES[stage], warmup=share).warmup == share
    for steps in (500, 1, -1, -0.1, float("nan")):
        with pytest.raises(
            ValueError, match=rf"^warmup is {steps}; it is a share of all steps, at least 0 and below 1"
        ):
            stage(**STAGES[stage], warmup=steps)


@pytest.mark.parametrize("option", [{"kl_kind": "reverse"}, {"kl_kind": "js"}, {"js_beta": 0.2}, {"temperature": 2.0}])
@pytest.mark.parametrize("stage", [ProgressiveConfig, SftConfig])
def test_a_divergence_that_has_no_weight_has_no_options(stage: type, option: dict) -> None:
    assert stage(**STAGES[stage], kl=0.1, **option)
    with pytest.raises(ValueError, match=rf"^{next(iter(option))} is set and kl is 0, so that there is no divergence$"):
        stage(**STAGES[stage], kl=0, **option)


@pytest.mark.parametrize("stage", [ProgressiveConfig, SftConfig, DpoConfig])
def test_a_batch_is_split_evenly(stage: type) -> None:
    assert stage(**STAGES[stage], batch=12, accumulation=4).accumulation == 4
    for accumulation in (5, 24):
        with pytest.raises(ValueError, match=rf"^accumulation is {accumulation}, which does not divide batch = 12$"):
            stage(**STAGES[stage], batch=12, accumulation=accumulation)


@pytest.mark.parametrize("stage", [ProgressiveConfig, SftConfig, DpoConfig])
def test_how_a_stage_is_computed_is_no_part_of_a_key(stage: type) -> None:
    how = {"accumulation": 4, "checkpointing": True, "parallel": "fsdp", "slice": 64}
    if stage is DpoConfig:
        how["precompute"] = True
    one, other = stage(**STAGES[stage], batch=32), stage(**STAGES[stage], batch=32, **how)
    assert plain(one, defaults=False) == plain(other, defaults=False)
    assert plain(other).items() >= how.items()
