"""Implicit rewards (Eq. 6): r_i(x, y) = beta · (log pi_i(y|x) − log pi_ref(y|x)), for the policies of a set and for their soups.

    model = RewardModel.load(base_folder, PolicyStore(folder), base_sha256=…)
    [[rewards_of_y1, rewards_of_y2]] = model.score("demo:1", [Group(x, [y1, y2])], soups=[{"concise": 0.5, "warm": 0.5}])

One base model computes them all. A batch row is a model: the reference, a policy or a soup is nothing but a row of LoRA
coefficients (sipo.lora). Along a row lie prompts, each once, with all their responses end to end; attention lets each response see
its prompt and itself. So there is no padding, and no response can change another's value.

Token ids in, rewards out: prompt formats, queues and HTTP are the caller's business.
"""

from sipo.rewards.model import RewardModel, per_token
from sipo.rewards.packing import Group
from sipo.selection import Rewards

__all__ = ["Group", "RewardModel", "Rewards", "per_token"]
