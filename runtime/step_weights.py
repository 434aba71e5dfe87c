"""The weights that a step reads and multiplies, of the model as loaded: what a step costs at least."""

from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.bare_model import BareModel

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts")  # what configurations call them


class Weights(NamedTuple):
    """Bytes of those that every step reads and of all routed experts, the share of experts that one token chooses, and
    weights that multiply one token."""

    shared_bytes: int
    routed_bytes: int
    chosen_share: float
    num_active: int

    def read_bytes(self, num_tokens: int) -> float:
        """What a step of so many tokens reads. Source: tokens choose independently, so an expert is left out by all of
        them with (1 - share)^tokens."""
        return self.shared_bytes + self.routed_bytes * (1.0 - (1.0 - self.chosen_share) ** num_tokens)


def weights_of(model: "PreTrainedModel | BareModel") -> Weights:
    """Embeddings that are not the head too are left out, since a step reads the rows of its tokens only."""
    config = model.config.get_text_config()
    embedding = None
    if not getattr(config, "tie_word_embeddings", True):
        with suppress(NotImplementedError):  # a foreign model that does not say which they are
            embedding = model.get_input_embeddings().weight
    counts = (getattr(config, name, None) for name in EXPERT_COUNTS)
    num_experts = next((num for num in counts if isinstance(num, int) and num > 0), None)
    chosen_share = 1.0
    if num_experts:
        chosen_share = (getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts
    num_shared = num_routed = shared_bytes = routed_bytes = 0
    for name, weight in model.named_parameters():
        if weight is embedding:
            continue
        if num_experts and ".experts." in name:
            num_routed, routed_bytes = num_routed + weight.numel(), routed_bytes + weight.nbytes
        else:
            num_shared, shared_bytes = num_shared + weight.numel(), shared_bytes + weight.nbytes
    return Weights(shared_bytes, routed_bytes, chosen_share, num_shared + int(chosen_share * num_routed))
