"""The reward-model baseline from end to end: verdicts, reward model, maximiser; and what it cannot reach."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from dno_jax import games, iteration
from dno_jax.config import RunConfig, load_config
from dno_jax.losses import nash_md_pg_loss
from dno_jax.preferences import transformed
from dno_jax.runtime.runtime import Runtime
from dno_jax.stages import reward
from dno_jax.stages.judge_on_devices.reward_model import bradley_terry

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs" / "variants" / "reward_maximisation.yaml"
CYCLE = games.cyclic_game()


def test_the_recipe_maximises_the_reward_itself():
    """Log-odds of Bradley-Terry are differences of rewards: the advantage is a reward less the mean of the others'."""
    config = load_config(RunConfig, RECIPE)
    rewards, count = np.asarray([0.3, -1.2, 2.0, 0.7]), 4
    odds = transformed(np.asarray(bradley_terry(rewards.tolist(), temperature=1.0)), transform=config.pairing.transform)
    rate = np.asarray([np.delete(odds[i], i).mean() for i in range(count)])
    others = (rewards.sum() - rewards) / (count - 1)
    np.testing.assert_allclose(rate - 0.5, rewards - others, atol=1e-12)
    # At the policy that sampled, the loss is -(advantage - tau log pi/pi_0), whose gradient is REINFORCE's.
    shift, tau = np.asarray([0.0, 0.4, -0.2, 0.1]), config.reference.tau
    loss = nash_md_pg_loss(
        logprob=shift, previous_logprob=shift, initial_logprob=np.zeros(count), win_rate=rate, tau=tau,
        clip_range=config.loss.clip_range,
    )  # fmt: skip
    np.testing.assert_allclose(loss, -(rewards - others - tau * shift), rtol=1e-5)
    assert (config.annotation.kind, config.pairing.rule, config.loss.name) == ("reward_model", "matching", "nash_md_pg")
    assert config.outer.scheme == "last"  # KL to the initial policy, not to the last one


@pytest.mark.soak
def test_a_reward_model_leads_a_language_model_away_from_nash(tmp_path, monkeypatch):
    """On the verdicts of a cycle Bradley-Terry has a best answer, and its maximiser is beaten 9 times in 10."""
    monkeypatch.setattr(iteration, "_report", lambda *_, **__: None)  # most of the time that so small a model takes
    example = runpy.run_path(str(ROOT / "examples" / "cyclic_game.py"), run_name="cyclic_game")
    example["make_policy"](tmp_path)
    path = example["make_reward_model"](tmp_path)
    assert path.is_dir()
    # Paper beats rock, which policy 0 mostly says: the best fit to its samples likes paper. 1,300 verdicts have noise.
    config = example["reward_config"](tmp_path)
    runtime = Runtime.start(config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})}))
    pairs = reward.preferences_of(runtime).rows
    found = reward.rewards_of(runtime, reward.initial_params(runtime), pairs[:60])
    fit = games.bradley_terry_rewards(CYCLE, sampling=[0.5, 0.3, 0.2])
    assert sorted(np.unique(found.round(4)).tolist(), reverse=True)[0] - found.min() == pytest.approx(
        fit.max() - fit.min(), abs=0.25
    )
    one = example["play"](tmp_path, "reward_maximisation", "iterations=3")
    assert one.policies[-1].argmax() == fit.argmax() == 1
    assert one.policies[-1, 1] > 0.8
    assert one.gaps[-1] > 0.6  # .8 where all is paper, which scissors beat 9 times in 10; the Nash policy's is 0
    assert one.gaps[-1] > one.gaps[0] + 0.3
    assert one.other < 0.01
