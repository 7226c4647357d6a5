"""How unlike known prompts a prompt is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from danlu.align.familiar import RIDGE, Familiar
from danlu.align.reward import RewardModel
from danlu.core.errors import UserError
from danlu.data.conversations import Messages
from danlu.model.checkpoint import load, save_model
from danlu.tokens.chat import render_prompt


def asked(text: str) -> Messages:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def judge(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    model, tokenizer = load(chat_model, dtype=torch.float32)
    model.give_scores()
    folder = tmp_path_factory.mktemp("judge")
    save_model(model, folder, tokenizer)
    return RewardModel(folder)


def test_distances_are_those_of_scipy(judge: RewardModel) -> None:
    known = [asked(f"Where is the cat {n}?") for n in range(300)]
    others = [asked("Where is the cat 7?"), asked("!! 0x1f ;; zzz"), asked("The mill?")]

    def states(prompts: list[Messages]) -> np.ndarray:
        return np.array(
            [
                judge.model.hidden(torch.tensor([render_prompt(one, judge.tokenizer)]))[0, -1].tolist()
                for one in prompts
            ]
        )

    seen = states(known)
    covariance = np.cov(seen.T)
    inverse = np.linalg.inv(covariance + RIDGE * np.diag(covariance).mean() * np.eye(len(covariance)))
    wanted = [mahalanobis(one, seen.mean(0), inverse) ** 2 for one in states(others)]
    found = Familiar(judge, known)(others)
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found[1] > 3 * found[0]


def test_too_few_to_know(judge: RewardModel) -> None:
    with pytest.raises(UserError, match="5 known prompts, and the model has"):
        Familiar(judge, [asked(f"Is {n} hot?") for n in range(5)])
