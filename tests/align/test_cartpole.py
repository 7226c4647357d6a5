"""PPO's functions on a task that everybody knows: Gymnasium's CartPole, solved at 475 of 500 steps."""

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from danlu.align.advantages import gae, whitened
from danlu.align.policy_losses import clipped, clipped_values


def network(out: int, gain: float) -> nn.Sequential:
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, out)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


@torch.no_grad()
def episodes(
    envs: gymnasium.vector.VectorEnv, policy: nn.Module, seed: int, greedy: bool = False
) -> list[Tensor]:
    """One episode of each environment, side by side: states, actions, and which steps were taken."""
    state, _ = envs.reset(seed=seed)
    going = np.ones(envs.num_envs, bool)
    states, actions, mask = [], [], []
    while going.any():
        logits = policy(torch.from_numpy(state))
        action = logits.argmax(-1) if greedy else torch.distributions.Categorical(logits=logits).sample()
        states.append(torch.from_numpy(state.copy()))
        actions.append(action)
        mask.append(torch.from_numpy(going.copy()))
        state, _, ended, cut, _ = envs.step(action.numpy())
        going &= ~(ended | cut)
    return [torch.stack(part, 1) for part in (states, actions, mask)]


@pytest.mark.parametrize("seed", [0])
def test_cartpole(seed: int) -> None:
    torch.manual_seed(seed)
    envs = gymnasium.make_vec("CartPole-v1", 16, vectorization_mode="sync")
    policy, critic = network(2, 0.01), network(1, 1.0)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5)
    best = 0.0
    for iteration in range(150):
        states, actions, taken = episodes(envs, policy, seed=1000 * seed + iteration)
        mask = taken.float()
        if mask.sum(1).mean() >= 490:
            best = episodes(envs, policy, seed=10**6 + seed, greedy=True)[2].sum(1).float().mean().item()
            if best >= 475:
                break
        with torch.no_grad():
            old = policy(states).log_softmax(-1).gather(2, actions[..., None])[..., 0]
            before = critic(states)[..., 0] * mask
        advantages = gae(mask, before, mask, discount=0.99, decay=0.95)  # one reward a step
        returns, advantages = advantages + before, whitened(advantages, mask)
        for _ in range(10):
            now = policy(states).log_softmax(-1).gather(2, actions[..., None])[..., 0]
            losses = clipped(now - old, advantages)
            losses = losses + 0.5 * clipped_values(critic(states)[..., 0], before, returns, clip=0)
            optimizer.zero_grad()
            ((losses * mask).sum() / mask.sum()).backward()
            nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    assert best >= 475
