"""A policy's weights laid out as a scorer that shares them reads them in fewest launches."""

from collections import Counter

from torch import nn

from guided_decode.forward.joint_linear import JointLinear

# Modules of a decoder layer that read one input, by their names.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def join_weights(model: nn.Module) -> int:
    """Puts weights that read the same input side by side in memory: those to queries, keys and
    values, and those of gate and up.

        join_weights(policy)
        scorer = load_scorer(policy, kind="trunk-head", head=...)

    A scorer that shares the policy's weights, as a trunk head's does, may not move them, and runs a
    decoder layer on a GPU in thirteen launches; of weights that lie so it runs it in ten. The
    parameters become views of one tensor for each such group, which is copied once. Their values
    and names stay, and so does what `generate`, `save_pretrained`, an optimizer or an adapter makes
    of them. What moves them (`to` another device or dtype, `load_state_dict(assign=True)`) undoes
    it, which is seen; call it again, and load the scorer again.

    Args:
        model: a transformers model in memory, or any module with such layers.

    Returns:
        How many groups lie side by side now. Weights that are tied, quantised, sharded or spread
        over devices, whose modules are no plain `nn.Linear` (an adapter's, say), or on which hooks
        are put, stay where they are.
    """
    held = [each for _, each in model.named_parameters(remove_duplicate=False)]
    times = Counter(each.data_ptr() for each in held)
    joined = 0
    for layer in model.modules():
        for names in _TOGETHER:
            modules = [getattr(layer, name, None) for name in names]
            found = [each for each in modules if isinstance(each, nn.Linear)]
            if len(found) < len(names):
                continue
            weights = [weight for each in found for weight in each.parameters()]
            alone = all(times[weight.data_ptr()] == 1 for weight in weights)
            joined += JointLinear(found, owned=alone).is_joined
    return joined
