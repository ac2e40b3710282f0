"""torch's AdamW in Megatron-Core 0.16's distributed optimizer, where neither Transformer Engine's nor apex's is there.

Line numbers are of megatron-core 0.16.1.
"""

from __future__ import annotations

from typing import Any

import torch

_already_done = False


def step_device(group: dict[str, Any], param: torch.Tensor) -> torch.device:
    """Where AdamW keeps the number of steps: beside the parameter if it is fused, else on the host."""
    return param.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def mend_torch_adam() -> None:
    """Let DistributedOptimizer save and load torch's AdamW, which stands in for a fused one.

    distrib_optimizer.py: 642 asserts a step where a fresh optimizer has none; 818-826 gives every parameter the same
    `step` tensor, which each of them then increments; 938 copies 'step' too, which the fully reshardable form does
    not hold, and does so outside no_grad.
    """
    from megatron.core.optimizer import distrib_optimizer as module

    global _already_done
    if module.HAVE_APEX_OR_TE or _already_done:
        return
    _already_done = True
    cls = module.DistributedOptimizer
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict

    def prime(self) -> None:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    self.optimizer.state[param] = {
                        "step": torch.zeros((), device=step_device(group, param)),
                        "exp_avg": torch.zeros_like(param, requires_grad=False),
                        "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
                    }

    def primed_state_dict(self):
        prime(self)
        return state_dict(self)

    def primed_load_state_dict(self, state):
        prime(self)
        load_state_dict(self, state)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                values = self.optimizer.state[param]
                values["step"] = values["step"].to(step_device(group, param), copy=True)

    @torch.no_grad()
    def set_states(self, model_param, tensors):
        group_index, group_order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group_index]["params"][group_order]
        for key, value in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":  # comes with the parameter group
                value.copy_(tensors[key])

    cls.state_dict, cls.load_state_dict = primed_state_dict, primed_load_state_dict
    cls._set_main_param_and_optimizer_states = set_states
