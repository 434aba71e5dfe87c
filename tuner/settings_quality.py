"""Whether and how the model's answers are watched, and how much worse still counts as equal."""

from pydantic import Field

from runtime.scoring import MAX_PIECE_TOKENS
from tuner.settings_section import Section


class QualitySettings(Section):
    """The canary set: known texts, read by the champion now and then and by whatever may change its answers."""

    enabled: bool = True
    """False checks nothing; knobs that change the model's answers then never move."""
    every_s: float = Field(default=300.0, ge=10, le=86400)
    """Seconds between two checks of the champion against the first one of this model and machine."""
    max_delta_nll: float = Field(default=0.02, gt=0, le=1)
    """Loss per token, in nats, up to which a configuration counts as equal; held with 95 percent confidence."""
    min_top1_agreement: float = Field(default=0.95, ge=0.5, lt=1)
    """Share of positions at which the same token must be the likeliest; held with 95 percent confidence."""
    piece_tokens: int = Field(default=64, ge=1, le=MAX_PIECE_TOKENS)
    """Tokens read between two steps of serving; a request never waits longer than for one such piece."""
